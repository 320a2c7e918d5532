"""What several kernels share: tiles and launches on the host, and selection on the device.

What is kept of a row is pairs of 32 bits: a score as an integer of the same order, and its class. The larger score
comes first, or of equal ones the lower class; no two pairs of a row are equal. NaN counts as +inf, so that the first
score tells whether a row holds either. A column beyond the row is a score of -inf with a class that no row has: it
comes last by itself and needs no mask.

Pairs are made of few scores. A tile is cut into groups, a thread's scores each, and `take` offers the best of every
group to `insert`, which takes what comes before the last one kept, then the next best of every group, until none is
good enough: two or three passes over the tile, however many are kept. A longer row streams through in tiles, most of
which hold nothing that is large enough. The exponentials of all the other scores are added up on the way,
relative to the smallest score kept: positive terms that cannot overflow, and the log-sum-exp of the whole row is one
step from there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Saved = tuple[Tensor, ...]
SavedShape = tuple[tuple[int, ...], torch.dtype | None]

# --- tiles and launches, on the host ---------------------------------------------------------------------------------

WIDEST = 8192
"""The longest row held as one tile; longer ones stream. Smaller in tests, so that short rows stream too."""

STREAMED = 4096
"""The width of the tiles that a long row is streamed in, and of the tiles of an elementwise pass."""


@dataclass(frozen=True)
class Tiling:
    """How rows are cut: `rows` rows of `block` classes a program, and whether a row takes more than one tile."""

    rows: int
    block: int
    streams: bool
    warps: int

    def programs(self, rows: int) -> int:
        """How many programs cover that many rows, each taking its rows whole."""
        return -(-rows // self.rows)


def whole_rows(classes: int) -> Tiling:
    """For kernels that see a whole row in one program, in registers or streamed."""
    return _tiling(classes, WIDEST, 128, 16 if classes > WIDEST else 32)


def elementwise(classes: int) -> Tiling:
    """For kernels that treat every tile of a row alike: a program a tile, `tiles` of them a row."""
    return _tiling(classes, min(WIDEST, STREAMED), 1024, 16)


def _tiling(classes: int, widest: int, together: int, a_thread: int) -> Tiling:
    """Short rows share a program of so many scores; a thread has at most `a_thread` of them."""
    streams = classes > widest
    block = min(widest, STREAMED) if streams else max(16, triton.next_power_of_2(classes))
    rows = 1 if streams else max(1, together // block)
    return Tiling(rows, block, streams, min(16, max(1, rows * block // (32 * a_thread))))


def tiles(classes: int, tiling: Tiling) -> int:
    """The number of tiles a row."""
    return -(-classes // tiling.block)


def lanes(count: int) -> int:
    """`count` rounded up to a power of two: the width of a tile that holds so many numbers a row."""
    return max(2, int(triton.next_power_of_2(count)))


def alignment(scores: Tensor) -> int:
    """How many elements row starts and row lengths are multiples of, so that 16 bytes are read at once; 1 if not."""
    together = 16 // scores.element_size()
    aligned = scores.stride(1) == 1 and scores.stride(0) % together == 0 and scores.shape[1] % together == 0
    return together if aligned else 1


def launch(kernel: Any, programs: int, *arguments: Any, warps: int, **constants: Any) -> None:
    """Runs the kernel on the device of its tensors; every kernel of this package is launched here."""
    if programs == 0:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, num_warps=warps, **constants)


def whole_row_constants(tiling: Tiling, scores: Tensor, count: int) -> dict[str, Any]:
    """The keywords that a launch over whole rows needs to keep `count` numbers a row."""
    constants = tile_constants(tiling, scores, count)
    if tiling.rows == 1:  # a lane a thread: what goes over all 32 threads of a warp in 32 bits is one instruction
        constants["LANES"] = max(32, constants["LANES"])
    groups = min(32 * tiling.warps, tiling.block // constants["ALIGN"])
    return {**constants, "STREAMS": tiling.streams, "GROUPS": groups}


def tile_constants(tiling: Tiling, scores: Tensor, count: int) -> dict[str, Any]:
    """The keywords that an elementwise launch needs to handle `count` numbers a row besides its tile."""
    return {
        "LANES": lanes(count),
        "ROWS": tiling.rows,
        "BLOCK": tiling.block,
        "ALIGN": alignment(scores),
        "warps": tiling.warps,
    }


def allocate(scores: Tensor, shapes: tuple[SavedShape, ...]) -> list[Tensor]:
    """Memory for what forward saves; None as a type means float32."""
    return [scores.new_empty(shape, dtype=dtype or torch.float32) for shape, dtype in shapes]


# --- a row's target --------------------------------------------------------------------------------------------------


@triton.jit
def row_states(target_ptr, row, rows, classes, ignore_index):
    """Of every row: its class (0 where there is none), whether it counts, and whether its target is wrong."""
    inside = row < rows
    target = tl.load(target_ptr + row, mask=inside, other=0)
    ignored = target == ignore_index
    wrong = inside & (ignored == 0) & ((target < 0) | (target >= classes))
    used = inside & (ignored == 0) & (wrong == 0)
    return tl.where(used, target, 0).to(tl.int32), used, wrong


# --- addresses and tiles ---------------------------------------------------------------------------------------------


@triton.jit
def aligned(number, ALIGN: tl.constexpr):
    """The number, a multiple of ALIGN, in a form that shows the compiler so."""
    return number // ALIGN * ALIGN


@triton.jit
def row_pointers(base, row, row_stride):
    """Where the rows start (ROWS,); in int64, since a tensor may hold more than 2^31 elements."""
    return base + row.to(tl.int64) * row_stride


@triton.jit
def load_tile(starts, columns, class_stride, classes, used):
    """The scores (ROWS, BLOCK) in float32; -inf beyond the row and in rows that do not count."""
    place = starts[:, None] + columns[None, :].to(tl.int64) * class_stride
    mask = used[:, None] & (columns < classes)[None, :]
    return tl.load(place, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def store_tile(starts, columns, classes, inside, values):
    """Writes a tile into contiguous rows, rounded to their type."""
    place = starts[:, None] + columns[None, :]
    tl.store(place, values.to(starts.dtype.element_ty), mask=inside[:, None] & (columns < classes)[None, :])


@triton.jit
def patch_tile(
    results, start, places_ptr, slopes_ptr, grad, row, used,
    COUNT: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrites single elements of the tile just stored, which begins at column `start`, by grad * slope.

    places (rows, COUNT) may be negative for nothing, and must not repeat within a row; slopes (rows, COUNT).
    """
    lanes = tl.arange(0, LANES)[None, :]
    kept = used[:, None] & (lanes < COUNT)
    offsets = row.to(tl.int64)[:, None] * COUNT + lanes
    places = tl.load(places_ptr + offsets, mask=kept, other=-1)
    values = product(grad[:, None], tl.load(slopes_ptr + offsets, mask=kept, other=0.0))
    tl.debug_barrier()  # the tile was written by other threads of this program
    here = used[:, None] & (places >= start) & (places < start + BLOCK)
    tl.store(results[:, None] + places, values.to(results.dtype.element_ty), mask=here)


