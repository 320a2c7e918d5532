"""The differentiable top-k cross-entropy in Triton: scores are read once to keep m of them, the rest is a few numbers.

Three kernels. The first reads the rows, keeps the target and the m - 1 largest others, and if the loss wants it the
log-sum-exp of all. The second sorts the kept scores softly and computes the loss with its slopes: of a network a row's
m values and the target's m probabilities pass from layer to layer in registers, a wire a lane, partners changing places
by `tl.gather`; what every comparator saw stays in registers too, for the sweep back. The third, backward, writes zeros
(or the softmax of all classes) and the m slopes over them.

Everything is float32, so that rounding must not touch what the loss is the logarithm of: a comparator's two
probabilities are computed apart, the smaller one from the tail of its distribution, and the target's small numbers are
sums of products of positive ones. Sinkhorn's iterations, and networks too large for registers, run on the torch
path, on the m scores that the first kernel kept.

Bytes a row, with n classes of s bytes and m kept: forward reads n s, writes and reads 4 m twice and writes 4 m + 16;
backward reads 8 m + 12 a tile (n s more with cross-entropy over all classes), and writes n s.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import (
    Saved,
    SavedShape,
    aligned,
    best_of,
    finite_or_zero,
    lane,
    order_of,
    reciprocal,
    row_pointers,
    row_states,
    scan,
    score_of,
)
from topk.kernels.patched import patched_exponentials
from topk.losses.common import row_dtype
from topk.losses.differentiable import NETWORKS, Options, hit_and_slopes, over_all, split_weights
from topk.losses.networks import network

_WIDEST_NETWORK = 32  # wires
_MOST_LAYERS = 16  # the compiler takes its time for more: a minute for 32
_TILE = 128  # numbers in a program of the second kernel
_LOWEST = tl.constexpr(-1e20)  # what -inf plays as


def saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    """The kept classes (none if all are), the slopes in them if wanted, and (log-sum-exp, weight, 0) of all classes."""
    selected = options.kept if options.kept < classes else 0
    slopes = options.kept if options.slopes else 0
    return ((rows, selected), torch.int32), ((rows, slopes), None), ((rows, 3), None)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, options: Options, ignore_index: int) -> tuple[Tensor, ...]:
    """loss (rows,) and what `saved` names."""
    rows, classes = scores.shape
    places, slopes, field = common.allocate(scores, saved(rows, classes, options))
    target = target.contiguous()
    values = scores
    if options.kept < classes:
        values = scores.new_empty((rows, options.kept), dtype=torch.float32)
        _select(scores, target, options, ignore_index, values, places, field)
    loss = scores.new_empty(rows, dtype=torch.float32)
    _sort(values, target, options, ignore_index, classes, loss, slopes, field)
    return loss, places, slopes, field


def _select(
    scores: Tensor, target: Tensor, options: Options, ignore_index: int, values: Tensor, places: Tensor, field: Tensor
) -> None:
    """Fills the kept scores and their classes (rows, m), and where it counts the first column of `field`."""
    rows, classes = scores.shape
    tiling = common.whole_rows(classes)
    common.launch(
        _selected, tiling.programs(rows),
        scores, target, values, places, field,
        rows, classes, *scores.stride(), ignore_index,
        KEPT=options.kept, COUNT=max(1, options.kept - 1), OVER_ALL=over_all(options, classes),
        **common.whole_row_constants(tiling, scores, options.kept),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _selected(
    scores_ptr, target_ptr, values_ptr, places_ptr, field_ptr,
    rows, classes, row_stride, class_stride, ignore_index,
    KEPT: tl.constexpr, COUNT: tl.constexpr, OVER_ALL: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STREAMS: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    classes = aligned(classes, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target, used, _ = row_states(target_ptr, row, rows, classes, ignore_index)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    mine = tl.load(starts + target.to(tl.int64) * class_stride, mask=used, other=float("-inf")).to(tl.float32)
    found, places, rest, _, _ = scan(
        starts, class_stride, classes, used, target, None, ROWS, BLOCK, COUNT, LANES, ALIGN, GROUPS, STREAMS, OVER_ALL
    )
    lanes = tl.arange(0, LANES)[None, :]
    at = row.to(tl.int64)[:, None] * KEPT + lanes + 1
    others = inside[:, None] & (lanes < KEPT - 1)
    tl.store(values_ptr + at, found, mask=others)
    tl.store(places_ptr + at, places, mask=others)
    tl.store(values_ptr + row.to(tl.int64) * KEPT, mine, mask=inside)
    tl.store(places_ptr + row.to(tl.int64) * KEPT, target, mask=inside)
    if OVER_ALL:
        least = finite_or_zero(lane(found, lanes, COUNT - 1))
        top = finite_or_zero(tl.maximum(lane(found, lanes, 0), mine))
        kept = tl.where(lanes < COUNT, tl.exp(found - top[:, None]), 0.0)
        total = tl.sum(kept, 1) + rest * tl.exp(least - top) + tl.exp(mine - top)
        tl.store(field_ptr + row.to(tl.int64) * 3, tl.where(total > 0.0, top + tl.log(total), 0.0), mask=inside)


# --- the kept scores, sorted softly ----------------------------------------------------------------------------------


def _sort(
    values: Tensor, target: Tensor, options: Options, ignore_index: int, classes: int,
    loss: Tensor, slopes: Tensor, field: Tensor,
) -> None:  # fmt: skip
    """Fills the losses, their slopes in the values (rows, m), and what is left of `field`."""
    rows, kept = values.shape
    parts = split_weights(options, classes)
    method, layers, table = _how(options, parts.shares, values.device)
    hit, pulls = loss, slopes
    if method == "given":
        hit, pulls = _hit_of_torch(values, target, options, ignore_index, classes, parts.shares)
    lanes = common.lanes(kept)
    together = max(1, _TILE // lanes)
    common.launch(
        _sorted, triton.cdiv(rows, together),
        values, target, table, hit, pulls, loss, slopes, field,
        rows, classes, *values.stride(), ignore_index, float(options.inverse_temperature), float(options.art_lambda),
        KEPT=kept, WIRES=lanes, ROWS=together, SELECTED=kept < classes, METHOD=method,
        DISTRIBUTION=options.distribution, SHARES=parts.shares, LAYERS=layers, MEMORY=common.lanes(layers),
        FIRST=float(parts.first), REST=float(parts.rest), SURE=float(parts.sure), TOP1=options.top1,
        OVER_ALL=over_all(options, classes), SLOPES=options.slopes, warps=max(1, min(4, together * lanes // 32)),
    )  # fmt: skip


def _how(options: Options, shares: tuple[float, ...], device: torch.device) -> tuple[str, int, Tensor | None]:
    """The kernel's way to the hit, and a network's number of layers and table of partners (layers, wires)."""
    if not shares:
        return "none", 0, None
    if options.method in ("neuralsort", "softsort"):
        return options.method, 0, None
    if options.method in NETWORKS and options.kept <= _WIDEST_NETWORK:
        table = _partners(options.method, options.kept, len(shares), device)
        if table.shape[0] <= _MOST_LAYERS:
            return "network", table.shape[0], table
    return "given", 0, None


@lru_cache(maxsize=64)
def _partners(method: str, wires: int, ranks: int, device: torch.device) -> Tensor:
    """By layer and wire (wires rounded up to a power of two): the wire it is compared with, or itself."""
    layers = []
    for layer in network(method, wires, ranks):
        partner = list(range(common.lanes(wires)))
        for a, b in layer:
            partner[a], partner[b] = b, a
        layers.append(partner)
    with torch.inference_mode(False):  # what is cached must serve every mode
        return torch.tensor(layers, dtype=torch.int32, device=device).view(-1, common.lanes(wires))


def _hit_of_torch(
    values: Tensor, target: Tensor, options: Options, ignore_index: int, classes: int, shares: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """The hit (rows,) and its slopes (rows, m) by the torch path."""
    used = (target >= 0) & (target < classes) & (target != ignore_index)
    own = torch.where(used & (options.kept == classes), target, 0)
    usable = used[:, None] & (values.amax(1, keepdim=True) < torch.inf)
    wide = torch.where(usable, values, 0.0).to(row_dtype(values))
    hit, slopes = hit_and_slopes(wide, own, shares, options)
    result = hit.to(torch.float32)
    return result, result if slopes is None else slopes.to(torch.float32, memory_format=torch.contiguous_format)


@triton.jit(do_not_specialize=["rows"])
def _sorted(
    values_ptr, target_ptr, table_ptr, hit_ptr, pulls_ptr, loss_ptr, slopes_ptr, field_ptr,
    rows, classes, row_stride, wire_stride, ignore_index, beta, art_lambda,
    KEPT: tl.constexpr, WIRES: tl.constexpr, ROWS: tl.constexpr, SELECTED: tl.constexpr, METHOD: tl.constexpr,
    DISTRIBUTION: tl.constexpr, SHARES: tl.constexpr, LAYERS: tl.constexpr, MEMORY: tl.constexpr, FIRST: tl.constexpr,
    REST: tl.constexpr, SURE: tl.constexpr, TOP1: tl.constexpr, OVER_ALL: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    row = row.to(tl.int64)
    wires = tl.arange(0, WIRES)[None, :]
    there = inside[:, None] & (wires < KEPT)
    place = values_ptr + row[:, None] * row_stride + wires.to(tl.int64) * wire_stride
    raw = tl.load(place, mask=there & used[:, None], other=float("-inf")).to(tl.float32)
    bad = wrong | (tl.max(((raw < float("inf")) == 0).to(tl.int32), 1) > 0)
    raw = tl.where(raw < float("inf"), raw, float("-inf"))
    own = wires == (target * 0 if SELECTED else target)[:, None]
    mine = tl.sum(tl.where(own, raw, 0.0), 1)
    x = raw - finite_or_zero(mine)[:, None]  # what matters is close to the target

    # the hit and its slopes
    hit = tl.zeros((ROWS,), tl.float32)
    slopes = tl.zeros((ROWS, WIRES), tl.float32)
    if METHOD == "network":
        hit, slopes = _network(
            x, own, table_ptr, wires, beta, art_lambda, KEPT, WIRES, DISTRIBUTION, SHARES, LAYERS, MEMORY, SLOPES
        )
    elif METHOD == "neuralsort":
        hit, slopes = _neuralsort(x, own, wires, beta, KEPT, SHARES)
    elif METHOD == "softsort":
        hit, slopes = _softsort(x, own, wires, beta, KEPT, SHARES)
    elif METHOD == "given":
        hit = tl.load(hit_ptr + row, mask=inside, other=0.0)
        if SLOPES:
            slopes = tl.load(pulls_ptr + row[:, None] * KEPT + wires, mask=there, other=0.0)

    # the loss, and what a step of the hit or of log softmax does to it
    inner = hit + SURE
    total = tl.zeros((ROWS,), tl.float32)
    softmax = tl.zeros((ROWS, WIRES), tl.float32)
    own_log = tl.zeros((ROWS,), tl.float32)
    if FIRST > 0.0:
        if OVER_ALL:
            total = tl.load(field_ptr + row * 3, mask=inside, other=0.0) - finite_or_zero(mine)
        else:
            top = finite_or_zero(tl.max(x, 1))
            sum_ = tl.sum(tl.exp(x - top[:, None]), 1)
            total = top + tl.log(tl.where(sum_ > 0.0, sum_, 1.0))
        softmax = tl.exp(x - total[:, None])
        own_log = tl.where(mine > float("-inf"), -total, float("-inf"))
    first = FIRST * tl.exp(own_log) if FIRST > 0.0 else own_log
    if TOP1 == "softmax":
        inner += first
    inner = inner * (1.0 - 2e-7) + 1e-7
    loss = -tl.log(inner)
    of_hit = -(1.0 - 2e-7) / inner
    of_log = tl.zeros((ROWS,), tl.float32)
    if TOP1 == "softmax":
        of_log = -of_hit * first
    elif TOP1 == "cross_entropy":
        loss = REST * loss - FIRST * own_log
        of_hit *= REST
        of_log += FIRST
    loss = tl.where(mine == float("-inf"), float("inf"), loss)
    loss = tl.where(bad, float("nan"), tl.where(used, loss, 0.0))
    tl.store(loss_ptr + row, loss, mask=inside)
    if SLOPES:
        slopes = slopes * of_hit[:, None]
        if FIRST > 0.0:
            slopes += of_log[:, None] * (softmax - tl.where(own, 1.0, 0.0))
        slopes = tl.where((raw > float("-inf")) & used[:, None], slopes, 0.0)
        slopes = tl.where(bad[:, None], float("nan"), slopes)
        tl.store(slopes_ptr + row[:, None] * KEPT + wires, slopes, mask=there)
    at = field_ptr + row * 3
    weight = tl.where(bad, float("nan"), FIRST if OVER_ALL else 0.0)
    if not OVER_ALL:
        tl.store(at, tl.zeros((ROWS,), tl.float32), mask=inside)
    tl.store(at + 1, weight, mask=inside)
    tl.store(at + 2, tl.zeros((ROWS,), tl.float32), mask=inside)


# --- networks --------------------------------------------------------------------------------------------------------


@triton.jit
def _network(
    x, own, table_ptr, wires, beta, art_lambda,
    KEPT: tl.constexpr, WIRES: tl.constexpr, DISTRIBUTION: tl.constexpr, SHARES: tl.constexpr, LAYERS: tl.constexpr,
    MEMORY: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """The hit (ROWS,) and its slopes (ROWS, WIRES).

    A wire of a comparator takes p of itself and c of its partner, p + c = 1, values and distribution alike. Backwards
    their slopes mix in the same way, and p moves too: by F' times what it exchanges.
    """
    values = tl.minimum(tl.maximum(x * beta, _LOWEST), -_LOWEST)
    chances = tl.where(own, 1.0, 0.0)
    layers = tl.arange(0, MEMORY)[:, None, None]
    # Of every layer: bits, since adding zeros to integers costs the compiled program nothing.
    leads = tl.zeros((MEMORY, x.shape[0], WIRES), tl.int32)  # of the partner's value
    tails = tl.zeros((MEMORY, x.shape[0], WIRES), tl.int32)
    rises = tl.zeros((MEMORY, x.shape[0], WIRES), tl.int32)  # to the partner's chance
    for layer in tl.static_range(LAYERS):
        partner, ahead = _partner_of(table_ptr, layer, wires, x.shape[0], WIRES)
        others, others_chances = tl.gather(values, partner, 1), tl.gather(chances, partner, 1)
        lead = others - values
        apart = tl.where(ahead, lead, -lead)
        tail = _tail(tl.abs(lead), beta, art_lambda, DISTRIBUTION)
        if SLOPES:
            leads = _remembered(leads, layers, layer, lead)
            tails = _remembered(tails, layers, layer, tail)
            rises = _remembered(rises, layers, layer, others_chances - chances)
        stay, change = _swap(apart, tail)
        chances = stay * chances + change * others_chances
        values = stay * values + change * others
    share = tl.zeros((1, WIRES), tl.float32)
    for rank in tl.static_range(len(SHARES)):
        share = tl.where(wires == KEPT - 1 - rank, SHARES[rank], share)
    hit = tl.sum(share * chances, 1)

    of_values = tl.zeros((x.shape[0], WIRES), tl.float32)
    if SLOPES:
        of_chances = tl.broadcast_to(share, (x.shape[0], WIRES))
        for back in tl.static_range(LAYERS):
            lead = _recalled(leads, layers, LAYERS - 1 - back)
            partner, ahead = _partner_of(table_ptr, LAYERS - 1 - back, wires, x.shape[0], WIRES)
            apart = tl.where(ahead, lead, -lead)
            stay, change = _swap(apart, _recalled(tails, layers, LAYERS - 1 - back))
            others_values, others_chances = tl.gather(of_values, partner, 1), tl.gather(of_chances, partner, 1)
            exchanged = (others_values - of_values) * lead
            exchanged += (others_chances - of_chances) * _recalled(rises, layers, LAYERS - 1 - back)
            moved = exchanged * _density(apart, stay, change, beta, art_lambda, DISTRIBUTION)
            of_values = stay * of_values + change * others_values - tl.where(ahead, moved, -moved)
            of_chances = stay * of_chances + change * others_chances
    return hit, of_values * beta


@triton.jit
def _partner_of(table_ptr, layer: tl.constexpr, wires, ROWS: tl.constexpr, WIRES: tl.constexpr):
    """The wire that each is compared with in this layer (ROWS, WIRES), and whether that is the one for the larger."""
    partner = tl.load(table_ptr + layer * WIRES + wires)
    return tl.broadcast_to(partner, (ROWS, WIRES)), tl.broadcast_to(partner > wires, (ROWS, WIRES))


@triton.jit
def _remembered(memory, layers, layer: tl.constexpr, tile):
    return tl.where(layers == layer, tile.to(tl.int32, bitcast=True)[None], memory)


@triton.jit
def _recalled(memory, layers, layer: tl.constexpr):
    return tl.sum(tl.where(layers == layer, memory, 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def _tail(size, beta, art_lambda, DISTRIBUTION: tl.constexpr):
    """1 - F(size), size >= 0; exactly 0 against an impossible class."""
    if DISTRIBUTION == "logistic":
        odds = tl.exp(-size)
        tail = odds * reciprocal(1.0 + odds)
    elif DISTRIBUTION == "logistic_phi":
        odds = tl.exp(-size * tl.exp(-art_lambda * tl.log(size / beta + 1e-10)))
        tail = odds * reciprocal(1.0 + odds)
    elif DISTRIBUTION == "gaussian":
        tail = _normal_tail(tl.minimum(size, 30.0))
    elif DISTRIBUTION == "cauchy":
        near = tl.minimum(size, reciprocal(tl.maximum(size, 0.5)))
        angle = _arctangent_over_pi(near)
        tail = tl.where(size > 1.0, angle, 0.5 - angle)
    elif DISTRIBUTION == "reciprocal":
        tail = reciprocal(2.0 + size)
    else:
        tail = tl.where(size > 0.25, 0.0625 * reciprocal(tl.maximum(size, 0.25)), 0.5 - size)
    return tl.where(size > -0.1 * _LOWEST, 0.0, tail)


@triton.jit
def _swap(d, tail):
    """F(d) and 1 - F(d), each with all its digits, from the smaller one."""
    likely = 1.0 - tail
    return tl.where(d >= 0.0, likely, tail), tl.where(d >= 0.0, tail, likely)


@triton.jit
def _density(d, stay, change, beta, art_lambda, DISTRIBUTION: tl.constexpr):
    """F'(d), of which F and 1 - F are known."""
    size = tl.abs(d)
    if DISTRIBUTION == "logistic":
        density = stay * change
    elif DISTRIBUTION == "logistic_phi":
        distance = size / beta
        shifted = distance + 1e-10
        steepness = tl.exp(-art_lambda * tl.log(shifted)) * (1.0 - art_lambda * distance / shifted)
        density = stay * change * steepness
    elif DISTRIBUTION == "gaussian":
        near = tl.minimum(size, 30.0)
        density = tl.exp(-0.5 * near * near) * 0.3989422804014327
    elif DISTRIBUTION == "cauchy":
        near = tl.minimum(size, 1e15)
        density = 0.3183098861837907 * reciprocal(near * near + 1.0)
    elif DISTRIBUTION == "reciprocal":
        near = tl.minimum(size, 1e15) + 2.0
        density = reciprocal(near * near)
    else:
        near = tl.minimum(tl.maximum(size, 0.25), 1e15)
        density = 0.0625 * reciprocal(near * near)
    return density


