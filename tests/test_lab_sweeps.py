"""Sweeps: the file's grid, claims, worker processes that fail and die, sweeps side by side, notebooks, the command."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import lab_stubs
import nbformat
import pytest

from topk.lab import claims, grid, records, sweeps, workers
from topk.lab.__main__ import main
from topk.lab.provenance import cores

HERE = Path(__file__).parent
TINY = HERE / "data" / "tiny.sweep.yaml"


def sweep_file(folder: Path, text: str) -> Path:
    path = folder / "some.sweep.yaml"
    path.write_text(text)
    return path


def seeds_sweep(folder: Path, *seeds: int) -> grid.Sweep:
    text = TINY.read_text().partition("grid:")[0] + f"loss: {{name: hinge, k: 2}}\ngrid: {{seed: {list(seeds)}}}\n"
    return grid.read(sweep_file(folder, text))


# --- the file ---


def test_the_grid_is_a_product_with_the_last_list_fastest() -> None:
    sweep = grid.read(TINY)
    configs = list(sweep.configs.values())
    assert len(configs) == 12
    assert [config["seed"] for config in configs[:4]] == [0, 1, 0, 1]
    assert [config["loss"]["name"] for config in configs[:6]] == ["cross_entropy"] * 2 + ["smooth"] * 4
    assert [config["data"]["noise"] for config in configs] == [0] * 6 + [0.2] * 6
    assert configs[4]["loss"]["k"] == {"1": 0.5, "3": 0.5}
    assert configs[0]["training"]["learning_rate"] == 0.1, "1e-1 is a number"
    assert all(records.key(config) == key for key, config in sweep.configs.items())
    assert list(grid.read(TINY, "smoke").configs) == list(sweep.configs)[:6]


def test_a_profile_overrides_parts(tmp_path: Path) -> None:
    text = TINY.read_text() + "  gpu: {training: {epochs: 9}, workers: 3, grid: {loss: [ldam]}}\n"
    sweep = grid.read(sweep_file(tmp_path, text), "gpu")
    config = next(iter(sweep.configs.values()))
    assert (config["training"]["epochs"], config["training"]["batch"], config["loss"]["name"]) == (9, 32, "ldam")
    assert (sweep.workers, len(sweep.configs)) == (3, 4)


def test_equal_runs_are_one(tmp_path: Path) -> None:
    text = TINY.read_text() + "  gpu: {grid: {loss: [{name: smooth, k: 2}, {name: smooth, k: 2, tau: 1}]}}\n"
    assert len(grid.read(sweep_file(tmp_path, text), "gpu").configs) == 4


BASE = "data: {name: synthetic/rings}\nmodel: {name: linear}\nloss: {name: focal}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bata: 1\n", r"line 4: 'bata' is unknown here; known are description, notebook, data"),
        ("profiles:\n  tiny: {}\n", r"line 5: 'tiny' is unknown here; known are smoke, laptop, gpu"),
        ("profiles:\n  gpu:\n    notebook: x\n", r"line 6: 'notebook' is unknown here"),
        (
            "training:\n  epochs: 3\n  bacth: 7\n",
            r"line 6: a key of training is unknown: 'bacth'; did you mean 'batch'",
        ),
        ("training:\n  epochs: 0\n", r"line 5: training\.epochs must be"),
        ("grid:\n  loss:\n    - {name: smooth}\n    - {name: smooth, taau: 2}\n", r"line 7: .*'taau'"),
        ("grid:\n  losses: [1]\n", r"line 5: 'losses' is no section or setting; sections are data, model, loss"),
        ("grid:\n  seed: 3\n", r"line 5: 'seed' must be a list of at least one value, got 3"),
        ("grid:\n  seed: []\n", r"line 5: 'seed' must be a list"),
        ("grid:\n  seed.x: [1]\n", r"line 5: 'seed.x' is no section"),
        ("grid:\n  loss.: [1]\n", r"line 5: 'loss.' is no section"),
        ("seed: 1\nseed: 2\n", r"line 5: 'seed' is there twice"),
        ("parameters: {x: 1}\n", r"line 4: 'parameters' does not go with no notebook"),
        ("workers: -1\n", r"line 4: workers must be a number of at least 1, got -1"),
        ("data: [1]\n", r"'data' is there twice"),
        ("seed: !!python/object/apply:os.system ['touch hacked']\n", "is not YAML that a sweep may have"),
        ("seed: [1\n", "is not YAML that a sweep may have"),
        ("grid:\n  seed: [" + "1," * 10_001 + "]\n", r"line 4: a sweep has at most 10000 runs, this grid has 10001"),
        ("notebook: ../x.ipynb\n", r"line 4: notebook must be the name of an .ipynb file beside the sweep's"),
        ("notebook: x.ipynb\n", r"line 4: there is no notebook"),
        ("notebook: '$(touch x).ipynb'\n", r"line 4: notebook must be the name"),
        ("seed: true\n", r"seed must be"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        grid.read(sweep_file(tmp_path, BASE + text))
    assert "some.sweep.yaml" in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["some.sweep.yaml"]


def test_aliases_that_explode_are_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefgh"))
    for text in (bomb, "a: &a [*a]\n"):
        with pytest.raises(ValueError, match="too large once its aliases"):
            grid.read(sweep_file(tmp_path, text))


# --- claims ---


def test_one_claim_a_name(tmp_path: Path) -> None:
    one, two = claims.Claims(tmp_path), claims.Claims(tmp_path)
    assert one.take("a")
    assert not one.take("a")
    assert not two.take("a")
    assert two.take("b")
    assert str(os.getpid()) in str(two.holder("a"))
    one.release("a")
    assert two.holder("a") is None
    assert two.take("a")
    two.release_all()
    assert list((tmp_path / claims.FOLDER).iterdir()) == []
    with pytest.raises(ValueError, match="letters and digits"):
        one.take("../a")


def _leave_a_claim(folder: Path, **changes: Any) -> Path:
    """What a sweep that was killed leaves behind."""
    holder = claims.Claims(folder)
    assert holder.take("a")
    path = holder.folder / "a.0"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_claim_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _leave_a_claim(tmp_path, process=dead.pid)
    assert claims.Claims(tmp_path).take("a")
    assert [path.name for path in (tmp_path / claims.FOLDER).iterdir()] == ["a.1"]


def test_a_process_number_given_again_is_no_sign_of_life(tmp_path: Path) -> None:
    _leave_a_claim(tmp_path, started="1")
    assert claims.Claims(tmp_path).take("a")


def test_a_claim_elsewhere_expires_only_when_silent(tmp_path: Path) -> None:
    path = _leave_a_claim(tmp_path, machine="another", host="far", process=1)
    assert not claims.Claims(tmp_path).take("a")
    assert claims.Claims(tmp_path).holder("a") == "process 1 on far"
    os.utime(path, (time.time() - 301,) * 2)
    assert claims.Claims(tmp_path).take("a")


def test_a_holder_that_slept_notices_its_loss_and_harms_nobody(tmp_path: Path) -> None:
    sleeper, other, third = (claims.Claims(tmp_path, silence=0.2) for _ in range(3))
    assert sleeper.take("a")
    time.sleep(0.3)
    assert other.take("a")
    assert sleeper.beat() == ["a"]
    assert other.beat() == []
    assert not third.take("a")
    with pytest.raises(KeyError):
        sleeper.release("a")


def test_a_late_release_takes_nothing_from_others(tmp_path: Path) -> None:
    sleeper, other, third = (claims.Claims(tmp_path, silence=0.2) for _ in range(3))
    assert sleeper.take("a")
    time.sleep(0.3)
    assert other.take("a")
    other.release("a")
    assert third.take("a")
    sleeper.release("a")
    assert third.beat() == []


def test_signs_of_life_keep_a_claim(tmp_path: Path) -> None:
    holder, other = claims.Claims(tmp_path, silence=0.5), claims.Claims(tmp_path, silence=0.5)
    assert holder.take("a")
    for _ in range(8):
        time.sleep(0.1)
        assert holder.beat() == []
        assert not other.take("a")


def test_a_late_look_at_a_stale_claim_wins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between another's look and its claim the stale claim is taken over, released, and taken afresh."""
    _leave_a_claim(tmp_path, started="1")
    late, quick = claims.Claims(tmp_path), claims.Claims(tmp_path)
    create = claims.Claims._created

    def create_late(self: claims.Claims, path: Path, content: str) -> bool:
        if self is late:
            assert quick.take("a")
            quick.release("a")
            assert quick.take("a")
        return create(self, path, content)

    monkeypatch.setattr(claims.Claims, "_created", create_late)
    assert not late.take("a")
    assert [path.name for path in (tmp_path / claims.FOLDER).iterdir()] == ["a.0"]
    assert quick.beat() == []


