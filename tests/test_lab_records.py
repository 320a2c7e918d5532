"""Records: keys, the schema, atomic writes, stale checks and merges; and what seeds allow to say."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lab_stubs
import numpy as np
import pytest

from topk.lab import probe, records, statistics
from topk.lab.__main__ import main

CONFIG: dict[str, Any] = {
    "data": {"name": "synthetic/mixtures", "classes": 6},
    "model": {"name": "linear"},
    "loss": {"name": "smooth", "k": 3, "tau": 0.5},
    "training": {"epochs": 2},
    "seed": 1,
}


def config(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CONFIG), **parts}


def written(folder: Path, seed: int = 1, **changes: Any) -> dict[str, Any]:
    """A record in a folder, changed after it was written."""
    path = records.write(folder, config(seed=seed), lab_stubs.result(seed), "smoke")
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(record))
    return record


def test_keys_are_of_the_completed_configuration() -> None:
    key = records.key(CONFIG)
    assert len(key) == 20
    assert records.key(records.complete(CONFIG)) == key
    assert records.key(dict(reversed(CONFIG.items()))) == key
    assert records.key(config(loss={"tau": 0.5, "k": 3.0, "name": "smooth", "margin": 1})) == key, "1 is 1.0"
    assert records.key(config(training={"epochs": 2, "momentum": 0.9})) == key, "a default written out"
    others = [config(seed=2), config(training={"epochs": 3}), config(loss={"name": "smooth", "k": 3})]
    assert len({key, *map(records.key, others)}) == 4


def test_keys_are_the_same_in_every_process() -> None:
    """The digits are fixed: another way to hash would lose every record there is."""
    code = f"from topk.lab import records; print(records.key({CONFIG!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == records.key(CONFIG)
    assert records.key_of_completed({"seed": 1, "loss": {"k": {5: 1.0}}}) == "d266b69951a19a435226"


def test_several_k_read_back_from_json_have_the_same_key() -> None:
    whole = config(loss={"name": "smooth", "k": {1: 0.5, 3: 0.5}})
    assert records.key(json.loads(json.dumps(whole))) == records.key(whole)


@pytest.mark.parametrize("bad", [{"los": {}}, {"loss": {"name": "smooth", "taus": 1.0}}, {"training": {"epoch": 1}}])
def test_unknown_settings_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"los|taus|epoch"):
        records.key(config(**bad))


def test_plain_values() -> None:
    value = {"a": np.float32(0.5), 5: (1.0, np.int64(3), np.array([1.5, np.nan])), "b": True, "c": None}
    assert records.plain(value) == {"a": 0.5, "5": [1, 3, [1.5, None]], "b": True, "c": None}
    with pytest.raises(ValueError, match="two keys"):
        records.plain({1: 0, "1": 0})
    with pytest.raises(TypeError, match=r"x\.a must be made of"):
        records.plain({"a": object()}, "x")
    with pytest.raises(ValueError, match="more than"):
        records.plain([[0] * 1000] * 1000)


def test_a_record_comes_back_as_a_row(tmp_path: Path) -> None:
    path = records.write(tmp_path, CONFIG, lab_stubs.result(1), "smoke")
    assert [item.name for item in tmp_path.iterdir()] == [path.name], "nothing temporary is left"
    (row,) = records.load(tmp_path).to_dict("records")
    assert row["key"] == path.stem == records.key(CONFIG)
    assert (row["loss.name"], row["loss.k"], row["seed"], row["data.classes"]) == ("smooth", 3, 1, 6)
    assert (row["top1"], row["top5"], row["profile"]) == (0.51, 0.9, "smoke")
    assert row["label"] == "smooth k=3 margin=1 tau=0.5"
    assert np.isnan(row["groups.few.top5"])
    epochs = records.load(tmp_path, epochs=True)
    assert epochs["epoch"].tolist() == [1, 2]
    assert epochs["top1"].tolist() == [0.3, 0.51]


def test_a_record_tells_where_it_comes_from(tmp_path: Path) -> None:
    record = records.read(records.write(tmp_path, CONFIG, lab_stubs.result()))
    source = record["provenance"]
    assert source["versions"].keys() >= {"python", "torch", "topk", "numpy"}
    assert source["hardware"]["cores"] >= 1
    text = json.dumps(record)
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema",), 2, "schema 2 was written by a newer version"),
        (("schema",), "1", "schema must be a number"),
        (("key",), "0" * 20, "key must be the file's name"),
        (("config", "seed"), 7, "key must be the configuration's hash"),
        (("more",), 1, "unknown keys: more"),
        (("result", "epochs"), {}, r"result\.epochs must be a list"),
        (("result", "final", "top1"), float("nan"), r"result\.final\.top1 must be numbers, text or null, got nan"),
        (("result", "seconds"), -1, r"result\.seconds must be a number, at least 0, got -1"),
        (("result", "data_fingerprint"), "../x", r"data_fingerprint must be hex"),
        (("result", "parameters"), 1.5, r"result\.parameters must be a count"),
        (("probe", "gradient"), [None], r"probe\.gradient must be a list of numbers"),
        (("provenance", "threads"), None, r"provenance\.threads must be a count"),
        (("provenance", "extra"), 1, "provenance has unknown keys: extra"),
        (("others",), [{}], r"others\[0\] lacks provenance, result"),
    ],
)
def test_a_record_that_breaks_the_schema_is_refused(
    tmp_path: Path, place: tuple[str, ...], value: Any, message: str
) -> None:
    record = written(tmp_path)
    part = record
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    path = next(tmp_path.glob("*.json"))
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as caught:
        records.load(tmp_path)
    assert path.name in str(caught.value)


def test_a_truncated_record_is_named(tmp_path: Path) -> None:
    path = records.write(tmp_path, CONFIG, lab_stubs.result())
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=f"{path.name} is no record"):
        records.keys_of_today(tmp_path)
    assert path.name in records.check(tmp_path)


def test_an_older_schema_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = written(tmp_path)
    monkeypatch.setattr(records, "SCHEMA", 2)
    with pytest.raises(ValueError, match="schema 1 is no longer read"):
        records.load(tmp_path)
    monkeypatch.setitem(records.MIGRATIONS, 1, lambda old: {**old, "probe": None})
    assert records.read(tmp_path / f"{record['key']}.json")["probe"] is None


def test_a_record_from_before_a_setting_was_added_is_found_under_todays_key(tmp_path: Path) -> None:
    record = written(tmp_path)
    del record["config"]["training"]["clip"]
    record["key"] = records.key_of_completed(record["config"])
    next(tmp_path.glob("*.json")).unlink()
    (tmp_path / f"{record['key']}.json").write_text(json.dumps(record))
    assert records.keys_of_today(tmp_path) == {records.key(CONFIG)} != {record["key"]}
    assert "another key" in next(iter(records.check(tmp_path).values()))


def test_a_record_that_is_there_stays(tmp_path: Path) -> None:
    records.write(tmp_path, CONFIG, lab_stubs.result(1))
    records.write(tmp_path, CONFIG, lab_stubs.result(5))
    assert records.load(tmp_path)["top1"].tolist() == [0.51]


def _write_many(folder: Path) -> None:
    for number in range(200):
        records.write_json(folder / "one.json", {"number": number, "text": "x" * 20_000})


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    """Two processes write one file again and again, and one of them is killed at any moment."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers) and seen < 300:
        if (tmp_path / "one.json").exists():
            assert len(json.loads((tmp_path / "one.json").read_text())["text"]) == 20_000
            seen += 1
    for writer in writers:
        writer.kill()
        writer.join()
    assert seen
    json.loads((tmp_path / "one.json").read_text())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write_json(tmp_path / "a.json", {"number": 1})

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        records.write_json(tmp_path / "a.json", {"number": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"number": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "cross_entropy"},
        {"name": "smooth", "k": {1: 0.5, 30: 0.5}},
        {"name": "transition", "k": 5},
        {"name": "noised", "k": 5, "margins": "class"},
        {"name": "differentiable", "k": 5},
        {"name": "hinge", "k": 5},
        {"name": "ldam"},
        {"name": "focal"},
    ],
    ids=lambda loss: loss["name"],
)
def test_the_probe_tells_losses_and_keywords_apart(loss: dict[str, Any]) -> None:
    full = records.complete(config(loss=loss, data={"name": "cifar100"}))
    first = probe.probe(full)
    assert first is not None
    assert first == probe.probe(json.loads(json.dumps(full))), "the same from a record, and every time"
    assert any(first["gradient"])
    other = dict(full["loss"]) | ({"gamma": 1.0} if loss["name"] == "focal" else {})
    other |= {"scale": 2.0} if "scale" in other else {"label_smoothing": 0.2} if "label_smoothing" in other else {}
    other |= {"k": 4} if "k" in other else {}
    assert probe.difference(first, probe.probe({**full, "loss": other})) is not None


