"""Selection, keys and the other building blocks of the kernels, interpreted on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from topk.kernels import common
from topk.kernels.common import order_of, row_pointers, scan, score_of, softplus

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a kernel masks afterwards


@triton.jit
def _scan_rows(
    scores_ptr,
    left_out_ptr,
    best_ptr,
    found_ptr,
    sums_ptr,
    rows,
    classes,
    row_stride,
    class_stride,
    COUNT: tl.constexpr,
    LEAVES_OUT: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    STREAMS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = row < rows
    left_out = tl.load(left_out_ptr + row, mask=used, other=0) if LEAVES_OUT else None
    starts = row_pointers(scores_ptr, row, row_stride)
    origin = tl.full((ROWS,), 0.5, tl.float32)
    best, found, rest, total, possible = scan(
        starts, class_stride, classes, used, left_out, origin, ROWS, BLOCK, COUNT, LANES, ALIGN, GROUPS, STREAMS, True
    )
    lanes = tl.arange(0, LANES)[None, :]
    kept = used[:, None] & (lanes < COUNT)
    tl.store(best_ptr + row[:, None] * COUNT + lanes, best, mask=kept)
    tl.store(found_ptr + row[:, None] * COUNT + lanes, found, mask=kept)
    tl.store(sums_ptr + row * 3, rest, mask=used)
    tl.store(sums_ptr + row * 3 + 1, total, mask=used)
    tl.store(sums_ptr + row * 3 + 2, possible, mask=used)


def _scanned(scores: Tensor, count: int, left_out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = scores.shape
    tiling = common.whole_rows(classes)
    best, sums = torch.empty(rows, count), torch.empty(rows, 3)
    found = torch.empty(rows, count, dtype=torch.int32)
    common.launch(
        _scan_rows,
        tiling.programs(rows),
        scores,
        torch.zeros(rows, dtype=torch.int32) if left_out is None else left_out,
        best,
        found,
        sums,
        rows,
        classes,
        *scores.stride(),
        COUNT=count,
        LEAVES_OUT=left_out is not None,
        **common.whole_row_constants(tiling, scores, count),
    )
    return best, found.long(), sums


def _expected(scores: Tensor, count: int, left_out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """By a stable sort, in float64."""
    wide = scores.double()
    there = wide > -torch.inf
    total = torch.where(there, wide - 0.5, 0.0).sum(1)
    if left_out is not None:
        wide = wide.scatter(1, left_out.long()[:, None], -torch.inf)
    values, index = wide.sort(dim=1, descending=True, stable=True)
    last = values[:, count - 1 : count].nan_to_num(neginf=0.0)
    rest = (values[:, count:] - last).exp().sum(1)
    return values[:, :count], index[:, :count], torch.stack((rest, total, there.sum(1)), 1)


def _kinds_of_scores(classes: int) -> Tensor:
    rows = [
        torch.randn(2, classes) * 30.0,
        torch.randint(3, (2, classes)).float() - 1.0,
        torch.randn(2, classes).masked_fill(torch.rand(2, classes) < 0.7, -torch.inf),
        torch.arange(classes)[None].float() - 7.0,  # every tile beats the one before
        -torch.arange(classes)[None].float(),
        torch.zeros(1, classes) * (1.0 - 2.0 * (torch.arange(classes) % 2)),  # 0.0 and -0.0
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("widest", [64, 16], ids=["whole", "streamed"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_scan_finds_the_largest_and_sums_up_the_rest(count: int, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WIDEST", widest)
    scores = _kinds_of_scores(41)
    best, found, sums = _scanned(scores, count)
    values, index, expected = _expected(scores, count)
    assert torch.equal(best.double(), values)
    assert torch.equal(found, index)
    torch.testing.assert_close(sums.double(), expected, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("widest", [64, 16], ids=["whole", "streamed"])
def test_scan_leaves_a_class_out(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither found nor summed up, however large it is, nor where only masked classes are left."""
    monkeypatch.setattr(common, "WIDEST", widest)
    scores = torch.randn(5, 37)
    scores[0, 3], scores[1, 36] = 90.0, 90.0
    scores[2, 4:] = -torch.inf
    left_out = torch.tensor([3, 36, 1, 0, 20], dtype=torch.int32)
    best, found, sums = _scanned(scores, 4, left_out)
    values, index, expected = _expected(scores, 4, left_out)
    assert torch.equal(best.double(), values)
    assert torch.equal(found[[0, 1, 3, 4]], index[[0, 1, 3, 4]])
    assert found[2, :3].tolist() == index[2, :3].tolist()
    assert found[2, 3] in (4, common.NO_CLASS.value)  # the class left out may have stood for one of -inf
    torch.testing.assert_close(sums[:, :1].double(), expected[:, :1], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("widest", [64, 16], ids=["whole", "streamed"])
def test_nan_and_infinity_come_first_and_stay_in_their_row(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WIDEST", widest)
    scores = torch.randn(4, 40)
    negative_nan = torch.tensor([-(2**22)], dtype=torch.int32).view(torch.float32)
    scores[0, 39], scores[1, 17], scores[2, 20] = torch.nan, torch.inf, negative_nan
    best, found, _ = _scanned(scores, 2)
    assert (best[:3, 0] == torch.inf).all()
    assert found[:3, 0].tolist() == [39, 17, 20]
    assert torch.equal(best[3], scores[3].topk(2).values)


@triton.jit
def _orders_of(scores_ptr, out_ptr, back_ptr, N: tl.constexpr):
    places = tl.arange(0, N)
    orders = order_of(tl.load(scores_ptr + places))
    tl.store(out_ptr + places, orders)
    tl.store(back_ptr + places, score_of(orders))


def test_orders_are_those_of_the_scores() -> None:
    scores = torch.tensor([0.0, -0.0, 1.5, -1.5, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3e38, -3e38])
    scores = torch.cat((scores, torch.randn(21)))
    orders, back = torch.empty(32, dtype=torch.int32), torch.empty(32)
    common.launch(_orders_of, 1, scores, orders, back, N=32, warps=1)
    number = ~scores.isnan()
    assert torch.equal(back[number], scores[number])
    assert torch.equal(orders[number, None] < orders[number], scores[number, None] < scores[number])
    assert orders[6] < orders[number].min()


@triton.jit
def _softplus_of(z_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out_ptr + place, softplus(tl.load(z_ptr + place)))


def test_softplus_keeps_its_digits() -> None:
    z = torch.tensor([-80.0, -30.0, -17.0, -5.0, -1.0, 0.0, 1.0, 5.0, 17.0, 30.0, 80.0, 1e4, -1e-6, 1e-6, -14.0, 14.0])
    out = torch.empty(16)
    common.launch(_softplus_of, 1, z, out, N=16, warps=1)
    torch.testing.assert_close(out.double(), torch.nn.functional.softplus(z.double(), threshold=100), rtol=4e-7, atol=0)


@pytest.mark.parametrize("classes", [1, 16, 17, 1000, 1024, 4097, 8192, 8193, 21841, 2**20])
def test_tilings_cover_every_row_and_fit_the_device(classes: int) -> None:
    for tiling in (common.whole_rows(classes), common.elementwise(classes)):
        assert tiling.streams or tiling.block >= classes
        assert tiling.block & (tiling.block - 1) == 0
        assert 1 <= tiling.warps <= 16
        assert tiling.rows == 1 or not tiling.streams
        assert tiling.rows * tiling.block <= 32 * 32 * tiling.warps
        assert tiling.programs(100) * tiling.rows >= 100
        assert common.tiles(classes, tiling) == math.ceil(classes / tiling.block)


def test_alignment_asks_for_rows_of_whole_16_bytes() -> None:
    assert common.alignment(torch.empty(4, 1000)) == 4
    assert common.alignment(torch.empty(4, 1000, dtype=torch.bfloat16)) == 8
    assert common.alignment(torch.empty(4, 1001)) == 1
    assert common.alignment(torch.empty(4, 1004, dtype=torch.bfloat16)) == 1
    assert common.alignment(torch.empty(4, 1001)[:, :1000]) == 1
    assert common.alignment(torch.empty(1000, 4).t()) == 1