def _race(folder: Path, begin: float, told: Any) -> None:
    mine = claims.Claims(folder)
    while time.time() < begin:
        pass
    told.send([number for number in range(150) if mine.take(f"n{number}")])
    told.recv()  # who goes home leaves stale claims, which a slower racer may rightly take


def test_processes_that_race_for_stale_claims_never_share_one(tmp_path: Path) -> None:
    left = claims.Claims(tmp_path)
    for number in range(0, 150, 2):
        assert left.take(f"n{number}")
        path = left.folder / f"n{number}.0"
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": "1"}))
    begin, context = time.time() + 0.5, multiprocessing.get_context("fork")
    racers, taken = [], Counter[int]()
    for _ in range(4):
        ours, theirs = context.Pipe()
        racers.append((context.Process(target=_race, args=(tmp_path, begin, theirs)), ours))
        racers[-1][0].start()
    for _, ours in racers:
        taken.update(ours.recv())
    for racer, ours in racers:
        ours.send("go home")
        racer.join()
    assert set(taken.values()) == {1}
    # Two that meet at the same instant may both step back; a sweep asks again a second later.
    assert len(taken) > 140


# --- workers ---


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which every start of a run is a line."""
    monkeypatch.setenv(lab_stubs.RUNS, str(tmp_path / "told"))
    return tmp_path / "told"


def test_failing_and_dying_runs_stop_nobody(
    tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = seeds_sweep(tmp_path, 1, lab_stubs.FAILS, lab_stubs.DIES, 2, 3)
    keys = {config["seed"]: key for key, config in sweep.configs.items()}
    results = tmp_path / "results"
    report = sweeps.run(sweep, results, workers.LocalEngine(2), train=lab_stubs.train, progress=True)
    assert sorted(report.ran) == sorted(keys[seed] for seed in (1, 2, 3))
    assert report.failed == {
        keys[lab_stubs.FAILS]: "ArithmeticError: the loss is nan at step 3",
        keys[lab_stubs.DIES]: "WorkerDied: the worker process was killed by SIGKILL; "
        "the system kills so when memory runs out",
    }
    err = capfd.readouterr().err
    assert re.search(r"100% \|.*3 of 5 runs, 0 running, 2 failed \[", err)
    assert "left]" in err
    failure = json.loads((results / f"{keys[lab_stubs.FAILS]}.failed.json").read_text())
    assert "in train\n" in failure["error"]["traceback"]
    assert failure["config"]["seed"] == lab_stubs.FAILS
    log = (results / failure["log"]).read_text()
    assert log.startswith("the seed is 13\n")
    assert "ArithmeticError" in log
    assert (results / f"{keys[lab_stubs.DIES]}.log").read_text() == "the seed is 14\n"
    threads = {record["provenance"]["threads"] for record in map(records.read, records.paths(results))}
    assert threads == {max(1, cores() // 2)}
    text = sweeps.summary(sweep, results, report)
    assert "3 ran, 2 failed" in text
    assert "failed: hinge k=2 margin=1 variant=calibrated, seed 13: Arithmetic" in text

    again = sweeps.run(sweep, results, lab_stubs.Inline(), train=lab_stubs.train, progress=False)
    assert len(again.recorded) == 3
    assert again.failed == report.failed, "failures are not tried again"
    assert len(told.read_text().splitlines()) == 5
    monkeypatch.setenv(lab_stubs.FIXED, "1")
    retried = sweeps.run(sweep, results, lab_stubs.Inline(), train=lab_stubs.train, progress=False, retry_failed=True)
    assert (len(retried.recorded), len(retried.ran), retried.failed) == (3, 2, {})
    left = sorted(path.name for path in results.iterdir())
    assert left == sorted([".claims", ".work", *(f"{key}.json" for key in keys.values())]), "logs go with success"
    assert not any((results / name).iterdir() for name in (".work", ".claims") if any((results / name).iterdir()))


def test_a_failure_that_cannot_be_written_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = records.save

    def save(folder: Path, record: dict[str, Any]) -> Path:
        if record["config"]["seed"] == 1:
            raise OSError(28, "No space left on device")
        return real(folder, record)

    monkeypatch.setattr(records, "save", save)
    sweep = seeds_sweep(tmp_path, 1, 2)
    report = sweeps.run(sweep, tmp_path / "r", lab_stubs.Inline(), train=lab_stubs.train, progress=False)
    assert len(report.ran) == 1
    assert "No space left" in next(iter(report.failed.values()))


def test_what_another_sweep_finished_before_the_claim_is_not_run(
    tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, real = seeds_sweep(tmp_path, 1, 2), claims.Claims.take
    first, second = sweep.configs

    def take(self: claims.Claims, name: str) -> bool:
        if name == first:
            records.write(tmp_path / "r", sweep.configs[first], lab_stubs.result())
        return real(self, name)

    monkeypatch.setattr(claims.Claims, "take", take)
    report = sweeps.run(sweep, tmp_path / "r", lab_stubs.Inline(), train=lab_stubs.train, progress=False)
    assert (report.elsewhere, report.ran) == ([first], [second])
    assert [line.split()[0] for line in told.read_text().splitlines()] == [second]
    assert not any((tmp_path / "r" / claims.FOLDER).iterdir())


def test_each_worker_has_its_gpu_and_its_share_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str | None, str]] = []

    class NoProcess:
        sentinel, pid = 0, 0

        def start(self) -> None:
            seen.append((len(seen), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]))

        def is_alive(self) -> bool:
            return True

    context = type(workers.multiprocessing.get_context("spawn"))
    monkeypatch.setattr(context, "Process", lambda *_, **__: NoProcess())
    monkeypatch.setattr(workers, "cores", lambda: 16)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    engine = workers.LocalEngine(5, gpus=["GPU-a", "GPU-b"])
    for number in range(5):
        engine.start(workers.Job(str(number), {}))
    assert seen == [(0, "GPU-a", "3"), (1, "GPU-b", "3"), (2, "GPU-a", "3"), (3, "GPU-b", "3"), (4, "GPU-a", "3")]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != "3"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert workers.visible_gpus() == ["GPU-a", "GPU-b"]
    assert workers.LocalEngine().slots == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert workers.visible_gpus() == ["0", "1"]


# --- several sweeps, and sweeps that are stopped ---

SWEEP = f"""
import signal, sys
sys.path.insert(0, {str(HERE)!r})
import lab_stubs
from topk.lab import grid, sweeps, workers

