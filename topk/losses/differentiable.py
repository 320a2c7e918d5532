"""The differentiable top-k cross-entropy of Petersen, Kuehne, Borgelt and Deussen (2022) (book, chapter 8).

Keep the target and the m - 1 largest other scores, sort them with a relaxed operator, and let q_r be the probability
that the target lands at rank r. With log1(v) = log(v (1 - 2e-7) + 1e-7) and Q_k = q_1 + ... + q_k the loss is

    "softmax":        -log1( P(1) softmax_y + sum_{k >= 2} P(k) Q_k )
    "cross_entropy":  P(1) cross_entropy + (sum_{k >= 2} P(k)) (-log1 sum_{k >= 2} P(k) Q_k)
    "sort":           -log1 sum_{k >= 1} P(k) Q_k.

Beyond the softmax all depends on one number a row, the *hit* = sum_r share_r q_r with share_r = sum_{k >= r} P(k).

How it is computed. A comparator (a, b) of a network, with p = F(beta (v_b - v_a)), sends p v_a + (1 - p) v_b to wire a
and the rest to wire b, and does the same to the target's distribution over the wires: m numbers a row, never an m x m
matrix. Since the hit is one number, its gradient costs one sweep back over the layers, so forward computes it at once
when it will be wanted and keeps m slopes and m indices a row; backward only scatters them.

A score of -inf plays as LOWEST: F is then exactly 0 or 1, so that an impossible class loses every comparison and
influences no other. The few kept numbers are float64 wherever the device has it, whatever the type of the scores.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from topk.losses.networks import network
from topk.losses.room import Options, Room, Saved, SavedShape, not_finite_above, row_chunks, wide_type
from topk.losses.selection import ordered_topk

NETWORKS = ("odd_even", "bitonic", "splitter_selection")
METHODS = (*NETWORKS, "neuralsort", "softsort", "sinkhorn")
DISTRIBUTIONS = ("logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal")
TOP1 = ("softmax", "cross_entropy", "sort")
CROSS_ENTROPY_OVER = ("kept", "all")

_SLOPE_1, _FLOOR = 1.0 - 2e-7, 1e-7  # log1(v) = log(_SLOPE_1 v + _FLOOR)
_BUDGET = 2**20  # numbers worked on at a time, or _BUDGET_SHARE for each of the batch's kept scores if that is more
_BUDGET_SHARE = 64
_HALF = torch.tensor(0.5, dtype=torch.float64)
_RIDGE = 1e-13  # keeps the implicit gradient of an almost hard transport plan solvable


class _Settings(NamedTuple):
    """The room's options, by name."""

    ks: list[int]
    weights: list[float]
    method: str
    distribution: str
    inverse_temperature: float
    art_lambda: float
    kept: int
    top1: str
    cross_entropy_over: str
    iterations: int
    tolerance: float
    slopes: bool


_Hit = Callable[[Tensor, Tensor, tuple[float, ...], _Settings], tuple[Tensor, Tensor | None]]
"""(values (kept, rows), the target's wires, the ranks' shares, settings): the hit (rows,), its slopes or None."""

OPTIONS = (
    "int[] ks, float[] weights, str method, str distribution, float inverse_temperature, float art_lambda, int m, "
    "str top1, str cross_entropy_over, int iterations, float tolerance, bool slopes"
)


def _lowest(kind: torch.dtype) -> float:
    """What -inf plays as: so low that against any other score F is exactly 0 or 1, and its slope 0."""
    return -1e160 if kind == torch.float64 else -1e20


def _saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    settings = _Settings(*options)
    selected = settings.kept if settings.kept < classes else 0
    return ((rows, selected), torch.int64), ((rows, settings.kept if settings.slopes else 0), None)


# --- the loss --------------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """How the weights of P_K split: the top-1 term, all others, those of them that cannot miss, each rank's share."""

    first: float
    rest: float
    sure: float
    shares: tuple[float, ...]


