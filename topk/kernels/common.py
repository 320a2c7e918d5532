"""What several kernels share: tiles and launches on the host, and selection on the device.

A score and its class are packed into one int64 key, the ordered bits of the score above the class counted down, so
that a larger key is a larger score or, of equal scores, the lower class. All keys of a row differ. NaN is larger than
everything, so that the largest key tells whether a row holds NaN or +inf. A column beyond the row is a score of -inf
with a class that no row has: it comes last by itself and needs no mask.

Keys are made of few scores. A tile is cut into groups, a thread's scores each, and `take` offers the best of every
group to `insert`, which takes what beats the smallest key kept, then the next best of every group, until none is good
enough: two or three passes over the tile, in 32 bits, however many are kept. A longer row streams through in tiles,
most of which hold nothing that is large enough. The exponentials of all the other scores are added up on the way,
relative to the smallest score kept: positive terms that cannot overflow, and the log-sum-exp of the whole row is one
step from there.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Options = tuple[Any, ...]  # a loss's own, in the order of its NamedTuple
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


def packed(numbers: Sequence[float]) -> int:
    """Numbers as one constant of a kernel, 32 bits each: ints as they are, floats as float32.

    The i-th is `(NUMBERS >> 32 * i) & 0xFFFFFFFF` there, and `as_float` of it; a tuple would be the natural constant,
    but Triton 3.2 cannot index one.
    """
    total = 0
    for place, number in enumerate(numbers):
        bits = number if isinstance(number, int) else int.from_bytes(struct.pack("<f", number), "little")
        total |= bits << 32 * place
    return total


def allocate(scores: Tensor, shapes: tuple[SavedShape, ...]) -> list[Tensor]:
    """Room for what forward saves; None as a type means float32."""
    return [scores.new_empty(shape, dtype=kind or torch.float32) for shape, kind in shapes]


# --- a loss of no k --------------------------------------------------------------------------------------------------


def wrong_targets(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Which rows have a target that is neither a class nor ignored."""
    return ((target < 0) | (target >= classes)) & (target != ignore_index)