@triton.jit
def _arctangent_over_pi(x):
    """atan(x) / pi on [0, 1]: x times a polynomial in x^2, relative error 1.5e-7."""
    z = x * x
    p = 0.0009071475942619145 * z - 0.0051148016937077045
    p = p * z + 0.013589129783213139
    p = p * z - 0.0238869097083807
    p = p * z + 0.03387114405632019
    p = p * z - 0.04521160572767258
    p = p * z + 0.06363848596811295
    p = p * z - 0.10610246658325195
    return (p * z + 0.31830987334251404) * x


@triton.jit
def _normal_tail(x):
    """Phi(-x), x >= 0: exp(-x^2 / 2) times a polynomial in t = 1 / (1 + 0.35 x), relative error 3e-7 near 0."""
    t = 1.0 / (1.0 + 0.35 * x)
    p = 0.1354019194841385 - 0.027503319084644318 * t
    p = p * t - 0.23645730316638947
    p = p * t + 0.13478222489356995
    p = p * t - 0.003974631428718567
    p = p * t + 0.0958961769938469
    p = p * t + 0.122915118932724
    p = p * t + 0.13925504684448242
    p = p * t + 0.13968782126903534
    p = p * t - 3.076014991165721e-06
    return tl.maximum(p, 0.0) * tl.exp(-0.5 * x * x)


