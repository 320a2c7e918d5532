"""Bytes are counted as they are moved, on operations and kernels whose traffic is known; times over a baseline."""

from __future__ import annotations

import os
import time

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import pytest
import torch

import topk
from topk_lab.study import timing
from topk_lab.study.traffic import eager_traffic, kernel_traffic


def test_operations_of_torch() -> None:
    x = torch.randn(8, 100)
    with eager_traffic() as calls:
        y = x + 1.0
        y.mul_(x)
        y.view(100, 8).t()
        y.zero_()
        torch.empty_strided((50,), (1,))
        (x[:, :1].expand(8, 100) * x).sum()
        x.gather(1, torch.zeros(8, 1, dtype=torch.int64))
        torch.zeros_like(x)
    by_name = {call.name: (call.read, call.written) for call in calls}
    size = 8 * 100 * 4
    assert by_name["add"] == (size, size)
    assert by_name["mul_"] == (2 * size, size)
    assert by_name["zero_"] == (0, size)
    assert by_name["mul"][1] == size
    assert by_name["sum"] == (size, 4)
    assert by_name["gather"] == (8 * 8 + 8 * 4, 8 * 4)
    assert by_name["zeros_like"][0] == 0
    assert {"add", "mul_", "zero_", "mul", "sum", "gather"} <= set(by_name)
    assert not {"view", "t", "expand", "slice", "empty_strided"} & set(by_name)
    assert calls[0].moved == 2 * size
    assert calls[0].results == 800


def test_backward_is_counted_too() -> None:
    x = torch.randn(8, 100, requires_grad=True)
    with eager_traffic() as calls:
        torch.autograd.grad(x.exp().sum(), x)
    assert {"exp", "sum", "mul"} <= {call.name for call in calls}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(torch.cuda.is_available(), reason="only interpreted kernels can be counted")
def test_the_transition_kernel_moves_what_its_docstring_says(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    rows, classes, k = 4, 300, 5
    x = torch.randn(rows, classes).to(dtype).requires_grad_()
    size = classes * x.element_size()
    with kernel_traffic() as forward:
        loss = topk.transition_topk_loss(x, torch.arange(rows), k, backend="triton")
    assert forward.loaded == rows * (size + 8 + x.element_size())  # the row, its target, the target's score
    assert forward.stored == rows * (8 * (k + 1) + 16)
    with kernel_traffic() as backward:
        torch.autograd.grad(loss, x)
    assert rows * (size + k * x.element_size()) <= backward.stored <= rows * (size + (k + 1) * x.element_size())
    kept = 8 * (k + 1) + 12  # classes and slopes, and three numbers a row
    assert rows * size <= backward.loaded <= rows * (size + kept + 8 + 4)  # with the target and the row's gradient


def test_times_over_a_baseline() -> None:
    works = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.1)}
    found = timing.times_of(works, "short", rounds=5)
    assert found["short"] == 1.0
    assert 4 < found["long"] < 60  # 50, but for a machine that is busy


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        timing.clock_of("meta")
