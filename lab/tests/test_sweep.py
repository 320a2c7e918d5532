"""Sweeps: what they ask for, that nothing is lost or done twice, what is chosen, gathered and reproduced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from topk_lab import __main__ as command
from topk_lab import records, sweep, train

LAB = Path(__file__).parents[1]
MINI: dict[str, Any] = {
    "data": {"name": "sample", "fraction": 0.1},
    "model": {"name": "linear"},
    "training": {"epochs": 1, "batch": 200, "optimizer": "adamw", "evaluate_every": 0},
    "seeds": [0, 1, 2],
    "tuning": {
        "data": {"validation": 5},
        "seeds": [1000, 1001],
        "candidates": 2,
        "search": {"training.learning_rate": {"log": [1e-3, 1e-1]}},
    },
    "contenders": [
        {"loss": {"name": "cross_entropy"}},
        {"loss": {"name": "smooth", "k": {1: 0.5, 5: 0.5}}, "search": {"loss.tau": {"log": [0.1, 10]}}},
    ],
    "profiles": {"smoke": {"seeds": [0]}},
}


@pytest.fixture(autouse=True)
def _own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPK_RESULTS", str(tmp_path / "results"))


def mini(**over: Any) -> sweep.Sweep:
    return sweep.Sweep.model_validate({**MINI, **over})


# --- what is asked for ---


def test_candidates_of_a_random_search_fill_their_ranges_and_are_common_to_all() -> None:
    axes = {"training.learning_rate": {"log": [1e-3, 1.0]}, "training.batch": [100, 200]}
    tuning = sweep.Tuning.model_validate({"candidates": 200, "search": axes})
    plain, tuned = (sweep.Contender.model_validate(item) for item in MINI["contenders"])
    one, two = sweep.candidates(tuning, plain), sweep.candidates(tuning, tuned)
    rates = np.array([values["training.learning_rate"] for values in one])
    assert rates.tolist() == [values["training.learning_rate"] for values in two]
    shares = np.log10(rates) / 3 + 1
    assert 0 <= shares.min() < 0.03
    assert 0.97 < shares.max() <= 1
    assert abs(shares.mean() - 0.5) < 0.06
    assert {values["training.batch"] for values in one} == {100, 200}
    assert len({values["loss.tau"] for values in two}) > 150


def test_lists_make_every_combination() -> None:
    tuning = sweep.Tuning.model_validate({"search": {"loss.tau": [1, 2], "training.learning_rate": [0.1]}})
    contender = sweep.Contender.model_validate({"loss": {"name": "smooth"}, "search": {"loss.tau": [3, 4, 5]}})
    assert [values["loss.tau"] for values in sweep.candidates(tuning, contender)] == [3, 4, 5]
    with pytest.raises(ValueError, match="candidates must say how many"):
        sweep.candidates(sweep.Tuning.model_validate({"search": {"loss.margin": {"log": [1, 2]}}}), contender)


@pytest.mark.parametrize(
    "wrong", [{"log": [0, 1]}, {"log": [2, 1]}, {"uniform": [0, 1], "log": [1, 2]}, {"lgo": [1, 2]}]
)
def test_ranges_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        sweep.Range.model_validate(wrong)


def test_every_condition_tunes_and_equal_tunings_are_one() -> None:
    noise = {"data.noise": [0.0, 0.4], "model": [{"name": "linear"}, {"name": "mlp", "hidden": 8}]}
    each = mini(conditions=noise)
    assert len(sweep.tuning_runs("x", each)) == 4 * 2 * 2 * 2
    once = mini(conditions=noise, tuning={**MINI["tuning"], "data": {"validation": 5, "noise": 0.4}})
    assert len(sweep.tuning_runs("x", once)) == 2 * 2 * 2 * 2
    configs = [run.config for run in sweep.tuning_runs("x", once).values()]
    assert {config.data.noise for config in configs} == {0.4}
    assert {config.model.name for config in configs} == {"linear", "mlp"}


def test_the_largest_mean_on_validation_is_chosen_and_its_settings_run() -> None:
    asked = mini(data_seed_follows=True)
    tuning = sweep.tuning_runs("x", asked)
    rows = {key: {"validation.top5": float(run.config.training.learning_rate)} for key, run in tuning.items()}
    best = max(value["validation.top5"] for value in rows.values())
    diverged = next(key for key, value in rows.items() if value["validation.top5"] == best)
    final = sweep.final_runs("x", asked, rows)
    assert len(final) == 2 * 3
    assert {run.config.training.learning_rate for run in final.values()} == {best}
    assert {(run.config.seed, run.config.data.seed, run.config.data.validation) for run in final.values()} == {
        (i, i, 0) for i in range(3)
    }
    other = sweep.final_runs("x", asked, {**rows, diverged: {}})
    assert len({run.config.training.learning_rate for run in other.values()}) == 2  # one contender lost its best
    with pytest.raises(ValueError, match="did all diverge"):
        sweep.final_runs("x", asked, {key: {} for key in rows})


def test_the_best_candidates_run_again_and_the_choice_is_among_them() -> None:
    """Four candidates; the two of the largest rates come again, longer, and there the smaller one is better."""
    then = {"candidates": 2, "seeds": [7, 8], "training": {"epochs": 3}, "data": {"fraction": 0.2}}
    asked = mini(tuning={**MINI["tuning"], "candidates": 4, "then": then})
    rows: dict[str, Any] = {}
    first, second, final = [], [], []
    for part in asked.by_contender():
        stages = sweep.stages("x", part, rows)
        first += (runs := next(stages)).values()
        rows |= {key: {"validation.top5": run.config.training.learning_rate} for key, run in runs.items()}
        second += (runs := next(stages)).values()
        rows |= {key: {"validation.top5": -run.config.training.learning_rate} for key, run in runs.items()}
        final += next(stages).values()
    rates = sorted({run.config.training.learning_rate for run in first})
    assert len(first) == 2 * 4 * 2
    assert len(second) == 2 * 2 * 2
    assert {run.config.training.learning_rate for run in second} == set(rates[2:])
    assert {run.about["sweep"] for run in second} == {"x.then"}
    assert {(run.config.seed, run.config.training.epochs, run.config.data.fraction) for run in second} == {
        (7, 3, 0.2), (8, 3, 0.2)
    }  # fmt: skip
    assert {run.config.data.validation for run in second} == {5}
    candidates = {run.config.training.learning_rate: run.about["candidate"] for run in first}
    assert all(run.about["candidate"] == candidates[run.config.training.learning_rate] for run in second)
    assert {run.config.training.learning_rate for run in final} == {rates[2]}
    assert {run.config.training.epochs for run in final} == {1}
    told = [(item["sweep"], item["runs"], item["recorded"]) for item in sweep.pending({"x": asked}, rows)]
    assert told == [("x.tuning", 16, 16), ("x.then", 8, 8), ("x", 6, 0)]
    told = [(item["sweep"], item["runs"], item["recorded"]) for item in sweep.pending({"x": asked}, {})]
    assert told == [("x.tuning", 16, 0), ("x.then", 8, 0), ("x", 6, 0)]


@pytest.mark.parametrize(
    ("numbers", "least"),
    [(("16", "18"), 800), pytest.param(("14", "15", "16", "17", "18", "19"), 5030, marks=pytest.mark.slow)],
)
def test_committed_runs_are_what_the_sweep_files_ask_for(
    numbers: tuple[str, ...], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record of a head is found by its key, and choosing again chooses what was run."""
    monkeypatch.delenv("TOPK_RESULTS")
    covered = 0
    for chapter in [name for name in records.chapters() if name[:2] in numbers]:
        frame, known = records.load(chapter), sweep.known(chapter)
        for name, asked in sweep.files_of(chapter).items():
            tuning = sweep.tuning_runs(name, asked)
            there = [known[key]["key"] for key in tuning if key in known]
            assert set(there) == set(frame.loc[frame["sweep"] == f"{name}.tuning", "key"])
            if len(there) == len(tuning):
                then = sweep.then_runs(name, asked, known)
                if not set(then) <= set(known):
                    continue
                final = [known[key]["key"] for key in sweep.final_runs(name, asked, known) if key in known]
                assert set(final) == set(frame.loc[frame["sweep"] == name, "key"])
                covered += len(there) + len(final)
    assert covered >= least


