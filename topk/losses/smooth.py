"""The smooth top-k SVM of Berrada, Zisserman and Kumar (2018), in the Poisson-binomial form (book, chapters 6 and 10).

With u = x / (k tau) over the classes other than y, e_j the elementary symmetric polynomials of exp(u), and

    rho = log e_k - log e_{k-1},        loss = tau softplus(margin / tau + rho - x_y / (k tau)).

For any lambda > 0 let P_i = lambda e^{u_i} / (1 + lambda e^{u_i}) and S the number of successes in independent
trials with these probabilities. Then rho = -log lambda + log Pr[S = k] - log Pr[S = k-1], and its derivative is a
difference of two inclusion probabilities. Every number is a probability, so nothing overflows at any k, n or scale.

How it is computed. With t the k-th largest wrong u, let w_i = exp(u_i - t + tilt), so that w plays lambda e^u.
The few classes with w_i > 1 form the *head* and are multiplied in one at a time; for the rest, the *tail*, we need
r_j, the coefficients of prod(1 + w_i z) up to a common factor:

* k <= POWER_SUM_LIMIT: tilt 0, head = the k largest, r by Newton's identities from k power sums;
* larger k: tilt such that sum P is about k - 1/2, head = the 2k largest, r by the recursion
  r_j <- (1 - P) r_j + P r_{j-1} over independent lanes of classes, merged by truncated products.

Backward, with f the coefficients of head and tail together, a tail class has

    d rho / d u_i = sum_r (-1)^r w_i^{r+1} (f_{k-1-r} / f_k - f_{k-2-r} / f_{k-1}),

a polynomial in w_i <= 1 whose k coefficients a row are all that is needed; a head class is left out of the product
by prefixes and suffixes, which only adds positive numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from topk.losses.room import (
    Options,
    Room,
    Saved,
    SavedShape,
    concatenate,
    largest_wrong,
    not_finite_above,
    row_chunks,
    target_scores,
)

POWER_SUM_LIMIT = 8
"""Up to this k Newton's identities are used: beyond it their cancellation shows in float32."""

_NEWTON_STEPS = 3
_CHUNK = 2**18  # classes times rows worked on at a time: temporaries stay in cache and far below the scores
_LANES = 2**13  # polynomials advanced together by one step of the recursion


def _head_size(k: int, classes: int) -> int:
    return min(k if k <= POWER_SUM_LIMIT else 2 * k, classes - 1)


def _depth(ks: list[int], classes: int) -> int:
    return max((_head_size(k, classes) for k in ks), default=0)


def _wide(scores: Tensor) -> torch.dtype:
    """The few numbers a row are float64 wherever the device has it: power sums of 200,000 ties overflow float32."""
    return scores.dtype if scores.device.type == "mps" else torch.float64


def _saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    ks = options[0]
    depth = _depth(ks, classes)
    return ((rows, depth), None), ((rows, depth), torch.int64), ((rows, sum(k + 4 for k in ks)), torch.float64)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the head's scores and indices (rows, depth), and a table (rows, sum over k of k + 4).

    For each k the table holds t, the tilt, the slope of the softplus and the tail's r_0..r_k.
    """
    chunks = row_chunks(*scores.shape, _CHUNK)
    parts = [_forward_chunk(scores[rows], target[rows], options) for rows in chunks]
    return concatenate(parts) if parts else _forward_chunk(scores, target, options)


def _forward_chunk(scores: Tensor, target: Tensor, options: Options) -> tuple[Tensor, ...]:
    ks, weights, tau, margin = options
    rows, classes = scores.shape
    x_target = target_scores(scores, target)
    head, index = largest_wrong(scores, target, _depth(ks, classes))
    loss = x_target.new_zeros(rows, dtype=_wide(scores))
    table = [loss.new_zeros((rows, 0))]
    for k, weight in zip(ks, weights, strict=True):
        size = _head_size(k, classes)
        kth, absent, bad = _kth_wrong(head, x_target, k)
        tilt, tail = _tail(scores, target, head[:, :size], index[:, :size], kth, k, 1.0 / (k * tau))
        gap = _gap(head[:, :size], x_target, kth, tilt, tail, k, tau, margin)
        term = torch.nn.functional.softplus(gap, threshold=30.0) * tau
        term = term.masked_fill(absent, 0.0).masked_fill(x_target == -torch.inf, torch.inf).masked_fill(bad, torch.nan)
        slope = gap.sigmoid().masked_fill(absent, 0.0).masked_fill(bad, torch.nan)
        loss = loss + weight * term
        table += [torch.stack((kth.to(tilt.dtype), tilt, slope), 1), tail.T]
    return loss.to(scores.dtype), head, index, torch.cat(table, 1).to(torch.float64)


def _kth_wrong(head: Tensor, x_target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th largest wrong score (a harmless stand-in where there is none), and which rows are absent or bad."""
    largest, kth = head[:, 0], head[:, k - 1]
    bad = not_finite_above(largest, x_target)
    absent = kth == -torch.inf  # fewer than k wrong classes are possible: y cannot be missed
    stand_in = torch.where(largest.isfinite(), largest, 0.0)
    return torch.where(absent | bad, stand_in, kth), absent, bad


