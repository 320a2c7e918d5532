"""The hinge losses's kernels, interpreted on the CPU, against their torch path in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import TYPES, compare, compare_special_rows, random_scores

from topk import topk_hinge_loss
from topk.kernels import common

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a kernel masks afterwards

VARIANTS = ("calibrated", "kth", "alpha", "beta", "smooth_limit", "entropy")
OPTIONS: list[dict[str, Any]] = [{"k": 3, "variant": variant, "margin": 0.75} for variant in VARIANTS]
OPTIONS += [{"k": {1: 0.5, 3: 0.25, 5: 0.25}, "variant": variant} for variant in VARIANTS]


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WIDEST", 16)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options: dict[str, Any]) -> None:
    compare(topk_hinge_loss, random_scores(7, 33), torch.randint(33, (7,)), **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[6:], ids=str)
def test_special_rows(options: dict[str, Any], dtype: torch.dtype) -> None:
    compare_special_rows(topk_hinge_loss, 12, dtype, **options)


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[6], OPTIONS[11]], ids=str)
def test_special_rows_in_streams(options: dict[str, Any], short_tiles: None) -> None:
    compare_special_rows(topk_hinge_loss, 37, torch.float32, **options)


@pytest.mark.parametrize("classes", [5, 6, 15, 16, 17, 1000])
def test_numbers_of_classes(classes: int) -> None:
    """k = n, k + 1, around a power of two, and the usual case."""
    compare(topk_hinge_loss, random_scores(3, classes), torch.randint(classes, (3,)), k=5)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_numbers_of_rows(rows: int) -> None:
    compare(topk_hinge_loss, random_scores(rows, 9), torch.randint(9, (rows,)), k=2)


def test_a_row_that_must_be_streamed_at_full_width() -> None:
    compare(topk_hinge_loss, random_scores(1, 9001), torch.tensor([4711]), k=3, variant="entropy")


def test_scores_of_any_strides_and_a_gradient_without() -> None:
    target = torch.randint(8, (4,))
    compare(topk_hinge_loss, random_scores(8, 4).t(), target, torch.ones(()).expand(4), k=2)
    compare(topk_hinge_loss, random_scores(8, 20)[::2, 2:18:2], target, k=2)
    compare(topk_hinge_loss, random_scores(1, 8).expand(4, 8), target, k=2)


def test_a_row_of_scores_and_an_odd_ignore_index() -> None:
    target = torch.tensor([3, 1, 2, 3])
    compare(topk_hinge_loss, random_scores(4, 8), target, ignore_index=3, k=2)


def test_alpha_where_y_ties_for_the_last_place() -> None:
    """z_y = 0 against wrong classes at exactly 0: the lower index takes the place, and with it the slope."""
    scores = torch.tensor([[2.0, 2.0, 0.0, 1.0, -1.0], [1.0, 2.0, 2.0, 0.0, -1.0]])
    compare(topk_hinge_loss, scores, torch.tensor([3, 0]), torch.ones(2), k=3, variant="alpha", margin=1.0)


@pytest.mark.parametrize("variant", ["calibrated", "beta"])
def test_an_infinite_gradient_reaches_only_the_classes_with_a_slope(variant: str) -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0], [-1.0, 0.0, 1.0, 2.0, 9.0]]).requires_grad_()
    losses = topk_hinge_loss(scores, torch.tensor([3, 4]), 1, variant=variant, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(losses, scores, torch.full((2,), torch.inf))
    assert losses[1] == 0.0
    pushed = 1 if variant == "calibrated" else 0
    expected = torch.zeros(2, 5)
    expected[0, 3], expected[0, pushed] = -torch.inf, torch.inf
    assert torch.equal(gradient, expected)
