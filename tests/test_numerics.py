"""What chapter 12 promises: errors of rounded scores are bounded, sums are long enough, gradients are rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import topk

Loss = Callable[[Tensor, Tensor], Tensor]
K = 3
HALF_TYPES = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FOCAL = 2 * max((1 - p) ** 3 + 2 * p * (1 - p) ** 2 * -math.log(p) for p in (i / 10_000 for i in range(1, 10_000)))


def hinge(variant: str) -> Loss:
    return lambda scores, target: topk.topk_hinge_loss(scores, target, K, variant=variant, reduction="none")


# The bound of the gradient's L1 norm, where there is one.
LOSSES: dict[str, tuple[Loss, float | None]] = {
    "smooth": (lambda s, t: topk.smooth_topk_loss(s, t, K, reduction="none"), 2 / K),
    "smooth, small tau": (lambda s, t: topk.smooth_topk_loss(s, t, K, tau=0.05, reduction="none"), 2 / K),
    "transition, fixed": (lambda s, t: topk.transition_topk_loss(s, t, K, transition=0.7, reduction="none"), 2.0),
    "transition": (lambda s, t: topk.transition_topk_loss(s, t, K, reduction="none"), None),
    "noised": (lambda s, t: topk.noised_topk_loss(s, t, K, samples=None, reduction="none"), 2.0),
    "noised, scaled": (lambda s, t: topk.noised_topk_loss(s, t, K, samples=None, scale=3.0, reduction="none"), 6.0),
    "differentiable": (lambda s, t: topk.differentiable_topk_loss(s, t, K, reduction="none"), None),
    "ldam": (lambda s, t: topk.ldam_loss(s, t, margins=0.5, scale=4.0, reduction="none"), 8.0),
    "focal": (lambda s, t: topk.focal_loss(s, t, reduction="none"), FOCAL),
    "smooth_limit": (hinge("smooth_limit"), 2 / K),
    **{variant: (hinge(variant), 2.0) for variant in ("calibrated", "kth", "alpha", "beta", "entropy")},
}
BOUNDED = {name: (loss, bound) for name, (loss, bound) in LOSSES.items() if bound is not None}


def value_and_gradient(loss: Loss, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, target)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    return value.detach(), gradient


def problem(scale: float, rows: int = 60, classes: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    scores = scale * torch.randn(rows, classes, dtype=torch.float64, generator=generator)
    return scores, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 100.0])
def test_gradients_are_no_longer_than_the_constant(name: str, scale: float) -> None:
    loss, bound = BOUNDED[name]
    _, gradient = value_and_gradient(loss, *problem(scale))
    assert gradient.abs().sum(1).max() <= bound * (1 + 1e-9)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_constant_is_needed(name: str) -> None:
    loss, bound = BOUNDED[name]
    norms = [value_and_gradient(loss, *problem(scale, rows=4000))[1].abs().sum(1).max() for scale in (1.0, 5.0, 50.0)]
    assert max(norms) > 0.98 * bound


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("kind", HALF_TYPES)
def test_rounded_scores_cost_no_more_than_the_constant(name: str, kind: torch.dtype) -> None:
    loss, bound = BOUNDED[name]
    for scale in (0.1, 1.0, 10.0, 1000.0):
        scores, target = problem(scale)
        change = (loss(scores.to(kind).double(), target) - loss(scores, target)).abs()
        assert (change <= bound * HALF_TYPES[kind] * scores.abs().max(1).values * (1 + 1e-6) + 1e-9).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", HALF_TYPES)
@pytest.mark.parametrize("classes", [4, 300])
def test_gradients_are_rounded_once(name: str, kind: torch.dtype, classes: int) -> None:
    loss, _ = LOSSES[name]
    scores, target = problem(3.0, classes=classes)
    value, gradient = value_and_gradient(loss, scores.to(kind), target)
    full_value, full = value_and_gradient(loss, scores.to(kind).float(), target)
    assert value.dtype == torch.float32
    assert torch.equal(value, full_value)
    assert torch.equal(gradient, full.to(kind))


@pytest.mark.parametrize("name", LOSSES)
def test_long_sums_of_half_types(name: str) -> None:
    loss, _ = LOSSES[name]
    target = torch.tensor([0, 12_345])
    scores = torch.zeros(2, 20_000, dtype=torch.bfloat16)
    torch.testing.assert_close(loss(scores, target).double(), loss(scores.double(), target), rtol=3e-6, atol=1e-6)
