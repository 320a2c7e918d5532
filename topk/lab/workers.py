"""Runs of a sweep in other processes: what one run does, and the pool that spreads runs over one machine."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from topk.lab.provenance import cores

Train = Callable[..., Mapping[str, Any]]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_READY = "ready"
_KINDLY = 5.0  # seconds between asking a worker to end and ending it


@dataclass(frozen=True)
class Job:
    """One run: all a worker needs to know, on this machine or another.

    Args:
        key: its record's key.
        config: the completed configuration.
        folder: where checkpoints live; None where the worker is on another machine and makes one.
        log: the file its output goes to; None likewise.
        profile: for the record.
        commit: for the record, from the machine that knows.
        notebook: the notebook's path, for a run through papermill.
        train: what trains, called like `topk.lab.training.train`, which it is when None.
    """

    key: str
    config: Mapping[str, Any]
    folder: Path | None = None
    log: Path | None = None
    profile: str | None = None
    commit: str | None = None
    notebook: Path | None = None
    train: Train | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended: a record, or an error (type, message, traceback); the log's text if it was written elsewhere."""

    key: str
    record: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    log: str | None = None


class Engine(Protocol):
    """Where jobs run. `start` is called for at most `slots` jobs at a time; `wait` returns those that ended."""

    slots: int

    def start(self, job: Job) -> None:
        """Starts a job in a free slot."""

    def wait(self, seconds: float) -> list[Outcome]:
        """The jobs that ended, after `seconds` at most."""

    def close(self) -> None:
        """Ends what still runs."""


def execute(job: Job) -> Outcome:
    """Runs a job in this process; whatever it raises becomes an outcome."""
    from topk.lab import records

    try:
        result = _result(job)
        return Outcome(job.key, record=records.build(job.config, result, job.profile, job.commit))
    except Exception as error:
        traceback.print_exc()
        return Outcome(job.key, error=described(error))


def described(error: BaseException) -> dict[str, str]:
    """An error as a failure's record keeps it."""
    text = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "message": str(error), "traceback": text}


def _result(job: Job) -> Mapping[str, Any]:
    if job.notebook is not None:
        from topk.lab.notebook_runs import run_notebook

        return run_notebook(job.notebook, job.config["parameters"], job.folder)
    if job.train is not None:
        return job.train(job.config, folder=job.folder, progress=False)
    from topk.lab import training

    result: Mapping[str, Any] = training.train(job.config, folder=job.folder, progress=False)
    return result


class LocalEngine:
    """Worker processes on this machine. Each has its share of the cores and, where there are GPUs, one of them.

    A worker that dies takes only its run with it: the run fails with the reason, the next one gets a new worker.
    """

    def __init__(self, workers: int | None = None, gpus: Sequence[str] | None = None) -> None:
        self._gpus = list(visible_gpus() if gpus is None else gpus)
        self.slots = workers or len(self._gpus) or cores()
        self.threads = max(1, cores() // self.slots)
        self._workers: list[_Worker | None] = [None] * self.slots

    def start(self, job: Job) -> None:
        """Hands the job to an idle worker, which is started if need be."""
        slot = next(number for number, worker in enumerate(self._workers) if worker is None or worker.job is None)
        worker = self._workers[slot]
        if worker is None or not worker.process.is_alive():
            gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
            worker = self._workers[slot] = _Worker(self.threads, gpu)
        worker.give(job)

    def wait(self, seconds: float) -> list[Outcome]:
        """Waits for any worker to finish or to die."""
        busy = [worker for worker in self._workers if worker is not None and worker.job is not None]
        signs = [sign for worker in busy for sign in (worker.pipe, worker.process.sentinel)]
        if not signs:
            time.sleep(seconds)
            return []
        ready = wait(signs, seconds)
        outcomes = []
        for slot, worker in enumerate(self._workers):
            if worker in busy and worker is not None and {worker.pipe, worker.process.sentinel} & set(ready):
                outcome = worker.outcome()
                if outcome is not None:
                    outcomes.append(outcome)
                # One that died since `outcome` looked keeps its place, and its run, until the next look.
                if worker.job is None and not worker.process.is_alive():
                    self._workers[slot] = None
        return outcomes

    def close(self) -> None:
        """Ends every worker, kindly first."""
        alive = [worker for worker in self._workers if worker is not None]
        for worker in alive:
            worker.pipe.close()  # an idle worker ends by itself
            if worker.job is not None:
                worker.process.terminate()
        deadline = time.monotonic() + _KINDLY
        for worker in alive:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = [None] * self.slots


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, threads: int, gpu: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.job: Job | None = None
        self.ready = False
        wanted = dict.fromkeys(_THREADS, str(threads)) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        self.process = context.Process(target=_serve, args=(theirs, threads), name="topk-sweep")
        with _environment(wanted):  # before the child imports torch, which reads it
            self.process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # dead already: `outcome` will tell
            self.pipe.send(job)

    def outcome(self) -> Outcome | None:
        """What the worker sent, or how it died; None if neither is true yet."""
        try:
            while self.pipe.poll():
                sign: Outcome | str = self.pipe.recv()
                if isinstance(sign, Outcome):
                    self.job = None
                    return sign
                self.ready = True
        except (EOFError, OSError):
            self.process.join(_KINDLY)
        if self.process.is_alive():
            return None
        if not self.ready:
            raise RuntimeError(f"{self._death()} before it could run anything; what it printed tells why")
        job, self.job = self.job, None
        return (
            None
            if job is None
            else Outcome(job.key, error={"type": "WorkerDied", "message": self._death(), "traceback": ""})
        )

    def _death(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            return f"the worker process ended with status {code}"
        hint = "; the system kills so when memory runs out" if code == -signal.SIGKILL else ""
        return f"the worker process was killed by {signal.Signals(-code).name}{hint}"


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; no CUDA context is made."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def _serve(pipe: Connection, threads: int) -> None:
    """A worker's life: jobs in, outcomes out. It ends with the sweep that started it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the sweep decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own would be shared with processes, and outlive a killed one
    torch.set_num_threads(threads)
    pipe.send(_READY)
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        with output_to(job.log):
            outcome = execute(job)
        pipe.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def output_to(path: Path | None) -> Iterator[None]:
    """Everything this process and its children print goes to the end of a file; the traces of crashes too."""
    if path is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable(file=2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        faulthandler.disable()
        for number, handle in enumerate(kept, start=1):
            os.dup2(handle, number)
            os.close(handle)
