"""The backward pass that several losses share: an exponential field, overwritten on a few classes of each row.

    gradient_j = grad (c exp(x_j - m) - f),   and grad slope_i at the classes that the loss treats one by one.

A program is a tile, so rows of any length keep the whole device busy. Bytes a row, with n classes of s bytes and w
places: reads n s (nothing for a field of zeros), a tile reads 8 w + 24, writes n s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import (
    Saved,
    aligned,
    exponential,
    load_tile,
    patch_tile,
    product,
    row_pointers,
    row_states,
    store_tile,
    tile_of_program,
)


def patched_exponentials(
    grad: Tensor, scores: Tensor, target: Tensor, ignore_index: int, saved: Saved, reads: bool = True
) -> Tensor:
    """A new contiguous tensor like the scores, from `saved`: places, slopes and field.

    places (rows, w): classes, each once, or -1 for none; slopes (rows, w); field (rows, 3): m, c and f. With `reads`
    off c and f are 0, or c is NaN for a row of NaN, and the scores are not looked at. Masked classes get 0, and so does
    every class whose slope is 0, or all but those patched where c is 0, however large grad is.
    """
    places, slopes, field = saved
    rows, classes = scores.shape
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    tiling = common.elementwise(classes)
    common.launch(
        _patched, tiling.programs(rows) * common.tiles(classes, tiling),
        grad, scores, target.contiguous(), places, slopes, field, result,
        rows, classes, *scores.stride(), grad.stride(0), ignore_index,
        COUNT=places.shape[1], READS=reads,
        **common.tile_constants(tiling, scores, places.shape[1]),
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["rows"])
def _patched(
    grad_ptr, scores_ptr, target_ptr, places_ptr, slopes_ptr, field_ptr, result_ptr,
    rows, classes, row_stride, class_stride, grad_stride, ignore_index,
    COUNT: tl.constexpr, READS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    classes = aligned(classes, ALIGN)
    row, start = tile_of_program(classes, ROWS, BLOCK)
    inside = row < rows
    _, used, wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    grad = tl.load(grad_ptr + row.to(tl.int64) * grad_stride, mask=used, other=0.0).to(tl.float32)
    at = field_ptr + row.to(tl.int64) * 3
    scale = tl.where(wrong, float("nan"), product(grad, tl.load(at + 1, mask=used, other=0.0)))

    columns = start + tl.arange(0, BLOCK)
    if READS:
        m = tl.load(at, mask=used, other=0.0)
        floor = grad * tl.load(at + 2, mask=used, other=0.0)
        starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
        x = load_tile(starts, columns, class_stride, classes, used)
        slopes = scale[:, None] * exponential(x - m[:, None]) - tl.where(x > float("-inf"), floor[:, None], 0.0)
    else:
        slopes = tl.broadcast_to(scale[:, None], (ROWS, BLOCK))
    results = row_pointers(result_ptr, row, classes)
    store_tile(results, columns, classes, inside, slopes)
    patch_tile(results, start, places_ptr, slopes_ptr, grad, row, used, COUNT, LANES, BLOCK)
