"""The noised top-k hinge in Triton: noise drawn where it is used, of which nothing but the outcome leaves the chip.

A program is a row. It draws four samples at a time, each word of Philox a pure function of (seed, class, row, sample),
so that neither the grid nor the cut of the rows changes a single number. In every sample it needs only which score is
(k + 1)-th. With the row in registers that takes few operations a score: the columns of a thread are a group, and the
(k + 1)-th largest of the groups' maxima is a bound from below that the right score seldom is far above; counting what
lies above the bound tells how many steps up are left. Where there are too few groups for that, the bits of the score
are bisected. Longer rows stream in tiles, once for every four samples. Every column of the tiles keeps its largest, and
the k + 1 largest of the row are among those unless two met in a column, which what the columns lost tells. Then, or for
large k at once, each tile is searched for what is larger than the k + 1 kept so far; a tile whose scores are too low
for any noise to lift them is not even drawn.

Scores are taken relative to x_y, so that the hinge keeps its digits.

Bytes a row, with n classes of s bytes, S samples and q ks: forward reads n s (n s for every four samples if the row
streams), and writes 4 q (S + 1) + 4; backward reads that, writes and reads 8 (q S + 1), and writes n s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import (
    NO_CLASS,
    Saved,
    SavedShape,
    cosine,
    in_order,
    lane,
    log2,
    nothing_kept,
    offers,
    order_of,
    row_states,
    score_of,
    sine,
    take,
)
from topk.kernels.patched import patched_exponentials
from topk.losses.noised import Options

_THREAD = 8  # scores a thread: four samples of them are in registers at once
_WIDEST = 4096  # the longest row in registers
_STREAMED = 2048  # the width of a tile of longer ones, and
_STREAMED_THREAD = 4  # scores a thread: four samples, and beside them the largest of every column so far
_LANES = 64  # entries of a row added up together, at most
_CHUNK = 16  # entries that these are compared with at a time
_LARGEST_NORMAL = tl.constexpr(6.8)  # no noise is larger: sqrt(-2 log 2^-33) = 6.76
_BELOW_MINUS_INFINITY = tl.constexpr(-2139095042)  # the order of -inf is one more


def why_not(absent: tuple[bool, ...]) -> str | None:
    """The expectation by quadrature has no kernel."""
    return "samples=None (quadrature) has no Triton kernel" if absent[Options._fields.index("samples")] else None


def _draws(options: Options) -> int:
    """How many samples are looked at: without noise, all are the same one."""
    return options.samples if options.samples is not None and options.epsilon > 0 else 1


def saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    """The hinges' slopes (rows, ks), and the classes that came (k + 1)-th (rows, draws, ks)."""
    count = len(options.ks)
    return ((rows, count), None), ((rows, _draws(options), count), torch.int32)


class _Cut(NamedTuple):
    """A row as tiles of `size` by `groups` classes, a group a thread."""

    size: int
    groups: int
    streams: bool

    @property
    def warps(self) -> int:
        return self.groups // 32


