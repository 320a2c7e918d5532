"""The benchmark tells the truth: wrong contenders get no number, a killed run goes on, memory claims hold."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import topk
from bench import __main__ as command
from bench import contenders as bench_contenders
from bench import gpu, partner, runner, suites, summary, tables
from bench.contenders import CONTENDERS, CROSS_ENTROPY, PLAIN_COPY, TWO_PROCESSES, Setting, contenders
from bench.suites import Suite
from topk.autograd import Loss
from topk_lab import figures
from topk_lab.records import load as load_records
from topk_lab.study import benchmarks, timing
from topk_lab.study.timing import CpuClock, CudaClock, NoReplayError, clock_of, in_turns, peak_temporaries, quantiles

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "smooth": topk.smooth_topk_loss,
    "transition": topk.transition_topk_loss,
}
SMOOTH = next(c for c in CONTENDERS if c.name == "topk smooth")


def quick(*settings: Setting) -> Suite:
    """A suite of these settings that takes no time."""
    return Suite(lambda: list(settings), seconds=0.01)


# --- who runs, and the gate ------------------------------------------------------------------------------------------


def changed(times: float, where: str) -> Callable[[Setting, torch.device], Any]:
    """The smooth loss with its value or its gradient multiplied."""

    def build(setting: Setting, device: torch.device) -> Any:
        def call(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = topk.smooth_topk_loss(x, y, setting.k)
            other = loss.detach() if where == "gradient" else loss
            return times * loss + (1 - times) * other if where == "gradient" else times * loss

        return call

    return build


def test_a_wrong_contender_is_refused() -> None:
    setting = Setting("smooth", 4, 30, 3)
    replace(SMOOTH, name="right", build=changed(1.0, "loss")).gate(setting)
    for where in ("loss", "gradient"):
        wrong = replace(SMOOTH, name="wrong", build=changed(1.001, where))
        with pytest.raises(AssertionError, match=f"wrong is wrong at smooth 4x30 k=3: its {where} is off by"):
            wrong.gate(setting)


def test_a_noisy_contender_with_too_much_noise_is_refused() -> None:
    noised = next(c for c in CONTENDERS if c.name == "topk noised")
    setting = Setting("noised", 4, 30, 3)
    noised.gate(setting)
    wrong = replace(noised, build=lambda s, d: noised.build(replace(s, epsilon=1.5), d))
    with pytest.raises(AssertionError, match="is wrong at noised"):
        wrong.gate(setting)


def test_contenders_say_why_they_sit_out() -> None:
    missing = replace(SMOOTH, needs=("no_such_package",))
    assert missing.why_not(Setting("smooth", 1, 2, 1)) == "no_such_package is not installed"
    small = replace(SMOOTH, largest=10)
    assert "too slow" in str(small.why_not(Setting("smooth", 10, 10, 1)))
    single = replace(SMOOTH, types=("float32",))
    assert "float16" in str(single.why_not(Setting("smooth", 1, 2, 1, dtype="float16")))
    triton = next(c for c in CONTENDERS if c.name == "topk smooth triton")
    assert "interpreted" in str(triton.why_not(Setting("smooth", 1, 2, 1)))
    known = {"any", CROSS_ENTROPY, *suites.FAMILIES, *suites.RELATIVES, *suites.OPERATORS}
    assert {c.family for c in CONTENDERS} == known
    assert len({(c.family, c.name) for c in CONTENDERS}) == len(CONTENDERS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", suites.FAMILIES)
def test_every_contender_passes_its_gate(family: str, dtype: str) -> None:
    setting = Setting(family, 16, 100, 5, dtype=dtype)
    present = contenders(setting)
    assert {CROSS_ENTROPY, "copy", PLAIN_COPY, f"topk {family}"} <= {c.name for c in present}
    for contender in present:
        contender.gate(setting)


@pytest.mark.parametrize("family", suites.OPERATORS)
def test_operators_pass_their_gates(family: str) -> None:
    """Each against its formula, and so do the Sinkhorn iterations and difftopk's network beside it."""
    setting = Setting(family, 16, 30, 5)
    for contender in (c for c in contenders(setting) if c.family == family):
        contender.gate(setting)


