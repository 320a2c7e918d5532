"""The smooth top-k SVM in Triton: rho of `topk.losses.smooth` at a cost that hardly depends on k.

k <= 6: power sums and Newton's identities, in `smooth_few`. Larger k, or several of which one is larger: from a few
nodes on a circle, all of it in float32, in this file. A row longer than a tile is sifted first (`smooth_sift`), so
that only the nodes read it a second time, and those not where all that was sifted out is small; its tilt is found
(`smooth_tilt`); nodes give Pr[S = k] and Pr[S = k - 1] (`smooth_circle`) and the slopes (`smooth_series`). Several k
are taken one after the other.

Bytes moved a row for a k > 6, with n classes of s bytes: forward reads n s (of a streamed row up to once more a k; of a
k > 1024, which no tile can be sifted for, some four times) and writes 204 for every k; backward reads n s, a tile
reads what forward wrote, and writes n s.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common, smooth_few
from topk.kernels.common import (
    Saved,
    SavedShape,
    aligned,
    load_tile,
    row_pointers,
    row_states,
    store_tile,
    tile_of_program,
)
from topk.kernels.smooth_circle import chances, nodes_of
from topk.kernels.smooth_few import outcome
from topk.kernels.smooth_series import TERMS, slopes_of, store_series
from topk.kernels.smooth_sift import chosen, sift, tile_of
from topk.kernels.smooth_tilt import balance, extremes, near_kth
from topk.losses.smooth import Options

_LONGEST_SIFTED = 8192  # scores in the tile that a row is sifted into
_RECORD = tl.constexpr(3 + 2 * TERMS.value)


def _few(options: Options) -> bool:
    return options.ks[-1] <= smooth_few.LARGEST


def saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    """For every k a score close to the k-th, the shift of the log-odds, the number of terms and two series; y's slope.

    Of few ks, what `smooth_few` saves.
    """
    if _few(options):
        return smooth_few.saved(rows, options.ks)
    return (((rows, len(options.ks) * _RECORD.value + 1), None),)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, options: Options, ignore_index: int) -> tuple[Tensor, ...]:
    """loss (rows,) and what `saved` names."""
    target, ks = target.contiguous(), options.ks
    if _few(options):
        return smooth_few.forward(scores, target, options, ignore_index)
    rows, classes = scores.shape
    (table,) = common.allocate(scores, saved(rows, classes, options))
    loss = scores.new_empty(rows, dtype=torch.float32)
    tiling = _smaller(common.whole_rows(classes), scores, ks[-1])
    common.launch(
        _forward, tiling.programs(rows),
        scores, target, loss, table,
        rows, classes, *scores.stride(), ignore_index, float(options.tau), float(options.margin),
        KS=tuple(ks), WEIGHTS=tuple(options.weights), KEEP=_kept(ks[-1]) if _sifts(tiling, ks[-1]) else 0,
        LANES=8 * triton.next_power_of_2(len(ks)), ROWS=tiling.rows, BLOCK=tiling.block, STREAMS=tiling.streams,
        ALIGN=common.alignment(scores), warps=tiling.warps,
    )  # fmt: skip
    return loss, table


def _smaller(tiling: common.Tiling, scores: Tensor, k: int) -> common.Tiling:
    """Fewer rows a program, since each has a tile of nodes too, and more classes a thread, since reductions cost most.

    In a stream, tiles for which the compiler spills no register, 16 scores a thread or 8; and longer ones for a k so
    large that a row could not be sifted into those.
    """
    if tiling.streams:
        together = common.alignment(scores)
        block = max(16, tiling.block // (2 if together > 1 else 1))
        wanted = triton.next_power_of_2(4 * _kept(k))
        block = wanted if block < wanted <= _LONGEST_SIFTED else block
        return replace(tiling, block=block, warps=min(16, max(1, block // (32 * (8 if together == 8 else 16)))))
    rows = max(1, min(tiling.rows, 128 // tiling.block, 4))
    return replace(tiling, rows=rows, warps=max(1, rows * tiling.block // 1024))


def _kept(k: int) -> int:
    """How many of the largest scores a sifted row keeps: twice as many as can all have P > 1/2."""
    return 2 * k


def _sifts(tiling: common.Tiling, k: int) -> bool:
    """Whether one read of a row leaves its largest scores in a tile; else the row is read for every question asked."""
    return tiling.streams and 4 * _kept(k) <= tiling.block


@triton.jit(do_not_specialize=["rows"])
def _forward(
    scores_ptr,  # (rows, classes)
    target_ptr,  # (rows,)
    loss_ptr,  # (rows,), written
    table_ptr,  # (rows, len(KS) * _RECORD + 1), written
    rows, classes, row_stride, class_stride, ignore_index, tau, margin,
    KS: tl.constexpr, WEIGHTS: tl.constexpr, KEEP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STREAMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    classes = aligned(classes, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    mine = tl.load(starts + target.to(tl.int64) * class_stride, mask=used, other=0.0).to(tl.float32)
    source = (starts, class_stride, classes, used, target)
    reads_again: tl.constexpr = STREAMS and KEEP == 0
    limit = None
    sums = None
    if KEEP > 0:
        x, limit, sums, others = sift(source, tau, KS, KEEP, LANES, ROWS, BLOCK)
    else:
        x = tile_of(None, source, 0, BLOCK, True)
    top, bottom, possible, total = extremes(x, source, ROWS, BLOCK, reads_again)
    if KEEP > 0:
        possible += others
    bad = wrong | ((top < float("inf")) == 0) | ((mine < float("inf")) == 0)

    lanes = tl.arange(0, LANES)[None, :]
    loss = tl.zeros((ROWS,), tl.float32)
    pull = tl.zeros((ROWS,), tl.float32)
    record = table_ptr + row.to(tl.int64) * (len(KS) * _RECORD + 1)
    for i in range(len(KS)):
        k = chosen(KS, i)
        rate = 1.0 / (k * tau)
        absent = possible < k  # y cannot be missed
        live = used & (bad == 0) & (absent == 0)
        low, high = tl.where(live, bottom, 0.0), tl.where(live, top, 0.0)
        center, spread = near_kth(x, source, low, high, rate, k, BLOCK, reads_again)
        rest = None
        average = None
        if KEEP > 0:
            rest = tl.where(lanes // 8 == i, sums, 0.0)
        else:
            average = (total / tl.maximum(possible, 1).to(tl.float32) - center) * rate
        shift, variance, signed, heads = balance(
            x, source, center, spread, rate, possible, average, limit, rest, lanes % 8, live, k, ROWS, BLOCK,
            reads_again,
        )  # fmt: skip
        real, imag, heads, circle, count = nodes_of(
            signed, heads, source, center, shift, variance, rate, limit, rest, lanes % 8, k, ROWS, BLOCK, STREAMS
        )
        chance, chance_less, node_weight = chances(real + 1.0, imag, heads - k, circle, count, live)
        gap = tl.log(chance / chance_less) - shift + (center - mine) * rate + margin / tau
        term, slope, told = outcome(gap, absent, live, bad, mine, chosen(WEIGHTS, i), tau, k)
        tl.store(record, center, mask=inside)
        tl.store(record + 1, shift, mask=inside)
        store_series(
            record + 2, inside, real + 1.0, imag, heads - k, circle, count, node_weight, variance,
            told / chance, told / chance_less, k, ROWS,
        )  # fmt: skip
        record += _RECORD
        loss += term
        pull -= slope
    tl.store(loss_ptr + row, tl.where(bad, float("nan"), tl.where(used, loss, 0.0)), mask=inside)
    pull = tl.where(mine == float("-inf"), 0.0, pull)
    tl.store(record, tl.where(bad, float("nan"), pull), mask=inside)


# --- backward --------------------------------------------------------------------------------------------------------


def backward(grad: Tensor, scores: Tensor, target: Tensor, options: Options, ignore_index: int, saved: Saved) -> Tensor:
    """grad * d loss / d scores."""
    target = target.contiguous()
    if _few(options):
        return smooth_few.backward(grad, scores, target, options, ignore_index, saved)
    rows, classes = scores.shape
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    tiling = common.elementwise(classes)
    if tiling.rows > 8:  # of more rows the coefficients would not fit the registers
        tiling = replace(tiling, rows=8, warps=max(1, 8 * tiling.block // 512))
    common.launch(
        _backward, tiling.programs(rows) * common.tiles(classes, tiling),
        grad, scores, target, *saved, result,
        rows, classes, *scores.stride(), grad.stride(0), ignore_index, float(options.tau),
        KS=tuple(options.ks), ROWS=tiling.rows, BLOCK=tiling.block, ALIGN=common.alignment(scores), warps=tiling.warps,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_ptr,  # (rows,)
    scores_ptr,  # (rows, classes)
    target_ptr,  # (rows,)
    table_ptr,  # (rows, len(KS) * _RECORD + 1)
    result_ptr,  # (rows, classes), written
    rows, classes, row_stride, class_stride, grad_stride, ignore_index, tau,
    KS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    classes = aligned(classes, ALIGN)
    row, start = tile_of_program(classes, ROWS, BLOCK)
    columns = start + tl.arange(0, BLOCK)
    inside = row < rows
    target, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    grad = tl.load(grad_ptr + row.to(tl.int64) * grad_stride, mask=used, other=0.0).to(tl.float32)
    grad = tl.where(wrong, float("nan"), grad)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    x = load_tile(starts, columns, class_stride, classes, used)
    slopes = tl.zeros((ROWS, BLOCK), tl.float32)
    record = table_ptr + row.to(tl.int64) * (len(KS) * _RECORD + 1)
    for i in range(len(KS)):
        slopes += slopes_of(record, x, used, tau, chosen(KS, i), ROWS, BLOCK)
        record += _RECORD
    pull = tl.load(record, mask=used, other=0.0)
    slopes = tl.where(columns[None, :] == target[:, None], pull[:, None], slopes) * grad[:, None]
    store_tile(row_pointers(result_ptr, row, classes), columns, classes, inside, slopes)


def examples(rows: int, classes: int, device: torch.device) -> list[tuple[Saved, Options]]:
    """Calls that reach every path: one small k, one that spreads over many classes, several at once."""
    return [((), Options([5], [1.0], 1.0, 1.0)), ((), Options([1, min(20, classes)], [0.25, 0.75], 0.5, 0.0))]
