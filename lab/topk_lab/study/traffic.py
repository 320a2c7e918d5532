"""How many bytes a computation asks memory for, counted while it runs (chapter 11).

with eager_traffic() as calls: loss(x, y)       # every operation of torch, on any device
with kernel_traffic() as bytes_moved: ...       # every load and store of an interpreted Triton kernel
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WRITES_ONLY = ("zero_", "fill_", "copy_")
_PICKS = ("gather", "index", "index_select", "take", "embedding", "nll_loss_forward")  # read what they return


@dataclass(frozen=True)
class Call:
    """One operation: bytes it reads and writes, and the numbers it works out."""

    name: str
    read: int
    written: int
    results: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@contextlib.contextmanager
def eager_traffic() -> Iterator[list[Call]]:
    """Lists every operation that moves data. Views and fresh memory move none.

    An operation counts once, whatever it does inside: to count the steps of a loss's torch path, call its room in
    `topk.losses` directly and not the operation that it is registered as.
    """
    calls: list[Call] = []
    with _Watch(calls):
        yield calls


class _Watch(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        changes = function._schema.is_mutable
        moves = changes or any(tensor.untyped_storage().data_ptr() not in known for tensor in outputs)
        if outputs and moves and not name.startswith(("empty", "new_empty")):
            written = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
            read = _read(name, inputs, written)
            self._calls.append(Call(name, read, written, sum(tensor.numel() for tensor in outputs)))
        return result


def _read(name: str, inputs: list[Tensor], written: int) -> int:
    """Every input once, whole, but for operations that look at an input's shape alone, or at a few of its elements."""
    if name.endswith("_like") or name.startswith("new_"):
        return 0
    if name in _PICKS:
        return written + sum(_bytes(tensor) for tensor in inputs if not tensor.is_floating_point())
    if name in _WRITES_ONLY:
        inputs = inputs[1:]
    if name == "nll_loss_backward":
        inputs = [inputs[0], *inputs[2:]]
    return sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in inputs}.values())


def _bytes(tensor: Tensor) -> int:
    """What there is to read; an expanded tensor is no larger than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@dataclass
class Moved:
    """Bytes loaded and stored so far."""

    loaded: int = 0
    stored: int = 0

    @property
    def together(self) -> int:
        """Both."""
        return self.loaded + self.stored


@contextlib.contextmanager
def kernel_traffic() -> Iterator[Moved]:
    """Counts the bytes of every load and store that its mask lets through, while kernels run interpreted."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    moved = Moved()

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        moved.loaded += int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved.stored += int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
        return store(pointers, value, mask, *rest)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
    ):
        yield moved