# --- NeuralSort and SoftSort -----------------------------------------------------------------------------------------


@triton.jit
def _neuralsort(x, own, wires, beta, KEPT: tl.constexpr, SHARES: tl.constexpr):
    """The hit and its slopes; logits beta ((count + 1 - 2 r) v_j - sum_l |v_j - v_l|), less the target's."""
    possible = x > float("-inf")
    v = tl.where(possible, x, 0.0)
    count = tl.sum(possible.to(tl.int32), 1)
    mine = tl.sum(tl.where(own, v, 0.0), 1)[:, None]
    farther = tl.zeros(x.shape, tl.float32)  # the target's distance from all others less one's own
    for other in range(KEPT):
        at, real = _wire(v, possible, wires, other)
        farther += tl.where(real, tl.abs(mine - at) - tl.abs(v - at), 0.0)
    hit = tl.zeros((x.shape[0],), tl.float32)
    bend = tl.zeros(x.shape, tl.float32)
    pull = tl.zeros(x.shape, tl.float32)
    for r in tl.static_range(len(SHARES)):
        factor = (count - 1 - 2 * r).to(tl.float32)[:, None]
        logits = tl.where(possible, (factor * (v - mine) + farther) * beta, float("-inf"))
        softmax, reached = _softmax(logits, own)
        reached = tl.where(r < count, SHARES[r] * reached, 0.0)
        hit += reached
        step = reached[:, None] * (tl.where(own, 1.0, 0.0) - softmax)
        bend += step
        pull += step * factor
    turn = tl.zeros(x.shape, tl.float32)
    for other in range(KEPT):
        at, real = _wire(v, possible, wires, other)
        sign = tl.where(v > at, 1.0, tl.where(v < at, -1.0, 0.0))
        turn += tl.where(real, sign * (bend + tl.sum(tl.where(wires == other, bend, 0.0), 1)[:, None]), 0.0)
    return hit, (pull - turn) * beta


