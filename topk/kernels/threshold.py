"""The threshold masks in Triton: b such that the sum of F((x - b) / T) is k, and the rank-one derivative.

A row is read into a tile, or from memory again for every question asked of it. Newton steps start from where b would be
if the scores were normally distributed, which is close unless T is far below their spread; where they do not arrive, a
score near the k-th is bisected for, as for the smooth loss, and steps from there keep to a bracket.

Bytes a row, with n scores of s bytes: forward reads n s and writes 4 n; backward reads n s and the gradient, and writes
4 n. A row longer than a tile is read some five times in the place of one, and twice backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import aligned, finite_or_zero, load_tile, product, row_pointers, store_tile
from topk.kernels.smooth_sift import tile_of
from topk.kernels.smooth_tilt import near_kth
from topk.kernels.threshold_families import arrived, newton, normal_quantile, quantile, shares

_FAR = tl.constexpr(1e11)
_STEPS = tl.constexpr(6)  # from the guess; a row that takes more is bisected for
_MOST = tl.constexpr(40)

# --- launches --------------------------------------------------------------------------------------------------------


def forward(
    scores: Tensor,  # (rows, n)
    k: Tensor,  # (rows,)
    temperature: Tensor,  # (rows,)
    method: str,
    mask: Tensor | None = None,  # (rows, n), written
) -> tuple[Tensor, Tensor]:
    """anchor and (b - anchor) / T (rows,), as `topk.operators.threshold` has them."""
    rows, n = scores.shape
    anchor, level = torch.empty_like(temperature), torch.empty_like(temperature)
    tiling = common.whole_rows(n)
    common.launch(
        _forward, tiling.programs(rows),
        scores, k.contiguous(), temperature.contiguous(), anchor, level, mask,
        rows, n, *scores.stride(),
        METHOD=method, **_constants(tiling, scores),
    )  # fmt: skip
    return anchor, level


def backward(
    grad: Tensor,  # (rows, n), of the mask
    grad_offset: Tensor,  # (rows,), of b
    scores: Tensor,
    temperature: Tensor,
    offset: Tensor,  # (rows,), b - anchor
    anchor: Tensor,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the scores (rows, n), of k and of the temperature (rows,)."""
    rows, n = scores.shape
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    of_k, of_temperature = torch.empty_like(temperature), torch.empty_like(temperature)
    tiling = common.whole_rows(n)
    common.launch(
        _backward, tiling.programs(rows),
        grad, grad_offset.contiguous(), scores, temperature.contiguous(), offset, anchor, result, of_k, of_temperature,
        rows, n, *scores.stride(), *grad.stride(),
        METHOD=method, **_constants(tiling, scores),
    )  # fmt: skip
    return result, of_k, of_temperature


def _constants(tiling: common.Tiling, scores: Tensor) -> dict[str, Any]:
    """Half as many scores a thread as elsewhere, since a step holds several numbers for each."""
    return {
        "ROWS": tiling.rows, "BLOCK": tiling.block, "STREAMS": tiling.streams, "ALIGN": common.alignment(scores),
        "warps": min(16, 2 * tiling.warps),
    }  # fmt: skip


def trial(scores: Tensor) -> None:
    """Launches that reach every path."""
    one = torch.ones_like(scores[:, 0], dtype=torch.float32)
    grad = torch.ones_like(scores, dtype=torch.float32)
    for method in ("logistic", "sparse", "laplace", "gaussian"):
        anchor, level = forward(scores, one, one, method, torch.empty_like(grad))
        backward(grad, one, scores, one, level, anchor, method)


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _survey(x, source, origin, ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr):
    """The largest score (+inf also for NaN), the least above -inf, their number, mean less the origin, and variance."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    bottom = tl.full((ROWS,), float("inf"), tl.float32)
    possible = tl.zeros((ROWS,), tl.int32)
    first = tl.zeros((ROWS,), tl.float32)
    second = tl.zeros((ROWS,), tl.float32)
    for start in range(0, source[2] if STREAMS else BLOCK, BLOCK):
        tile = tile_of(x, source, start, BLOCK, STREAMS)
        there = tile > float("-inf")
        top = tl.maximum(top, tl.max(tl.minimum(tile, float("inf")), 1))
        bottom = tl.minimum(bottom, tl.min(tl.where(there, tile, float("inf")), 1))
        possible += tl.sum(there.to(tl.int32), 1)
        away = tl.where(there, tile - origin[:, None], 0.0)
        first += tl.sum(away, 1)
        second += tl.sum(away * away, 1)
    count = tl.maximum(possible, 1).to(tl.float32)
    mean = first / count
    return top, bottom, possible, mean, tl.maximum(second / count - mean * mean, 0.0)


@triton.jit
def _excess_and_slope(
    x, source, anchor, level, rate, whole, part, METHOD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STREAMS: tl.constexpr,
):  # fmt: skip
    """The sum of F less k = whole + part, and of F' (ROWS,)."""
    heads = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    slope = tl.zeros((ROWS,), tl.float32)
    for start in range(0, source[2] if STREAMS else BLOCK, BLOCK):
        tile = tile_of(x, source, start, BLOCK, STREAMS)
        signed, head, density = shares((tile - anchor[:, None]) * rate[:, None] - level[:, None], METHOD)
        heads += tl.sum(head.to(tl.int32), 1)
        total += tl.sum(signed, 1)
        slope += tl.sum(density, 1)
    return (heads - whole).to(tl.float32) + (total - part), slope


