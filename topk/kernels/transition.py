"""The top-k transition loss in Triton: the formulas of `topk.losses.transition`, in one read forward.

Forward takes the k + 1 largest scores and the exponentials of the others from one scan; that gives log-sum-exp, the
probability of the group, the weight a and with them the slopes on the k + 1 classes that differ from softmax. Several
k share the scan. Backward is elementwise, a program a tile: softmax, overwritten on those classes.

Bytes moved a row, with n classes of s bytes: forward reads n s and writes 8 (k + 1) + 16; backward reads n s, reads
what forward wrote once a tile, and writes n s.

Rows that are long and few are split over programs by `parts`, which is one more launch forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import (
    Saved,
    SavedShape,
    aligned,
    finite_or_zero,
    lane,
    row_pointers,
    row_states,
)
from topk.kernels.parts import scanned, split
from topk.kernels.patched import patched_exponentials
from topk.losses.transition import Options


def saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    """The classes whose slope is not softmax's (-1: none), their slopes, and (m, c, f): slope c exp(x - m) - f."""
    width = options.ks[-1] + 1
    return ((rows, width), torch.int32), ((rows, width), None), ((rows, 3), None)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(
    scores: Tensor, target: Tensor, options: Options, ignore_index: int, a: Tensor | None = None
) -> tuple[Tensor, ...]:
    """loss (rows,) and what `saved` names."""
    ks = options.ks
    rows, classes = scores.shape
    places, slopes, field = common.allocate(scores, saved(rows, classes, options))
    loss = scores.new_empty(rows, dtype=torch.float32)
    given = loss if a is None else a.to(torch.float32).contiguous()  # `loss`: anything, since it is not read
    target, count, smoothed = target.contiguous(), ks[-1] + 1, options.label_smoothing > 0.0
    tiling = common.whole_rows(classes)
    pieces, number, constants = split(
        scores, target, ignore_index, tiling, common.whole_row_constants(tiling, scores, count),
        COUNT=count, LEAVES_OUT=False, CENTRED=smoothed, REST=True,
    )  # fmt: skip
    common.launch(
        _forward, tiling.programs(rows),
        scores, target, given, loss, places, slopes, field, pieces,
        rows, classes, *scores.stride(), ignore_index, float(options.width), float(options.label_smoothing), number,
        TERMS=len(ks), KS=tuple(ks), WEIGHTS=tuple(options.weights), GIVEN=a is not None,
        SMOOTHED=smoothed, COUNT=count, **constants,
    )  # fmt: skip
    return loss, places, slopes, field


