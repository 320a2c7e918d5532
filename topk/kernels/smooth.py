"""The smooth top-k SVM in Triton: rho of `topk.losses.smooth` at a cost that hardly depends on k.

k <= 6: as in the torch room, the k largest wrong scores multiplied into the polynomial that Newton's identities make of
k power sums of the others; the sums in float32, a few dozen numbers a row in float64. Backward is a polynomial of
degree k in w <= 1; the fewer than k larger scores are recognised by their value and get theirs.

Larger k: from a few nodes on a circle, all of it in float32. With P_i the tilted probabilities of the wrong classes, S
the number of successes and sum P within 1/4 of k - 1/2,

    Pr[S = j] = 1/M sum over m of phi(2 pi m / M) exp(-2 pi i j m / M),    phi(t) = prod (1 + P_i (e^{it} - 1)),

but for the chances of j + M, j - M, ..., which are below float32 once M is some 6 standard deviations. The same
deviation bounds |phi(t)| by exp(-var (1 - cos t)), so of a large M few nodes matter: 8 at k = 50, 6 at k = 1000. A node
costs a product over the classes, in any order. Success and failure are treated alike: with q = min(P, 1 - P), every
class with P > 1/2 contributes e^{it} (counted, exact) times its own factor 1 + q (e^{-it} - 1), and products are kept
as what they differ from 1 by. No selection is needed: a score near the k-th is found by bisection.

The slopes d rho / d u are a smooth function of P. Where var >= 8 they are q (1 - q) times a Chebyshev series in
2 P - 1, whose coefficients fall as tan(t / 4)^d: 12 terms at most, 7 at k = 50. Where var < 8, Pr[S = j] itself dies
out after some 6 sqrt(var) + 5 terms, and leaving a class out of the polynomial gives the series

    w (r_0 - r_1 w + r_2 w^2 - ...),   r_j = f_{k-1-j} / f_k - f_{k-2-j} / f_{k-1},   f_j = Pr[S = j],

for w = P / (1 - P) <= 1, and its mirror image in 1 / w for the others.

A row longer than a tile is sifted: one read leaves its 2 k largest scores in a tile, and of all others power sums,
relative to a limit that none of them exceeds. The sums of the first k powers are all that k <= 6 asks of them. For a
larger k four powers give the mean of S to 0.2 % of what the others contribute, since all of those have P < 1/2; that is
a tilt as good as any, and only the nodes read the row a second time.

Several k share every read. Bytes moved a row, with n classes of s bytes: forward reads n s (a streamed row once more
where a k > 6 is among them; those of a k > 1024, which no tile can be sifted for, some four times) and writes
4 (3 k + 1), for a larger k 204; backward reads n s, a tile reads what forward wrote, and writes n s.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import (
    Options,
    Saved,
    SavedShape,
    aligned,
    as_float,
    finite_or_zero,
    lane,
    load_tile,
    row_pointers,
    row_states,
    scan,
    scores_of,
    softplus,
    store_tile,
    tile_of_program,
)

_TERMS = tl.constexpr(24)  # of a series, on either side of P = 1/2
_SPREAD = tl.constexpr(8.0)  # the variance of S from which on one Chebyshev series serves both sides
_NODES = tl.constexpr(32)  # at most 23 are in use, the one at 0 included
_FEW = tl.constexpr(6)  # the largest k that is done by power sums; above, Newton's identities cancel too much
_LONGEST_SIFTED = 8192  # scores in the tile that a row is sifted into


def saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    """For every k a record, and last y's own slope.

    Up to `_FEW`: the k-th wrong score, k coefficients, the k largest wrong scores and their slopes. Larger: a score
    close to the k-th, the shift of the log-odds, the number of terms and two series.
    """
    width = sum(1 + 3 * k if k <= _FEW.value else 3 + 2 * _TERMS.value for k in options[0])
    return (((rows, width + 1), None),)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, extras: Saved, ignore_index: int, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,) and what `saved` names."""
    ks, weights, tau, margin = options
    rows, classes = scores.shape
    (table,) = common.allocate(scores, saved(rows, classes, options))
    if not ks:
        return common.no_loss(target, classes, ignore_index), table.zero_()
    loss = scores.new_empty(rows, dtype=torch.float32)
    tiling = _smaller(common.whole_rows(classes), scores, max(ks))
    common.launch(
        _forward,
        tiling.programs(rows),
        scores,
        target.contiguous(),
        loss,
        table,
        rows,
        classes,
        *scores.stride(),
        ignore_index,
        float(tau),
        float(margin),
        COUNT=len(ks),
        KS=common.packed(ks),
        WEIGHTS=common.packed(weights),
        HEAD=max((k for k in ks if k <= _FEW.value), default=0),
        MANY=max(ks) > _FEW.value,
        KEEP=_kept(max(ks)) if _sifts(tiling, max(ks)) else 0,
        LANES=8 * triton.next_power_of_2(len(ks)),
        ROWS=tiling.rows,
        BLOCK=tiling.block,
        STREAMS=tiling.streams,
        ALIGN=common.alignment(scores),
        warps=tiling.warps,
    )
    return loss, table


