"""The transition loss against its definition: every way to find a, several k, ties, smoothing, masked classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import topk
from topk._cpu import ordered_topk
from topk.losses.transition import LOSS, Options, definition, margins

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def ours(scores: Tensor, target: Tensor, k: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    loss = topk.transition_topk_loss(scores, target, k, reduction="none", **keywords)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def truth(scores: Tensor, target: Tensor, k: int, a: float | None = None, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The definition and autograd through it with a held fixed."""
    scores = scores.detach().double().clone().requires_grad_()
    given = () if a is None else (torch.full((len(scores),), a, dtype=torch.float64),)
    loss = definition(scores, target, *given, k=k, **keywords)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **(tolerance or EXACT))


def spread_targets(scores: Tensor) -> Tensor:
    """One target a row, from the best class in the first row to ever worse ones."""
    order = scores.argsort(1, descending=True)
    return order.gather(1, (torch.arange(len(scores)) % scores.shape[1])[:, None]).squeeze(1)


def weights_of_margin(width: float) -> Callable[[Tensor], Tensor]:
    def smoothstep(margin: Tensor) -> Tensor:
        s = (margin / width).clamp(0.0, 1.0)
        return s * s * (3 - 2 * s)

    return smoothstep


# --- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "k"), [(2, 1), (3, 1), (3, 2), (8, 3), (8, 7), (40, 5), (40, 20)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_margin_transition_equals_the_definition(classes: int, k: int, label_smoothing: float) -> None:
    scores = 1.5 * torch.randn(2 * classes, classes, dtype=torch.float64)
    target = spread_targets(scores)
    for width in (0.25, 1.0, 5.0):
        keywords = {"width": width, "label_smoothing": label_smoothing}
        same(ours(scores, target, k, **keywords), truth(scores, target, k, **keywords))


