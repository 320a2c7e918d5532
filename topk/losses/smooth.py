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
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from topk._cpu import SMALLEST, buffers, chunks, exponentials, exponents, lowest, squares
from topk.arguments import KArgument, check_k, check_number, check_scores
from topk.autograd import Head, Loss
from topk.losses import polynomials
from topk.losses.common import (
    LossModule,
    finite_or_zero,
    largest_classes,
    largest_wrong,
    largest_wrong_and_own,
    materialised,
    not_finite_above,
    reduced_loss,
    row_dtype,
    target_scores,
)
from topk.losses.soft import takes_probabilities
from topk.tails import Counts, PowerSums, Tail

POWER_SUM_LIMIT = 10
"""Up to this k Newton's identities are used: beyond it their cancellation shows in float32."""

_NEWTON_STEPS = (3, 16)  # usually, and at most: a step divides an excess of the mean by e, and it is below n
_SUM_CHUNK = 2**17  # elements worked on at a time: buffers stay in cache, far below the size of the scores
_LANE_CHUNK = 2**17  # larger, since every step of the recursion costs one call


class Options(NamedTuple):
    """The arguments of the loss, besides those that every loss takes."""

    ks: list[int]
    weights: list[float]  # of the ks
    tau: float
    margin: float


# --- the definition --------------------------------------------------------------------------------------------------


def definition(
    scores: Tensor,  # (rows, classes)
    target: Tensor,  # (rows,)
    k: int,
    tau: float = 1.0,
    margin: float = 1.0,
    tail: Tensor | None = None,  # of classes not listed: power sums (k, rows), or counts and the tilt (k + 2, rows)
) -> Tensor:
    """The loss of every row (rows,)."""
    rate = 1.0 / (k * tau)
    head, own = largest_wrong_and_own(scores, target, k)
    rho = log_ratio(scores, target, head, own, rate, tail)  # log e_k - log e_{k-1}
    gap = margin / tau + rho - rate * own.to(rho.dtype)
    return (tau * softplus(gap, threshold=30.0)).to(scores.dtype)


def log_ratio(
    scores: Tensor,  # (rows, classes)
    target: Tensor,  # (rows,)
    head: Tensor,  # (rows, k), the largest scores of classes other than y, descending
    own: Tensor,  # (rows,), x_y
    rate: float,
    tail: Tensor | None = None,  # (k, rows) or (k + 2, rows)
) -> Tensor:
    """log e_k - log e_{k-1} of exp(rate x) over the classes other than y (rows,); -inf where fewer than k exist.

    In the type of a few numbers a row: what is left of rate x_y must not lose the digits of a large score.
    """
    k, kth = head.shape[1], head[:, -1:].detach()
    absent, about = kth.squeeze(1) == -torch.inf, finite_or_zero(kth)  # any `about` gives the same ratio
    if k <= POWER_SUM_LIMIT:
        listed = torch.cat((head, own[:, None]), 1)
        others = _sums_of_powers(scores, about, rate, k) - _sums_of_powers(listed, about, rate, k)
        sums = materialised(others.to(row_dtype(scores)))
        sums = sums if tail is None else sums + tail.T
        head_odds = rate * (head.to(row_dtype(scores)) - about)
        lower, upper = _multiplied_in(head_odds, _from_power_sums(sums))[-2:]
        tilt = torch.zeros_like(lower)
    else:
        log_odds = ((scores - about) * rate).scatter(1, target[:, None], -torch.inf)
        tilt = _balance(log_odds.detach(), k) if tail is None else tail[-1].detach()
        tilted = log_odds + tilt[:, None]
        counts = polynomials.tree(torch.stack((torch.sigmoid(-tilted), torch.sigmoid(tilted))), k)
        lower, upper = counts[k - 1].to(row_dtype(scores)), counts[k].to(row_dtype(scores))
        if tail is not None:
            lower, upper = ((counts[: j + 1] * tail[: j + 1].flip(0)).sum(0) for j in (k - 1, k))
    lower, upper = torch.where(absent, 1.0, lower), torch.where(absent, 1.0, upper)
    rho = rate * about.squeeze(1).to(lower.dtype) - tilt + (upper / lower).log()
    return torch.where(absent, -torch.inf, rho)


