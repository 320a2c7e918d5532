"""What part IV stands on: components, the sample, tuning, reproduction, shipped records, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from topk.lab import cache, components, data, experiments, grid, records, reproduce, sample, shipped, sweeps, tuning
from topk.lab.__main__ import main
from topk.lab.training import train

ROOT = Path(__file__).parents[1]


# --- components and sample ---


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A set of 10 features in a cache of its own, its training split in two parts."""
    monkeypatch.setenv("TOPK_DATA", str(tmp_path / "cache"))
    draw = np.random.default_rng(3)
    mixing = draw.normal(size=(10, 10)) * np.geomspace(3, 0.1, 10)
    splits = {}
    for part, rows in (("train-0", 60), ("train-1", 40), ("test", 30)):
        splits[part] = ((draw.normal(size=(rows, 10)) @ mixing + 5).astype(np.float32), draw.integers(4, size=rows))
    data.store("clouds", splits, [f"class {label}" for label in range(4)], origin={"weights": "ab" * 32})
    return "clouds"


def test_components_are_those_of_the_singular_values(features: str) -> None:
    name = components.reduce(features, 3)
    whole, found = (data.load({"name": "features", "set": item}) for item in (features, name))
    centred = whole.train.inputs - whole.train.inputs.mean(0, dtype=np.float64)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ directions[:3].T / np.sqrt((values[:3] ** 2).mean() / 100)
    signs = np.sign((expected * found.train.inputs).sum(0))
    np.testing.assert_allclose(found.train.inputs, expected * signs, atol=2e-5)
    assert (found.train.inputs**2).mean() == pytest.approx(1, abs=1e-5)
    test = (whole.test.inputs - whole.train.inputs.mean(0, dtype=np.float64)) @ directions[:3].T
    np.testing.assert_allclose(found.test.inputs, test * signs / np.sqrt((values[:3] ** 2).mean() / 100), atol=2e-5)
    assert (found.train.labels == whole.train.labels).all()
    entry = cache.read(name)
    assert entry is not None
    assert [part["name"] for part in entry.about["parts"]["train"]] == ["train-0", "train-1"]


def test_components_know_where_they_come_from(features: str) -> None:
    name = components.reduce(features, 3)
    origin = cache.read(name).about["origin"]  # type: ignore[union-attr]
    assert origin["weights"] == "ab" * 32
    assert origin["components"] == 3
    assert set(origin["features"]) == {"train-0", "train-1", "test"}
    assert components.reduce(features, 3) == name
    with pytest.raises(ValueError, match="another set under the name"):
        components.reduce(features, 4, name=name)
    with pytest.raises(ValueError, match="must name a set of features"):
        components.reduce("nowhere")
    with pytest.raises(ValueError, match="at most the 10 features, got 11"):
        components.reduce(features, 11)


def test_the_sample_is_real_data_with_its_origin() -> None:
    found = data.load({"name": "sample"})
    assert found.train.inputs.shape == (6000, 64)
    assert found.test.inputs.shape == (2000, 64)
    assert (np.bincount(found.train.labels) == 60).all()
    assert (np.bincount(found.test.labels) == 20).all()
    assert found.classes[:2] == ("apple", "aquarium_fish")
    assert found.superclass is not None
    assert len(sample.read().about["origin"]["weights"]) == 64
    spread = found.train.inputs.std(0)
    assert (np.diff(spread) < 0.1).all(), "components by falling variance"
    assert shipped.size_of() <= shipped.LARGEST