def test_a_changed_loss_makes_records_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = written(tmp_path)
    assert main(["records", "check", str(tmp_path)]) == 0
    assert "1 records are sound, 0 are not" in capsys.readouterr().out
    for change, stale in ((0.5e-5, False), (2e-5, True)):
        gradient = list(record["probe"]["gradient"])
        gradient[3] += change
        written(tmp_path, probe={**record["probe"], "gradient": gradient})
        assert main(["records", "check", str(tmp_path)]) == int(stale)
    out = capsys.readouterr().out
    assert f"{record['key']}.json: stale: on the probe the loss differs by 0, its gradient by 2e-05" in out


def _folder(path: Path, *seeds: int, **changes: Any) -> Path:
    for seed in seeds:
        written(path, seed, **changes)
    return path


def _contents(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in records.paths(folder)}


def test_merge_adds_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = _folder(tmp_path / "a", 1, 2), _folder(tmp_path / "b", 3)
    mine = _contents(a)
    assert main(["records", "merge", str(a), str(b)]) == 0
    assert capsys.readouterr().out == "1 added, 0 combined, 0 already there\n"
    assert _contents(a) == mine | _contents(b)
    assert records.merge(a, b) == {"added": 0, "combined": 0, "already there": 1}
    assert records.merge(tmp_path / "new", a)["added"] == 3
    assert _contents(tmp_path / "new") == _contents(a)


