"""The hinge losses and the truncated entropy against their definitions, with every kink and tie."""

from __future__ import annotations

import itertools
import math
from typing import Any

import brute_force as reference
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import topk
from topk.losses.hinge import LOSS, VARIANTS, Options, definition

EXACT = {"rtol": 1e-10, "atol": 1e-10}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def ours(scores: Tensor, target: Tensor, k: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    loss = topk.topk_hinge_loss(scores, target, k, reduction="none", **keywords)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def truth(scores: Tensor, target: Tensor, k: int, **keywords: Any) -> tuple[Tensor, Tensor]:
    scores = scores.detach().double().clone().requires_grad_()
    loss = definition(scores, target, k, **keywords)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **(tolerance or EXACT))


def spread_targets(scores: Tensor) -> Tensor:
    order = scores.argsort(1, descending=True)
    return order.gather(1, (torch.arange(len(scores)) % scores.shape[1])[:, None]).squeeze(1)


# --- the definitions -------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (3, 2), (8, 1), (8, 3), (8, 7), (40, 10)])
def test_equals_the_definition(variant: str, classes: int, k: int) -> None:
    scores = 2.0 * torch.randn(2 * classes, classes, dtype=torch.float64)
    target = spread_targets(scores)
    for margin in (0.0, 1.0, 2.5):
        keywords = {"variant": variant, "margin": margin}
        same(ours(scores, target, k, **keywords), truth(scores, target, k, **keywords))


@pytest.mark.parametrize("variant", ["alpha", "beta"])
def test_lapins_hinges_equal_sorting_with_y_among_the_others(variant: str) -> None:
    scores = torch.randn(40, 8, dtype=torch.float64).mul(2.0).round()
    for k in (1, 3, 7):
        expected = [
            reference.lapin_hinge(row, y, k, variant) for row, y in zip(scores, torch.arange(40) % 8, strict=True)
        ]
        torch.testing.assert_close(definition(scores, torch.arange(40) % 8, k, variant), torch.stack(expected), **EXACT)


@pytest.mark.parametrize("offset", [1e6, -1e17, 3e38])
def test_entropy_far_from_zero(offset: float) -> None:
    for dtype in (torch.float32, torch.float64):
        loss, gradient = ours(torch.full((1, 11), offset, dtype=dtype), torch.tensor([4]), 2, variant="entropy")
        assert loss.item() == pytest.approx(math.log(10), rel=1e-6)
        assert gradient[0, 4].item() == pytest.approx(-0.9, rel=1e-6)


def test_by_hand() -> None:
    scores, target = torch.tensor([[4.0, 3.0, 2.5, 0.0]]), torch.tensor([2])
    expected = {
        "calibrated": 1.0,  # y itself is third: the margin remains
        "kth": 1.5,
        "alpha": (2.5 + 1.5) / 2,
        "beta": (2.5 + 1.5) / 2,
        "smooth_limit": 1.25,
        "entropy": math.log(1 + math.exp(0.5) + math.exp(-2.5)),
    }
    for variant, value in expected.items():
        assert topk.topk_hinge_loss(scores, target, 2, variant=variant).item() == pytest.approx(value)
    # With y first, alpha's mean is taken over negative numbers and y's own 0, beta's over nothing positive but one.
    first = torch.tensor([0])
    assert topk.topk_hinge_loss(scores, first, 3, variant="alpha", margin=1.4).item() == pytest.approx(
        (0.4 + 0 - 0.1) / 3
    )
    assert topk.topk_hinge_loss(scores, first, 3, variant="beta", margin=1.4).item() == pytest.approx(0.4 / 3)


def test_relations_between_the_variants() -> None:
    scores = torch.randn(30, 9, dtype=torch.float64)
    target = spread_targets(scores)
    loss = {
        (variant, k): topk.topk_hinge_loss(scores, target, k, variant=variant, reduction="none")
        for variant, k in itertools.product(VARIANTS, (1, 4))
    }
    for variant in ("alpha", "beta", "smooth_limit"):
        torch.testing.assert_close(loss[variant, 1], loss["kth", 1])
    torch.testing.assert_close(loss["entropy", 1], F.cross_entropy(scores, target, reduction="none"), **EXACT)
    assert (loss["alpha", 4] <= loss["beta", 4] + 1e-12).all()
    assert (loss["calibrated", 4] <= loss["kth", 4] + 1e-12).all()
    assert (loss["entropy", 4] < loss["entropy", 1]).all()


def test_smooth_limit_is_the_smooth_losses_limit() -> None:
    scores = torch.randn(20, 9, dtype=torch.float64)
    target = spread_targets(scores)
    limit = topk.topk_hinge_loss(scores, target, 3, variant="smooth_limit", margin=1.0, reduction="none")
    smooth = topk.smooth_topk_loss(scores, target, 3, tau=1e-3, margin=1.0, reduction="none")
    torch.testing.assert_close(smooth, limit, rtol=0, atol=2e-2)


def test_the_margin_plays_no_part_in_entropy() -> None:
    scores, target = torch.randn(5, 9), torch.arange(5)
    losses = [topk.topk_hinge_loss(scores, target, 3, variant="entropy", margin=margin) for margin in (0.0, 4.0)]
    assert losses[0] == losses[1]


