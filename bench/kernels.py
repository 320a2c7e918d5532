"""What the kernels of a call take of the device, as the compiler told when it made them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from topk.kernels import common


@contextmanager
def watched_launches() -> Iterator[list[str]]:
    """Everything is launched as ever; the list tells each kernel's registers and spills a thread."""
    told: list[str] = []
    launch = common.launch

    def watched(kernel: Any, *arguments: Any, **options: Any) -> None:
        launch(_Watched(kernel, told), *arguments, **options)

    with mock.patch.object(common, "launch", watched):
        yield told


class _Watched:
    """A kernel that keeps what a launch returns: the compiled kernel."""

    def __init__(self, kernel: Any, told: list[str]) -> None:
        self._kernel, self._told = kernel, told

    def __getitem__(self, grid: Any) -> Any:
        run = self._kernel[grid]

        def call(*arguments: Any, **options: Any) -> Any:
            compiled = run(*arguments, **options)
            registers, spilled = getattr(compiled, "n_regs", None), getattr(compiled, "n_spills", None)
            if registers is not None:  # an interpreted kernel has none
                name = self._kernel.__name__.strip("_")
                self._told.append(f"{name}: {registers} registers, {spilled} spilled")
            return compiled

        return call