def _dated(record: dict[str, Any], date: str) -> dict[str, Any]:
    return {**record["provenance"], "date": date}


def test_merge_keeps_both_provenances_and_the_older_numbers(tmp_path: Path) -> None:
    first = written(tmp_path / "a")
    first = written(tmp_path / "a", provenance=_dated(first, "2026-01-01T00:00:00+00:00"))
    result = {**first["result"], "final": {"top1": 0.7}}
    second = written(tmp_path / "b", provenance=_dated(first, "2026-01-02T00:00:00+00:00"), result=result)
    _folder(tmp_path / "a2", 1, provenance=first["provenance"])
    _folder(tmp_path / "b2", 1, provenance=second["provenance"], result=result)
    assert records.merge(tmp_path / "a", tmp_path / "b") == {"added": 0, "combined": 1, "already there": 0}
    records.merge(tmp_path / "b2", tmp_path / "a2")
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b2"), "in either direction"
    (record,) = _contents(tmp_path / "a").values()
    assert record["result"] == first["result"]
    (other,) = record["others"]
    assert other["result"]["final"] == {"top1": 0.7}
    assert other["provenance"] == second["provenance"]
    assert records.merge(tmp_path / "a", tmp_path / "b")["already there"] == 1, "merging twice changes nothing"
    assert len(records.load(tmp_path / "a")) == 1


