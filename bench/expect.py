"""`python -m bench expect`: what the kernels should take on a GPU, from their machine code, with no GPU present.

The compiler's machine code says how many instructions a warp issues, loop by loop and branch by branch; how often each
runs is counted while the same kernel is interpreted on a few rows of normal scores. An instruction belongs to the line
it was compiled from, through all calls, so that both counts meet. Then, per launch,

    time = max(bytes / bandwidth, busiest pipe's cycles / EFFICIENCY) / share of the device that has work,

where pipes are those of Hopper: per cycle and multiprocessor 128 threads issue, of which 64 may compare, shift, select
or add integers, 64 multiply integers (32 where the product has 64 bits), 32 use shared memory or shuffle, 16 compute
exp, log or a warp's reduction, 64 compute in float64.
"""

from __future__ import annotations

import ast
import csv
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.contenders import TYPES, Setting
from bench.trips import KERNELS, Traced, statement
from topk.kernels import resources

EFFICIENCY = 0.75
"""The share of its cycles in which the busiest pipe works: an assumption, until a device has been measured."""


@dataclass(frozen=True)
class Device:
    """What bounds a kernel: multiprocessors, cycles a second, and bytes a second that a plain copy moves."""

    name: str
    processors: int
    clock: float
    bandwidth: float


DEVICES = (Device("H100", 132, 1.755e9, 3.0e12), Device("H200", 132, 1.755e9, 4.3e12))
_THREADS = {"issue": 128, "compare": 64, "multiply": 64, "memory": 32, "special": 16, "double": 64}
"""Threads a cycle and multiprocessor, by pipe."""

_SPECIAL = re.compile(r"MUFU|F2I|I2F|F2F|REDUX|POPC|FLO|BREV")
_MEMORY = re.compile(r"SHFL|LD|ST|ATOM|BAR")
_DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)")
_MULTIPLY = re.compile(r"IMAD|IDP")
_WIDE = re.compile(r"IMAD\.(WIDE|HI)")
_FAST = re.compile(r"F(ADD|MUL|FMA|SWZ)|HFMA2|NOP|BRA|EXIT|BSSY|BSYNC|WARPSYNC|U")


