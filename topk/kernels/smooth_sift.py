"""The smooth loss, k > 6, a row longer than a tile: its largest scores in one tile, and of all others power sums.

Every column of a tile keeps the larger of its score and the new one. What it loses is seldom above a limit that the
wanted scores reach, and then takes the place of a lower score nearby. Four power sums relative to the limit give the
mean of S to 0.2 % of what the others contribute, since all of those have P < 1/2: a tilt as good as any.
"""

from __future__ import annotations

import triton
import triton.language as tl

from topk.kernels.common import exponential, finite_or_zero, load_tile, order_of, score_of


@triton.jit
def chosen(numbers, i):
    """The i-th of some constants, i known on the device only: loops over several k compile one body."""
    number = numbers[0]
    for j in tl.static_range(1, len(numbers)):
        number = tl.where(i == j, numbers[j], number)
    return number


@triton.jit
def tile_of(x, source, start, BLOCK: tl.constexpr, STREAMS: tl.constexpr):
    """The wrong scores (ROWS, BLOCK) from column `start` on, -inf for y: read again or, of a row that fits, `x`."""
    if STREAMS:
        starts, class_stride, classes, used, target = source
        columns = start + tl.arange(0, BLOCK)
        x = load_tile(starts, columns, class_stride, classes, used)
        x = tl.where(columns[None, :] == target[:, None], float("-inf"), x)
    return x


@triton.jit
def sift(
    source, tau, KS: tl.constexpr, KEEP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One read of a row that streams: a tile of scores that holds the KEEP largest, and what to know of the others.

    kept (ROWS, BLOCK); limit (ROWS,), that no other score exceeds and KEEP scores reach; sums (ROWS, LANES), in lane
    8 i + m, m up to 4, for the i-th k the sum of exp(m (x - limit) / (k tau)) over the others; how many are above -inf.

    Every column keeps the larger of its score and the new one. What it loses is seldom above the limit, and then takes
    the place of a lower score nearby, or anywhere; the limit is raised when a quarter of the columns are above it.
    """
    lanes = tl.arange(0, LANES)[None, :]
    rates = (lanes % 8).to(tl.float32) / (chosen(KS, lanes // 8) * tau)
    kept = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    limit = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS, LANES), tl.float32)
    others = tl.zeros((ROWS,), tl.int32)
    for start in range(0, source[2], BLOCK):
        tile = tile_of(None, source, start, BLOCK, True)
        tile = tl.minimum(tile, float("inf"))
        kept, lost = tl.maximum(kept, tile), tl.minimum(kept, tile)
        if _any_above(lost, limit):
            if tl.max(_reaching(kept, limit) + _reaching(lost, limit), 0) > max(BLOCK // 4, 2 * KEEP):
                raised = _raised(kept, lost, limit, KEEP)
                fade = tl.minimum(finite_or_zero(limit) - finite_or_zero(raised), 0.0)
                sums *= tl.exp(fade[:, None] * rates)
                limit = raised
            while _any_above(lost, limit):
                kept, lost, placed = _swapped(kept, lost, limit, ROWS, BLOCK, 4)
                if placed == 0:
                    kept, lost, placed = _swapped(kept, lost, limit, ROWS, BLOCK, BLOCK)
        others += tl.sum((lost > float("-inf")).to(tl.int32), 1)
        lost -= finite_or_zero(limit)[:, None]
        for i in range(len(KS)):
            odds = exponential(lost * (1.0 / (chosen(KS, i) * tau)))
            square = odds * odds
            sums += tl.where(lanes == 8 * i + 1, tl.sum(odds, 1)[:, None], 0.0)
            sums += tl.where(lanes == 8 * i + 2, tl.sum(square, 1)[:, None], 0.0)
            sums += tl.where(lanes == 8 * i + 3, tl.sum(odds * square, 1)[:, None], 0.0)
            sums += tl.where(lanes == 8 * i + 4, tl.sum(square * square, 1)[:, None], 0.0)
    return kept, limit, sums, others


@triton.jit
def _any_above(tile, limit):
    """Whether a score of any row exceeds the row's limit."""
    return tl.max((tl.max(tile, 1) > limit).to(tl.int32), 0) > 0


@triton.jit
def _swapped(kept, lost, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """The largest score lost in place of the smallest kept in each group of SIZE columns, if that is less.

    Returns both tiles, and whether a score above the limit found a place.
    """
    kept = tl.reshape(kept, (ROWS, SIZE, BLOCK // SIZE))
    lost = tl.reshape(lost, (ROWS, SIZE, BLOCK // SIZE))
    best, best_place = tl.max(lost, 1, return_indices=True)
    least, least_place = tl.min(kept, 1, return_indices=True)
    swaps = best > least
    places = tl.arange(0, SIZE)[None, :, None]
    kept = tl.where((places == least_place[:, None, :]) & swaps[:, None, :], best[:, None, :], kept)
    lost = tl.where((places == best_place[:, None, :]) & swaps[:, None, :], least[:, None, :], lost)
    placed = tl.max(tl.max((swaps & (best > limit[:, None])).to(tl.int32), 1), 0)
    return tl.reshape(kept, (ROWS, BLOCK)), tl.reshape(lost, (ROWS, BLOCK)), placed


@triton.jit
def _reaching(tile, level):
    """How many scores reach the row's level."""
    return tl.sum((tile >= level[:, None]).to(tl.int32), 1)


@triton.jit
def _raised(kept, lost, limit, KEEP: tl.constexpr):
    """A level that at least KEEP of both tiles reach, at most twice as many unless they are tied; bisected."""
    low = order_of(tl.maximum(limit, tl.min(kept, 1)))
    high = order_of(tl.max(kept, 1))
    count = _reaching(kept, score_of(low)) + _reaching(lost, score_of(low))
    by_value = True
    while tl.max(((count > 2 * KEEP) & (low < high)).to(tl.int32), 0) > 0:
        between = middle(low, high, by_value)
        by_value = by_value == 0
        reached = _reaching(kept, score_of(between)) + _reaching(lost, score_of(between))
        open = (count > 2 * KEEP) & (low < high)
        count = tl.where(open & (reached >= KEEP), reached, count)
        low = tl.where(open & (reached >= KEEP), between, low)
        high = tl.where(open & (reached < KEEP), between - 1, high)
    return score_of(low)


@triton.jit
def middle(low, high, by_value):
    """A score between the two, above `low`: by value, where that is one, or by bits."""
    by_bits = (low | high) - ((low ^ high) >> 1)
    halfway = order_of(score_of(low) * 0.5 + score_of(high) * 0.5)
    return tl.where(by_value & (halfway > low) & (halfway <= high), halfway, by_bits)
