"""`python -m bench.gpu [STEP ...]`: what a GPU that is there for minutes should tell, correctness first.

Each step is a process of its own under the Python this is started with, with its own time limit, and asks nothing of
the others: one that fails, hangs or breaks its CUDA context costs the others nothing. Every result is a line of
`results.jsonl` as soon as it is known, `log.txt` has what the steps printed, `benchmark.csv` the times. No network, no
make, no package beyond torch, triton, pytest and numpy is needed, and what a step lacks it names.

    python -m bench.gpu versions losses tests large sanitizer     # is everything right?
    python -m bench.gpu benchmark                                 # how fast?
    python -m bench.gpu training                                  # does it pay?

`--dry` runs all of it here, interpreted, in tiny sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FAMILIES = ("smooth", "transition", "noised", "differentiable", "hinge")
_TESTS = ("tests/test_kernels_gpu.py", "tests/test_kernels_noised.py")


@dataclass
class Run:
    """One step while it runs: where results go, when to stop, and whether this is a dry run."""

    step: str
    out: Path
    seconds: float
    commit: str
    dry: bool

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.failed = False

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def tell(self, **result: Any) -> None:
        """Writes one result at once; `ok` False makes the step a failed one."""
        self.failed = self.failed or result.get("ok") is False
        line = {"step": self.step, "dry": self.dry, "commit": self.commit, "at": round(time.time()), **result}
        with (self.out / "results.jsonl").open("a") as stream:
            stream.write(json.dumps(line, default=str) + "\n")
        print(line, flush=True)


# --- the steps -------------------------------------------------------------------------------------------------------


def versions(run: Run) -> None:
    """What the machine is, and the bytes a second that a plain copy moves."""
    import torch

    from bench.contenders import PLAIN_COPY, Setting, contenders
    from topk_lab.study.timing import clock_of, gigabytes_per_second, in_turns, quantiles

    device = "cpu" if run.dry else "cuda"
    clock = clock_of(device)
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    facts = {**clock.facts(), "python": sys.version.split()[0], "torch": torch.__version__, "triton": triton}
    if not run.dry:
        facts["capability"] = torch.cuda.get_device_capability()
        facts["memory"] = torch.cuda.mem_get_info()
    run.tell(**facts)
    setting = Setting("transition", 8 if run.dry else 65_536, 1000, 5)
    scores, target = setting.problem(setting.batch, device)
    copy = next(c for c in contenders(setting, device) if c.name == PLAIN_COPY)
    times = in_turns(clock, {PLAIN_COPY: copy.work(setting, scores, target)}, 0.01 if run.dry else 1.0)
    size = scores.numel() * scores.element_size()
    run.tell(copy_gbps=gigabytes_per_second(copy.passes * size, quantiles(times[PLAIN_COPY])["p50_ms"]))


def losses(run: Run) -> None:
    """Every loss against its float64 path, a process each, all at once: rows that fit a tile and rows that stream."""
    sizes = (20,) if run.dry else (1000, 20_000)
    chosen = [(family, classes) for classes in sizes for family in (("transition",) if run.dry else FAMILIES)]
    inside = [["loss", family, str(classes)] for family, classes in chosen]
    for words, done in _together(run, [[*_python(), "bench.gpu", "--inside", *_passed(run), *w] for w in inside]):
        if done.returncode != 0:
            run.tell(loss=words[-2], classes=int(words[-1]), ok=False, error=done.stdout[-1500:])


def loss(run: Run, family: str, classes: str) -> None:
    """One loss at one size: right or wrong, registers, and how long the first call took."""
    from bench.contenders import Setting, contenders
    from bench.kernels import watched_launches

    started = time.monotonic()
    setting = Setting(family, 16, int(classes), 5)
    contender = next(c for c in contenders(setting, "cpu" if run.dry else "cuda") if c.name == _name(run, family))
    with watched_launches() as launched:
        contender.gate(replace(setting, batch=4) if run.dry else setting, "cpu" if run.dry else "cuda")
    seconds = round(time.monotonic() - started, 1)
    run.tell(loss=family, classes=int(classes), ok=True, seconds=seconds, kernels=sorted(set(launched)))


def tests(run: Run) -> None:
    """The kernels' tests, in as many processes as there are cores, but for those of more than 2^31 elements."""
    parts = 1 if run.dry else max(1, min(14, (os.cpu_count() or 2) - 1))
    what = ["tests/test_kernels_transition.py", "-k", "numbers_of_rows"] if run.dry else [*_TESTS, "-m", "gpu"]
    if not run.dry:
        what += ["-k", "not two_to_the_31"]
    _pytest(run, [[*what, "--part", f"{i}/{parts}"] for i in range(parts)])