@triton.jit
def _softsort(x, own, wires, beta, KEPT: tl.constexpr, SHARES: tl.constexpr):
    """The hit and its slopes; logits -beta |v_[r] - v_j|; among ties the earlier wire has the better rank."""
    possible = x > float("-inf")
    v = tl.where(possible, x, 0.0)
    count = tl.sum(possible.to(tl.int32), 1)
    orders = order_of(x)
    hit = tl.zeros((x.shape[0],), tl.float32)
    slopes = tl.zeros(x.shape, tl.float32)
    for r in tl.static_range(len(SHARES)):
        order, found = best_of(orders, tl.broadcast_to(wires, x.shape))
        orders = tl.where(wires == found[:, None], -(2**31), orders)
        gap = v - finite_or_zero(score_of(order))[:, None]
        softmax, reached = _softmax(tl.where(possible, -beta * tl.abs(gap), float("-inf")), own)
        reached = tl.where(r < count, SHARES[r] * reached, 0.0)
        hit += reached
        sign = tl.where(gap > 0.0, 1.0, tl.where(gap < 0.0, -1.0, 0.0))
        step = reached[:, None] * (tl.where(own, 1.0, 0.0) - softmax) * sign
        slopes += tl.where(wires == found[:, None], tl.sum(step, 1)[:, None], 0.0) - step
    return hit, slopes * beta