def test_a_file_says_what_it_has_instead_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "14_x.yml").write_text(yaml.safe_dump(MINI))
    path = tmp_path / "14_x.mlp.yml"
    path.write_text("base: 14_x\nmodel: {name: mlp, hidden: 8}\nseeds: [7]\n")
    (expected,) = sweep.read(tmp_path / "14_x.yml").values()
    (found,) = sweep.read(path).values()
    assert found.model_dump() == {**expected.model_dump(), "model": {"name": "mlp", "hidden": 8}, "seeds": [7]}
    path.write_text("base: 14_y\n")
    with pytest.raises(ValueError, match=r"14_x.mlp.yml: its base '14_y' is not there"):
        sweep.read(path)


def test_a_file_says_what_is_wrong_in_it(tmp_path: Path) -> None:
    path = tmp_path / "14_x.mlp.yml"
    path.write_text(yaml.safe_dump({**MINI, "contenderz": []}))
    with pytest.raises(ValueError, match=r"(?s)14_x.mlp.yml.*contenderz"):
        sweep.read(path)
    path.write_text("data: {name: sample}\nmodel: {name: linear}\ntraining: {learning_rate: 1e-3}\ncontenders: []\n")
    assert sweep.read(path)["14_x.mlp"].training["learning_rate"] == 1e-3