@pytest.mark.parametrize("family", suites.RELATIVES)
def test_relatives_pass_their_gates(family: str) -> None:
    setting = Setting(family, 16, 100, 5)
    (ours,) = (c for c in contenders(setting) if c.family == family)
    ours.gate(setting)
    wrong = replace(ours, build=lambda setting, device: lambda x, y: 1.01 * ours.build(setting, device)(x, y))
    with pytest.raises(AssertionError, match="is wrong"):
        wrong.gate(setting)


@pytest.fixture(scope="module", autouse=True)
def _no_partner_is_left() -> Iterator[None]:
    """A group of two processes would make other tests wait for the second."""
    yield
    if partner.partner.cache_info().currsize:
        partner.partner().close()


@pytest.mark.parametrize("family", [*suites.FAMILIES, CROSS_ENTROPY])
def test_last_layers_pass_their_gates(family: str) -> None:
    setting = Setting(family, 16, 100, 5, features=8)
    present = contenders(setting)
    assert {f"F.linear + {family}", f"topk linear_loss {family}"} <= {c.name for c in present}
    for contender in present:
        contender.gate(setting)
        features, target = setting.problem(16)
        assert contender.work(setting, features.requires_grad_(), target)().shape == (16, 8)
    two = f"{TWO_PROCESSES} {family}" in {c.name for c in present}
    assert two == (family != "noised")


def test_long_rows_are_gated_in_full() -> None:
    """An error that only rows beyond the first 500 classes show."""

    def build(setting: Setting, device: torch.device) -> Any:
        return lambda x, y: topk.smooth_topk_loss(x[:, :1500], y.clamp(max=1499), setting.k)

    with pytest.raises(AssertionError, match="is wrong"):
        replace(SMOOTH, build=build).gate(Setting("smooth", 4, 2000, 5))


@pytest.mark.slow
def test_compiled_contenders_pass_their_gates() -> None:
    setting = Setting("smooth", 4, 100, 5)
    compiled = [c for c in contenders(setting, compiled=True) if c.compiled]
    assert [c.name for c in compiled] == ["cross_entropy compiled", "topk smooth compiled"]
    for contender in compiled:
        contender.gate(setting)


def test_suites_ask_for_what_the_goals_are_about() -> None:
    cells = suites.gpu()
    large = [s for s in cells if s.batch * s.classes >= 64e6]
    assert {s.family for s in large} == set(suites.FAMILIES)
    assert {("smooth", 5), ("smooth", 50), ("transition", 5)} <= {(s.family, s.k) for s in large}
    assert any(s.samples == 10 for s in large if s.family == "noised")
    assert {s.classes for s in cells} >= {100, 1_048_576}
    assert {s.k for s in cells} >= {1, 5, 100}
    assert {s.dtype for s in cells} == {"float32", "bfloat16", "float16"}
    assert {s.family for s in cells if (s.batch, s.classes, s.k) == (256, 1000, 5)} == set(suites.FAMILIES)
    for name, suite in suites.SUITES.items():
        listed = suite.settings()
        assert len(listed) == len(set(listed)), name


# --- clocks ----------------------------------------------------------------------------------------------------------


def test_turns_alternate_and_stop() -> None:
    calls: list[str] = []
    clock = CpuClock()
    works = {name: functools.partial(calls.append, name) for name in "abc"}
    times = in_turns(clock, works, seconds=0.0, rounds=(3, 9))
    assert "".join(calls) == "abccbaabc"
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abc", 3)
    calls.clear()
    in_turns(clock, works, seconds=60.0, rounds=(3, 4))
    assert len(calls) == 12


def test_quantiles() -> None:
    found = quantiles([float(v) for v in range(10, 0, -1)])
    assert found == {"p20_ms": 3.0, "p50_ms": 6.0, "p80_ms": 9.0, "min_ms": 1.0}
    assert timing.gigabytes_per_second(3e9, 1000.0) == 3.0


