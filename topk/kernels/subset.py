"""Inclusion probabilities and log e_k in Triton: the smooth loss's kernel for large k, with another read-out.

That loss has the slopes of log Pr[S = k] - log Pr[S = k - 1] as a short series a row, from a few nodes on a circle. Of
the first logarithm alone they are pi_i - P_i, so the same series tells pi where P is known. With the tilt lambda,

    log e_k = -k log lambda + sum of log(1 + lambda w) + log Pr[S = k].

Every k is served so, and each row may have a k and a temperature of its own. Bytes a row, with n scores of s bytes:
reads n s, of a row longer than a tile three times, and writes 4 n. The derivative of pi, a covariance, is left to
torch: a series of dual numbers would be a kernel of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import aligned, exponential, finite_or_zero, row_pointers, store_tile
from topk.kernels.smooth import _RECORD, _kept, _sifts, _smaller
from topk.kernels.smooth_circle import SPREAD, chances, nodes_of
from topk.kernels.smooth_series import slopes_of, store_series
from topk.kernels.smooth_sift import sift, tile_of
from topk.kernels.smooth_tilt import balance, extremes, near_kth


def forward(
    scores: Tensor,  # (rows, n)
    k: Tensor,  # (rows,), whole numbers
    temperature: Tensor,  # (rows,)
    most: int,  # the largest k
) -> tuple[Tensor, Tensor, Tensor]:
    """pi (rows, n), log e_k(exp u) (rows,) of u = (x - pivot) / T, and the pivot (rows,)."""
    rows, n = scores.shape
    mask = torch.empty_like(scores, dtype=torch.float32, memory_format=torch.contiguous_format)
    total, pivot = torch.empty_like(temperature), torch.empty_like(temperature)
    record = scores.new_empty((rows, _RECORD.value), dtype=torch.float32)
    tiling = _smaller(common.whole_rows(n), scores, most)
    # To sift, power sums need one temperature for the tile's rows: a row that streams has its tile to itself.
    common.launch(
        _forward, tiling.programs(rows),
        scores, k.to(torch.int32).contiguous(), temperature.contiguous(), record, mask, total, pivot,
        rows, n, *scores.stride(),
        KEEP=_kept(most) if _sifts(tiling, most) else 0, ROWS=tiling.rows, BLOCK=tiling.block,
        STREAMS=tiling.streams, ALIGN=common.alignment(scores), warps=tiling.warps,
    )  # fmt: skip
    return mask, total, pivot


def trial(scores: Tensor) -> None:
    """Launches that reach every path: rows that can be sifted and, where they are long, those of a k too large."""
    one = torch.ones_like(scores[:, 0], dtype=torch.float32)
    for most in (5, 5000):
        forward(scores, one, one, most)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    scores_ptr,  # (rows, n)
    k_ptr,  # (rows,)
    temperature_ptr,  # (rows,)
    record_ptr,  # (rows, _RECORD), written
    mask_ptr,  # (rows, n), written
    total_ptr,  # (rows,), written
    pivot_ptr,  # (rows,), written
    rows, n, row_stride, class_stride,
    KEEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    n = aligned(n, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    nobody = tl.full((ROWS,), -1, tl.int32)
    source = (starts, class_stride, n, inside, nobody)
    wanted = tl.load(k_ptr + row, mask=inside, other=0)
    heat = tl.load(temperature_ptr + row, mask=inside, other=1.0)
    rate = 1.0 / tl.where(heat > 0.0, heat, 1.0)
    reads_again: tl.constexpr = STREAMS and KEEP == 0
    limit = None
    sums = None
    if KEEP > 0:
        x, limit, sums, sifted = sift(source, tl.sum(1.0 / rate, 0), (1,), KEEP, 8, ROWS, BLOCK)
    else:
        x = tile_of(None, source, 0, BLOCK, True)
    top, bottom, possible, scores_sum = extremes(x, source, ROWS, BLOCK, reads_again)
    if KEEP > 0:
        possible += sifted
    right = (top < float("inf")) & (heat > 0.0)
    full = possible <= wanted  # all that are possible are chosen
    live = inside & right & (full == 0) & (wanted > 0)
    k = tl.where(live, wanted, 1)

    center, gap = near_kth(
        x, source, tl.where(live, bottom, 0.0), tl.where(live, top, 0.0), rate, k, BLOCK, reads_again
    )
    average = None
    if KEEP == 0:
        average = (scores_sum / tl.maximum(possible, 1).to(tl.float32) - center) * rate
    shift, variance, signed, heads = balance(
        x, source, center, gap, rate, possible, average, limit, sums, tl.arange(0, 8)[None, :], live, k, ROWS, BLOCK,
        reads_again,
    )  # fmt: skip
    real, imag, heads, circle, count = nodes_of(
        signed, heads, source, center, shift, variance, rate, limit, sums, tl.arange(0, 8)[None, :], k, ROWS, BLOCK,
        STREAMS,
    )  # fmt: skip
    chance, _, weight = chances(real + 1.0, imag, heads - k, circle, count, live)
    record = record_ptr + row.to(tl.int64) * _RECORD
    tl.store(record, center, mask=inside)
    tl.store(record + 1, shift, mask=inside)
    store_series(
        record + 2, inside, real + 1.0, imag, heads - k, circle, count, weight, variance, 1.0 / chance,
        tl.zeros_like(chance), k, ROWS,
    )  # fmt: skip
    tl.debug_barrier()  # the series is read by other threads than those that wrote it

    pivot = tl.where(live, center, finite_or_zero(top))
    total = tl.where(live, tl.log(chance) - k.to(tl.float32) * shift, 0.0)
    chooses = inside & right & full & (wanted > 0)
    results = row_pointers(mask_ptr, row, n)
    for start in range(0, n if STREAMS else BLOCK, BLOCK):
        tile = tile_of(x, source, start, BLOCK, STREAMS)
        there = tile > float("-inf")
        log_odds = (tile - center[:, None]) * rate[:, None] + shift[:, None]
        odds = exponential(-tl.abs(log_odds))
        head = log_odds > 0.0
        chance_alone = tl.where(head, 1.0, odds) / (1.0 + odds)
        # A series in powers of the odds counts from 0 or from 1, one in P from P.
        base = tl.where((variance >= SPREAD)[:, None], chance_alone, head.to(tl.float32))
        share = base + slopes_of(record, tile, inside, 1.0 / rate, 1, ROWS, BLOCK)
        share = tl.where(live[:, None], share, (there & chooses[:, None]).to(tl.float32))
        share = tl.where(there, share, 0.0)
        store_tile(results, start + tl.arange(0, BLOCK), n, inside, tl.where(right[:, None], share, float("nan")))
        tilted = tl.maximum(log_odds, 0.0) + tl.log(1.0 + odds)
        settled = (tile - pivot[:, None]) * rate[:, None]
        term = tl.where(live[:, None], tilted, tl.where(chooses[:, None], settled, 0.0))
        total += tl.sum(tl.where(there, term, 0.0), 1)
    tl.store(total_ptr + row, tl.where(right, total, float("nan")), mask=inside)
    tl.store(pivot_ptr + row, pivot, mask=inside)