def _smaller(tiling: common.Tiling, scores: Tensor, k: int) -> common.Tiling:
    """Fewer rows a program, since each has a tile of nodes too, and more classes a thread, since reductions cost most.

    In a stream, tiles for which the compiler spills no register, 16 scores a thread or 8; and longer ones for a k so
    large that a row could not be sifted into those.
    """
    if tiling.streams:
        together = common.alignment(scores)
        share = 2 if together > 1 else 1 if k > _FEW.value else 4
        a_thread = 8 if together == 8 or share == 4 else 16
        block = max(16, tiling.block // share)
        wanted = triton.next_power_of_2(4 * _kept(k))
        block = wanted if block < wanted <= _LONGEST_SIFTED else block
        return replace(tiling, block=block, warps=min(16, max(1, block // (32 * a_thread))))
    rows = max(1, min(tiling.rows, 128 // tiling.block, 4))
    return replace(tiling, rows=rows, warps=max(1, rows * tiling.block // 1024))


def _kept(k: int) -> int:
    """How many of the largest scores a sifted row keeps: twice as many as can all have P > 1/2."""
    return 2 * k


def _sifts(tiling: common.Tiling, k: int) -> bool:
    """Whether one read of a row leaves its largest scores in a tile; else the row is read for every question asked."""
    return tiling.streams and 4 * _kept(k) <= tiling.block


@triton.jit
def _forward(
    scores_ptr,
    target_ptr,
    loss_ptr,
    table_ptr,
    rows,
    classes,
    row_stride,
    class_stride,
    ignore_index,
    tau,
    margin,
    COUNT: tl.constexpr,
    KS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HEAD: tl.constexpr,
    MANY: tl.constexpr,
    KEEP: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    classes = aligned(classes, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    mine = tl.load(starts + target.to(tl.int64) * class_stride, mask=used, other=0.0).to(tl.float32)
    reads_again: tl.constexpr = STREAMS and KEEP == 0
    limit = None
    sums = None
    if KEEP > 0:
        x, limit, sums, others = _sift(
            starts, class_stride, classes, used, target, tau, COUNT, KS, MANY, KEEP, LANES, ROWS, BLOCK
        )
    else:
        x = _wrong_scores(starts, 0, class_stride, classes, used, target, BLOCK)
    if HEAD > 0:
        head = _head(x, starts, class_stride, classes, used, target, HEAD, ROWS, BLOCK, reads_again)
        top = lane(head, tl.arange(0, 8)[None, :], 0)
    if MANY:
        top, bottom, possible = _extremes(x, starts, class_stride, classes, used, target, ROWS, BLOCK, reads_again)
        if KEEP > 0:
            possible += others
    bad = wrong | ((top < float("inf")) == 0) | ((mine < float("inf")) == 0)

    if MANY:
        centers, shifts, variances = _tilts(
            x,
            starts,
            class_stride,
            classes,
            used,
            target,
            top,
            bottom,
            possible,
            limit,
            sums,
            bad,
            tau,
            COUNT,
            KS,
            LANES,
            ROWS,
            BLOCK,
            reads_again,
        )
        real, imag, heads = _nodes(
            x,
            starts,
            class_stride,
            classes,
            used,
            target,
            centers,
            shifts,
            variances,
            tau,
            COUNT,
            KS,
            LANES // 8,
            ROWS,
            BLOCK,
            STREAMS,
        )
    loss = tl.zeros((ROWS,), tl.float32)
    pull = tl.zeros((ROWS,), tl.float32)
    record = table_ptr + row.to(tl.int64) * _width(COUNT, KS)
    for i in tl.static_range(COUNT):
        if ((KS >> 32 * i) & 0xFFFFFFFF) <= _FEW:
            rest = None
            if KEEP > 0:
                rest = _part(sums, i, LANES // 8, 8, ROWS)
            term, slope = _small_k(
                x,
                starts,
                class_stride,
                classes,
                used,
                target,
                mine,
                head,
                limit,
                rest,
                bad,
                inside,
                record,
                as_float((WEIGHTS >> 32 * i) & 0xFFFFFFFF),
                tau,
                margin,
                (KS >> 32 * i) & 0xFFFFFFFF,
                ROWS,
                BLOCK,
                reads_again,
            )
            record += 1 + 3 * ((KS >> 32 * i) & 0xFFFFFFFF)
        else:
            places = tl.arange(0, LANES // 8)[None, :]
            term, slope = _large_k(
                _part(real, i, LANES // 8, _NODES, ROWS) + 1.0,
                _part(imag, i, LANES // 8, _NODES, ROWS),
                lane(heads, places, i),
                lane(centers, places, i),
                lane(shifts, places, i),
                lane(variances, places, i),
                used,
                possible,
                mine,
                bad,
                inside,
                record,
                as_float((WEIGHTS >> 32 * i) & 0xFFFFFFFF),
                tau,
                margin,
                (KS >> 32 * i) & 0xFFFFFFFF,
                ROWS,
            )
            record += 3 + 2 * _TERMS
        loss += term
        pull -= slope
    tl.store(loss_ptr + row, tl.where(bad, float("nan"), tl.where(used, loss, 0.0)), mask=inside)
    pull = tl.where(mine == float("-inf"), 0.0, pull)
    tl.store(record, tl.where(bad, float("nan"), pull), mask=inside)


@triton.jit
def _width(COUNT: tl.constexpr, KS: tl.constexpr):
    """The numbers a row that are saved."""
    total = 1
    for i in tl.static_range(COUNT):
        if ((KS >> 32 * i) & 0xFFFFFFFF) <= _FEW:
            total += 1 + 3 * ((KS >> 32 * i) & 0xFFFFFFFF)
        else:
            total += 3 + 2 * _TERMS
    return total


@triton.jit
def _outcome(gap, absent, live, bad, mine, weight, tau, K: tl.constexpr):
    """The weighted loss, minus its derivative by x_y, and the latter with NaN for bad rows."""
    term = tl.where(absent, 0.0, weight * tau * softplus(tl.where(absent, 0.0, gap)))
    term = tl.where(mine == float("-inf"), float("inf"), term)
    slope = tl.where(live, weight / K / (1.0 + tl.exp(-gap)), 0.0)
    return term, slope, tl.where(bad, float("nan"), slope)


# --- a row that streams, sifted -------------------------------------------------------------------------------------


@triton.jit
def _sift(
    starts,
    class_stride,
    classes,
    used,
    target,
    tau,
    COUNT: tl.constexpr,
    KS: tl.constexpr,
    MANY: tl.constexpr,
    KEEP: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of a row that streams: a tile of scores that holds the KEEP largest, and what to know of the others.

    kept (ROWS, BLOCK); limit (ROWS,), that no other score exceeds and KEEP scores reach; sums (ROWS, LANES), in lane
    8 i + m for the i-th k the sum of exp(m (x - limit) / (k tau)) over the others; with MANY, how many are above -inf.

    Every column keeps the larger of its score and the new one. What it loses is seldom above the limit, and then takes
    the place of a lower score nearby, or anywhere; the limit is raised when those above it fill half the columns.
    """
    lanes = tl.arange(0, LANES)[None, :]
    rates = (lanes % 8).to(tl.float32) / tau
    for i in tl.static_range(COUNT):
        rates = tl.where(lanes // 8 == i, rates / ((KS >> 32 * i) & 0xFFFFFFFF), rates)
    kept = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    limit = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS, LANES), tl.float32)
    others = tl.zeros((ROWS,), tl.int32)
    for start in range(0, classes, BLOCK):
        tile = _wrong_scores(starts, start, class_stride, classes, used, target, BLOCK)
        tile = tl.where(tile == tile, tile, float("inf"))
        kept, lost = tl.maximum(kept, tile), tl.minimum(kept, tile)
        if _any_above(lost, limit):
            if tl.max(_reaching(kept, limit) + _reaching(lost, limit), 0) > BLOCK // 2:
                raised = _raised(kept, lost, limit, KEEP)
                fade = tl.minimum(finite_or_zero(limit) - finite_or_zero(raised), 0.0)
                sums *= tl.exp(fade[:, None] * rates)
                limit = raised
            while _any_above(lost, limit):
                kept, lost, placed = _swapped(kept, lost, limit, ROWS, BLOCK, 4)
                if placed == 0:
                    kept, lost, placed = _swapped(kept, lost, limit, ROWS, BLOCK, BLOCK)
        if MANY:
            others += tl.sum((lost > float("-inf")).to(tl.int32), 1)
        lost -= finite_or_zero(limit)[:, None]
        for i in tl.static_range(COUNT):
            sums += _powers_summed(lost, lanes - 8 * i, tau, (KS >> 32 * i) & 0xFFFFFFFF)
    return kept, limit, sums, others


@triton.jit
def _any_above(tile, limit):
    """Whether a score of any row exceeds the row's limit."""
    return tl.max((tl.max(tile, 1) > limit).to(tl.int32), 0) > 0


@triton.jit
def _swapped(kept, lost, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """The largest score lost in place of the smallest kept in each group of SIZE columns, if that is less.

    Returns both tiles, and whether a score above the limit found a place.
    """
    kept = tl.reshape(kept, (ROWS, SIZE, BLOCK // SIZE))
    lost = tl.reshape(lost, (ROWS, SIZE, BLOCK // SIZE))
    best, best_place = tl.max(lost, 1, return_indices=True)
    least, least_place = tl.min(kept, 1, return_indices=True)
    swaps = best > least
    places = tl.arange(0, SIZE)[None, :, None]
    kept = tl.where((places == least_place[:, None, :]) & swaps[:, None, :], best[:, None, :], kept)
    lost = tl.where((places == best_place[:, None, :]) & swaps[:, None, :], least[:, None, :], lost)
    placed = tl.max(tl.max((swaps & (best > limit[:, None])).to(tl.int32), 1), 0)
    return tl.reshape(kept, (ROWS, BLOCK)), tl.reshape(lost, (ROWS, BLOCK)), placed


@triton.jit
def _powers_summed(below, lanes, tau, K: tl.constexpr):
    """In lane m the sum of exp(m x / (K tau)) over a tile: for m up to K or, of a large K, 4."""
    sums = tl.zeros((below.shape[0], lanes.shape[1]), tl.float32)
    odds = tl.exp(below * (1.0 / (K * tau)))
    power = odds
    for m in tl.static_range(1, 1 + (K if K <= _FEW else 4)):
        sums += tl.where(lanes == m, tl.sum(power, 1)[:, None], 0.0)
        power *= odds
    return sums


@triton.jit
def _reaching(tile, level):
    """How many scores reach the row's level."""
    return tl.sum((tile >= level[:, None]).to(tl.int32), 1)


@triton.jit
def _raised(kept, lost, limit, KEEP: tl.constexpr):
    """A level that at least KEEP of both tiles reach, at most twice as many unless they are tied; bisected."""
    low = _ordered(tl.maximum(limit, tl.min(kept, 1)) + 0.0)
    high = _ordered(tl.max(kept, 1) + 0.0)
    count = _reaching(kept, _value(low)) + _reaching(lost, _value(low))
    by_value = True
    while tl.max(((count > 2 * KEEP) & (low < high)).to(tl.int32), 0) > 0:
        middle = _middle(low, high, by_value)
        by_value = by_value == 0
        reached = _reaching(kept, _value(middle)) + _reaching(lost, _value(middle))
        open = (count > 2 * KEEP) & (low < high)
        count = tl.where(open & (reached >= KEEP), reached, count)
        low = tl.where(open & (reached >= KEEP), middle, low)
        high = tl.where(open & (reached < KEEP), middle - 1, high)
    return _value(low)


@triton.jit
def _part(tile, i: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The i-th k's numbers (ROWS, WIDTH) in a tile that holds as many for each of COUNT."""
    place = tl.arange(0, COUNT)[None, :, None]
    return tl.sum(tl.where(place == i, tl.reshape(tile, (ROWS, COUNT, WIDTH)), 0.0), 1)


# --- small k: power sums ---------------------------------------------------------------------------------------------


@triton.jit
def _head(
    x,
    starts,
    class_stride,
    classes,
    used,
    target,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """The HEAD largest scores, descending, -inf after them (ROWS, 8); the first is +inf or NaN if the row holds NaN."""
    lanes = tl.arange(0, 8)[None, :]
    if STREAMS:
        best, _, _, _ = scan(
            starts, class_stride, classes, used, target, None, ROWS, BLOCK, HEAD, 8, 1, BLOCK // 8, STREAMS, False
        )
        head = tl.where(lanes < HEAD, scores_of(best), float("-inf"))
    else:
        last = tl.max(tl.where(x == x, x, float("inf")), 1)
        found = tl.maximum(tl.sum((x == last[:, None]).to(tl.int32), 1), 1)  # none equals NaN
        head = tl.where(lanes < found[:, None], last[:, None], float("-inf"))
        for _ in tl.static_range(1, HEAD):
            last = tl.max(tl.where(x < last[:, None], x, float("-inf")), 1)
            head = tl.where(lanes >= found[:, None], last[:, None], head)
            found += tl.sum((x == last[:, None]).to(tl.int32), 1)
    return head


@triton.jit
def _small_k(
    x,
    starts,
    class_stride,
    classes,
    used,
    target,
    mine,
    head,
    limit,
    rest,
    bad,
    inside,
    record,
    weight,
    tau,
    margin,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """As `_large_k`: the tail's polynomial from K power sums, the K largest scores multiplied in; float64 in lanes."""
    lanes = tl.arange(0, 8)[None, :]
    rate = 1.0 / (K * tau)
    kth = lane(head, lanes, K - 1)
    absent = kth == float("-inf")
    live = used & (bad == 0) & (absent == 0)
    center = tl.where(live, kth, 0.0)
    ties = tl.sum(((head == center[:, None]) & (lanes < K)).to(tl.float32), 1)
    sums = _power_sums(x, starts, class_stride, classes, used, target, center, rate, K, ROWS, BLOCK, STREAMS)
    if rest is not None:
        sums += rest * tl.exp(tl.minimum((finite_or_zero(limit) - center) * rate, 0.0)[:, None] * lanes)
    sums = tl.where(live[:, None] & (lanes <= K), sums - ties[:, None], 0.0).to(tl.float64)
    tail = _newton_identities(sums, lanes, K)

    # the K largest, 1 / w <= 1
    heads = tl.where(live[:, None], head, 0.0)
    shrink = tl.exp(tl.minimum(center[:, None] - heads, 0.0) * rate)
    success = (1.0 / (1.0 + shrink)).to(tl.float64)  # rounding scales all coefficients alike
    failure = shrink.to(tl.float64) * success
    full = tail
    for i in tl.static_range(K):
        full = _one_more(full, lanes, success, failure, i)
    chance, chance_less = lane(full, lanes, K), lane(full, lanes, K - 1)
    inverse, inverse_less = 1.0 / chance, 1.0 / chance_less
    gap = tl.log((chance * inverse_less).to(tl.float32)) + (center - mine) * rate + margin / tau
    term, slope, told = _outcome(gap, absent, live, bad, mine, weight, tau, K)

    # slopes: a polynomial in w, and the values at the K largest, each left out by those before it and those behind it
    up, down = (told * inverse)[:, None], (told * inverse_less)[:, None]
    sign = tl.where(lanes % 2 == 1, -1.0, 1.0)
    series = sign * (_at(full, K - 1 - lanes) * up - _at(full, K - 2 - lanes) * down)
    behind = _at(tail, K - 1 - lanes) * up - _at(tail, K - 2 - lanes) * down
    at_head = tl.zeros_like(behind)
    for i in tl.static_range(K - 1, -1, -1):
        before = tl.broadcast_to(tl.where(lanes == 0, 1.0, 0.0).to(tl.float64), tail.shape)
        for j in tl.static_range(i):
            before = _one_more(before, lanes, success, failure, j)
        at_head = tl.where(lanes == i, tl.sum(before * behind, 1)[:, None] * success, at_head)
        more, less = lane(success, lanes, i)[:, None], lane(failure, lanes, i)[:, None]
        behind = behind * less + _at(behind, lanes + 1) * more
    tl.store(record, center, mask=inside)
    place = record[:, None] + 1
    kept = inside[:, None] & (lanes < K)
    tl.store(place + lanes, series.to(tl.float32), mask=kept)
    tl.store(place + K + lanes, heads, mask=kept)
    tl.store(place + 2 * K + lanes, at_head.to(tl.float32), mask=kept)
    return term, slope


@triton.jit
def _one_more(counts, lanes, success, failure, i: tl.constexpr):
    """Pr[S = j] with the i-th of the head's trials added."""
    return counts * lane(failure, lanes, i)[:, None] + _shifted(counts, lanes) * lane(success, lanes, i)[:, None]


@triton.jit
def _power_sums(
    x,
    starts,
    class_stride,
    classes,
    used,
    target,
    center,
    rate,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """In lane m = 1..K: the sum of w^m over the scores up to the K-th and those tied with it, w <= 1."""
    lanes = tl.arange(0, 8)[None, :]
    sums = tl.zeros((ROWS, 8), tl.float32)
    for start in range(0, classes if STREAMS else BLOCK, BLOCK):
        tile = _tile(x, starts, class_stride, classes, used, target, start, BLOCK, STREAMS)
        below = tile <= center[:, None]
        odds = tl.exp(tl.where(below, (tile - center[:, None]) * rate, float("-inf")))
        power = odds
        for m in tl.static_range(1, K + 1):
            sums += tl.where(lanes == m, tl.sum(power, 1)[:, None], 0.0)
            power *= odds
    return sums


@triton.jit
def _newton_identities(sums, lanes, K: tl.constexpr):
    """e_0..e_K from the power sums p_1..p_K: e_m is the mean of (-1)^(i-1) e_{m-i} p_i over i = 1..m."""
    known = tl.broadcast_to(tl.where(lanes == 0, 1.0, 0.0).to(tl.float64), sums.shape)
    reversed_ = tl.zeros_like(sums)
    for m in tl.static_range(1, K + 1):
        power = lane(sums, lanes, m)
        reversed_ = _shifted(reversed_, lanes)
        reversed_ = tl.where(lanes == 0, (power if m % 2 == 1 else -power)[:, None], reversed_)
        known = tl.where(lanes == m, tl.sum(known * reversed_, 1)[:, None] * (1.0 / m), known)
    return known


@triton.jit
def _shifted(tile, lanes):
    """Lane j's number moved to lane j + 1; 0 enters."""
    return _at(tile, lanes - 1)


@triton.jit
def _at(tile, places):
    """The numbers (ROWS, 8) of the lanes at `places` (1, 8), 0 where there is no such lane."""
    lanes = tl.arange(0, 8)[None, None, :]
    return tl.sum(tl.where(lanes == places[:, :, None], tile[:, None, :], 0.0), 2)


# --- large k: nodes on a circle --------------------------------------------------------------------------------------


@triton.jit
def _tilts(
    x,
    starts,
    class_stride,
    classes,
    used,
    target,
    top,
    bottom,
    possible,
    limit,
    sums,
    bad,
    tau,
    COUNT: tl.constexpr,
    KS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """For every large k, a score near the k-th, the shift of the log-odds, the variance; each (ROWS, LANES // 8).

    Reads a row only where it streams and has not been sifted.
    """
    places = tl.arange(0, LANES // 8)[None, :]
    centers = tl.zeros((ROWS, LANES // 8), tl.float32)
    shifts = tl.zeros((ROWS, LANES // 8), tl.float32)
    variances = tl.zeros((ROWS, LANES // 8), tl.float32) + 1.0
    for i in tl.static_range(COUNT):
        if ((KS >> 32 * i) & 0xFFFFFFFF) > _FEW:
            rate = 1.0 / (((KS >> 32 * i) & 0xFFFFFFFF) * tau)
            live = used & (bad == 0) & (possible >= ((KS >> 32 * i) & 0xFFFFFFFF))
            low, high = tl.where(live, bottom, 0.0), tl.where(live, top, 0.0)
            center, spread = _near_kth(
                x,
                starts,
                class_stride,
                classes,
                used,
                target,
                low,
                high,
                rate,
                (KS >> 32 * i) & 0xFFFFFFFF,
                BLOCK,
                STREAMS,
            )
            rest = None
            if sums is not None:
                rest = _part(sums, i, LANES // 8, 8, ROWS)
            shift, variance = _balance(
                x,
                starts,
                class_stride,
                classes,
                used,
                target,
                center,
                spread,
                rate,
                possible,
                limit,
                rest,
                live,
                (KS >> 32 * i) & 0xFFFFFFFF,
                ROWS,
                BLOCK,
                STREAMS,
            )
            centers = tl.where(places == i, center[:, None], centers)
            shifts = tl.where(places == i, shift[:, None], shifts)
            variances = tl.where(places == i, variance[:, None], variances)
    return centers, shifts, variances


@triton.jit
def _large_k(
    real,
    imag,
    heads,
    center,
    shift,
    variance,
    used,
    possible,
    mine,
    bad,
    inside,
    record,
    weight,
    tau,
    margin,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The weighted loss of one k, and minus its derivative by x_y, from its nodes; stores the record."""
    rate = 1.0 / (K * tau)
    absent = possible < K  # y cannot be missed
    live = used & (bad == 0) & (absent == 0)
    circle, count = _circle(variance, K)
    chance, chance_less, node_weight = _chances(real, imag, heads - K, circle, count, live)

    gap = tl.log(chance / chance_less) - shift + (center - mine) * rate + margin / tau
    term, slope, told = _outcome(gap, absent, live, bad, mine, weight, tau, K)
    tl.store(record, center, mask=inside)
    tl.store(record + 1, shift, mask=inside)
    up, down = told / chance, told / chance_less
    _store_series(record + 2, inside, real, imag, heads - K, circle, count, node_weight, variance, up, down, K, ROWS)
    return term, slope


@triton.jit
def _wrong_scores(starts, start, class_stride, classes, used, target, BLOCK: tl.constexpr):
    """A tile of scores, with -inf in the place of y's."""
    columns = start + tl.arange(0, BLOCK)
    x = load_tile(starts, columns, class_stride, classes, used)
    return tl.where(columns[None, :] == target[:, None], float("-inf"), x)


@triton.jit
def _tile(x, starts, class_stride, classes, used, target, start, BLOCK: tl.constexpr, STREAMS: tl.constexpr):
    """The tile that begins at column `start`: read again, or, of a row that fits, `x`."""
    if STREAMS:
        x = _wrong_scores(starts, start, class_stride, classes, used, target, BLOCK)
    return x


@triton.jit
def _extremes(
    x, starts, class_stride, classes, used, target, ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr
):
    """The largest score (+inf also for NaN), the smallest above -inf, and how many are above -inf."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    bottom = tl.full((ROWS,), float("inf"), tl.float32)
    possible = tl.zeros((ROWS,), tl.int32)
    for start in range(0, classes if STREAMS else BLOCK, BLOCK):
        tile = _tile(x, starts, class_stride, classes, used, target, start, BLOCK, STREAMS)
        there = tile > float("-inf")
        top = tl.maximum(top, tl.max(tl.where(tile == tile, tile, float("inf")), 1))
        bottom = tl.minimum(bottom, tl.min(tl.where(there, tile, float("inf")), 1))
        possible += tl.sum(there.to(tl.int32), 1)
    return top, bottom, possible


@triton.jit
def _ordered(values):
    """Integers in the order of the floats; the same step leads back."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high, by_value):
    """A score between the two, above `low`: by value, where that is one, or by bits."""
    middle = (low | high) - ((low ^ high) >> 1)
    halfway = _ordered(_value(low) * 0.5 + _value(high) * 0.5)
    return tl.where(by_value & (halfway > low) & (halfway <= high), halfway, middle)


@triton.jit
def _near_kth(
    x,
    starts,
    class_stride,
    classes,
    used,
    target,
    bottom,
    top,
    rate,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """A score that the k-th largest exceeds by at most 2 / rate, and that bound times rate.

    Bisection by value, which is quick for ordinary scores, in turn with bisection by bits, which ends for all.
    """
    low, high = _ordered(bottom + 0.0), _ordered(top + 0.0)
    spread = (_value(high) - _value(low)) * rate
    by_value = True
    while tl.max(((spread > 2.0) & (low < high)).to(tl.int32), 0) > 0:
        middle = _middle(low, high, by_value)
        by_value = by_value == 0
        count = tl.zeros_like(low)
        for start in range(0, classes if STREAMS else BLOCK, BLOCK):
            tile = _tile(x, starts, class_stride, classes, used, target, start, BLOCK, STREAMS)
            count += tl.sum((tile >= _value(middle)[:, None]).to(tl.int32), 1)
        open = low < high
        low = tl.where(open & (count >= K), middle, low)
        high = tl.where(open & (count < K), middle - 1, high)
        spread = (_value(high) - _value(low)) * rate
    return _value(low), tl.minimum(spread, 2.0)


@triton.jit
def _signed_odds(x, center, shift, rate):
    """q = min(P, 1 - P) with the sign of 1/2 - P, and whether P > 1/2."""
    log_odds = (x - center[:, None]) * rate + shift[:, None]
    odds = tl.exp(-tl.abs(log_odds))
    q = odds / (1.0 + odds)
    head = log_odds > 0.0
    return tl.where(head, -q, q), head


@triton.jit
def _moments(
    x,
    starts,
    class_stride,
    classes,
    used,
    target,
    center,
    shift,
    rate,
    limit,
    rest,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """How many have P > 1/2, the mean of S less that number, and the variance; of a sifted row to 0.2 and 0.9 %."""
    heads = tl.zeros((ROWS,), tl.int32)
    mean = tl.zeros((ROWS,), tl.float32)
    variance = tl.zeros((ROWS,), tl.float32)
    for start in range(0, classes if STREAMS else BLOCK, BLOCK):
        signed, head = _signed_odds(
            _tile(x, starts, class_stride, classes, used, target, start, BLOCK, STREAMS), center, shift, rate
        )
        heads += tl.sum(head.to(tl.int32), 1)
        mean += tl.sum(signed, 1)
        variance += tl.sum(tl.abs(signed) - signed * signed, 1)
    if rest is not None:
        more_mean, more_variance = _moments_of_rest(rest, (finite_or_zero(limit) - center) * rate + shift)
        mean += more_mean
        variance += more_variance
    return heads, mean, variance


@triton.jit
def _moments_of_rest(rest, log_odds):
    """The sums of P and P (1 - P) over scores sifted out, from the log-odds at the limit and four power sums.

    The largest P is below 1/2 at the shift looked for; at one so large that it is not, the bound alone tells so. The
    polynomials are those of the least relative error in the odds up to 1.
    """
    odds = tl.exp(tl.minimum(log_odds, 0.0))[:, None]
    lanes = tl.arange(0, 8)[None, :]
    power = tl.where(lanes == 1, odds, tl.where(lanes == 2, odds * odds, odds * odds * odds))
    power = tl.where(lanes == 4, odds * power, power) * rest
    mean = tl.where(lanes == 1, 0.99824407, tl.where(lanes == 2, -0.94263684, 0.0))
    mean = tl.where(lanes == 3, 0.66518242, tl.where(lanes == 4, -0.22165374, mean))
    variance = tl.where(lanes == 1, 0.99148853, tl.where(lanes == 2, -1.75419715, 0.0))
    variance = tl.where(lanes == 3, 1.60108585, tl.where(lanes == 4, -0.59047655, variance))
    return tl.sum(mean * power, 1), tl.sum(variance * power, 1)


@triton.jit
def _balance(
    x,
    starts,
    class_stride,
    classes,
    used,
    target,
    center,
    spread,
    rate,
    possible,
    limit,
    rest,
    live,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """A shift of the log-odds at which the mean of S is within 1/4 of k - 1/2, and the variance there.

    Newton steps for the logit of mean / n, which is linear in the shift for equal scores; bisection where they leave
    the bracket.
    """
    n = tl.where(live, possible, K).to(tl.float32)
    aim = tl.log((K - 0.5) / (n - (K - 0.5)))
    low = -tl.log(2.0 * (n - K) + 1.0) - spread
    high = tl.full((ROWS,), 2 * K - 1, tl.float32)
    high = tl.log(high)
    shift = tl.minimum(tl.maximum(aim, low), 0.0)
    heads, mean, variance = _moments(
        x, starts, class_stride, classes, used, target, center, shift, rate, limit, rest, ROWS, BLOCK, STREAMS
    )
    excess = mean + (heads - K).to(tl.float32) + 0.5
    steps = 0
    while (tl.max((live & (tl.abs(excess) > 0.25)).to(tl.int32), 0) > 0) & (steps < 40):
        low = tl.where(excess < 0.0, shift, low)
        high = tl.where(excess > 0.0, shift, high)
        hits = tl.maximum(excess + (K - 0.5), 1e-20)
        misses = tl.maximum(n - hits, 1e-20)
        step = shift + (aim - tl.log(hits / misses)) * (hits / n) * misses / tl.maximum(variance, 1e-20)
        step = tl.where((step > low) & (step < high), step, (low + high) * 0.5)
        shift = tl.where(tl.abs(excess) > 0.25, step, shift)
        heads, mean, variance = _moments(
            x, starts, class_stride, classes, used, target, center, shift, rate, limit, rest, ROWS, BLOCK, STREAMS
        )
        excess = mean + (heads - K).to(tl.float32) + 0.5
        steps += 1
    return shift, tl.where(live, variance, 1.0)


# --- the circle ------------------------------------------------------------------------------------------------------


@triton.jit
def _circle(variance, K: tl.constexpr):
    """The number of nodes on the whole circle, odd, and how many on its upper half are not negligible."""
    terms = _terms_of_chances(variance)
    wide = variance >= _SPREAD
    circle = tl.where(wide, terms | 1, tl.minimum(2 * terms + 1, (terms + K + 2) | 1))  # none is below Pr[S = 0]
    half_sine = tl.sqrt(tl.minimum(8.5 / variance, 1.0))  # var (1 - cos t) = 17 at twice that angle
    angle = half_sine + 0.5708 * half_sine * half_sine * half_sine
    last = tl.ceil(angle * circle.to(tl.float32) * 0.31830989).to(tl.int32)
    return circle, tl.where(wide, tl.minimum(last, circle // 2), circle // 2)


@triton.jit
def _terms_of_chances(variance):
    """How far from k Pr[S = j] is worth counting."""
    return tl.ceil(6.0 * tl.sqrt(variance) + 5.0).to(tl.int32)


@triton.jit
def _sine_and_cosine(turns):
    """Of a full turn times `turns`, |turns| <= 1/2: Taylor series of half the angle, and the double-angle formulas.

    Returns the sine and 1 - cosine.
    """
    angle = turns * 3.14159265358979
    square = angle * angle
    sine = 1.6059044e-10 * square - 2.5052108e-8
    sine = sine * square + 2.7557319e-6
    sine = sine * square - 1.9841270e-4
    sine = sine * square + 8.3333333e-3
    sine = sine * square - 0.16666667
    sine = angle + angle * square * sine
    cosine = -1.1470746e-11 * square + 2.0876757e-9
    cosine = cosine * square - 2.7557319e-7
    cosine = cosine * square + 2.4801587e-5
    cosine = cosine * square - 1.3888889e-3
    cosine = cosine * square + 4.1666667e-2
    cosine = 1.0 + square * (cosine * square - 0.5)
    return 2.0 * sine * cosine, 2.0 * sine * sine


@triton.jit
def _turns(product, circle):
    """product / circle less the nearest integer, of integers as floats: the product's multiples of a turn are exact."""
    return (product - circle * tl.floor(product / circle + 0.5)) / circle


@triton.jit
def _times(real, imag, other_real, other_imag):
    """(1 + a)(1 + b) - 1, in real and imaginary parts."""
    return (
        real + other_real + (real * other_real - imag * other_imag),
        imag + other_imag + (real * other_imag + imag * other_real),
    )


@triton.jit
def _nodes(
    x,
    starts,
    class_stride,
    classes,
    used,
    target,
    centers,
    shifts,
    variances,
    tau,
    COUNT: tl.constexpr,
    KS: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """For every large k, the product less 1 of the factors 1 + q (e^{it} - 1) at the nodes, and the heads, P > 1/2.

    In the columns from i _NODES on (ROWS, PLACES _NODES) for the i-th k, heads in its column (ROWS, PLACES). A head has
    -t in the place of t.
    """
    places = tl.arange(0, PLACES)[None, :]
    real = tl.zeros((ROWS, PLACES * _NODES), tl.float32)
    imag = tl.zeros((ROWS, PLACES * _NODES), tl.float32)
    heads = tl.zeros((ROWS, PLACES), tl.int32)
    for start in range(0, classes if STREAMS else BLOCK, BLOCK):
        tile = _tile(x, starts, class_stride, classes, used, target, start, BLOCK, STREAMS)
        for i in tl.static_range(COUNT):
            if ((KS >> 32 * i) & 0xFFFFFFFF) > _FEW:
                signed, head = _signed_odds(
                    tile,
                    lane(centers, places, i),
                    lane(shifts, places, i),
                    1.0 / (((KS >> 32 * i) & 0xFFFFFFFF) * tau),
                )
                heads += tl.where(places == i, tl.sum(head.to(tl.int32), 1)[:, None], 0)
                circle, count = _circle(lane(variances, places, i), (KS >> 32 * i) & 0xFFFFFFFF)
                real, imag = _multiplied(real, imag, signed, circle, count, i * _NODES, ROWS, BLOCK)
    return real, imag, heads


@triton.jit
def _multiplied(real, imag, signed, circle, count, first: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The products at the nodes, those of one k from column `first` on, with a tile's factors multiplied in.

    Two classes together have the factor 1 + C (a + b C) + i sin t (c + d C), C = 1 - cos t.
    """
    lanes = tl.arange(0, real.shape[1])[None, :]
    one, other = tl.split(tl.reshape(signed, (ROWS, BLOCK // 2, 2)))
    size_one, size_other, both = tl.abs(one), tl.abs(other), one * other
    a, b = -(size_one + size_other + 2.0 * both), size_one * size_other + both
    c, d = one + other, -(one * size_other + other * size_one)
    for m in range(1, tl.max(count, 0) + 1):
        sine, rest = _sine_and_cosine(m / circle.to(tl.float32))
        sine, rest = sine[:, None], rest[:, None]
        factor_real = a * rest + b * (rest * rest)
        factor_imag = c * sine + d * (sine * rest)
        all_real, all_imag = tl.reduce((factor_real, factor_imag), 1, _times)
        more_real, more_imag = _times(real, imag, all_real[:, None], all_imag[:, None])
        real = tl.where(lanes == first + m, more_real, real)
        imag = tl.where(lanes == first + m, more_imag, imag)
    return real, imag


@triton.jit
def _turned(real, imag, lanes, steps, circle):
    """The nodes' values turned by `steps` nodes each, real part; lanes (ROWS, _NODES)."""
    sine, rest = _sine_and_cosine(_turns(lanes * steps[:, None], circle[:, None]))
    return real - (real * rest + imag * sine), imag - (imag * rest - real * sine)


@triton.jit
def _chances(real, imag, steps, circle, count, live):
    """Pr[S = k] and Pr[S = k - 1] (1 for rows that do not count), and the nodes' weights. steps: heads - k."""
    lanes = tl.arange(0, _NODES)[None, :]
    m = lanes.to(tl.float32)
    size = circle.to(tl.float32)
    steps = _modulo(steps, circle)
    weight = tl.where(lanes <= count[:, None], tl.where(lanes == 0, 1.0, 2.0), 0.0) / size[:, None]
    turned, _ = _turned(real, imag, m, steps, size)
    turned_less, _ = _turned(real, imag, m, steps + 1.0, size)
    chance = tl.sum(weight * turned, 1)
    chance_less = tl.sum(weight * turned_less, 1)
    return tl.where(live, chance, 1.0), tl.where(live, chance_less, 1.0), weight


@triton.jit
def _modulo(steps, circle):
    """steps as a float within one circle of 0, so that products with a node's number stay exact."""
    return (steps - steps // circle * circle).to(tl.float32)


# --- the series of the slopes ----------------------------------------------------------------------------------------


@triton.jit
def _store_series(
    record, inside, real, imag, steps, circle, count, weight, variance, up, down, K: tl.constexpr, ROWS: tl.constexpr
):
    """The number of terms, negative for a Chebyshev series, and their coefficients times the loss's slope."""
    wide = variance >= _SPREAD
    terms = tl.where(wide, _terms_of_chebyshev(variance), _terms_of_chances(variance))
    tl.store(record, tl.where(wide, -terms, terms).to(tl.float32), mask=inside)
    if tl.max((inside & wide).to(tl.int32), 0) > 0:
        _store_chebyshev(record + 1, inside & wide, real, imag, steps, circle, weight, up, down)
    if tl.max((inside & (wide == 0)).to(tl.int32), 0) > 0:
        _store_powers(record + 1, inside & (wide == 0), real, imag, steps, circle, count, up, down, K, ROWS)


@triton.jit
def _terms_of_chebyshev(variance):
    return tl.ceil(3.0 + 23.0 / tl.sqrt(variance)).to(tl.int32)


@triton.jit
def _store_chebyshev(record, here, real, imag, steps, circle, weight, up, down):
    """sum over nodes of Re(2 i g sin(t/2) (2 - [d = 0]) (-i tan(t/4))^d), g the node's part of the slopes."""
    lanes = tl.arange(0, _NODES)[None, :]
    m = lanes.to(tl.float32)
    size = circle.to(tl.float32)
    steps = _modulo(steps, circle)
    real_k, imag_k = _turned(real, imag, m, steps, size)
    real_less, imag_less = _turned(real, imag, m, steps + 1.0, size)
    # half the angle: its sine, and the tangent of half of that
    half_sine, half_rest = _sine_and_cosine(tl.minimum(m / size[:, None], 1.0) * 0.5)
    tangent = half_sine / (2.0 - half_rest)
    factor = 2.0 * weight * half_sine
    part_real = factor * (real_k * up[:, None] - real_less * down[:, None])
    part_imag = factor * (imag_k * up[:, None] - imag_less * down[:, None])
    power = tl.where(weight > 0.0, 1.0, 0.0)
    rest = tl.arange(0, 64)[None, :]
    unused = here[:, None] & (rest >= _TERMS // 2) & (rest < 2 * _TERMS)
    tl.store(record[:, None] + rest, tl.zeros_like(rest).to(tl.float32), mask=unused)
    for d in tl.static_range(_TERMS // 2):
        value = tl.sum((part_imag if d % 2 == 0 else part_real) * power, 1)
        tl.store(record + d, -value if d % 4 == 0 or d % 4 == 3 else value, mask=here)
        power *= tangent if d > 0 else 2.0 * tangent


@triton.jit
def _store_powers(record, here, real, imag, steps, circle, count, up, down, K: tl.constexpr, ROWS: tl.constexpr):
    """The coefficients in w for P <= 1/2, then those in 1 / w for P > 1/2."""
    lanes = tl.arange(0, 64)[None, :]
    head = lanes >= 32
    j = lanes % 32
    size = circle.to(tl.float32)[:, None]
    turn = _modulo(steps, circle)[:, None] + tl.where(head, -1 - j, 1 + j).to(tl.float32)
    chances = tl.zeros((ROWS, 64), tl.float32) + 1.0
    chances_less = tl.zeros((ROWS, 64), tl.float32) + 1.0
    nodes = tl.arange(0, _NODES)[None, :]
    for m in range(1, tl.max(count, 0) + 1):
        node_real = tl.sum(tl.where(nodes == m, real, 0.0), 1)[:, None]
        node_imag = tl.sum(tl.where(nodes == m, imag, 0.0), 1)[:, None]
        twice = tl.where(m <= count, 2.0, 0.0)[:, None]
        sine, rest = _sine_and_cosine(m / size)
        next_real = node_real - (node_real * rest + node_imag * sine)
        next_imag = node_imag - (node_imag * rest - node_real * sine)
        sine, rest = _sine_and_cosine(_turns(m * turn, size))
        chances += twice * (node_real - (node_real * rest + node_imag * sine))
        chances_less += twice * (next_real - (next_real * rest + next_imag * sine))
    chances = tl.where(head | (j < K), chances, 0.0)
    chances_less = tl.where(head | (j < K - 1), chances_less, 0.0)
    sign = tl.where((lanes % 2 == 1) != head, -1.0, 1.0)
    values = sign * (chances * up[:, None] - chances_less * down[:, None]) / size
    kept = here[:, None] & (j < _TERMS)
    tl.store(record[:, None] + tl.where(head, _TERMS, 0) + j, values, mask=kept)


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, ignore_index: int, options: Options
) -> Tensor:
    """grad * d loss / d scores."""
    ks, _, tau, _ = options
    if not ks:
        return common.no_gradient(scores, target, ignore_index)
    rows, classes = scores.shape
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    tiling = common.elementwise(classes)
    if max(ks) > _FEW.value and tiling.rows > 8:  # of more rows the coefficients would not fit the registers
        tiling = replace(tiling, rows=8, warps=max(1, 8 * tiling.block // 512))
    common.launch(
        _backward,
        tiling.programs(rows) * common.tiles(classes, tiling),
        grad,
        scores,
        target.contiguous(),
        *saved,
        result,
        rows,
        classes,
        *scores.stride(),
        grad.stride(0),
        ignore_index,
        float(tau),
        COUNT=len(ks),
        KS=common.packed(ks),
        ROWS=tiling.rows,
        BLOCK=tiling.block,
        ALIGN=common.alignment(scores),
        warps=tiling.warps,
    )
    return result


@triton.jit
def _backward(
    grad_ptr,
    scores_ptr,
    target_ptr,
    table_ptr,
    result_ptr,
    rows,
    classes,
    row_stride,
    class_stride,
    grad_stride,
    ignore_index,
    tau,
    COUNT: tl.constexpr,
    KS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    classes = aligned(classes, ALIGN)
    row, start = tile_of_program(classes, ROWS, BLOCK)
    columns = start + tl.arange(0, BLOCK)
    inside = row < rows
    target, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    grad = tl.load(grad_ptr + row.to(tl.int64) * grad_stride, mask=used, other=0.0).to(tl.float32)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    x = load_tile(starts, columns, class_stride, classes, used)

    slopes = tl.zeros((ROWS, BLOCK), tl.float32)
    record = table_ptr + row.to(tl.int64) * _width(COUNT, KS)
    for i in tl.static_range(COUNT):
        if ((KS >> 32 * i) & 0xFFFFFFFF) <= _FEW:
            slopes += _slopes_small_k(record, x, used, tau, (KS >> 32 * i) & 0xFFFFFFFF)
            record += 1 + 3 * ((KS >> 32 * i) & 0xFFFFFFFF)
        else:
            slopes += _slopes_large_k(record, x, used, tau, (KS >> 32 * i) & 0xFFFFFFFF, ROWS, BLOCK)
            record += 3 + 2 * _TERMS
    pull = tl.load(record, mask=used, other=0.0)
    slopes = tl.where(columns[None, :] == target[:, None], pull[:, None], slopes) * grad[:, None]
    slopes = tl.where(wrong[:, None], float("nan"), slopes)
    store_tile(row_pointers(result_ptr, row, classes), columns, classes, inside, slopes)


@triton.jit
def _slopes_small_k(record, x, used, tau, K: tl.constexpr):
    """A polynomial in w <= 1; the few larger scores are recognised by their value and have theirs saved."""
    center = tl.load(record, mask=used, other=0.0)[:, None]
    odds = tl.exp(tl.minimum(x - center, 0.0) * (1.0 / (K * tau)))
    value = tl.zeros_like(x)
    for i in tl.static_range(K):
        value = (value + tl.load(record + K - i, mask=used, other=0.0)[:, None]) * odds
    for i in tl.static_range(K):
        score = tl.load(record + 1 + K + i, mask=used, other=0.0)[:, None]
        slope = tl.load(record + 1 + 2 * K + i, mask=used, other=0.0)[:, None]
        value = tl.where((x == score) & (score > center), slope, value)
    return value


@triton.jit
def _slopes_large_k(record, x, used, tau, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    center = tl.load(record, mask=used, other=0.0)
    shift = tl.load(record + 1, mask=used, other=0.0)
    terms = tl.load(record + 2, mask=used, other=0.0).to(tl.int32)
    log_odds = (x - center[:, None]) * (1.0 / (K * tau)) + shift[:, None]
    odds = tl.exp(-tl.abs(log_odds))
    head = log_odds > 0.0
    slopes = tl.zeros((ROWS, BLOCK), tl.float32)
    if tl.max(terms, 0) > 0:
        slopes += _power_series(record + 3, odds, head, terms, ROWS, BLOCK)
    if tl.min(terms, 0) < 0:
        slopes += _chebyshev_series(record + 3, odds, head, terms, ROWS, BLOCK)
    return slopes


@triton.jit
def _power_series(record, odds, head, terms, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """odds (r_0 + r_1 odds + ...), from the coefficients of either side; 0 in rows with another series."""
    value = tl.zeros((ROWS, BLOCK), tl.float32)
    last = tl.max(terms, 0)
    for step in range(last):
        j = last - 1 - step
        tail_term = tl.load(record + j, mask=j < terms, other=0.0)
        head_term = tl.load(record + j + _TERMS, mask=j < terms, other=0.0)
        value = value * odds + tl.where(head, head_term[:, None], tail_term[:, None])
    return value * odds


@triton.jit
def _chebyshev_series(record, odds, head, terms, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """q (1 - q) (c_0 + c_1 T_1(s) + ...), s = 2 P - 1, by Clenshaw's recurrence; 0 in rows with another series."""
    q = odds / (1.0 + odds)
    doubled = tl.where(head, 2.0 - 4.0 * q, 4.0 * q - 2.0)
    value = tl.zeros((ROWS, BLOCK), tl.float32)
    before = tl.zeros((ROWS, BLOCK), tl.float32)
    last = -tl.min(terms, 0)
    for step in range(last - 1):
        j = last - 1 - step
        term = tl.load(record + j, mask=j < -terms, other=0.0)
        value, before = value * doubled + term[:, None] - before, value
    term = tl.load(record, mask=terms < 0, other=0.0)
    return (value * (doubled * 0.5) + term[:, None] - before) * (q - q * q)


def examples(rows: int, classes: int, device: torch.device) -> list[tuple[Saved, Options]]:
    """Calls that reach every path: one small k, one that spreads over many classes, several at once."""
    return [((), ([5], [1.0], 1.0, 1.0)), ((), ([1, min(20, classes)], [0.25, 0.75], 0.5, 0.0))]