def _sums_of_powers(scores: Tensor, about: Tensor, rate: float, k: int) -> Tensor:
    """sum of w^m, m = 1..k (rows, k), over the classes with w = exp(rate (x - about)) <= 1.

    Powers that would be denormal, hence slow, are 0: they change no sum.
    """
    smallest = SMALLEST[scores.dtype]
    log_odds = (scores - about) * rate
    odds = torch.where((log_odds <= 0.0) & (log_odds > smallest), log_odds, smallest).exp()
    powers, factor = [odds], odds
    for m in range(2, k + 1):
        if m in (2, 5):
            factor = torch.where(odds > math.exp(smallest / (4 if m == 2 else POWER_SUM_LIMIT)), odds, 0.0)
        powers.append(powers[-1] * factor)
    return torch.stack([power.sum(1) for power in powers], 1)


def _from_power_sums(sums: Tensor) -> list[Tensor]:
    """e_0..e_k by Newton's identities: e_m is the mean of (-1)^(i-1) e_{m-i} p_i over i = 1..m."""
    e = [torch.ones_like(sums[:, 0])]
    for m in range(1, sums.shape[1] + 1):
        terms = [(-1) ** (i - 1) * e[m - i] * sums[:, i - 1] for i in range(1, m + 1)]
        e.append(sum(terms[1:], terms[0]) / m)
    return e


def _multiplied_in(head: Tensor, tail: list[Tensor]) -> list[Tensor]:
    """The coefficients of tail times the product of (1 + w z) / (1 + w) over the head's w = exp(log odds)."""
    product = tail
    for column in head.unbind(1):
        success, failure = column.sigmoid(), (-column).sigmoid()
        product = [product[0] * failure] + [now * failure + before * success for before, now in pairwise(product)]
    return product


# --- targets that are probabilities ----------------------------------------------------------------------------------


def expected(
    scores: Tensor,  # (rows, classes)
    q: Tensor,  # (rows, classes), probabilities
    *,
    k: KArgument = 5,
    tau: float = 1.0,
    margin: float = 1.0,
    **_: Any,
) -> Tensor | None:
    """sum over y of q_y times the loss (rows,), in O(k) a class; None where some k is too large for power sums."""
    pairs = [pair for pair in zip(*check_k(k, scores.shape[1]), strict=True) if pair[0] < scores.shape[1]]
    if any(each > POWER_SUM_LIMIT for each, _ in pairs):
        return None
    loss, own = torch.zeros_like(scores[:, 0]), torch.where(q != 0.0, scores, 0.0)
    for each, share in pairs:
        rate = 1.0 / (each * tau)
        gap = margin / tau + every_log_ratio(scores, each, rate) - rate * own
        loss = loss + share * tau * (q * softplus(gap, threshold=30.0)).sum(1)
    return loss


def every_log_ratio(scores: Tensor, k: int, rate: float) -> Tensor:
    """`log_ratio` for every class as the target (rows, classes), k <= POWER_SUM_LIMIT.

    From the coefficients of all classes one that is not among the k largest is divided out, which is safe as its w is
    at most 1. For each of the k largest the others and the (k+1)-th are multiplied into the rest.
    """
    best = largest_classes(scores, k + 1)
    head = scores.gather(1, best)
    about, lower_about = (finite_or_zero(head[:, place : place + 1].detach()) for place in (k - 1, k))
    log_odds = rate * (head.to(row_dtype(scores)) - about)
    product = torch.stack(_multiplied_in(log_odds[:, :k], _tail_coefficients(scores, head[:, :k], about, rate, k)))
    absent = head[:, k - 1 : k] == -torch.inf
    product = torch.where(absent.T, 1.0, product)
    product = (product / product[k]).to(scores.dtype)  # those of a long row would overflow in float32
    odds = (scores - about) * rate
    odds = torch.where(odds > 0.0, 0.0, odds).exp()  # unlike clamp, with a slope where it is 0
    odds = odds.scatter(1, best[:, :k], 0.0)  # nothing is divided out for the k largest, where it might leave 0
    lower, upper = odds, product[0][:, None].expand_as(odds)
    for coefficient in product[1:]:
        lower, upper = upper, coefficient[:, None] - odds * upper
    ratio = _log_quotient(upper, lower, absent) + rate * about
    log_odds, rest = log_odds + rate * (about - lower_about), _tail_coefficients(scores, head, lower_about, rate, k)
    pairs = [_multiplied_in(torch.cat((log_odds[:, :i], log_odds[:, i + 1 :]), 1), rest)[-2:] for i in range(k)]
    lower, upper = (torch.stack(part, 1) for part in zip(*pairs, strict=True))
    among = _log_quotient(upper, lower, head[:, k:] == -torch.inf) + rate * lower_about
    return ratio.scatter(1, best[:, :k], among.to(ratio.dtype))


