"""What kernels cost, counted where no GPU is: passes over a tile, instructions, registers and the compiler's time."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench import expect
from bench.trips import Traced, counted_lines
from topk import topk_hinge_loss
from topk.kernels import common
from topk.kernels.resources import Resources

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a kernel masks afterwards


def _passes(scores: torch.Tensor, target: torch.Tensor) -> int:
    """How often the best of every group are looked for, in the forward pass of a row."""
    lines, first = inspect.getsourcelines(common._best_of_groups.fn)
    line = first + next(i for i, text in enumerate(lines) if "best = scores == tops" in text)
    with counted_lines() as counts:
        topk_hinge_loss(scores, target, 5, backend="triton")
    return sum(count for chain, count in counts.items() if chain[0] == f"common.py:{line}")


@pytest.mark.parametrize("classes", [1000, 20_000])
def test_hard_rows_take_few_passes(classes: int) -> None:
    """All tied, hardly a possible class, and ignored: what padding and fresh heads are made of."""
    tied = torch.zeros(1, classes)
    masked = torch.full((1, classes), -torch.inf)
    masked[0, 17] = 1.0
    target = torch.tensor([17])
    tiles = -(-classes // common.whole_rows(classes).block)
    assert _passes(torch.randn(1, classes), target) <= 3 + 2 * tiles
    assert _passes(tied, target) <= 5 + tiles
    assert _passes(masked, target) <= 5 + tiles
    assert _passes(tied, torch.tensor([-100])) <= 5 + tiles


# --- compiled --------------------------------------------------------------------------------------------------------

_COMPILES = """
import collections, json, os, sys
from bench import expect
from bench.contenders import Setting
from topk.kernels import resources
os.environ["PYTHONPATH"] = "lab"  # what another triton compiles is interpreted by the one installed
family, classes, k = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for launch in expect.traced(Setting(family, 1, classes, k, samples=5), 1):
    described = expect.described(launch)
    names = collections.Counter(one.name for one in expect.instructions(resources.machine_code(described, 90)[0]))
    registers = resources.compiled(described, 90).registers
    print(json.dumps({"kernel": launch.kernel, "registers": registers, "names": names}))
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def _compiled(triton: str | None, *words: str) -> dict[str, dict[str, Any]]:
    """By kernel: registers, and how many instructions of each name."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [triton, "lab"]))}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILES, *words], capture_output=True, text=True, env={**ENVIRONMENT, **path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["kernel"]: row for row in map(json.loads, done.stdout.splitlines())}


_OTHER = os.environ.get("OTHER_TRITON")  # a folder that holds another triton, say 3.6.0: `pip install --target`
VERSIONS = [
    None,
    pytest.param(_OTHER, marks=pytest.mark.skipif(_OTHER is None, reason="OTHER_TRITON names no folder")),
]


@pytest.mark.slow
@pytest.mark.parametrize("triton", VERSIONS, ids=["installed", "other"])
@pytest.mark.parametrize(
    ("family", "kernel", "shuffles", "registers", "instructions"),
    [("transition", "_forward", 60, 168, 1600), ("noised", "_forward", 150, 168, 3600)],
)
def test_threads_hold_neighbouring_scores(
    family: str, kernel: str, shuffles: int, registers: int, instructions: int, triton: str | None
) -> None:
    """In another layout a group is spread over threads: five times the shuffles, and loads of scattered scores."""
    found = _compiled(triton, family, "1000", "5")[kernel]
    names = found["names"]
    assert sum(count for name, count in names.items() if name.startswith("SHFL")) <= shuffles
    assert sum(names.values()) <= instructions
    assert found["registers"] <= registers
    if family == "transition":
        assert any(name.startswith("LDG.E.128") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smooth", "differentiable"])
def test_compiling_takes_seconds(name: str, tmp_path: Any) -> None:
    """Ten ks, and 32 scores sorted: what once took two minutes each."""
    script = f"""
import json, resource, torch
from topk.kernels import of, resources
kernels, scores, target = of({name!r}), torch.zeros(64, 1000), torch.zeros(64, dtype=torch.int64)
options = kernels.Options(list(range(1, 11)), [0.1] * 10, 1.0, 1.0)
if {name!r} == "differentiable":
    options = kernels.Options([5], [1.0], kept=32, slopes=True)