def test_cpu_clock() -> None:
    clock = CpuClock()
    assert 5 <= clock.time(lambda: time.sleep(0.005)) < 500
    assert clock.peak(lambda: torch.empty(1000)) == 4000
    assert clock.peak(lambda: None) <= 1
    clock._other_data.fill_(1)
    clock.time(lambda: None)
    assert not clock._other_data.any(), "the caches are overwritten before every call"
    assert clock._other_data.numel() > 2**24
    calls: list[int] = []
    CpuClock(warm=True).time(lambda: calls.append(len(calls)))
    assert calls == [0, 1], "warm: the second of two calls in a row"
    with pytest.raises(NoReplayError, match="no graphs"):
        clock.replay(lambda: None)
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        clock_of("meta")


class FakeCuda:
    """What the clock asks of torch.cuda, with a device time that only moves when something runs."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.alive, self.peak, self.log = 0.0, 100, 0, list[str]()
        self.tick = tick  # what every event takes
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.log.append("replay"))
        self.graph = lambda graph: contextlib.nullcontext()

    def run(self, milliseconds: float, bytes_needed: int = 0) -> None:
        self.log.append("work")
        self.now += milliseconds
        self.peak = max(self.peak, self.alive + bytes_needed)

    def get_device_properties(self, device: Any) -> Any:
        return SimpleNamespace(L2_cache_size=1000)

    def get_device_name(self, device: Any) -> str:
        return "Fake H1"

    def synchronize(self, device: Any) -> None:
        self.log.append("wait")

    def reset_peak_memory_stats(self, device: Any) -> None:
        self.peak = self.alive

    def memory_allocated(self, device: Any) -> int:
        return self.alive

    def max_memory_allocated(self, device: Any) -> int:
        return self.peak

    def current_stream(self, device: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def Stream(self, device: Any) -> Any:  # noqa: N802
        return self.current_stream(device)

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            self.log.append("event")
            self.now += self.tick
            event.at = self.now

        event.record = record
        event.elapsed_time = lambda end: end.at - event.at
        return event


def test_cuda_clocks_arithmetic_on_a_fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    clock = CudaClock(CPU, cuda)
    flushed = clock._other_data
    assert flushed.numel() >= 2 * 1000, "the flush does not cover the cache"
    monkeypatch.setattr(clock, "_other_data", SimpleNamespace(zero_=lambda: cuda.log.append("flush")))
    assert clock.time(lambda: cuda.run(2.5)) == 2.5
    assert cuda.log == ["flush", "wait", "event", "work", "event", "wait"]
    assert clock.peak(lambda: cuda.run(1.0, bytes_needed=70)) == 70
    cuda.log.clear()
    replay = clock.replay(lambda: cuda.run(1.0))
    assert cuda.log == ["work"] * 4 + ["replay", "wait"]
    replay()
    assert cuda.log[-1] == "replay"
    assert clock.facts()["processor"] == "Fake H1"


def test_graphs_have_columns_of_their_own() -> None:
    """A device with graphs, all of whose times are one tick."""
    rows = runner.measure(Setting("hinge", 4, 20, 2), CudaClock(CPU, FakeCuda(tick=0.5)), seconds=0.0)
    assert {row["contender"] for row in rows} == {CROSS_ENTROPY, "copy", PLAIN_COPY, "topk hinge"}
    for row in rows:
        assert row["graph_note"] == row["note"] == ""
        assert row["graph_p20_ms"] == row["graph_p50_ms"] == row["p50_ms"] == "0.5"
        assert row["graph_times_cross_entropy"] == "1.000"


def test_a_capture_that_fails_says_why() -> None:
    def synchronises() -> None:
        raise RuntimeError("\noperation not permitted when stream is capturing\nmore")

    clock = CudaClock(CPU, FakeCuda())
    with pytest.raises(NoReplayError, match=r"^RuntimeError: operation not permitted when stream is capturing$"):
        clock.replay(synchronises)


def test_registers_and_spills_are_read_from_what_a_launch_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from bench.kernels import watched_launches
    from topk.kernels import common

    class Kernel:
        __name__ = "_forward"

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **options: SimpleNamespace(n_regs=40, n_spills=2)

    with watched_launches() as told:
        common.launch(Kernel(), 3, torch.empty(1), warps=4)
    assert told == ["forward: 40 registers, 2 spilled"]


# --- records ---------------------------------------------------------------------------------------------------------


def test_records_are_kept_and_resumed(tmp_path: Path) -> None:
    settings = [Setting("hinge", 4, 20, 2), Setting("smooth", 4, 20, 2)]
    path = runner.run_suite("smoke", quick(*settings[:1]), tmp_path)
    first = runner.read(path)
    assert {row["contender"] for row in first} >= {CROSS_ENTROPY, "copy", "topk hinge"}
    for clock in ("", "warm_"):
        quantiles_of = [[float(row[f"{clock}p{p}_ms"]) for p in (20, 50, 80)] for row in first]
        assert all(0 < low <= middle <= high for low, middle, high in quantiles_of)
    assert all(row["commit"] and row["torch"] == torch.__version__ and row["processor"] for row in first)
    assert all(int(row["peak_bytes"]) > 0 for row in first if row["contender"] != PLAIN_COPY)
    for row in first:
        passes = 2 if row["contender"] == PLAIN_COPY else 3
        expected = passes * 4 * 20 * 4 / (float(row["p50_ms"]) * 1e6)
        assert math.isclose(float(row["gbps"]), expected, rel_tol=0.02, abs_tol=0.006)
        assert row["graph_note"] == "a CPU has no graphs"
        assert row["graph_p50_ms"] == ""
    assert runner.run_suite("smoke", quick(*settings), tmp_path) == path
    both = runner.read(path)
    assert both[: len(first)] == first, "what had a record was measured again"
    assert len(both) > len(first)
    assert "topk smooth" in summary.table(path)
    assert not list(path.parent.glob("*.tmp"))


def test_a_run_out_of_time_stops_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = quick(Setting("hinge", 4, 20, 2))
    path = runner.run_suite("smoke", suite, tmp_path, minutes=0.0)
    assert runner.read(path) == []
    assert "goes on from here" in capsys.readouterr().out
    assert runner.read(runner.run_suite("smoke", suite, tmp_path, minutes=5.0))


def test_a_failure_leaves_a_note_and_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(setting: Setting, device: torch.device) -> Any:
        def call(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory\nand more")

        return call

    present = [
        next(c for c in CONTENDERS if c.name == CROSS_ENTROPY),
        replace(SMOOTH, build=changed(1.1, "loss")),
        replace(SMOOTH, name="a peer", build=breaks),
    ]
    monkeypatch.setattr(runner, "contenders", lambda *_: present)
    path = runner.run_suite("smoke", quick(Setting("smooth", 4, 20, 2)), tmp_path)
    rows = {row["contender"]: row for row in runner.read(path)}
    assert rows["a peer"]["note"] == "RuntimeError: out of memory"
    assert "is wrong at smooth" in rows["topk smooth"]["note"]
    assert rows["topk smooth"]["p50_ms"] == rows["topk smooth"]["times_cross_entropy"] == ""
    assert [row["contender"] for row in runner.timed(runner.read(path))] == [CROSS_ENTROPY]
    assert [row["contender"] for row in runner.wrong(path)] == ["topk smooth"]
    assert "out of memory" in summary.table(path)
    assert len(benchmarks.measured(tables.read(path), "cpu")) == 1


def test_a_setting_that_failed_is_tried_again_after_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lost context must not mark what comes after it as done for ever."""
    settings = [Setting("hinge", 4, 20, 2), Setting("smooth", 4, 20, 2)]
    order: list[str] = []

    def measured(setting: Setting, clock: Any, seconds: float, compiled: bool) -> list[dict[str, Any]]:
        order.append(setting.family)
        note = "CUDA error" if len(order) == 1 else ""
        return [{"contender": f"topk {setting.family}", "note": note, "p50_ms": "" if note else "1.0"}]

    monkeypatch.setattr(runner, "measure", measured)
    runner.run_suite("smoke", quick(settings[0]), tmp_path)
    path = runner.run_suite("smoke", quick(*settings), tmp_path)
    assert order == ["hinge", "smooth", "hinge"]
    assert sorted(row["contender"] for row in runner.read(path)) == ["topk hinge", "topk smooth"]
    assert runner.wrong(path) == []
    runner.run_suite("smoke", quick(*settings), tmp_path)
    assert len(order) == 3


