"""Tables of records: what goes in comes out, whole or not at all; what is stale is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from topk_lab import losses, records, train

from configurations import small  # isort: skip


@pytest.fixture(scope="module")
def run() -> records.Row:
    config = small({"name": "smooth", "k": {1: 0.5, 5: 0.5}})
    return train.train(config, progress=False, threads=1, sweep="77_x.mini", profile="smoke", notebook="77_x.ipynb")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOPK_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def test_a_row_comes_back_from_scratch_file_and_table_as_it_was(run: records.Row, tables: Path) -> None:
    records.save(run, tables / "scratch.json")
    assert records.restore(tables / "scratch.json") == run
    about = [{"sweep": "77_x.mini", "runs": 2, "recorded": 1, "command": "c"}]
    records.write("77_x", [run], about)
    assert records.chapters() == ["77_x"]
    assert records.sweeps("77_x") == about
    (back,) = records.rows_of(records.load("77_x"))
    there = {name: value for name, value in run.items() if value is not None}
    assert back.keys() == there.keys()
    assert all(np.array_equal(back[name], value) for name, value in there.items())


def test_a_row_says_everything(run: records.Row) -> None:
    assert run["loss.k"] == '{"1": 0.5, "5": 0.5}'
    assert records.k_of(run["loss.k"]) == {1: 0.5, 5: 0.5}
    assert records.k_of("5") == 5
    config = json.loads(run["config"])
    assert config["loss"]["tau"] == run["loss.tau"] == 1
    assert run["key"] == records.key_of(config)
    assert run["seed"] == 3
    ranks = np.frombuffer(run["ranks"], dtype=np.uint8)
    assert len(ranks) == run["rows"] == 2000
    for k in (1, 5, 20):
        assert (ranks < k).mean() == run[f"top{k}"] == run["curve"][k - 1]
    assert (ranks < run["candidates_99"]).mean() >= 0.99 > (ranks < run["candidates_99"] - 1).mean()
    assert run["probe.gradient"][0] != 0
    assert {
        "commit",
        "date",
        "threads",
        "hardware.cpu",
        "versions.torch",
        "validation.top5",
        "train.loss",
    } <= run.keys()


def test_load_selects(run: records.Row, tables: Path) -> None:
    rows = [{**run, "key": f"{i}", "seed": i, "sweep": "a" if i % 2 else "b"} for i in range(4)]
    records.write("77_x", rows, [])
    assert records.load("77_x", sweep="a")["seed"].tolist() == [1, 3]
    assert records.load("77_x", where={"seed": [0, 1], "sweep": "b"})["seed"].tolist() == [0]
    assert records.load("78_y").empty
    assert records.ranks_of(records.load("77_x")).shape == (4, 2000)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        records.write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.glob(".*.part")) == []


def test_a_setting_of_two_types_becomes_text(run: records.Row, tables: Path) -> None:
    records.write("77_x", [{**run, "loss.weight": "balanced"}, {**run, "key": "2", "loss.weight": 2.0}], [])
    assert set(records.load("77_x")["loss.weight"]) == {'"balanced"', "2"}


def test_keys_do_not_depend_on_how_numbers_are_written() -> None:
    assert records.key_of({"k": {5: 1}, "x": 1.0}) == records.key_of({"x": 1, "k": {"5": 1.0}})
    assert records.key_of({"x": 1}) != records.key_of({"x": 2})
    assert records.plain(np.float32(0.5)) == 0.5
    assert records.plain(float("nan")) is None


def test_a_record_whose_loss_changed_is_stale(run: records.Row, tables: Path) -> None:
    records.write("77_x", [run, {**run, "key": "moved", "probe.loss": run["probe.loss"] * (1 + 3e-5)}], [])
    found = losses.stale(records.load("77_x"))
    assert list(found) == ["moved"]
    assert "differs by 3e-05" in found["moved"]


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_no_committed_record_is_stale(step: int) -> None:
    """Every tenth of each chapter's, or all."""
    tables = {chapter: records.load(chapter) for chapter in records.chapters()}
    assert sum(map(len, tables.values())) >= 5121
    found = {chapter: losses.stale(table[::step]) for chapter, table in tables.items()}
    assert {chapter: keys for chapter, keys in found.items() if keys} == {}