@every_variant
def test_several_k_are_the_weighted_sum(variant: str) -> None:
    scores = torch.randn(24, 12, dtype=torch.float64)
    target = spread_targets(scores)
    shares = {2: 0.5, 1: 0.125, 11: 0.25, 5: 0.125}
    singles = {k: ours(scores, target, k, variant=variant) for k in shares}
    expected = tuple(sum(p * singles[k][i] for k, p in shares.items()) for i in range(2))
    same(ours(scores, target, shares, variant=variant), expected)


@every_variant
def test_float32_equals_float64_on_the_same_scores(variant: str) -> None:
    for scale in (1e-3, 1.0, 30.0, 1e4):
        scores = (scale * torch.randn(64, 200)).float()
        target = spread_targets(scores)
        expected = ours(scores.double(), target, 5, variant=variant)
        loss, gradient = ours(scores, target, 5, variant=variant)
        assert loss.dtype == gradient.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected[0], rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(gradient.double(), expected[1], rtol=0, atol=4e-6)


# --- ties, kinks, masked classes -------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_ties_any_k(data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 9))
    levels = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, 2.0])
    rows = data.draw(st.lists(st.lists(levels, min_size=classes, max_size=classes), min_size=1, max_size=4))
    scores = torch.tensor(rows, dtype=torch.float64)
    target = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=len(rows), max_size=len(rows))))
    keywords = {"variant": data.draw(st.sampled_from(VARIANTS)), "margin": data.draw(st.sampled_from([0.0, 1.0]))}
    k = data.draw(st.integers(1, classes - 1))
    loss, gradient = ours(scores, target, k, **keywords)
    assert not gradient.isnan().any()
    assert (gradient[scores == -torch.inf] == 0).all()
    possible = scores.gather(1, target[:, None]).squeeze(1) > -torch.inf
    assert (loss[~possible] == torch.inf).all()
    if possible.any():
        expected = truth(scores[possible], target[possible], k, **keywords)
        same((loss[possible], gradient[possible]), (expected[0], expected[1].nan_to_num(0.0)))


def test_at_the_kink_the_slope_is_0() -> None:
    scores, target = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    for variant in ("calibrated", "kth", "alpha", "beta"):
        loss, gradient = ours(scores, target, 1, variant=variant, margin=1.0)
        assert loss.item() == 0
        assert (gradient == 0).all()


def test_fewer_possible_classes_than_guesses() -> None:
    scores = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf, -torch.inf]], dtype=torch.float64)
    for variant in VARIANTS:
        loss, gradient = ours(scores, torch.tensor([0]), 3, variant=variant)
        if variant == "beta":  # what is there still counts
            assert loss.item() == pytest.approx(2 / 3)
            assert gradient[0].tolist() == pytest.approx([-1 / 3, 1 / 3, 0, 0, 0])
        else:
            assert loss.item() == 0
            assert (gradient == 0).all()


@every_variant
def test_rows_that_are_not_finite_stay_among_themselves(variant: str) -> None:
    scores = torch.randn(6, 8, dtype=torch.float64)
    target = torch.arange(6)
    clean = ours(scores, target, 3, variant=variant)
    scores[1, 5], scores[2, 2], scores[3, 3], scores[4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    loss, gradient = ours(scores, target, 3, variant=variant)
    assert loss[1:3].isnan().all()
    assert gradient[1:3].isnan().all()
    assert (loss[3:5] == torch.inf).all()
    assert gradient[3].isfinite().all()
    assert gradient[3, 3] == 0
    assert (gradient[4] == 0).all()
    same((loss[[0, 5]], gradient[[0, 5]]), (clean[0][[0, 5]], clean[1][[0, 5]]))


# --- derivatives -----------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("k", [3, {1: 0.3, 4: 0.7}])
def test_derivatives(variant: str, k: Any) -> None:
    every = torch.randn(6, 6, dtype=torch.float64)
    scores, target = every[::2].clone().requires_grad_(), spread_targets(every)[::2]

    def loss(x: Tensor) -> Tensor:
        return topk.topk_hinge_loss(x, target, k, variant=variant, reduction="none")

    assert torch.autograd.gradcheck(loss, scores, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, scores, check_fwd_over_rev=True, fast_mode=True)  # random directions


def test_what_is_kept_is_as_long_as_k() -> None:
    assert LOSS.forward is not None
    for variant in VARIANTS:
        _, *saved = LOSS.forward(torch.randn(7, 1000), torch.arange(7), Options([5, 10], [0.5, 0.5], variant, 1.0))
        assert sum(kept.numel() for kept in saved) <= 7 * 30


# --- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"variant": "delta"}, ValueError, "variant must be one of 'calibrated', .* got 'delta'"),
        ({"margin": -1.0}, ValueError, "margin must be a finite number >= 0, got -1.0"),
        ({"margin": "1"}, TypeError, "margin must be a number, got '1'"),
        ({"k": 7}, ValueError, "k must be at most the number of classes, 6, got 7"),
    ],
)
def test_wrong_arguments(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topk.topk_hinge_loss(torch.randn(4, 6), torch.arange(4), **{"k": 2, **keywords})
