"""Stand-ins for training in the tests of sweeps, in a module of their own so that worker processes can import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topk.lab import records
from topk.lab.workers import Job, Outcome, execute

RUNS = "TOPK_TEST_RUNS"  # names the file in which every start of a run is one line
FAILS, DIES, HANGS, EXITS = 13, 14, 15, 16  # seeds with a fate, unless FIXED is set
FIXED = "TOPK_TEST_FIXED"


def train(config: Mapping[str, Any], *, folder: Path | None, progress: bool) -> dict[str, Any]:
    """Notes that it ran and does what its seed says."""
    seed = config["seed"]
    if os.environ.get(RUNS):
        with open(os.environ[RUNS], "a") as file:
            file.write(f"{records.key_of_completed(config)} {seed} {os.getpid()}\n")
    print(f"the seed is {seed}", flush=True)
    if not os.environ.get(FIXED):
        if seed == FAILS:
            raise ArithmeticError("the loss is nan at step 3")
        if seed == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == HANGS:
            time.sleep(600)
        if seed == EXITS:
            raise SystemExit("a stub that leaves")
    time.sleep(float(os.environ.get("TOPK_TEST_SECONDS", "0.05")))
    return result(seed)


def result(seed: int = 0, **metrics: float) -> dict[str, Any]:
    """The result of a run that did nothing."""
    final = {"top1": 0.5 + 0.01 * seed, "top5": 0.9, "groups": {"few": {"top5": None}}, **metrics}
    return {"epochs": [{"top1": 0.3}, final], "final": final, "seconds": 2.0, "data_fingerprint": "ab", "parameters": 9}


class Inline:
    """An engine that runs a job in this process as soon as it starts."""

    slots = 1

    def __init__(self) -> None:
        self._outcomes: list[Outcome] = []

    def start(self, job: Job) -> None:
        self._outcomes.append(execute(job))

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._outcomes:
            time.sleep(min(seconds, 0.05))
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def close(self) -> None:
        self._outcomes.clear()


def train_and_tell_node(config: Mapping[str, Any], *, folder: Path | None, progress: bool) -> dict[str, Any]:
    """Also tells which Ray node it ran on, and which copy of the package."""
    import ray

    import topk

    node = ray.get_runtime_context().get_node_id()
    done = train(config, folder=folder, progress=progress)
    time.sleep(0.5)  # long enough that the other node takes the next run
    return {**done, "final": {**done["final"], "node": node, "package": topk.__file__}}