def go():
    engine = workers.LocalEngine(1) if "local" in sys.argv else lab_stubs.Inline()
    sweep = grid.read(sys.argv[1])
    with sweeps._terminated_like_interrupted():
        report = sweeps.run(sweep, sys.argv[2], engine, train=lab_stubs.train, silence=30)
    print(len(report.ran), len(report.recorded + report.elsewhere), len(report.left), report.interrupted, flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without
    go()
"""


def _sweep_process(file: Path, results: Path, engine: str, **environment: str) -> subprocess.Popen[str]:
    script = file.parent / "sweep_script.py"
    script.write_text(SWEEP)
    return subprocess.Popen(
        [sys.executable, script, file, results, engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def _wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_two_sweeps_share_the_work_and_one_that_dies_is_replaced(tmp_path: Path, told: Path) -> None:
    """Three processes; one takes a run that hangs and is killed in it. Every other run runs once."""
    hangs = lab_stubs.HANGS
    sweep, results = seeds_sweep(tmp_path, hangs, *range(20, 60)), tmp_path / "results"
    file = tmp_path / "some.sweep.yaml"
    victim = _sweep_process(file, results, "inline")
    _wait_for(lambda: told.exists() and told.read_text().endswith(f"{victim.pid}\n"))
    others = [_sweep_process(file, results, "inline", **{lab_stubs.FIXED: "1"}) for _ in range(2)]
    _wait_for(lambda: len(records.paths(results)) >= 5)
    assert next(iter(sweep.configs)) not in {path.stem for path in records.paths(results)}
    victim.kill()
    told_by = [other.communicate(timeout=60)[0].splitlines()[-1].split() for other in others]
    assert len(records.load(results)) == 41
    starts = Counter(line.split()[1] for line in told.read_text().splitlines())
    assert starts.pop(str(hangs)) == 2
    assert set(starts.values()) == {1}, "nothing ran twice"
    assert len(starts) == 40
    ran, others_ran, left = zip(*(map(int, words[:3]) for words in told_by), strict=True)
    assert (sum(ran), sum(left)) == (41, 0)
    assert all(a + b == 41 for a, b in zip(ran, others_ran, strict=True)), "each waits for the other's last run"
    assert min(ran) > 0


@pytest.mark.parametrize(
    "sign",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_sweep_keeps_what_it_has(tmp_path: Path, told: Path, sign: signal.Signals) -> None:
    seeds_sweep(tmp_path, 1, 2, lab_stubs.HANGS, 3)
    results = tmp_path / "results"
    sweep = _sweep_process(tmp_path / "some.sweep.yaml", results, "local")
    _wait_for(lambda: told.exists() and len(told.read_text().splitlines()) == 3)
    worker = int(told.read_text().split()[-1])
    assert worker != sweep.pid
    if sign == signal.SIGINT:
        os.killpg(sweep.pid, sign)  # as a terminal does
    else:
        sweep.send_signal(sign)
    out = sweep.communicate(timeout=30)[0]
    assert out == ("" if sign == signal.SIGKILL else "2 0 2 True\n")
    _wait_for(lambda: claims._started(worker) is None, 20)
    assert len(records.load(results)) == 2
    assert not list(results.glob("*.failed.json"))
    if sign != signal.SIGKILL:
        assert list((results / claims.FOLDER).iterdir()) == []


# --- notebooks ---

CELLS = """
from topk.lab.notebook_runs import give
import os
print("working in", os.path.basename(os.getcwd()))
assert rate != 3, "a rate of 3"
give({"final": {"top1": rate / 10, "seen": profile}, "epochs": [{"top1": 0.1}]})
"""


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    cells = [nbformat.v4.new_code_cell('profile = "smoke"\nrate = 1\nseed = 0'), nbformat.v4.new_code_cell(CELLS)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "05_some.ipynb")
    return tmp_path / "05_some.ipynb"


def test_a_notebook_is_swept_through_papermill(tmp_path: Path, notebook: Path) -> None:
    sweep = grid.read(sweep_file(tmp_path, "notebook: 05_some.ipynb\ngrid: {rate: [2], seed: [4]}\n"), "smoke")
    parameters = {"profile": "smoke", "rate": 2, "seed": 4}
    assert [config["parameters"] for config in sweep.configs.values()] == [parameters]
    sweeps.run(sweep, tmp_path / "results", lab_stubs.Inline(), progress=False)
    (row,) = records.load(tmp_path / "results").to_dict("records")
    assert (row["top1"], row["seen"], row["seed"], row["parameters.rate"]) == (0.2, "smoke", 4, 2)
    assert records.check(tmp_path / "results") == {}


@pytest.mark.slow
def test_a_notebook_that_fails_leaves_its_executed_copy(tmp_path: Path, notebook: Path) -> None:
    sweep = grid.read(sweep_file(tmp_path, "notebook: 05_some.ipynb\ngrid: {rate: [2, 3]}\n"), "smoke")
    report = sweeps.run(sweep, tmp_path / "results", workers.LocalEngine(2), progress=False)
    (failure,) = report.failed.items()
    assert "a rate of 3" in (tmp_path / "results" / f"{failure[0]}.failed.json").read_text()
    assert (tmp_path / "results" / sweeps.WORK / failure[0] / "executed.ipynb").exists()
    assert "1 ran, 1 failed" in sweeps.summary(sweep, tmp_path / "results", report)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters:\n  rat: 1\n", r"line 3: 05_some.ipynb has no parameter 'rat'; it has profile, rate, seed"),
        ("data: {name: cifar100}\n", r"line 2: 'data' does not go with a notebook"),
    ],
)
def test_mistakes_in_a_notebooks_sweep(tmp_path: Path, notebook: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid.read(sweep_file(tmp_path, "notebook: 05_some.ipynb\n" + text))


# --- the command, with real training ---


def test_the_command_from_dry_run_to_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = str(tmp_path / "results")
    arguments = ["sweep", str(TINY), "--profile", "smoke", "--results", results]
    assert main([*arguments, "--dry-run", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"6 of 6 to run, 0\.\d\d hours with 2 at a time", out)
    assert "unknown length" not in out
    assert not (tmp_path / "results").exists()
    assert main([*arguments, "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "6 ran" in out
    assert re.search(r"smooth k=2 margin=1 tau=0.5 +2 +0\.\d+ ± \S+ ", out)
    assert main(arguments) == 0
    assert "6 had a record" in capsys.readouterr().out
    assert main([*arguments[:-4], "--results", results, "--dry-run"]) == 0
    assert re.search(r"6 of 12 to run, 0\.\d\d hours", capsys.readouterr().out)
    frame = records.load(results)
    assert frame["data_fingerprint"].nunique() == 1
    assert frame["top1"].between(0.0, 1.0).all()
    assert main(["records", "check", results]) == 0


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main(["sweep", str(TINY), "--workers", "0"]) == 2
    assert main(["sweep", str(TINY), "--address", "auto"]) == 2
    assert "--address goes with --engine ray" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["swep"])