def _tail_coefficients(scores: Tensor, head: Tensor, about: Tensor, rate: float, k: int) -> list[Tensor]:
    """Of the product of (1 + w z) over the classes that are not in the head."""
    sums = _sums_of_powers(scores, about, rate, k) - _sums_of_powers(head, about, rate, k)
    return _from_power_sums(sums.to(row_dtype(scores)))


def _log_quotient(upper: Tensor, lower: Tensor, absent: Tensor) -> Tensor:
    return torch.where(absent, -torch.inf, torch.where(absent, 1.0, upper / torch.where(absent, 1.0, lower)).log())


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the head's classes (rows, depth), and a table: `_columns` for every k, and last y's gradient."""
    ks, weights, tau, margin = options
    rows, classes = scores.shape
    dtype = row_dtype(scores)
    x_target = target_scores(scores, target)
    head, index = largest_wrong(scores, target, max(_head_size(k, classes) for k in ks))
    all_finite = scores.is_cpu and math.isfinite(float(head.sum()) + float(x_target.sum()))
    lead, loss, pull = x_target.to(dtype), x_target.new_zeros(rows, dtype=dtype), x_target.new_zeros(rows, dtype=dtype)
    table = []
    for k, weight in zip(ks, weights, strict=True):
        size = _head_size(k, classes)
        rate = 1.0 / (k * tau)
        kth, absent, bad = (head[:, k - 1], None, None) if all_finite else _kth_wrong(head, x_target, k)
        tilt, tail = _tail(scores, target, index[:, :size], kth, k, rate)
        kth = kth.to(dtype)
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
        table += [torch.stack((kth, tilt)), *_inclusion(log_odds, tail, products, full, slope)]
    if not all_finite:
        pull.masked_fill_(x_target == -torch.inf, 0.0)
    return loss.to(scores.dtype), index, torch.cat([*table, pull[None]]).T.contiguous()


def _head_size(k: int, classes: int) -> int:
    return min(k if k <= POWER_SUM_LIMIT else 2 * k, classes - 1)


def _columns(k: int, classes: int) -> list[int]:
    """Widths of the parts of the saved table for one k: (t, tilt), the polynomial's and the head's gradient."""
    return [2, k, _head_size(k, classes)]


def _unpack(table: Tensor, ks: list[int], classes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each k its (t, tilt) (2, rows) and gradient, polynomial (k, rows) and head (size, rows)."""
    widths = [width for k in ks for width in _columns(k, classes)]
    parts = table.T.split([*widths, 1])
    return list(zip(parts[0:-1:3], parts[1:-1:3], parts[2:-1:3], strict=True))