def test_the_sample_is_made_from_components(features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TRAINING", 5), ("TEST", 2), ("COMPONENTS", 3)):
        monkeypatch.setattr(sample, name, value)
    with pytest.raises(ValueError, match="components or more, got 'clouds'"):
        sample.make(features, tmp_path / "sample.npz")
    name = components.reduce(features, 4)
    sample.make(name, tmp_path / "sample.npz")
    stored = np.load(tmp_path / "sample.npz", allow_pickle=False)
    levels, labels = stored["train_levels"], stored["train_labels"]
    assert levels.shape == (20, 3)
    assert (np.bincount(labels) == 5).all()
    whole = data.load({"name": "features", "set": name}).train
    for row, label in zip(levels * stored["scale"], labels, strict=True):
        same = np.abs(whole.inputs[whole.labels == label][:, :3] - row).max(1)
        assert same.min() <= stored["scale"].max() / 2 + 1e-6


# --- grids and tuning ---

TUNING = """\
data: {name: synthetic/mixtures, classes: 6, rows: 30, test_rows: 20, validation: 10}
model: {name: linear}
training: {epochs: 2, batch: 32, evaluate_every: 0}
seed: 100
grid:
  - {loss: [cross_entropy], training.learning_rate: [1.0e-4, 0.3]}
  - {loss: [{name: smooth, k: 2}], loss.tau: [0.5, 1.0], training.learning_rate: [0.3]}
final:
  metric: top1
  data: {validation: 0}
  grid: {seed + data.seed: [0, 1]}
"""


def test_a_list_of_grids_and_axes_that_set_several_things(tmp_path: Path) -> None:
    path = tmp_path / "x.yml"
    path.write_text(
        TUNING.partition("grid:")[0]
        + "grid:\n  - {loss: [focal], seed + data.seed: [3, 4]}\n"
        + "  - run: [{loss: {name: smooth, k: 2}, training: {learning_rate: 0.2}}]\n    training.momentum: [0.1, 0.2]\n"
    )
    found = [*grid.read(path).configs.values()]
    assert [(config["seed"], config["data"]["seed"]) for config in found] == [(3, 3), (4, 4), (100, 0), (100, 0)]
    assert [config["loss"]["name"] for config in found] == ["focal"] * 2 + ["smooth"] * 2
    assert [config["training"]["learning_rate"] for config in found[2:]] == [0.2, 0.2]
    assert [choice.grid for choice in grid.read(path).choices.values()] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {seed + nothing: [1]}\n", "'nothing' is no section"),
        ("grid:\n  run: [{losses: {}}]\n", "line 6: 'losses' is unknown here"),
        ("grid:\n  - [1]\n", "grid.0 must be a mapping"),
    ],
)
def test_mistakes_in_such_grids(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yml"
    path.write_text(TUNING.partition("grid:")[0] + text)
    with pytest.raises(ValueError, match=message):
        grid.read(path)


def test_tuning_chooses_by_validation_and_writes_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, results = tmp_path / "x.tuning.yml", tmp_path / "results"
    path.write_text(TUNING)
    with pytest.raises(ValueError, match="4 of 4 candidates have no record"):
        tuning.final_sweep(path, results)
    assert main(["sweep", str(path), "--results", str(results), "--workers", "1", "--final"]) == 0
    final = grid.read(tmp_path / "x.yml")
    assert len(final.configs) == 4
    by_loss = {config["loss"]["name"]: config for config in final.configs.values()}
    sweep = grid.read(path)
    for name, config in by_loss.items():
        candidates = {
            key: records.read(results / f"{key}.json")["result"]["final"]["validation"]["top1"]
            for key, other in sweep.configs.items()
            if other["loss"]["name"] == name
        }
        best = sweep.configs[max(candidates, key=lambda key: candidates[key])]
        assert config["loss"] == best["loss"]
        assert config["training"] == best["training"]
        assert config["data"]["validation"] == 0
        assert config["seed"] == config["data"]["seed"]
    assert by_loss["cross_entropy"]["training"]["learning_rate"] == 0.3
    assert len(records.paths(results)) == 8
    assert tuning.count_of_final(sweep) == 4
    capsys.readouterr()
    assert main(["choose", str(path), "--results", str(results)]) == 0
    assert "cross_entropy" in capsys.readouterr().out


def test_tuning_reads_no_test_accuracy(tmp_path: Path) -> None:
    path, results = tmp_path / "x.tuning.yml", tmp_path / "results"
    path.write_text(TUNING)
    sweep = grid.read(path)
    for number, (key, config) in enumerate(sweep.configs.items()):
        held_out = {"top1": 0.1 * number}
        metrics = {"top1": 1 - 0.1 * number, "validation": held_out}
        result = {"epochs": [], "final": metrics, "seconds": 1.0, "data_fingerprint": None, "parameters": 1}
        records.save(results, records.build(config, result))
        assert key == records.key(config)
    rate, tau = (item.settings for item in tuning.choose(sweep, results, "top1"))
    assert rate == {"training.learning_rate": 0.3}
    assert tau == {"loss.tau": 1.0, "training.learning_rate": 0.3}
    with pytest.raises(ValueError, match="metric must be one of top1, got 'top7'"):
        tuning.choose(sweep, results, "top7")


def test_unequal_budgets_are_refused(tmp_path: Path) -> None:
    path, results = tmp_path / "x.tuning.yml", tmp_path / "results"
    path.write_text(TUNING.replace("[1.0e-4, 0.3]", "[0.3]"))
    assert main(["sweep", str(path), "--results", str(results), "--workers", "1"]) == 0
    with pytest.raises(ValueError, match=r"as many candidates as every other, they have \[1, 2\]"):
        tuning.final_sweep(path, results)


# --- once more ---

SMALL: dict[str, Any] = {
    "data": {"name": "sample", "fraction": 0.2},
    "model": {"name": "linear"},
    "loss": {"name": "smooth", "k": 5},
    "training": {"epochs": 2, "batch": 100, "optimizer": "adamw", "learning_rate": 0.02, "evaluate_every": 0},
}


@pytest.fixture(scope="module")
def small_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a small run on the sample, four seeds."""
    folder = tmp_path_factory.mktemp("small")
    for seed in range(4):
        records.write(folder, {**SMALL, "seed": seed}, train({**SMALL, "seed": seed}, progress=False))
    return folder


def test_a_record_is_reproduced_to_the_last_digit(small_records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = records.paths(small_records)[0]
    assert main(["reproduce", str(path)]) == 0
    found = capsys.readouterr().out
    assert "metrics reproduced" in found
    assert all(item.then == item.now for item in reproduce.reproduce(path, exact=True) if item.then == item.then)


def test_elsewhere_a_record_is_reproduced_within_its_seeds(small_records: Path, tmp_path: Path) -> None:
    path = records.paths(small_records)[0]
    compared = {item.metric: item for item in reproduce.reproduce(path, exact=False)}
    assert all(item.holds for item in compared.values())
    top5 = [records.read(other)["result"]["final"]["top5"] for other in records.paths(small_records)]
    assert compared["top5"].low < min(top5) <= max(top5) < compared["top5"].high
    alone = tmp_path / path.name
    alone.write_text(path.read_text())
    with pytest.raises(ValueError, match="1 runs with other seeds beside it"):
        reproduce.reproduce(alone, exact=False)
    assert all(item.holds for item in reproduce.reproduce(alone, exact=False, tolerance=1e-3))


def test_a_changed_record_is_not_reproduced(small_records: Path, tmp_path: Path) -> None:
    path = records.paths(small_records)[0]
    record = json.loads(path.read_text())
    record["result"]["final"]["top5"] += 0.01
    changed = tmp_path / path.name
    changed.write_text(json.dumps(record))
    assert main(["reproduce", str(changed)]) == 1
    record["result"]["data_fingerprint"] = "00"
    changed.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="not those of the record"):
        reproduce.reproduce(changed)


# --- what is shipped, and what is said of it ---


def test_what_is_shipped_is_what_was_measured() -> None:
    found = shipped.sweeps_of(ROOT / "notebooks")
    for chapter in shipped.chapters():
        wanted = [sweep for path in found[chapter] for sweep in shipped.asked(path)]
        assert shipped.expected(chapter) == shipped.progress(ROOT / "book" / "results" / chapter, wanted), (
            f"run python -m topk.lab ship records: {chapter}"
        )
        made, there = shipped.table(ROOT / "book" / "results" / chapter, wanted), shipped.load(chapter)
        assert set(made.get("key", ())) == set(there["key"])
        if len(made):
            both = made.merge(there, on="key", suffixes=("", "_shipped"))
            for metric in [name for name in ("top1", "top5", "candidates_99", "run_seconds") if name in made]:
                np.testing.assert_allclose(both[metric], both[f"{metric}_shipped"], rtol=1e-6, atol=1e-6)


def test_packing_and_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebooks, results = tmp_path / "notebooks", tmp_path / "results"
    notebooks.mkdir()
    path = notebooks / "77_x.tuning.yml"
    path.write_text(TUNING)
    sweep = grid.read(path)
    key, config = next(iter(sweep.configs.items()))
    records.write(results / "77_x", config, train(config, progress=False))
    assert shipped.pack(results, notebooks, tmp_path / "shipped") == {"77_x": 1}
    monkeypatch.setattr(shipped.resources, "files", lambda _: tmp_path)
    assert shipped.chapters() == ["77_x"]
    frame = shipped.load("77_x")
    assert frame["key"].tolist() == [key]
    assert frame["training.top1"][0] > 0
    assert [(row["sweep"], row["runs"], row["recorded"]) for row in experiments.pending("77_x")] == [
        ("77_x.tuning", 4, 1),
        ("77_x", 4, 0),
    ]
    assert "1 records" in experiments.provenance(frame)
    with pytest.raises(ValueError, match="chapter must be one of 77_x"):
        shipped.load("78_y")


def frame_of(values: dict[str, list[float]]) -> pd.DataFrame:
    rows = [
        {"loss": loss, "seed": seed, "top5": value, "candidates_99": 30 + seed, "sweep": "s"}
        for loss, column in values.items()
        for seed, value in enumerate(column)
    ]
    return pd.DataFrame(rows)


def test_differences_are_paired_and_in_points() -> None:
    frame = frame_of({"cross-entropy": [0.5, 0.6, 0.7], "smooth": [0.51, 0.612, 0.708], "focal": [0.4, 0.7, 0.6]})
    found = experiments.differences(frame, "top5").set_index("loss")
    assert found.loc["smooth", "mean"] == pytest.approx(1.0)
    half = 4.302653 * np.std([1.0, 1.2, 0.8], ddof=1) / 3**0.5
    assert found.loc["smooth", "high"] == pytest.approx(1 + half, abs=1e-4)
    assert experiments.apart(frame, "top5") == (["smooth"], []) or half * 1.6 > 1
    assert experiments.differences(frame, "candidates_99")["mean"].tolist() == [0, 0]


def test_the_table_of_what_was_chosen() -> None:
    tuning = pd.DataFrame([
        {"loss": "smooth", "model.name": "linear", "loss.tau": tau, "loss.epsilon": 1.0, "validation.top5": value}
        for tau, value in ((0.3, 0.5), (1.0, 0.625), (3.0, 0.25))
    ])  # fmt: skip
    (row,) = experiments.tuned_rows(tuning, tuning.iloc[[1]], heads={"linear": "a linear head"})
    assert row == {
        "head": "a linear head", "loss": "smooth", "candidates": 3, "chosen": "tau 1", "worst": "25.00",
        "validation top-5, best": "62.50",
    }  # fmt: skip
    (row,) = experiments.tuned_rows(tuning.iloc[:0], tuning.iloc[[1]])
    assert (row["candidates"], row["worst"]) == (0, "pending")


def test_learning_rates_at_an_edge_are_named() -> None:
    rates = [0.01, 0.1, 1.0]
    tuning = pd.DataFrame([
        {"loss": loss, "model.name": "linear", "training.learning_rate": rate} for loss in "abc" for rate in rates
    ])  # fmt: skip
    final = tuning.iloc[[0, 4, 8]]
    text = experiments.rates_at_an_edge(tuning, final)
    assert "the smallest that was tried for a and the largest that was tried for c" in text
    assert "inside" in experiments.rates_at_an_edge(tuning, tuning.iloc[[1, 4, 7]])


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"loss.name": "cross_entropy", "loss.label_smoothing": 0.0}, "cross-entropy"),
        ({"loss.name": "cross_entropy", "loss.label_smoothing": 0.1}, "label smoothing"),
        ({"loss.name": "cross_entropy", "model.name": "cosine"}, "cross-entropy on cosines"),
        ({"loss.name": "cross_entropy", "loss.weight": "balanced"}, "weighted cross-entropy"),
        ({"loss.name": "smooth", "loss.k": "5", "loss.weight": "balanced"}, "weighted smooth"),
        ({"loss.name": "noised", "loss.k": "5", "model.name": "cosine"}, "noised on cosines"),
        ({"loss.name": "ldam", "model.name": "cosine"}, "LDAM"),
        ({"loss.name": "hinge", "loss.variant": "kth", "loss.k": 5.0}, "kth hinge"),
        ({"loss.name": "hinge", "loss.variant": "entropy", "loss.k": "5"}, "truncated entropy"),
        ({"loss.name": "smooth", "loss.k": "5"}, "smooth"),
        ({"loss.name": "smooth", "loss.k": "20"}, "smooth, k = 20"),
        ({"loss.name": "smooth", "loss.k": "0.5*1+0.5*5"}, "smooth, k = 1 and 5"),
        ({"loss.name": "differentiable", "loss.k": "0.5*1+0.5*5"}, "differentiable [.5, 0, 0, 0, .5]"),
        ({"loss.name": "differentiable", "loss.k": "1*5"}, "differentiable [0, 0, 0, 0, 1]"),
        (
            {
                "loss.name": "differentiable",
                "loss.k": "1*2",
                "loss.top1": "cross_entropy",
                "loss.cross_entropy_over": "all",
            },
            "differentiable [0, 1], cross-entropy over all",
        ),
        (
            {"loss.name": "differentiable", "loss.k": "1*2", "loss.top1": "softmax", "loss.cross_entropy_over": "all"},
            "differentiable [0, 1]",
        ),
        ({"loss.name": "noised", "loss.margins": "class", "loss.k": "5"}, "imbalanced noised"),
        ({"loss.name": "ldam", "loss.k": float("nan")}, "LDAM"),
    ],
)
def test_losses_have_readable_names(row: dict[str, Any], name: str) -> None:
    assert experiments.loss_name(row) == name


def test_metrics_have_readable_names() -> None:
    names = ("top5", "training.top1", "macro_top5", "candidates_99")
    words = ["top-5", "training top-1", "macro top-5", "candidates for 99 %"]
    assert [experiments.metric_name(name) for name in names] == words


def test_every_sweep_of_the_book_can_be_read() -> None:
    found = shipped.sweeps_of(ROOT / "notebooks")
    assert {"14_cifar100", "15_label_noise", "16_little_data", "17_long_tails", "18_imagenet", "19_sensitivity"} <= set(
        found
    )
    for path in [path for paths in found.values() for path in paths]:
        for profile in grid.PROFILES:
            assert grid.read(path, profile).configs, path


def test_evaluation_only_at_the_end(small_records: Path) -> None:
    record = records.read(records.paths(small_records)[0])
    assert [sorted(epoch) for epoch in record["result"]["epochs"]] == [["epoch", "learning_rate", "training"]] * 2
    assert sweeps.Results(small_records).known


def test_tables_list_losses_in_one_order() -> None:
    for chapter in ("14_cifar100", "16_little_data", "17_long_tails", "18_imagenet"):
        names = [loss for _, loss, _ in experiments.by_head(experiments.runs(chapter))]
        assert names[0] == "cross-entropy"
        places = [experiments._place(name) for name in dict.fromkeys(names)]
        assert places == sorted(places)
    frame = experiments.runs("16_little_data")
    heads = [head for head, _, _ in experiments.by_head(frame, ["mlp", "linear"])]
    assert heads == ["mlp"] * 5 + ["linear"] * 5
    assert sum(len(group) for _, _, group in experiments.by_head(frame, ["mlp", "linear"])) == len(frame)


def test_more_lists_read_together_need_wider_intervals() -> None:
    frame = experiments.runs("16_little_data")
    frame = frame[(frame["model.name"] == "mlp") & (frame["data.fraction"] == 0.25)]
    alone, together = (experiments.apart(frame, "top5", lists=lists) for lists in (1, 10**6))
    for narrow, wide in zip(alone, together, strict=True):
        assert set(wide) <= set(narrow)
    assert sum(map(len, together)) < sum(map(len, alone))


# --- what the decision page says -------------------------------------------------------------------------------------


def of(frame: pd.DataFrame, metric: str) -> tuple[set[str], set[str]]:
    above, below = experiments.apart(frame, metric)
    return set(above), set(below)


def test_the_decision_page_on_cifar100() -> None:
    frame = experiments.runs("14_cifar100")
    above, below = of(frame, "top5")
    assert above == {"smooth, k = 1 and 5", "differentiable [.2, .2, .2, .2, .2]"}
    assert "smooth" not in below, "level"
    assert {"transition", "noised"} <= below
    assert {loss for loss in frame["loss"] if loss.endswith("hinge")} <= below
    above, below = of(frame, "top1")
    assert not above
    assert "smooth, k = 1 and 5" not in below, "keeps top-1"
    hidden = experiments.runs("14_cifar100", "14_cifar100.mlp")
    assert not of(hidden, "top1")[0] | of(hidden, "top5")[0]
    saved = -experiments.differences(frame, "candidates_99").set_index("loss")["mean"]
    assert 0.5 < saved["transition"] < 1.5
    assert saved["transition"] < saved["smooth, k = 1 and 5"] < 3


def test_the_decision_page_on_long_tails() -> None:
    cifar = experiments.runs("17_long_tails")
    for frame in (cifar[cifar["data.imbalance"] == 100], experiments.runs("17_long_tails", "17_long_tails.imagenet")):
        mean = frame.groupby("loss")["macro_top5"].mean()
        margins, weighted = ["LDAM", "imbalanced noised"], [name for name in mean.index if name.startswith("weighted")]
        assert mean[weighted].min() > mean[margins].max(), "weights more than any margin"
        assert of(frame, "many_top5")[1] >= {"weighted cross-entropy", "weighted smooth"}, "the frequent classes pay"
        assert abs(mean["weighted smooth"] - mean["weighted cross-entropy"]) < 0.006
        first = frame.groupby("loss")["macro_top1"].mean()
        assert first["weighted smooth"] < first["weighted cross-entropy"]
        assert mean["LDAM"] > mean["imbalanced noised"] > max(mean["noised"], mean["cross-entropy"])
        assert mean["cross-entropy on cosines"] - mean["cross-entropy"] > 0.3 * (
            mean["imbalanced noised"] - mean["cross-entropy"]
        )
        assert of(frame, "few_top5")[1] >= {"noised", "smooth"}, "rare classes worse"


def leads(chapter: str, setting: str, head: str, loss: str) -> pd.DataFrame:
    """A loss's mean top-1 and top-5 less those of cross-entropy, in points, by a setting."""
    frame = experiments.runs(chapter)
    mean = 100 * frame[frame["model.name"] == head].groupby(["loss", setting])[["top1", "top5", "training.top1"]].mean()
    return mean.loc[loss] - mean.loc["cross-entropy"]


def test_the_decision_page_on_label_noise() -> None:
    smooth = leads("15_label_noise", "data.noise", "mlp", "smooth")
    assert smooth["top5"].loc[0.0] < 0 < smooth["top5"].loc[0.2]
    assert smooth["top5"].loc[:0.8].is_monotonic_increasing
    assert (smooth["top1"].loc[0.6:0.8] > 0).all()
    assert (smooth["training.top1"] < 0).all(), "memorises less"
    frame = experiments.runs("15_label_noise")
    for noise in (0.4, 0.6, 0.8, 1.0):
        assert "smooth" in of(frame[(frame["model.name"] == "mlp") & (frame["data.noise"] == noise)], "top5")[0]
    linear = frame[frame["model.name"] == "linear"]
    for noise, part in linear.groupby("data.noise"):
        above = experiments.apart(part, "top5", lists=12)[0]
        assert above == (["differentiable [.5, 0, 0, 0, .5]"] if 0 < float(noise) < 1 else [])
    assert leads("15_label_noise", "data.noise", "linear", "differentiable [.5, 0, 0, 0, .5]")["top5"].max() < 1
    assert linear["training.top1"].max() < frame.loc[frame["model.name"] == "mlp", "training.top1"].max()


def test_the_decision_page_on_little_data() -> None:
    for head, least in (("linear", 0.5), ("mlp", 1.0)):
        smooth = leads("16_little_data", "data.fraction", head, "smooth")
        assert smooth["top5"].loc[0.05] > least
        assert smooth["top5"].loc[1.0] < 0.2
        assert (smooth["top1"] < 0).all()
    mixture = leads("16_little_data", "data.fraction", "mlp", "differentiable [.5, 0, 0, 0, .5]")
    assert mixture["top5"].between(0, 1, inclusive="neither").all()


def test_the_decision_page_on_training_from_scratch() -> None:
    frame = experiments.runs("14_cifar100", "14_cifar100.small")
    assert set(frame["training.epochs"].astype(int)) == {4}
    assert set(frame.groupby("loss")["seed"].nunique()) == {3}
    gaps = experiments.differences(frame, "top5").set_index("loss")
    plain, kept = ["transition", "smooth", "noised", "differentiable [.5, 0, 0, 0, .5]"], "cross-entropy over all"
    with_all = ["smooth, k = 1 and 5", f"differentiable [.5, 0, 0, 0, .5], {kept}"]
    assert set(gaps.index) == {*plain, *with_all}
    assert (gaps.loc[plain, "high"] < 0).all()
    assert 0.5 < -gaps.loc["transition", "mean"] < 1.5
    assert (gaps.loc[plain[1:], "mean"] < -5).all()
    assert (gaps.loc[with_all, "mean"] > -3).all()


def test_the_decision_page_on_imagenet_heads() -> None:
    frame = experiments.runs("18_imagenet")
    other = {"loss.method": "splitter_selection", "loss.distribution": "cauchy", "loss.m": 16.0}
    usual = np.ones(len(frame), dtype=bool)
    for column, value in other.items():
        same = frame[column].astype(float) == value if column == "loss.m" else frame[column] == value
        usual &= (same | (frame["loss.name"] != "differentiable")).to_numpy()
    above, below = of(frame[usual], "top5")
    assert not above
    mixtures = {loss for loss in frame["loss"] if loss.startswith("differentiable") and loss != "differentiable [1]"}
    assert not below & {"smooth", "transition"}
    assert len(mixtures - below) >= 4 == len(mixtures) - 1, "most are level"
    above, worse = of(frame[usual], "top1")
    assert not above
    assert len(worse & ({"smooth", "transition"} | mixtures)) > 4
    mean = frame[usual].groupby("loss")[["top5", "candidates_99"]].mean()
    spread = mean.loc[[*sorted(mixtures), "differentiable [1]"], "top5"]
    assert 0.0028 < spread.max() - spread.min() < 0.0038, "P_K moves top-5 by a third of a point"
    mixed = frame[(frame["loss"] == "differentiable [.25, 0, 0, 0, .75]") & (frame["loss.m"].astype(float) == 16)]
    by_operator = mixed[mixed["loss.distribution"] == "cauchy"].groupby("loss.method")["top5"].mean()
    order = by_operator.sort_values(ascending=False)
    assert (order.index[0], order.index[-1]) == ("splitter_selection", "bitonic")
    assert order.iloc[0] - order.iloc[-1] < 0.0067
    assert {"neuralsort", "softsort"} <= set(order.index[1:-1])
    assert mean.loc[sorted(mixtures), "candidates_99"].min() > mean.loc["cross-entropy", "candidates_99"]


def test_the_decision_page_on_training_for_fewer_guesses() -> None:
    frame = experiments.runs("19_sensitivity")
    usual = {"loss.tau": 1.0, "loss.width": 1.0, "loss.epsilon": 1.0, "loss.samples": 5.0}
    plain = np.ones(len(frame), dtype=bool)
    for column, value in usual.items():
        plain &= (frame[column].isna() | (frame[column].astype(float) == value)).to_numpy()
    text = frame["loss.k"].map(str)
    plain &= ~text.str.contains("+", regex=False).to_numpy()
    k = text.map(lambda item: float(item.split("*")[-1]) if item != "nan" else 0.0)
    best = frame[plain].assign(k=k[plain]).groupby(["loss.name", "k"])["top5"].mean()
    for name, fewer, gain in (("smooth", 2, 0.0045), ("noised", 3, 0.0027)):
        assert best[name].idxmax() == fewer, name
        assert abs(best[name][fewer] - best[name][5] - gain) < 0.0005
        rival = frame[plain].assign(loss=k[plain].map("{:g}".format))[(frame[plain]["loss.name"] == name)]
        assert f"{fewer}" in experiments.apart(rival, "top5", baseline="5")[0]
    for name in ("differentiable", "hinge"):
        assert best[name].idxmax() == 5, name
    spread = {
        name: best[name].max() - best[name].min() for name in ("smooth", "transition", "noised", "differentiable")
    }
    assert max(spread, key=spread.__getitem__) == "transition"
    width = frame[(frame["loss.name"] == "transition") & (k == 5)].groupby("loss.width")["top5"].mean()
    assert width.idxmax() > 1.0
    for name, column in (("smooth", "loss.tau"), ("noised", "loss.epsilon"), ("transition", "loss.width")):
        own = frame[(frame["loss.name"] == name) & (k == 5)]
        if name == "noised":
            own = own[own["loss.samples"].astype(float) == 5]
        by = own.groupby(own[column].astype(float))["top5"].mean()
        assert by.max() - by.min() > 0.0075, (name, by)
        assert by[1.0] > by.min() + 0.001, (name, by)
