"""The Ray engine: a sweep's runs on many machines (extra `cluster`).

The sweep's own machine holds the claims and writes the records; the others need torch, the data (`$TOPK_DATA`) and the
same versions of Python and Ray. They get this package from the sweep's machine; a run that finds another copy of it
fails, rather than measure other code than its record says.
"""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import topk
from topk.lab.provenance import source
from topk.lab.workers import Job, Outcome, described, execute, output_to

_PACKAGE = Path(topk.__file__).parent
_LONGEST_LOG = 200_000  # characters that travel home


class RayEngine:
    """Runs jobs as Ray tasks: one a GPU where the cluster has GPUs, one for `threads` cores otherwise.

    Args:
        address: of a running cluster; None starts one on this machine alone.
        workers: runs at a time; None: as many as the cluster has room for.
        threads: cores a run on CPUs takes.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, threads: int = 1) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError:
            raise ValueError("--engine ray needs the extra `cluster`: pip install 'topk-losses[cluster]'") from None
        self._ray = ray
        with tempfile.TemporaryDirectory() as copy:  # uploaded by `init`; later edits do not reach the runs
            package = shutil.copytree(_PACKAGE, Path(copy) / "topk", ignore=shutil.ignore_patterns("__pycache__"))
            self._source = source(package)
            ray.init(address=address, runtime_env={"working_dir": copy}, log_to_driver=False)
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.slots = workers or gpus or max(1, int(resources.get("CPU", 1)) // threads)
        share = min(1.0, gpus / self.slots) if gpus else 0.0
        options = {"num_cpus": 1 if gpus else threads, "num_gpus": share, "max_retries": 0}
        self._execute = ray.remote(**options)(_execute_away)
        self._running: dict[Any, str] = {}

    def start(self, job: Job) -> None:
        """Hands the job to the cluster; its folders are made where it runs."""
        text = None if job.notebook is None else job.notebook.read_text()
        away = dataclasses.replace(job, folder=None, log=None, notebook=None)
        name = None if job.notebook is None else job.notebook.name
        self._running[self._execute.remote(away, name, text, self._source)] = job.key

    def wait(self, seconds: float) -> list[Outcome]:
        """Waits for any task; one whose machine or process died has failed."""
        if not self._running:
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [self._outcome(task) for task in ready]

    def _outcome(self, task: Any) -> Outcome:
        key = self._running.pop(task)
        try:
            outcome: Outcome = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            return Outcome(key, error=described(error))
        return outcome

    def close(self) -> None:
        """Ends what still runs and leaves the cluster."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        self._ray.shutdown()


def _execute_away(job: Job, notebook: str | None, text: str | None, code: str) -> Outcome:
    """Runs a job in a temporary folder of this machine and sends its log home when it failed."""
    if source(_PACKAGE) != code:
        raise RuntimeError(f"another copy of topk is in the way on this machine: {_PACKAGE}")
    with tempfile.TemporaryDirectory(prefix="topk-") as temporary:
        folder, log = Path(temporary), Path(temporary) / "log"
        work = folder / "work"
        work.mkdir()
        path = None
        if notebook is not None and text is not None:
            path = folder / notebook
            path.write_text(text)
        with output_to(log):
            outcome = execute(dataclasses.replace(job, folder=work, notebook=path))
        if outcome.error is None:
            return outcome
        return dataclasses.replace(outcome, log=log.read_text(errors="replace")[-_LONGEST_LOG:])