@triton.jit(do_not_specialize=["rows", "number"])
def _forward(
    scores_ptr, target_ptr, given_ptr, loss_ptr, places_ptr, slopes_ptr, field_ptr, pieces_ptr,
    rows, classes, row_stride, class_stride, ignore_index, width, smoothing, number,
    TERMS: tl.constexpr, KS: tl.constexpr, WEIGHTS: tl.constexpr, GIVEN: tl.constexpr, SMOOTHED: tl.constexpr,
    COUNT: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr,
    GROUPS: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    classes = aligned(classes, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    mine = tl.load(starts + target.to(tl.int64) * class_stride, mask=used, other=float("-inf")).to(tl.float32)
    origin = finite_or_zero(mine) if SMOOTHED else None
    scores, found, rest, total, possible = scanned(
        pieces_ptr, number, row, starts, class_stride, classes, used, None, origin,
        ROWS, BLOCK, COUNT, LANES, ALIGN, GROUPS, STREAMS, True, PARTS,
    )  # fmt: skip

    # softmax of the best: exp(x - m) / s, with m the largest score and t the last one kept
    lanes = tl.arange(0, LANES)[None, :]
    top = lane(scores, lanes, 0)
    m = finite_or_zero(top)
    t = finite_or_zero(lane(scores, lanes, COUNT - 1))
    exponentials = tl.exp(scores - m[:, None])
    s = tl.sum(exponentials, 1) + rest * tl.exp(t - m)
    s = tl.where(s > 0.0, s, 1.0)  # a row without any possible class
    p = exponentials / s[:, None]
    log_p_mine = mine - m - tl.log(s)

    # loss and corrections for every k
    loss = tl.zeros((ROWS,), tl.float32)
    on_mine = tl.zeros((ROWS,), tl.float32)
    left_to_ce = tl.zeros((ROWS,), tl.float32)
    full = tl.zeros((ROWS,), tl.float32)
    on_top = tl.zeros((ROWS, LANES), tl.float32)
    is_mine = found == target[:, None]
    for i in tl.static_range(TERMS):
        weight = WEIGHTS[i]
        if GIVEN:
            a = tl.load(given_ptr + row.to(tl.int64) * TERMS + i, mask=used, other=0.0)
        else:
            a = _weight_of_lead(mine, scores, lanes, width, KS[i])
        grouped, log_group, pull = _group(p, lanes, is_mine, weight * a, KS[i])
        loss -= grouped * log_group
        on_top -= pull
        on_mine += grouped - weight
        left_to_ce += weight * (1.0 - a)
        full += weight
    loss += tl.where(on_mine == 0.0, 0.0, on_mine * log_p_mine)
    floor = tl.zeros((ROWS,), tl.float32)
    if SMOOTHED:
        taken = smoothing * left_to_ce
        count = tl.maximum(possible, 1.0)
        loss -= taken * total / count
        on_mine += taken
        floor = tl.where(possible > 0.0, taken / count, 0.0)

    # rows that are not all finite
    impossible = mine == float("-inf")
    on_mine = tl.where(impossible, 0.0, on_mine)
    on_top = tl.where(impossible[:, None], 0.0, on_top)
    bad = wrong | ((top < float("inf")) == 0)
    loss = tl.where(impossible, float("inf"), loss)
    loss = tl.where(bad, float("nan"), tl.where(used, loss, 0.0))

    # slopes on the k largest, and in the last lane on y where it is none of them
    slopes = tl.where(scores > float("-inf"), p * (full[:, None] + on_top) - floor[:, None], 0.0)
    slopes += tl.where(is_mine, on_mine[:, None], 0.0)
    at_mine = tl.exp(log_p_mine) * full + on_mine - floor
    among = tl.max((is_mine & (lanes < COUNT - 1)).to(tl.int32), 1) > 0
    last = lanes == COUNT - 1
    elsewhere = (among | impossible)[:, None]
    places = tl.where(last, tl.where(elsewhere, -1, target[:, None]), found)
    slopes = tl.where(last, at_mine[:, None], slopes)

    inside = row < rows
    tl.store(loss_ptr + row, loss, mask=inside)
    kept = inside[:, None] & (lanes < COUNT)
    offsets = row.to(tl.int64)[:, None] * COUNT + lanes
    tl.store(places_ptr + offsets, places, mask=kept)
    tl.store(slopes_ptr + offsets, tl.where(bad[:, None], float("nan"), slopes), mask=kept)
    at = field_ptr + row.to(tl.int64) * 3
    tl.store(at, m, mask=inside)
    tl.store(at + 1, tl.where(bad, float("nan"), full / s), mask=inside)
    tl.store(at + 2, floor, mask=inside)


@triton.jit
def _weight_of_lead(mine, scores, lanes, width, K: tl.constexpr):
    """a = s^2 (3 - 2 s), s the lead of y over the (k + 1)-th score in widths, from 0 to 1; an impossible y has none."""
    s = tl.where(mine > float("-inf"), (mine - lane(scores, lanes, K)) / width, 0.0)
    s = tl.minimum(tl.maximum(s, 0.0), 1.0)
    return s * s * (3.0 - 2.0 * s)


@triton.jit
def _group(p, lanes, is_mine, weight, K: tl.constexpr):
    """The group's weight (ROWS,), 0 where y is not in it, log S, and what the group takes off p's factor in T."""
    inside = lanes < K
    hit = tl.max((inside & is_mine).to(tl.int32), 1) > 0
    grouped = tl.where(hit, weight, 0.0)
    s = tl.sum(tl.where(inside, p, 0.0), 1)
    s = tl.where(s > 0.0, s, 1.0)  # no possible class
    return grouped, tl.log(s), tl.where(inside, (grouped / s)[:, None], 0.0)


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad: Tensor, scores: Tensor, target: Tensor, options: Options, ignore_index: int, saved: Saved, *_: Tensor
) -> Tensor:
    """grad * d loss / d scores."""
    return patched_exponentials(grad, scores, target, ignore_index, saved)


def examples(rows: int, classes: int, device: torch.device) -> list[tuple[Saved, Options]]:
    """Calls that reach every path: one k and several, a read off the lead and given, with and without smoothing."""
    half = torch.full((rows, 2), 0.5, device=device)
    return [((), Options([3], [1.0], 1.0, 0.0)), ((half,), Options([1, 5], [0.25, 0.75], 1.0, 0.1))]