def test_merge_refuses_conflicts_whole(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", 1, 2), _folder(tmp_path / "b", 1, 2, 3)
    record = written(b, 1)
    written(b, 1, result={**record["result"], "data_fingerprint": "cd"})
    record = written(b, 2)
    written(b, 2, probe={**record["probe"], "loss": record["probe"]["loss"] + 1})
    before = _contents(a)
    with pytest.raises(ValueError, match=r"(?s)nothing was merged.*the data differed.*the loss differs by 1") as caught:
        records.merge(a, b)
    assert str(caught.value).count("\n") == 2
    assert _contents(a) == before


def test_merge_reads_all_before_it_writes(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", 1), _folder(tmp_path / "b", 2, 3)
    max(records.paths(b)).write_text("{")
    with pytest.raises(ValueError, match="is no record"):
        records.merge(a, b)
    assert len(records.paths(a)) == 1


def test_show_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = written(tmp_path)
    assert main(["records", "show", str(tmp_path)]) == 0
    assert "smooth k=3 margin=1 tau=0.5" in capsys.readouterr().out
    assert main(["records", "show", str(tmp_path), record["key"][:5]]) == 0
    assert json.loads(capsys.readouterr().out) == record
    assert main(["records", "show", str(tmp_path / "none")]) == 2
    assert "is no folder of records" in capsys.readouterr().err


# --- statistics ---


@pytest.mark.parametrize(
    ("probability", "freedom", "known"),
    [(0.975, 1, 12.7062047364), (0.975, 2, 4.3026527297), (0.975, 4, 2.7764451052), (0.995, 9, 3.2498355416)],
)
def test_student_quantiles_of_the_tables(probability: float, freedom: int, known: float) -> None:
    assert statistics.t_quantile(probability, freedom) == pytest.approx(known, abs=1e-9)
    assert statistics.t_quantile(1 - probability, freedom) == pytest.approx(-known, abs=1e-9)


def test_student_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for freedom in (1, 2, 3, 4, 7, 10, 29, 200, 1001):
        for probability in (0.05, 0.5, 0.6, 0.9, 0.975, 0.9995):
            expected = stats.t.ppf(probability, freedom)
            assert statistics.t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_intervals_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = np.random.default_rng(3).normal(0.7, 0.02, 12)
    found = statistics.t_interval(values.tolist(), 0.9)
    expected = stats.t.interval(0.9, 11, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high, found.count) == (*map(pytest.approx, expected), 12)
    found = statistics.bootstrap_interval(values.tolist())
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=4e-4)
    assert found == statistics.bootstrap_interval(values.tolist()), "the same every time"


def test_intervals_of_few_values() -> None:
    for values, mean, count in (([], np.nan, 0), ([0.5], 0.5, 1), ([np.nan, 0.5], 0.5, 1)):
        for method in statistics.METHODS:
            found = statistics.interval(values, method=method)
            assert np.isnan([found.low, found.high]).all()
            assert found.count == count
            assert found.mean == pytest.approx(mean, nan_ok=True)
    with pytest.raises(ValueError, match="method must be one of t, bootstrap, got 'z'"):
        statistics.interval([1.0], method="z")
    with pytest.raises(ValueError, match=r"confidence must lie between 0 and 1, got 95"):
        statistics.interval([1.0], 95)


def test_an_interval_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(0, 1, (2000, 5))
    covered = [found.low < 0 < found.high for found in map(statistics.t_interval, draws.tolist())]
    assert 0.93 < np.mean(covered) < 0.97


def _study(tmp_path: Path) -> Any:
    """Smooth leads cross-entropy by 0.02 and a little on each seed, which scatter far more; seed 3 has no partner."""
    for noise in (0.0, 0.4):
        for seed in range(4):
            base = 0.5 + 0.1 * seed - noise / 2
            data = {"name": "synthetic/mixtures", "classes": 6, "noise": noise}
            parts = {"seed": seed, "data": data}
            smooth = lab_stubs.result() | {"final": {"top1": base + 0.02 + 0.001 * (seed % 2)}}
            records.write(tmp_path, config(**parts), smooth)
            if seed < 3:
                plain = lab_stubs.result() | {"final": {"top1": base}}
                records.write(tmp_path, config(**parts, loss={"name": "cross_entropy"}), plain)
    return records.load(tmp_path)


def test_aggregate_over_seeds(tmp_path: Path) -> None:
    frame = _study(tmp_path)
    table = statistics.aggregate(frame, ["label", "data.noise"], "top1").set_index(["data.noise", "label"])
    row = table.loc[(0.0, "cross_entropy label_smoothing=0")]
    assert (row["mean"], row["count"]) == (pytest.approx(0.6), 3)
    assert row["high"] - row["mean"] == pytest.approx(4.30265273 * 0.1 / 3**0.5)
    with pytest.raises(ValueError, match=r"seed 0 occurs twice; the runs differ in .*data\.noise"):
        statistics.aggregate(frame, ["label"], "top1")


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    frame = _study(tmp_path).sample(frac=1, random_state=0)
    table = statistics.paired(frame, "top1", ["data.noise"])
    assert set(table["data.noise"]) == {0, 0.4}
    for _, row in table.iterrows():
        assert (row["count"], row["unpaired"]) == (3, 1)
        assert row["mean"] == pytest.approx(0.02 + 0.001 / 3)
        assert row["high"] - row["low"] < 0.003, "the seeds' scatter cancels"
    with pytest.raises(ValueError, match="occurs twice"):
        statistics.paired(frame, "top1")