# --- running ---

PROGRAM = """
import json, sys
from topk_lab import sweep
sweeps = {"77_x.mini": json.loads(sys.argv[1])}
frame = sweep.records_of("77_x", sweeps, profile="full", records="run", jobs=int(sys.argv[2]))
print(len(frame))
"""


@pytest.mark.slow  # tests/test_notebooks.py kills a whole chapter, with two jobs
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_goes_on_and_does_nothing_twice(tmp_path: Path, jobs: int) -> None:
    """SIGKILL after two runs; then again until all are there."""
    scratch = tmp_path / "runs" / "77_x"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{LAB}:{LAB.parent}",
        "TOPK_RUNS": str(tmp_path / "runs"),
        "OMP_NUM_THREADS": "1",
    }
    call = [sys.executable, "-c", PROGRAM, json.dumps(MINI), str(jobs)]
    with subprocess.Popen(
        call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as first:
        while len(list(scratch.glob("*.json"))) < 2:
            assert first.poll() is None
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in scratch.glob("*.json")}
    assert 2 <= len(before) < 14
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split()[-1] == "14"  # 2 contenders x (2 candidates x 2 seeds + 3 seeds)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(scratch.glob("*.json"))) == 14
    assert not list(scratch.glob("work/*"))


@pytest.fixture
def ray_of_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster on this machine, a core a node; its workers find the lab, and save where this test looks."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed: make test-cluster")
    import ray

    paths = {"PYTHONPATH": os.pathsep.join(map(str, (LAB, LAB.parent))), "TOPK_CACHE": str(tmp_path / "cache")}
    for name, value in paths.items():
        monkeypatch.setenv(name, value)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, runtime_env={"env_vars": paths})
    yield ray
    ray.shutdown()
    cluster.shutdown()