with resources.recorded_launches() as launches:
    _, *saved = kernels.forward(scores, target, options, -100)
    kernels.backward(torch.ones(64), scores, target, options, -100, tuple(saved))
for launch in launches:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    resources.compiled(launch, 90)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_utime + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    print(json.dumps([launch.kernel, after - before]))
"""
    environment = {**ENVIRONMENT, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.splitlines():
        kernel, seconds = json.loads(line)
        assert seconds < 25, (kernel, seconds)


# --- the expectation itself ------------------------------------------------------------------------------------------


def _launch(counts: dict[str, int]) -> Traced:
    return Traced("", "", 1, 1, {}, [], counts)


def test_trips_and_branches_are_those_that_were_counted() -> None:
    """A loop is met once for every time its condition is found false."""
    lines, first = inspect.getsourcelines(common.insert.fn)
    loop = first + next(i for i, text in enumerate(lines) if text.strip().startswith("while"))
    told = expect.Lines(_launch({f"common.py:{loop}": 14, f"common.py:{loop + 1}": 10}))
    assert told.trips((f"common.py:{loop}",)) == 2.5  # ten rounds of four loops
    assert told.trips((f"common.py:{first + 2}",)) is None
    lines, first = inspect.getsourcelines(common.take.fn)
    branch = first + next(i for i, text in enumerate(lines) if text.strip() == "if open:")
    told = expect.Lines(_launch({f"common.py:{branch}": 8, f"common.py:{branch + 1}": 2}))
    assert told.share((f"common.py:{branch + 2}",)) == 0.25


def test_instructions_are_weighted_by_the_loops_around_them() -> None:
    lines, first = inspect.getsourcelines(common.insert.fn)
    loop = f"common.py:{first + next(i for i, text in enumerate(lines) if text.strip().startswith('while'))}"
    inside = f"common.py:{int(loop.split(':')[1]) + 1}"
    code = [
        expect.Instruction("FADD", (), None),
        expect.Instruction("FMUL", (inside,), None),
        expect.Instruction("BRA", (loop,), 1),
        expect.Instruction("EXIT", (), None),
    ]
    weights = list(expect.weighted(code, expect.Lines(_launch({loop: 4, inside: 3}))))
    assert weights == [("FADD", 1.0), ("FMUL", 3.0), ("BRA", 3.0), ("EXIT", 1.0)]


def test_instructions_belong_to_pipes() -> None:
    """On Hopper a product of integers is the business of the floating point pipe, not of the one that compares."""
    names = ("IMAD.WIDE.U32", "IMAD.MOV.U32", "LOP3.LUT", "FMNMX", "FFMA", "SHFL.BFLY", "MUFU.EX2", "DFMA")
    pipes = ["multiply", "multiply", "compare", "compare", None, "memory", "special", "double"]
    assert [expect._pipe(name) for name in names] == pipes


def test_a_memory_bound_kernel_takes_its_bytes_time() -> None:
    device = expect.Device("", 100, 1e9, 1e12)
    idle = dict.fromkeys(expect._THREADS, 0.0)
    copy = expect.Expected("copy", 1e6, Resources(32, 0, 0, 32), {**idle, "issue": 1.0}, 1e12)
    assert copy.seconds(device) == 1.0
    assert copy.resident == 32
    counting = expect.Expected(
        "counting", 1e6, Resources(32, 0, 0, 128), {**idle, "issue": 100.0, "compare": 100.0}, 1.0
    )
    assert counting.seconds(device) == pytest.approx(1e6 * 128 * 100 / 64 / (100 * 1e9) / expect.EFFICIENCY)


def test_what_only_a_device_runs_is_counted() -> None:
    """The interpreter takes the other side of such a branch, which no machine code has."""
    lines = inspect.getsource(common).splitlines()
    asked = [lines[line - 1].strip() for line, _, _ in expect._statements("common.py").branches]
    assert "if STREAMS:" in asked
    assert "    if _INTERPRETED:" in lines
    assert "if _INTERPRETED:" not in asked