def _tail(
    scores: Tensor, target: Tensor, head: Tensor, index: Tensor, kth: Tensor, k: int, rate: float
) -> tuple[Tensor, Tensor]:
    """The tilt (rows,) and the tail's coefficients r (k + 1, rows), up to one common factor a row."""
    wide = _wide(scores)
    if k <= POWER_SUM_LIMIT:
        tilt = torch.zeros_like(kth)
        return tilt.to(wide), _newton_identities(_odds(scores, target, index, kth, None, rate), k, wide)
    tilt = _balance(scores, target, kth, k, rate)
    odds = _odds(scores, target, index, kth, tilt, rate)
    return tilt.to(wide), _lanes(odds.div_(odds + 1), k, wide)


def _odds(
    scores: Tensor, target: Tensor, index: Tensor, kth: Tensor, tilt: Tensor | None, rate: float
) -> Tensor:
    """w_i = exp(u_i - t + tilt) over the tail; 0 for the head and for y. A new tensor."""
    odds = (scores - kth[:, None]).mul_(rate)
    if tilt is not None:
        odds.add_(tilt[:, None])
    return odds.exp_().scatter_(1, index, 0.0).scatter_(1, target[:, None], 0.0)


def _power_sums(odds: Tensor, k: int) -> Tensor:
    """sum w^m for m = 1..k (k, rows), with one buffer beside `odds`, which is overwritten."""
    sums = [odds.sum(1)]
    if k >= 2:
        square = odds * odds
        sums.append(square.sum(1))
    if k >= 3:
        sums += [torch.linalg.vecdot(odds, square), torch.linalg.vecdot(square, square)]
    if k >= 5:
        cube = odds.mul_(square)
        sums += [torch.linalg.vecdot(cube, square), torch.linalg.vecdot(cube, cube)]
    if k >= 7:
        fourth = square.mul_(square)
        sums += [torch.linalg.vecdot(cube, fourth), torch.linalg.vecdot(fourth, fourth)]
    return torch.stack(sums[:k])


def _newton_identities(odds: Tensor, k: int, wide: torch.dtype) -> Tensor:
    """e_0..e_k of the odds (k + 1, rows): m e_m = sum_i (-1)^(i-1) e_{m-i} p_i."""
    sums = _power_sums(odds, k).to(wide)
    sums[1::2].neg_()
    falling = sums.new_ones((k + 1, sums.shape[1]))  # e_k, ..., e_1, e_0, so that e_{m-1}..e_0 is a slice
    for m in range(1, k + 1):
        falling[k - m] = (falling[k - m + 1 :] * sums[:m]).sum(0) / m
    return falling.flip(0)


def _balance(scores: Tensor, target: Tensor, kth: Tensor, k: int, rate: float) -> Tensor:
    """The tilt at which the expected number of successes is about k - 1/2: safeguarded Newton steps."""
    wrong = scores.shape[1] - 1
    shifted = (scores - kth[:, None]).mul_(rate).scatter_(1, target[:, None], -torch.inf)
    low = torch.full_like(kth, -math.log(2 * (wrong - k) + 1))
    high = torch.full_like(kth, math.log(2 * k - 1))
    buffer = shifted.clamp(max=0).exp_()
    tilt = (k / (buffer.sum(1) - (k - 1)).clamp_(min=1)).log_().clamp_(max=0.0).maximum(low)
    for _ in range(_NEWTON_STEPS):
        probability = torch.sigmoid(torch.add(shifted, tilt[:, None], out=buffer), out=buffer)
        excess = probability.sum(1) - (k - 0.5)
        variance = excess + (k - 0.5) - torch.linalg.vecdot(probability, probability)
        low, high = torch.where(excess < 0, tilt, low), torch.where(excess > 0, tilt, high)
        step = tilt - excess / variance
        tilt = torch.where((step > low) & (step < high), step, (low + high) / 2)
    return tilt


