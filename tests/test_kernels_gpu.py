"""The kernels on a GPU, all losses of `kernel_cases.GPU_CASES` alike: `make test-gpu`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from kernel_cases import (
    GPU_CASES,
    TYPES,
    compare,
    losses_and_gradient,
    mask_and_gradient,
    random_scores,
    special_rows,
)
from torch import Tensor

import topk
from topk import backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Loss = Callable[..., Tensor]
CASES = [
    pytest.param(function, keywords, id=f"{name}-{keywords}")
    for name, (function, variants) in GPU_CASES.items()
    for keywords in variants
]
FIRST = [pytest.param(function, variants[0], id=name) for name, (function, variants) in GPU_CASES.items()]
every_case = pytest.mark.parametrize(("loss", "keywords"), CASES)
every_loss = pytest.mark.parametrize(("loss", "keywords"), FIRST)


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def _largest_k(keywords: Mapping[str, Any]) -> int:
    k = keywords.get("k", 5)
    return max(k) if isinstance(k, Mapping) else k


def _problem(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random_scores(rows, classes, dtype).cuda(), torch.randint(classes, (rows,)).cuda()


# --- the tables ------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("classes", [0, 1, 63, 64, 65, 1000, 8191, 8192, 8193, 21841])
def test_every_number_of_classes(loss: Loss, keywords: Mapping[str, Any], classes: int, dtype: torch.dtype) -> None:
    """0 and 1 stand for k and k + 1 classes."""
    classes = _largest_k(keywords) + classes if classes < 2 else max(classes, _largest_k(keywords))
    compare(loss, *_problem(7, classes, dtype), **keywords)


@every_case
def test_a_million_classes(loss: Loss, keywords: Mapping[str, Any]) -> None:
    compare(loss, *_problem(2, 2**20), **keywords)


@every_case
@pytest.mark.parametrize("rows", [0, 1, 3, 257, 5000])
def test_every_number_of_rows(loss: Loss, keywords: Mapping[str, Any], rows: int) -> None:
    compare(loss, *_problem(rows, 100), **keywords)


@every_case
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("classes", [100, 20000])
def test_special_rows(loss: Loss, keywords: Mapping[str, Any], classes: int, dtype: torch.dtype) -> None:
    compare(loss, *special_rows(classes, dtype, "cuda"), **keywords)


@every_loss
def test_any_strides(loss: Loss, keywords: Mapping[str, Any]) -> None:
    scores, target = _problem(64, 130)
    compare(loss, scores.t(), target[:1].expand(130) % 64, **keywords)
    compare(loss, scores[::2, 1:129:3], target[::2] % 43, **keywords)
    compare(loss, scores[:1].expand(64, 130), target, torch.ones((), device="cuda").expand(64), **keywords)


@every_loss
def test_sorted_rows_take_every_tile(loss: Loss, keywords: Mapping[str, Any]) -> None:
    """The worst order for a running selection: every tile holds better scores than the one before."""
    scores = torch.linspace(-30.0, 30.0, 20000, device="cuda").expand(2, -1).contiguous()
    compare(loss, scores, torch.tensor([0, 19997], device="cuda"), **keywords)


# --- size ------------------------------------------------------------------------------------------------------------


@every_loss
def test_more_than_two_to_the_31_elements(loss: Loss, keywords: Mapping[str, Any]) -> None:
    """The rows beyond the 2^31st element are those of a small tensor."""
    rows, classes = 2**31 // 21841 + 100, 21841
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * classes:
        pytest.skip("needs 13 GB")
    scores = torch.zeros(rows, classes, dtype=torch.float16, device="cuda")
    target = torch.zeros(rows, dtype=torch.int64, device="cuda")
    scores[-3:], target[-3:] = _problem(3, classes, torch.float16)
    grad = torch.ones(rows, device="cuda")
    losses, gradient = losses_and_gradient(loss, scores, target, grad, "triton", **keywords)
    few, few_slopes = losses_and_gradient(loss, scores[-3:].clone(), target[-3:], grad[-3:], "triton", **keywords)
    torch.testing.assert_close(losses[-3:], few, rtol=0.0, atol=0.0)
    torch.testing.assert_close(gradient[-3:], few_slopes, rtol=0.0, atol=0.0)
    assert losses[:-3].eq(losses[0]).all()


# --- around the kernels ----------------------------------------------------------------------------------------------


@every_loss
def test_the_kernels_are_the_default_where_they_are_promised(loss: Loss, keywords: Mapping[str, Any]) -> None:
    scores, target = _problem(5, 50)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert backend.why_not_triton(scores.device) is None
    chosen = losses_and_gradient(loss, scores, target, torch.ones(5, device="cuda"), None, **keywords)
    explicit = losses_and_gradient(loss, scores, target, torch.ones(5, device="cuda"), "triton", **keywords)
    assert torch.equal(chosen[0], explicit[0])
    assert torch.equal(chosen[1], explicit[1])


@every_loss
def test_the_device_check_of_old_devices_passes(loss: Loss, keywords: Mapping[str, Any]) -> None:
    name = next(name for name, (function, _) in GPU_CASES.items() if function is loss)
    for dtype in TYPES:
        assert backend._self_check(name, torch.device("cuda", 0), dtype) is None


@every_loss
def test_nothing_waits_for_the_device(loss: Loss, keywords: Mapping[str, Any]) -> None:
    scores, target = _problem(8, 200)
    grad = torch.ones(8, device="cuda")
    losses_and_gradient(loss, scores, target, grad, "triton", **keywords)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses_and_gradient(loss, scores, target, grad, "triton", **keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_loss
def test_captured_in_a_graph(loss: Loss, keywords: Mapping[str, Any]) -> None:
    scores, target = _problem(8, 200)
    grad = torch.ones(8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses_and_gradient(loss, scores, target, grad, "triton", **keywords)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = losses_and_gradient(loss, scores, target, grad, "triton", **keywords)
    scores.copy_(torch.randn_like(scores))
    graph.replay()
    fresh = losses_and_gradient(loss, scores, target, grad, "triton", **keywords)
    assert torch.equal(captured[0], fresh[0])
    assert torch.equal(captured[1], fresh[1])


@every_loss
def test_compiled_as_one_graph(loss: Loss, keywords: Mapping[str, Any]) -> None:
    scores, target = _problem(8, 200)
    scores.requires_grad_()

    def call(x: Tensor, y: Tensor) -> Tensor:
        return loss(2.0 * x, y, **keywords)

    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        value = function(scores, target)
        results.append((value, *torch.autograd.grad(value, scores)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)


@every_loss
def test_under_autocast(loss: Loss, keywords: Mapping[str, Any]) -> None:
    features, weights = torch.randn(8, 16, device="cuda"), torch.randn(16, 100, device="cuda", requires_grad=True)
    target = torch.randint(100, (8,), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        scores = features @ weights
        value = loss(scores, target, backend="triton", **keywords)
    assert scores.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    value.backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()
    expected = loss(scores.detach().double(), target, backend="torch", **keywords)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@every_loss
def test_two_streams_at_once(loss: Loss, keywords: Mapping[str, Any]) -> None:
    problems = [_problem(500, 1000) for _ in range(2)]
    grad = torch.ones(500, device="cuda")
    expected = [losses_and_gradient(loss, *problem, grad, "triton", **keywords) for problem in problems]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for problem in problems:
            with torch.cuda.stream(torch.cuda.Stream()):
                results.append(losses_and_gradient(loss, *problem, grad, "triton", **keywords))
        torch.cuda.synchronize()
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])


@every_loss
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one(loss: Loss, keywords: Mapping[str, Any]) -> None:
    scores, target = (t.to("cuda:1") for t in _problem(5, 300))
    assert torch.cuda.current_device() == 0
    compare(loss, scores, target, torch.ones(5, device="cuda:1"), **keywords)


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["subset", "logistic", "sparse", "laplace", "gaussian"])
@pytest.mark.parametrize(("n", "k"), [(65, 3), (1000, 5), (1000, 50), (8193, 20), (21841, 5000)])
def test_masks_of_operators(method: str, n: int, k: int) -> None:
    """Against float64 on the CPU, and rows of NaN stay alone."""
    scores, weight = 2.0 * torch.randn(7, n), torch.randn(7, n)
    scores[1, n // 2 :], scores[2] = -torch.inf, 0.5
    found, exact = (
        mask_and_gradient(x, min(k, n), weight.to(x), method=method, backend=backend)
        for x, backend in ((scores.cuda(), "triton"), (scores.double(), "torch"))
    )
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.cpu().double(), expected, rtol=0, atol=1e-5)
    scores[0, 3] = torch.nan
    mask = topk.soft_topk(scores.cuda(), min(k, n), method=method, backend="triton")
    assert mask[0].isnan().all()
    assert mask[1:].isfinite().all()
