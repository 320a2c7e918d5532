"""`python -m topk.lab sweep FILE`: runs what a sweep file asks for and has no record yet.

Stopping and starting again is always safe, and so are several sweeps on one results folder, on one machine or many: a
run is claimed before it starts (topk.lab.claims) and its record appears at once and whole (topk.lab.records). In the
results folder

    <key>.json          the record of a run
    <key>.failed.json   a run that failed: configuration, error, traceback; it is tried again with --retry-failed
    <key>.log           what a run prints; it goes away with the run's success
    .work/<key>/        its checkpoints, from which an interrupted run goes on; they go away likewise
    .claims/            who runs what
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from topk.lab import grid, records
from topk.lab.claims import SILENCE, Claims
from topk.lab.provenance import commit_here, hardware, provenance
from topk.lab.workers import Engine, Job, LocalEngine, Outcome, Train

WORK = ".work"
ENGINES = ("local", "ray")
_LOOK_EVERY = 1.0  # seconds
_BEAT_EVERY = 15.0


@dataclass
class Report:
    """How a sweep went: keys by what became of them."""

    recorded: list[str] = field(default_factory=list)  # had a record before
    ran: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # another sweep ran them meanwhile
    failed: dict[str, str] = field(default_factory=dict)  # and why, now or before
    left: list[str] = field(default_factory=list)  # not run, since the sweep was interrupted
    interrupted: bool = False


class Results:
    """A results folder as a sweep sees it."""

    def __init__(self, folder: Path | str, retry_failed: bool = False) -> None:
        self.folder = Path(folder)
        self.known = records.keys_of_today(self.folder)
        # A failure that was there before a retry is no failure of the retry.
        self._forgiven = {path.name: _time(path) for path in self.folder.glob("*.failed.json")} if retry_failed else {}

    def has(self, key: str) -> bool:
        """Whether a run has its record, now."""
        return key in self.known or (self.folder / f"{key}.json").exists()

    def failure(self, key: str) -> str | None:
        """Why a run failed, if it did and is not to be tried again."""
        path = self.failure_path(key)
        if _time(path) is None or _time(path) == self._forgiven.get(path.name):
            return None
        return failure_line(path)

    def failure_path(self, key: str) -> Path:
        """Where a failure of a run is told."""
        return self.folder / f"{key}.failed.json"

    def log(self, key: str) -> Path:
        """Where a run's output goes."""
        return self.folder / f"{key}.log"

    def work(self, key: str) -> Path:
        """Where a run's checkpoints live."""
        return self.folder / WORK / key

    def settle(self, job: Job, outcome: Outcome) -> str | None:
        """Writes what a run left behind; returns why it failed, or None."""
        if outcome.log:
            self.log(job.key).write_text(outcome.log)
        if outcome.record is None:
            error = outcome.error or {"type": "Nothing", "message": "neither a record nor an error came back"}
            self._write_failure(job, error)
            return one_line(error)
        records.save(self.folder, outcome.record)
        for path in (self.failure_path(job.key), self.log(job.key)):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.work(job.key), ignore_errors=True)
        return None

    def _write_failure(self, job: Job, error: Mapping[str, str]) -> None:
        content = {
            "schema": records.SCHEMA,
            "key": job.key,
            "config": records.plain(job.config),
            "error": dict(error),
            "log": self.log(job.key).name,
            "provenance": provenance(job.profile, job.commit),
        }
        records.write_json(self.failure_path(job.key), content)


def _time(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def one_line(error: Mapping[str, str]) -> str:
    """An error's type and the first line of its message."""
    first, *_ = [*str(error["message"]).strip().splitlines(), ""]
    return f"{error['type']}: {first}"


def failure_line(path: Path) -> str:
    """A failure in one line; what cannot be read is a failure too."""
    try:
        error = json.loads(path.read_text())["error"]
        return one_line(error)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} cannot be read"