def test_ray_runs_a_sweep_on_every_node_and_goes_on_from_what_is_there(
    ray_of_two_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sweep with another engine: the same rows, but for when and how long; what has a record runs nowhere."""
    asked = {"77_x.mini": {**MINI, "seeds": [0, 1]}}
    ran = sweep.records_of("77_x", asked, records="run", engine="ray", jobs=2)
    assert len(ran) == 2 * (2 * 2 + 2)
    assert len(list(sweep.scratch("77_x").glob("*.json"))) == len(ran)
    alive = [node for node in ray_of_two_nodes.nodes() if node["Alive"]]
    assert len(alive) == 2
    again = sweep.records_of("77_x", asked, records="run", engine="ray", jobs=2)
    assert set(again["date"]) == set(ran["date"])
    monkeypatch.setenv("TOPK_RUNS", str(sweep.scratch("77_x").parent / "local"))
    local = sweep.records_of("77_x", asked, records="run", jobs=1)
    columns = ["key", "sweep", "contender", "top1", "top5", "nll"]
    assert local[columns].to_dict("records") == ran[columns].to_dict("records")


def test_the_front_door_runs_gathers_and_reads_the_same_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.records_of("77_x").empty
    ran = sweep.records_of("77_x", {"77_x.mini": MINI}, profile="smoke", records="run", jobs=1)
    assert ran["sweep"].value_counts().to_dict() == {"77_x.mini.tuning": 8, "77_x.mini": 2}
    assert set(ran["notebook"]) == {"77_x.ipynb"}
    assert json.loads(ran["notebook_parameters"][0]) == {"profile": "smoke", "records": "run"}
    tuned = ran[ran["sweep"] == "77_x.mini.tuning"].groupby(["contender", "candidate"])["validation.top5"].mean()
    for contender, rate in ran[ran["sweep"] == "77_x.mini"].set_index("contender")["training.learning_rate"].items():
        of_it = ran[(ran["contender"] == contender) & (ran["candidate"] == tuned[contender].idxmax())]
        assert set(of_it["training.learning_rate"]) == {rate}
    assert sweep.gather("77_x", {"77_x.mini": mini(data={"name": "sample"})})[1] == 0  # of another size: no result
    path, new = sweep.gather("77_x", {"77_x.mini": mini().at("smoke")})
    assert new == 10
    assert not list(sweep.scratch("77_x").glob("*.json"))
    committed = sweep.records_of("77_x")
    assert set(committed["key"]) == set(ran["key"])
    assert [item["recorded"] for item in records.sweeps("77_x")] == [8, 2]
    again = sweep.records_of("77_x", {"77_x.mini": MINI}, profile="smoke", records="run")
    assert set(again["date"]) == set(ran["date"])  # nothing ran
    assert sweep.gather("77_x", {}) == (path, 0)
    with pytest.raises(ValueError, match="records must be"):
        sweep.records_of("77_x", {}, records="comitted")


def test_a_run_that_two_sweeps_ask_for_is_done_once_and_belongs_to_both() -> None:
    asked = {"77_x.mini": MINI, "77_x.other": {**MINI, "tuning": {**MINI["tuning"], "metric": "validation.top1"}}}
    ran = sweep.records_of("77_x", asked, profile="smoke", records="run", jobs=1)
    assert ran["sweep"].value_counts()[
        ["77_x.mini.tuning", "77_x.other.tuning", "77_x.mini", "77_x.other"]
    ].tolist() == [8, 8, 2, 2]
    assert len(list(sweep.scratch("77_x").glob("*.json"))) == ran["key"].nunique() < len(ran)
    for _ in range(2):  # gathered again, nothing changes
        sweep.gather("77_x", {name: sweep.Sweep.model_validate(each).at("smoke") for name, each in asked.items()})
        columns = ["key", "sweep"]
        found = sweep.records_of("77_x")[columns]
        assert sorted(found.to_numpy().tolist()) == sorted(ran[columns].to_numpy().tolist())
    sweep.gather("77_x", {})
    assert records.load("77_x", sweep="77_x.other")["key"].is_unique


def test_a_contender_is_done_before_the_next_begins() -> None:
    asked = {"77_x": mini()}
    sweep.records_of("77_x", {"77_x": mini().by_contender()[0]}, records="run", jobs=1)
    told = {item["sweep"]: (item["runs"], item["recorded"]) for item in sweep.pending(asked, sweep.known("77_x"))}
    assert told == {"77_x.tuning": (8, 4), "77_x": (6, 3)}
    assert sweep.gather("77_x", asked)[1] == 7
    assert sweep.records_of("77_x")["sweep"].value_counts().to_dict() == {"77_x.tuning": 4, "77_x": 3}


def test_a_run_that_diverges_is_a_result_and_another_candidate_is_chosen() -> None:
    how = {**MINI["training"], "optimizer": "sgd"}
    tuning = {"data": {"validation": 5}, "search": {"training.learning_rate": [1e38, 0.1]}}
    asked = {**MINI, "training": how, "tuning": tuning, "seeds": [0], "contenders": [{"loss": {"name": "smooth"}}]}
    ran = sweep.records_of("77_x", {"77_x": asked}, records="run", jobs=1)
    assert "at step" in ran["failure"].dropna().iloc[0]
    assert ran.loc[ran["sweep"] == "77_x", "training.learning_rate"].tolist() == [0.1]
    assert len(sweep.known("77_x")) == 3


def test_what_fails_is_told_and_what_ended_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails(config: Any, **about: Any) -> records.Row:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no such luck")
        return {"key": config.key, "validation.top5": 0.5}

    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(RuntimeError, match=r"1 of 4 runs failed, 3 are saved(.|\n)*no such luck"):
        sweep.records_of("77_x", {"77_x": MINI}, records="run", jobs=1)
    assert len(list(sweep.scratch("77_x").glob("*.json"))) == 3 + 4 + 3, "the other contender is done"


def test_a_chapter_can_be_its_own_experiment() -> None:
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"errors": [0.1, 0.2]}

    for _ in range(2):
        result, row = sweep.result_of("77_x", compute, parameters={"profile": "smoke"}, records="run")
    assert len(calls) == 1
    assert result == {"errors": [0.1, 0.2]}
    assert row["notebook"] == "77_x.ipynb"
    sweep.gather("77_x", {})
    assert sweep.result_of("77_x", compute, parameters={"profile": "smoke"})[0] == result
    assert len(calls) == 1


# --- reproducing ---


@pytest.fixture
def recorded() -> list[records.Row]:
    asked = {**MINI, "tuning": None, "seeds": [0, 1, 2, 3], "contenders": MINI["contenders"][:1]}
    sweep.records_of("77_x", {"77_x": asked}, records="run", jobs=1)
    sweep.gather("77_x", {"77_x": sweep.Sweep.model_validate(asked)})
    return records.rows_of(records.load("77_x"))


def test_a_record_is_reproduced_to_the_last_digit_here(
    recorded: list[records.Row], capsys: pytest.CaptureFixture[str]
) -> None:
    found = sweep.reproduce("77_x", recorded[1]["key"][:8])
    assert "to the last digit" in capsys.readouterr().out
    assert found["holds"].all()
    assert (found["low"] == found["high"]).all()
    assert {"top5", "nll", "macro_top1", "candidates_99", "train.loss"} <= set(found["metric"])
    assert command.main(["reproduce", "77_x", recorded[1]["key"]]) == 0
    with pytest.raises(ValueError, match="no record of 77_x"):
        sweep.reproduce("77_x", "nothing")


def test_elsewhere_it_must_lie_among_the_other_seeds_and_that_is_said_first(
    recorded: list[records.Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write("77_x", [{**row, "data_fingerprint": "of features extracted then"} for row in recorded], [])

    def trained(config: Any, **about: Any) -> records.Row:
        assert "data_fingerprint differ: comparing by the 99% interval over 4 runs" in capsys.readouterr().out
        return {**recorded[0], "top5": recorded[0]["top5"] + 0.5}

    monkeypatch.setattr(train, "train", trained)
    found = sweep.reproduce("77_x", recorded[1]["key"]).set_index("metric")
    assert not found.loc["top5", "holds"]
    assert found.drop("top5")["holds"].all()
    spread = np.std([row["top1"] for row in recorded], ddof=1)
    half = max(5.8409 * spread * np.sqrt(1.25), 1e-3)  # the 99.5 % quantile of Student's t with 3 degrees of freedom
    assert found.loc["top1", "high"] - found.loc["top1", "low"] == pytest.approx(2 * half, rel=1e-4)
    records.write("77_x", [{**recorded[0], "data_fingerprint": "other"}], [])
    with pytest.raises(ValueError, match="only 1 seeds"):
        sweep.reproduce("77_x", recorded[0]["key"])


# --- the command ---


def test_the_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "77_x.yml"
    path.write_text(yaml.safe_dump({**MINI, "tuning": None, "seeds": [0]}))
    assert command.main(["sweep", str(path), "--dry-run"]) == 0
    assert "2 runs, 0 have a record" in capsys.readouterr().out
    assert command.main(["sweep", str(path), "--jobs", "1"]) == 0
    assert "2 runs have their records" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert command.main(["gather", "77_x"]) == 0
    assert command.main(["check", "77_x"]) == 0
    assert "2 records, 0 stale" in capsys.readouterr().out
    assert command.main(["data", "imagenet64"]) == 1
