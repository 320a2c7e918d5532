"""Every test starts from the same random numbers, and memory that was never written holds NaN.

Only a run that asks for them (`-m gpu`) sees CUDA devices: everywhere else kernels are interpreted, also on a machine
that has a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

if os.environ.get("PYTEST_XDIST_WORKER"):  # before numpy and torch count the cores, which other workers use as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.fixture
def start_processes() -> Callable[..., None]:
    """Runs function(rank, *arguments) in processes of a server that has imported torch, once for all of them."""
    multiprocessing.set_forkserver_preload(["topk", "pytest"])

    def start(function: Callable[..., None], *arguments: Any, processes: int) -> None:
        torch.multiprocessing.start_processes(function, arguments, processes, start_method="forkserver")

    return start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20)


_array_types: dict[str, Any] = {}
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}


@functools.cache
def _constexprs(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """What a tensor of Triton's language keeps of its shape: its lengths, and their product."""
    core = sys.modules["triton.language.core"]
    return core.tuple([core.constexpr(length) for length in shape]), core.constexpr(math.prod(shape))


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter works out at every operation what stays the same: its language, types and shapes; here once.

    Nor does it look for integers that overflow, which it would tell only when debugging.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or os.environ.get("TRITON_INTERPRET") != "1":
        return
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    array_type, make_block_type, broadcast = (
        interpreter._get_np_dtype, core.block_type.__init__, semantic.broadcast_impl_value,
    )  # fmt: skip
    prepared: set[int] = set()

    def call(function: Any, *arguments: Any, **keywords: Any) -> Any:
        module = id(function.fn.__globals__)
        if module not in prepared:
            prepared.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **keywords)

    def known_array_type(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in _array_types:
            _array_types[name] = array_type(dtype)
        return _array_types[name]

    def make_known_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        lengths = (length.value if isinstance(length, core.constexpr) else length for length in shape)
        kind = (element_ty.name, *lengths)
        if kind not in _block_types:
            make_block_type(self, element_ty, shape)
            _block_types[kind] = self.__dict__
        self.__dict__ = dict(_block_types[kind])

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = _constexprs(tuple(type.shape.values) if type.is_block() else ())

    def broadcast_if_needed(self: Any, left: Any, right: Any) -> Any:
        blocks = left.type.is_block() and right.type.is_block()
        same = blocks and left.type.shape.values == right.type.shape.values
        return (left, right) if same else broadcast(self, left, right)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter, "_get_np_dtype", known_array_type)
    monkeypatch.setattr(core.block_type, "__init__", make_known_block_type)
    monkeypatch.setattr(core.tensor, "__init__", make_tensor)
    monkeypatch.setattr(semantic, "broadcast_impl_value", broadcast_if_needed)
    unchecked = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)


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