def large(run: Run) -> None:
    """More than 2^31 elements, one loss alone."""
    _pytest(run, [["tests/test_kernels_gpu.py", "-m", "gpu", "-k", "two_to_the_31 and transition"]])


def sanitizer(run: Run) -> None:
    """Six tests under NVIDIA's compute-sanitizer, where there is one: writes and reads outside a tensor."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(p) for p in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if tool is None:
        run.tell(ok=None, lacks="compute-sanitizer is not on this machine")
        return
    what = ["tests/test_kernels_gpu.py", "-m", "gpu", "-k", "any_strides"]
    _pytest(run, [what], before=[tool, "--error-exitcode", "9"])


def benchmark(run: Run) -> None:
    """The goals, then 32,000 classes to a million, cross-entropy beside; a broken context starts a new process."""
    while True:
        command = [*_python(), "bench.gpu", "--inside", *_passed(run), "measure", f"{run.left:.0f}"]
        done = subprocess.run(command, cwd=ROOT, env=_environment(run))
        if done.returncode != _BROKEN or run.left < 30:
            run.failed = done.returncode != 0
            return


_BROKEN = 7
"""The exit status of a process that stopped because its CUDA context was lost."""


def measure(run: Run, seconds: str) -> None:
    """What `benchmark` starts: goes on from the rows that are there."""
    import torch

    from bench import expect, runner
    from bench.contenders import Setting
    from bench.suites import Suite

    chosen = [Setting("transition", 8, 20, 2)] if run.dry else expect.settings()
    suite = Suite(lambda: chosen, "cpu" if run.dry else "cuda", 0.01 if run.dry else 0.3)
    path = run.out / "bench"
    try:
        path = runner.run_suite("goals", suite, path, minutes=float(seconds) / 60, measured_commit=run.commit)
    finally:
        for csv in (run.out / "bench").glob("*/goals.csv"):
            shutil.copy(csv, run.out / "benchmark.csv")
    if not run.dry:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            run.tell(ok=False, error=str(error)[:500])
            sys.exit(_BROKEN)
    wrong = [row["note"] for row in runner.wrong(path)]
    run.tell(ok=not wrong, rows=len(runner.read(path)), wrong=wrong)


def training(run: Run) -> None:
    """The fast net from pixels under every loss, three seeds, best first, as many as fit."""
    sys.path.insert(0, str(ROOT / "lab"))
    if importlib.util.find_spec("topk_lab") is None:
        run.tell(ok=None, lacks="topk_lab: the lab's folder is not beside bench/, nor is it installed")
        return
    train: Any = importlib.import_module("topk_lab.train")

    kinds: list[dict[str, Any]] = [
        {"name": "cross_entropy"}, {"name": "smooth", "k": 5}, {"name": "smooth", "k": {1: 0.5, 5: 0.5}},
        {"name": "transition", "k": 5}, {"name": "hinge", "k": 5}, {"name": "noised", "k": 5},
        {"name": "differentiable", "k": 5},
    ]  # fmt: skip
    recipe = {"epochs": 16, "batch": 512, "learning_rate": 0.3, "nesterov": True, "schedule": "one_cycle"}
    common: dict[str, Any] = {"data": {"name": "cifar100"}, "model": {"name": "fast"}, "training": recipe}
    if run.dry:
        kinds = kinds[:2]
        common = {"data": {"name": "sample"}, "model": {"name": "linear"}, "training": {"epochs": 1}}
    longest = 0.0
    for seed in range(1 if run.dry else 3):
        for chosen in kinds:
            if run.left < 1.2 * longest:
                run.tell(ok=None, lacks=f"time for {chosen} with seed {seed} and those after it")
                return
            started = time.monotonic()
            try:
                row = train.train({**common, "loss": chosen, "seed": seed}, progress=False)
                found = {name: value for name, value in row.items() if name.startswith("top") or name == "seconds"}
                run.tell(ok=True, loss=chosen, seed=seed, **found)
            except Exception as error:  # the other losses go on
                run.tell(ok=False, loss=chosen, seed=seed, error=f"{type(error).__name__}: {str(error)[:500]}")
            longest = max(longest, time.monotonic() - started)


STEPS: dict[str, tuple[Callable[[Run], None], float]] = {
    "versions": (versions, 40),
    "losses": (losses, 90),
    "tests": (tests, 210),
    "large": (large, 60),
    "sanitizer": (sanitizer, 60),
    "benchmark": (benchmark, 200),
    "training": (training, 230),
}
"""Each with its limit in seconds, in the order of their worth."""

_PARTS: dict[str, Callable[..., None]] = {"loss": loss, "measure": measure}


# --- processes -------------------------------------------------------------------------------------------------------


def _python() -> list[str]:
    return [sys.executable, "-m"]


def _passed(run: Run) -> list[str]:
    """What a process inside a step has to know."""
    dry = ["--dry"] if run.dry else []
    return ["--out", str(run.out), "--commit", run.commit, "--seconds", f"{max(1.0, run.left):.0f}", *dry]


def _environment(run: Run) -> dict[str, str]:
    dry = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if run.dry else {}
    # Where nothing was installed, the lab is found beside this folder.
    path = os.pathsep.join(filter(None, [str(ROOT / "lab"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **dry}


def _name(run: Run, family: str) -> str:
    return f"topk {family}" if run.dry else f"topk {family} triton"


def _together(run: Run, commands: list[list[str]]) -> Iterator[tuple[list[str], subprocess.CompletedProcess[str]]]:
    """Starts all, and gives each as it ends or as the time is over."""
    files = [run.out / f".{run.step}-{place}.txt" for place in range(len(commands))]
    streams = [file.open("w") for file in files]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=_environment(run), stdout=stream, stderr=subprocess.STDOUT)
        for command, stream in zip(commands, streams, strict=True)
    ]
    try:
        for process, command, file in zip(started, commands, files, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, run.left - 3))
            code = process.poll()
            text = file.read_text() + ("" if code is not None else f"\nnot done after {run.seconds:.0f} s")
            yield command, subprocess.CompletedProcess(command, 124 if code is None else code, text)
    finally:
        for process, stream, file in zip(started, streams, files, strict=True):
            process.kill()
            stream.close()
            file.unlink(missing_ok=True)


def _pytest(run: Run, each: list[list[str]], before: list[str] | None = None) -> None:
    """Runs pytest with each list of words at once, and tells the counts and the failures' names and last lines."""
    common = ["pytest", "-o", "addopts=", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "--durations=3"]
    commands = [[*(before or []), *_python(), *common, *words] for words in each]
    for command, done in _together(run, commands):
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))][:20]
        code = 0 if done.returncode == 5 else done.returncode  # 5: the part holds no test
        run.tell(ok=code == 0, tests=" ".join(command[-3:]), summary=lines[-1:], failed=failed)
        print(done.stdout, flush=True)


