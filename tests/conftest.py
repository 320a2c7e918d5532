"""Every test starts from the same random numbers, and memory that was never written holds NaN.

Only a run that asks for them (`-m gpu`) sees CUDA devices: everywhere else kernels are interpreted, also on a machine
that has a GPU.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="0/1", help="the tests i, i + n, i + 2 n, ... of a run, written i/n")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported, and with it triton, or CUDA is asked for its devices."""
    if re.search(r"(?<!not )\bgpu\b", config.option.markexpr) is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("part").split("/"))
    items[:] = items[part::parts]


if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter prepares its language at every call of a device function; here once for every module."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    prepared: set[int] = set()

    def call(function: Any, *arguments: Any, **keywords: Any) -> Any:
        module = id(function.fn.__globals__)
        if module not in prepared:
            prepared.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **keywords)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        return result.fill_(torch.nan) if result.dtype.is_floating_point else result

    return allocate_and_poison


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An element that an op forgets to write shows up as NaN instead of as last week's number."""
    if not request.node.get_closest_marker("slow"):  # the compiler's own tests trace these functions
        monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
