"""Rows split over several programs, interpreted on the CPU: against rows that are one program's, and the torch path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import compare, random_scores, special_rows
from torch import Tensor

from topk import topk_hinge_loss, transition_topk_loss
from topk.kernels import common, parts
from topk.kernels.common import row_pointers, row_states
from topk.kernels.resources import recorded_launches

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a kernel masks afterwards

slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 classes, one of them a part."""
    monkeypatch.setattr(common, "WIDEST", 16)
    monkeypatch.setattr(parts, "SHORTEST", 1)


def _number(rows: int, classes: int, count: int = 6) -> int:
    scores = torch.empty(rows, classes, device="meta")
    tiling = common.whole_rows(classes)
    return parts._number(rows, classes, tiling, common.whole_row_constants(tiling, scores, count)["LANES"])


def test_few_long_rows_are_split() -> None:
    assert [_number(rows, 10**6) for rows in (1, 64, 132)] == [28, 4, 2]
    assert [_number(rows, 10**6) for rows in (0, 133, 264, 10**5)] == [1, 1, 1, 1]
    assert [_number(1, classes) for classes in (1000, 20_000, 65_536, 65_537)] == [1, 1, 2, 2]
    assert _number(1, 10**8) == 128
    assert _number(1, 10**8, count=1001) == 4


