"""The smooth loss's kernels, interpreted on the CPU, against its torch path in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import TYPES, compare, compare_special_rows, random_scores
from torch import Tensor
from triton.runtime import interpreter

from bench.trips import halving
from topk import smooth_topk_loss
from topk.kernels import common, smooth
from topk.losses.smooth import Options
from topk_lab.study.traffic import kernel_traffic

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a kernel masks afterwards

OPTIONS: list[dict[str, Any]] = [
    {"k": 1, "margin": 0.0},
    {"k": 5},
    {"k": 9, "tau": 0.1},
    {"k": 12, "margin": 2.5, "tau": 3.0},
    {"k": {1: 0.25, 3: 0.25, 10: 0.5}},
    {"k": {7: 0.5, 11: 0.25, 31: 0.25}, "tau": 0.5},
]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _quick_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", halving)


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WIDEST", 16)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options: dict[str, Any]) -> None:
    compare(smooth_topk_loss, random_scores(3, 33), torch.randint(33, (3,)), **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_special_rows(dtype: torch.dtype) -> None:
    compare_special_rows(smooth_topk_loss, 13, dtype, **OPTIONS[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, slow(torch.float16)], ids=str)
def test_special_rows_of_larger_ks(dtype: torch.dtype) -> None:
    compare_special_rows(smooth_topk_loss, 13, dtype, **OPTIONS[4])


@pytest.mark.parametrize(
    "options", [{"k": {2: 0.5, 4: 0.5}}, {"k": 9}, slow({"k": {2: 0.25, 8: 0.5, 12: 0.25}})], ids=str
)
def test_special_rows_in_streams(options: dict[str, Any], short_tiles: None) -> None:
    compare_special_rows(smooth_topk_loss, 17, torch.float32, **options)


@pytest.mark.parametrize("classes", [5, 6, 15, 16, 17, 1000])
def test_numbers_of_classes(classes: int) -> None:
    """k = n, k + 1, around a power of two, and the usual case."""
    compare(smooth_topk_loss, random_scores(2, classes), torch.randint(classes, (2,)), k=5)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_numbers_of_rows(rows: int) -> None:
    compare(smooth_topk_loss, random_scores(rows, 12), torch.randint(12, (rows,)), k={2: 0.5, 10: 0.5})


def _rows_to_sift(classes: int) -> Tensor:
    """Scores that rise, fall, are tied, are mostly masked, crowd into a few columns of a tile, or lie far apart."""
    scores = random_scores(6, classes)
    scores[0], scores[1] = scores[0].sort().values, scores[1].sort(descending=True).values
    scores[2] = scores[2].round()
    scores[3, torch.rand(classes) < 0.9] = -torch.inf
    scores[4, 3::16] += 30.0
    scores[5] *= 1e4
    return scores


def _compare_and_count(scores: Tensor, target: Tensor, **options: Any) -> int:
    """`compare`, and the bytes that the kernel's forward pass loads."""
    loaded = []

    def counted(*arguments: Any, **keywords: Any) -> Tensor:
        with kernel_traffic() as moved:
            loss = smooth_topk_loss(*arguments, **keywords)
        loaded.append(moved.loaded)
        return loss

    compare(counted, scores, target, **options)
    return loaded[0]  # then comes the torch path


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({"k": 2}, 1),
        ({"k": {1: 0.5, 6: 0.5}}, 1),
        slow({"k": 8}, 2),
        ({"k": {5: 0.5, 16: 0.5}}, 3),
    ],
)
def test_a_streamed_row_is_read_once_and_once_more_for_every_large_k(
    options: dict[str, Any], reads: int, short_tiles: None
) -> None:
    """At most, whatever the order of the scores; besides, a target and its score, and of k <= 6 what was kept."""
    loaded = _compare_and_count(_rows_to_sift(96), torch.randint(96, (6,)), **options)  # six tiles
    ks = options["k"] if isinstance(options["k"], dict) else [options["k"]]
    again = 8 + 4 * (1 + max(ks) + sum(ks)) if max(ks) <= 6 else 0
    assert 6 * (96 * 4 + 8 + 4 + again) <= loaded <= 6 * (reads * 96 * 4 + 8 + 4 + again)


