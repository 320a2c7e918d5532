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

a polynomial in w_i <= 1 whose k coefficients a row are all that is needed. A small head's classes are left out by the
products of those before and those behind, so that only positive numbers are added: with the tilt at 0 the tail's
coefficients may span many orders of magnitude, and what a division lost would be multiplied by the largest of them. Of
a large head, where all are probabilities, each class is divided out from the other end, in powers of 1 / w_i.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from topk.losses import polynomials
from topk.losses.room import (
    SMALLEST,
    Options,
    Room,
    Saved,
    SavedShape,
    buffers,
    chunks,
    exponentials,
    exponents,
    lowest,
    not_finite_above,
    target_scores,
    wide_type,
)
from topk.losses.selection import largest_wrong

POWER_SUM_LIMIT = 8
"""Up to this k Newton's identities are used: beyond it their cancellation shows in float32."""

_NEWTON_STEPS = (3, 16)  # usually, and at most: a step divides an excess of the mean by e, and it is below n
_LANES = 2**13  # polynomials advanced together by one step of the recursion
_SUM_CHUNK = 2**17  # elements worked on at a time: buffers stay in cache, far below the size of the scores
_LANE_CHUNK = 2**17  # larger, since every step of the recursion costs one call


def _head_size(k: int, classes: int) -> int:
    return min(k if k <= POWER_SUM_LIMIT else 2 * k, classes - 1)


def _depth(ks: list[int], classes: int) -> int:
    return max((_head_size(k, classes) for k in ks), default=0)


def _columns(k: int, classes: int) -> list[int]:
    """Widths of the parts of the saved table for one k: (t, tilt, slope), the polynomial's and the head's gradient."""
    return [3, k, _head_size(k, classes)]


def _saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    ks = options[0]
    width = sum(sum(_columns(k, classes)) for k in ks) + 1
    return ((rows, _depth(ks, classes)), torch.int64), ((rows, width), torch.float64)


