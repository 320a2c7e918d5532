"""AUTKC, LDR and softmax at K against their sums and maxima, written out one row at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import topk
from topk.autograd import Loss
from topk.losses.ranking import AUTKC, LDR, SOFTMAX_AT_K, SURROGATES, AUTKCOptions, LDROptions, SoftmaxAtKOptions

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def rows(count: int = 24, classes: int = 9, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Targets of every rank."""
    scores = scale * torch.randn(count, classes, dtype=torch.float64)
    return scores, scores.argsort(1, descending=True)[torch.arange(count), torch.arange(count) % classes]


def both(loss: Loss, scores: Tensor, target: Tensor, options: Any) -> None:
    """The fast path and the definition give one loss and one field."""
    assert loss.forward is not None
    assert loss.backward is not None
    value, *saved = loss.forward(scores, target, options)
    field = loss.backward(torch.ones_like(value), scores, target, options, tuple(saved))
    x = scores.clone().requires_grad_()
    expected = loss.formula(x, target, options)
    slope = torch.autograd.grad(expected.sum(), x)[0]
    torch.testing.assert_close((value, field), (expected.detach(), slope), rtol=1e-9, atol=1e-9)


# --- AUTKC ---


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_autkc_equals_its_sum(surrogate: str, k: int) -> None:
    scores, target = rows()
    for row, y in zip(scores, target.tolist(), strict=True):
        level = row if surrogate == "hinge" else row.softmax(0)
        wrong = torch.cat((level[:y], level[y + 1 :])).sort(descending=True).values
        expected = sum(SURROGATES[surrogate](wrong[j] - level[y]) for j in range(k)) / k
        torch.testing.assert_close(topk.autkc_loss(row, torch.tensor(y), k, surrogate=surrogate), expected, **EXACT)
    for scale in (0.01, 1.0, 30.0):
        both(AUTKC, *rows(scale=scale), AUTKCOptions([k], [1.0], surrogate))


def test_autkc_with_the_hinge_is_lapins_beta() -> None:
    scores, target = rows()
    beta = topk.topk_hinge_loss(scores, target, 4, variant="beta", reduction="none")
    torch.testing.assert_close(topk.autkc_loss(scores, target, 4, surrogate="hinge", reduction="none"), beta, **EXACT)


def test_autkc_bounds_one_minus_the_metric() -> None:
    scores, target = rows(60)
    for k in (1, 3, 5):
        missed = 1.0 - topk.metrics.autkc(scores, target, k)[k]
        for surrogate in ("exponential", "square", "hinge"):  # f >= 1 where a wrong class leads
            assert topk.autkc_loss(scores, target, k, surrogate=surrogate) >= missed


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_xcurve_sums_one_class_more(surrogate: str) -> None:
    scores, target = rows()
    level = scores if surrogate == "hinge" else scores.softmax(1)
    wrong = level[torch.ones_like(level, dtype=torch.bool).scatter(1, target[:, None], False)].view(24, 8)
    lead = wrong.topk(4).values - level.gather(1, target[:, None])
    theirs = SURROGATES[surrogate](lead).sum(1).mean() / 3
    torch.testing.assert_close(topk.autkc_loss(scores, target, 4, surrogate=surrogate) * 4 / 3, theirs, **EXACT)


# --- LDR ---


def test_ldr_is_a_cross_entropy() -> None:
    scores, target = rows()
    entropy = F.cross_entropy(scores / 0.3, target, reduction="none")
    found = topk.ldr_loss(scores, target, temperature=0.3, margin=0.0, reduction="none")
    torch.testing.assert_close(found, 0.3 * (entropy - math.log(9)), **EXACT)
    ldam = topk.ldam_loss(scores, target, margins=1.5, scale=2.0, reduction="none")
    found = topk.ldr_loss(scores, target, temperature=0.5, margin=1.5, reduction="none")
    torch.testing.assert_close(found, 0.5 * (ldam - math.log(9)), **EXACT)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_ldr_is_a_maximum_over_distributions(temperature: float) -> None:
    scores, target = rows(6)
    loss = topk.ldr_loss(scores, target, temperature=temperature, reduction="none")
    lead = (scores - scores.gather(1, target[:, None]) + 1.0).scatter(1, target[:, None], 0.0)

    def value(p: Tensor) -> Tensor:
        return (p * lead).sum(1) - temperature * (torch.special.xlogy(p, p).sum(1) + math.log(9))

    torch.testing.assert_close(value((lead / temperature).softmax(1)), loss, **EXACT)
    for p in torch.distributions.Dirichlet(torch.full((9,), 0.5).double()).sample((300,)):
        assert (value(p.expand(6, -1)) <= loss + 1e-12).all()


def test_the_adaptive_temperature_solves_its_equation_and_no_larger_one_does() -> None:
    for scale in (0.3, 1.0, 3.0, 8.0):
        scores, target = rows(scale=scale)
        _, table = LDR.forward(scores, target, LDROptions(1.0, 1.0, 2.0))  # type: ignore[misc]
        t = 1.0 / table[:, 1]
        lead = (scores - scores.gather(1, target[:, None]) + 1.0).scatter(1, target[:, None], 0.0)

        def wanted(t: Tensor, lead: Tensor = lead) -> Tensor:
            p = (lead / t[:, None]).softmax(1)
            return 1.0 - (torch.special.xlogy(p, p).sum(1) + math.log(9)) / (2.0 * math.log(9))

        torch.testing.assert_close(wanted(t), t, rtol=1e-7, atol=1e-7)
        for share in torch.linspace(0.05, 1.0, 40).double():
            larger = t + share * (1.0 - t)
            assert (wanted(larger) <= larger + 1e-9).all()
        both(LDR, scores, target, LDROptions(1.0, 1.0, 2.0))
        both(LDR, scores, target, LDROptions(0.3, 1.0, None))


