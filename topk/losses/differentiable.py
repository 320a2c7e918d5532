"""The differentiable top-k cross-entropy of Petersen, Kuehne, Borgelt and Deussen (2022) (book, chapter 8).

Keep the target and the m - 1 largest other scores, sort them with a relaxed operator, and let q_r be the probability
that the target lands at rank r. With log1(v) = log(v (1 - 2e-7) + 1e-7) and Q_k = q_1 + ... + q_k the loss is

    "softmax":        -log1( P(1) softmax_y + sum_{k >= 2} P(k) Q_k )
    "cross_entropy":  P(1) cross_entropy + (sum_{k >= 2} P(k)) (-log1 sum_{k >= 2} P(k) Q_k)
    "sort":           -log1 sum_{k >= 1} P(k) Q_k.

A comparator (a, b) of a network, with p = F(beta (v_b - v_a)), sends p v_a + (1 - p) v_b to wire a and the rest to
wire b, and does the same to the target's distribution over the wires: m numbers a row, never an m x m matrix.

Beyond the softmax all depends on one number a row, the *hit* = sum_r share_r q_r with share_r = sum_{k >= r} P(k). So
its gradient costs one sweep back over the layers: forward computes it at once when it will be wanted and keeps m slopes
and m indices a row, which backward only scatters.

A score of -inf plays as `_lowest`: F is then exactly 0 or 1, so that an impossible class loses every comparison and
influences no other. The few kept numbers are float64 wherever the device has it, whatever the type of the scores.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk._cpu import ordered_topk, row_chunks
from topk.arguments import KArgument, check_choice, check_count, check_k, check_number, check_scores
from topk.autograd import Head, Loss
from topk.losses.common import (
    LossModule,
    largest_classes,
    not_finite_above,
    reduced_loss,
    row_dtype,
    target_scores,
    with_tail,
)
from topk.losses.networks import network
from topk.losses.soft import takes_probabilities
from topk.tails import PowerSums

NETWORKS = ("odd_even", "bitonic", "splitter_selection")
METHODS = (*NETWORKS, "neuralsort", "softsort", "sinkhorn")
DISTRIBUTIONS = ("logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal")
TOP1 = ("softmax", "cross_entropy", "sort")
CROSS_ENTROPY_OVER = ("kept", "all")


class Options(NamedTuple):
    """The arguments of the loss, besides those that every loss takes."""

    ks: list[int]
    weights: list[float]  # of the ks: P_K
    method: str = "odd_even"
    distribution: str = "cauchy"
    inverse_temperature: float = 1.0
    art_lambda: float = 0.25
    kept: int = 16  # m, or all classes if they are fewer
    top1: str = "softmax"
    cross_entropy_over: str = "kept"
    iterations: int = 200
    tolerance: float = 1e-6
    slopes: bool = False  # whether `forward` computes the gradient on its way


def definition(
    scores: Tensor,  # (rows, classes)
    target: Tensor,  # (rows,)
    tail: Tensor | None = None,  # (1, rows), for a softmax over all: the sum of exp(x) over classes not listed
    **keywords: Any,  # those of `Options`
) -> Tensor:
    """The loss of every row (rows,)."""
    options = Options(**keywords)
    classes, pairs = scores.shape[1], list(zip(options.ks, options.weights, strict=True))
    values, own = scores, target
    if options.kept < classes:
        index = entering(largest_classes(scores, options.kept), target)
        values, own = scores.gather(1, index), torch.zeros_like(target)
    values = values.to(row_dtype(scores))
    deepest = max((k for k in options.ks if k < classes), default=0)
    reached = target_ranks(values, own, deepest, options).cumsum(1)  # Q_1, Q_2, ...
    one = torch.ones_like(values[:, 0])
    terms = [(k, p, reached[:, k - 1] if k < classes else one) for k, p in pairs]
    first = sum(p for k, p in pairs if k == 1)
    beyond = sum((p * q for k, p, q in terms if k > 1), 0.0 * one)
    if options.top1 == "sort":
        loss = -log1(sum((p * q for _, p, q in terms), 0.0 * one))
    else:
        over = scores if options.top1 == "cross_entropy" and options.cross_entropy_over == "all" else values
        log_softmax = target_scores(over.to(values.dtype).log_softmax(1), target if over is scores else own)
        if tail is not None:  # the others have their share
            log_softmax = log_softmax - with_tail(torch.zeros_like(log_softmax), tail, -over.logsumexp(1))
        if options.top1 == "softmax":
            loss = -log1(first * log_softmax.exp() + beyond)
        else:
            loss = -first * log_softmax - sum(p for k, p in pairs if k > 1) * log1(beyond)
    return loss.to(scores.dtype)


_SLOPE_1, _FLOOR = 1.0 - 2e-7, 1e-7


def log1(chance: Tensor) -> Tensor:
    """log of a probability, bounded and with a bounded slope."""
    return (chance * _SLOPE_1 + _FLOOR).log()


def entering(
    best: Tensor,  # (rows, m): the classes of the m largest scores, in order
    target: Tensor,
) -> Tensor:
    """The classes of the kept scores as they enter the sorter (rows, m): the target, then the largest others."""
    mine = best == target[:, None]
    passed = mine.cumsum(1) > mine  # beyond the target's place in the order, if it has one
    return torch.where(passed, best, torch.cat((target[:, None], best[:, :-1]), 1))


# --- q_1, q_2, ...: relaxed sorting, seen by the target --------------------------------------------------------------


def target_ranks(
    values: Tensor,  # (rows, m), float64; -inf for impossible classes
    own: Tensor,  # (rows,): the target's wire
    ranks: int,
    options: Options,
) -> Tensor:
    """q_1, q_2, ... (rows, ranks): the probabilities that the target lands there; differentiable."""
    if options.method in NETWORKS:
        return _network_ranks(values, own, ranks, options)
    if options.method == "sinkhorn":
        return _sinkhorn_ranks(values, own, ranks, options)
    return _softmax_ranks(values, own, ranks, options)


def _lowest(dtype: torch.dtype) -> float:
    """What -inf plays as: so low that against any other score F is exactly 0 or 1, and its slope 0."""
    return -1e160 if dtype == torch.float64 else -1e20


def _network_ranks(values: Tensor, own: Tensor, ranks: int, options: Options) -> Tensor:
    """A wire without a comparator in some layer is compared with itself, which changes nothing."""
    wires = torch.arange(values.shape[1], device=values.device)
    chances = (wires == own[:, None]).to(values.dtype)
    values = (values * options.inverse_temperature).clamp(min=_lowest(values.dtype))
    for layer in network(options.method, values.shape[1], ranks):
        partners, signs = list(range(values.shape[1])), [1.0] * values.shape[1]
        for low, high in layer:
            partners[low], partners[high], signs[high] = high, low, -1.0
        other = torch.tensor(partners, device=values.device)
        difference = (values[:, other] - values) * values.new_tensor(signs)  # high - low, on both wires
        stay = swap_probability(difference, options)
        values = torch.lerp(values[:, other], values, stay)
        chances = torch.lerp(chances[:, other], chances, stay)
    return chances.flip(1)[:, :ranks]


_HALF = torch.tensor(0.5, dtype=torch.float64)


def swap_probability(difference: Tensor, options: Options) -> Tensor:
    """F: the probability that the two values of a comparator, high - low = difference / beta, stay on their wires."""
    d = difference
    if options.distribution == "cauchy":
        # Rounded so that a huge d gives exactly 0 or 1.
        scale = (1.0 + 2.0 * torch.finfo(d.dtype).eps) / math.pi
        return torch.add(_HALF, d.atan(), alpha=scale).clamp(0.0, 1.0)
    if options.distribution == "logistic":
        return d.sigmoid()
    if options.distribution == "logistic_phi":
        size = d.abs() / options.inverse_temperature + 1e-10
        # The second term counts for -inf's stand-in alone: a power close to 1 would bring that back among the others.
        return torch.add(d * size.pow(-options.art_lambda), d, alpha=-1e10 / _lowest(d.dtype)).sigmoid()
    if options.distribution == "gaussian":
        return (d * math.sqrt(0.5)).erf() * 0.5 + 0.5
    if options.distribution == "reciprocal":
        return d / (d.abs() * 2.0 + 4.0) + 0.5
    outside = torch.where(d.abs() > 0.25, d, 1.0)
    return torch.where(d.abs() > 0.25, outside.sign() * 0.5 - 0.0625 / outside, d) + 0.5


def _softmax_ranks(values: Tensor, own: Tensor, ranks: int, options: Options) -> Tensor:
    """Rank r has a softmax over the kept classes, whose value at the target is q_r; these need not sum to 1.

    neuralsort: logits beta ((n + 1 - 2 r) v_j - sum_l |v_j - v_l|) of Grover et al. (2019), n the possible classes.
    softsort: logits -beta |v_[r] - v_j| of Prillo and Eisenschlos (2020); of ties the earlier wire has the better rank.

    Impossible classes are left out, and the ranks that only they could take have q_r = 0.
    """
    logits, count, _ = _logits(values, ranks, options)
    mine = logits.gather(2, own[:, None, None].expand(-1, ranks, 1)).squeeze(2)
    rank = torch.arange(1, ranks + 1, device=values.device)
    return torch.where(rank <= count, (mine - logits.logsumexp(2)).exp(), 0.0)


def _logits(values: Tensor, ranks: int, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The logits (rows, ranks, m), how many classes are possible (rows, 1), and which of them come first, in order."""
    possible = values > -torch.inf
    count = possible.sum(1, keepdim=True)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :ranks] if options.method == "softsort" else count
    values = torch.where(possible, values, 0.0)
    if options.method == "neuralsort":
        distance = (values[:, :, None] - values[:, None]).abs().sum(2)
        distance = distance - (values.shape[1] - count) * values.abs()  # the impossible ones stand at 0
        rank = torch.arange(1, ranks + 1, device=values.device)
        logits = (count + 1 - 2 * rank)[:, :, None] * values[:, None] - distance[:, None]
    else:
        logits = -(values.gather(1, order)[:, :, None] - values[:, None]).abs()
    return (logits * options.inverse_temperature).masked_fill(~possible[:, None], _lowest(values.dtype)), count, order