def _unpack(table: Tensor, ks: list[int], classes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each k its (t, tilt, slope) (3, rows) and gradient, polynomial (k, rows) and head (size, rows)."""
    widths = [width for k in ks for width in _columns(k, classes)]
    parts = table.T.split([*widths, 1])
    return list(zip(parts[0:-1:3], parts[1:-1:3], parts[2:-1:3], strict=True))


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the head's indices (rows, depth), and the table of `_columns`, last in it y's gradient."""
    ks, weights, tau, margin = options
    rows, classes = scores.shape
    wide = wide_type(scores)
    x_target = target_scores(scores, target)
    head, index = largest_wrong(scores, target, _depth(ks, classes))
    usual = scores.is_cpu and math.isfinite(float(head.sum()) + float(x_target.sum()))
    lead, loss, pull = x_target.to(wide), x_target.new_zeros(rows, dtype=wide), x_target.new_zeros(rows, dtype=wide)
    table = []
    for k, weight in zip(ks, weights, strict=True):
        size = _head_size(k, classes)
        rate = 1.0 / (k * tau)
        kth, absent, bad = (head[:, k - 1], None, None) if usual else _kth_wrong(head, x_target, k)
        tilt, tail = _tail(scores, target, index[:, :size], kth, k, rate)
        kth = kth.to(wide)
        log_odds = _log_odds(head[:, :size], kth, tilt, rate)
        products, full = _with_head(log_odds, tail)
        ratio = (full[k] / full[k - 1]).log_()
        gap = torch.add(ratio, kth - lead, alpha=rate).sub_(tilt).add_(margin / tau)
        term, slope = softplus(gap, threshold=30.0), gap.sigmoid()
        if absent is not None and bad is not None:
            term = term.masked_fill(absent, 0.0).masked_fill(x_target == -torch.inf, torch.inf)
            term, slope = term.masked_fill(bad, torch.nan), slope.masked_fill(absent, 0.0).masked_fill(bad, torch.nan)
        loss.add_(term, alpha=weight * tau)
        slope.mul_(weight / k)
        pull.sub_(slope)
        # Where backward needs no tilt, the one that makes Pr[S = k] and Pr[S = k-1] equal is kept, for `formula`.
        tilt = tilt if k > POWER_SUM_LIMIT else ratio.neg_().nan_to_num_(0.0, 0.0, 0.0)
        table += [torch.stack((kth, tilt, slope)), *_inclusion(log_odds, tail, products, full, slope)]
    if not usual:
        pull.masked_fill_(x_target == -torch.inf, 0.0)
    return loss.to(scores.dtype), index, torch.cat([*table, pull[None]]).T.contiguous()


def _kth_wrong(head: Tensor, x_target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th largest wrong score (a harmless stand-in where there is none), and which rows are absent or bad."""
    largest, kth = head[:, 0], head[:, k - 1]
    bad = not_finite_above(largest, x_target)
    absent = kth == -torch.inf  # fewer than k wrong classes are possible: y cannot be missed
    stand_in = torch.where(largest.isfinite(), largest, 0.0)
    return torch.where(absent | bad, stand_in, kth), absent, bad


def _tail(scores: Tensor, target: Tensor, index: Tensor, kth: Tensor, k: int, rate: float) -> tuple[Tensor, Tensor]:
    """The tilt (rows,) and the tail's coefficients r (k + 1, rows), up to one common factor a row."""
    wide = wide_type(scores)
    if k <= POWER_SUM_LIMIT:
        sums = _power_sums(scores, torch.cat((index, target[:, None]), 1), kth, k, rate)
        return torch.zeros_like(kth, dtype=wide), _newton_identities(sums.to(wide))
    tilts, tails = [kth[:0]], [scores.new_zeros((k + 1, 0), dtype=wide)]
    for rows in chunks(scores, _LANE_CHUNK):
        tilt, tail = _lanes(scores[rows], target[rows], index[rows], kth[rows], k, rate)
        tilts.append(tilt)
        tails.append(tail)
    return torch.cat(tilts).to(wide), torch.cat(tails, 1)


def _power_sums(scores: Tensor, places: Tensor, kth: Tensor, k: int, rate: float) -> Tensor:
    """sum of w^m over the tail, all classes but those at `places`, for m = 1..k (k, rows)."""
    sums = scores.new_empty((k, scores.shape[0]))
    odds_buffer, power_buffer = buffers(scores, 2, _SUM_CHUNK)
    for rows in chunks(scores, _SUM_CHUNK):
        count = rows.stop - rows.start
        log_odds = exponents(scores[rows], kth[rows], rate, odds_buffer[:count])
        least, smallest = lowest(log_odds), SMALLEST[log_odds.dtype]
        power = odds = exponentials(log_odds, least).scatter_(1, places[rows], 0.0)
        torch.sum(odds, 1, out=sums[0, rows])
        for m in range(1, k):
            if not least * k > smallest:  # what the next product would make denormal, and slow
                torch.threshold_(power, math.exp(smallest * m / (m + 1)), 0.0)
            power = torch.mul(power, odds, out=power_buffer[:count])
            torch.sum(power, 1, out=sums[m, rows])
    return sums


def _newton_identities(sums: Tensor) -> Tensor:
    """e_0..e_k (k + 1, rows) from the power sums p_1..p_k: e_m is the mean of (-1)^(i-1) e_{m-i} p_i over i = 1..m."""
    k = sums.shape[0]
    signed = sums.clone()
    signed[1::2].neg_()
    falling = sums.new_ones((k + 1, sums.shape[1]))  # e_k, ..., e_1, e_0, so that e_{m-1}..e_0 is a slice
    for m in range(1, k + 1):
        torch.mean(falling[k - m + 1 :] * signed[:m], 0, out=falling[k - m])
    return falling.flip(0)


def _lanes(scores: Tensor, target: Tensor, index: Tensor, kth: Tensor, k: int, rate: float) -> tuple[Tensor, Tensor]:
    """The tilt and Pr[S = j], j = 0..k, over the tail: a recursion over lanes of classes, then truncated products."""
    rows, classes = scores.shape
    lanes = min(max(1, _LANES // rows), max(1, classes // (4 * k)))
    steps = -(-classes // lanes)
    log_odds, buffer = buffers(scores, 2, _LANE_CHUNK, lanes * steps)
    log_odds, buffer = log_odds[:rows], buffer[:rows]
    log_odds[:, classes:] = -torch.inf
    exponents(scores, kth, rate, log_odds[:, :classes])
    log_odds.scatter_(1, target[:, None], -torch.inf)
    tilt = _balance(log_odds, buffer, k, classes - 1)
    probability = log_odds.add_(tilt[:, None]).sigmoid_().scatter_(1, index, 0.0)
    trials = buffer.view(steps, lanes, rows).copy_(probability.view(rows, lanes, steps).permute(2, 1, 0))
    return tilt, polynomials.success_counts(trials, k, wide_type(scores))


def _balance(exponents: Tensor, buffer: Tensor, k: int, wrong: int) -> Tensor:
    """The tilt at which the expected number of successes is about k - 1/2: safeguarded Newton steps.

    Any tilt is right at which the chances of k and of k - 1 are far from underflow: within a few standard deviations.
    Three steps get there but for leaders far ahead of a crowd of ties. To look would stall a device.
    """
    below = torch.clamp(exponents, max=0.0, out=buffer).exp_().sum(1) - (k - 1)
    low = torch.full_like(below, -math.log(2 * (wrong - k) + 1))
    high = torch.full_like(below, math.log(2 * k - 1))
    tilt = (k / below.clamp_(min=1)).log_().clamp_(max=0.0).maximum(low)
    usual, most = _NEWTON_STEPS
    for done in range(1, most + 1):
        probability = torch.add(exponents, tilt[:, None], out=buffer).sigmoid_()
        mean = probability.sum(1)
        variance = mean - torch.linalg.vecdot(probability, probability)
        low, high = torch.where(mean < k - 0.5, tilt, low), torch.where(mean > k - 0.5, tilt, high)
        step = tilt - (mean - (k - 0.5)) / variance
        tilt = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
        if done >= usual and exponents.is_cpu and not bool(((mean - (k - 0.5)) ** 2 > 4 * variance + 0.25).any()):
            break
    return tilt


def _log_odds(head: Tensor, kth: Tensor, tilt: Tensor, rate: float) -> Tensor:
    """log w of the head (size, rows)."""
    return torch.add(tilt, head.T.to(kth.dtype) - kth, alpha=rate)


def _with_head(log_odds: Tensor, tail: Tensor) -> tuple[list[Tensor], Tensor]:
    """Pr[S = j] over parts of the head, and head times tail (k + 1, rows).

    A head of at most k classes gives the parts before each of its classes, j < k; a larger one gives the whole.
    """
    success, failure = log_odds.sigmoid(), log_odds.neg().sigmoid_()
    size, rows = log_odds.shape
    if size >= tail.shape[0]:
        now = log_odds.new_zeros((size + 1, rows))
        now[0] = 1.0
        for i in range(size):
            longer = now[: i + 2] * failure[i]
            longer[1:].addcmul_(now[: i + 1], success[i])
            now[: i + 2] = longer
        return [now], polynomials.product(now, tail)
    both = torch.stack((torch.zeros_like(tail), tail))  # one recursion for the two, since calls are what costs here
    both[0, 0] = 1.0
    before = []
    for one, other in zip(failure.unbind(), success.unbind(), strict=True):
        before.append(both[0, :-1])
        longer = both * one
        longer[:, 1:].addcmul_(both[:, :-1], other)
        both = longer
    return before, both[1]


# --- backward --------------------------------------------------------------------------------------------------------


def _inclusion(
    log_odds: Tensor, tail: Tensor, products: list[Tensor], full: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """slope * d rho / d u: coefficients in w for every class with w <= 1 (k, rows), and the head's values.

    For a head class the latter is the sum over j of P Pr[S without it = j] over the head, times weights[j].
    """
    k, size = tail.shape[0] - 1, log_odds.shape[0]
    silent = slope == 0  # also the rows with nothing to divide by
    up, down = (slope / full[k]).masked_fill_(silent, 0.0), (slope / full[k - 1]).masked_fill_(silent, 0.0)
    falling = torch.stack((full[:k], tail[:k])).flip(1)
    change = falling * up
    change[:, :-1].addcmul_(falling[:, 1:], down, value=-1.0)
    polynomial, weights = change[0], change[1]
    polynomial[1::2].neg_()
    if size <= k:
        return polynomial, _left_out(log_odds, products, weights)
    small = log_odds.clamp(max=0.0).exp_()
    at_head = torch.where(log_odds >= 0, _divided_out(log_odds, products[0], weights), _horner(polynomial, small))
    return polynomial, at_head


def _left_out(log_odds: Tensor, before: list[Tensor], weights: Tensor) -> Tensor:
    """The head's values: each class's product of those before it meets the weights, with those behind it worked in."""
    success, failure = log_odds.sigmoid(), log_odds.neg().sigmoid_()
    behind = [weights]
    for i in range(len(before) - 1, 0, -1):
        worked_in = behind[-1] * failure[i]
        worked_in[:-1].addcmul_(behind[-1][1:], success[i])
        behind.append(worked_in)
    return torch.stack(before).mul_(torch.stack(behind[::-1])).sum(1).mul_(success)


def _divided_out(log_odds: Tensor, product: Tensor, weights: Tensor) -> Tensor:
    """The head's values where w >= 1, by h_{j-1} = f_j - h_j / w from the top degree down, which amplifies no error."""
    size, k = log_odds.shape[0], weights.shape[0]
    shrink = log_odds.clamp(min=0.0).neg_().exp_()
    quotient = product[size]
    at_head = torch.zeros_like(shrink)
    for j in range(size - 1, 0, -1):
        quotient = torch.addcmul(product[j], shrink, quotient, value=-1.0)
        if j <= k:
            at_head.addcmul_(quotient, weights[j - 1])
    return at_head


def _horner(polynomial: Tensor, odds: Tensor) -> Tensor:
    """sum over r of polynomial[r] * odds^(r+1)."""
    value = polynomial[-1] * odds
    for coefficient in polynomial[:-1].flip(0):
        value.add_(coefficient).mul_(odds)
    return value


def backward(grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """grad * d loss / d scores: for every k one exponential and k multiply-adds an element."""
    ks, _, tau, _ = options
    classes = scores.shape[1]
    index, table = saved
    scaled = (table * grad.to(table.dtype)[:, None]).to(scores.dtype)
    result = torch.empty_like(scores, memory_format=torch.contiguous_format) if ks else torch.zeros_like(scores)
    parts = zip(ks, _unpack(table, ks, classes), _unpack(scaled, ks, classes), strict=True)
    for place, (k, (about, _, _), (_, polynomial, at_head)) in enumerate(parts):
        kth, tilt = about[0].to(scores.dtype), about[1].to(scores.dtype) if k > POWER_SUM_LIMIT else None
        odds = (kth, tilt, 1.0 / (k * tau))
        _add_one_k(result, scores, index[:, : at_head.shape[0]], odds, polynomial, at_head.T, place > 0)
    return result.scatter_(1, target[:, None], scaled[:, -1:])


def _add_one_k(
    result: Tensor,
    scores: Tensor,
    index: Tensor,
    exponent: tuple[Tensor, Tensor | None, float],
    polynomial: Tensor,
    at_head: Tensor,
    add: bool,
) -> None:
    """Writes the gradient of one k into `result`, or adds it; what it leaves at y is overwritten later."""
    columns = polynomial.unsqueeze(-1).unbind()
    kth, tilt, rate = exponent
    odds_buffer, *field_buffer = buffers(scores, 2 if add else 1, _SUM_CHUNK)
    for rows in chunks(scores, _SUM_CHUNK):
        count = rows.stop - rows.start
        log_odds = exponents(scores[rows], kth[rows], rate, odds_buffer[:count])
        if tilt is not None:
            log_odds.add_(tilt[rows, None])
        least, half = lowest(log_odds), SMALLEST[log_odds.dtype] / 2
        odds = exponentials(log_odds, least)
        field = field_buffer[0][:count] if add else result[rows]
        if len(columns) == 1:
            torch.mul(odds, columns[0][rows], out=field)
        else:  # smaller odds change no sum, but make denormal products with small coefficients
            inner = odds if least > half else odds.clamp(min=math.exp(half))
            torch.mul(inner, columns[-1][rows], out=field).add_(columns[-2][rows])
            for column in columns[-3::-1]:
                torch.addcmul(column[rows], field, inner, out=field)
            field.mul_(odds)
        field.scatter_(1, index[rows], at_head[rows])
        if add:
            result[rows] += field


# --- the same number once more, for second derivatives ---------------------------------------------------------------


def formula(scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """The loss a row from one balanced tree of products; lambda is a constant, since rho does not depend on it.

    It must be such that k successes are likely: at another one their probability underflows where classes are many.
    """
    ks, weights, tau, margin = options
    classes = scores.shape[1]
    mine = torch.arange(classes, device=scores.device) == target[:, None]
    x_target = target_scores(scores, target)
    loss = torch.zeros_like(x_target)
    parts = _unpack(saved[1].to(scores.dtype), ks, classes)
    for k, weight, ((kth, tilt, slope), _, _) in zip(ks, weights, parts, strict=True):
        rate = 1.0 / (k * tau)
        log_odds = ((scores - kth[:, None]) * rate + tilt[:, None]).masked_fill(mine, -torch.inf)
        both = polynomials.tree(torch.stack((torch.sigmoid(-log_odds), torch.sigmoid(log_odds))), k)
        silent = slope == 0
        ratio = torch.where(silent, 1.0, both[k]) / torch.where(silent, 1.0, both[k - 1])
        gap = margin / tau + (kth - x_target) * rate - tilt + ratio.log()
        loss = loss + weight * torch.where(silent, 0.0, softplus(gap, threshold=30.0) * tau)
    return loss


SMOOTH = Room(
    name="smooth",
    options="int[] ks, float[] weights, float tau, float margin",
    extras=(),
    saved=_saved,
    forward=forward,
    backward=backward,
    formula=formula,
)