@pytest.mark.parametrize("rows", [1, 7, 64, 132])
@pytest.mark.parametrize("classes", [65_537, 70_001, 300_000, 10**6])
def test_no_part_is_empty(rows: int, classes: int) -> None:
    number, tiles = _number(rows, classes), -(-classes // 4096)
    each = -(-tiles // number)
    assert (number - 1) * each < tiles <= number * each
    assert number * rows <= parts.PROGRAMS
    assert each >= parts.SHORTEST


# --- what the parts tell together ------------------------------------------------------------------------------------


@triton.jit
def _scan_rows(
    scores_ptr, target_ptr, best_ptr, found_ptr, sums_ptr, pieces_ptr,
    rows, classes, row_stride, class_stride, number,
    COUNT: tl.constexpr, LEAVES_OUT: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, STREAMS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target, used, _ = row_states(target_ptr, row, rows, classes, -100)
    starts = row_pointers(scores_ptr, row, row_stride)
    mine = tl.load(starts + target.to(tl.int64) * class_stride, mask=used, other=float("-inf")).to(tl.float32)
    best, found, rest, total, possible = parts.scanned(
        pieces_ptr, number, row, starts, class_stride, classes, used, target if LEAVES_OUT else None,
        common.finite_or_zero(mine), ROWS, BLOCK, COUNT, LANES, ALIGN, GROUPS, STREAMS, True, PARTS,
    )  # fmt: skip
    lanes = tl.arange(0, LANES)[None, :]
    tl.store(best_ptr + row[:, None] * LANES + lanes, best)
    tl.store(found_ptr + row[:, None] * LANES + lanes, found)
    tl.store(sums_ptr + row * 3, rest)
    tl.store(sums_ptr + row * 3 + 1, total)
    tl.store(sums_ptr + row * 3 + 2, possible)


def _scanned(scores: Tensor, target: Tensor, count: int, leaves_out: bool) -> tuple[int, Tensor, Tensor, Tensor]:
    """The number of parts a row, and what `scanned` returns (rows, ...)."""
    rows, classes = scores.shape
    tiling = common.whole_rows(classes)
    pieces, number, constants = parts.split(
        scores, target, -100, tiling, common.whole_row_constants(tiling, scores, count),
        COUNT=count, LEAVES_OUT=leaves_out, CENTRED=True, REST=True,
    )  # fmt: skip
    best, sums = torch.empty(rows, constants["LANES"]), torch.empty(rows, 3)
    found = torch.empty(rows, constants["LANES"], dtype=torch.int32)
    common.launch(
        _scan_rows, rows,
        scores, target, best, found, sums, pieces, rows, classes, *scores.stride(), number,
        COUNT=count, LEAVES_OUT=leaves_out, **constants,
    )  # fmt: skip
    return number, best, found, sums


def _rows(classes: int) -> tuple[Tensor, Tensor]:
    """Rows of every kind, more of them about parts of 16 classes, and targets."""
    scores, target = special_rows(classes, torch.float32)
    more = torch.randn(6, classes)
    more[0, :16] = -torch.inf  # a part of nothing but masked classes
    more[1, 16:] = -torch.inf  # all but one
    more[2, 2:30] = -torch.inf  # parts of fewer scores than are kept
    more[3] = torch.arange(classes) % 16  # ties across parts, in every place
    more[4] = 0.0
    more[4, ::16] = 1.0
    more[5] = torch.arange(classes) - 300.0  # the last parts push all others out
    return torch.cat((scores, more)), torch.cat((target, torch.tensor([20, 3, 1, 15, 16, 0])))


@pytest.mark.parametrize(
    ("classes", "count", "leaves_out"),
    [(37, 1, False), (37, 4, True), slow(37, 20, False), slow(80, 3, False)],
)
@pytest.mark.usefixtures("_short_parts")
def test_parts_tell_what_the_row_would(
    classes: int, count: int, leaves_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, target = _rows(classes)
    number, best, found, sums = _scanned(scores, target, count, leaves_out)
    assert number == -(-classes // 16)
    monkeypatch.setattr(parts, "PROGRAMS", 1)
    one, whole_best, whole_found, whole_sums = _scanned(scores, target, count, leaves_out)
    assert one == 1
    assert torch.equal(best, whole_best)
    told = (whole_best > -torch.inf) if leaves_out else (whole_found < classes)  # left out, it may be one of -inf
    assert torch.equal(found[told], whole_found[told])
    assert leaves_out or (found[~told] >= classes).all()
    finite = (best[:, :1] < torch.inf).expand(-1, 3)
    usual = {"rtol": 4e-6, "atol": 1e-4, "equal_nan": True}  # NaN: relative to a target of NaN
    torch.testing.assert_close(sums[finite], whole_sums[finite], **usual)


# --- losses ----------------------------------------------------------------------------------------------------------

LOSSES: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (transition_topk_loss, {"k": 1}),
    (transition_topk_loss, {"k": {1: 0.5, 3: 0.25, 5: 0.25}, "width": 2.0, "label_smoothing": 0.1}),
    (transition_topk_loss, {"k": 18, "transition": lambda m: m.sigmoid()}),
    (topk_hinge_loss, {"k": 3}),
    (topk_hinge_loss, {"k": {1: 0.5, 18: 0.5}, "variant": "alpha"}),
    (topk_hinge_loss, {"k": {1: 0.5, 3: 0.25, 5: 0.25}, "variant": "entropy"}),
]
NAMES = [f"{function.__name__}-{len(keywords)}-{place}" for place, (function, keywords) in enumerate(LOSSES)]


@pytest.mark.parametrize(
    ("loss", "keywords"),
    [(slow if place == 2 else pytest.param)(*LOSSES[place], id=NAMES[place]) for place in range(6)],
)
@pytest.mark.parametrize("kinds", ["some", slow("all")])
@pytest.mark.usefixtures("_short_parts")
def test_losses_and_gradients(kinds: str, loss: Callable[..., Tensor], keywords: dict[str, Any]) -> None:
    """NaN, a masked target, an ignored and a wrong one, and rows about parts; other special rows below and above."""
    with recorded_launches() as launches:
        loss(torch.randn(2, 37), torch.tensor([1, 2]), backend="triton", **keywords)
    assert [launch.kernel for launch in launches] == ["_scan_part", "_forward"]
    chosen = [0, 5, 10, 12, *range(16, 22)] if kinds == "some" else slice(None)
    scores, target = _rows(37)
    compare(loss, scores[chosen], target[chosen], **keywords)


@pytest.mark.parametrize(("loss", "keywords"), [LOSSES[1], LOSSES[5]], ids=[NAMES[1], NAMES[5]])
@pytest.mark.parametrize("dtype", [slow(torch.float16), torch.bfloat16], ids=str)
@pytest.mark.usefixtures("_short_parts")
def test_half_types(dtype: torch.dtype, loss: Callable[..., Tensor], keywords: dict[str, Any]) -> None:
    compare(loss, *special_rows(37, dtype), **keywords)


@pytest.mark.parametrize(("loss", "keywords"), [LOSSES[1], LOSSES[5]], ids=[NAMES[1], NAMES[5]])
@pytest.mark.usefixtures("_short_parts")
def test_any_strides_and_parts_of_several_tiles(
    loss: Callable[..., Tensor], keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SHORTEST", 2)
    target = torch.randint(75, (4,))
    compare(loss, random_scores(75, 4).t(), target, torch.ones(()).expand(4), **keywords)
    compare(loss, random_scores(8, 160)[::2, 2:152:2], target, **keywords)
    compare(loss, random_scores(1, 75).expand(4, 75), target, ignore_index=int(target[1]), **keywords)


def test_a_row_split_at_full_width() -> None:
    compare(transition_topk_loss, random_scores(1, 70_000), torch.tensor([4711]), k=3, label_smoothing=0.1)
