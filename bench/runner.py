"""Times all contenders of a setting in turn, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import csv
import datetime
import functools
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import topk
from bench.contenders import Contender, LossCall, Setting, contenders
from bench.memory import peak_temporaries

RESULTS = Path(__file__).parent / "results"
ROUNDS = (5, 40)  # at least and at most
SECONDS = 3.0  # of timing a setting, between those
CELL = ("suite", *Setting.__dataclass_fields__)
COLUMNS = (
    *CELL,
    "contender",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "min_ms",
    "times_cross_entropy",
    "peak_bytes",
    "score_bytes",
    "rounds",
    "load",
    "threads",
    "device",
    "dtype",
    "torch",
    "topk",
    "python",
    "commit",
    "date",
)


def machine() -> str:
    """A folder name for this machine: its processor and the threads torch uses."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        model = found.group(1) if found else model
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {torch.get_num_threads()} threads".lower()).strip("-")


def commit() -> str:
    """The commit measured, marked when the code differs from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        name = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "../topk", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+changes" if changed else "")


def run_suite(name: str, settings: list[Setting], folder: Path | None = None, fresh: bool = False) -> Path:
    """Measures what has no row yet and returns the CSV's path; killed at any moment, the next run goes on."""
    path = (folder or RESULTS) / machine() / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        path.unlink(missing_ok=True)
    done = {tuple(row[column] for column in CELL) for row in read(path)}
    common = {
        "suite": name,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "dtype": "float32",
        "torch": torch.__version__,
        "topk": topk.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    busy = os.getloadavg()[0]
    if busy > 0.5:
        tqdm.write(f"The machine is busy (load {busy:.1f} before the first measurement): expect inflated times.")
    bar = tqdm(settings, unit="setting")
    for setting in bar:
        bar.set_description(setting.label())
        cell = {"suite": name, **asdict(setting)}
        if tuple(str(cell[column]) for column in CELL) not in done:
            _append(path, [{**common, **cell, **row} for row in measure(setting)])
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the whole file anew beside the old one and swaps: a kill leaves the old file."""
    together = [*read(path), *rows]
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with beside.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(together)
    beside.replace(path)


def measure(setting: Setting) -> list[dict[str, Any]]:
    """One row a contender: forward and backward, each contender once a round, every other round in reverse order."""
    present = contenders(setting)
    for contender in present:
        contender.gate(setting)
    scores, target = setting.problem(setting.batch, setting.classes)
    scores.requires_grad_()
    calls = {contender: contender.build(setting, setting.classes) for contender in present}
    for call in calls.values():
        _once(call, scores, target)
    times: dict[Contender, list[float]] = {contender: [] for contender in present}
    for order in _rounds(present):
        for contender in order:
            times[contender].append(_once(calls[contender], scores, target))
    base = sorted(times[present[0]])[len(times[present[0]]) // 2]
    return [
        {
            "contender": contender.name,
            **_quantiles(times[contender]),
            "times_cross_entropy": f"{sorted(times[contender])[len(times[contender]) // 2] / base:.3f}",
            "peak_bytes": peak_temporaries(functools.partial(_gradient, calls[contender], scores, target)),
            "score_bytes": scores.numel() * scores.element_size(),
            "rounds": len(times[contender]),
            "load": f"{os.getloadavg()[0]:.1f}",
        }
        for contender in present
    ]


def _rounds(present: list[Contender]) -> Iterator[list[Contender]]:
    start = time.perf_counter()
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() - start > SECONDS:
            return
        yield present if number % 2 == 0 else present[::-1]


def _gradient(call: LossCall, scores: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(call(scores, target), scores)[0]


def _once(call: LossCall, scores: Tensor, target: Tensor) -> float:
    start = time.perf_counter()
    _gradient(call, scores, target)
    return 1e3 * (time.perf_counter() - start)


def _quantiles(values: list[float]) -> dict[str, str]:
    ranked = sorted(values)
    quantiles = {f"p{p}_ms": ranked[min(len(ranked) - 1, p * len(ranked) // 100)] for p in (20, 50, 80)}
    return {name: f"{value:.4f}" for name, value in {**quantiles, "min_ms": ranked[0]}.items()}