def no_loss(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """The loss a row of an empty list of ks: 0, and NaN for a wrong target."""
    loss = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
    return loss.masked_fill_(wrong_targets(target, classes, ignore_index), torch.nan)


def no_gradient(scores: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Its gradient, likewise."""
    result = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    return result.masked_fill_(wrong_targets(target, scores.shape[1], ignore_index)[:, None], torch.nan)


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
def patch_tile(starts, start, places, values, inside, BLOCK: tl.constexpr):
    """Overwrites single elements of the tile just stored, which begins at column `start`.

    places (ROWS, LANES) may be negative for nothing, and must not repeat within a row.
    """
    tl.debug_barrier()  # the tile was written by other threads of this program
    here = inside[:, None] & (places >= start) & (places < start + BLOCK)
    tl.store(starts[:, None] + places, values.to(starts.dtype.element_ty), mask=here)


@triton.jit
def as_float(BITS: tl.constexpr):
    """A float of `packed`, as a scalar."""
    return tl.full((), BITS, tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def lane(tile, lanes, j: tl.constexpr):
    """Column j of a tile (ROWS, LANES)."""
    return tl.sum(tl.where(lanes == j, tile, 0), 1)


@triton.jit
def finite_or_zero(values):
    """0 in the place of -inf, so that what is taken relative to it stays a number."""
    return tl.where(values == float("-inf"), 0.0, values)


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


# --- keys ------------------------------------------------------------------------------------------------------------

NO_CLASS = tl.constexpr(0x7FFFFFFF)
"""A class beyond every row; those just below it mark lanes that nothing has filled yet."""

_TAKEN = tl.constexpr(-(2**31))  # below the order of every score
_BELOW_ALL = tl.constexpr(-(2**63))
_ABOVE_ALL = tl.constexpr(2**63 - 1)


@triton.jit
def pack(scores, classes):
    """Keys: int64, ordered by score, then by the lower class; NaN above all. classes are int32."""
    return _key(_order_of(scores), classes)


@triton.jit
def _order_of(scores):
    """Integers in the order of the scores; NaN above all, and -0.0 and 0.0 tied."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _key(orders, classes):
    return (orders.to(tl.int64) << 32) | (0x7FFFFFFF - classes).to(tl.int64)


@triton.jit
def scores_of(keys):
    """The scores in keys, float32."""
    order = (keys >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def classes_of(keys):
    """The classes in keys, int32."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


# --- selection -------------------------------------------------------------------------------------------------------


@triton.jit
def largest(keys, COUNT: tl.constexpr, LANES: tl.constexpr):
    """The COUNT largest keys of a tile (ROWS, LANES), descending, and the last of them (ROWS,).

    A tile of at least COUNT columns. Lanes from COUNT on hold what a row does not have: -inf, no class.
    """
    lanes = tl.arange(0, LANES)[None, :]
    best = tl.broadcast_to(_empty(lanes), (keys.shape[0], LANES))
    last = tl.max(keys, 1)
    best = tl.where(lanes == 0, last[:, None], best)
    for j in range(1, COUNT):
        last = tl.max(tl.where(keys < last[:, None], keys, _BELOW_ALL), 1)
        best = tl.where(lanes == j, last[:, None], best)
    return best, last


@triton.jit
def _empty(lanes):
    """Keys of lanes that nothing has filled: below all that a row can hold, and all different."""
    return pack(tl.full(lanes.shape, float("-inf"), tl.float32), 0x7FFFFFFE - lanes)


@triton.jit
def nothing_kept(ROWS: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr):
    """The state that `insert` starts from: kept keys (ROWS, LANES) in no order, and the smallest (ROWS,)."""
    lanes = tl.arange(0, LANES)[None, :]
    keys = tl.where(
        lanes < COUNT, _empty(lanes), _ABOVE_ALL - lanes.to(tl.int64)
    )  # lanes not in use are never the smallest
    kept = tl.broadcast_to(keys, (ROWS, LANES))
    return kept, tl.min(kept, 1)


@triton.jit
def insert(kept, lowest, keys):
    """Takes over the keys of a tile that are above the smallest one kept, which they push out."""
    candidate = tl.max(keys, 1)
    while tl.max((candidate > lowest).to(tl.int32), 0) > 0:
        replaced = (kept == lowest[:, None]) & (candidate > lowest)[:, None]
        kept = tl.where(replaced, candidate[:, None], kept)
        lowest = tl.min(kept, 1)
        candidate = tl.max(tl.where(keys < candidate[:, None], keys, _BELOW_ALL), 1)
    return kept, lowest


@triton.jit
def _by_group(tile, ALIGN: tl.constexpr, GROUPS: tl.constexpr):
    """(ROWS, BLOCK) as (ROWS, _, GROUPS, ALIGN): a group is what a thread holds, runs of ALIGN neighbours."""
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] // (GROUPS * ALIGN), GROUPS, ALIGN))


@triton.jit
def _sum_by_group(tile, ALIGN: tl.constexpr, GROUPS: tl.constexpr):
    return tl.sum(tl.sum(_by_group(tile, ALIGN, GROUPS), 3), 1)


@triton.jit
def take(kept, lowest, scores, classes, ALIGN: tl.constexpr, GROUPS: tl.constexpr):
    """`insert` for a tile of scores and their classes (ROWS, BLOCK): the best of every group, then the next of each."""
    orders = _by_group(_order_of(scores), ALIGN, GROUPS)
    classes = _by_group(classes, ALIGN, GROUPS)
    tops = tl.max(tl.max(orders, 3), 1)
    while tl.max(tl.max((tops >= (lowest >> 32).to(tl.int32)[:, None]).to(tl.int32), 1), 0) > 0:
        best = orders == tops[:, None, :, None]
        found = tl.min(tl.min(tl.where(best, classes, NO_CLASS), 3), 1)
        kept, lowest = insert(kept, lowest, _key(tops, found))
        orders = tl.where(best & (classes == found[:, None, :, None]), _TAKEN, orders)
        tops = tl.max(tl.max(orders, 3), 1)
    return kept, lowest


@triton.jit
def in_order(kept, COUNT: tl.constexpr, LANES: tl.constexpr):
    """The kept keys, descending, as `largest` gives them."""
    lanes = tl.arange(0, LANES)[None, :]
    return largest(tl.where(lanes < COUNT, kept, _BELOW_ALL), COUNT, LANES)


@triton.jit
def scan(
    starts,
    class_stride,
    classes,
    used,
    left_out,
    origin,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    REST: tl.constexpr,
):
    """One read of the rows that start at `starts`. Returns four things:

    best (ROWS, LANES): the keys of the COUNT largest scores, descending, without the class `left_out` (None: with all);
    rest (ROWS,): with REST, the sum of exp(x - t) over all others but `left_out`, t the COUNT-th score (0 for -inf);
    total, possible (ROWS,): the sum of x - origin over the scores above -inf, and their number; 0 where origin is None.
    """
    rest = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    possible = tl.zeros((ROWS,), tl.float32)
    kept, lowest = nothing_kept(ROWS, COUNT, LANES)
    if STREAMS:
        shift = tl.zeros((ROWS,), tl.float32)
        outside = tl.zeros((ROWS, GROUPS), tl.float32)
        totals = tl.zeros((ROWS, GROUPS), tl.float32)
        counts = tl.zeros((ROWS, GROUPS), tl.float32)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = load_tile(starts, columns, class_stride, classes, used)
            if origin is not None:
                there = x > float("-inf")
                totals += _sum_by_group(tl.where(there, x - origin[:, None], 0.0), ALIGN, GROUPS)
                counts += _sum_by_group(there.to(tl.float32), ALIGN, GROUPS)
            x, found = _without(x, columns, left_out)
            t = scores_of(lowest)
            enough = (x <= t[:, None]) & (t > float("-inf"))[:, None]
            if tl.min(tl.min(enough.to(tl.int32), 1), 0) == 0:
                before = kept
                kept, lowest = take(kept, lowest, x, found, ALIGN, GROUPS)
                if REST:
                    # The smallest only grows, except from the stand-in for -inf, while both sums are still 0.
                    t = scores_of(lowest)
                    fade = tl.exp(tl.minimum(shift - finite_or_zero(t), 0.0))
                    shift = finite_or_zero(t)
                    outside *= fade[:, None]
                    rest = rest * fade + _exponentials_up_to(scores_of(before), t) - _ties(kept, t)
            if REST:
                below = tl.where(x <= t[:, None], x - shift[:, None], float("-inf"))
                outside += _sum_by_group(tl.exp(below), ALIGN, GROUPS)
        best, _ = in_order(kept, COUNT, LANES)
        if REST:
            rest += tl.sum(outside, 1)
        if origin is not None:
            total = tl.sum(totals, 1)
            possible = tl.sum(counts, 1)
    else:
        columns = tl.arange(0, BLOCK)
        x = load_tile(starts, columns, class_stride, classes, used)
        if origin is not None:
            there = x > float("-inf")
            total = tl.sum(tl.where(there, x - origin[:, None], 0.0), 1)
            possible = tl.sum(there.to(tl.float32), 1)
        x, found = _without(x, columns, left_out)
        kept, lowest = take(kept, lowest, x, found, ALIGN, GROUPS)
        best, last = in_order(kept, COUNT, LANES)
        if REST:
            rest = _exponentials_up_to(x, scores_of(last)) - _ties(best, scores_of(last))
    return best, rest, total, possible


@triton.jit
def _without(scores, columns, left_out):
    """The scores and the classes of a tile, the class `left_out` (ROWS,), if any, made one that no row has."""
    classes = tl.broadcast_to(columns[None, :], scores.shape)
    if left_out is not None:
        skip = classes == left_out[:, None]
        scores = tl.where(skip, float("-inf"), scores)
        classes = tl.where(skip, NO_CLASS, classes)
    return scores, classes


@triton.jit
def _exponentials_up_to(scores, t):
    """The sum of exp(x - t) over the scores that do not exceed t (ROWS,); 0 for -inf."""
    return tl.sum(tl.exp(tl.where(scores <= t[:, None], scores - finite_or_zero(t)[:, None], float("-inf"))), 1)


@triton.jit
def _ties(keys, t):
    """How many keys have the score t, above -inf: their share of `_exponentials_up_to`."""
    return tl.sum(((scores_of(keys) == t[:, None]) & (t > float("-inf"))[:, None]).to(tl.float32), 1)