def _parts(settings: _Settings, classes: int) -> _Parts:
    """A k equal to the number of classes cannot be missed: Q_k = 1."""
    pairs = list(zip(settings.ks, settings.weights, strict=True))
    first = sum(p for k, p in pairs if k == 1) if settings.top1 != "sort" else 0.0
    others = [(k, p) for k, p in pairs if settings.top1 == "sort" or k > 1]
    depth = max((k for k, _ in others if k < classes), default=0)
    shares = tuple(sum(p for k, p in others if rank <= k < classes) for rank in range(1, depth + 1))
    return _Parts(first, sum(p for _, p in others), sum(p for k, p in others if k == classes), shares)


def forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the indices of the kept scores (none when all are) and, if wanted, d loss / d kept scores."""
    settings = _Settings(*options)
    kept, index, own, bad = _select(scores, target, settings.kept)
    if not settings.ks:  # nothing can be missed, whatever the scores
        bad = torch.zeros_like(bad)
    values = kept.T.to(wide_type(scores), memory_format=torch.contiguous_format)
    values = values.masked_fill(bad, 0.0)
    loss, slopes = _loss_of_kept(values, own, scores, settings, _hit_in_chunks)
    lost = values.gather(0, own[None])[0] == -torch.inf
    loss = loss.masked_fill_(lost, torch.inf if settings.ks else 0.0).masked_fill_(bad, torch.nan).to(scores.dtype)
    if slopes is None:
        return loss, index, scores.new_empty((scores.shape[0], 0))
    slopes = slopes.masked_fill_(values == -torch.inf, 0.0).masked_fill_(bad, torch.nan)
    return loss, index, slopes.T.to(scores.dtype, memory_format=torch.contiguous_format)


def _select(scores: Tensor, target: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kept scores (rows, kept) as they enter, their indices, the target's wire, and which rows are bad."""
    rows, classes = scores.shape
    if kept == classes:  # nothing to select: the scores enter in class order
        return scores, target.new_empty((rows, 0)), target, not_finite_above(scores.amax(1))
    values, index = ordered_topk(scores, kept)
    mine = index == target[:, None]
    passed = mine.cumsum(1) > mine  # beyond the target's place in the order, if it has one
    index = torch.where(passed, index, torch.cat((target[:, None], index[:, :-1]), 1))
    entering = scores.gather(1, index)
    return entering, index, torch.zeros_like(target), not_finite_above(torch.maximum(values[:, 0], entering[:, 0]))


def _loss_of_kept(
    values: Tensor, own: Tensor, scores: Tensor, settings: _Settings, hit_of: _Hit
) -> tuple[Tensor, Tensor | None]:
    """The loss (rows,) and its slopes in the kept scores (kept, rows), from values (kept, rows)."""
    parts = _parts(settings, scores.shape[1])
    hit, slopes = hit_of(values, own, parts.shares, settings)
    if not settings.ks:
        return hit, slopes
    inner = hit + parts.sure
    if parts.first == 0.0:
        inner = inner * _SLOPE_1 + _FLOOR
        return -inner.log(), None if slopes is None else slopes.mul_(-_SLOPE_1 / inner)
    own_log, minus_own = _cross_entropy(values, own, scores, settings)
    if settings.top1 == "softmax":
        softmax = own_log.exp() * parts.first
        inner = (softmax + inner) * _SLOPE_1 + _FLOOR
        if slopes is not None:
            slopes.addcmul_(minus_own, -softmax).mul_(-_SLOPE_1 / inner)
        return -inner.log(), slopes
    inner = inner * _SLOPE_1 + _FLOOR
    loss = -parts.first * own_log - (parts.rest * inner.log() if parts.rest else 0.0)
    if slopes is not None:
        slopes.mul_(-parts.rest * _SLOPE_1 / inner).add_(minus_own, alpha=parts.first)
    return loss, slopes