def _start(step: str, out: Path, commit: str, dry: bool, seconds: float) -> bool:
    """Runs a step in a process group of its own, which ends with its time."""
    run = Run(step, out, seconds, commit, dry)
    command = [*_python(), "bench.gpu", "--inside", *_passed(run), step]
    with (out / "log.txt").open("a") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(run), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds + 5)
        except subprocess.TimeoutExpired:
            code = 124
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run.tell(finished=code == 0, seconds=round(seconds - run.left, 1), status=code)
    return code == 0


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 if all steps ended by themselves and found nothing wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(STEPS)}; all if none is named")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "_build" / "gpu")))
    parser.add_argument("--commit", help="what is measured, where this is not a checkout")
    parser.add_argument("--dry", action="store_true", help="interpreted, in tiny sizes, on the CPU")
    parser.add_argument("--seconds", type=float, help="instead of a step's own limit")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    out = chosen.out.resolve()
    if chosen.inside:
        name, *words = chosen.steps
        run = Run(name, out, chosen.seconds, chosen.commit, chosen.dry)
        (_PARTS.get(name) or STEPS[name][0])(run, *words)
        return int(run.failed)
    unknown = [step for step in chosen.steps if step not in STEPS]
    if unknown:
        parser.error(f"steps are {', '.join(STEPS)}, got {', '.join(unknown)}")
    commit = chosen.commit or _commit()
    done = [
        _start(step, out, commit, chosen.dry, chosen.seconds or STEPS[step][1]) for step in chosen.steps or list(STEPS)
    ]
    return 0 if all(done) else 1


def _commit() -> str:
    from bench.runner import commit

    return commit()


if __name__ == "__main__":
    sys.exit(main())