def test_a_running_mean_and_its_variance() -> None:
    values = torch.randn(7, 3, dtype=torch.float64)
    mean = bench_contenders._Mean()
    for value in values:
        mean.add(value)
    torch.testing.assert_close(mean.mean, values.mean(0))
    torch.testing.assert_close(mean.variance_of_mean, values.var(0) / 7)


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_script_for_a_gpu_runs_dry(tmp_path: Path, alone: bool) -> None:
    """All steps, interpreted; none fails, and what is missing here is said. `alone`: in the processes it starts.

    Otherwise those that import torch are one, this one, but for a loss's, and the script starts what needs no torch.
    """
    steps = ["versions", "losses", "sanitizer", "benchmark", "training"]
    if alone:
        assert gpu.main(["--dry", "--out", str(tmp_path), *steps]) == 0
    else:
        inside = ["--inside", "--dry", "--out", str(tmp_path), "--commit", "x", "--seconds", "300"]
        for words in (["versions"], ["measure", "300"], ["training"]):
            assert gpu.main([*inside, *words]) == 0
        steps = ["losses", "sanitizer"]
        assert gpu.main(["--dry", "--out", str(tmp_path), "--commit", "x", *steps]) == 0
    told = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["step"] for row in told if "finished" in row] == steps
    assert all(row["finished"] for row in told if "finished" in row)
    assert all(row["ok"] for row in told if row["step"] in ("measure", "training"))
    assert any(row.get("copy_gbps", 0) > 0 for row in told)
    assert [row["ok"] for row in told if row["step"] == "loss"] == [True]
    assert all(row["lacks"] for row in told if row.get("ok", True) is None)
    assert (tmp_path / "benchmark.csv").stat().st_size > 0
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 8