@pytest.mark.parametrize("alpha", [1.01, 1.05, 1.2, 1.5, 4.0])
@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0, 20.0])
def test_a_free_temperature_is_found_whatever_the_scores(alpha: float, scale: float) -> None:
    scores, target = rows(64, 1000, scale)
    options = LDROptions(1.0, 1.0, alpha)
    loss, table = LDR.forward(scores, target, options)  # type: ignore[misc]
    t, lead = 1.0 / table[:, 1], (scores - scores.gather(1, target[:, None]) + 1.0).scatter(1, target[:, None], 0.0)
    p = (lead / t[:, None]).softmax(1)
    solves = 1.0 - (torch.special.xlogy(p, p).sum(1) + math.log(1000)) / (alpha * math.log(1000))
    torch.testing.assert_close(solves, t, rtol=1e-8, atol=1e-8)
    price = alpha * math.log(1000) / 2 * (t - 1.0).square()
    torch.testing.assert_close(t * ((lead / t[:, None]).logsumexp(1) - math.log(1000)) - price, loss, **EXACT)
    x = scores.float().requires_grad_()
    single = topk.ldr_loss(x, target, alpha=alpha, reduction="none")
    torch.testing.assert_close(single.double(), loss, rtol=1e-6, atol=1e-5)
    field = torch.autograd.grad(single.sum(), x)[0]
    at = LDR.backward(torch.ones_like(loss), scores, target, options, (table,))  # type: ignore[misc]
    assert float((field - at).abs().max()) < 1e-5


def test_plain_rows_get_a_low_temperature() -> None:
    plain, doubtful = torch.tensor([[6.0, 0, 0, 0, 0]]).double(), torch.tensor([[0.1, 0, 0, 0, 0]]).double()
    options = LDROptions(1.0, 0.0, 2.0)
    low, high = (1 / LDR.forward(x, torch.tensor([0]), options)[1][0, 1] for x in (plain, doubtful))  # type: ignore[misc]
    assert 0.5 <= low < 0.6
    assert 0.99 < high <= 1.0


def test_a_broken_row_spoils_no_other() -> None:
    scores, target = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 3, 1, 5])
    scores[1, 2] = -torch.inf  # masked
    alone = topk.ldr_loss(scores, target, alpha=2.0, reduction="none")
    scores[0, 1] = torch.nan
    found = topk.ldr_loss(scores, target, alpha=2.0, reduction="none")
    assert found[0].isnan()
    torch.testing.assert_close(found[1:], alone[1:])


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_ldr_far_apart(alpha: float | None) -> None:
    for lead in (-1e4, -300.0, 300.0, 1e4):
        x = torch.tensor([[lead, 0.0, -1.0]], dtype=torch.float64)
        both(LDR, x, torch.tensor([0]), LDROptions(1.0, 1.0, alpha))
        single, double = (topk.ldr_loss(each, torch.tensor([0]), alpha=alpha) for each in (x.float(), x))
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_ldr_where_only_the_target_is_left(alpha: float | None) -> None:
    x = torch.full((1, 5), -torch.inf, dtype=torch.float64)
    x[0, 2] = -1000.0
    both(LDR, x, torch.tensor([2]), LDROptions(0.1, 5.0, alpha))
    both(LDR, torch.tensor([[0.3, -torch.inf, 0.1]]).double(), torch.tensor([0]), LDROptions(0.1, 5.0, alpha))
    assert topk.ldr_loss(x.float(), torch.tensor([2]), temperature=0.1, margin=5.0, alpha=alpha).isfinite()


# --- softmax at K ---


def test_softmax_at_k_equals_its_formula() -> None:
    for scale in (0.1, 1.0, 20.0):
        scores, target = rows(scale=scale)
        own = scores.gather(1, target[:, None])[:, 0]
        for k, tau, width in ((1, 1.0, 1.0), (4, 0.2, 0.5), (8, 2.0, 3.0)):
            border = scores.sort(1, descending=True).values[:, k - 1]
            entropy = F.cross_entropy(scores / tau, target, reduction="none")
            expected = ((own - border) / width).sigmoid() * entropy
            found = topk.softmax_at_k_loss(
                scores, target, k, temperature=tau, weight_temperature=width, reduction="none"
            )
            torch.testing.assert_close(found, expected, **EXACT)
            both(SOFTMAX_AT_K, scores, target, SoftmaxAtKOptions([k], [1.0], tau, width))


def test_softmax_at_k_has_the_gradient_of_its_value_with_the_border_held() -> None:
    scores, target = rows()
    x = scores.clone().requires_grad_()
    (field,) = torch.autograd.grad(topk.softmax_at_k_loss(x, target, 3, reduction="sum"), x)
    border = scores.sort(1, descending=True).values[:, 2]

    def held(x: Tensor) -> Tensor:
        weight = (x.gather(1, target[:, None])[:, 0] - border).sigmoid()
        return (weight * F.cross_entropy(x, target, reduction="none")).sum()

    torch.testing.assert_close(field, torch.func.grad(held)(scores), **EXACT)