def _lanes(probability: Tensor, k: int, wide: torch.dtype) -> Tensor:
    """Pr[S = j] for j = 0..k (k + 1, rows): the recursion over lanes of classes, then truncated products."""
    rows, classes = probability.shape
    lanes = min(max(1, _LANES // max(1, rows)), max(1, classes // (4 * k)))
    steps = -(-classes // lanes)
    padded = torch.nn.functional.pad(probability, (0, lanes * steps - classes))
    by_step = padded.view(rows, lanes, steps).permute(2, 1, 0).reshape(steps, lanes * rows)
    now = probability.new_zeros((k + 2, lanes * rows))  # one row of zeros above Pr[S = 0]
    now[1] = 1.0
    then = torch.zeros_like(now)
    for trial in by_step.unbind(0):
        torch.lerp(now[1:], now[:-1], trial, out=then[1:])
        now, then = then, now
    merged = now[1:].to(wide).view(k + 1, lanes, rows)
    while merged.shape[1] > 1:
        half = merged.shape[1] // 2
        product = _product(merged[:, :half], merged[:, half : 2 * half])
        merged = torch.cat((product, merged[:, 2 * half :]), 1)
    return merged[:, 0]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Product of polynomials, coefficients along the first axis, truncated to the length of the operands."""
    result = left[:1] * right
    for i in range(1, left.shape[0]):
        result[i:].addcmul_(left[i : i + 1], right[:-i])
    return result


def _head_probabilities(head: Tensor, kth: Tensor, tilt: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """P and 1 - P of the head (size, rows), each accurate on its own."""
    log_odds = ((head.to(tilt.dtype) - kth.to(tilt.dtype)[:, None]) * rate + tilt[:, None]).T.contiguous()
    return log_odds.sigmoid(), (-log_odds).sigmoid()


def _include(polynomial: Tensor, success: Tensor, failure: Tensor) -> Tensor:
    """The coefficients (k + 1, rows) after one more trial."""
    result = polynomial * failure
    result[1:].addcmul_(polynomial[:-1], success)
    return result


def _gap(
    head: Tensor, x_target: Tensor, kth: Tensor, tilt: Tensor, tail: Tensor, k: int, tau: float, margin: float
) -> Tensor:
    """The softplus's argument, margin / tau + rho - x_y / (k tau)."""
    rate = 1.0 / (k * tau)
    both = tail
    for success, failure in zip(*_head_probabilities(head, kth, tilt, rate), strict=True):
        both = _include(both, success, failure)
    return margin / tau + (kth.to(tilt.dtype) - x_target.to(tilt.dtype)) * rate - tilt + (both[k] / both[k - 1]).log()


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options
) -> Tensor:
    """grad * d loss / d scores: for every k one exponential and k multiply-adds an element."""
    rows, classes = scores.shape
    ks, weights, tau, _ = options
    head, index, table = saved
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    work = max((_head_size(k, classes) * (k + 1) for k in ks), default=1)
    for chunk in row_chunks(rows, max(classes, work), _CHUNK):
        out, x, y = result[chunk], scores[chunk], target[chunk]
        offset = 0
        out_y = torch.zeros_like(grad[chunk], dtype=table.dtype)
        for place, (k, weight) in enumerate(zip(ks, weights, strict=True)):
            size = _head_size(k, classes)
            kth, tilt, slope, *tail = table[chunk, offset : offset + k + 4].to(_wide(scores)).unbind(1)
            offset += k + 4
            scale = grad[chunk].to(slope.dtype) * slope * (weight / k)
            parts = (head[chunk, :size], index[chunk, :size])
            _add_one_k(out, x, y, parts, kth, tilt, torch.stack(tail), scale, k, 1.0 / (k * tau), place == 0)
            out_y -= scale
        if not ks:
            out.zero_()
        out_y = out_y.masked_fill(target_scores(x, y) == -torch.inf, 0.0)
        out.scatter_(1, y[:, None], out_y.to(out.dtype)[:, None])
    return result


def _add_one_k(
    out: Tensor,
    scores: Tensor,
    target: Tensor,
    top: tuple[Tensor, Tensor],
    kth: Tensor,
    tilt: Tensor,
    tail: Tensor,
    scale: Tensor,
    k: int,
    rate: float,
    first: bool,
) -> None:
    """Adds (or, for the first k, writes) scale * d rho / d u into `out`."""
    head, index = top
    full, left_out = _leave_one_out(*_head_probabilities(head, kth, tilt, rate), tail)
    tilt_or_none = None if k <= POWER_SUM_LIMIT else tilt.to(scores.dtype)
    odds = _odds(scores, target, index, kth.to(scores.dtype), tilt_or_none, rate)
    reach = full[:k].flip(0) / full[k]
    reach[:-1] -= full[: k - 1].flip(0) / full[k - 1]
    reach[1::2].neg_()
    silent = scale == 0
    columns = (reach * scale).masked_fill(silent, 0.0).to(scores.dtype)[:, :, None]
    field = out.copy_(columns[-1].expand_as(out)) if first else columns[-1].expand_as(out).clone()
    for column in columns[:-1].flip(0):
        torch.addcmul(column, field, odds, out=field)
    field.mul_(odds)
    field.scatter_(1, index, (left_out * scale).masked_fill(silent, 0.0).T.to(out.dtype))
    if not first:
        out.add_(field)


def _leave_one_out(success: Tensor, failure: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """f (k + 1, rows) and d rho / d u of the head (size, rows), by prefixes and suffixes: only positive numbers."""
    k = tail.shape[0] - 1
    one = torch.zeros_like(tail)
    one[0] = 1.0
    prefixes, suffixes = [one], [tail]
    for p, q in zip(success[:-1], failure[:-1], strict=True):
        prefixes.append(_include(prefixes[-1], p, q))
    for p, q in zip(success.flip(0), failure.flip(0), strict=True):
        suffixes.append(_include(suffixes[-1], p, q))
    full = suffixes.pop()
    before, after = torch.stack(prefixes), torch.stack(suffixes[::-1])
    without = (before[:, :k] * after[:, :k].flip(1)).sum(1) / full[k]
    if k > 1:
        without -= (before[:, : k - 1] * after[:, : k - 1].flip(1)).sum(1) / full[k - 1]
    return full, without * success


# --- the same number once more, for second derivatives ---------------------------------------------------------------


def formula(scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """The loss a row from one balanced tree of products; lambda is a constant, since rho does not depend on it."""
    ks, weights, tau, margin = options
    classes = scores.shape[1]
    mine = torch.arange(classes, device=scores.device) == target[:, None]
    x_target = target_scores(scores, target)
    loss = torch.zeros_like(x_target)
    offset = 0
    for k, weight in zip(ks, weights, strict=True):
        rate = 1.0 / (k * tau)
        kth, tilt, slope = saved[2][:, offset : offset + 3].to(scores.dtype).unbind(1)
        offset += k + 4
        log_odds = ((scores - kth[:, None]) * rate + tilt[:, None]).masked_fill(mine, -torch.inf)
        both = _tree(torch.stack((torch.sigmoid(-log_odds), torch.sigmoid(log_odds))), k)
        silent = slope == 0
        ratio = torch.where(silent, 1.0, both[k]) / torch.where(silent, 1.0, both[k - 1])
        gap = margin / tau + (kth - x_target) * rate - tilt + ratio.log()
        loss = loss + weight * torch.where(silent, 0.0, torch.nn.functional.softplus(gap, threshold=30.0) * tau)
    return loss


def _tree(factors: Tensor, k: int) -> Tensor:
    """Product over the last axis of polynomials whose coefficients run along the first, kept to degree k."""
    pad = torch.nn.functional.pad
    while factors.shape[-1] > 1:
        if factors.shape[-1] % 2:
            factors = torch.cat((factors, torch.eye(1, factors.shape[0]).to(factors).T[:, :, None].expand_as(factors[..., :1])), -1)
        left, right = factors[..., 0::2], factors[..., 1::2]
        degree = min(2 * (factors.shape[0] - 1), k)
        flat = (0,) * (2 * (factors.dim() - 1))
        terms = [
            pad(left[i] * right[: degree + 1 - i], (*flat, i, max(0, degree + 1 - i - right.shape[0])))
            for i in range(min(left.shape[0], degree + 1))
        ]
        factors = torch.stack(terms).sum(0)
    return pad(factors[..., 0], (0, 0, 0, max(0, k + 1 - factors.shape[0])))


SMOOTH = Room(
    name="smooth",
    options="int[] ks, float[] weights, float tau, float margin",
    extras=(),
    saved=_saved,
    forward=forward,
    backward=backward,
    formula=formula,
)