def test_a_step_ends_with_its_time(tmp_path: Path) -> None:
    """It is killed, whatever it waits for, and says so."""
    assert gpu.main(["--dry", "--out", str(tmp_path), "--seconds", "0.01", "tests"]) == 1
    told = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert told[-1]["finished"] is False
    assert told[-1]["seconds"] < 30
    assert "not done" in told[0]["summary"][0]


def test_devices_never_share_a_folder() -> None:
    gpu = SimpleNamespace(device=torch.device("cuda"), facts=lambda: {"processor": "NVIDIA H200"})
    assert runner.machine(gpu) == "nvidia-h200"
    assert runner.machine(clock_of("cpu")) != "nvidia-h200"
    assert runner.machine(clock_of("cpu")).endswith(f"{torch.get_num_threads()}-threads")


def test_older_records_are_read_and_kept(tmp_path: Path) -> None:
    """A file with fewer columns, as the first versions wrote it, resumes and keeps its numbers."""
    setting = Setting("hinge", 4, 20, 2)
    path = runner.run_suite("smoke", quick(setting), tmp_path)
    new = runner.read(path)
    older = [name for name in runner.COLUMNS if not name.startswith(("graph_", "warm_"))]
    older = [name for name in older if name not in ("gbps", "kernels", "note", "processor", "driver", "triton")]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, older, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(new)
    runner.run_suite("smoke", quick(setting, Setting("smooth", 4, 20, 2)), tmp_path)
    rows = runner.read(path)
    assert [row["p50_ms"] for row in rows[: len(new)]] == [row["p50_ms"] for row in new]
    assert rows[0]["graph_p50_ms"] == rows[0]["warm_p50_ms"] == rows[0]["processor"] == ""
    assert len(rows) > len(new)


