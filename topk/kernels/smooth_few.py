"""The smooth loss for k <= 6: one read for the k largest wrong scores and power sums of the others, then a few numbers.

With r = 1 / (k tau) and t the smallest score kept, the first kernel finds the largest wrong scores and, of the others,

    p_m = sum of exp(m r (x - t)),   m = 1..k.

In the second a thread has a row to itself: Newton's identities make the polynomial prod (1 + w z) of the p_m, the k
largest scores are multiplied in as Pr[S = j] <- (1 - P) Pr[S = j] + P Pr[S = j - 1], and what is left out by those
before a class and those behind it gives its slope. These few dozen numbers are float64: 217 instructions a row at
k = 5, which also a T4, with 2 a cycle, does in a twentieth of the time that 1000 classes take. Backward, in the third
kernel, is a polynomial of degree k in w = exp(r (x - x_[k])) <= 1, overwritten at the classes kept and at y.

Bytes a row, with n classes of s bytes, K the largest k: forward reads n s, and the second kernel what the first wrote,
4 (1 + 2 K + the sum of the ks); backward reads n s, a tile reads what forward saved, and writes n s.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import (
    SavedShape,
    aligned,
    by_group,
    exponential,
    finite_or_zero,
    in_order,
    lane,
    largest_of,
    load_tile,
    nothing_kept,
    offers,
    others,
    patch_tile,
    row_pointers,
    row_states,
    score_of,
    softplus,
    store_tile,
    take,
    tile_of_program,
    tops_of,
    without,
)
from topk.losses.smooth import Options

LARGEST = 6
"""The largest k that this serves: beyond, Newton's identities cancel too much in float32 sums."""

_TOGETHER = 128  # rows of a program of the second kernel
_HIGH = tl.constexpr(3e38)  # no score is larger, but for those next to overflow


def saved(rows: int, ks: list[int]) -> tuple[SavedShape, ...]:
    """For every k the k-th score and k coefficients; the kept classes and y (-1: none), and their slopes."""
    width = ks[-1] + 1
    return ((rows, len(ks) + sum(ks)), None), ((rows, width), torch.int32), ((rows, width), None)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, options: Options, ignore_index: int) -> tuple[Tensor, ...]:
    """loss (rows,) and what `saved` names."""
    ks = options.ks
    rows, classes = scores.shape
    count, total = ks[-1], sum(ks)
    table, places, slopes = common.allocate(scores, saved(rows, ks))
    loss = scores.new_empty(rows, dtype=torch.float32)
    read = scores.new_empty((rows, 1 + count + total), dtype=torch.float32)  # y's score, the largest, the power sums
    tiling = common.whole_rows(classes)
    common.launch(
        _read, tiling.programs(rows),
        scores, target, read, places,
        rows, classes, *scores.stride(), ignore_index, float(options.tau),
        KS=tuple(ks), TOTAL=total, COUNT=count,
        **common.whole_row_constants(tiling, scores, count),
    )  # fmt: skip
    common.launch(
        _finish, triton.cdiv(rows, _TOGETHER),
        read, target, loss, table, places, slopes,
        rows, classes, ignore_index, float(options.tau), float(options.margin),
        KS=tuple(ks), STARTS=tuple(accumulate(ks, initial=0)), WEIGHTS=tuple(options.weights), COUNT=count,
        ROWS=_TOGETHER, warps=_TOGETHER // 32,
    )  # fmt: skip
    return loss, table, places, slopes


