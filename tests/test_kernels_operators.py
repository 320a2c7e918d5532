"""The operators' kernels, interpreted on the CPU, against their torch path in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import TYPES, mask_and_gradient
from torch import Tensor

import topk
from topk.kernels import common
from topk.operators.subset import subset_mask
from topk.operators.threshold import threshold

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a kernel masks afterwards

FAMILIES = ("logistic", "sparse", "laplace", "gaussian")
METHODS = ("subset", *FAMILIES)


@pytest.fixture(params=[False, True], ids=["tile", "streams"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(common, "WIDEST", 32)


def compare(scores: Tensor, k: Any, method: str, **options: Any) -> None:
    weight = torch.randn(scores.shape)
    found = mask_and_gradient(scores, k, weight, method=method, backend="triton", **options)
    exact = mask_and_gradient(scores.double(), k, weight, method=method, backend="torch", **options)
    eps = 0.0 if scores.dtype == torch.float32 else torch.finfo(scores.dtype).eps
    for ours, expected, absolute in zip(found, exact, (3e-6, 1e-5), strict=True):  # a covariance cancels
        assert ours.dtype == scores.dtype
        torch.testing.assert_close(ours.double(), expected, rtol=eps, atol=absolute, equal_nan=True)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("n", "k"), [(33, 5), (33, 32), *(pytest.param(70, k, marks=pytest.mark.slow) for k in (1, 69, 30))]
)
def test_masks_and_gradients(method: str, n: int, k: int) -> None:
    """All tied, close together, far from zero, far apart."""
    scale, offset = torch.tensor([[0.0], [1e-3], [1.0], [5.0]]), torch.tensor([[1e4], [0.0], [1e4], [0.0]])
    scores = offset + scale * torch.randn(4, n)
    compare(scores, k, method, temperature=torch.tensor([0.7, 1.0, 2.0, 1.0]))


@pytest.mark.parametrize("method", METHODS)
def test_a_thousand_scores(method: str) -> None:
    scores = 2.0 * torch.randn(1, 1000)
    compare(scores, 20, method)
    mask = topk.soft_topk(30.0 * scores, 20, method=method, backend="triton")
    assert ((mask.double().sum(1) - 20).abs() <= 20e-5).all()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        pytest.param(method, dtype, marks=pytest.mark.slow)
        if dtype == torch.float16 or (dtype == torch.bfloat16 and method in FAMILIES[1:])  # whose loads are logistic's
        else (method, dtype)
        for method in METHODS
        for dtype in TYPES
    ],
    ids=str,
)
def test_special_rows(method: str, dtype: torch.dtype) -> None:
    """NaN and infinity, hardly a possible score or none, ties at the k-th, -0.0, a leader, and any strides."""
    scores = torch.randn(40, 10).round(decimals=1).to(dtype)
    scores[3, 0], scores[4, 1] = torch.nan, torch.inf
    scores[2:, 2], scores[:, 3], scores[3:, 4] = -torch.inf, -torch.inf, -torch.inf
    scores[:, 5], scores[:, 6] = 0.3, (torch.rand(40) < 0.5).to(dtype) * -0.0
    scores[7, 7] = 1e4
    scores[::3, 8] = -torch.inf
    scores = scores.t()
    weight = torch.randn(scores.shape)
    masks = [mask_and_gradient(scores, 3, weight, method=method, backend=name) for name in ("triton", "torch")]
    for ours, expected in zip(*masks, strict=True):
        broken = torch.tensor([0, 1])
        whole = [row for row in range(10) if row not in broken]
        tolerance = 3e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours[whole], expected[whole], rtol=tolerance, atol=tolerance)
    assert masks[0][0][broken].isnan().all()
    assert (masks[0][0][scores == -torch.inf] == 0).all()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("method", FAMILIES)
def test_a_k_and_a_temperature_for_every_row(method: str) -> None:
    """With gradients in all three, and in b."""
    x = 2.0 * torch.randn(6, 40)
    k = torch.tensor([0.0, 0.25, 2.5, 39.5, 40.0, 7.0])
    heat = torch.tensor([1.0, 0.5, 3.0, 1.0, 1.0, 2.0])
    weights = torch.randn(6, 40), torch.tensor([0.0, 1.0, -2.0, 1.0, 0.0, 1.0])
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        inputs = [each.to(dtype).requires_grad_() for each in (x, k, heat)]
        mask, offset, anchor = threshold(*inputs, method, backend)
        gradients = torch.autograd.grad((mask, offset), inputs, [each.to(dtype) for each in weights])
        results.append((mask, *gradients))
        b = (offset + anchor).detach().double()
        results[-1] += (b[1:4],)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    broken = topk.soft_topk(x, torch.tensor([-1.0, 41.0, torch.nan, 1, 1, 1]), method=method, backend="triton")
    assert broken[:3].isnan().all()
    assert broken[3:].isfinite().all()


@pytest.mark.usefixtures("_tiles")
def test_a_number_of_chosen_elements_for_every_row() -> None:
    scores, counts = torch.randn(5, 40), torch.tensor([0, 1, 7, 39, 40])
    heat = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0])
    mask, total, pivot = subset_mask(scores, counts, heat, 40, "triton")
    expected, log_sum, other = subset_mask(scores.double(), counts, heat.double(), 40, "torch")
    torch.testing.assert_close(mask.double(), expected, rtol=0, atol=3e-6)
    log_sum = log_sum + counts * (other - pivot) / heat.double()
    torch.testing.assert_close(total.double(), log_sum, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_numbers_of_rows(method: str, rows: int) -> None:
    compare(torch.randn(rows, 9), 2, method)


@pytest.mark.parametrize("method", ["subset", "logistic"])
def test_every_derivative_and_vmap(method: str) -> None:
    """Second derivatives and transforms leave the kernel's own backward pass aside."""
    scores = torch.randn(2, 7)

    def mask(x: Tensor, backend: str) -> Tensor:
        return topk.soft_topk(x, 2, method=method, backend=backend)

    hessians = [torch.func.hessian(lambda x, b=b: (mask(x, b) ** 2).sum())(scores) for b in ("triton", "torch")]
    torch.testing.assert_close(*hessians, rtol=1e-4, atol=1e-5)
    together = torch.func.vmap(torch.func.jacrev(lambda x: mask(x, "triton")))(scores)
    alone = [torch.autograd.functional.jacobian(lambda x: mask(x, "torch"), row) for row in scores]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_kernel_that_cannot_run_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"these are torch\.float64"):
        topk.soft_topk(torch.randn(3, 5, dtype=torch.float64), 2, backend="triton")
    with pytest.raises(RuntimeError, match="method='fixed' has no Triton kernel"):
        topk.soft_topk(torch.randn(3, 5), 2, method="fixed", backend="triton")
    with pytest.raises(ValueError, match="backend must be one of None, 'torch', 'triton'"):
        topk.soft_topk(torch.randn(3, 5), 2, backend="compiled")
