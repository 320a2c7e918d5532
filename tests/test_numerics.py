"""What chapter 12 promises: errors of rounded scores are bounded, sums are long enough, gradients are rounded once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import topk
from topk import _cpu

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


# --- numbers too small to be fast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_exponentials_are_zero_or_normal(kind: torch.dtype) -> None:
    smallest = _cpu.SMALLEST[kind]
    spread = torch.linspace(3.0 * smallest, 40.0, 10_001, dtype=kind)
    special = torch.tensor([0.0, -torch.inf, torch.nan, torch.inf, smallest - 0.01, smallest + 0.02], dtype=kind)
    for exponents in (spread, spread[spread > smallest], special, spread[:0]):
        exact = exponents.double().exp()
        expected = exact.masked_fill(exponents < smallest + 0.01, 0.0).to(kind)
        found = _cpu.exponentials(exponents.clone())
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(kind).eps, atol=0.0, equal_nan=True)
        normal = found[found > 0].clamp(max=1.0)
        assert (normal / 1000 >= torch.finfo(kind).tiny).all()


# The smooth loss multiplies powers of its exponentials, so that every one of them can be too small.
FAR_APART = {
    **{name: loss for name, (loss, _) in LOSSES.items() if name in ("smooth", "smooth, small tau", "entropy", "focal")},
    "smooth, k = 8": lambda s, t: topk.smooth_topk_loss(s, t, 8, tau=0.1, reduction="none"),
    "smooth, k = 20": lambda s, t: topk.smooth_topk_loss(s, t, 20, tau=0.1, reduction="none"),
    "ldam, scale 60": lambda s, t: topk.ldam_loss(s, t, margins=0.5, scale=60.0, reduction="none"),
}


@pytest.mark.parametrize("name", FAR_APART)
def test_scores_far_apart(name: str) -> None:
    loss = FAR_APART[name]
    for scale in (3.0, 10.0, 30.0, 100.0, 1000.0):
        scores, target = problem(scale, rows=200, classes=400)
        target[::3] = scores[::3].argmax(1)  # else y is far behind in nearly every row
        scores[:, 7], target[target == 7] = -torch.inf, 8
        value, gradient = value_and_gradient(loss, scores.float(), target)
        exact, slopes = value_and_gradient(loss, scores.float().double(), target)
        torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=3e-6)
        bound = BOUNDED["ldam"][1] * 7.5 if name.startswith("ldam") else 2.0
        torch.testing.assert_close(gradient.double(), slopes, rtol=0.0, atol=1e-5 * bound)
        assert (gradient[:, 7] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smooth", "smooth, small tau", "entropy", "focal"])
def test_scores_far_apart_take_no_longer(name: str) -> None:
    def seconds(scale: float) -> float:
        scores, target = problem(scale, rows=256, classes=1000)
        scores, taken = scores.float(), []
        for _ in range(15):
            start = time.process_time()
            value_and_gradient(FAR_APART[name], scores, target)
            taken.append(time.process_time() - start)
        return min(taken)

    assert max(seconds(scale) for scale in (3.0, 30.0, 50.0)) < 1.6 * seconds(0.1)
