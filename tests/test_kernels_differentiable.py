"""The differentiable loss's kernels, interpreted on the CPU, against its torch path in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import TYPES, compare, compare_special_rows, random_scores

from topk import differentiable_topk_loss
from topk.kernels import common, differentiable
from topk.losses.differentiable import DISTRIBUTIONS, METHODS, NETWORKS, Options

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, about what a kernel masks afterwards
    pytest.mark.filterwarnings("ignore:sinkhorn"),
]

TOLERANCE = 5.0  # times that of other losses: the gradients of steep operators are as much larger
SEVERAL = {1: 0.25, 5: 0.75}


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WIDEST", 16)


def check(rows: int, classes: int, scale: float = 2.0, **options: Any) -> None:
    scores = random_scores(rows, classes, scale=scale)
    compare(differentiable_topk_loss, scores, torch.randint(classes, (rows,)), tolerance=TOLERANCE, **options)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("method", NETWORKS)
def test_networks(method: str, distribution: str) -> None:
    for beta, classes in ((0.5, 33), (2.0, 9)):  # m = 9 of 33 kept, and all of 9
        check(4, classes, k=3, m=9, method=method, distribution=distribution, inverse_temperature=beta, art_lambda=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_every_treatment_of_the_first(method: str) -> None:
    for top1 in ("softmax", "cross_entropy", "sort"):
        check(4, 21, k=SEVERAL, method=method, top1=top1, inverse_temperature=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1},  # no network at all
        {"k": 1, "top1": "sort"},
        {"k": 1, "m": 1},
        {"k": 4, "m": 4},
        {"k": {1: 0.5, 2: 0.5}, "m": 2, "method": "softsort"},
        {"k": {1: 0.2, 2: 0.3, 4: 0.5}, "m": 7, "method": "bitonic"},
        {"k": SEVERAL, "top1": "cross_entropy", "cross_entropy_over": "all", "m": 6},
        {"k": {1: 1.0}, "top1": "cross_entropy", "cross_entropy_over": "all", "m": 6},
        {"k": SEVERAL, "top1": "cross_entropy", "cross_entropy_over": "all", "m": 30},  # all are kept anyway
        {"k": {2: 0.5, 30: 0.5}, "m": 30, "method": "bitonic"},  # 30 of 30 cannot be missed
        {"k": 5, "m": 40, "method": "neuralsort", "inverse_temperature": 0.1},
    ],
    ids=str,
)
def test_sizes_and_mixtures(options: dict[str, Any]) -> None:
    check(5, 30, **options)


@pytest.mark.parametrize("distribution", ["logistic", "gaussian", "cauchy", "reciprocal", "optimal"])
def test_targets_that_almost_certainly_miss(distribution: str) -> None:
    """Hits down to 1e-7 and below, whose logarithm is the loss."""
    for scale in (4.0, 40.0):
        check(12, 24, scale=scale, k=2, m=8, method="bitonic", distribution=distribution)


@pytest.mark.parametrize("method", ["neuralsort", "softsort"])
def test_ties(method: str) -> None:
    scores = torch.randint(4, (6, 20)).float()
    compare(differentiable_topk_loss, scores, torch.randint(20, (6,)), tolerance=TOLERANCE, method=method, k=SEVERAL)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("m", [6, 12])
def test_special_rows(m: int, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"k": {1: 0.5, 3: 0.5}, "m": m, "method": "bitonic"}
    compare_special_rows(differentiable_topk_loss, 12, dtype, tolerance=TOLERANCE, **options)


@pytest.mark.parametrize("method", ["softsort", "neuralsort", "sinkhorn"])
def test_special_rows_of_other_methods(method: str) -> None:
    options: dict[str, Any] = {"k": {1: 0.5, 3: 0.5}, "m": 6, "method": method, "inverse_temperature": 0.25}
    compare_special_rows(differentiable_topk_loss, 12, torch.float32, tolerance=TOLERANCE, **options)


def test_special_rows_with_cross_entropy_over_all_in_streams(short_tiles: None) -> None:
    options: dict[str, Any] = {"k": SEVERAL, "m": 6, "top1": "cross_entropy", "cross_entropy_over": "all"}
    compare_special_rows(differentiable_topk_loss, 37, torch.float32, tolerance=TOLERANCE, **options)


@pytest.mark.parametrize("classes", [5, 6, 16, 17, 1000])
def test_numbers_of_classes(classes: int) -> None:
    check(2, classes, k=4, m=6)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_numbers_of_rows(rows: int) -> None:
    check(rows, 9, k=2, m=4)


def test_a_row_that_must_be_streamed_at_full_width() -> None:
    check(1, 9001, k=3, m=5)


def test_scores_of_any_strides_and_a_gradient_without() -> None:
    target = torch.randint(8, (4,))
    for m in (3, 8):
        options: dict[str, Any] = {"k": 2, "m": m, "tolerance": TOLERANCE}
        compare(differentiable_topk_loss, random_scores(8, 4).t(), target, torch.ones(()).expand(4), **options)
        compare(differentiable_topk_loss, random_scores(8, 20)[::2, 2:18:2], target, **options)
        compare(differentiable_topk_loss, random_scores(1, 8).expand(4, 8), target, **options)


def test_networks_too_large_for_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differentiable, "_WIDEST_NETWORK", 7)
    check(4, 20, k=SEVERAL, m=8)
    check(4, 8, k=2, m=8, method="bitonic")


def test_backward_without_saved_slopes() -> None:
    """Forward is not asked for slopes where no gradient is in sight; backward then computes them itself."""
    scores, target, grad = random_scores(3, 20), torch.randint(20, (3,)), torch.randn(3)
    options = Options([2], [1.0], kept=5)
    results = []
    for slopes in (True, False):
        options = options._replace(slopes=slopes)
        loss, *saved = differentiable.forward(scores, target, options, -100)
        assert saved[1].shape == (3, 5 if slopes else 0)
        gradient = differentiable.backward(grad, scores, target, options, -100, tuple(saved))
        results.append((loss, gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_second_derivatives() -> None:
    scores, target, along = random_scores(2, 12), torch.tensor([3, 11]), torch.randn(2, 12)
    bent = []
    for leaf, backend in ((scores.clone(), "triton"), (scores.double(), "torch")):
        leaf.requires_grad_()
        loss = differentiable_topk_loss(leaf, target, 2, m=5, backend=backend, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        bent.append(torch.autograd.grad((gradient * along).sum(), leaf)[0].double())
    assert bent[1].abs().max() > 1e-3
    torch.testing.assert_close(bent[0], bent[1], rtol=1e-4, atol=1e-5)
