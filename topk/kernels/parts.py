"""Few long rows, each split over several programs: `scan` of the parts of a row, and what the parts tell together.

A row is one program's, however long, unless that would leave much of a device idle. Then a launch of its own scans
parts of whole tiles, a program each, and writes of a part what `scan` returns: 8 COUNT + 12 bytes. The loss's kernel is
launched as ever, a program a row, and `scanned` gives it from the parts what `scan` would from the row.

A class belongs to one part, so that the pairs of all parts are merged in the order that pairs have, ties too. Sums of
exponentials are relative to the part's own last score; they are brought to the row's, which is no smaller, and pairs
that another part pushes out join them. Columns that no row has may come from several parts, but a single part has
COUNT different pairs, so that none is needed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import (
    aligned,
    beats,
    finite_or_zero,
    lane,
    order_of,
    ordered,
    row_pointers,
    row_states,
    scan,
    score_of,
)

# --- on the host -----------------------------------------------------------------------------------------------------

PROGRAMS = 264
"""How many programs fill a device: 2 on each of the 132 multiprocessors of Hopper, as many as fit there at a time.

The same on every device, so that results depend on none."""

SHORTEST = 8
"""The fewest tiles that a part may have, give or take. Smaller in tests."""

_PAIRS = 4096  # in the tile that merges parts


def split(
    scores: Tensor, target: Tensor, ignore_index: int, tiling: common.Tiling, constants: dict[str, Any], *,
    COUNT: int, LEAVES_OUT: bool, CENTRED: bool, REST: bool,
) -> tuple[Tensor | None, int, dict[str, Any]]:  # fmt: skip
    """Scans the parts of every row if rows are to be split: what `scanned` reads (None: nothing), and their number.

    `constants` are those of `whole_row_constants`; the loss's kernel is to be launched with those that come back, which
    hold PARTS too, a power of two: 0 where rows are not split. LEAVES_OUT: the target; CENTRED: there is an origin, the
    target's score; REST as `scan` has it.
    """
    rows, classes = scores.shape
    number = _number(rows, classes, tiling, constants["LANES"])
    if number == 1:
        return None, 1, {**constants, "PARTS": 0}
    pieces = scores.new_empty((rows, 2 * COUNT + 3, number), dtype=torch.int32)
    common.launch(
        _scan_part, rows * number,
        scores, target, pieces, rows, classes, *scores.stride(), ignore_index, number,
        COUNT=COUNT, LEAVES_OUT=LEAVES_OUT, CENTRED=CENTRED, REST=REST, **constants,
    )  # fmt: skip
    together = triton.next_power_of_2(number)
    return pieces, number, {**constants, "PARTS": together, "warps": max(1, together * constants["LANES"] // 256)}


def _number(rows: int, classes: int, tiling: common.Tiling, lanes: int) -> int:
    """The number of parts a row, none of them empty; 1 where rows are not split."""
    if not tiling.streams or rows == 0:
        return 1
    tiles = common.tiles(classes, tiling)
    wanted = max(1, min(PROGRAMS // rows, tiles // SHORTEST, _PAIRS // lanes))
    return -(-tiles // -(-tiles // wanted))


# --- on the device ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "number"])
def _scan_part(
    scores_ptr, target_ptr, pieces_ptr, rows, classes, row_stride, class_stride, ignore_index, number,
    COUNT: tl.constexpr, LEAVES_OUT: tl.constexpr, CENTRED: tl.constexpr, REST: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STREAMS: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes the scores, classes, rest, total and possible of a part: rows (2 COUNT + 3, number) of 32 bits."""
    classes = aligned(classes, ALIGN)
    row = tl.program_id(0) // number * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(0) % number
    target, used, _ = row_states(target_ptr, row, rows, classes, ignore_index)
    starts = row_pointers(scores_ptr, row, aligned(row_stride, ALIGN))
    origin = None
    if CENTRED:
        mine = tl.load(starts + target.to(tl.int64) * class_stride, mask=used, other=float("-inf")).to(tl.float32)
        origin = finite_or_zero(mine)
    left_out = target if LEAVES_OUT else None
    length = tl.cdiv(tl.cdiv(classes, BLOCK), number) * BLOCK
    first = part * length
    best, found, rest, total, possible = scan(
        starts, class_stride, tl.minimum(classes, first + length), used, left_out, origin,
        ROWS, BLOCK, COUNT, LANES, ALIGN, GROUPS, STREAMS, REST, first,
    )  # fmt: skip
    at = pieces_ptr + row.to(tl.int64) * (2 * COUNT + 3) * number + part
    lanes = tl.arange(0, LANES)[None, :]
    places = at[:, None] + lanes * number
    tl.store(places, best.to(tl.int32, bitcast=True), mask=lanes < COUNT)
    tl.store(places + COUNT * number, found, mask=lanes < COUNT)
    sums = at + 2 * COUNT * number
    tl.store(sums, rest.to(tl.int32, bitcast=True))
    tl.store(sums + number, total.to(tl.int32, bitcast=True))
    tl.store(sums + 2 * number, possible.to(tl.int32, bitcast=True))