@triton.jit
def product(grad, slopes):
    """grad * slopes, and 0 for a slope of 0: a loss that a score does not move asks nothing of it."""
    return tl.where(slopes == 0.0, 0.0, grad * slopes)


@triton.jit
def lane(tile, lanes, j: tl.constexpr):
    """Column j of a tile (ROWS, LANES). Bits are added up, since for integers that is one instruction a warp."""
    if tile.dtype == tl.float32:
        column = tl.sum(tl.where(lanes == j, tile.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)
    else:
        column = tl.sum(tl.where(lanes == j, tile, 0), 1)
    return column


@triton.jit
def finite_or_zero(values):
    """0 in the place of -inf, so that what is taken relative to it stays a number."""
    return tl.where(values == float("-inf"), 0.0, values)


@triton.jit
def exponential(values):
    """exp of every number of a tile, 0 for what would be denormal: two instructions where tl.exp takes five."""
    return tl.exp2(values * 1.4426950408889634)


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _instruction(values, ASSEMBLY: tl.constexpr):
    """One of the device's own approximations, for every number of a tile."""
    return tl.inline_asm_elementwise(ASSEMBLY, "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(values):
    """The device's own logarithm, off by 2^-22 at most: one instruction where tl.log2 takes a dozen."""
    if _INTERPRETED:
        result = tl.log2(values)
    else:
        result = _instruction(values, "lg2.approx.ftz.f32 $0, $1;")
    return result


@triton.jit
def reciprocal(values):
    """1 / values to the last place, 0 for a denormal result: one instruction where a division takes eight."""
    if _INTERPRETED:
        result = 1.0 / values
    else:
        result = _instruction(values, "rcp.approx.ftz.f32 $0, $1;")
    return result


@triton.jit
def sine(angle):
    """The device's own sine, off by 2^-21.41 at most between -pi and pi."""
    if _INTERPRETED:
        result = tl.sin(angle)
    else:
        result = _instruction(angle, "sin.approx.ftz.f32 $0, $1;")
    return result


@triton.jit
def cosine(angle):
    """The device's own cosine, off by 2^-21.19 at most between -pi and pi."""
    if _INTERPRETED:
        result = tl.cos(angle)
    else:
        result = _instruction(angle, "cos.approx.ftz.f32 $0, $1;")
    return result


@triton.jit
def softplus(z):
    """log(1 + exp z); where exp z is small its digits count, not those of 1 + exp z."""
    small = tl.exp(-tl.abs(z))
    whole = 1.0 + small
    part = tl.where(whole == 1.0, small, tl.log(whole) * (small / tl.where(whole == 1.0, 1.0, whole - 1.0)))
    return tl.maximum(z, 0.0) + part


@triton.jit
def tile_of_program(classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """For an elementwise pass: the rows (ROWS,) and the first column of this program's tile."""
    tiles = tl.cdiv(classes, BLOCK)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    return row, tl.program_id(0) % tiles * BLOCK


# --- selection -------------------------------------------------------------------------------------------------------

NO_CLASS = tl.constexpr(0x7FFFFFFF)
"""A class beyond every row; those just below it mark lanes that nothing has filled yet."""

_LOWEST = tl.constexpr(-(2**31))  # below the order of every score
_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
_OF_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def order_of(scores):
    """Integers in the order of the scores, -0.0 and 0.0 tied; of NaN, which stands for a score taken, the lowest."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LOWEST)


@triton.jit
def score_of(orders):
    """The scores that `order_of` made integers of."""
    return (orders ^ ((orders >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_of(orders, classes):
    """Of every row (ROWS, n) the largest order, and of those that have it the lowest class."""
    best = tl.max(orders, 1)
    return best, tl.min(tl.where(orders == best[:, None], classes, NO_CLASS), 1)


@triton.jit
def _worst_of(orders, classes):
    worst = tl.min(orders, 1)
    return worst, tl.max(tl.where(orders == worst[:, None], classes, _LOWEST), 1)


@triton.jit
def beats(order, found, other_order, other_found):
    """Whether a score comes before another: the larger one, or of two equal ones that of the lower class."""
    return (order > other_order) | ((order == other_order) & (found < other_found))


@triton.jit
def nothing_kept(ROWS: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr):
    """The state that `insert` starts from: orders and classes (ROWS, LANES) in no order, and those of the last."""
    lanes = tl.broadcast_to(tl.arange(0, LANES)[None, :], (ROWS, LANES))
    orders = tl.where(lanes < COUNT, _OF_MINUS_INFINITY, _OF_INFINITY)  # lanes not in use are never the last
    classes = tl.where(lanes < COUNT, NO_CLASS - 1 - lanes, -1 - lanes)
    last, last_class = _worst_of(orders, classes)
    return orders, classes, last, last_class


@triton.jit
def insert(kept, kept_classes, last, last_class, orders, classes):
    """Takes over of a tile (ROWS, n) what comes before the last one kept, which it pushes out."""
    order, found = best_of(orders, classes)
    better = beats(order, found, last, last_class)
    while tl.max(better.to(tl.int32), 0) > 0:
        there = (kept_classes == last_class[:, None]) & better[:, None]
        kept = tl.where(there, order[:, None], kept)
        kept_classes = tl.where(there, found[:, None], kept_classes)
        last, last_class = _worst_of(kept, kept_classes)
        orders = tl.where(classes == found[:, None], _LOWEST, orders)
        order, found = best_of(orders, classes)
        better = beats(order, found, last, last_class)
    return kept, kept_classes, last, last_class


@triton.jit
def in_order(kept, kept_classes, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Scores and classes of what is kept, descending; from lane COUNT on -inf and what no row has."""
    orders = tl.where(tl.arange(0, LANES)[None, :] < COUNT, kept, _LOWEST)
    orders, classes = ordered(orders, kept_classes, COUNT, LANES)
    return score_of(orders), classes


@triton.jit
def ordered(orders, classes, COUNT: tl.constexpr, LANES: tl.constexpr):
    """The COUNT largest of (ROWS, n), descending (ROWS, LANES), and their classes."""
    lanes = tl.arange(0, LANES)[None, :]
    largest = tl.full((orders.shape[0], LANES), _OF_MINUS_INFINITY, tl.int32)
    found = tl.full((orders.shape[0], LANES), NO_CLASS, tl.int32)
    for j in range(COUNT):
        order, place = best_of(orders, classes)
        largest = tl.where(lanes == j, order[:, None], largest)
        found = tl.where(lanes == j, place[:, None], found)
        orders = tl.where(classes == place[:, None], _LOWEST, orders)
    return largest, found


@triton.jit
def by_group(tile, ALIGN: tl.constexpr, GROUPS: tl.constexpr):
    """(ROWS, BLOCK) as (ROWS, _, GROUPS, ALIGN): a group is what a thread holds, runs of ALIGN neighbours."""
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] // (GROUPS * ALIGN), GROUPS, ALIGN))


@triton.jit
def _sum_by_group(tile, ALIGN: tl.constexpr, GROUPS: tl.constexpr):
    return tl.sum(tl.sum(by_group(tile, ALIGN, GROUPS), 3), 1)


@triton.jit
def tops_of(scores):
    """The best of every group (ROWS, GROUPS)."""
    return tl.max(tl.max(scores, 3), 1)


@triton.jit
def offers(tops, last):
    """Whether a group of any row has a score that may come before the last one kept."""
    return tl.max(tl.max((order_of(tops) >= last[:, None]).to(tl.int32), 1), 0) > 0


@triton.jit
def _best_of_groups(scores, classes, tops):
    """The classes of the best of every group (ROWS, GROUPS)."""
    best = scores == tops[:, None, :, None]
    return tl.min(tl.min(tl.where(best, classes, NO_CLASS), 3), 1)


@triton.jit
def _without(scores, classes, found):
    """A score that has been offered becomes NaN, which a maximum passes over."""
    return tl.where(classes == found[:, None, :, None], float("nan"), scores)


@triton.jit
def take(kept, kept_classes, last, last_class, scores, classes, tops):
    """`insert` for a tile by group: the best of every group, `tops`, then the next of each; worth it where `offers`."""
    open = tl.full((), 1, tl.int1)
    while open:
        found = _best_of_groups(scores, classes, tops)
        orders = order_of(tops)
        better = beats(orders, found, last[:, None], last_class[:, None])
        open = tl.max(tl.max(better.to(tl.int32), 1), 0) > 0
        if open:
            kept, kept_classes, last, last_class = insert(kept, kept_classes, last, last_class, orders, found)
            scores = _without(scores, classes, found)
            tops = tops_of(scores)
            open = offers(tops, last)
    return kept, kept_classes, last, last_class


@triton.jit
def largest_of(scores, classes, COUNT: tl.constexpr, LANES: tl.constexpr):
    """What `in_order` tells after `take`, of a whole row by group: most of the largest are the best of their groups."""
    lanes = tl.arange(0, LANES)[None, :]
    tops = tops_of(scores)
    found = _best_of_groups(scores, classes, tops)
    orders, places = ordered(order_of(tops), found, COUNT, LANES)
    kept, kept_classes, _, _ = nothing_kept(scores.shape[0], COUNT, LANES)
    filled = (lanes < COUNT) & (orders > _LOWEST)
    kept = tl.where(filled, orders, kept)
    kept_classes = tl.where(filled, places, kept_classes)
    last, last_class = _worst_of(kept, kept_classes)
    scores = _without(scores, classes, found)
    tops = tops_of(scores)
    if offers(tops, last):
        kept, kept_classes, _, _ = take(kept, kept_classes, last, last_class, scores, classes, tops)
        kept, kept_classes = ordered(tl.where(lanes < COUNT, kept, _LOWEST), kept_classes, COUNT, LANES)
    kept = tl.where(lanes < COUNT, kept, _OF_MINUS_INFINITY)
    return score_of(kept), tl.where(lanes < COUNT, kept_classes, NO_CLASS)


@triton.jit
def scan(
    starts, class_stride, classes, used, left_out, origin,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr, ALIGN: tl.constexpr,
    GROUPS: tl.constexpr, STREAMS: tl.constexpr, REST: tl.constexpr, first=0,
):  # fmt: skip
    """One read of the rows that start at `starts`, whose NaNs count as +inf. Returns five things:

    best, found (ROWS, LANES): the COUNT largest scores, descending, without the class `left_out` (None: with all), and
        their classes; after them -inf and no class;
    rest (ROWS,): with REST, the sum of exp(x - t) over all others but `left_out`, t the COUNT-th score (0 for -inf);
    total, possible (ROWS,): the sum of x - origin over the scores above -inf, and their number; 0 where origin is None.

    Where rows stream, only their columns from `first`, a multiple of BLOCK, up to `classes` count.
    """
    rest = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    possible = tl.zeros((ROWS,), tl.float32)
    if STREAMS:
        kept, kept_classes, last, last_class = nothing_kept(ROWS, COUNT, LANES)
        shift = tl.zeros((ROWS,), tl.float32)
        outside = tl.zeros((ROWS, GROUPS), tl.float32)
        totals = tl.zeros((ROWS, GROUPS), tl.float32)
        counts = tl.zeros((ROWS, GROUPS), tl.float32)
        for start in range(first, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = load_tile(starts, columns, class_stride, classes, used)
            if origin is not None:
                there = x > float("-inf")
                totals += _sum_by_group(tl.where(there, x - origin[:, None], 0.0), ALIGN, GROUPS)
                counts += _sum_by_group(there.to(tl.float32), ALIGN, GROUPS)
            x, tile_classes = without(x, columns, left_out)
            t = score_of(last)
            tops = tops_of(by_group(x, ALIGN, GROUPS))
            if offers(tops, last):
                before = kept
                kept, kept_classes, last, last_class = take(
                    kept, kept_classes, last, last_class,
                    by_group(x, ALIGN, GROUPS), by_group(tile_classes, ALIGN, GROUPS), tops,
                )  # fmt: skip
                if REST:
                    # The smallest only grows, except from the stand-in for -inf, while both sums are still 0.
                    t = score_of(last)
                    fade = tl.exp(tl.minimum(shift - finite_or_zero(t), 0.0))
                    shift = finite_or_zero(t)
                    outside *= fade[:, None]
                    rest = rest * fade + _exponentials_up_to(score_of(before), t)
                    rest -= _counted_as_one(kept, kept_classes, last, start)
            if REST:
                up_to_t = tl.minimum(x, t[:, None])
                outside += _sum_by_group(exponential(up_to_t - shift[:, None]), ALIGN, GROUPS)
        if REST:
            rest += tl.sum(outside, 1)
        if origin is not None:
            total = tl.sum(totals, 1)
            possible = tl.sum(counts, 1)
        best, found = in_order(kept, kept_classes, COUNT, LANES)
    else:
        columns = tl.arange(0, BLOCK)
        x = load_tile(starts, columns, class_stride, classes, used)
        if origin is not None:
            there = x > float("-inf")
            total = tl.sum(tl.where(there, x - origin[:, None], 0.0), 1)
            possible = tl.sum(there.to(tl.float32), 1)
        x, tile_classes = without(x, columns, left_out)
        best, found = largest_of(by_group(x, ALIGN, GROUPS), by_group(tile_classes, ALIGN, GROUPS), COUNT, LANES)
        if REST:
            t = lane(best, tl.arange(0, LANES)[None, :], COUNT - 1)
            rest = tl.sum(exponential(tl.minimum(x - finite_or_zero(t)[:, None], 0.0)), 1) - COUNT
            rest = tl.where(t > float("-inf"), rest, 0.0)
    if left_out is not None:
        found = others(found, left_out)
    return best, found, rest, total, possible


@triton.jit
def without(scores, columns, left_out):
    """The scores and the classes of a tile, -inf for the class `left_out` (ROWS,), if any."""
    scores = tl.minimum(scores, float("inf"))  # which takes the place of NaN
    classes = tl.broadcast_to(columns[None, :], scores.shape)
    if left_out is not None:
        scores = tl.where(classes == left_out[:, None], float("-inf"), scores)
    return scores, classes


@triton.jit
def others(found, left_out):
    """The classes found, without `left_out`, which may be among those of -inf."""
    return tl.where(found == left_out[:, None], NO_CLASS, found)


@triton.jit
def _exponentials_up_to(scores, t):
    """The sum of exp(x - t) over the scores that do not exceed t (ROWS,); 0 for -inf."""
    return tl.sum(tl.exp(tl.where(scores <= t[:, None], scores - finite_or_zero(t)[:, None], float("-inf"))), 1)


@triton.jit
def _counted_as_one(kept, kept_classes, last, start):
    """How many kept scores the sums hold as exp(t - t): those that are t, and of the tile at `start` all above it."""
    counted = ((kept == last[:, None]) | (kept_classes >= start)) & (last > _OF_MINUS_INFINITY)[:, None]
    return tl.sum(counted.to(tl.int32), 1).to(tl.float32)


@triton.jit
def ties(scores, t):
    """How many of the scores kept are t, above -inf."""
    return tl.sum(((scores == t[:, None]) & (t > float("-inf"))[:, None]).to(tl.float32), 1)
