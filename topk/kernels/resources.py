"""What the kernels take of a device: registers, spills and shared memory, as the compiler says with no device present.

`python -m topk.kernels.resources transition hinge` compiles what the examples of these losses launch and prints a line
of comma-separated values for each kernel; `--help` lists the choices.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from topk import kernels
from topk.kernels import common

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One call of `common.launch`."""

    function: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return str(self.function.__name__)


@dataclass(frozen=True)
class Described:
    """What the compiler asks of a tensor: its type, and whether it starts at a multiple of 16 bytes."""

    dtype: torch.dtype
    aligned: bool


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, and bytes spilled to local memory; per program: bytes of shared memory, and threads."""

    registers: int
    spilled: int
    shared: int
    threads: int


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Records what would be launched, and launches nothing."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Any, warps: int, **constants: Any) -> None:
        if programs > 0:
            launches.append(Launch(kernel, programs, arguments, constants, warps))

    with mock.patch.object(common, "launch", record):
        yield launches


def launches_of(name: str, classes: int, dtype: torch.dtype, rows: int = 64) -> list[Launch]:
    """The different launches, forward and backward, that the loss's examples make for such scores."""
    loss = kernels.of(name)
    scores = torch.zeros(rows, classes, dtype=dtype)
    target, grad = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    with recorded_launches() as launches:
        if name in kernels.OPERATORS:
            loss.trial(scores.float())
        for tensors, options in () if name in kernels.OPERATORS else loss.examples(rows, classes, scores.device):
            _, *saved = loss.forward(scores, target, options, -100, *tensors)
            loss.backward(grad, scores, target, options, -100, tuple(saved), *tensors)
    different = {(launch.kernel, str(specialised(launch)), launch.warps): launch for launch in launches}
    return list(different.values())


def machine_code(launch: Launch, capability: int) -> tuple[bytes, int]:
    """The launch compiled for a device of that capability (90 for 9.0), and the bytes of shared memory it takes."""
    source = ASTSource(launch.function, *specialised(launch))
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": launch.warps})
    return kernel.asm["cubin"], int(kernel.metadata.shared)


def compiled(launch: Launch, capability: int) -> Resources:
    """What that takes of the device."""
    cubin, shared = machine_code(launch, capability)
    usage = tool("cuobjdump", cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump shows neither registers nor the stack, where spilled ones go: {usage!r}")
    return Resources(int(found[1]), int(found[2]), shared, 32 * launch.warps)


def tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the programs that come with triton prints of machine code."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as at a launch: ones and None are constants, multiples of 16 known."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], Any] = {}
    for place, (name, value) in enumerate(zip(launch.function.arg_names, launch.arguments, strict=False)):
        unknown = launch.function.params[place].do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and not unknown):
            constants[name] = value
        elif isinstance(value, (Tensor, Described)):
            signature[name] = _POINTERS[value.dtype]
            if value.aligned if isinstance(value, Described) else value.data_ptr() % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not unknown:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return {name: signature.get(name, "constexpr") for name in launch.function.arg_names}, constants, attributes


_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = "loss,kernel,classes,type,capability,constants,registers,spilled,shared,threads"


def main() -> None:
    """The table, printed."""
    parser = argparse.ArgumentParser(prog="python -m topk.kernels.resources", description=__doc__)
    parser.add_argument("losses", nargs="*", default=kernels.NAMES + kernels.OPERATORS, help="all if none is named")
    parser.add_argument("--classes", nargs="+", type=int, default=[1000, 20000])
    parser.add_argument("--types", nargs="+", choices=_TYPES, default=["float32"])
    parser.add_argument("--capabilities", nargs="+", type=int, default=[90], help="90 for 9.0")
    chosen = parser.parse_args()
    print(COLUMNS)
    for loss in chosen.losses:
        for classes in chosen.classes:
            for dtype in chosen.types:
                for launch in launches_of(loss, classes, _TYPES[dtype]):
                    constants = " ".join(f"{k}={v}".replace(", ", "/") for k, v in launch.constants.items())
                    for capability in chosen.capabilities:
                        r = compiled(launch, capability)
                        line = (loss, launch.kernel, classes, dtype, capability, constants.replace(",", ""))
                        print(*line, r.registers, r.spilled, r.shared, r.threads, sep=",", flush=True)


if __name__ == "__main__":
    main()