def _cross_entropy(values: Tensor, own: Tensor, scores: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """log softmax_y (rows,), and softmax minus one-hot (kept, rows) or what of it `backward` does not add itself."""
    own_value = values.gather(0, own[None])
    minus_one = torch.full_like(own_value, -1.0)
    if _over_all(settings, scores.shape[1]):
        own_log = own_value[0] - _log_sum(scores).to(values.dtype)
        return own_log, torch.zeros_like(values).scatter(0, own[None], minus_one)
    log_softmax = values.clamp(min=_lowest(values.dtype)).log_softmax(0)
    return log_softmax.gather(0, own[None])[0], log_softmax.exp().scatter_add(0, own[None], minus_one)


def _over_all(settings: _Settings, classes: int) -> bool:
    """Whether a softmax over more than the kept scores is asked for."""
    return settings.top1 == "cross_entropy" and settings.cross_entropy_over == "all" and settings.kept < classes


def _log_sum(scores: Tensor) -> Tensor:
    """log sum exp of every row; 0 where every class is impossible."""
    total = scores.logsumexp(1)
    return total.masked_fill(total == -torch.inf, 0.0)


def backward(grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """grad * d loss / d scores: the saved slopes, scattered; computed here when forward was not asked for them."""
    settings = _Settings(*options)
    index, slope = saved
    if not settings.slopes:
        _, index, slope = forward(scores, target, extras, settings._replace(slopes=True))
    slope = slope * grad[:, None]
    if settings.kept == scores.shape[1]:
        return slope
    zero = slope[:, :1] * 0.0  # NaN where the row is bad
    if not _over_all(settings, scores.shape[1]):
        return zero.expand(scores.shape).contiguous().scatter_(1, index, slope)
    first = _parts(settings, scores.shape[1]).first
    softmax = (scores - _log_sum(scores)[:, None]).exp_()
    return softmax.mul_(grad[:, None] * first + zero).scatter_add_(1, index, slope)


# --- the hit and its slopes ------------------------------------------------------------------------------------------


def _hit_in_chunks(
    values: Tensor, own: Tensor, shares: tuple[float, ...], settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    """The hit (rows,) and, if wanted, its slopes (kept, rows); so many rows at a time that memory stays O(kept)."""
    kept, rows = values.shape
    if not shares or not rows:
        return values.new_zeros(rows), torch.zeros_like(values) if settings.slopes else None
    function, cost = _HITS[settings.method]
    budget = max(_BUDGET, _BUDGET_SHARE * kept * rows)
    chunks = row_chunks(rows, cost(kept, len(shares), settings), budget)
    with torch.inference_mode():  # hundreds of small operations: each a little cheaper
        hits, slopes = zip(*(function(values[:, c], own[c], shares, settings) for c in chunks), strict=True)
    return torch.cat(hits), torch.cat(slopes, 1) if settings.slopes else None


# --- swap probabilities ----------------------------------------------------------------------------------------------


def _swap(difference: Tensor, settings: _Settings) -> Tensor:
    """F: the probability that the two values of a comparator, high - low = difference / beta, stay on their wires."""
    d = difference
    if settings.distribution == "cauchy":
        # Rounded so that a huge d gives exactly 0 or 1.
        scale = (1.0 + 2.0 * torch.finfo(d.dtype).eps) / math.pi
        return torch.add(_HALF, d.atan(), alpha=scale).clamp(0.0, 1.0)
    if settings.distribution == "logistic":
        return d.sigmoid()
    if settings.distribution == "logistic_phi":
        size = d.abs() / settings.inverse_temperature + 1e-10
        # The second term counts for -inf's stand-in alone: a power close to 1 would bring that back among the others.
        return torch.add(d * size.pow(-settings.art_lambda), d, alpha=-1e10 / _lowest(d.dtype)).sigmoid()
    if settings.distribution == "gaussian":
        return (d * math.sqrt(0.5)).erf() * 0.5 + 0.5
    if settings.distribution == "reciprocal":
        return d / (d.abs() * 2.0 + 4.0) + 0.5
    outside = torch.where(d.abs() > 0.25, d, 1.0)
    return torch.where(d.abs() > 0.25, outside.sign() * 0.5 - 0.0625 / outside, d) + 0.5


def _density(difference: Tensor, settings: _Settings) -> Tensor:
    """F'."""
    d = difference
    if settings.distribution == "cauchy":
        return (d.square() + 1.0).reciprocal_().mul_(1.0 / math.pi)
    if settings.distribution == "logistic":
        p = _swap(d, settings)
        return (1.0 - p).mul_(p)
    if settings.distribution == "logistic_phi":
        p = _swap(d, settings)
        distance = d.abs() / settings.inverse_temperature
        size = distance + 1e-10
        steepness = size.pow(-settings.art_lambda) * (1.0 - settings.art_lambda * distance / size)
        return (1.0 - p).mul_(p).mul_(steepness)
    if settings.distribution == "gaussian":
        return (d.square() * -0.5).exp_().mul_(1.0 / math.sqrt(2.0 * math.pi))
    if settings.distribution == "reciprocal":
        return (d.abs() + 2.0).square_().reciprocal_()
    return d.abs().clamp_(min=0.25).square_().reciprocal_().mul_(0.0625)


# --- sorting networks ------------------------------------------------------------------------------------------------


class _Circuit(NamedTuple):
    """A network on the slots of a pool: the wires' first values, then each layer's smaller and larger ones.

    Nothing is overwritten on the way up, and a wire that no comparator touches needs no copy.

    lows, highs: the slots each layer reads, as a slice where they are evenly spaced, else as an index tensor.
    pairs: the number of comparators of each layer. blocks: the wires, then every layer's pairs twice.
    unread: the slots that no layer reads. outputs: the slots of rank 1, 2, ...
    """

    lows: list[slice | Tensor]
    highs: list[slice | Tensor]
    pairs: list[int]
    blocks: list[int]
    unread: Tensor
    outputs: Tensor


@lru_cache(maxsize=64)
def _circuit(method: str, wires: int, ranks: int, device: torch.device) -> _Circuit:
    """The network with its index tensors on the device."""
    slot = list(range(wires))
    unread = set(slot)
    lows: list[slice | Tensor] = []
    highs: list[slice | Tensor] = []
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


def _network_hit(
    values: Tensor, own: Tensor, shares: tuple[float, ...], settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    """Values and the target's distribution run through the layers side by side: a pool (slots, 2, rows)."""
    kept, rows = values.shape
    circuit = _circuit(settings.method, kept, len(shares), values.device)
    pool = values.new_empty((sum(circuit.blocks), 2, rows))
    pool[:kept, 0] = (values * settings.inverse_temperature).clamp_(min=_lowest(values.dtype))
    pool[:kept, 1].zero_().scatter_(0, own[None], 1.0)
    differences = values.new_empty((sum(circuit.pairs), 2, rows))
    blocks = pool.split_with_sizes(circuit.blocks)
    of_layer = differences.split_with_sizes(circuit.pairs)
    of_values = differences[:, :1].split_with_sizes(circuit.pairs)
    stay = []
    for i, (low_places, high_places) in enumerate(zip(circuit.lows, circuit.highs, strict=True)):
        low, high = _read(pool, low_places), _read(pool, high_places)
        torch.sub(high, low, out=of_layer[i])
        probability = _swap(of_values[i], settings)
        torch.lerp(high, low, probability, out=blocks[2 * i + 1])
        torch.lerp(low, high, probability, out=blocks[2 * i + 2])
        stay.append(probability)
    share = torch.tensor(shares, dtype=values.dtype, device=values.device)
    hit = share @ pool[:, 1].index_select(0, circuit.outputs)
    if not settings.slopes:
        return hit, None
    return hit, _network_slopes(circuit, pool, differences, stay, share, settings)


def _network_slopes(
    circuit: _Circuit, pool: Tensor, differences: Tensor, stay: list[Tensor], share: Tensor, settings: _Settings
) -> Tensor:
    """The layers backwards. A comparator's 2 x 2 matrix is symmetric, so slopes pass through it as values do.

    Besides, p itself moves with the two values: d hit / d p = sum over values and distribution of
    (slope of the larger - slope of the smaller) * (high - low).

    The slopes are written over the pool: its values are needed no more, and fresh memory is slow to touch.
    """
    pool.index_fill_(0, circuit.unread, 0.0)
    pool.select(1, 1).index_copy_(0, circuit.outputs, share[:, None].expand(-1, pool.shape[2]))
    blocks = pool.split_with_sizes(circuit.blocks)
    density = _density(differences[:, 0], settings).split_with_sizes(circuit.pairs)
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
    return pool[: circuit.blocks[0], 0] * settings.inverse_temperature


def _network_cost(kept: int, ranks: int, settings: _Settings) -> int:
    return 2 * kept + 9 * sum(len(layer) for layer in network(settings.method, kept, ranks))


# --- NeuralSort and SoftSort -----------------------------------------------------------------------------------------
#
# Rank r has a softmax over the kept classes; q_r is its value at the target. Impossible classes are left out, and the
# ranks that only they could take count nothing. The q_r of all ranks need not sum to 1.


def _neuralsort_hit(
    values: Tensor, own: Tensor, shares: tuple[float, ...], settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    """Logits beta ((n + 1 - 2 r) v_j - sum_l |v_j - v_l|) of Grover et al. (2019), n the number of possible classes."""
    beta = settings.inverse_temperature
    possible = values > -torch.inf
    count = possible.sum(0)
    absent = values.shape[0] - count
    values = torch.where(possible, values, 0.0)
    distance = _distances(values) - absent * values.abs()  # the absent ones stand at 0 and must not be counted
    hits, bends, pulls = [], [], []
    for _, ranks, share in _rank_blocks(shares, values):
        factor = (count + 1 - 2 * ranks).to(values.dtype)[:, None]
        logits = ((factor * values - distance) * beta).masked_fill(~possible, _lowest(values.dtype))
        softmax = logits.softmax(1)
        reached = _at_target(softmax, own) * torch.where(ranks <= count, share, 0.0)
        hits.append(reached.sum(0))
        if settings.slopes:
            bend = _softmax_slopes(softmax, own, reached)
            bends.append(bend.sum(0))
            pulls.append(bend.mul_(factor).sum(0))
    hit = sum(hits[1:], hits[0])
    if not settings.slopes:
        return hit, None
    bend = sum(bends[1:], bends[0])
    turn = _distance_slopes(values, bend) - absent * bend * values.sign()
    return hit, (sum(pulls[1:], pulls[0]) - turn) * beta


def _softsort_hit(
    values: Tensor, own: Tensor, shares: tuple[float, ...], settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    """Logits -beta |v_[r] - v_j| of Prillo and Eisenschlos (2020); among ties the earlier wire has the better rank."""
    beta = settings.inverse_temperature
    possible = values > -torch.inf
    count = possible.sum(0)
    order = values.argsort(dim=0, descending=True, stable=True)
    values = torch.where(possible, values, 0.0)
    hits = []
    slopes = torch.zeros_like(values) if settings.slopes else None
    for block, ranks, share in _rank_blocks(shares, values):
        gap = values - values.gather(0, order[block])[:, None]
        softmax = (gap.abs() * -beta).masked_fill(~possible, _lowest(values.dtype)).softmax(1)
        reached = _at_target(softmax, own) * torch.where(ranks <= count, share, 0.0)
        hits.append(reached.sum(0))
        if slopes is not None:
            bend = _softmax_slopes(softmax, own, reached).mul_(gap.sign())
            slopes.sub_(bend.sum(0)).scatter_add_(0, order[block], bend.sum(1))
    return sum(hits[1:], hits[0]), None if slopes is None else slopes.mul_(beta)


def _rank_blocks(shares: tuple[float, ...], values: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """So many ranks at a time that (ranks, kept, rows) stays small: where they are, the ranks and their shares."""
    ranks = torch.arange(1, len(shares) + 1, device=values.device)[:, None]
    share = torch.tensor(shares, dtype=values.dtype, device=values.device)[:, None]
    for block in row_chunks(len(shares), values.numel(), _BUDGET):
        yield block, ranks[block], share[block]


def _at_target(softmax: Tensor, own: Tensor) -> Tensor:
    """(ranks, rows) from (ranks, kept, rows)."""
    return softmax.gather(1, own.expand(softmax.shape[0], 1, -1))[:, 0]


def _softmax_slopes(softmax: Tensor, own: Tensor, reached: Tensor) -> Tensor:
    """share_r d q_r / d logits (ranks, kept, rows), from reached = share_r q_r."""
    bend = softmax * -reached[:, None]
    return bend.scatter_add_(1, own.expand(softmax.shape[0], 1, -1), reached[:, None])


def _distances(values: Tensor) -> Tensor:
    """sum over l of |v_j - v_l| (kept, rows), a block of classes at a time."""
    blocks = row_chunks(values.shape[0], values.numel(), _BUDGET)
    return torch.cat([(values[block, None] - values).abs().sum(1) for block in blocks])


def _distance_slopes(values: Tensor, bend: Tensor) -> Tensor:
    """The gradient of sum_j bend_j sum_l |v_j - v_l|; a tie has slope 0."""
    blocks = row_chunks(values.shape[0], values.numel(), _BUDGET)
    return torch.cat([(values[block, None] - values).sign_().mul_(bend[block, None] + bend).sum(1) for block in blocks])


def _soft_cost(kept: int, ranks: int, settings: _Settings) -> int:
    """These two count their memory themselves, by blocks of ranks and classes."""
    return 1


# --- Sinkhorn --------------------------------------------------------------------------------------------------------
#
# T = kept times the plan, T_jr = exp(f_j + g_r + M_jr), M = 2 beta v_j a_r with anchors a from 1 (rank 1) to 0: the
# squares of v and a in the cost are absorbed by the potentials f and g. All rows of T sum to 1, and all columns.
#
# The gradient differentiates these sums implicitly, at the price of one (kept x kept) solve a row. Differentiating the
# iterations would keep every one of them, and near convergence it computes the same by a slower series.


def _sinkhorn_hit(
    values: Tensor, own: Tensor, shares: tuple[float, ...], settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    """hit = sum_r share_r T_yr, and its slopes by the implicit function theorem."""
    exponent = _exponents(values, settings)
    plan = _plan(exponent, *_potentials(exponent, settings))
    mass = _own_mass(plan, own, shares)
    if not settings.slopes:
        return mass.sum(1), None
    pull = torch.zeros_like(mass).scatter_(1, own[:, None], mass.sum(1, keepdim=True))
    column_pull = _solve(plan, mass - _apply(plan.mT, pull))
    row_pull = pull - _apply(plan, column_pull)
    bend = plan.mul_(row_pull[:, :, None] + column_pull[:, None]).neg_()
    bend.scatter_add_(1, own[:, None, None].expand(-1, 1, bend.shape[2]), mass[:, None])
    return mass.sum(1), _apply(bend, _anchors(values)).mul_(2.0 * settings.inverse_temperature).T


def _anchors(values: Tensor) -> Tensor:
    return torch.linspace(1.0, 0.0, values.shape[0], dtype=values.dtype, device=values.device)


def _exponents(values: Tensor, settings: _Settings) -> Tensor:
    """M (rows, kept, ranks). Impossible classes share the last ranks among themselves and take no other."""
    possible = (values > -torch.inf).T
    best = values.detach().amax(0).nan_to_num(neginf=0.0)
    centred = torch.where(possible, values.T - best[:, None], 0.0)
    exponent = centred[:, :, None] * (_anchors(values) * (2.0 * settings.inverse_temperature))
    ranks = torch.arange(1, values.shape[0] + 1, device=values.device)
    reachable = ranks <= possible.sum(1, keepdim=True)
    return torch.where(possible[:, :, None] == reachable[:, None], exponent, -torch.inf)


def _potentials(exponent: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """f and g (rows, kept) by Sinkhorn's iterations; on the CPU they stop, or warn, by the tolerance."""
    row = torch.zeros_like(exponent[:, :, 0])
    column = -exponent.logsumexp(1)
    excess = torch.inf
    for _ in range(settings.iterations):
        row = -(exponent + column[:, None]).logsumexp(2)
        update = -(exponent + row[:, :, None]).logsumexp(1)
        if exponent.is_cpu:
            excess = float((column - update).expm1().abs().amax())
            if excess <= settings.tolerance:
                return row, column
        column = update
    row = -(exponent + column[:, None]).logsumexp(2)
    if exponent.is_cpu:
        warnings.warn(
            f"sinkhorn: after {settings.iterations} iterations the marginals are still off by {excess:.2g}, more than "
            f"tolerance={settings.tolerance:g}; allow more iterations or lower inverse_temperature",
            RuntimeWarning,
            stacklevel=2,
        )
    return row, column


def _plan(exponent: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return (exponent + row[:, :, None] + column[:, None]).exp()


def _own_mass(plan: Tensor, own: Tensor, shares: tuple[float, ...]) -> Tensor:
    """share_r T_yr (rows, kept)."""
    mine = plan.gather(1, own[:, None, None].expand(-1, 1, plan.shape[2]))[:, 0]
    return mine * torch.tensor([*shares, *[0.0] * (plan.shape[2] - len(shares))], dtype=plan.dtype, device=plan.device)


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]


def _solve(plan: Tensor, right: Tensor) -> Tensor:
    """The columns' part of the linear system of the marginals, the rows eliminated; g is free up to a constant."""
    scaled = plan / plan.sum(2, keepdim=True)
    system = torch.diag_embed(plan.sum(1) + _RIDGE) - plan.mT @ scaled
    solution: Tensor = torch.linalg.solve(system, right)
    return solution


def _newton_step(exponent: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """One Newton step on the marginals. From the solution, two of them are differentiable twice, and right."""
    plan = _plan(exponent, row, column)
    sums = plan.sum(2)
    row_excess = (sums - 1.0) / sums
    column = column + (step := _solve(plan, _apply(plan.mT, row_excess) - (plan.sum(1) - 1.0)))
    return row - row_excess - _apply(plan, step) / sums, column


def _sinkhorn_cost(kept: int, ranks: int, settings: _Settings) -> int:
    return 5 * kept * kept


_HITS: dict[str, tuple[_Hit, Callable[[int, int, _Settings], int]]] = {
    **dict.fromkeys(NETWORKS, (_network_hit, _network_cost)),
    "neuralsort": (_neuralsort_hit, _soft_cost),
    "softsort": (_softsort_hit, _soft_cost),
    "sinkhorn": (_sinkhorn_hit, _sinkhorn_cost),
}


# --- the same number once more, for second derivatives ---------------------------------------------------------------


def formula(scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """The loss a row, out of operations that torch differentiates twice; the selection is a constant."""
    settings = _Settings(*options)._replace(slopes=False)
    index = saved[0]
    selected = settings.kept < scores.shape[1]
    kept = scores.gather(1, index) if selected else scores
    own = torch.zeros_like(target) if selected else target
    values = kept.T.to(wide_type(scores))
    values = torch.where(values.isfinite(), values, -torch.inf)
    return _loss_of_kept(values, own, scores, settings, _differentiable_hit)[0].to(scores.dtype)


def _differentiable_hit(
    values: Tensor, own: Tensor, shares: tuple[float, ...], settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    if not shares:
        return values.new_zeros(values.shape[1]), None
    if settings.method == "sinkhorn":
        exponent = _exponents(values, settings)
        row, column = _potentials(exponent.detach(), settings)
        for _ in range(2):
            row, column = _newton_step(exponent, row, column)
        return _own_mass(_plan(exponent, row, column), own, shares).sum(1), None
    if settings.method not in NETWORKS:
        return _HITS[settings.method][0](values, own, shares, settings)
    wires = torch.arange(values.shape[0], device=values.device)[:, None]
    steep = (values * settings.inverse_temperature).clamp(min=_lowest(values.dtype))
    state = torch.stack((steep, (wires == own).to(values.dtype)), 1)
    for layer in network(settings.method, values.shape[0], len(shares)):
        places = torch.tensor(layer, device=values.device).T
        low, high = state[places[0]], state[places[1]]
        stay = _swap(high[:, :1] - low[:, :1], settings)
        both = torch.cat((torch.lerp(high, low, stay), torch.lerp(low, high, stay)))
        state = state.index_copy(0, places.flatten(), both)
    return values.new_tensor(shares) @ state[:, 1].flip(0)[: len(shares)], None


DIFFERENTIABLE = Room(
    name="differentiable",
    options=OPTIONS,
    extras=(),
    saved=_saved,
    forward=forward,
    backward=backward,
    formula=formula,
)