def _cut(classes: int) -> _Cut:
    widest = min(common.WIDEST, _WIDEST)
    streams = classes > widest
    block = min(widest, common.STREAMED, _STREAMED) if streams else max(32, triton.next_power_of_2(classes))
    warps = min(16, max(1, block // (32 * (_STREAMED_THREAD if streams else _THREAD))))
    return _Cut(max(1, block // (32 * warps)), 32 * warps, streams)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(
    scores: Tensor, target: Tensor, options: Options, ignore_index: int, margins: Tensor, seeds: Tensor
) -> tuple[Tensor, ...]:
    """loss (rows,) and what `saved` names."""
    ks, draws = options.ks, _draws(options)
    rows, classes = scores.shape
    slopes, kept = common.allocate(scores, saved(rows, classes, options))
    loss = scores.new_empty(rows, dtype=torch.float32)
    cut = _cut(classes)
    common.launch(
        _forward, rows,
        scores, target.contiguous(), margins, seeds.contiguous(), loss, slopes, kept,
        classes, *scores.stride(), margins.stride(0), max(1, rows // seeds.shape[0]), ignore_index,
        float(options.epsilon), draws // 4,
        KS=tuple(ks), RATES=tuple(float(options.scale * weight) for weight in options.weights),
        PLACES=common.lanes(len(ks)), COUNT=ks[-1] + 1, LANES=common.lanes(ks[-1] + 1), DRAWS=draws,
        NOISY=options.epsilon > 0, SIZE=cut.size, GROUPS=cut.groups, STREAMS=cut.streams, warps=cut.warps,
    )  # fmt: skip
    return loss, slopes, kept


# The rows' stride is kept from the compiler: knowing that rows start at multiples of 16 bytes it would give a thread
# neighbouring columns, four or eight at a time, and spread a group over several threads.
@triton.jit(do_not_specialize=["row_stride"])
def _forward(
    scores_ptr, target_ptr, margins_ptr, seeds_ptr, loss_ptr, slopes_ptr, kept_ptr,
    classes, row_stride, class_stride, margin_stride, rows_a_seed, ignore_index, epsilon, fours,
    KS: tl.constexpr, RATES: tl.constexpr, PLACES: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr,
    DRAWS: tl.constexpr, NOISY: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target, used, wrong = row_states(target_ptr, row, row + 1, classes, ignore_index)
    places = tl.arange(0, PLACES)
    slopes = tl.where(wrong, float("nan"), tl.zeros((PLACES,), tl.float32))
    loss = tl.where(wrong, float("nan"), 0.0)
    kept = kept_ptr + row * (DRAWS * len(KS))
    if used:
        start = scores_ptr + row * row_stride
        mine = tl.load(start + target.to(tl.int64) * class_stride).to(tl.float32)
        centre = tl.zeros((), tl.float32)
        if NOISY:
            centre = tl.where(tl.abs(mine) < float("inf"), mine, 0.0)
        seed = tl.load(seeds_ptr + row // rows_a_seed)
        counter = (row % rows_a_seed).to(tl.int32)
        x, columns, bad = _tile(start, 0, classes, class_stride, centre, SIZE, GROUPS)
        bad = tl.max(tl.max(bad, 1), 0)
        total = tl.zeros((PLACES,), tl.float32)
        if DRAWS >= 4:
            for four in range(fours):
                more, worse = _samples(
                    start, x, columns, classes, class_stride, centre, seed, counter, four, epsilon, kept,
                    KS, PLACES, COUNT, LANES, DRAWS, 4, NOISY, SIZE, GROUPS, STREAMS,
                )  # fmt: skip
                total += more
                bad = bad | worse
        if DRAWS % 4 > 0:
            more, worse = _samples(
                start, x, columns, classes, class_stride, centre, seed, counter, DRAWS // 4, epsilon, kept,
                KS, PLACES, COUNT, LANES, DRAWS, 4 if DRAWS % 4 == 3 else DRAWS % 4, NOISY, SIZE, GROUPS, STREAMS,
            )  # fmt: skip
            total += more
            bad = bad | worse
        margin = tl.load(margins_ptr + row * margin_stride).to(tl.float32)
        gap = margin + (total / DRAWS + (centre - mine))
        rates = tl.zeros((PLACES,), tl.float32)
        for i in tl.static_range(len(KS)):
            rates = tl.where(places == i, RATES[i], rates)
        loss = tl.sum(rates * tl.maximum(tl.where(places < len(KS), gap, 0.0), 0.0), 0)
        loss = tl.where(mine == float("-inf"), float("inf"), loss)
        loss = tl.where(bad > 0, float("nan"), loss)
        slopes = tl.where(bad > 0, float("nan"), tl.where(gap > 0.0, rates, 0.0))
    else:
        entries = tl.arange(0, 32)
        for first in range(0, DRAWS * len(KS), 32):
            tl.store(kept + first + entries, entries * 0, mask=first + entries < DRAWS * len(KS))
    tl.store(loss_ptr + row, loss)
    tl.store(slopes_ptr + row * len(KS) + places, slopes, mask=places < len(KS))


@triton.jit
def _tile(start, first, classes, class_stride, centre, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """Scores less the centre (1, SIZE, GROUPS), -inf for none; their classes; 1 in groups (1, GROUPS) of NaN or inf."""
    columns = first + tl.arange(0, SIZE)[None, :, None] * GROUPS + tl.arange(0, GROUPS)[None, None, :]
    place = start + columns.to(tl.int64) * class_stride
    raw = tl.load(place, mask=columns < classes, other=float("-inf")).to(tl.float32)
    fine = raw < float("inf")
    return tl.where(fine, raw, float("-inf")) - centre, columns, tl.max((fine == 0).to(tl.int32), 1)


@triton.jit
def _samples(
    start, x, columns, classes, class_stride, centre, seed, counter, four, epsilon, kept,
    KS: tl.constexpr, PLACES: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr, DRAWS: tl.constexpr,
    WIDTH: tl.constexpr, NOISY: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """Stores the classes that are (k + 1)-th in up to four samples; the sums of their noised scores, and `bad`."""
    bad = tl.zeros((), tl.int32)
    if STREAMS:
        best, places, bad = _streamed(
            start, classes, class_stride, centre, seed, counter, four, epsilon,
            COUNT, LANES, WIDTH, NOISY, SIZE, GROUPS,
        )  # fmt: skip
    else:
        noised = _noised(x, columns, seed, counter, four, epsilon, WIDTH, NOISY)
        tops = tl.max(noised, 1)
    sample = 4 * four + tl.arange(0, WIDTH)
    drawn = sample < DRAWS
    total = tl.zeros((PLACES,), tl.float32)
    for i in tl.static_range(len(KS)):
        if STREAMS:
            lanes = tl.arange(0, LANES)[None, :]
            level, found = lane(best, lanes, KS[i]), lane(places, lanes, KS[i])
        else:
            level, found = _ranked(noised, tops, columns, KS[i], GROUPS)
        tl.store(kept + sample * len(KS) + i, tl.where(level > float("-inf"), found, 0), mask=drawn)
        total += tl.where(tl.arange(0, PLACES) == i, tl.sum(tl.where(drawn, level, 0.0), 0), 0.0)
    return total, bad


# --- noise -----------------------------------------------------------------------------------------------------------


@triton.jit
def _noised(x, columns, seed, counter, four, epsilon, WIDTH: tl.constexpr, NOISY: tl.constexpr):
    """x + epsilon Z (WIDTH, SIZE, GROUPS) for samples 4 four, 4 four + 1, ..."""
    noised = x
    if NOISY:
        a, b, c, d = _words(seed, columns, counter, four)
        noise, second = _normals(a, b, epsilon)
        # Each choice is between whole registers, made by the compiler.
        sample = tl.arange(0, WIDTH)[:, None, None]
        if WIDTH > 1:
            noise = tl.where(sample == 0, noise, second)
        if WIDTH > 2:
            third, fourth = _normals(c, d, epsilon)
            noise = tl.where(sample < 2, noise, tl.where(sample == 2, third, fourth))
        noised = x + noise
    return noised


@triton.jit
def _words(seed, one, two, three):
    """The four words of Philox 4x32-10 at the counter (one, two, three, 0), as uint32.

    As `tl.philox`, with each product of 64 bits in one instruction in place of two for its halves.
    """
    d = tl.zeros((), tl.uint32)
    a, b, c = one.to(tl.uint32), two.to(tl.uint32), d + three
    seed = seed.to(tl.uint64)
    key, other_key = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        left, right = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (right >> 32).to(tl.uint32) ^ b ^ key, (left >> 32).to(tl.uint32) ^ d ^ other_key
        b, d = right.to(tl.uint32), left.to(tl.uint32)
        key, other_key = (key + 0x9E3779B9).to(tl.uint32), (other_key + 0xBB67AE85).to(tl.uint32)
    return a, b, c, d


@triton.jit
def _normals(one, other, epsilon):
    """epsilon times two normals by Box-Muller, r cos t and r sin t; `counted_normals` in the torch path defines them.

    r = sqrt(-2 log((one + 1/2) / 2^32)) and t = 2 pi other / 2^32. Of pi - t, between -pi and pi, the device's own sine
    and cosine are off by 4.2e-7 at most: an instruction each.
    """
    uniform = one.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(tl.abs(-1.3862943611198906 * log2(uniform)))  # the approximate log of 1 may be above 0
    radius *= epsilon
    angle = 3.1415926535897932 - other.to(tl.float32) * 1.4629180792671596e-09
    return -(radius * cosine(angle)), radius * sine(angle)


# --- the (k + 1)-th of a row in registers ----------------------------------------------------------------------------


@triton.jit
def _ranked(noised, tops, columns, K: tl.constexpr, GROUPS: tl.constexpr):
    """The (K + 1)-th largest of every sample (WIDTH,), and its class; of equal ones the lower class is the larger."""
    if 2 * (K + 1) <= GROUPS:
        orders = order_of(tops)  # a warp's largest integer is one instruction
        best = tl.max(orders, 1)
        for _ in range(K):
            best = tl.max(tl.where(orders < best[:, None], orders, _BELOW_MINUS_INFINITY + 1), 1)
        level = score_of(best)
        above = _count_above(noised, level)
        while tl.max(above, 0) > K:
            higher = _least(tl.where(noised > level[:, None, None], noised, float("inf")))
            level = tl.where(above > K, higher, level)
            above = _count_above(noised, level)
    else:
        level = _bisected(noised, tops, K)
        above = _count_above(noised, level)
    return level, _class_at(noised, columns, level, K - above)


@triton.jit
def _count_above(noised, level):
    """How many of every sample lie above its level (WIDTH,): the signs of differences, two operations a score."""
    level = tl.maximum(level, -3.4028234e38) + 0.0  # neither -inf less -inf, which is NaN, nor -0.0 less 0.0
    below = level[:, None, None] - noised
    return tl.sum(tl.sum(below.to(tl.uint32, bitcast=True) >> 31, 1), 1).to(tl.int32)


@triton.jit
def _least(tile):
    return tl.min(tl.min(tile, 1), 1)


@triton.jit
def _bisected(noised, tops, K: tl.constexpr):
    """The smallest level that at most K lie above, by bisection of the 32 bits in the order of the numbers."""
    high = order_of(tl.max(tops, 1))
    low = tl.full(high.shape, _BELOW_MINUS_INFINITY, tl.int32)
    while tl.max((low + 1 < high).to(tl.int32), 0) > 0:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        many = _count_above(noised, score_of(middle)) > K
        low, high = tl.where(many, middle, low), tl.where(many, high, tl.where(low + 1 < high, middle, high))
    return score_of(high)


@triton.jit
def _class_at(noised, columns, level, ties):
    """The class with the noised score `level`; where several have it, that after the `ties` lowest of them."""
    there = tl.where(noised == level[:, None, None], columns, 0x7FFFFFFF)
    found = _least(there)
    ties = tl.where(level > float("-inf"), ties, 0)
    while tl.max(ties, 0) > 0:
        following = _least(tl.where(there > found[:, None, None], there, 0x7FFFFFFF))
        found = tl.where(ties > 0, following, found)
        ties -= 1
    return found


# --- the k + 1 largest of a row that streams -------------------------------------------------------------------------


@triton.jit
def _streamed(
    start, classes, class_stride, centre, seed, counter, four, epsilon,
    COUNT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, NOISY: tl.constexpr, SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """The COUNT largest noised scores of every sample (WIDTH, LANES), their classes, and 1 for NaN or +inf.

    They are looked for among the largest of every column of the tiles. Where a column lost one that is large enough,
    the row is drawn again, and every tile searched; that is seldom, unless COUNT^2 nears the number of columns.
    """
    kept, kept_classes, last, last_class = nothing_kept(WIDTH, COUNT, LANES)
    bad = tl.zeros((1, GROUPS), tl.int32)
    again = True
    if NOISY and 8 * COUNT * COUNT <= SIZE * GROUPS:
        best, places, lost, bad = _largest_of_columns(
            start, classes, class_stride, centre, seed, counter, four, epsilon, WIDTH, SIZE, GROUPS
        )
        tops = tl.max(best, 1)
        kept, kept_classes, last, last_class = take(
            kept, kept_classes, last, last_class, best[:, :, :, None], places[:, :, :, None], tops
        )
        missed = (order_of(lost) >= last[:, None]) & (lost > float("-inf"))
        again = tl.max(tl.max(missed.to(tl.int32), 1), 0) > 0
    if again:
        kept, kept_classes, last, last_class = nothing_kept(WIDTH, COUNT, LANES)
        for first in range(0, classes, SIZE * GROUPS):
            x, columns, worse = _tile(start, first, classes, class_stride, centre, SIZE, GROUPS)
            bad = bad | worse
            reach = tl.max(tl.max(tl.max(x, 1), 1), 0)
            if NOISY:
                reach += epsilon * _LARGEST_NORMAL
            if reach > tl.min(score_of(last), 0):
                noised = _noised(x, columns, seed, counter, four, epsilon, WIDTH, NOISY)
                tops = tl.max(noised, 1)
                if offers(tops, last):
                    kept, kept_classes, last, last_class = take(
                        kept, kept_classes, last, last_class,
                        noised[:, :, :, None], tl.broadcast_to(columns, noised.shape)[:, :, :, None], tops,
                    )  # fmt: skip
    best, places = in_order(kept, kept_classes, COUNT, LANES)
    return best, places, tl.max(tl.max(bad, 1), 0)


@triton.jit
def _largest_of_columns(
    start, classes, class_stride, centre, seed, counter, four, epsilon,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Of every column of the tiles the largest noised score, its class, and by group the largest of all others.

    best, places (WIDTH, SIZE, GROUPS); lost (WIDTH, GROUPS); 1 in a group (1, GROUPS) with NaN or +inf. Of equal scores
    the lower class is the larger.
    """
    best = tl.full((WIDTH, SIZE, GROUPS), float("-inf"), tl.float32)
    places = tl.full((WIDTH, SIZE, GROUPS), NO_CLASS, tl.int32)
    lost = tl.full((WIDTH, GROUPS), float("-inf"), tl.float32)
    bad = tl.zeros((1, GROUPS), tl.int32)
    for first in range(0, classes, SIZE * GROUPS):
        x, columns, worse = _tile(start, first, classes, class_stride, centre, SIZE, GROUPS)
        bad = bad | worse
        noised = _noised(x, columns, seed, counter, four, epsilon, WIDTH, True)
        lost = tl.maximum(lost, tl.max(tl.minimum(best, noised), 1))
        places = tl.where(noised > best, columns, places)
        best = tl.maximum(best, noised)
    return best, places, lost, bad


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad: Tensor, scores: Tensor, target: Tensor, options: Options, ignore_index: int, saved: Saved, *_: Tensor
) -> Tensor:
    """grad * d loss / d scores: what falls on one class is added up first, then written over a row of zeros."""
    rows, classes = scores.shape
    slopes, kept = saved
    entries = kept.shape[1] * kept.shape[2] + 1
    places = torch.empty((rows, entries), dtype=torch.int32, device=scores.device)
    pushes = scores.new_empty((rows, entries), dtype=torch.float32)
    field = scores.new_empty((rows, 3), dtype=torch.float32)
    lanes = min(_LANES, common.lanes(entries))
    together = max(1, _CHUNK // lanes)
    target = target.contiguous()
    common.launch(
        _added_up, triton.cdiv(rows, together),
        scores, target, slopes, kept, places, pushes, field,
        rows, classes, *scores.stride(), ignore_index,
        ENTRIES=entries, KS=kept.shape[2], LANES=lanes, CHUNK=_CHUNK, ROWS=together, warps=1,
    )  # fmt: skip
    return patched_exponentials(grad, scores, target, ignore_index, (places, pushes, field), reads=False)


@triton.jit(do_not_specialize=["rows"])
def _added_up(
    scores_ptr, target_ptr, slopes_ptr, kept_ptr, places_ptr, pushes_ptr, field_ptr,
    rows, classes, row_stride, class_stride, ignore_index,
    ENTRIES: tl.constexpr, KS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The row's slopes, each class once: what the draws push up, and in the last entry the target."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target, used, _wrong = row_states(target_ptr, row, rows, classes, ignore_index)
    row = row.to(tl.int64)
    mine = tl.load(scores_ptr + row * row_stride + target.to(tl.int64) * class_stride, mask=used, other=0.0)
    possible = used & (mine.to(tl.float32) > float("-inf"))
    for base in range(0, ENTRIES, LANES):
        lanes = base + tl.arange(0, LANES)
        places, _ = _entries(slopes_ptr, kept_ptr, row, target, used, possible, lanes, ENTRIES, KS)
        total = tl.zeros((ROWS, LANES), tl.float32)
        earlier = tl.zeros((ROWS, LANES), tl.int32)
        for first in range(0, ENTRIES, CHUNK):
            others = first + tl.arange(0, CHUNK)
            found, more = _entries(slopes_ptr, kept_ptr, row, target, used, possible, others, ENTRIES, KS)
            same = places[:, :, None] == found[:, None, :]
            total += tl.sum(tl.where(same, more[:, None, :], 0.0), 2)
            before = same & (others[None, None, :] < lanes[None, :, None])
            earlier = earlier | tl.max(before.to(tl.int32), 2)
        silent = (total == total) & (total != 0.0) & (earlier == 0)
        inside = (row < rows)[:, None] & (lanes < ENTRIES)[None, :]
        offsets = row[:, None] * ENTRIES + lanes[None, :]
        tl.store(places_ptr + offsets, tl.where(silent, places, -1), mask=inside)
        tl.store(pushes_ptr + offsets, total, mask=inside)
    broken = tl.load(slopes_ptr + row * KS, mask=used, other=0.0)
    scale = tl.where(broken == broken, 0.0, float("nan"))
    for i in tl.static_range(3):
        tl.store(field_ptr + row * 3 + i, scale if i == 1 else scale * 0.0, mask=row < rows)


@triton.jit
def _entries(slopes_ptr, kept_ptr, row, target, used, possible, entry, ENTRIES: tl.constexpr, KS: tl.constexpr):
    """Classes and slopes (ROWS, entries): a share of the hinge's slope for every draw, and what the target gets."""
    drawn = used[:, None] & (entry < ENTRIES - 1)[None, :]
    places = tl.load(kept_ptr + row[:, None] * (ENTRIES - 1) + entry[None, :], mask=drawn, other=-1)
    slopes = tl.load(slopes_ptr + row[:, None] * KS + (entry % KS)[None, :], mask=drawn, other=0.0)
    pull = tl.zeros(row.shape, tl.float32)
    for i in tl.static_range(KS):
        pull += tl.load(slopes_ptr + row * KS + i, mask=possible, other=0.0)
    last = (entry == ENTRIES - 1)[None, :]
    places = tl.where(last & used[:, None], target[:, None], places)
    return places, tl.where(last, -pull[:, None], slopes * KS / (ENTRIES - 1))


def examples(rows: int, classes: int, device: torch.device) -> list[tuple[Saved, Options]]:
    """Calls that reach every path: no noise, and so little that it decides nothing, for one k and for several."""
    margins, seeds = torch.ones(rows, device=device), torch.full((1,), 7, dtype=torch.int64, device=device)
    k = min(5, classes - 1)
    several = sorted({1, k, min(40, classes - 1)})
    share = [1.0 / len(several)] * len(several)
    calls = [
        Options([k], [1.0], 0.0, 5, 1.0),
        Options([k], [1.0], 1e-6, 5, 1.0),
        Options(several, share, 1e-6, 6, 2.0),
    ]
    return [((margins, seeds), options) for options in calls]
