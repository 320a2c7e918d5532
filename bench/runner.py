"""Measures all contenders of a setting in turns and writes a row each, setting by setting."""

from __future__ import annotations

import contextlib
import csv
import datetime
import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import topk
from bench.contenders import CROSS_ENTROPY, Contender, Setting, contenders
from bench.suites import Suite
from topk_lab.study.timing import (
    Clock,
    CpuClock,
    NoReplayError,
    Work,
    clock_of,
    first_line,
    gigabytes_per_second,
    in_turns,
    quantiles,
)

RESULTS = Path(__file__).parent / "results"
CELL = ("suite", *Setting.__dataclass_fields__)
_LAYER_ROUNDS = (3, 40)  # a call may take ten seconds
_TIMES = ("p20_ms", "p50_ms", "p80_ms", "min_ms", "times_cross_entropy", "gbps")
COLUMNS = (
    *CELL,
    "contender",
    *_TIMES,
    *(f"warm_{name}" for name in _TIMES),
    *(f"graph_{name}" for name in _TIMES),
    "graph_note",
    "peak_bytes",
    "score_bytes",
    "rounds",
    "kernels",
    "note",
    "load",
    "threads",
    "device",
    "processor",
    "driver",
    "torch",
    "triton",
    "topk",
    "python",
    "commit",
    "date",
)