def run(
    sweep: grid.Sweep,
    folder: Path | str,
    engine: Engine,
    *,
    retry_failed: bool = False,
    progress: bool = True,
    train: Train | None = None,
    silence: float = SILENCE,
) -> Report:
    """Runs what has no record yet, waits for what other sweeps are running, and returns how it went.

    Args:
        sweep: from `topk.lab.grid.read`.
        folder: the results folder.
        engine: where runs run; it is closed at the end.
        retry_failed: whether runs that failed before are tried again.
        progress: whether to show a bar with the time left.
        train: called in place of `topk.lab.training.train`; a function workers can import. Sweep files have no say.
        silence: seconds after which another sweep that gives no sign of life loses its claims.
    """
    results, report = Results(folder, retry_failed), Report()
    results.folder.mkdir(parents=True, exist_ok=True)
    pending: dict[str, Job] = {}
    for key, config in sweep.configs.items():
        failure = results.failure(key)
        if results.has(key):
            report.recorded.append(key)
        elif failure is not None:
            report.failed[key] = failure
        else:
            pending[key] = _job(key, config, sweep, results, train)
    loop = _Loop(results, engine, report, pending, Claims(results.folder, silence))
    weights = _weights(sweep.configs, results)
    with _Bar(weights, loop, enabled=progress) as bar:
        loop.go(bar)
    return report


def _job(key: str, config: Mapping[str, Any], sweep: grid.Sweep, results: Results, train: Train | None) -> Job:
    return Job(
        key,
        config,
        folder=results.work(key).resolve(),
        log=results.log(key).resolve(),
        profile=sweep.profile,
        commit=commit_here(),
        notebook=sweep.notebook,
        train=train,
    )