def test_the_gpu_suite_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--suite", "gpu", "--out", str(tmp_path)]) == command.NO_DEVICE == 2
    assert "sees none here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert command.main(["show", "--out", str(tmp_path)]) == 1


def test_the_package_carries_the_committed_records(tmp_path: Path) -> None:
    packed = tmp_path / "again.parquet"
    assert tables.pack(runner.RESULTS, packed) > 0
    found = load_records(benchmarks.CHAPTER)
    assert found.equals(pd.read_parquet(packed)), "run: python -m bench ship"
    assert len(benchmarks.load()) + len(benchmarks.last_layers()) == len(found)


def made_up(device: str, times: dict[str, float], **problem: Any) -> list[dict[str, str]]:
    setting = Setting(**{"family": "smooth", "batch": 64, "classes": 1000, "k": 5, **problem})
    cell = {name: str(getattr(setting, name)) for name in Setting.__dataclass_fields__}
    size = setting.batch * setting.classes * 4
    return [
        {**cell, "suite": "s", "contender": name, "p50_ms": str(ms), "p20_ms": str(ms), "p80_ms": str(ms),
         "peak_bytes": str(2 * size), "score_bytes": str(size), "device": device, "threads": "1", "load": "0"}
        for name, ms in times.items()
    ]  # fmt: skip


@pytest.fixture
def records(tmp_path: Path) -> Any:
    """A table of made-up times whose ratios are known."""
    rows = []
    for n in (100, 1000, 10_000):
        times = {CROSS_ENTROPY: 1.0 * n, PLAIN_COPY: 0.5 * n, "topk smooth": 2.0 * n, "difftopk smooth": 8.0 * n}
        rows += made_up("cuda", {**times, "topk smooth triton": 0.8 * n}, classes=n)
    for k in (1, 10):
        rows += made_up("cuda", {CROSS_ENTROPY: 1.0, "topk smooth": 3.0, "difftopk smooth": 1.5}, k=k)
    path = tmp_path / "fake-gpu" / "gpu.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, runner.COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return benchmarks.measured(tables.read(path), "cuda")


def test_ratios_of_the_tidy_table(records: Any) -> None:
    thousand = records[(records["classes"] == 1000) & (records["k"] == 5)].set_index("contender")
    assert thousand.loc["topk smooth triton", "times_ce"] == pytest.approx(0.8)
    assert thousand.loc[PLAIN_COPY, "gbps"] == pytest.approx(2 * 64 * 1000 * 4 / (500 * 1e6))
    assert thousand.loc["topk smooth", "gbps"] == pytest.approx(3 * 64 * 1000 * 4 / (2000 * 1e6))
    assert (thousand["copy_gbps"] == thousand.loc[PLAIN_COPY, "gbps"]).all()
    assert set(benchmarks.ours(thousand.reset_index())["contender"]) == {"topk smooth triton"}
    peers = benchmarks.against_peers(records)
    assert sorted(peers["faster"].round(3)) == [0.5, 0.5, 10.0, 10.0, 10.0]
    lost = benchmarks.slower(records)
    assert sorted(lost["times"].round(3)) == [2.0, 2.0, 3.0, 3.0]
    assert set(lost["k"]) == {1, 10}
    assert set(benchmarks.sweep(records, "smooth", "classes")["classes"]) == {100, 1000, 10_000}
    assert set(benchmarks.sweep(records, "smooth", "k")["k"]) == {1, 5, 10}
    assert len(benchmarks.sweep(records, "hinge", "k")) == 0


def test_the_usual_problem_on_every_machine() -> None:
    rows = benchmarks.by_machine(benchmarks.load())
    expected = {"machine", "measured", "calibrated hinge", *benchmarks.FAMILIES} - {"hinge"}
    assert expected in [set(row) for row in rows]
    peers = benchmarks.usual(benchmarks.against_peers(benchmarks.measured(benchmarks.load(), "cpu")))
    assert {"smooth", "noised"} <= set(peers["family"])