@dataclass(frozen=True)
class Expected:
    """Of one launch: programs, what each takes, a thread's instructions by pipe and in all, and bytes moved."""

    kernel: str
    programs: float
    taken: resources.Resources
    instructions: dict[str, float]
    bytes_moved: float

    @property
    def resident(self) -> int:
        """Warps on a multiprocessor of Hopper at once."""
        warps = self.taken.threads // 32
        by_registers = 65536 // (32 * -(-self.taken.registers // 8) * 8 * warps)
        by_memory = (227 * 1024) // (self.taken.shared + 1024)
        return warps * min(64 // warps, by_registers, by_memory, 32)

    def seconds(self, device: Device) -> float:
        """The formula of this module."""
        busy = min(1.0, self.programs / device.processors)
        cycles = max(
            self.programs * self.taken.threads * count / _THREADS[pipe] for pipe, count in self.instructions.items()
        )
        issued = cycles / (EFFICIENCY * device.processors * device.clock * busy)
        return max(issued, self.bytes_moved / device.bandwidth)


def settings() -> list[Setting]:
    """What the goals are about, and longer rows."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("transition", {"k": 5}),
        ("hinge", {"k": 5}),
        ("smooth", {"k": 5}),
        ("smooth", {"k": 50}),
        ("noised", {"k": 5, "samples": 10}),
        ("differentiable", {"k": 5}),
    ]
    sizes = ((65536, 1000), (2048, 32_000), (655, 100_000))
    usual = [Setting(family, batch, n, **options) for batch, n in sizes for family, options in kinds]
    return [*usual, Setting("transition", 64, 1_000_000, 5)]


COLUMNS = (
    "family", "batch", "classes", "k", "samples", "dtype", "kernel",
    "instructions_an_element", "compare_an_element", "registers", "spilled", "warps_resident", "bytes_an_element",
    *(f"{device.name}_floors" for device in DEVICES),
)  # fmt: skip


def report(chosen: Iterable[Setting], stream: TextIO) -> None:
    """A line of comma-separated values a kernel, and one for all of a setting: in multiples of 3 N bytes' time."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for setting in chosen:
        size = setting.batch * setting.classes
        about = (setting.family, setting.batch, setting.classes, setting.k, setting.samples, setting.dtype)
        floor = 3 * size * TYPES[setting.dtype].itemsize
        found = expected(setting)
        for one in found:
            threads = one.programs * one.taken.threads / size
            writer.writerow((
                *about, one.kernel, f"{threads * one.instructions['issue']:.1f}",
                f"{threads * one.instructions['compare']:.1f}", one.taken.registers, one.taken.spilled, one.resident,
                f"{one.bytes_moved / size:.2f}",
                *(f"{one.seconds(device) * device.bandwidth / floor:.2f}" for device in DEVICES),
            ))  # fmt: skip
        floors = [sum(one.seconds(device) for one in found) * device.bandwidth / floor for device in DEVICES]
        moved = sum(one.bytes_moved for one in found) / size
        writer.writerow((*about, "together", "", "", "", "", "", f"{moved:.2f}", *(f"{f:.2f}" for f in floors)))
        stream.flush()


def expected(setting: Setting, capability: int = 90) -> list[Expected]:
    """Every launch of forward and backward."""
    rows = min(setting.batch, 16 if setting.classes <= 128 else 3 if setting.classes <= 8192 else 1)
    return [_expected(launch, setting.batch, rows, capability) for launch in traced(setting, rows)]


def traced(setting: Setting, rows: int) -> list[Traced]:
    """The launches for that many rows, run by the interpreter in a process of its own."""
    described = (setting.family, setting.batch, setting.classes, setting.k, setting.samples, setting.dtype, rows)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.trips", *map(str, described)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"interpreting {setting.label()} failed: {done.stderr[-2000:]}")
    return [Traced(**launch) for launch in json.loads(done.stdout.splitlines()[-1])]


def _expected(launch: Traced, batch: int, rows: int, capability: int) -> Expected:
    cubin, _ = resources.machine_code(described(launch), capability)
    taken = resources.compiled(described(launch), capability)
    lines = Lines(launch)
    counts = dict.fromkeys(_THREADS, 0.0)
    for name, weight in weighted(instructions(cubin), lines):
        counts["issue"] += weight
        pipe = _pipe(name)
        if pipe is not None:
            counts[pipe] += 2 * weight if _WIDE.match(name) else weight
    moved = batch / rows * (launch.loaded + launch.stored)
    together = launch.constants.get("ROWS", 1)
    programs = launch.programs // -(-rows // together) * -(-batch // together)
    return Expected(launch.kernel, programs, taken, counts, moved)


def _pipe(name: str) -> str | None:
    """The pipe that bounds such an instruction, besides issue; FFMA and its like are bound by issue alone."""
    for pattern, pipe in (
        (_DOUBLE, "double"), (_SPECIAL, "special"), (_FAST, None), (_MULTIPLY, "multiply"), (_MEMORY, "memory")
    ):  # fmt: skip
        if pattern.match(name):
            return pipe
    return "compare"


# --- machine code ----------------------------------------------------------------------------------------------------


def described(launch: Traced) -> resources.Launch:
    """A traced launch as the compiler takes it."""
    function = getattr(importlib.import_module(launch.module), launch.kernel)
    arguments = tuple(
        resources.Described(getattr(torch, a["dtype"].removeprefix("torch.")), a["aligned"])
        if isinstance(a, dict)
        else a
        for a in launch.arguments
    )
    constants = {name: tuple(v) if isinstance(v, list) else v for name, v in launch.constants.items()}
    return resources.Launch(function, launch.programs, arguments, constants, launch.warps)


@dataclass(frozen=True)
class Instruction:
    """Its name, the lines of `topk.kernels` it comes from, innermost first, and where it jumps back to, if it does."""

    name: str
    chain: tuple[str, ...]
    back_to: int | None


def instructions(cubin: bytes) -> list[Instruction]:
    """The machine code in its order, without what only runs when a warp's threads have come apart."""
    found: list[tuple[str, tuple[str, ...], str | None]] = []
    labels: dict[str, int] = {}
    chain: list[str] = []
    fresh, ended = True, False
    for line in resources.tool("nvdisasm", cubin, "-c", "-g", "-gi").splitlines():
        if told := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
            chain, fresh = ([] if fresh else chain), False
            if os.path.dirname(told[1]).endswith("topk/kernels"):  # of this checkout or, from Triton's cache, another
                chain.append(statement(told[1], int(told[2])))
        elif told := re.match(r"\s*(\.L_x_\d+):", line):
            labels[told[1]] = len(found)
        elif told := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+ )?\s*(.*?);", line):
            fresh = True
            if ended and "WARPSYNC.COLLECTIVE" in told[2]:
                break
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", told[2])
            found.append((told[2].split()[0], tuple(chain), jump[1] if jump else None))
            ended = ended or (told[2].startswith("EXIT") and told[1] is None)
    result = []
    for place, (name, lines, label) in enumerate(found):
        target = labels.get(label, place + 1) if label else place + 1
        result.append(Instruction(name, lines, target if target < place else None))
    return result