@pytest.mark.parametrize(("spread", "reads"), [(1.0, 1), pytest.param(10.0, 2, marks=pytest.mark.slow)])
def test_a_row_of_small_probabilities_is_read_once_for_a_large_k_too(
    spread: float, reads: int, short_tiles: None
) -> None:
    """What four power sums tell of the scores sifted out; of larger ones the product is taken."""
    loaded = _compare_and_count(spread * random_scores(2, 768), torch.randint(768, (2,)), k=7)
    assert loaded == 2 * (reads * 768 * 4 + 8 + 4)


def test_a_k_too_large_to_sift_for(short_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smooth, "_LONGEST_SIFTED", 16)
    compare(smooth_topk_loss, _rows_to_sift(40), torch.randint(40, (6,)), k={4: 0.5, 9: 0.5})


@pytest.mark.parametrize("options", [{"k": 3}, {"k": 20}], ids=str)
def test_a_row_that_must_be_streamed_at_full_width(options: dict[str, Any]) -> None:
    compare(smooth_topk_loss, random_scores(1, 9001), torch.tensor([4711]), **options)


def _shapes(classes: int, k: int, scale: float) -> Iterator[Tensor]:
    """Rows of every kind that decides how hard the numbers are: usual, tied, k far above the others, evenly spread."""
    yield torch.randn(classes) * scale
    yield (torch.randn(classes) * 2).round() / 2 * scale
    yield torch.where(torch.arange(classes) < k, scale, -scale)
    yield torch.linspace(-1, 1, classes) * scale


@pytest.mark.parametrize("scale", [slow(1e-3), 1.0, slow(30.0), 1e4])
@pytest.mark.parametrize(("k", "classes"), [(1, 3), (5, 40), (6, 8), (7, 17), (20, 21), (50, 300), slow(100, 203)])
def test_scales_and_shapes(k: int, classes: int, scale: float) -> None:
    """The slopes hold to 2e-6 / k, the loss to a few units of float32."""
    rows = torch.stack(list(_shapes(classes, k, scale)))
    compare(smooth_topk_loss, rows, torch.tensor([0, classes // 2, classes - 1, classes - 1]), k=k)


def test_both_series_are_in_use() -> None:
    """Scores far apart against kT leave few classes in doubt, scores close together many."""
    scores = torch.stack((random_scores(1, 200, scale=0.1)[0], random_scores(1, 200, scale=1000.0)[0]))
    _, table = smooth.forward(scores, torch.tensor([3, 5]), Options([20], [1.0], 1.0, 1.0), -100)
    assert table[0, 2] < 0 < table[1, 2]


def test_strides() -> None:
    """Transposed scores, every other column, a broadcast row, and one gradient for all rows."""
    target = torch.randint(11, (3,))
    for scores in (random_scores(11, 3).T, random_scores(3, 22)[:, ::2], random_scores(1, 11).expand(3, 11)):
        compare(smooth_topk_loss, scores, target, torch.tensor(1.5).expand(3), k=2)


def test_gradient_of_ignored_rows_is_not_looked_at() -> None:
    grad = torch.tensor([torch.nan, 1.0, torch.inf])
    scores = random_scores(3, 9).requires_grad_()
    losses = smooth_topk_loss(scores, torch.tensor([-100, 4, -100]), 3, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(losses, scores, grad)
    assert torch.equal(losses[::2], torch.zeros(2))
    assert torch.equal(gradient[::2], torch.zeros(2, 9))
    assert gradient[1].abs().sum() > 0


def test_second_derivatives() -> None:
    """The torch formula serves them, whatever the kernel saved."""
    scores, target = random_scores(2, 8), torch.tensor([1, 5])

    def total(x: Tensor, backend: str) -> Tensor:
        return smooth_topk_loss(x, target, 3, reduction="sum", backend=backend)

    ours, theirs = (torch.autograd.functional.hessian(lambda x, b=b: total(x, b), scores) for b in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_leaders_before_a_crowd() -> None:
    """Coefficients that differ by orders of magnitude: what a division lost would be multiplied by the largest."""
    scores = torch.zeros(1, 200_000)
    scores[0, :5], scores[0, -1] = 480.0 * torch.linspace(1.0, 0.01, 5), -6.0
    compare(smooth_topk_loss, scores, torch.tensor([199_999]), k=6)
