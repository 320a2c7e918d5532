"""The transition loss's kernels, interpreted on the CPU, against its torch path in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import TYPES, compare, compare_special_rows, random_scores

from topk import transition_topk_loss
from topk.kernels import common

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a kernel masks afterwards

OPTIONS: list[dict[str, Any]] = [
    {"k": 1},
    {"k": 5, "width": 3.0},
    {"k": 3, "transition": 0.4},
    {"k": 3, "transition": 1.0},
    {"k": 2, "label_smoothing": 0.1},
    {"k": {1: 0.5, 3: 0.25, 5: 0.25}, "width": 2.0},
    {"k": {2: 0.3, 4: 0.7}, "transition": lambda m: m.sigmoid(), "label_smoothing": 0.2},
]


def named(options: dict[str, Any]) -> str:
    """The same in every process, which a function's own text is not."""
    return ", ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items())


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WIDEST", 16)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_every_option(options: dict[str, Any]) -> None:
    compare(transition_topk_loss, random_scores(7, 33), torch.randint(33, (7,)), **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[4], OPTIONS[6]], ids=named)
def test_special_rows(options: dict[str, Any], dtype: torch.dtype) -> None:
    compare_special_rows(transition_topk_loss, 12, dtype, **options)


@pytest.mark.parametrize("options", [OPTIONS[5], OPTIONS[6]], ids=named)
def test_special_rows_in_streams(options: dict[str, Any], short_tiles: None) -> None:
    compare_special_rows(transition_topk_loss, 37, torch.float32, **options)


@pytest.mark.parametrize("classes", [5, 6, 15, 16, 17, 1000])
def test_numbers_of_classes(classes: int) -> None:
    """k = n, k + 1, around a power of two, and the usual case."""
    compare(transition_topk_loss, random_scores(3, classes), torch.randint(classes, (3,)), k=5)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_numbers_of_rows(rows: int) -> None:
    compare(transition_topk_loss, random_scores(rows, 9), torch.randint(9, (rows,)), k=2)


def test_a_row_that_must_be_streamed_at_full_width() -> None:
    compare(transition_topk_loss, random_scores(1, 9001), torch.tensor([4711]), k=3, label_smoothing=0.1)


def test_scores_of_any_strides_and_a_gradient_without() -> None:
    target = torch.randint(8, (4,))
    compare(transition_topk_loss, random_scores(8, 4).t(), target, torch.ones(()).expand(4), k=2)
    compare(transition_topk_loss, random_scores(8, 20)[::2, 2:18:2], target, k=2)
    compare(transition_topk_loss, random_scores(1, 8).expand(4, 8), target, k=2)


def test_a_row_of_scores_and_an_odd_ignore_index() -> None:
    target = torch.tensor([3, 1, 2, 3])
    compare(transition_topk_loss, random_scores(4, 8), target, ignore_index=3, k=2)