# --- how often each instruction runs ---------------------------------------------------------------------------------


class Lines:
    """How often lines ran in one launch, and what follows for the loops and branches around them."""

    def __init__(self, launch: Traced) -> None:
        self._counts = launch.counts

    def trips(self, chain: tuple[str, ...]) -> float | None:
        """How many times a loop's body runs whenever the loop is met; None where the line is not a loop."""
        loop = _statements(chain[0].split(":")[0]).loops.get(int(chain[0].split(":")[1])) if chain else None
        if loop is None:
            return None
        asked, ran = self._count(chain), self._count(_at(chain, loop))
        return ran / max(1, asked - ran)

    def share(self, chain: tuple[str, ...]) -> float:
        """The share of times that the branches around a line are taken."""
        share = 1.0
        for level in range(len(chain)):
            file, line = chain[level].split(":")
            for asked, first in _statements(file).branches_around(int(line)):
                met = self._count(_at(chain[level:], asked))
                share *= min(1.0, self._count(_at(chain[level:], first)) / met) if met else 1.0
        return share

    def _count(self, chain: tuple[str, ...]) -> int:
        return self._counts.get(" ".join(chain), 0)


def _at(chain: tuple[str, ...], line: int) -> tuple[str, ...]:
    """The chain with another line in the innermost function."""
    return (f"{chain[0].split(':')[0]}:{line}", *chain[1:])


def weighted(code: list[Instruction], lines: Lines) -> Iterator[tuple[str, float]]:
    """Every instruction's name and how often a warp issues it."""
    loops = [(one.back_to, place, one.chain) for place, one in enumerate(code) if one.back_to is not None]
    trips = [
        (first, last, _unrolled(last - first, [b - a for a, b, same in loops if same == chain], found))
        for first, last, chain in loops
        if (found := lines.trips(chain)) is not None
    ]
    share = functools.cache(lines.share)
    for place, one in enumerate(code):
        weight = share(one.chain)
        for first, last, times in trips:
            if first <= place <= last:
                weight *= times
        yield one.name, weight


def _unrolled(size: int, sizes: list[int], trips: float) -> float:
    """The trips of one of two loops that the compiler made of one, the larger with its body several times."""
    copies = round(max(sizes) / min(sizes)) if len(sizes) == 2 else 1
    return trips if copies == 1 else trips // copies if size == max(sizes) else trips % copies


@dataclass(frozen=True)
class _Statements:
    """Of one file: loops, as line and first line of the body; branches, as line, first and last line of a side."""

    loops: dict[int, int]
    branches: list[tuple[int, int, int]]

    def branches_around(self, line: int) -> Iterator[tuple[int, int]]:
        """The line of the condition and the first line of the side that a line is in."""
        return ((asked, first) for asked, first, last in self.branches if first <= line <= last)


@functools.cache
def _statements(file: str) -> _Statements:
    loops: dict[int, int] = {}
    branches = []
    for node in ast.walk(ast.parse(Path(KERNELS, file).read_text())):
        if isinstance(node, (ast.For, ast.While)):
            loops[node.lineno] = node.body[0].lineno
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "_INTERPRETED":  # counted on its other side
            for side in (node.body, node.orelse):
                if side:
                    branches.append((node.lineno, side[0].lineno, side[-1].end_lineno or side[-1].lineno))
    return _Statements(loops, branches)


def main(arguments: list[str]) -> Any:
    """The table of `settings`, or of those families that are named."""
    chosen = [s for s in settings() if not arguments or s.family in arguments or str(s.classes) in arguments]
    report(chosen, sys.stdout)
