"""How often every line of a kernel runs: kernels interpreted on the CPU, and watched line by line.

`python -m bench.trips FAMILY BATCH ...` is what `bench.expect` starts, since a process either interprets kernels or
compiles them: it prints the launches of a forward and a backward pass and, of each, the counts and the bytes moved.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.contenders import Setting, _ours
from topk.kernels import common, parts
from topk_lab.study.traffic import kernel_traffic

KERNELS = os.path.dirname(common.__file__)

Chain = tuple[str, ...]
"""Where a line is: "file:line" of the line itself, then of the calls that led to it, out to the kernel."""


@dataclass
class Traced:
    """One launch: what identifies the compiled kernel, the programs run, how often each line ran, and bytes moved."""

    module: str
    kernel: str
    programs: int
    warps: int
    constants: dict[str, Any]
    arguments: list[Any]  # numbers, None, or the type of a tensor and whether it starts at a multiple of 16 bytes
    counts: dict[str, int] = field(default_factory=dict)
    loaded: int = 0
    stored: int = 0


def halving(self: Any, tensors: Any) -> Any:
    """The interpreter's reduction for a function of one's own, by halves; its own takes a step for every element."""
    tensors, axis = self.unravel(tensors, self.axis)
    dtypes = [tensor.dtype for tensor in tensors]
    parts = [np.moveaxis(tensor.handle.data, axis, 0) for tensor in tensors]
    while len(parts[0]) > 1:
        left = [self.to_tensor(part[0::2], dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        right = [self.to_tensor(part[1::2], dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        results = self.combine_fn.fn(*left, *right)
        parts = [result.handle.data for result in (results if isinstance(results, tuple) else (results,))]
    return tuple(self.to_tensor(part[0], dtype) for part, dtype in zip(parts, dtypes, strict=True))


@functools.cache
def statements(file: str) -> dict[int, int]:
    """Of one file of `topk.kernels`: for every line the first line of the statement, or of a loop's head, it is in."""
    first: dict[int, int] = {}
    for node in ast.walk(ast.parse(Path(KERNELS, file).read_text())):
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            first.update(dict.fromkeys(range(node.lineno, max(node.lineno, last) + 1), node.lineno))
    return first


def statement(path: str, line: int) -> str:
    """How counts and machine code name the statement at a line."""
    file = os.path.basename(path)
    return f"{file}:{statements(file).get(line, line)}"


@contextlib.contextmanager
def counted_lines() -> Iterator[Counter[Chain]]:
    """Counts the statements of `topk.kernels` that run while kernels are interpreted."""
    counts: Counter[Chain] = Counter()

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(KERNELS):
            return None
        before: Chain = ()

        def count(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            if event == "line" and (chain := _chain(frame)) != before:  # the lines of one statement count once
                before = chain
                if chain:  # none while the host prepares a launch
                    counts[chain] += 1
            return count

        return count

    tracing = sys.gettrace()
    sys.settrace(watch)
    try:
        yield counts
    finally:
        sys.settrace(tracing)


def _chain(frame: FrameType | None) -> Chain:
    chain = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(KERNELS):
            if frame.f_code.co_name == "launch":
                break
            chain.append(statement(frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(chain)


@contextlib.contextmanager
def traced_launches() -> Iterator[list[Traced]]:
    """Everything is launched as ever, interpreted, and what happened is listed."""
    from triton.runtime import interpreter

    traced: list[Traced] = []
    launch = common.launch

    def watched(kernel: Any, programs: int, *arguments: Any, warps: int, **constants: Any) -> None:
        described = [
            {"dtype": str(a.dtype), "aligned": a.data_ptr() % 16 == 0} if isinstance(a, Tensor) else a
            for a in arguments
        ]
        found = Traced(kernel.fn.__module__, kernel.fn.__name__, programs, warps, constants, described)
        with counted_lines() as counts, kernel_traffic() as moved:
            launch(kernel, programs, *arguments, warps=warps, **constants)
        found.counts = {" ".join(chain): count for chain, count in counts.items()}
        found.loaded, found.stored = moved.loaded, moved.stored
        traced.append(found)

    with (
        mock.patch.object(common, "launch", watched),
        mock.patch.object(interpreter.ReduceOps, "generic_reduce", halving),
    ):
        yield traced


def main() -> None:
    """Prints the launches of a setting, of as many rows as its last argument says, split as those of the batch."""
    family, batch, classes, k, samples, dtype, rows = sys.argv[1:]
    setting = Setting(family, int(batch), int(classes), int(k), samples=int(samples), dtype=dtype)
    scores, target = setting.problem(int(rows))
    parts.PROGRAMS = parts.PROGRAMS * int(rows) // setting.batch  # the device's share of these rows
    torch.manual_seed(0)  # for the losses that draw
    with traced_launches() as traced, np.errstate(all="ignore"):
        loss = _ours(setting, "triton")(scores.requires_grad_(), target)
        torch.autograd.grad(loss, scores)
    print(json.dumps([asdict(launch) for launch in traced]))


if __name__ == "__main__":
    main()