class _Loop:
    """Claims runs, starts them where there is room, and settles what comes back."""

    def __init__(
        self, results: Results, engine: Engine, report: Report, pending: dict[str, Job], claims: Claims
    ) -> None:
        self.results, self.engine, self.report = results, engine, report
        self.pending, self.claims = pending, claims
        self.running: dict[str, Job] = {}
        self._last_beat = time.monotonic()

    def go(self, bar: _Bar) -> None:
        try:
            while self.pending or self.running:
                self._start()
                bar.show()
                self._settle(self.engine.wait(_LOOK_EVERY))
                self._beat()
        except KeyboardInterrupt:
            self.report.interrupted = True
            self._settle(self.engine.wait(0))  # what finished meanwhile counts
        finally:
            self.engine.close()
            self.claims.release_all()
            self.report.left = [*self.running, *self.pending]
            bar.show()

    def _start(self) -> None:
        for key in list(self.pending):
            if len(self.running) >= self.engine.slots:
                return
            if self._ended_elsewhere(key) or not self.claims.take(key):
                continue
            if self._ended_elsewhere(key):  # between the look and the claim
                self.claims.release(key)
                continue
            job = self.running[key] = self.pending.pop(key)
            if job.folder is not None:
                job.folder.mkdir(parents=True, exist_ok=True)
            self.engine.start(job)

    def _ended_elsewhere(self, key: str) -> bool:
        failure = self.results.failure(key)
        if self.results.has(key):
            self.report.elsewhere.append(key)
        elif failure is not None:
            self.report.failed[key] = failure
        else:
            return False
        del self.pending[key]
        return True

    def _settle(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            job = self.running.pop(outcome.key)
            try:
                failure = self.results.settle(job, outcome)
            except OSError as error:  # a full disk, say: the next run may find room again
                failure = f"could not be written: {error}"
            if failure is None:
                self.report.ran.append(outcome.key)
            else:
                self.report.failed[outcome.key] = failure
            with contextlib.suppress(KeyError):  # lost while this machine slept
                self.claims.release(outcome.key)

    def _beat(self) -> None:
        if time.monotonic() - self._last_beat > min(_BEAT_EVERY, self.claims.silence / 4):
            self._last_beat = time.monotonic()
            self.claims.beat()


class _Bar:
    """One bar for the whole sweep. Runs count by the seconds they are expected to take, so the time left is fair."""

    def __init__(self, weights: Mapping[str, float], loop: _Loop, enabled: bool) -> None:
        self._weights, self._loop = weights, loop
        already, self._shown = self._done(), ""
        form = "{percentage:3.0f}% |{bar:24}| {desc} [{elapsed}, {remaining} left]"
        self._bar = tqdm(total=sum(weights.values()), initial=already, disable=not enabled, bar_format=form)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _done(self) -> float:
        report = self._loop.report
        return sum(
            self._weights[key]
            for keys in (report.recorded, report.ran, report.elsewhere, report.failed)
            for key in keys
        )

    def show(self) -> None:
        loop, report = self._loop, self._loop.report
        ended = len(report.recorded) + len(report.ran) + len(report.elsewhere)
        text = f"{ended} of {len(self._weights)} runs, {len(loop.running)} running"
        self._bar.set_description_str(text + (f", {len(report.failed)} failed" if report.failed else ""), refresh=False)
        self._bar.update(self._done() - self._bar.n)
        if text != self._shown or sys.stderr.isatty():
            self._bar.refresh()
        self._shown = text


def _weights(configs: Mapping[str, Mapping[str, Any]], results: Results) -> dict[str, float]:
    expected = Expected(results.folder)
    found = {key: expected.seconds(config) for key, config in configs.items()}
    if any(seconds is None for seconds in found.values()):
        return {key: float(config.get("training", {}).get("epochs", 1)) for key, config in configs.items()}
    return {key: seconds or 0.0 for key, seconds in found.items()}


class Expected:
    """How long runs take, from the records of like runs on hardware like this."""

    def __init__(self, folder: Path) -> None:
        here, self._known = hardware(), dict[str, list[float]]()
        for path in records.paths(folder) if folder.is_dir() else []:
            record = records.read(path)
            if record["provenance"]["hardware"] == here:
                config = record["config"]
                for name in _likeness(config):
                    self._known.setdefault(name, []).append(record["result"]["seconds"] / _epochs(config))

    def seconds(self, config: Mapping[str, Any]) -> float | None:
        """The median of runs with the same loss, else of runs with any loss; None where there are none."""
        for name in _likeness(config):
            if name in self._known:
                return median(self._known[name]) * _epochs(config)
        return None


def _epochs(config: Mapping[str, Any]) -> int:
    return int(config.get("training", {}).get("epochs", 1)) or 1


def _likeness(config: Mapping[str, Any]) -> list[str]:
    """Names that runs of equal cost share, the most exact first."""
    if "notebook" in config:
        profile = config["parameters"].get("profile")
        return [f"{config['notebook']} {profile}"]
    data = {name: value for name, value in config["data"].items() if name not in ("seed", "noise")}
    training = {
        name: config["training"][name]
        for name in ("batch", "precision", "mixup", "compile")
        if name in config["training"]
    }
    body = str(records.plain([data, config["model"], training]))
    return [f"{body} {config['loss'].get('name')}", body]


def add_arguments(commands: Any) -> None:
    """The command `sweep`."""
    parser = commands.add_parser("sweep", help="run what a sweep file asks for and has no record yet")
    parser.add_argument("file", type=Path, help="the sweep, a YAML file (topk.lab.grid tells its form)")
    parser.add_argument("--profile", choices=grid.PROFILES, default="laptop")
    parser.add_argument("--engine", choices=ENGINES, default="local")
    parser.add_argument("--address", help="of a running Ray cluster, such as auto or ray://host:10001")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of records (default: results)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one a GPU, else one a core)")
    parser.add_argument("--retry-failed", action="store_true", help="try runs again that failed before")
    parser.add_argument(
        "--final", action="store_true", help="of a file that tunes: choose, write FILE without .tuning, run that too"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would run and the hours it would take")
    parser.set_defaults(run=_command)


def _command(chosen: argparse.Namespace) -> int:
    sweep = grid.read(chosen.file, chosen.profile)
    if chosen.workers is not None and chosen.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {chosen.workers}")
    if chosen.address is not None and chosen.engine != "ray":
        raise ValueError("--address goes with --engine ray")
    if chosen.final and (sweep.final is None or ".tuning." not in chosen.file.name):
        raise ValueError(f"--final is for a file NAME.tuning.yml with a section `final`, got {chosen.file}")
    if chosen.dry_run:
        return _dry_run(sweep, chosen)
    status = _run_and_tell(sweep, chosen)
    if status or not chosen.final:
        return status
    from topk.lab.tuning import final_sweep

    path = chosen.file.with_name(chosen.file.name.replace(".tuning.", "."))
    path.write_text(final_sweep(chosen.file, chosen.results, chosen.profile), encoding="utf-8")
    return _run_and_tell(grid.read(path, chosen.profile), chosen)


def _run_and_tell(sweep: grid.Sweep, chosen: argparse.Namespace) -> int:
    with _terminated_like_interrupted():
        report = run(sweep, chosen.results, _engine(sweep, chosen), retry_failed=chosen.retry_failed)
    print(summary(sweep, chosen.results, report))
    return 130 if report.interrupted else 1 if report.failed else 0


def _engine(sweep: grid.Sweep, chosen: argparse.Namespace) -> Engine:
    workers = chosen.workers or sweep.workers
    if chosen.engine == "local":
        return LocalEngine(workers)
    from topk.lab.cluster import RayEngine

    return RayEngine(chosen.address, workers)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def summary(sweep: grid.Sweep, folder: Path | str, report: Report) -> str:
    """The table that ends a sweep: its runs' records by loss and setting, what failed and where its log is."""
    from topk.lab.summary import table

    frame = records.load(folder)
    mine = frame[frame["key"].isin(set(sweep.configs))] if len(frame) else frame
    lines = ["", table(mine), ""]
    counts = {
        "ran": len(report.ran),
        "had a record": len(report.recorded),
        "ran in another sweep": len(report.elsewhere),
        "failed": len(report.failed),
        "left": len(report.left),
    }
    lines.append(", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing to do")
    for key, why in report.failed.items():
        config = sweep.configs[key]
        lines.append(f"  failed: {_named(config)}: {why}; see {Path(folder) / key}.log and {key}.failed.json")
    if report.failed:
        lines.append("  --retry-failed tries them again")
    return "\n".join(lines)


def _named(config: Mapping[str, Any]) -> str:
    seed = config.get("seed", config.get("parameters", {}).get("seed"))
    return records.label(config) + ("" if seed is None else f", seed {seed}")


def _dry_run(sweep: grid.Sweep, chosen: argparse.Namespace) -> int:
    from topk.lab.summary import aligned

    results, claims = Results(chosen.results, chosen.retry_failed), Claims(chosen.results)
    workers = chosen.workers or sweep.workers or (LocalEngine().slots if chosen.engine == "local" else 1)
    rows, seconds, unknown = [["run", "settings", "state", "minutes"]], 0.0, 0
    estimated = _Estimates(results.folder, workers)
    varying = _varying(sweep.configs)
    for key, config in sweep.configs.items():
        holder, failure = claims.holder(key), results.failure(key)
        state = "recorded" if results.has(key) else f"failed ({failure})" if failure else "to run"
        if state == "to run" and holder:
            state = f"claimed by {holder}"
        expected = estimated.seconds(config) if state == "to run" else None
        seconds += expected or 0.0
        unknown += state == "to run" and expected is None
        minutes = "" if state != "to run" else "?" if expected is None else f"{expected / 60:.1f}"
        flat = records.flat(config)
        rows.append([key, " ".join(f"{name}={flat.get(name)}" for name in varying) or _named(config), state, minutes])
    print(aligned(rows))
    count = sum(row[2] == "to run" for row in rows)
    print(f"{count} of {len(rows) - 1} to run, {seconds / 3600 / workers:.2f} hours with {workers} at a time")
    for reason in estimated.reasons:
        print(f"  no estimate for some: {reason}")
    if unknown:
        print(f"  {unknown} of unknown length are not in it")
    return 0


def _varying(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings in which a sweep's runs differ."""
    rows = [records.flat(config) for config in configs.values()]
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if len({str(row.get(name)) for row in rows}) > 1]


class _Estimates:
    """Seconds a run, from like records, else by trying a few steps of it; once for all runs that differ in seeds."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._expected, self._workers = Expected(folder), workers
        self._tried: dict[str, float | None] = {}
        self.reasons: dict[str, None] = {}

    def seconds(self, config: Mapping[str, Any]) -> float | None:
        found = self._expected.seconds(config)
        if found is not None or "notebook" in config:
            return found
        name = _likeness(config)[0]
        if name not in self._tried:
            self._tried[name] = self._try(config)
        pace = self._tried[name]
        return None if pace is None else pace * _epochs(config)

    def _try(self, config: Mapping[str, Any]) -> float | None:
        import torch

        from topk.lab import training
        from topk.lab.provenance import cores

        before = torch.get_num_threads()
        torch.set_num_threads(max(1, cores() // self._workers))
        try:
            return training.estimate(config) / _epochs(config)
        except Exception as error:  # the run would tell; an estimate must not
            self.reasons[f"{type(error).__name__}: {error}"] = None
            return None
        finally:
            torch.set_num_threads(before)
