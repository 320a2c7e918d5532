"""The differentiable top-k cross-entropy against full permutation matrices, and the networks against sorting."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import brute_force as reference
import pytest
import torch
import torch.nn.functional as F

import topk
from topk.losses import differentiable, networks
from topk.losses.differentiable import LOSS, Options
from topk_lab.study.timing import peak_temporaries

NETWORKS = ("odd_even", "bitonic", "splitter_selection")
METHODS = (*NETWORKS, "neuralsort", "softsort", "sinkhorn")
DISTRIBUTIONS = ("logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal")
OPERATORS = [(method, distribution) for method in NETWORKS for distribution in DISTRIBUTIONS]
OPERATORS += [(method, "cauchy") for method in METHODS[3:]]
MIXTURES: tuple[Any, ...] = (1, 2, 3, {1: 0.5, 4: 0.5}, {1: 0.2, 2: 0.2, 3: 0.2, 4: 0.2, 5: 0.2})


def ours(scores: torch.Tensor, target: torch.Tensor, k: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.detach().clone().requires_grad_()
    loss = topk.differentiable_topk_loss(scores, target, k, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    return loss.detach(), gradient


def truth(
    scores: torch.Tensor, target: torch.Tensor, k: Any, inverse_temperature: float = 1.0, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.detach().double().requires_grad_()
    options["beta"] = inverse_temperature
    rows = zip(scores, target.tolist(), strict=True)
    loss = torch.stack([reference.differentiable_topk_loss(row, y, k, **options) for row, y in rows])
    if not loss.requires_grad:
        return loss, torch.zeros_like(scores)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    return loss.detach(), gradient


def close(left: Any, right: Any, tolerance: float = 1e-10) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def tight(method: str) -> dict[str, Any]:
    return {"tolerance": 1e-13, "iterations": 5000} if method == "sinkhorn" else {}


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "distribution", "top1"),
    [
        # How the first is treated is decided after the operator, whatever its distribution.
        pytest.param(*pair, top1, marks=[pytest.mark.slow] if pair[1] != "cauchy" and top1 != "softmax" else [])
        for pair in OPERATORS
        for top1 in ("softmax", "cross_entropy", "sort")
    ],
)
def test_equals_the_definition(method: str, distribution: str, top1: str) -> None:
    scores, target = 2.0 * torch.randn(3, 12, dtype=torch.float64), torch.tensor([0, 5, 11])
    options = {"method": method, "distribution": distribution, "top1": top1}
    for k, m, beta in ((1, 6, 1.0), (3, 6, 0.7), ({1: 0.5, 4: 0.5}, 7, 2.0), ({1: 0.3, 2: 0.3, 5: 0.4}, 12, 1.0)):
        expected = truth(scores, target, k, m=m, inverse_temperature=beta, **options)
        close(ours(scores, target, k, m=m, inverse_temperature=beta, **options, **tight(method)), expected, 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", MIXTURES, ids=str)
def test_equals_the_definition_for_every_mixture(method: str, k: Any) -> None:
    scores, target = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 3, 5, 8])
    for top1, m in itertools.product(("softmax", "cross_entropy", "sort"), (5, 16)):
        options = {"method": method, "top1": top1, "m": m}
        close(ours(scores, target, k, **options, **tight(method)), truth(scores, target, k, **options), 1e-9)


@pytest.mark.parametrize("over", ["kept", "all"])
def test_cross_entropy_over(over: str) -> None:
    scores, target = torch.randn(5, 20, dtype=torch.float64), torch.randint(20, (5,))
    options = {"top1": "cross_entropy", "cross_entropy_over": over, "m": 6}
    close(ours(scores, target, {1: 0.3, 4: 0.7}, **options), truth(scores, target, {1: 0.3, 4: 0.7}, **options))
    if over == "all":
        loss = topk.differentiable_topk_loss(scores, target, 1, **options)
        torch.testing.assert_close(loss, F.cross_entropy(scores, target))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_ties_enter_by_class_index_and_have_finite_slopes(distribution: str) -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0], [1.0] * 8], dtype=torch.float64)
    target = torch.tensor([2, 7])
    options = {"distribution": distribution, "m": 5}
    close(ours(scores, target, 3, **options), truth(scores, target, 3, **options))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_does_not_depend_on_when_it_is_computed(method: str) -> None:
    """Forward computes the slopes if a gradient is in sight; backward does if it was not."""
    scores, target = torch.randn(4, 30), torch.randint(30, (4,))
    for m in (8, 30):
        gradients = []
        for slopes in (True, False):
            options = Options([2, 4], [0.5, 0.5], method, kept=m, slopes=slopes)
            _, *saved = LOSS.forward(scores, target, options)
            assert saved[1].shape == (4, m if slopes else 0)
            gradients.append(LOSS.backward(torch.ones(4), scores, target, options, tuple(saved)))
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("m", [8, 16, 32, 64])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_float32_is_as_good_as_its_rounding(m: int, k: int) -> None:
    for method, scale in itertools.product(METHODS[:5], (1e-3, 1.0, 30.0, 1e4)):
        scores, target = scale * torch.randn(16, 100), torch.randint(100, (16,))
        scores[8:, ::2] = scores[8:, :1]
        loss, gradient = ours(scores, target, k, method=method, m=m)
        exact_loss, exact_gradient = ours(scores.double(), target, k, method=method, m=m)
        assert ((loss - exact_loss).abs() / exact_loss.abs().clamp(min=1)).max() < 1e-6
        assert ((gradient - exact_gradient).abs() / exact_gradient.abs().clamp(min=1)).max() < 1e-6


@pytest.mark.parametrize("top1", ["softmax", "cross_entropy", "sort"])
@pytest.mark.parametrize(("method", "distribution"), OPERATORS)
def test_fast_and_plain_are_the_same_number(method: str, distribution: str, top1: str) -> None:
    scores, target = 2.0 * torch.randn(6, 20), torch.randint(20, (6,))
    scores[3, 5:9] = -torch.inf
    target[3] = 2
    for m, over, mixture in ((6, "all", {1: 0.3, 4: 0.7}), (20, "kept", {3: 0.5, 20: 0.5})):
        operator = {"method": method, "distribution": distribution, "inverse_temperature": 0.7, **tight(method)}
        options = Options([*mixture], [*mixture.values()], kept=m, top1=top1, cross_entropy_over=over, **operator)
        results = []
        for x in (scores, scores.double()):
            x = x.clone().requires_grad_()
            loss = LOSS.formula(x, target, options)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
        found = ours(scores.double(), target, mixture, m=m, top1=top1, cross_entropy_over=over, **operator)
        close(found, results[1], 1e-9)
        assert not found[1][scores == -torch.inf].any()
        close([part.double() for part in results[0]], results[1], 2e-6)


# --- limits and special cases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS[:5])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_huge_inverse_temperature_gives_the_hard_rank(method: str, distribution: str) -> None:
    scores, target = torch.randn(64, 20, dtype=torch.float64), torch.randint(20, (64,))
    rank = (scores > scores.gather(1, target[:, None])).sum(1)
    for k in (1, 3, 6):
        options = {"method": method, "distribution": distribution, "top1": "sort", "m": 10, "reduction": "none"}
        loss = topk.differentiable_topk_loss(scores, target, k, inverse_temperature=1e9, **options)
        torch.testing.assert_close((loss < 0.1), rank < k)


@pytest.mark.parametrize("method", [*NETWORKS, "sinkhorn"])
def test_the_ranks_are_a_distribution(method: str) -> None:
    scores, target = torch.randn(5, 9, dtype=torch.float64), torch.randint(9, (5,))
    options = Options([9], [1.0], method, kept=9, iterations=500, tolerance=1e-13, slopes=True)
    for ranks in (3, 9):
        q = differentiable.target_ranks(scores, target, ranks, options)
        rows = zip(scores, target.tolist(), strict=True)
        expected = torch.stack([reference.relaxed_ranks(row, method, ranks)[:ranks, y] for row, y in rows])
        torch.testing.assert_close(q, expected, rtol=1e-10, atol=1e-10)
        parts = [tuple(float(i == j) for i in range(ranks)) for j in range(ranks)]
        fast = [differentiable.hit_and_slopes(scores, target, part, options)[0] for part in parts]
        torch.testing.assert_close(torch.stack(fast, 1), expected, rtol=1e-10, atol=1e-10)
        if ranks == 9:
            torch.testing.assert_close(q.sum(1), torch.ones(5, dtype=torch.float64))
            hit, slopes = differentiable.hit_and_slopes(scores, target, (1.0,) * 9, options)
            torch.testing.assert_close(hit, torch.ones(5, dtype=torch.float64))
            torch.testing.assert_close(slopes, torch.zeros_like(scores))


@pytest.mark.parametrize("method", METHODS)
def test_every_class_guessed(method: str) -> None:
    scores, target = torch.randn(4, 6, dtype=torch.float64), torch.randint(6, (4,))
    loss, gradient = ours(scores, target, 6, method=method)
    assert not loss.any()
    assert not gradient.any()
    mixture = {2: 0.5, 6: 0.5}
    close(
        ours(scores, target, mixture, method=method, **tight(method)),
        truth(scores, target, mixture, method=method),
        1e-9,
    )
    for top1 in ("softmax", "cross_entropy", "sort"):
        for k, n in ((5, 6), (1, 1), (1, 2)):
            few, classes = torch.randn(3, n, dtype=torch.float64), torch.randint(n, (3,))
            options = {"method": method, "top1": top1}
            close(ours(few, classes, k, **options, **tight(method)), truth(few, classes, k, **options), 1e-9)


def test_a_mixture_stands_inside_the_logarithm() -> None:
    scores, target = torch.randn(6, 10), torch.randint(10, (6,))
    parts = [topk.differentiable_topk_loss(scores, target, k, top1="sort", reduction="none") for k in (2, 5)]
    both = topk.differentiable_topk_loss(scores, target, {2: 0.3, 5: 0.7}, top1="sort", reduction="none")
    inside = -((0.3 * (-parts[0]).exp() + 0.7 * (-parts[1]).exp()).log())
    torch.testing.assert_close(both, inside)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("m", [4, 16])
def test_impossible_classes_influence_no_other(method: str, m: int) -> None:
    scores, target = torch.randn(4, 8, dtype=torch.float64), torch.tensor([0, 1, 4, 5])
    scores[:, [2, 6, 7]] = -torch.inf
    scores[1, 3:] = -torch.inf
    scores[2, [0, 1, 3, 5]] = -torch.inf
    options = {"method": method, "m": m}
    for top1 in ("softmax", "sort"):
        loss, gradient = ours(scores, target, {1: 0.4, 3: 0.6}, top1=top1, **options, **tight(method))
        close((loss, gradient), truth(scores, target, {1: 0.4, 3: 0.6}, top1=top1, **options), 1e-9)
        assert not gradient[scores == -torch.inf].any()


@pytest.mark.parametrize("method", NETWORKS)
@pytest.mark.parametrize(("power", "beta"), [(0.9, 1e-6), (0.98, 0.1), (0.999, 1.0)])
def test_impossible_classes_lose_whatever_the_power(method: str, power: float, beta: float) -> None:
    """A power close to 1 flattens every difference, however large: -inf must still lose to all others."""
    scores = torch.tensor([[0.3, -torch.inf, 1.2, -torch.inf, -0.5, 0.9, -torch.inf, 2.0]], dtype=torch.float64)
    options = {"method": method, "distribution": "logistic_phi", "art_lambda": power}
    loss, gradient = ours(scores, torch.tensor([4]), 3, inverse_temperature=beta, **options)
    expected = reference.differentiable_topk_loss(scores[0], 4, 3, beta=beta, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert gradient.isfinite().all()
    assert (gradient[0, [1, 3, 6]] == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("top1", ["softmax", "cross_entropy", "sort"])
@pytest.mark.parametrize("over", ["kept", "all"])
def test_rows_that_are_not_finite(method: str, top1: str, over: str) -> None:
    clean = torch.randn(8, 20)
    target = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    scores = clean.clone()
    scores[0, 3] = torch.nan
    scores[1, 5] = torch.inf
    scores[2, 2] = torch.nan
    scores[3, 3] = torch.inf
    scores[4, 4] = -torch.inf
    scores[5] = -torch.inf
    options = {"method": method, "top1": top1, "cross_entropy_over": over}
    for m, k in itertools.product((1, 3, 20), (1, {1: 0.5, 3: 0.5})):
        if m < 3 and k != 1:
            continue
        loss, gradient = ours(scores, target, k, m=m, **options)
        assert loss[:4].isnan().all()
        assert gradient[:4].isnan().all()
        assert (loss[4:6] == torch.inf).all()
        assert not gradient[4:].isnan().any()
        assert not gradient[scores == -torch.inf].any()
        close((loss[6:], gradient[6:]), [part[6:] for part in ours(clean, target, k, m=m, **options)], 1e-6)


def test_no_rows() -> None:
    for method in METHODS:
        scores = torch.zeros(0, 30, requires_grad=True)
        loss = topk.differentiable_topk_loss(scores, torch.zeros(0, dtype=torch.int64), method=method, reduction="sum")
        loss.backward()
        assert loss == 0
        assert scores.grad is not None
        assert scores.grad.shape == (0, 30)


def test_many_rows_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, target = torch.randn(50, 40), torch.randint(40, (50,))
    for method in METHODS:
        whole = ours(scores, target, 5, method=method)
        with monkeypatch.context() as patch:
            patch.setattr(differentiable, "_BUDGET", 700)
            patch.setattr(differentiable, "_BUDGET_SHARE", 1)
            close(ours(scores, target, 5, method=method), whole, 1e-6)


def test_sinkhorn_warns_when_it_has_not_arrived() -> None:
    scores, target = 100 * torch.randn(3, 20), torch.randint(20, (3,))
    with pytest.warns(RuntimeWarning, match="after 5 iterations"):
        topk.differentiable_topk_loss(scores, target, method="sinkhorn", iterations=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk.differentiable_topk_loss(scores / 100, target, method="sinkhorn")


# --- networks --------------------------------------------------------------------------------------------------------


def run(layers: Any, values: torch.Tensor) -> torch.Tensor:
    """Hard comparators on (cases, wires)."""
    values = values.clone()
    for layer in layers:
        touched = [wire for pair in layer for wire in pair]
        assert len(set(touched)) == len(touched)
        for a, b in layer:
            low, high = torch.minimum(values[:, a], values[:, b]), torch.maximum(values[:, a], values[:, b])
            values[:, a], values[:, b] = low, high
    return values


def zeros_and_ones(wires: int) -> torch.Tensor:
    """All inputs of the 0/1 principle up to 10 wires, else random permutations."""
    if wires <= 10:
        return (torch.arange(2**wires)[:, None] >> torch.arange(wires)) & 1
    return torch.rand(300, wires).argsort(1)


@pytest.mark.parametrize("method", NETWORKS)
def test_networks_sort(method: str) -> None:
    for wires in (*range(1, 11), 11, 13, 16, 19, 21, 22, 23, 33, 64):
        cases = zeros_and_ones(wires)
        for ranks in range(1, wires + 1) if wires <= 10 else (1, 3, 5, wires):
            top = run(networks.network(method, wires, ranks), cases)[:, wires - ranks :]
            torch.testing.assert_close(top, cases.sort(1).values[:, wires - ranks :])


@pytest.mark.parametrize("wires", [2, 5, 8, 11, 16])
def test_pruning_changes_nothing(wires: int) -> None:
    cases = torch.randn(20, wires)
    for layers, ranks in itertools.product((networks.odd_even(wires), networks.bitonic(wires)), range(1, wires + 1)):
        pruned = networks.pruned(layers, range(wires - ranks, wires))
        assert sum(map(len, pruned)) <= sum(map(len, layers))
        torch.testing.assert_close(run(pruned, cases)[:, -ranks:], run(layers, cases)[:, -ranks:])


def test_pruning_leaves_out_what_cannot_be_seen() -> None:
    sizes = {method: sum(map(len, networks.network(method, 16, 5))) for method in NETWORKS}
    assert sizes == {"odd_even": 90, "bitonic": 67, "splitter_selection": 48}
    assert sum(map(len, networks.odd_even(16))) == 120


# --- derivatives, registration, memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "distribution"), [pair for pair in OPERATORS if pair[0] == "odd_even" or pair[1] == "cauchy"]
)
def test_gradcheck(method: str, distribution: str) -> None:
    scores = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)  # rows apart: test_contract.py
    target = torch.tensor([4])
    options = {"method": method, "distribution": distribution, "m": 5, **tight(method)}
    for top1, over in (("softmax", "kept"), ("cross_entropy", "all"))[: 2 if distribution == "cauchy" else 1]:

        def loss(x: torch.Tensor, top1: str = top1, over: str = over) -> torch.Tensor:
            return topk.differentiable_topk_loss(
                x, target, {1: 0.4, 3: 0.6}, top1=top1, cross_entropy_over=over, reduction="none", **options
            )

        torch.autograd.gradcheck(loss, scores, check_forward_ad=True)
        torch.autograd.gradgradcheck(loss, scores)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_without_selection_and_beside_impossible_classes(method: str) -> None:
    scores = torch.randn(6, dtype=torch.float64)
    scores[2] = -torch.inf
    possible = scores.isfinite().nonzero().squeeze(1)

    def ours(x: torch.Tensor) -> torch.Tensor:
        options = {"method": method, "m": 6, **tight(method)}
        return topk.differentiable_topk_loss(scores.index_copy(0, possible, x), torch.tensor(4), MIXTURES[3], **options)

    def definition(x: torch.Tensor) -> torch.Tensor:
        return reference.differentiable_topk_loss(scores.index_copy(0, possible, x), 4, MIXTURES[3], m=6, method=method)

    hessians = [torch.autograd.functional.hessian(f, scores[possible]) for f in (ours, definition)]
    close(hessians[:1], hessians[1:], 1e-8)


def test_opcheck() -> None:
    torch.library.opcheck(differentiable.transport_potentials, (torch.randn(5, 6, 6), 200, 1e-6))


def test_the_meter_of_memory_sees_temporaries() -> None:
    def use() -> torch.Tensor:
        large = torch.zeros(2**20)
        more = large + 1
        del large
        return more + 1

    assert 2 * 2**22 <= peak_temporaries(use) < 2.1 * 2**22


@pytest.mark.parametrize("method", METHODS[:5])
def test_memory_is_linear_in_m(method: str) -> None:
    """Beyond a fixed workspace, and for a fixed batch."""
    peaks = []
    for m in (64, 128, 256):
        scores, target = torch.randn(256, 300, requires_grad=True), torch.randint(300, (256,))
        loss = lambda: topk.differentiable_topk_loss(scores, target, method=method, m=m).backward()  # noqa: E731, B023
        peaks.append(peak_temporaries(loss))
    assert peaks[1] <= 2.1 * peaks[0]
    assert peaks[2] <= 2.1 * peaks[1]


# --- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k": 6, "m": 5}, ValueError, ("k", "6", "m = 5", "12 classes")),
        ({"k": {2: 0.5, 6: 0.5}, "m": 5}, ValueError, ("k", "6", "m = 5")),
        ({"m": 0}, ValueError, ("m ", "0", "at least 1")),
        ({"m": 2.5}, TypeError, ("m ", "2.5", "int")),
        ({"method": "bubble"}, ValueError, ("method", "'bubble'", "'odd_even'")),
        ({"distribution": "uniform"}, ValueError, ("distribution", "'uniform'", "'cauchy'")),
        ({"top1": "smce"}, ValueError, ("top1", "'smce'", "'cross_entropy'")),
        ({"cross_entropy_over": "some"}, ValueError, ("cross_entropy_over", "'some'", "'kept'")),
        ({"inverse_temperature": 0.0}, ValueError, ("inverse_temperature", "0.0", "> 0")),
        ({"inverse_temperature": math.nan}, ValueError, ("inverse_temperature", "nan")),
        ({"art_lambda": 1.0}, ValueError, ("art_lambda", "1.0", "< 1")),
        ({"art_lambda": -0.1}, ValueError, ("art_lambda", "-0.1", ">= 0")),
        ({"iterations": 0}, ValueError, ("iterations", "0", "at least 1")),
        ({"tolerance": 0.0}, ValueError, ("tolerance", "0.0", "> 0")),
    ],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        topk.differentiable_topk_loss(torch.randn(2, 12), torch.tensor([0, 1]), **options)
    assert all(word in str(caught.value) for word in words)