@triton.jit(do_not_specialize=["rows"])
def _forward(
    scores_ptr,  # (rows, n)
    k_ptr,  # (rows,)
    temperature_ptr,  # (rows,)
    anchor_ptr,  # (rows,), written
    level_ptr,  # (rows,), written
    mask_ptr,  # (rows, n), written; or None
    rows, n, row_stride, class_stride,
    METHOD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    n = aligned(n, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    nobody = tl.full((ROWS,), -1, tl.int32)
    source = (starts, class_stride, n, inside, nobody)
    x = tile_of(None, source, 0, BLOCK, True)
    wanted = tl.load(k_ptr + row, mask=inside, other=0.0)
    heat = tl.load(temperature_ptr + row, mask=inside, other=1.0)
    origin = tl.load(starts, mask=inside, other=0.0).to(tl.float32)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    top, bottom, possible, mean, variance = _survey(x, source, origin, ROWS, BLOCK, STREAMS)

    right = (wanted >= 0.0) & (wanted <= n) & (heat > 0.0) & (top < float("inf"))
    empty = wanted <= 0.0
    full = wanted >= possible.to(tl.float32)
    live = inside & right & (empty == 0) & (full == 0)
    k = tl.where(live, wanted, 0.5)
    rate = 1.0 / tl.where(live, heat, 1.0)
    count = tl.where(live, possible, 1).to(tl.float32)
    others = count - k
    whole = tl.floor(k)
    part = k - whole
    whole = whole.to(tl.int32)

    # From where b would be among normally distributed scores.
    p = k / count
    spread = normal_quantile(p) * tl.sqrt(variance)
    heated = quantile(p, METHOD) / rate
    away = tl.sqrt(spread * spread + heated * heated)
    away = tl.where(p > 0.5, away, -away) + (0.5 / rate if METHOD == "sparse" else 0.0)
    anchor = tl.where(live, origin + (mean - away), finite_or_zero(top))
    level = tl.zeros((ROWS,), tl.float32)
    allowed = 4e-7 * tl.minimum(k, others)
    steps = 0
    waiting = live
    while (tl.max(waiting.to(tl.int32), 0) > 0) & (steps < _STEPS):
        excess, slope = _excess_and_slope(x, source, anchor, level, rate, whole, part, METHOD, ROWS, BLOCK, STREAMS)
        step = newton(excess, slope, k, others, METHOD)
        fine = tl.abs(step) < 1e30
        moved = tl.where(waiting & fine, level + step, level)
        waiting = waiting & ((fine == 0) | (arrived(excess, step, allowed, METHOD) == 0))
        nearer = tl.where(live, anchor + moved / rate, anchor)
        level = (anchor - nearer) * rate + moved
        anchor = nearer
        steps += 1

    if tl.max(waiting.to(tl.int32), 0) > 0:
        place = whole + (part > 0.0).to(tl.int32)
        center, gap = near_kth(
            x, source, tl.where(waiting, bottom, 0.0), tl.where(waiting, top, 0.0), rate, place, BLOCK, STREAMS
        )
        reached = tl.zeros((ROWS,), tl.int32)
        below = tl.full((ROWS,), float("-inf"), tl.float32)
        for start in range(0, source[2] if STREAMS else BLOCK, BLOCK):
            tile = tile_of(x, source, start, BLOCK, STREAMS)
            reaches = tile >= center[:, None]
            reached += tl.sum(reaches.to(tl.int32), 1)
            below = tl.maximum(below, tl.max(tl.where(reaches, float("-inf"), tile), 1))
        drop = tl.where(waiting & (reached <= whole), (below - center) * rate, 0.0)
        # Q(p) lies between log p and -log(1 - p) for every F; a little wider, since the root may lie on a bound.
        low = drop + tl.log((1.0 - part) / (whole + 1).to(tl.float32)) - 1e-3
        less = tl.where(part > 0.0, part, 1.0)
        high = gap - tl.log(less / (count + 1.0 - place.to(tl.float32))) + 1e-3
        middle = (low + high) * 0.5 if METHOD == "sparse" else drop * 0.5
        anchor = tl.where(waiting, center, anchor)
        level = tl.where(waiting, middle, level)
        steps = 0
        while (tl.max(waiting.to(tl.int32), 0) > 0) & (steps < _MOST):
            excess, slope = _excess_and_slope(x, source, anchor, level, rate, whole, part, METHOD, ROWS, BLOCK, STREAMS)
            low = tl.where(excess > 0.0, level, low)
            high = tl.where(excess < 0.0, level, high)
            step = newton(excess, slope, k, others, METHOD)
            there = arrived(excess, step, allowed, METHOD)
            moved = level + step
            within = (moved > low) & (moved < high)
            stays = there & ((METHOD == "sparse") | (tl.abs(step) <= 4e-6))
            moved = tl.where(within, moved, tl.where(stays, level, (low + high) * 0.5))
            level = tl.where(waiting, moved, level)
            there = there & (within | stays)
            waiting = waiting & (there == 0)
            steps += 1

    level = tl.where(full, -_FAR / heat, tl.where(empty, 10.0 * _FAR / heat, level))
    level = tl.where(right, level, float("nan"))
    tl.store(anchor_ptr + row, anchor, mask=inside)
    tl.store(level_ptr + row, level, mask=inside)
    if mask_ptr is not None:
        results = row_pointers(mask_ptr, row, n)
        for start in range(0, source[2] if STREAMS else BLOCK, BLOCK):
            tile = tile_of(x, source, start, BLOCK, STREAMS)
            there = tile > float("-inf")
            signed, head, _ = shares((tile - anchor[:, None]) * rate[:, None] - level[:, None], METHOD)
            share = tl.where(head, 1.0 + signed, signed)
            share = tl.where(live[:, None], share, tl.where(there & full[:, None], 1.0, 0.0))
            share = tl.where(there & right[:, None], share, tl.where(right[:, None], 0.0, float("nan")))
            store_tile(results, start + tl.arange(0, BLOCK), n, inside, share)


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_ptr, grad_offset_ptr, scores_ptr, temperature_ptr, offset_ptr, anchor_ptr, result_ptr, of_k_ptr,
    of_temperature_ptr,
    rows, n, row_stride, class_stride, grad_row_stride, grad_class_stride,
    METHOD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """With f = F'(z) and g = f grad / T: g + f (grad_offset - <g, 1>) / <f, 1>."""
    n = aligned(n, ALIGN)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    grads = row_pointers(grad_ptr, row, grad_row_stride)
    results = row_pointers(result_ptr, row, n)
    heat = tl.load(temperature_ptr + row, mask=inside, other=1.0)
    rate = 1.0 / heat
    anchor = tl.load(anchor_ptr + row, mask=inside, other=0.0)
    level = tl.load(offset_ptr + row, mask=inside, other=0.0) * rate
    density, direct, z = _pulls(
        starts, grads, 0, class_stride, grad_class_stride, n, inside, anchor, level, rate, METHOD, BLOCK
    )
    total = tl.sum(density, 1)
    pulled = tl.sum(direct, 1)
    for start in range(BLOCK, n if STREAMS else BLOCK, BLOCK):
        density, direct, z = _pulls(
            starts, grads, start, class_stride, grad_class_stride, n, inside, anchor, level, rate, METHOD, BLOCK
        )
        total += tl.sum(density, 1)
        pulled += tl.sum(direct, 1)
    back = tl.load(grad_offset_ptr + row, mask=inside, other=0.0)
    moves = total > 1e-37
    share = tl.where(moves, (back - pulled) / tl.where(moves, total, 1.0), total - total)
    of_temperature = tl.zeros((ROWS,), tl.float32)
    for start in range(0, n if STREAMS else BLOCK, BLOCK):
        if STREAMS:
            density, direct, z = _pulls(
                starts, grads, start, class_stride, grad_class_stride, n, inside, anchor, level, rate, METHOD, BLOCK
            )
        gradient = direct + product(share[:, None], density)
        of_temperature -= tl.sum(tl.where(density == 0.0, 0.0, gradient * z), 1)
        store_tile(results, start + tl.arange(0, BLOCK), n, inside, gradient)
    tl.store(of_k_ptr + row, -share * heat, mask=inside)
    tl.store(of_temperature_ptr + row, of_temperature, mask=inside)


@triton.jit
def _pulls(
    starts, grads, start, class_stride, grad_class_stride, n, inside, anchor, level, rate,
    METHOD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """f, f grad / T and z of a tile (ROWS, BLOCK)."""
    columns = start + tl.arange(0, BLOCK)
    x = load_tile(starts, columns, class_stride, n, inside)
    z = (x - anchor[:, None]) * rate[:, None] - level[:, None]
    density = shares(z, METHOD)[2]
    grad = load_tile(grads, columns, grad_class_stride, n, inside)
    return density, product(grad * rate[:, None], density), z
