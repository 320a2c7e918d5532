"""The hinge losses and the truncated entropy in Triton: the formulas of `topk.losses.hinge`, in one read forward.

All but calibrated select among the wrong classes. The scan also adds up the exponentials of what it does not select,
which is what entropy needs. Slopes live on the selected classes and on y; only entropy has a field besides, the
exponentials of the other classes. Backward is elementwise, a program a tile. Rows that are long and few are split over
programs by `parts`.

Bytes moved a row, with n classes of s bytes and w = k + 1 places (k + 2 for calibrated): forward reads n s and writes
8 w + 16; backward reads n s for entropy, nothing else for the others, and writes n s.
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
    softplus,
)
from topk.kernels.parts import scanned, split
from topk.kernels.patched import patched_exponentials
from topk.losses.hinge import VARIANTS, Options


def _depth(options: Options) -> int:
    return options.ks[-1] + (1 if options.variant == "calibrated" else 0)


def saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    """The classes with a slope of their own (-1: none), y last, their slopes, and (t, c, 0): slope c exp(x - t)."""
    width = _depth(options) + 1
    return ((rows, width), torch.int32), ((rows, width), None), ((rows, 3), None)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, options: Options, ignore_index: int) -> tuple[Tensor, ...]:
    """loss (rows,) and what `saved` names."""
    rows, classes = scores.shape
    places, slopes, field = common.allocate(scores, saved(rows, classes, options))
    loss = scores.new_empty(rows, dtype=torch.float32)
    depth = _depth(options)
    target = target.contiguous()
    tiling = common.whole_rows(classes)
    pieces, number, constants = split(
        scores, target, ignore_index, tiling, common.whole_row_constants(tiling, scores, depth + 1), COUNT=depth,
        LEAVES_OUT=options.variant != "calibrated", CENTRED=False, REST=options.variant == "entropy",
    )  # fmt: skip
    common.launch(
        _forward, tiling.programs(rows),
        scores, target, loss, places, slopes, field, pieces,
        rows, classes, *scores.stride(), ignore_index, float(options.margin), number,
        TERMS=len(options.ks), KS=tuple(options.ks), WEIGHTS=tuple(options.weights), VARIANT=options.variant,
        COUNT=depth, **constants,
    )  # fmt: skip
    return loss, places, slopes, field


@triton.jit(do_not_specialize=["rows", "number"])
def _forward(
    scores_ptr, target_ptr, loss_ptr, places_ptr, slopes_ptr, field_ptr, pieces_ptr,
    rows, classes, row_stride, class_stride, ignore_index, margin, number,
    TERMS: tl.constexpr, KS: tl.constexpr, WEIGHTS: tl.constexpr, VARIANT: tl.constexpr, COUNT: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr, GROUPS: tl.constexpr,
    ALIGN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    classes = aligned(classes, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    mine = tl.load(starts + target.to(tl.int64) * class_stride, mask=used, other=float("-inf")).to(tl.float32)
    impossible = mine == float("-inf")
    entropy: tl.constexpr = VARIANT == "entropy"
    left_out = None if VARIANT == "calibrated" else target
    scores, found, rest, _, _ = scanned(
        pieces_ptr, number, row, starts, class_stride, classes, used, left_out, None,
        ROWS, BLOCK, COUNT, LANES, ALIGN, GROUPS, STREAMS, entropy, PARTS,
    )  # fmt: skip
    lanes = tl.arange(0, LANES)[None, :]
    t = finite_or_zero(lane(scores, lanes, COUNT - 1))

    loss = tl.zeros((ROWS,), tl.float32)
    slopes = tl.zeros((ROWS, LANES), tl.float32)
    lead = tl.where(scores == float("-inf"), float("-inf"), scores - mine[:, None])
    for i in tl.static_range(TERMS):
        term, slope = _term(scores, lanes, lead, found < target[:, None], mine, rest, t, margin, VARIANT, KS[i])
        weight = WEIGHTS[i]
        loss += weight * term
        slopes += weight * slope
    scale = tl.zeros((ROWS,), tl.float32)
    on_mine = -tl.sum(slopes, 1)
    if entropy:
        scale = lane(slopes, lanes, COUNT - 1)
        on_mine -= scale * rest
    on_mine = tl.where(impossible, 0.0, on_mine)

    bad = wrong | ((lane(scores, lanes, 0) < float("inf")) == 0) | (used & ((mine < float("inf")) == 0))
    loss = tl.where(impossible, float("inf"), loss)
    loss = tl.where(bad, float("nan"), tl.where(used, loss, 0.0))
    scale = tl.where(bad, float("nan"), scale)

    # y takes the lane after the selected ones, unless it is among them
    is_mine = (found == target[:, None]) & (lanes < COUNT)
    elsewhere = (tl.max(is_mine.to(tl.int32), 1) > 0) | impossible
    slopes += tl.where(is_mine, on_mine[:, None], 0.0)
    last = lanes == COUNT
    places = tl.where(last, tl.where(elsewhere, -1, target)[:, None], tl.where(found < classes, found, -1))
    slopes = tl.where(bad[:, None], float("nan"), tl.where(last, on_mine[:, None], slopes))

    inside = row < rows
    tl.store(loss_ptr + row, loss, mask=inside)
    kept = inside[:, None] & (lanes <= COUNT)
    offsets = row.to(tl.int64)[:, None] * (COUNT + 1) + lanes
    tl.store(places_ptr + offsets, places, mask=kept)
    tl.store(slopes_ptr + offsets, slopes, mask=kept)
    at = field_ptr + row.to(tl.int64) * 3
    tl.store(at, t, mask=inside)
    tl.store(at + 1, scale, mask=inside)
    tl.store(at + 2, tl.zeros((ROWS,), tl.float32), mask=inside)


@triton.jit
def _term(scores, lanes, lead, lower, mine, rest, t, margin, VARIANT: tl.constexpr, K: tl.constexpr):
    """The loss for one k (ROWS,), and its slopes on the selected classes (ROWS, LANES)."""
    if VARIANT == "entropy":
        loss, slopes = _entropy_term(scores, lanes, mine, rest, t, K)
    elif VARIANT == "alpha":
        loss, slopes = _alpha_term(lead + margin, lanes, lower, K)
    elif VARIANT == "beta":
        loss, slopes = _beta_term(lead + margin, lanes, K)
    elif VARIANT == "smooth_limit":
        loss, slopes = _single_term(lead / K + margin, lanes, K - 1, 1.0 / K)
    elif VARIANT == "kth":
        loss, slopes = _single_term(lead + margin, lanes, K - 1, 1.0)
    else:
        loss, slopes = _single_term(lead + margin, lanes, K, 1.0)
    return loss, slopes


@triton.jit
def _single_term(gap, lanes, j: tl.constexpr, rate):
    """relu of the gap in lane j, and its slopes."""
    chosen = (lanes == j) & (gap > 0.0)
    return tl.sum(tl.where(chosen, gap, 0.0), 1), tl.where(chosen, rate, 0.0)


@triton.jit
def _alpha_term(z, lanes, lower, K: tl.constexpr):
    """relu of the mean of the k largest z, from the k largest wrong ones: z_y = 0 takes the last place if it is due."""
    last = lane(z, lanes, K - 1)
    due = (last[:, None] > 0.0) | ((last[:, None] == 0.0) & lower)
    chosen = (lanes < K - 1) | ((lanes == K - 1) & due)
    mean = tl.sum(tl.where(chosen, z, 0.0), 1) / K
    mean = tl.where(last == float("-inf"), 0.0, tl.maximum(mean, 0.0))
    return mean, tl.where(chosen & (mean > 0.0)[:, None], 1.0 / K, 0.0)


@triton.jit
def _beta_term(z, lanes, K: tl.constexpr):
    """Mean of relu over the k largest z: z_y = 0 adds nothing wherever it stands."""
    chosen = (lanes < K) & (z > 0.0)
    return tl.sum(tl.where(chosen, z, 0.0), 1) / K, tl.where(chosen, 1.0 / K, 0.0)


@triton.jit
def _entropy_term(scores, lanes, mine, rest, t, K: tl.constexpr):
    """softplus(o - x_y), o the log-sum-exp of the wrong classes from the k-th on, and the slopes on the selected."""
    kth = lane(scores, lanes, K - 1)
    origin = finite_or_zero(kth)
    exponentials = tl.where(lanes >= K - 1, tl.exp(tl.minimum(scores - origin[:, None], 0.0)), 0.0)
    s = tl.sum(exponentials, 1) + rest * tl.exp(tl.minimum(t - origin, 0.0))
    some = kth > float("-inf")
    s = tl.where(some, s, 1.0)
    gap = tl.where(some, origin - mine + tl.log(s), float("-inf"))
    missed = tl.where(some, 1.0 / (1.0 + tl.exp(-gap)), 0.0)
    return softplus(gap), exponentials * (missed / s)[:, None]


# --- backward --------------------------------------------------------------------------------------------------------


def backward(grad: Tensor, scores: Tensor, target: Tensor, options: Options, ignore_index: int, saved: Saved) -> Tensor:
    """grad * d loss / d scores."""
    return patched_exponentials(grad, scores, target, ignore_index, saved, reads=options.variant == "entropy")


def examples(rows: int, classes: int, device: torch.device) -> list[tuple[Saved, Options]]:
    """Calls that reach every path: all variants, one k and several."""
    each = [Options([3], [1.0], variant, 1.0) for variant in VARIANTS]
    return [((), options) for options in [*each, Options([1, 4], [0.5, 0.5], "entropy", 1.0)]]