@pytest.mark.parametrize("a", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_fixed_weight_equals_the_definition(a: float, label_smoothing: float) -> None:
    scores = 1.5 * torch.randn(20, 10, dtype=torch.float64)
    target = spread_targets(scores)
    expected = truth(scores, target, 3, a=a, label_smoothing=label_smoothing)
    for transition in (a, torch.tensor(a, dtype=torch.float64), lambda margin: torch.full_like(margin, a)):
        same(ours(scores, target, 3, transition=transition, label_smoothing=label_smoothing), expected)


def test_weight_0_is_cross_entropy() -> None:
    scores, target = torch.randn(9, 12, dtype=torch.float64, requires_grad=True), torch.arange(9)
    for smoothing in (0.0, 0.2):
        loss = topk.transition_topk_loss(scores, target, 4, transition=0.0, label_smoothing=smoothing)
        expected = F.cross_entropy(scores, target, label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(value, scores)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_weight_1_groups_the_top_classes() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    p = scores.softmax(1)[0]
    for target, mass in ((0, p[0] + p[1]), (1, p[0] + p[1]), (2, p[2]), (3, p[3])):
        loss = topk.transition_topk_loss(scores, torch.tensor([target]), 2, transition=1.0)
        torch.testing.assert_close(loss, -mass.log())


def test_the_transition_depends_on_the_margin_alone() -> None:
    scores = torch.randn(30, 12, dtype=torch.float64)
    target = spread_targets(scores)
    for k in (1, 4, {1: 0.5, 4: 0.2, 11: 0.3}):
        by_name = ours(scores, target, k, width=0.8)
        same(ours(scores, target, k, transition=weights_of_margin(0.8)), by_name)
    # Outside T the margin is at most 0 and nothing has moved.
    outside = scores.argsort(1, descending=True)[:, 6]
    same(ours(scores, outside, 4), ours(scores, outside, 4, transition=0.0))


@pytest.mark.parametrize("keywords", [{}, {"transition": 0.3}, {"label_smoothing": 0.2}, {"width": 3.0}])
def test_several_k_are_the_weighted_sum(keywords: dict[str, float]) -> None:
    scores = torch.randn(24, 12, dtype=torch.float64)
    target = spread_targets(scores)
    shares = {2: 0.5, 1: 0.125, 11: 0.25, 5: 0.125}
    singles = {k: ours(scores, target, k, **keywords) for k in shares}
    expected = tuple(sum(p * singles[k][i] for k, p in shares.items()) for i in range(2))
    same(ours(scores, target, shares, **keywords), expected)


def test_a_tensor_is_one_weight_or_one_a_k() -> None:
    scores = torch.randn(24, 12, dtype=torch.float64)
    target = spread_targets(scores)
    per_k = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    found = ours(scores, target, {2: 0.25, 6: 0.75}, transition=per_k)
    singles = [ours(scores, target, k, transition=a) for k, a in ((2, 0.2), (6, 0.7))]
    same(found, tuple(0.25 * one + 0.75 * other for one, other in zip(*singles, strict=True)))


def test_float32_equals_float64_on_the_same_scores() -> None:
    for scale in (1e-3, 1.0, 30.0, 1e4):
        scores = (scale * torch.randn(64, 200)).float()
        target = spread_targets(scores)
        for keywords in ({}, {"transition": 1.0}, {"transition": 0.5, "label_smoothing": 0.1}):
            expected = ours(scores.double(), target, 5, width=scale, **keywords)
            loss, gradient = ours(scores, target, 5, width=scale, **keywords)
            assert loss.dtype == gradient.dtype == torch.float32
            torch.testing.assert_close(loss.double(), expected[0], rtol=3e-6, atol=3e-6)
            torch.testing.assert_close(gradient.double(), expected[1], rtol=0, atol=2e-6)


# --- ties ------------------------------------------------------------------------------------------------------------


def test_the_lower_class_wins_at_ties() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]], dtype=torch.float64).repeat(5, 1)
    target = torch.arange(5)
    for k in (1, 2, 3, 4):
        for a in (None, 1.0, 0.4):
            keywords = {} if a is None else {"transition": a}
            same(ours(scores, target, k, **keywords), truth(scores, target, k, a=a))
    inside = ours(scores, target, 2, transition=1.0)[0]
    assert inside[0] == inside[1]
    assert inside[2] > inside[0]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_ties_any_k(data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 9))
    levels = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0])
    rows = data.draw(st.lists(st.lists(levels, min_size=classes, max_size=classes), min_size=1, max_size=4))
    scores = torch.tensor(rows, dtype=torch.float64)
    target = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=len(rows), max_size=len(rows))))
    k = data.draw(st.integers(1, classes - 1))
    a = data.draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    smoothing = data.draw(st.sampled_from([0.0, 0.25]))
    keywords = {} if a is None else {"transition": a}
    loss, gradient = ours(scores, target, k, label_smoothing=smoothing, **keywords)
    assert not gradient.isnan().any()
    assert (gradient[scores == -torch.inf] == 0).all()
    possible = scores.gather(1, target[:, None]).squeeze(1) > -torch.inf
    assert (loss[~possible] == torch.inf).all()
    if possible.any():
        expected = truth(scores[possible], target[possible], k, a=a, label_smoothing=smoothing)
        same((loss[possible], gradient[possible]), (expected[0], expected[1].nan_to_num(0.0)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.data())
def test_selection_equals_a_stable_sort(classes: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, classes))
    levels = data.draw(st.integers(1, 6))
    scores = torch.randint(levels, (5, classes)).float()
    scores[scores == 0] = -torch.inf
    values, index = ordered_topk(scores, count)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(index, expected.indices[:, :count])


def test_a_tracer_sees_one_step() -> None:
    scores = torch.randint(4, (5, 9)).double()
    torch.library.opcheck(torch.ops.topk.largest_classes.default, (scores, 3))
    stacked = torch.func.vmap(lambda x: torch.ops.topk.largest_classes(x, 3), in_dims=1)(scores.unflatten(0, (1, 5)))
    assert torch.equal(stacked[:, 0], ordered_topk(scores, 3)[1])


# --- what is not finite ----------------------------------------------------------------------------------------------