def _kth_wrong(head: Tensor, x_target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th largest wrong score (a harmless stand-in where there is none), and which rows are absent or bad."""
    largest, kth = head[:, 0], head[:, k - 1]
    bad = not_finite_above(largest, x_target)
    absent = kth == -torch.inf  # fewer than k wrong classes are possible: y cannot be missed
    return torch.where(absent | bad, finite_or_zero(largest), kth), absent, bad


def _tail(scores: Tensor, target: Tensor, index: Tensor, kth: Tensor, k: int, rate: float) -> tuple[Tensor, Tensor]:
    """The tilt (rows,) and the tail's coefficients r (k + 1, rows), up to one common factor a row."""
    dtype = row_dtype(scores)
    if k <= POWER_SUM_LIMIT:
        sums = _power_sums(scores, torch.cat((index, target[:, None]), 1), kth, k, rate)
        return torch.zeros_like(kth, dtype=dtype), _newton_identities(sums.to(dtype))
    tilts, tails = [kth[:0]], [scores.new_zeros((k + 1, 0), dtype=dtype)]
    for rows in chunks(scores, _LANE_CHUNK):
        tilt, tail = _lanes(scores[rows], target[rows], index[rows], kth[rows], k, rate)
        tilts.append(tilt)
        tails.append(tail)
    return torch.cat(tilts).to(dtype), torch.cat(tails, 1)


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
    lanes = polynomials.lanes_for(rows, classes, k)
    steps = -(-classes // lanes)
    log_odds, buffer = buffers(scores, 2, _LANE_CHUNK, lanes * steps)
    log_odds, buffer = log_odds[:rows], buffer[:rows]
    log_odds[:, classes:] = -torch.inf
    exponents(scores, kth, rate, log_odds[:, :classes])
    log_odds.scatter_(1, target[:, None], -torch.inf)
    tilt = _balance(log_odds, k, buffer)
    probability = log_odds.add_(tilt[:, None]).sigmoid_().scatter_(1, index, 0.0)
    trials = buffer.view(steps, lanes, rows).copy_(probability.view(rows, lanes, steps).permute(2, 1, 0))
    return tilt, polynomials.success_counts(trials, k, row_dtype(scores))


def _balance(log_odds: Tensor, k: int, buffer: Tensor | None = None) -> Tensor:
    """The tilt (rows,) at which the expected number of successes is about k - 1/2: safeguarded Newton steps.

    Any tilt is right at which the chances of k and of k - 1 are far from underflow: within a few standard deviations.
    Three steps get there but for leaders far ahead of a crowd of ties. To look would stall a device, or a tracer: only
    forward, which brings a `buffer`, does.
    """
    below = torch.clamp(log_odds, max=0.0, out=buffer).exp_().sum(1) - (k - 1)
    low = torch.full_like(below, -math.log(2 * (log_odds.shape[1] - k) + 1))
    high = torch.full_like(below, math.log(2 * k - 1))
    tilt = (k / below.clamp_(min=1)).log_().clamp_(max=0.0).maximum(low)
    most_often, most = _NEWTON_STEPS
    for done in range(1, most + 1):
        probability = torch.add(log_odds, tilt[:, None], out=buffer).sigmoid_()
        mean = probability.sum(1)
        variance = mean - squares(probability)
        low, high = torch.where(mean < k - 0.5, tilt, low), torch.where(mean > k - 0.5, tilt, high)
        step = tilt - (mean - (k - 0.5)) / variance
        tilt = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
        look = done >= most_often and buffer is not None and buffer.is_cpu
        if look and not bool(((mean - (k - 0.5)) ** 2 > 4 * variance + 0.25).any()):
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


def backward(
    grad: Tensor,  # (rows,)
    scores: Tensor,
    target: Tensor,
    options: Options,
    saved: tuple[Tensor, ...],
) -> Tensor:
    """grad * d loss / d scores: for every k one exponential and k multiply-adds an element."""
    ks, _, tau, _ = options
    classes = scores.shape[1]
    index, table = saved
    scaled = (table * grad.to(table.dtype)[:, None]).to(scores.dtype)
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
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


def head(options: Options) -> Head:
    """The sums or counts of every k are relative to its k-th largest wrong score; none of their odds exceeds 1."""
    rates = {k: 1.0 / (k * options.tau) for k in options.ks}
    tails: list[Tail] = [(Counts if k > POWER_SUM_LIMIT else PowerSums)(rate, k, k) for k, rate in rates.items()]
    return Head(max(2 * k if k > POWER_SUM_LIMIT else k for k in options.ks) + 1, tails)


def saved_by_compiling(options: Options) -> float:
    """Seconds for every score."""
    return 7e-9 if options.ks[-1] <= POWER_SUM_LIMIT else 0.0


LOSS = Loss(
    "smooth", Options, definition, forward, backward, head=head, centred=False, saved_by_compiling=saved_by_compiling
)


@partial(takes_probabilities, expected=expected)
def smooth_topk_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    tau: float = 1.0,
    margin: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The smooth top-k SVM of Berrada, Zisserman and Kumar (2018); chapter 6.

    With :math:`u = x / (k\tau)` and :math:`e_j` the elementary symmetric polynomials of :math:`e^{u_i}, i \ne y`,

    .. math:: \ell = \tau\,\mathrm{softplus}\big(\text{margin}/\tau + \log e_k - \log e_{k-1} - x_y/(k\tau)\big).

    ``margin=0, tau=1, k=1`` is cross-entropy; ``tau -> 0`` is ``topk_hinge_loss(variant="smooth_limit")``.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        k: the number of guesses, or a mapping ``{k: weight}`` whose weights sum to 1.
        tau: temperature, > 0. The gradient shrinks like 1/k, so tune the learning rate with it.
        margin: by how much the right class must lead, >= 0.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch", "compiled" or "triton".
    """
    ks, weights = check_k(k, check_scores(scores, target))
    tau = check_number("tau", tau, above=0.0)
    margin = check_number("margin", margin, least=0.0)
    options = Options(ks, weights, tau, margin)
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    return reduced_loss(LOSS, options, scores, target, **tail)


class SmoothTopKLoss(LossModule):
    """Module form of :func:`topk.smooth_topk_loss`."""

    function = staticmethod(smooth_topk_loss)

    def __init__(
        self,
        k: KArgument = 5,
        *,
        tau: float = 1.0,
        margin: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())