def test_the_summary_tells_both_clocks(tmp_path: Path) -> None:
    cold = {CROSS_ENTROPY: 1.0, "topk smooth": 4.0, "difftopk smooth": 80.0}
    warm = {CROSS_ENTROPY: "0.5", "topk smooth": "3.0", "difftopk smooth": "75.0"}
    rows = made_up("cpu", cold, batch=256)
    for row in rows:
        row["times_cross_entropy"] = str(float(row["p50_ms"]) / cold[CROSS_ENTROPY])
    path = tmp_path / "a-machine" / "headline.csv"
    path.parent.mkdir()

    def last_line() -> str:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, runner.COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
        return summary.summary(path).splitlines()[-1]

    assert last_line().startswith("| smooth | 4.0 | 20.0 (difftopk) |")
    for row in rows:
        row["warm_p50_ms"] = warm[str(row["contender"])]
        row["warm_times_cross_entropy"] = str(float(warm[str(row["contender"])]) / 0.5)
    assert last_line().startswith("| smooth | 4.0 / 6.0 | 20.0 / 25.0 (difftopk) |")
    peers = benchmarks.against_peers(benchmarks.measured(tables.read(path), "cpu"))
    assert (float(peers["faster"].iloc[0]), float(peers["warm_faster"].iloc[0])) == (20.0, 25.0)


def test_figures_draw_the_table(records: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, Any]] = []
    monkeypatch.setattr(figures, "show", lambda figure, alt, data: drawn.append((alt, data)))
    benchmarks.time_and_memory(records, "smooth", "classes")
    benchmarks.ratio_to_cross_entropy(records, "classes")
    benchmarks.ratio_to_peers(records, "words")
    benchmarks.bandwidth(records, "words")
    (_, times), (_, ratios), (_, peers), (_, bandwidths) = drawn
    assert times["time, ms: topk smooth"][1] == "2000 [2000, 2000]"
    assert ratios["smooth"] == pytest.approx([0.8, 0.8, 0.8])
    assert peers["smooth"] == pytest.approx([10, 10, 10, 0.5, 0.5])
    assert len(bandwidths[""]) == 5
    assert [alt for alt, _ in drawn[2:]] == ["words", "words"]
    assert all("smooth" in alt or "cross-entropy" in alt for alt, _ in drawn[:2])


# --- memory ----------------------------------------------------------------------------------------------------------


def _gradient(loss: Callable[..., torch.Tensor], scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss(scores, target), scores)[0]


@pytest.mark.parametrize("family", ["smooth", "transition"])
def test_temporaries_stay_below_twice_the_scores(family: str) -> None:
    for rows, classes in ((256, 1000), (64, 20_000)):
        scores, target = torch.randn(rows, classes), torch.randint(classes, (rows,))
        tracked = scores.clone().requires_grad_()
        size = scores.numel() * scores.element_size()
        loss = LOSSES[family]
        assert peak_temporaries(functools.partial(loss, scores, target)) <= 2 * size
        # Forward and backward together: the gradient itself, and no more than the scores once beside it.
        assert peak_temporaries(functools.partial(_gradient, loss, tracked, target)) <= 2 * size


@pytest.mark.parametrize("family", ["smooth", "transition"])
def test_what_is_kept_for_backward_grows_with_k_alone(family: str) -> None:
    loss: Loss = importlib.import_module(f"topk.losses.{family}").LOSS
    assert loss.forward is not None
    kept = {}
    for classes in (1000, 10_000):
        for k in (5, 20):
            scores, target = torch.randn(3, classes), torch.arange(3)
            _, *saved = loss.forward(scores, target, loss.options([k], [1.0], 1.0, 0.0))
            kept[classes, k] = sum(part.numel() for part in saved) / 3
    assert kept[1000, 5] == kept[10_000, 5]
    assert kept[1000, 20] == kept[10_000, 20] <= 10 * 20 + 10