def test_rows_that_are_not_finite_stay_among_themselves() -> None:
    scores = torch.randn(6, 8, dtype=torch.float64)
    target = torch.arange(6)
    clean = ours(scores, target, 3, label_smoothing=0.1)
    scores[1, 5], scores[2, 2], scores[3, 3], scores[4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    loss, gradient = ours(scores, target, 3, label_smoothing=0.1)
    assert loss[1:3].isnan().all()
    assert gradient[1:3].isnan().all()
    assert (loss[3:5] == torch.inf).all()
    assert gradient[3, 3] == 0
    assert (gradient[3].isfinite()).all()
    assert (gradient[4] == 0).all()
    same((loss[[0, 5]], gradient[[0, 5]]), (clean[0][[0, 5]], clean[1][[0, 5]]))


def test_masked_classes_are_as_good_as_absent() -> None:
    scores = torch.randn(10, 12, dtype=torch.float64)
    few = scores[:, :6]
    target = spread_targets(few)
    masked = torch.cat((few, torch.full((10, 6), -torch.inf)), 1)
    for keywords in ({}, {"label_smoothing": 0.2}, {"transition": 0.3}):
        loss, gradient = ours(few, target, 3, **keywords)
        padded = torch.cat((gradient, torch.zeros(10, 6, dtype=torch.float64)), 1)
        same(ours(masked, target, 3, **keywords), (loss, padded))
    # With fewer than k + 1 possible classes no guess can miss: the lead is endless.
    loss, gradient = ours(masked, target, 6)
    assert (loss.abs() < 1e-15).all()
    assert (gradient.abs() < 1e-15).all()


def test_an_impossible_class_that_ties_with_the_margin() -> None:
    scores = torch.tensor([[-torch.inf, -1.0, -torch.inf], [-torch.inf, 2.0, 0.0]], dtype=torch.float64)
    for smoothing in (0.0, 0.25):
        loss, gradient = ours(scores, torch.tensor([0, 0]), 1, label_smoothing=smoothing)
        assert (loss == torch.inf).all()
        p = scores.softmax(1)
        count = torch.tensor([[1.0], [2.0]])
        expected = torch.where(scores > -torch.inf, p - smoothing / count, 0.0)
        torch.testing.assert_close(gradient, expected)


def test_margins() -> None:
    scores = torch.tensor([[3.0, 1.0, -torch.inf], [3.0, 1.0, -torch.inf]])
    found = margins(scores, torch.tensor([1, 2]), [1, 2])
    assert found.tolist() == [[0.0, torch.inf], [-torch.inf, -torch.inf]]


def test_a_callable_sees_detached_margins_in_the_targets_shape() -> None:
    scores = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(7, (2, 3))
    target[0, 0] = -100
    seen = []

    def remember(margin: Tensor) -> Tensor:
        seen.append(margin)
        return torch.full_like(margin, 0.5)

    loss = topk.transition_topk_loss(scores, target, {2: 0.5, 3: 0.5}, transition=remember)
    torch.testing.assert_close(loss, topk.transition_topk_loss(scores, target, {2: 0.5, 3: 0.5}, transition=0.5))
    ranked = scores.detach().sort(dim=1, descending=True).values
    assert [margin.requires_grad for margin in seen] == [False, False]
    for k, margin in zip((2, 3), seen, strict=True):
        expected = scores.detach()[1, target[1, 2], 2] - ranked[1, k, 2]
        torch.testing.assert_close(margin[1, 2], expected)


# --- derivatives -----------------------------------------------------------------------------------------------------

OPTIONS = [
    {"k": 3, "transition": 0.4},
    {"k": 3, "transition": 1.0, "label_smoothing": 0.2},
    {"k": {1: 0.3, 4: 0.7}, "transition": 0.6, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_derivatives_with_a_fixed_weight(options: dict[str, Any]) -> None:
    scores = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    target = spread_targets(scores.detach())

    def loss(x: Tensor) -> Tensor:
        return topk.transition_topk_loss(x, target, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, scores, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, scores, check_fwd_over_rev=True, fast_mode=True)  # random directions


def test_second_derivatives_hold_the_margins_weight_fixed() -> None:
    scores = torch.randn(5, 6, dtype=torch.float64)
    target = spread_targets(scores)
    for row, y in zip(scores, target, strict=True):
        found = torch.func.hessian(topk.transition_topk_loss)(row, y, 2)
        s = ((row[y] - row.sort(descending=True).values[2]) / 10.0).clamp(0.0, 1.0).item()
        fixed = s * s * (3.0 - 2.0 * s)
        expected = torch.func.hessian(lambda x, y=y, a=fixed: topk.transition_topk_loss(x, y, 2, transition=a))(row)
        torch.testing.assert_close(found, expected, **EXACT)


def test_what_is_kept_is_as_long_as_k() -> None:
    assert LOSS.forward is not None
    _, *saved = LOSS.forward(torch.randn(7, 1000), torch.arange(7), Options([5, 10], [0.5, 0.5], 1.0, 0.0))
    assert sum(kept.numel() for kept in saved) <= 7 * 30


def test_many_classes() -> None:
    scores = torch.randn(3, 200_000)
    target = spread_targets(scores)
    same(ours(scores, target, 20), ours(scores.double(), target, 20), rtol=1e-5, atol=1e-5)


# --- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"transition": "accuracy"}, ValueError, "transition='accuracy'.*TransitionTopKLoss"),
        ({"transition": "slow"}, ValueError, "transition must be one of 'margin', 'accuracy', got 'slow'"),
        ({"transition": 1.5}, ValueError, "transition must be a finite number >= 0 and <= 1, got 1.5"),
        ({"transition": None}, TypeError, "transition must be a number, got None"),
        ({"transition": True}, TypeError, "transition must be a number, got True"),
        ({"transition": torch.tensor(2.0)}, ValueError, "transition must give weights from 0 to 1, got .* to 2"),
        ({"transition": torch.tensor(1)}, ValueError, "transition as a tensor must be floating-point"),
        ({"transition": torch.rand(4)}, ValueError, r"transition as a tensor must .* got shape \(4,\)"),
        ({"transition": lambda m: m * 0 - 1}, ValueError, "transition must give weights from 0 to 1, got .* from -1"),
        ({"transition": lambda m: m[:2]}, ValueError, r"transition must return .* shape \(4,\), got \(2,\)"),
        ({"transition": lambda m: 0.5}, ValueError, r"transition must return a tensor .* got float"),
        ({"width": 0.0}, ValueError, "width must be a finite number > 0, got 0.0"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be a finite number >= 0 and <= 1, got 1.1"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be a finite number >= 0 and <= 1, got -0.1"),
    ],
)
def test_wrong_arguments(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topk.transition_topk_loss(torch.randn(4, 6), torch.arange(4), 2, **keywords)


# --- far ends --------------------------------------------------------------------------------------------------------


def test_differences_beyond_float32() -> None:
    """log p_y overflows where G, which does not, is all that counts; and an overflowing class is not a masked one."""
    scores = torch.tensor([[-3e38, 2e38, -torch.inf], [-3e38, 2e38, -3.1e38], [0.0, 1.0, 2.0]])
    for keywords in ({}, {"transition": 1.0}, {"label_smoothing": 0.1}, {"transition": 1.0, "label_smoothing": 1.0}):
        loss, gradient = ours(scores, torch.zeros(3, dtype=torch.int64), 2, **keywords)
        assert loss[:2].tolist() == [0.0, 0.0]
        assert loss[2].isfinite()
        assert gradient.isfinite().all()
    loss, _ = ours(torch.tensor([[2e38, -3e38, 0.0]]), torch.tensor([0]), 1, transition=0.0, label_smoothing=1.0)
    assert loss.item() == torch.inf
    loss, _ = ours(torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([1]), 1, transition=0.0, label_smoothing=1.0)
    assert loss.item() == torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_running_accuracy_is_never_a_half_type(dtype: torch.dtype) -> None:
    """In float16 the count of a large batch overflows, in bfloat16 a step of a hundredth is rounded away."""
    module = topk.TransitionTopKLoss(1, transition="accuracy").to(dtype)
    scores, target = torch.zeros(70_000, 3), torch.zeros(70_000, dtype=torch.int64)
    for _ in range(300):
        module(scores[:100], target[:100])
    assert module(scores, target).isfinite()
    assert module.running_accuracy.item() == pytest.approx(1 - 0.99**301, rel=1e-4)
    assert module.to("meta").running_accuracy.is_meta