@triton.jit
def scanned(
    pieces_ptr, number, row, starts, class_stride, classes, used, left_out, origin,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr, ALIGN: tl.constexpr,
    GROUPS: tl.constexpr, STREAMS: tl.constexpr, REST: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What `scan` returns, from the pieces that `split` made where PARTS is not 0."""
    if PARTS == 0:
        best, found, rest, total, possible = scan(
            starts, class_stride, classes, used, left_out, origin, ROWS, BLOCK, COUNT, LANES, ALIGN, GROUPS, STREAMS,
            REST,
        )  # fmt: skip
    else:
        best, found, rest, total, possible = _merged(pieces_ptr, number, row, COUNT, LANES, PARTS)
    return best, found, rest, total, possible


@triton.jit
def _merged(pieces_ptr, number, row, COUNT: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr):
    at = pieces_ptr + row.to(tl.int64)[:, None] * (2 * COUNT + 3) * number
    pairs = tl.arange(0, PARTS * LANES)[None, :]
    there = pairs < COUNT * number
    scores = tl.load(at + pairs, mask=there, other=0).to(tl.float32, bitcast=True)
    classes = tl.load(at + COUNT * number + pairs, mask=there, other=0)
    orders = order_of(tl.where(there, scores, float("nan")))
    best, found = ordered(orders, classes, COUNT, LANES)

    lanes = tl.arange(0, LANES)[None, :]
    last = lane(best, lanes, COUNT - 1)
    pushed_out = there & beats(last[:, None], lane(found, lanes, COUNT - 1)[:, None], orders, classes)
    t = finite_or_zero(score_of(last))[:, None]
    rest = tl.sum(tl.exp(tl.where(pushed_out, scores - t, float("-inf"))), 1)
    parts = tl.arange(0, PARTS)[None, :]
    theirs = _numbers(at + (COUNT - 1) * number, parts, number)  # a part's last score: its rest is 0 if that is -inf
    fade = tl.where(theirs > float("-inf"), tl.exp(tl.minimum(theirs - t, 0.0)), 0.0)
    rest += tl.sum(_numbers(at + 2 * COUNT * number, parts, number) * fade, 1)
    total = tl.sum(_numbers(at + (2 * COUNT + 1) * number, parts, number), 1)
    possible = tl.sum(_numbers(at + (2 * COUNT + 2) * number, parts, number), 1)
    return score_of(best), found, rest, total, possible


@triton.jit
def _numbers(at, parts, number):
    """One number a part (ROWS, PARTS), 0 beyond the last part."""
    return tl.load(at + parts, mask=parts < number, other=0).to(tl.float32, bitcast=True)
