"""The smooth loss, k > 6: the tilt of a row, at which the mean number of successes S is within 1/4 of k - 1/2.

No selection is needed. A score near the k-th is found by bisection, and from there Newton steps lead to the shift of
the log-odds; how well it is met decides only the conditioning, not the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from topk.kernels.common import exponential, finite_or_zero, order_of, reciprocal, score_of
from topk.kernels.smooth_sift import middle, tile_of


@triton.jit
def extremes(x, source, ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr):
    """The largest score (+inf also for NaN), the smallest above -inf, how many are above -inf, and their sum."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    bottom = tl.full((ROWS,), float("inf"), tl.float32)
    possible = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, source[2] if STREAMS else BLOCK, BLOCK):
        tile = tile_of(x, source, start, BLOCK, STREAMS)
        there = tile > float("-inf")
        top = tl.maximum(top, tl.max(tl.minimum(tile, float("inf")), 1))
        bottom = tl.minimum(bottom, tl.min(tl.where(there, tile, float("inf")), 1))
        possible += tl.sum(there.to(tl.int32), 1)
        total += tl.sum(tl.where(there, tile, 0.0), 1)
    return top, bottom, possible, total


@triton.jit
def near_kth(x, source, bottom, top, rate, k, BLOCK: tl.constexpr, STREAMS: tl.constexpr):
    """A score that the k-th largest exceeds by at most 2 / rate, and that bound times rate.

    Bisection by value, which is quick for ordinary scores, in turn with bisection by bits, which ends for all.
    """
    low, high = order_of(bottom), order_of(top)
    spread = (score_of(high) - score_of(low)) * rate
    by_value = True
    while tl.max(((spread > 2.0) & (low < high)).to(tl.int32), 0) > 0:
        between = middle(low, high, by_value)
        by_value = by_value == 0
        count = tl.zeros_like(low)
        for start in range(0, source[2] if STREAMS else BLOCK, BLOCK):
            tile = tile_of(x, source, start, BLOCK, STREAMS)
            count += tl.sum((tile >= score_of(between)[:, None]).to(tl.int32), 1)
        open = low < high
        low = tl.where(open & (count >= k), between, low)
        high = tl.where(open & (count < k), between - 1, high)
        spread = (score_of(high) - score_of(low)) * rate
    return score_of(low), tl.minimum(spread, 2.0)


@triton.jit
def signed_odds(x, center, shift, rate):
    """q = min(P, 1 - P) with the sign of 1/2 - P, and whether P > 1/2. rate: one for all rows, or one a row."""
    log_odds = (x - center[:, None]) * (rate + tl.zeros_like(center))[:, None] + shift[:, None]
    odds = exponential(-tl.abs(log_odds))
    q = odds * reciprocal(1.0 + odds)
    head = log_odds > 0.0
    return tl.where(head, -q, q), head


@triton.jit
def _moments(
    x, source, center, shift, rate, limit, rest, lanes, ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr
):
    """How many have P > 1/2, the mean of S less that number, and the variance; of a sifted row to 0.2 and 0.9 %.

    Last, the signed odds of `x` or, where rows are read again, of the last tile.
    """
    signed = x
    heads = tl.zeros((ROWS,), tl.int32)
    mean = tl.zeros((ROWS,), tl.float32)
    variance = tl.zeros((ROWS,), tl.float32)
    for start in range(0, source[2] if STREAMS else BLOCK, BLOCK):
        signed, head = signed_odds(tile_of(x, source, start, BLOCK, STREAMS), center, shift, rate)
        heads += tl.sum(head.to(tl.int32), 1)
        mean += tl.sum(signed, 1)
        variance += tl.sum(tl.abs(signed) - signed * signed, 1)
    if rest is not None:
        more_mean, more_variance = _moments_of_rest(rest, lanes, (finite_or_zero(limit) - center) * rate + shift)
        mean += more_mean
        variance += more_variance
    return heads, mean, variance, signed


@triton.jit
def _moments_of_rest(rest, lanes, log_odds):
    """The sums of P and P (1 - P) over scores sifted out, from the log-odds at the limit and four power sums.

    The largest P is below 1/2 at the shift looked for; at one so large that it is not, the bound alone tells so. The
    polynomials are those of the least relative error in the odds up to 1.
    """
    odds = tl.exp(tl.minimum(log_odds, 0.0))[:, None]
    power = tl.where(lanes == 1, odds, tl.where(lanes == 2, odds * odds, odds * odds * odds))
    power = tl.where(lanes == 4, odds * power, power) * rest
    mean = tl.where(lanes == 1, 0.99824407, tl.where(lanes == 2, -0.94263684, 0.0))
    mean = tl.where(lanes == 3, 0.66518242, tl.where(lanes == 4, -0.22165374, mean))
    variance = tl.where(lanes == 1, 0.99148853, tl.where(lanes == 2, -1.75419715, 0.0))
    variance = tl.where(lanes == 3, 1.60108585, tl.where(lanes == 4, -0.59047655, variance))
    return tl.sum(mean * power, 1), tl.sum(variance * power, 1)


@triton.jit
def balance(
    x,
    source,
    center,
    spread,
    rate,
    possible,
    average,  # (ROWS,) of the possible scores less the center, times rate; None: not known
    limit,
    rest,
    lanes,
    live,
    k,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """A shift of the log-odds at which the mean of S is within 1/4 of k - 1/2, and the variance there.

    Last, signed odds and heads at that shift, of `x` if that is the row.

    Newton steps for the logit of mean / n, which is linear in the shift for equal scores; bisection where they leave
    the bracket. Scores close together against k tau are met by the first guess, which knows their average.
    """
    n = tl.where(live, possible, k).to(tl.float32)
    half = k - 0.5
    aim = tl.log(half / (n - half))
    low = -tl.log(2.0 * (n - k) + 1.0) - spread
    high = tl.log(tl.full((ROWS,), 1.0, tl.float32) * (2 * k - 1))
    guess = aim if average is None else aim - tl.where(live, average, 0.0)
    shift = tl.minimum(tl.maximum(guess, low), 0.0)
    heads, mean, variance, signed = _moments(x, source, center, shift, rate, limit, rest, lanes, ROWS, BLOCK, STREAMS)
    excess = mean + (heads - k).to(tl.float32) + 0.5
    steps = 0
    while (tl.max((live & (tl.abs(excess) > 0.25)).to(tl.int32), 0) > 0) & (steps < 40):
        low = tl.where(excess < 0.0, shift, low)
        high = tl.where(excess > 0.0, shift, high)
        hits = tl.maximum(excess + half, 1e-20)
        misses = tl.maximum(n - hits, 1e-20)
        step = shift + (aim - tl.log(hits / misses)) * (hits / n) * misses / tl.maximum(variance, 1e-20)
        step = tl.where((step > low) & (step < high), step, (low + high) * 0.5)
        shift = tl.where(tl.abs(excess) > 0.25, step, shift)
        heads, mean, variance, signed = _moments(
            x, source, center, shift, rate, limit, rest, lanes, ROWS, BLOCK, STREAMS
        )
        excess = mean + (heads - k).to(tl.float32) + 0.5
        steps += 1
    return shift, tl.where(live, variance, 1.0), signed, heads