def _sinkhorn_ranks(values: Tensor, own: Tensor, ranks: int, options: Options) -> Tensor:
    """m times the entropic transport plan from the scores to m anchors a from 1 (rank 1) to 0, at the target.

    T_jr = exp(f_j + g_r + M_jr) with M = 2 beta v_j a_r: the squares of v and a in the cost are absorbed by the
    potentials f and g. All rows of T sum to 1, and all columns. What Sinkhorn's iterations find is a constant; two
    Newton steps from there change nothing, and make the potentials functions of the scores, right to second order.
    """
    exponents = _transport_exponents(values, options)
    row, column = transport_potentials(exponents.detach(), options.iterations, options.tolerance)
    for _ in range(2):
        row, column = _newton_step(exponents, row, column)
    return _at(_plan(exponents, row, column), own)[:, :ranks]


def _transport_exponents(values: Tensor, options: Options) -> Tensor:
    """M (rows, m, ranks). Impossible classes share the last ranks among themselves and take no other."""
    possible = values > -torch.inf
    best = values.detach().amax(1, keepdim=True).nan_to_num(neginf=0.0)
    below, order = torch.where(possible, best - values, 0.0).sort(1)
    # Between neighbours further apart no plan has a share that is a number: without this, sums would lose their digits.
    farthest = 750.0 * max(1, values.shape[1] - 1) / options.inverse_temperature
    below = pad(below.diff(dim=1).clamp(max=farthest).cumsum(1), (1, 0))
    exponents = torch.zeros_like(values).scatter(1, order, -below)[:, :, None] * _anchors(values, options)
    reachable = torch.arange(1, values.shape[1] + 1, device=values.device) <= possible.sum(1, keepdim=True)
    return torch.where(possible[:, :, None] == reachable[:, None], exponents, -torch.inf)