def test_the_readmes_table_is_the_record() -> None:
    """The README prints one machine's record, named below the table, and nothing by hand."""
    readme = (ROOT / "README.md").read_text()
    named = re.search(r"`(bench/results/[^`<]+/headline\.csv)`", readme)
    assert named, "the README names no record"
    assert summary.summary(ROOT / named.group(1)) in readme


def test_the_readmes_sentence_on_more_classes_is_the_record() -> None:
    with (ROOT / "bench/results/intel-r-xeon-r-processor-2-threads/cpu.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["batch"], row["k"]) == ("256", "5")]

    def ratio(family: str, classes: int) -> str:
        (found,) = (
            float(row["times_cross_entropy"])
            for row in rows
            if row["contender"] == f"topk {family}" and int(row["classes"]) == classes
        )
        return f"{found:.1f} times"

    sentence = (
        f"of 256 rows with 10,000 classes the transition loss takes {ratio('transition', 10_000)} "
        f"cross-entropy's time, "
        f"the smooth one {ratio('smooth', 10_000)}, and with 100,000 classes {ratio('transition', 100_000)} and "
        f"{ratio('smooth', 100_000)}."
    )
    assert sentence in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.slow
def test_two_hundred_thousand_classes() -> None:
    """64 x 200,000, k = 20 works; time grows like n, and at most like k."""

    def seconds(classes: int, k: int) -> float:
        scores, target = torch.randn(64, classes, requires_grad=True), torch.randint(classes, (64,))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            (gradient,) = torch.autograd.grad(topk.smooth_topk_loss(scores, target, k), scores)
            times.append(time.perf_counter() - start)
        assert gradient.isfinite().all()
        assert math.isclose(float(gradient.sum()), 0.0, abs_tol=1e-3)
        return min(times)

    large = seconds(200_000, 20)
    assert large / seconds(50_000, 20) <= 1.5 * 4
    assert seconds(100_000, 40) / seconds(100_000, 10) <= 1.5 * 4


# --- on a GPU --------------------------------------------------------------------------------------------------------

LARGEST_MISS = 2.0  # how far two measurements of one thing on a shared device may be apart


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", suites.FAMILIES)
def test_every_contender_passes_its_gate_on_the_gpu(family: str, dtype: str) -> None:
    for classes in (100, 20_000):
        setting = Setting(family, 16, classes, 5, dtype=dtype)
        for contender in contenders(setting, "cuda"):
            contender.gate(setting, "cuda")


@pytest.mark.gpu
def test_the_cuda_clock() -> None:
    clock = clock_of("cuda")
    source, destination = torch.ones(2, 2**28, dtype=torch.int8, device="cuda")  # larger than any cache
    once, four_times = clock.time, lambda: [destination.copy_(source) for _ in range(4)]
    copy = functools.partial(destination.copy_, source)
    copy()
    one = min(once(copy) for _ in range(5))
    assert 4 / LARGEST_MISS < min(once(four_times) for _ in range(5)) / one < 4 * LARGEST_MISS
    assert clock.peak(lambda: torch.empty(2**20, device="cuda")) == 4 * 2**20
    assert min(once(clock.replay(copy)) for _ in range(5)) < one * LARGEST_MISS
    assert clock.facts()["driver"] != "unknown"
    small = torch.ones(1000, device="cuda")
    with pytest.raises(NoReplayError):
        clock.replay(lambda: small.sum().item())
    assert clock.time(copy) > 0, "a failed capture breaks the device"


@pytest.mark.gpu
def test_a_setting_measured_on_the_gpu(tmp_path: Path) -> None:
    suite = Suite(lambda: [Setting("transition", 64, 1000, 5)], "cuda", 0.2)
    rows = {row["contender"]: row for row in runner.read(runner.run_suite("gpu", suite, tmp_path))}
    assert rows["topk transition triton"]["note"] == ""
    assert re.search(r"forward: \d+ registers, \d+ spilled", rows["topk transition triton"]["kernels"])
    assert float(rows["topk transition triton"]["graph_p50_ms"]) <= float(rows["topk transition triton"]["p50_ms"])
    assert all(row["device"] == "cuda" and row["driver"] and row["processor"] for row in rows.values())