def machine(clock: Clock) -> str:
    """A folder name for what is measured: the GPU, or the processor and the threads torch uses."""
    processor = clock.facts()["processor"]
    name = processor if clock.device.type == "cuda" else f"{processor} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit measured, marked when the code differs from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        name = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "../topk/*.py", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+changes" if changed else "")


def run_suite(
    name: str,
    suite: Suite,
    folder: Path | None = None,
    *,
    device: str | None = None,
    fresh: bool = False,
    minutes: float | None = None,
    measured_commit: str | None = None,
) -> Path:
    """Measures what has no row yet and returns the CSV's path; killed at any moment, the next run goes on."""
    clock = clock_of(device or suite.device)
    path = (folder or RESULTS) / machine(clock) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        path.unlink(missing_ok=True)
    rows = read(path)
    done = {_cell(row) for row in rows if not row["note"]} - {
        _cell(row) for row in rows if _is_ours(row) and row["note"]
    }
    tried = {_cell(row) for row in rows} - done  # a broken context may have spoilt these: again, after all others
    common = {
        "suite": name,
        "threads": torch.get_num_threads(),
        "device": clock.device.type,
        **clock.facts(),
        "torch": torch.__version__,
        "topk": topk.__version__,
        "python": platform.python_version(),
        "commit": measured_commit or commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    if (busy := _load()) > 0.5 and clock.device.type == "cpu":
        tqdm.write(f"The machine is busy (load {busy:.1f} before the first measurement): expect inflated times.")
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    cells = [(setting, {"suite": name, **asdict(setting)}) for setting in suite.settings()]
    cells = [(setting, cell) for setting, cell in cells if _cell(cell) not in done]
    bar = tqdm(sorted(cells, key=lambda pair: _cell(pair[1]) in tried), unit="setting")
    for setting, cell in bar:
        bar.set_description(setting.label())
        if time.monotonic() > end:
            tqdm.write(f"{minutes:g} minutes are over; the same command goes on from here.")
            break
        rows = measure(setting, clock, suite.seconds, suite.compiles(setting))
        for row in rows:
            if row["note"]:
                tqdm.write(f"{setting.label()}: {row['contender']} has no time: {row['note']}")
        _append(path, [{**common, **cell, **row} for row in rows])
    return path


def _cell(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in CELL)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file. Columns that an older record does not have are empty."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        older = {"features": "0"}  # of records without that column
        return [
            {column: row.get(column) or older.get(column, "") for column in COLUMNS} for row in csv.DictReader(stream)
        ]


def timed(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with a time; a contender that was wrong or failed has a note in its place."""
    return [row for row in rows if row["p50_ms"]]


def wrong(path: Path) -> list[dict[str, str]]:
    """The rows of our own contenders that have no time."""
    return [row for row in read(path) if row["note"] and _is_ours(row)]


def _is_ours(row: dict[str, str]) -> bool:
    return row["contender"].startswith("topk ")


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the whole file anew beside the old one, rows of other settings kept, and swaps: a kill leaves the old."""
    anew = {_cell(row) for row in rows}
    together = [*(row for row in read(path) if _cell(row) not in anew), *rows]
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    with beside.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(together)
    beside.replace(path)


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def measure(setting: Setting, clock: Clock, seconds: float = 3.0, compiled: bool = False) -> list[dict[str, Any]]:
    """One row a contender: times and memory of forward and backward, or a note that says why there are none."""
    if compiled:
        torch._dynamo.reset()
    scores, target = setting.problem(setting.batch, clock.device)
    scores.requires_grad_()
    works: dict[str, Work] = {}
    notes: dict[str, str] = {}
    told: dict[str, str] = {}
    present = contenders(setting, clock.device, compiled)
    for contender in present:
        try:
            contender.gate(setting, clock.device)
            work = contender.work(setting, scores, target)
            told[contender.name] = _first_call(contender, work)
            works[contender.name] = work
        except AssertionError as error:
            notes[contender.name] = str(error) or "an assertion of its own failed"
        except Exception as error:  # a peer's limits, or the device's memory
            notes[contender.name] = f"{type(error).__name__}: {first_line(error)}"
            _tidy(clock)
    size = setting.batch * setting.classes * scores.element_size()
    eager = _layer_times(clock, works, seconds) if setting.features else in_turns(clock, works, seconds)
    in_caches = clock.device.type == "cpu" and not setting.features
    warm = in_turns(CpuClock(warm=True), works, seconds) if in_caches else {}
    peaks = {name: clock.peak(work) for name, work in works.items()}
    replays, why_not = _captured(clock, works)
    graphs = in_turns(clock, replays, seconds)
    replays.clear()
    return [
        {
            "contender": contender.name,
            **_times(eager, contender, size),
            **{f"warm_{name}": value for name, value in _times(warm, contender, size).items()},
            **{f"graph_{name}": value for name, value in _times(graphs, contender, size).items()},
            "graph_note": why_not.get(contender.name, ""),
            "peak_bytes": peaks.get(contender.name, ""),
            "score_bytes": size,
            "rounds": len(eager.get(contender.name, ())),
            "kernels": told.get(contender.name, ""),
            "note": notes.get(contender.name, ""),
            "load": f"{_load():.1f}",
        }
        for contender in present
    ]


def _layer_times(clock: Clock, works: dict[str, Work], seconds: float) -> dict[str, list[float]]:
    """Calls of seconds, during which any machine does other things too: with one thread, the process's own time."""
    if clock.device.type == "cpu" and torch.get_num_threads() == 1:
        clock = CpuClock(timer=time.process_time)
    return in_turns(clock, works, seconds, _LAYER_ROUNDS)


def _first_call(contender: Contender, work: Work) -> str:
    """Calls twice, which compiles what is compiled; of Triton kernels it returns registers and spills."""
    if "triton" not in contender.needs:
        for _ in range(1 if contender.layer else 2):  # a layer's call may take ten seconds
            work()
        return ""
    from bench.kernels import watched_launches

    with watched_launches() as told:
        work()
    work()
    return "; ".join(told)


def _captured(clock: Clock, works: dict[str, Work]) -> tuple[dict[str, Work], dict[str, str]]:
    """The works as graphs, and why the others cannot be one."""
    replays: dict[str, Work] = {}
    why_not: dict[str, str] = {}
    for name, work in works.items():
        try:
            replays[name] = clock.replay(work)
        except NoReplayError as error:
            why_not[name] = str(error)
            _tidy(clock)
    return replays, why_not


def _tidy(clock: Clock) -> None:
    """Frees what a failure left behind."""
    if clock.device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(clock.device)
            torch.cuda.empty_cache()


def _times(times: dict[str, list[float]], contender: Contender, size: int) -> dict[str, str]:
    """Quantiles, ratio to cross-entropy, and bandwidth: the least this work must move over the median time."""
    if contender.name not in times:
        return {}
    found = quantiles(times[contender.name])
    told = {name: f"{value:.5g}" for name, value in found.items()}
    if CROSS_ENTROPY in times:
        told["times_cross_entropy"] = f"{found['p50_ms'] / quantiles(times[CROSS_ENTROPY])['p50_ms']:.3f}"
    told["gbps"] = f"{gigabytes_per_second(contender.passes * size, found['p50_ms']):.2f}"
    return told