@triton.jit
def _softmax(logits, own):
    """The softmax of each row, and its value at the target; all 0 where nothing is possible."""
    top = finite_or_zero(tl.max(logits, 1))
    powers = tl.exp(logits - top[:, None])
    total = tl.sum(powers, 1)
    softmax = powers / tl.where(total > 0.0, total, 1.0)[:, None]
    return softmax, tl.sum(tl.where(own, softmax, 0.0), 1)


@triton.jit
def _wire(v, possible, wires, other):
    """The value on one wire (ROWS, 1), and whether that class is possible."""
    here = wires == other
    return tl.sum(tl.where(here, v, 0.0), 1)[:, None], (tl.sum((here & possible).to(tl.int32), 1) > 0)[:, None]


# --- backward --------------------------------------------------------------------------------------------------------


def backward(grad: Tensor, scores: Tensor, target: Tensor, options: Options, ignore_index: int, saved: Saved) -> Tensor:
    """grad * d loss / d scores: the saved slopes, written over zeros or over the softmax of all classes."""
    places, slopes, field = saved
    if not options.slopes:
        _, places, slopes, field = forward(scores, target, options._replace(slopes=True), ignore_index)
    rows, classes = scores.shape
    if options.kept == classes:
        places = torch.arange(classes, dtype=torch.int32, device=scores.device).repeat(rows, 1)
    reads = over_all(options, classes)
    return patched_exponentials(grad, scores, target, ignore_index, (places, slopes, field), reads=reads)


def examples(rows: int, classes: int, device: torch.device) -> list[tuple[Saved, Options]]:
    """Calls that reach every path: every method, distribution and treatment of k = 1."""
    m, few, k = min(16, classes), min(6, classes), min(5, classes - 1)
    one = Options([k], [1.0], kept=m, iterations=50, slopes=True)
    several = one._replace(ks=[1, k], weights=[0.25, 0.75]) if k > 1 else one
    calls = [
        several,
        several._replace(
            method="bitonic",
            distribution="logistic_phi",
            inverse_temperature=0.5,
            art_lambda=0.5,
            top1="cross_entropy",
            cross_entropy_over="all",
        ),
        one._replace(method="splitter_selection", distribution="gaussian", top1="sort"),
        one._replace(distribution="logistic", kept=few, top1="sort"),
        one._replace(method="bitonic", distribution="reciprocal", kept=few, top1="sort"),
        one._replace(distribution="optimal", kept=few, top1="sort"),
        several._replace(method="neuralsort", inverse_temperature=0.5),
        several._replace(method="softsort", inverse_temperature=0.5, top1="cross_entropy"),
    ]
    return [((), options) for options in calls]
