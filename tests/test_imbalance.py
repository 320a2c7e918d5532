"""LDAM, focal and class margins against their definitions, however close p_y is to 0 or 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import topk
from topk.losses.imbalance import FOCAL, LDAM

EXACT = {"rtol": 1e-10, "atol": 1e-10}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def value_and_gradient(loss: Callable[[Tensor], Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]


def ldam(target: Tensor, **keywords: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: topk.ldam_loss(x, target, reduction="none", **keywords)


def focal(target: Tensor, **keywords: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: topk.focal_loss(x, target, reduction="none", **keywords)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **(tolerance or EXACT))


# --- LDAM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 1.0, 30.0])
def test_ldam_equals_the_definition(scale: float) -> None:
    scores, target = torch.randn(12, 7, dtype=torch.float64), torch.arange(12) % 7
    margins = torch.rand(7, dtype=torch.float64)
    found = value_and_gradient(ldam(target, margins=margins, scale=scale), scores)
    same(found, value_and_gradient(lambda x: LDAM.definition(x, target, margins[target], scale), scores))
    one_for_all = value_and_gradient(ldam(target, margins=0.3, scale=scale), scores)
    same(
        one_for_all,
        value_and_gradient(ldam(target, margins=torch.full((7,), 0.3, dtype=torch.float64), scale=scale), scores),
    )


def test_ldam_is_cross_entropy_of_shifted_scores() -> None:
    scores, target = torch.randn(12, 7, dtype=torch.float64), torch.arange(12) % 7
    margins = torch.rand(7, dtype=torch.float64)
    plain = value_and_gradient(ldam(target, margins=0.0, scale=1.0), scores)
    same(plain, value_and_gradient(lambda x: F.cross_entropy(x, target, reduction="none"), scores), **CLOSE)
    shift = margins[target][:, None] * F.one_hot(target, 7)
    found = value_and_gradient(ldam(target, margins=margins, scale=8.0), scores)
    shifted = value_and_gradient(lambda x: F.cross_entropy(8 * (x - shift), target, reduction="none"), scores)
    same(found, shifted, rtol=1e-12, atol=1e-11)


def test_ldam_margins_reach_positions_and_skip_ignored_rows() -> None:
    scores, target = torch.randn(3, 5, 2, dtype=torch.float64), torch.randint(5, (3, 2))
    margins = torch.rand(5, dtype=torch.float64)
    whole = topk.ldam_loss(scores, target, margins=margins, reduction="none")
    for i, j in ((0, 0), (2, 1)):
        torch.testing.assert_close(whole[i, j], topk.ldam_loss(scores[i, :, j], target[i, j], margins=margins))
    target[1, 0] = -100
    assert topk.ldam_loss(scores, target, margins=margins, reduction="none")[1, 0] == 0


# --- focal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_equals_the_definition(gamma: float) -> None:
    scores, target = 3 * torch.randn(12, 7, dtype=torch.float64), torch.arange(12) % 7
    found = value_and_gradient(focal(target, gamma=gamma), scores)
    same(found, value_and_gradient(lambda x: FOCAL.definition(x, target, gamma), scores))
    missed = 1.0 - scores.softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(found[0], missed**gamma * F.cross_entropy(scores, target, reduction="none"), **EXACT)
    if gamma == 0.0:
        same(found, value_and_gradient(lambda x: F.cross_entropy(x, target, reduction="none"), scores), **CLOSE)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_keeps_its_digits_at_both_ends(gamma: float) -> None:
    target = torch.tensor([0])
    for lead in (-1e4, -300.0, -40.0, 40.0, 300.0, 1e4):
        scores = torch.tensor([[lead, 0.0, 0.0]], dtype=torch.float64)
        gap = math.log(2) - lead  # log of odds against y
        entropy = math.log1p(math.exp(-abs(gap))) + max(gap, 0.0)
        missed, p = math.exp(gap - entropy), math.exp(-entropy)
        slope = gamma * missed**gamma * p * entropy + missed ** (gamma + 1)
        loss, gradient = value_and_gradient(focal(target, gamma=gamma), scores)
        assert loss.item() == pytest.approx(missed**gamma * entropy, rel=1e-12, abs=1e-300)
        assert gradient[0].tolist() == pytest.approx([-slope, slope / 2, slope / 2], rel=1e-12, abs=1e-300)


# --- both ------------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize(
    "loss",
    [lambda y: ldam(y, margins=0.4, scale=3.0), lambda y: focal(y), lambda y: focal(y, gamma=0.0)],
    ids=["ldam", "focal", "focal, gamma 0"],
)


@BOTH
def test_float32_equals_float64_on_the_same_scores(loss: Callable[..., Any]) -> None:
    for scale in (1e-3, 1.0, 30.0, 1e4):
        scores, target = (scale * torch.randn(64, 200)).float(), torch.arange(64)
        expected = value_and_gradient(loss(target), scores.double())
        found = value_and_gradient(loss(target), scores)
        assert found[0].dtype == found[1].dtype == torch.float32
        torch.testing.assert_close(found[0].double(), expected[0], rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=1e-5)


@BOTH
def test_masked_and_unreadable_rows(loss: Callable[..., Any]) -> None:
    scores, target = torch.randn(8, 7, dtype=torch.float64), torch.arange(8) % 7
    clean = value_and_gradient(loss(target), scores)
    scores[1, 5], scores[2, 2], scores[3, 3], scores[4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    scores[5, :5], scores[5, 6] = -torch.inf, -torch.inf  # y alone is possible
    scores[6, 0] = -torch.inf
    value, gradient = value_and_gradient(loss(target), scores)
    assert value[1:3].isnan().all()
    assert gradient[1:3].isnan().all()
    assert (value[3:5] == torch.inf).all()
    assert gradient[3].isfinite().all()
    assert gradient[3, 3] == 0
    assert (gradient[4:6] == 0).all()
    assert value[5] == 0
    assert gradient[6, 0] == 0
    without = value_and_gradient(loss(target[6:7] - 1), scores[6:7, 1:])
    same((value[6:7], gradient[6:7, 1:]), without)
    same((value[[0, 7]], gradient[[0, 7]]), (clean[0][[0, 7]], clean[1][[0, 7]]))


@BOTH
def test_derivatives(loss: Callable[..., Any]) -> None:
    scores, target = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.arange(5)
    assert torch.autograd.gradcheck(loss(target), scores, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss(target), scores, check_fwd_over_rev=True)


@BOTH
def test_second_derivatives_of_masked_rows_are_finite(loss: Callable[..., Any]) -> None:
    scores = torch.randn(3, 6, dtype=torch.float64)
    scores[0, 3], scores[1, 1:], scores[2, 2] = -torch.inf, -torch.inf, -torch.inf
    scores.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(torch.tensor([0, 0, 2]))(scores)[:2].sum(), scores, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.randn(3, 6)).sum(), scores)
    assert second.isfinite().all()


# --- class margins ---------------------------------------------------------------------------------------------------


def test_class_margins() -> None:
    counts = [500, 16, 81, 1]
    expected = 0.4 * torch.tensor([500**-0.25, 0.5, 1 / 3, 1.0], dtype=torch.float64)
    for given in (counts, tuple(counts), np.array(counts), np.array(counts, dtype=np.float32), torch.tensor(counts)):
        found = topk.class_margins(given, 0.4)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    found = topk.class_margins(torch.tensor(counts, dtype=torch.float64), 0.4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert topk.class_margins(counts).max() == 0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: topk.class_margins([3, 0, 1]), ValueError, "counts must be finite and > 0, got 0 for class 1"),
        (lambda: topk.class_margins([1.0, math.inf]), ValueError, "counts must be finite and > 0, got inf for class 1"),
        (lambda: topk.class_margins([1.0, math.nan]), ValueError, "counts must be finite and > 0, got nan for class 1"),
        (lambda: topk.class_margins([]), ValueError, r"counts must have shape \(classes,\).* got \(0,\)"),
        (lambda: topk.class_margins([[1, 2]]), ValueError, r"counts must have shape \(classes,\).* got \(1, 2\)"),
        (lambda: topk.class_margins("many"), TypeError, "counts must hold a number for every class, got str"),
        (lambda: topk.class_margins([True, False]), TypeError, "counts must be real numbers, got torch.bool"),
        (lambda: topk.class_margins([1, 2], 0.0), ValueError, "max_margin must be a finite number > 0, got 0.0"),
        (lambda: call_ldam(margins=-0.1), ValueError, "margins must be a finite number >= 0, got -0.1"),
        (lambda: call_ldam(margins=None), TypeError, "margins must be a number, got None"),
        (lambda: call_ldam(margins=torch.rand(3)), ValueError, r"margins must have shape \(6,\).* got \(3,\)"),
        (lambda: call_ldam(margins=torch.arange(6)), TypeError, "margins must have a floating-point type"),
        (lambda: call_ldam(margins=0.1, scale=0.0), ValueError, "scale must be a finite number > 0, got 0.0"),
        (lambda: topk.focal_loss(torch.rand(2, 6), torch.arange(2), gamma=-1.0), ValueError, "gamma must be a finite"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def call_ldam(**keywords: Any) -> Tensor:
    return topk.ldam_loss(torch.rand(2, 6), torch.arange(2), **keywords)