@triton.jit(do_not_specialize=["rows"])
def _read(
    scores_ptr,  # (rows, classes)
    target_ptr,  # (rows,)
    read_ptr,  # (rows, 1 + COUNT + TOTAL), written
    places_ptr,  # (rows, COUNT + 1), written but for the last column
    rows, classes, row_stride, class_stride, ignore_index, tau,
    KS: tl.constexpr, TOTAL: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STREAMS: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    classes = aligned(classes, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target, used, _ = row_states(target_ptr, row, rows, classes, ignore_index)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    mine = tl.load(starts + target.to(tl.int64) * class_stride, mask=used, other=0.0).to(tl.float32)

    lanes = tl.arange(0, LANES)[None, :]
    # What exceeds the smallest score kept counts as tied with it, so that every score kept adds 1: these are taken off.
    sums = _zeros(tl.zeros((ROWS, GROUPS), tl.float32), TOTAL)
    if STREAMS:
        kept, kept_classes, last, last_class = nothing_kept(ROWS, COUNT, LANES)
        shift = tl.full((ROWS,), _HIGH, tl.float32)  # until COUNT scores are kept nothing is added
        rest = _zeros(tl.zeros((ROWS, LANES), tl.float32), TOTAL)  # of scores kept once, less 1 for each kept now
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.minimum(load_tile(starts, columns, class_stride, classes, used), float("inf"))
            if tl.max(((target >= start) & (target < start + BLOCK)).to(tl.int32), 0) > 0:
                x = tl.where(columns[None, :] == target[:, None], float("-inf"), x)
            tops = tops_of(by_group(x, ALIGN, GROUPS))
            if offers(tops, last):
                before = tl.where(lanes < COUNT, score_of(kept), float("-inf"))
                kept, kept_classes, last, last_class = take(
                    kept, kept_classes, last, last_class,
                    by_group(x, ALIGN, GROUPS), by_group(tl.broadcast_to(columns[None, :], x.shape), ALIGN, GROUPS),
                    tops,
                )  # fmt: skip
                t = score_of(last)
                filled = t > float("-inf")
                t = tl.where(filled, t, _HIGH)
                fade = tl.minimum(shift - t, 0.0)[:, None]
                shift = t
                sums = _faded(sums, fade, tau, KS)
                rest = _added(_faded(rest, fade, tau, KS), before, shift, tau, KS, ALIGN, 0)
                rest = _less(rest, tl.where((lanes < COUNT) & filled[:, None], 1.0, 0.0))
            sums = _added(sums, x, shift, tau, KS, ALIGN, GROUPS)
        best, found = in_order(kept, kept_classes, COUNT, LANES)
    else:
        columns = tl.arange(0, BLOCK)
        x, columns = without(load_tile(starts, columns, class_stride, classes, used), columns, target)
        best, found = largest_of(by_group(x, ALIGN, GROUPS), by_group(columns, ALIGN, GROUPS), COUNT, LANES)
        t = finite_or_zero(lane(best, lanes, COUNT - 1))  # of fewer scores the sums are not asked for
        sums = _added(sums, x, t, tau, KS, ALIGN, GROUPS)

    row = row.to(tl.int64)
    here = inside[:, None] & (lanes < COUNT)
    tl.store(places_ptr + row[:, None] * (COUNT + 1) + lanes, others(found, target), mask=here)
    record = read_ptr + row * (1 + COUNT + TOTAL)
    tl.store(record, mine, mask=inside)
    tl.store(record[:, None] + 1 + lanes, best, mask=here)
    for m in tl.static_range(TOTAL):
        total = tl.sum(sums[m], 1) + (tl.sum(rest[m], 1) if STREAMS else -COUNT)
        tl.store(record + 1 + COUNT + m, total, mask=inside)


@triton.jit
def _zeros(like, COUNT: tl.constexpr):
    """COUNT tensors of zeros."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.zeros_like(like),)
    return result


@triton.jit
def _less(sums, what):
    result = ()
    for m in tl.static_range(len(sums)):
        result = result + (sums[m] - what,)
    return result


@triton.jit
def _faded(sums, fade, tau, KS: tl.constexpr):
    """The power sums relative to a score that is larger by -fade."""
    result = ()
    for i in tl.static_range(len(KS)):
        result = result + _faded_powers(sums, len(result), exponential(fade * (1.0 / (KS[i] * tau))), KS[i])
    return result


@triton.jit
def _faded_powers(sums, FIRST: tl.constexpr, factor, K: tl.constexpr):
    result = ()
    power = factor
    for m in tl.static_range(K):
        result = result + (sums[FIRST + m] * power,)
        power *= factor
    return result


@triton.jit
def _added(sums, x, t, tau, KS: tl.constexpr, ALIGN: tl.constexpr, GROUPS: tl.constexpr):
    """The power sums by group (each for itself: 0) with those of a tile added, relative to t (ROWS,) and 1 above it."""
    below = tl.minimum(x - t[:, None], 0.0)
    result = ()
    for i in tl.static_range(len(KS)):
        odds = tl.exp2(below * (1.4426950408889634 / (KS[i] * tau)))
        result = result + _added_powers(sums, len(result), odds, KS[i], ALIGN, GROUPS)
    return result


@triton.jit
def _added_powers(sums, FIRST: tl.constexpr, odds, K: tl.constexpr, ALIGN: tl.constexpr, GROUPS: tl.constexpr):
    result = ()
    power = odds
    for m in tl.static_range(K):
        more = power
        if GROUPS > 0:
            more = tl.sum(tl.sum(by_group(power, ALIGN, GROUPS), 3), 1)
        result = result + (sums[FIRST + m] + more,)
        power *= odds
    return result


# --- a row a thread --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _finish(
    read_ptr,  # (rows, 1 + COUNT + sum of KS)
    target_ptr,  # (rows,)
    loss_ptr,  # (rows,), written
    table_ptr,  # (rows, len(KS) + sum of KS), written
    places_ptr,  # (rows, COUNT + 1), its last column written
    slopes_ptr,  # (rows, COUNT + 1), written
    rows, classes, ignore_index, tau, margin,
    KS: tl.constexpr, STARTS: tl.constexpr, WEIGHTS: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    row = row.to(tl.int64)
    record = read_ptr + row * (1 + COUNT + STARTS[len(KS)])
    mine = tl.load(record, mask=used, other=0.0)
    best = _loaded(record + 1, used, COUNT)
    bad = wrong | (used & (((best[0] < float("inf")) == 0) | ((mine < float("inf")) == 0)))

    loss = tl.zeros((ROWS,), tl.float32)
    pull = tl.zeros((ROWS,), tl.float32)
    slopes = _zeros(mine, COUNT)
    table = table_ptr + row * (len(KS) + STARTS[len(KS)])
    for i in tl.static_range(len(KS)):
        sums = _loaded(record + 1 + COUNT + STARTS[i], used, KS[i])
        term, slope, slopes = _one_k(
            best, sums, mine, used, bad, inside, table + i + STARTS[i], slopes, WEIGHTS[i], tau, margin, KS[i], COUNT
        )
        loss += term
        pull -= slope
    tl.store(loss_ptr + row, tl.where(bad, float("nan"), tl.where(used, loss, 0.0)), mask=inside)
    at = row * (COUNT + 1)
    for j in tl.static_range(COUNT):
        tl.store(slopes_ptr + at + j, slopes[j], mask=inside)
    pull = tl.where(mine == float("-inf"), 0.0, pull)
    tl.store(slopes_ptr + at + COUNT, tl.where(bad, float("nan"), pull), mask=inside)
    tl.store(places_ptr + at + COUNT, tl.where(used, target, -1), mask=inside)


@triton.jit
def _one_k(
    best, sums, mine, used, bad, inside, table, slopes, weight, tau, margin, K: tl.constexpr, COUNT: tl.constexpr
):
    """The weighted loss of one k, minus its derivative by x_y, and the kept classes' slopes with its share added."""
    rate = 1.0 / (K * tau)
    absent = best[K - 1] == float("-inf")  # y cannot be missed
    live = used & (bad == 0) & (absent == 0)
    center = tl.where(live, best[K - 1], 0.0)
    odds = _odds(best, center, rate, live, COUNT)
    tail = _newton_identities(_tail(sums, odds, live, K, COUNT), K)
    head = _trials(odds, K)
    full = _multiplied(tail, head, 0, K, K)
    inverse, inverse_less = 1.0 / full[K], 1.0 / full[K - 1]
    gap = tl.log((full[K] * inverse_less).to(tl.float32)) + (center - mine) * rate + margin / tau
    term, slope, told = outcome(gap, absent, live, bad, mine, weight, tau, K)
    up, down = told * inverse, told * inverse_less

    series = _left_out(full, up, down, -1.0, K)
    tl.store(table, center, mask=inside)
    for m in tl.static_range(K):
        tl.store(table + 1 + m, series[m].to(tl.float32), mask=inside)
    return term, slope, _with_slopes(slopes, odds, head, tail, series, up, down, K, COUNT)


@triton.jit
def outcome(gap, absent, live, bad, mine, weight, tau, k):
    """The weighted loss, minus its derivative by x_y, and the latter with NaN for bad rows."""
    term = tl.where(absent, 0.0, weight * tau * softplus(tl.where(absent, 0.0, gap)))
    term = tl.where(mine == float("-inf"), float("inf"), term)
    slope = tl.where(live, weight / k / (1.0 + tl.exp(-gap)), 0.0)
    return term, slope, tl.where(bad, float("nan"), slope)


@triton.jit
def _odds(best, center, rate, live, COUNT: tl.constexpr):
    """Of every kept score min(w, 1 / w), w = exp(r (x - center)): up to the k-th that is 1 / w, behind it w."""
    odds = ()
    for j in tl.static_range(COUNT):
        odds = odds + (tl.exp(-tl.abs(tl.where(live, best[j], 0.0) - center) * rate),)
    return odds


@triton.jit
def _tail(sums, odds, live, K: tl.constexpr, COUNT: tl.constexpr):
    """The power sums relative to the k-th score, those of kept scores behind it included, float64."""
    result = ()
    for m in tl.static_range(1, K + 1):
        total = _whole_power(odds[COUNT - 1], m) * tl.where(live, sums[m - 1], 0.0).to(tl.float64)
        for j in tl.static_range(K, COUNT):
            total += _whole_power(odds[j], m)
        result = result + (total,)
    return result


@triton.jit
def _whole_power(number, M: tl.constexpr):
    number = number.to(tl.float64)
    power = number
    for _ in tl.static_range(1, M):
        power *= number
    return power


@triton.jit
def _newton_identities(sums, K: tl.constexpr):
    """e_0..e_K from the power sums p_1..p_K: e_m is the mean of (-1)^(i-1) e_{m-i} p_i over i = 1..m."""
    known = (tl.zeros_like(sums[0]) + 1.0,)
    for m in tl.static_range(1, K + 1):
        total = tl.zeros_like(sums[0])
        for i in tl.static_range(1, m + 1):
            total += known[m - i] * (sums[i - 1] if i % 2 == 1 else -sums[i - 1])
        known = known + (total * (1.0 / m),)
    return known


@triton.jit
def _trials(odds, K: tl.constexpr):
    """P and 1 - P of the k largest scores, alternating, float64; rounding P scales all coefficients alike."""
    trials = ()
    for j in tl.static_range(K):
        success = (1.0 / (1.0 + odds[j])).to(tl.float64)
        trials = trials + (success, odds[j].to(tl.float64) * success)
    return trials


@triton.jit
def _multiplied(counts, trials, FIRST: tl.constexpr, LAST: tl.constexpr, K: tl.constexpr):
    """Pr[S = 0..K] with the trials from FIRST to LAST - 1 added."""
    for j in tl.static_range(FIRST, LAST):
        more = (counts[0] * trials[2 * j + 1],)
        for m in tl.static_range(1, K + 1):
            more = more + (counts[m] * trials[2 * j + 1] + counts[m - 1] * trials[2 * j],)
        counts = more
    return counts


@triton.jit
def _left_out(counts, up, down, SIGN: tl.constexpr, K: tl.constexpr):
    """SIGN^m (counts[K-1-m] up - counts[K-2-m] down), m = 0..K-1."""
    result = ()
    for m in tl.static_range(K):
        term = counts[K - 1 - m] * up
        if m < K - 1:
            term -= counts[K - 2 - m] * down
        result = result + (term * SIGN if m % 2 == 1 else term,)
    return result


@triton.jit
def _with_slopes(slopes, odds, head, tail, series, up, down, K: tl.constexpr, COUNT: tl.constexpr):
    """The k largest are each left out by those before it and those behind it; the others are on the polynomial."""
    behind = _left_out(tail, up, down, 1.0, K)
    result = ()
    for back in tl.static_range(K):
        before = _multiplied((tl.zeros_like(tail[0]) + 1.0,) + _zeros(tail[0], K), head, 0, K - 1 - back, K)
        total = before[0] * behind[0]
        for m in tl.static_range(1, K):
            total += before[m] * behind[m]
        total *= head[2 * (K - 1 - back)]
        result = (slopes[K - 1 - back] + total.to(tl.float32),) + result
        behind = _one_more_behind(behind, head, K - 1 - back, K)
    for j in tl.static_range(K, COUNT):
        value = series[K - 1]
        for m in tl.static_range(1, K):
            value = value * odds[j] + series[K - 1 - m]
        result = result + (slopes[j] + (value * odds[j]).to(tl.float32),)
    return result


@triton.jit
def _one_more_behind(behind, trials, j: tl.constexpr, K: tl.constexpr):
    result = ()
    for m in tl.static_range(K):
        more = behind[m] * trials[2 * j + 1]
        if m < K - 1:
            more += behind[m + 1] * trials[2 * j]
        result = result + (more,)
    return result


@triton.jit
def _loaded(pointers, mask, COUNT: tl.constexpr):
    numbers = ()
    for j in tl.static_range(COUNT):
        numbers = numbers + (tl.load(pointers + j, mask=mask, other=0.0),)
    return numbers


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad: Tensor, scores: Tensor, target: Tensor, options: Options, ignore_index: int, saved: tuple[Tensor, ...]
) -> Tensor:
    """grad * d loss / d scores."""
    ks = options.ks
    rows, classes = scores.shape
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    tiling = common.elementwise(classes)
    common.launch(
        _backward, tiling.programs(rows) * common.tiles(classes, tiling),
        grad, scores, target, *saved, result,
        rows, classes, *scores.stride(), grad.stride(0), ignore_index, float(options.tau),
        KS=tuple(ks), STARTS=tuple(accumulate(ks, initial=0)), COUNT=ks[-1] + 1,
        **common.tile_constants(tiling, scores, ks[-1] + 1),
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_ptr,  # (rows,)
    scores_ptr,  # (rows, classes)
    target_ptr,  # (rows,)
    table_ptr,  # (rows, len(KS) + sum of KS)
    places_ptr,  # (rows, COUNT)
    slopes_ptr,  # (rows, COUNT)
    result_ptr,  # (rows, classes), written
    rows, classes, row_stride, class_stride, grad_stride, ignore_index, tau,
    KS: tl.constexpr, STARTS: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    classes = aligned(classes, ALIGN)
    row, start = tile_of_program(classes, ROWS, BLOCK)
    columns = start + tl.arange(0, BLOCK)
    inside = row < rows
    _, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    row = row.to(tl.int64)
    grad = tl.load(grad_ptr + row * grad_stride, mask=used, other=0.0).to(tl.float32)
    grad = tl.where(wrong, float("nan"), grad)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    x = load_tile(starts, columns, class_stride, classes, used)
    slopes = tl.zeros((ROWS, BLOCK), tl.float32)
    table = table_ptr + row * (len(KS) + STARTS[len(KS)])
    for i in tl.static_range(len(KS)):
        slopes += _polynomial(table + i + STARTS[i], x, grad, used, tau, KS[i])
    slopes = tl.where(wrong[:, None], float("nan"), slopes)
    results = row_pointers(result_ptr, row, classes)
    store_tile(results, columns, classes, inside, slopes)
    patch_tile(results, start, places_ptr, slopes_ptr, grad, row, used, COUNT, LANES, BLOCK)


@triton.jit
def _polynomial(table, x, grad, used, tau, K: tl.constexpr):
    """grad times the polynomial in w; w stays at 1 for the larger scores, which are overwritten."""
    center = tl.load(table, mask=used, other=0.0)[:, None]
    odds = tl.exp2(tl.minimum(x - center, 0.0) * (1.4426950408889634 / (K * tau)))
    value = (tl.load(table + K, mask=used, other=0.0) * grad)[:, None] + tl.zeros_like(x)
    for m in tl.static_range(1, K):
        value = value * odds + (tl.load(table + K - m, mask=used, other=0.0) * grad)[:, None]
    return value * odds