def _anchors(values: Tensor, options: Options) -> Tensor:
    """2 beta a."""
    anchors = torch.linspace(1.0, 0.0, values.shape[1], dtype=values.dtype, device=values.device)
    return anchors * (2.0 * options.inverse_temperature)


def _at(matrices: Tensor, own: Tensor) -> Tensor:
    """The target's row (rows, m) of every matrix."""
    return matrices.gather(1, own[:, None, None].expand(-1, 1, matrices.shape[2])).squeeze(1)


def _newton_step(exponents: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """One step towards marginals of 1."""
    plan = _plan(exponents, row, column)
    sums = plan.sum(2)
    excess = (sums - 1.0) / sums
    step = _solve(plan, _apply(plan.mT, excess) - (plan.sum(1) - 1.0))
    return row - excess - _apply(plan, step) / sums, column + step


def _plan(exponents: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return (exponents + row[:, :, None] + column[:, None]).exp()


def _solve(plan: Tensor, right: Tensor) -> Tensor:
    """The columns' part of the linear system of the marginals, the rows' eliminated; it is free up to a constant."""
    ridge = 1e-13  # keeps the system of an almost hard plan solvable
    system = torch.diag_embed(plan.sum(1) + ridge) - plan.mT @ (plan / plan.sum(2, keepdim=True))
    solution: Tensor = torch.linalg.solve(system, right)
    return solution


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]


@torch.library.custom_op("topk::transport_potentials", mutates_args=())
def transport_potentials(exponents: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """f and g (rows, m) by Sinkhorn's iterations; on the CPU they stop, or warn, by the tolerance.

    They start from potentials of the hard plan, in which the r-th largest score has rank r. Such potentials have
    g_{r+1} - g_r between 2 beta (a_r - a_{r+1}) times v_{r+1} and times v_r: half-way, most plans are nearly found.
    """
    lead = exponents[:, :, 0].sort(1, descending=True).values  # 2 beta v, as the first anchor is 1
    lead = torch.where(lead == -torch.inf, 0.0, lead)
    column = 0.5 * (lead[:, 1:] + lead[:, :-1]).cumsum(1) / max(1, lead.shape[1] - 1)
    row, column = torch.zeros_like(lead), torch.cat((torch.zeros_like(lead[:, :1]), column), 1)
    excess = torch.inf
    for _ in range(iterations):
        row = -(exponents + column[:, None]).logsumexp(2)
        update = -(exponents + row[:, :, None]).logsumexp(1)
        if exponents.is_cpu and exponents.numel() > 0:
            excess = float((column - update).expm1().abs().amax())
            if excess <= tolerance:
                return row, column
        column = update
    row = -(exponents + column[:, None]).logsumexp(2)
    if exponents.is_cpu and exponents.numel() > 0:
        warnings.warn(
            f"sinkhorn: after {iterations} iterations the marginals are still off by {excess:.2g}, more than "
            f"tolerance={tolerance:g}; allow more iterations or lower inverse_temperature",
            RuntimeWarning,
            stacklevel=2,
        )
    return row, column


@transport_potentials.register_fake
def _(exponents: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(exponents[:, :, 0]), torch.empty_like(exponents[:, 0])


@transport_potentials.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], exponents: Tensor, iterations: int, tolerance: float
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    assert in_dims[0] is not None
    batch = exponents.movedim(in_dims[0], 0)
    row, column = transport_potentials(batch.flatten(0, 1), iterations, tolerance)
    return (row.unflatten(0, batch.shape[:2]), column.unflatten(0, batch.shape[:2])), (0, 0)


# --- the same number, made fast --------------------------------------------------------------------------------------


class Split(NamedTuple):
    """How the weights of P_K act: the top-1 term, all others, those of them that cannot miss, each rank's share."""

    first: float
    rest: float
    sure: float
    shares: tuple[float, ...]


def split_weights(options: Options, classes: int) -> Split:
    """A k equal to the number of classes cannot be missed: Q_k = 1."""
    pairs = list(zip(options.ks, options.weights, strict=True))
    first = sum(p for k, p in pairs if k == 1) if options.top1 != "sort" else 0.0
    others = [(k, p) for k, p in pairs if options.top1 == "sort" or k > 1]
    depth = max((k for k, _ in others if k < classes), default=0)
    shares = tuple(sum(p for k, p in others if rank <= k < classes) for rank in range(1, depth + 1))
    return Split(first, sum(p for _, p in others), sum(p for k, p in others if k == classes), shares)


def over_all(options: Options, classes: int) -> bool:
    """Whether a softmax over more than the kept scores is asked for."""
    return options.top1 == "cross_entropy" and options.cross_entropy_over == "all" and options.kept < classes


def forward(scores: Tensor, target: Tensor, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the indices of the kept scores (none when all are) and, if wanted, d loss / d kept scores."""
    if options.kept < scores.shape[1]:
        best, index = ordered_topk(scores, options.kept)
        index, own = entering(index, target), torch.zeros_like(target)
        values = scores.gather(1, index)
        bad = not_finite_above(torch.maximum(best[:, 0], values[:, 0]))
    else:  # nothing to select: the scores enter in class order
        values, index, own = scores, target.new_empty((scores.shape[0], 0)), target
        bad = not_finite_above(scores.amax(1))
    values = values.to(row_dtype(scores)).masked_fill(bad[:, None], 0.0)
    loss, slopes = _loss_of_kept(values, own, scores, options)
    lost = target_scores(values, own) == -torch.inf
    loss = loss.masked_fill(lost, torch.inf).masked_fill(bad, torch.nan).to(scores.dtype)
    if slopes is None:
        return loss, index, scores.new_empty((scores.shape[0], 0))
    slopes = slopes.masked_fill_(values == -torch.inf, 0.0).masked_fill_(bad[:, None], torch.nan)
    return loss, index, slopes.to(scores.dtype, memory_format=torch.contiguous_format)


def _loss_of_kept(values: Tensor, own: Tensor, scores: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """The loss (rows,) and its slopes in the kept scores (rows, kept)."""
    first, rest, sure, shares = split_weights(options, scores.shape[1])
    hit, slopes = hit_and_slopes(values, own, shares, options)
    log_softmax, pull = _log_softmax(values, own, scores, options) if first > 0.0 else (torch.zeros_like(hit), None)
    if options.top1 == "cross_entropy":
        inner = (hit + sure) * _SLOPE_1 + _FLOOR
        loss = -rest * inner.log() - first * log_softmax
        by_hit, by_log_softmax = -rest * _SLOPE_1 / inner, torch.full_like(hit, -first)
    else:
        softmax = first * log_softmax.exp()
        inner = (hit + sure + softmax) * _SLOPE_1 + _FLOOR
        loss, by_hit = -inner.log(), -_SLOPE_1 / inner
        by_log_softmax = by_hit * softmax
    if slopes is not None:
        slopes = slopes.mul_(by_hit[:, None])
        slopes = slopes if pull is None else slopes.addcmul_(pull, by_log_softmax[:, None])
    return loss, slopes


def _log_softmax(values: Tensor, own: Tensor, scores: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """log softmax_y (rows,) and its slopes (rows, kept), but for what `backward` adds where it is over all classes."""
    mine = torch.zeros_like(values).scatter_(1, own[:, None], 1.0)
    if over_all(options, scores.shape[1]):
        return target_scores(values, own) - _log_sum(scores).to(values.dtype), mine
    log_softmax = values.clamp(min=_lowest(values.dtype)).log_softmax(1)
    return target_scores(log_softmax, own), mine.sub_(log_softmax.exp())


def _log_sum(scores: Tensor) -> Tensor:
    """log sum exp of every row; 0 where every class is impossible."""
    total = scores.logsumexp(1)
    return total.masked_fill(total == -torch.inf, 0.0)


def backward(
    grad: Tensor,  # (rows,)
    scores: Tensor,
    target: Tensor,
    options: Options,
    saved: tuple[Tensor, ...],
) -> Tensor:
    """grad * d loss / d scores: the saved slopes, scattered; computed here when forward was not asked for them."""
    index, slopes = _scaled_slopes(grad, scores, target, options, saved)
    if options.kept == scores.shape[1]:
        return slopes
    zero = slopes[:, :1] * 0.0  # NaN where the row is bad
    if not over_all(options, scores.shape[1]):
        return zero.expand(scores.shape).contiguous().scatter_(1, index, slopes)
    softmax = (scores - _log_sum(scores)[:, None]).exp_()
    first = split_weights(options, scores.shape[1]).first
    return softmax.mul_(grad[:, None] * first + zero).scatter_add_(1, index, slopes)


def sparse(
    grad: Tensor, scores: Tensor, target: Tensor, options: Options, saved: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor] | None:
    """The kept classes and grad times their slopes; None where all are kept, or a softmax is over all."""
    if options.kept == scores.shape[1] or over_all(options, scores.shape[1]):
        return None
    return _scaled_slopes(grad, scores, target, options, saved)


def _scaled_slopes(
    grad: Tensor, scores: Tensor, target: Tensor, options: Options, saved: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    index, slopes = saved if options.slopes else forward(scores, target, options._replace(slopes=True))[1:]
    return index, slopes * grad[:, None]


_BUDGET = 2**20  # numbers worked on at a time, or _BUDGET_SHARE for each of the batch's kept scores if that is more
_BUDGET_SHARE = 64


def hit_and_slopes(
    values: Tensor,  # (rows, kept)
    own: Tensor,  # (rows,)
    shares: tuple[float, ...],  # of the ranks
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """The hit (rows,) and, if wanted, its slopes (rows, kept), a new tensor; so many rows at a time as fit the budget.

    A network's memory grows with kept, that of the others with its square, but no further than the budget.
    """
    rows, kept = values.shape
    if not shares or not rows:
        return values.new_zeros(rows), torch.zeros_like(values) if options.slopes else None
    chunks = row_chunks(rows, _cost(kept, len(shares), options.method), max(_BUDGET, _BUDGET_SHARE * kept * rows))
    share = values.new_tensor(shares)
    function = {**dict.fromkeys(NETWORKS, _network_hit), "sinkhorn": _sinkhorn_hit}.get(options.method, _softmax_hit)
    hits, slopes = zip(*(function(values[c], own[c], share, options) for c in chunks), strict=True)
    return torch.cat(hits), torch.cat(slopes) if options.slopes else None


def _cost(kept: int, ranks: int, method: str) -> int:
    """How many numbers a row takes."""
    if method in NETWORKS:
        return 2 * kept + 9 * sum(len(layer) for layer in network(method, kept, ranks))
    return {"softsort": 6 * kept * ranks, "neuralsort": kept * (4 * kept + 3 * ranks), "sinkhorn": 5 * kept**2}[method]


def _softmax_hit(values: Tensor, own: Tensor, share: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """The logits' slopes are share_r q_r (one-hot - softmax_r)."""
    logits, count, order = _logits(values, len(share), options)
    softmax = logits.softmax(2)
    place, rank = own[:, None, None].expand(-1, len(share), 1), torch.arange(1, len(share) + 1, device=values.device)
    reached = softmax.gather(2, place).squeeze(2) * torch.where(rank <= count, share, 0.0)
    hit = reached.sum(1)
    if not options.slopes:
        return hit, None
    bend = softmax.mul_(-reached[:, :, None]).scatter_add_(2, place, reached[:, :, None])
    values = torch.where(values > -torch.inf, values, 0.0)
    if options.method == "neuralsort":
        pull, total = ((count + 1 - 2 * rank).to(bend.dtype)[:, None] @ bend).squeeze(1), bend.sum(1)
        sides = (values[:, :, None] - values[:, None]).sign_()  # a tie has slope 0
        turn = total * sides.sum(2) + (sides @ total[:, :, None]).squeeze(2)
        slopes = pull - turn + (values.shape[1] - count) * total * values.sign()
    else:
        bend.mul_((values[:, None] - values.gather(1, order)[:, :, None]).sign_())
        slopes = bend.sum(1).neg_().scatter_add_(1, order, bend.sum(2))
    return hit, slopes.mul_(options.inverse_temperature)


def _sinkhorn_hit(values: Tensor, own: Tensor, share: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """The slopes by the implicit function theorem: to differentiate the iterations would keep every one of them."""
    exponents = _transport_exponents(values, options)
    plan = _plan(exponents, *transport_potentials(exponents, options.iterations, options.tolerance))
    mass = torch.zeros_like(values)
    mass[:, : len(share)] = _at(plan, own)[:, : len(share)] * share
    if not options.slopes:
        return mass.sum(1), None
    pull = torch.zeros_like(mass).scatter_(1, own[:, None], mass.sum(1, keepdim=True))
    column_pull = _solve(plan, mass - _apply(plan.mT, pull))
    row_pull = pull - _apply(plan, column_pull)
    bend = plan.mul_(row_pull[:, :, None] + column_pull[:, None]).neg_()
    bend.scatter_add_(1, own[:, None, None].expand(-1, 1, bend.shape[2]), mass[:, None])
    return mass.sum(1), bend @ _anchors(values, options)


@torch.inference_mode()  # hundreds of small operations: each a little cheaper
def _network_hit(values: Tensor, own: Tensor, share: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """Values and the target's distribution run through the layers side by side: a pool (slots, 2, rows)."""
    rows, kept = values.shape
    circuit = _circuit(options.method, kept, len(share), values.device)
    pool = values.new_empty((sum(circuit.blocks), 2, rows))
    torch.mul(values.T, options.inverse_temperature, out=pool[:kept, 0]).clamp_(min=_lowest(values.dtype))
    pool[:kept, 1].zero_().scatter_(0, own[None], 1.0)
    differences = values.new_empty((sum(circuit.pairs), 2, rows))
    blocks = pool.split_with_sizes(circuit.blocks)
    of_layer = differences.split_with_sizes(circuit.pairs)
    of_values = differences[:, :1].split_with_sizes(circuit.pairs)
    stay = []
    for i, (low_places, high_places) in enumerate(zip(circuit.lows, circuit.highs, strict=True)):
        low, high = _read(pool, low_places), _read(pool, high_places)
        torch.sub(high, low, out=of_layer[i])
        probability = swap_probability(of_values[i], options)
        torch.lerp(high, low, probability, out=blocks[2 * i + 1])
        torch.lerp(low, high, probability, out=blocks[2 * i + 2])
        stay.append(probability)
    hit = share @ pool[:, 1].index_select(0, circuit.outputs)
    if not options.slopes:
        return hit, None
    return hit, _network_slopes(circuit, pool, differences, stay, share, options).T


def _network_slopes(
    circuit: _Circuit, pool: Tensor, differences: Tensor, stay: list[Tensor], share: Tensor, options: Options
) -> Tensor:
    """The layers backwards. A comparator's 2 x 2 matrix is symmetric, so slopes pass through it as values do.

    Besides, p itself moves with the two values: d hit / d p = sum over values and distribution of
    (slope of the larger - slope of the smaller) * (high - low).

    The slopes are written over the pool: its values are needed no more, and fresh memory is slow to touch.
    """
    pool.index_fill_(0, circuit.unread, 0.0)
    pool.select(1, 1).index_copy_(0, circuit.outputs, share[:, None].expand(-1, pool.shape[2]))
    blocks = pool.split_with_sizes(circuit.blocks)
    density = _density(differences[:, 0], options).split_with_sizes(circuit.pairs)
    of_values = differences[:, 0].split_with_sizes(circuit.pairs)
    of_target = differences[:, 1].split_with_sizes(circuit.pairs)
    for i in reversed(range(len(stay))):
        smaller, larger = blocks[2 * i + 1], blocks[2 * i + 2]
        lead = larger - smaller
        lead_values, lead_target = lead.unbind(1)
        moved = torch.addcmul(lead_values * of_values[i], lead_target, of_target[i]).mul_(density[i])
        lead.mul_(stay[i])
        lead_values.add_(moved)
        _write(pool, circuit.lows[i], larger, lead, -1.0)
        _write(pool, circuit.highs[i], smaller, lead, 1.0)
    return pool[: circuit.blocks[0], 0] * options.inverse_temperature


def _density(difference: Tensor, options: Options) -> Tensor:
    """F'."""
    d = difference
    if options.distribution == "cauchy":
        return (d.square() + 1.0).reciprocal_().mul_(1.0 / math.pi)
    if options.distribution == "logistic":
        p = d.sigmoid()
        return (1.0 - p).mul_(p)
    if options.distribution == "logistic_phi":
        p = swap_probability(d, options)
        distance = d.abs() / options.inverse_temperature
        size = distance + 1e-10
        steepness = size.pow(-options.art_lambda) * (1.0 - options.art_lambda * distance / size)
        return (1.0 - p).mul_(p).mul_(steepness)
    if options.distribution == "gaussian":
        return (d.square() * -0.5).exp_().mul_(1.0 / math.sqrt(2.0 * math.pi))
    if options.distribution == "reciprocal":
        return (d.abs() + 2.0).square_().reciprocal_()
    return d.abs().clamp_(min=0.25).square_().reciprocal_().mul_(0.0625)


class _Circuit(NamedTuple):
    """A network on the slots of a pool: the wires' first values, then each layer's smaller and larger ones.

    Nothing is overwritten on the way up, and a wire that no comparator touches needs no copy.
    """

    lows: list[slice | Tensor]  # the slots each layer reads: a slice where they are evenly spaced
    highs: list[slice | Tensor]
    pairs: list[int]  # comparators of each layer
    blocks: list[int]  # the wires, then every layer's pairs twice
    unread: Tensor  # the slots that no layer reads
    outputs: Tensor  # the slots of rank 1, 2, ...


@lru_cache(maxsize=64)
def _circuit(method: str, wires: int, ranks: int, device: torch.device) -> _Circuit:
    """The network with its index tensors on the device."""
    slot, unread = list(range(wires)), set(range(wires))
    lows, highs = [], []
    layers = network(method, wires, ranks)
    pairs = [len(layer) for layer in layers]
    first = wires
    with torch.inference_mode(False):  # what is cached must serve every mode
        for layer in layers:
            unread -= {slot[wire] for pair in layer for wire in pair}
            lows.append(_places([slot[a] for a, _ in layer], device))
            highs.append(_places([slot[b] for _, b in layer], device))
            for i, (a, b) in enumerate(layer):
                slot[a], slot[b] = first + i, first + len(layer) + i
            unread |= {slot[wire] for pair in layer for wire in pair}
            first += 2 * len(layer)
        outputs = torch.tensor([slot[wires - rank] for rank in range(1, ranks + 1)], device=device)
        idle = torch.tensor(sorted(unread), device=device)
    return _Circuit(lows, highs, pairs, [wires, *(size for size in pairs for _ in range(2))], idle, outputs)


def _places(slots: list[int], device: torch.device) -> slice | Tensor:
    step = slots[1] - slots[0] if len(slots) > 1 else 1
    if step > 0 and slots == list(range(slots[0], slots[-1] + 1, step)):
        return slice(slots[0], slots[-1] + 1, step)
    return torch.tensor(slots, device=device)


def _read(pool: Tensor, places: slice | Tensor) -> Tensor:
    return pool[places] if isinstance(places, slice) else pool.index_select(0, places)


def _write(pool: Tensor, places: slice | Tensor, start: Tensor, change: Tensor, sign: float) -> None:
    """start + sign * change into places of the pool."""
    if isinstance(places, slice):
        torch.add(start, change, alpha=sign, out=pool[places])
    else:
        pool.index_copy_(0, places, torch.add(start, change, alpha=sign))


def head(options: Options) -> Head:
    """The kept scores, and for a softmax over all scores the sum of exponentials."""
    over_all = options.top1 == "cross_entropy" and options.cross_entropy_over == "all"
    return Head(options.kept, [PowerSums(1.0)] if over_all else [])


LOSS = Loss("differentiable", Options, definition, forward, backward, sparse, head, joint=True)


@takes_probabilities
def differentiable_topk_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    method: str = "odd_even",
    distribution: str = "cauchy",
    inverse_temperature: float = 1.0,
    art_lambda: float = 0.25,
    m: int = 16,
    top1: str = "softmax",
    cross_entropy_over: str = "kept",
    iterations: int = 200,
    tolerance: float = 1e-6,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The differentiable top-k cross-entropy of Petersen, Kuehne, Borgelt and Deussen (2022); chapter 8.

    The target and the m - 1 largest other scores are sorted by a relaxed operator; :math:`Q_k` is the probability that
    the target lands among the first k. A mapping for k is the paper's :math:`P_K`; it stands inside the logarithm, so
    this is not a sum of losses. An int puts all weight on one k. With log1(v) = log(v (1 - 2e-7) + 1e-7):

    ===============  =================================================================================
    "softmax"        -log1(P(1) softmax_y + sum over k >= 2 of P(k) Q_k)
    "cross_entropy"  P(1) cross_entropy + (sum over k >= 2 of P(k)) (-log1(sum over k >= 2 of P(k) Q_k))
    "sort"           -log1(sum over k >= 1 of P(k) Q_k)
    ===============  =================================================================================

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        k: the number of guesses, or a mapping ``{k: weight}`` whose weights sum to 1; none above min(m, classes).
        method: a comparator network ("odd_even", "bitonic", "splitter_selection"), "neuralsort", "softsort" or
            "sinkhorn". The q_r of neuralsort and softsort do not sum to 1, so their loss can be negative.
        distribution: the networks' swap probability: "logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal"
            or "optimal".
        inverse_temperature: the networks' steepness, one over the others' temperature, > 0.
        art_lambda: the power of "logistic_phi", >= 0 and < 1.
        m: how many scores are kept. With m >= classes all are, and enter in class order, on which a network's result
            then depends.
        top1: one of the names above.
        cross_entropy_over: with top1="cross_entropy", whether its softmax is over the "kept" scores or "all".
        iterations: at most so many of Sinkhorn's; on devices other than the CPU, exactly so many.
        tolerance: how far the marginals of "sinkhorn" may be off; beyond it the CPU warns.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch", "compiled" or "triton".
    """
    classes = check_scores(scores, target)
    ks, weights = check_k(k, classes)
    m = check_count("m", m)
    if ks[-1] > min(m, classes):
        raise ValueError(
            f"k must be at most min(m, classes), since only m scores are kept: got k = {ks[-1]} with m = {m} "
            f"and {classes} classes"
        )
    check_choice("method", method, METHODS)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_choice("top1", top1, TOP1)
    check_choice("cross_entropy_over", cross_entropy_over, CROSS_ENTROPY_OVER)
    inverse_temperature = check_number("inverse_temperature", inverse_temperature, above=0.0)
    art_lambda = check_number("art_lambda", art_lambda, least=0.0, below=1.0)
    iterations = check_count("iterations", iterations)
    tolerance = check_number("tolerance", tolerance, above=0.0)
    # Inside the logarithm a k that cannot miss still counts; alone it leaves nothing to compute.
    used = [(each, p) for each, p in zip(ks, weights, strict=True) if p > 0.0]
    used = [] if used[0][0] == classes else used
    options = Options(
        [each for each, _ in used],
        [p for _, p in used],
        method,
        distribution,
        inverse_temperature,
        art_lambda,
        min(m, classes),
        top1,
        cross_entropy_over,
        iterations,
        tolerance,
        slopes=torch.is_grad_enabled() and scores.requires_grad,
    )
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    return reduced_loss(LOSS, options, scores, target, **tail)


class DifferentiableTopKLoss(LossModule):
    """Module form of :func:`topk.differentiable_topk_loss`."""

    function = staticmethod(differentiable_topk_loss)

    def __init__(
        self,
        k: KArgument = 5,
        *,
        method: str = "odd_even",
        distribution: str = "cauchy",
        inverse_temperature: float = 1.0,
        art_lambda: float = 0.25,
        m: int = 16,
        top1: str = "softmax",
        cross_entropy_over: str = "kept",
        iterations: int = 200,
        tolerance: float = 1e-6,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())
