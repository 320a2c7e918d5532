"""One configuration, one row: keys, paired streams, what the old lab computed, going on after a kill, every model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from topk_lab import data, losses, models, train
from topk_lab.data import DataSet, Split

from configurations import small  # isort: skip

METRICS = ("top1", "top5", "nll", "ece", "validation.top5", "train.loss", "ranks", "curve")
# By the lab of version 0.1, before it was rewritten.
BEFORE: dict[str, Any] = {
    "smooth": (
        {"loss": {"name": "smooth", "k": 5}, "model": {"name": "linear"}, "data": {}},
        {"top5": 0.388, "nll": 3.798274660885334, "validation.top1": 0.16, "train.loss": 3.8526450287212026},
    ),
    "noised": (
        {
            "loss": {"name": "noised", "k": {1: 0.5, 5: 0.5}},
            "model": {"name": "mlp", "hidden": 32, "dropout": 0.1},
            "data": {"noise": 0.4, "seed": 2},
        },
        {"top5": 0.271, "nll": 4.3205941904783245, "validation.top1": 0.064, "train.loss": 2.8588538603349165},
    ),
    "ldam": (
        {"loss": {"name": "ldam"}, "model": {"name": "cosine"}, "data": {"imbalance": 10}},
        {"top5": 0.0725, "nll": 8.947984361353331, "validation.top1": 0.016, "train.loss": 20.005489349365234},
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_frozen_heads_train_as_they_did_before(name: str) -> None:
    settings, expected = BEFORE[name]
    how = {"epochs": 1, "batch": 500, "optimizer": "adamw", "schedule": "one_cycle", "learning_rate": 0.01}
    over = {"data": {"name": "sample", "validation": 5, **settings["data"]}, "model": settings["model"]}
    row = train.train({**over, "loss": settings["loss"], "training": how, "seed": 7}, progress=False)
    for metric, value in expected.items():
        assert row[metric] == pytest.approx(value, rel=2e-5, abs=6e-4 if "top" in metric else 0)


# --- the configuration ---


def test_a_key_names_every_setting_once() -> None:
    full = train.Config.model_validate(small())
    assert full.key == train.Config.model_validate(small({"name": "smooth", "tau": 1, "k": 5})).key
    assert full.key != train.Config.model_validate(small({"name": "smooth", "tau": 2})).key
    assert full.key != train.Config.model_validate(small(seed=4)).key
    mixed = {
        train.Config.model_validate(small({"name": "smooth", "k": k})).key
        for k in ({1: 0.5, 5: 0.5}, {"5": 0.5, "1": 0.5})
    }
    assert len(mixed) == 1
    assert train.Config.of_record(json.dumps(full.plain())) == train.Config.model_validate(full.plain())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "small"}}, "small"),
        ({"model": {"name": "linear", "hidden": 3}}, "hidden"),
        ({"training": {"epoch": 3}}, "epoch"),
        ({"training": {"epochs": 0}}, "epochs"),
        ({"loss": {"name": "smoth"}}, "loss.name must be one of"),
        ({"loss": {"name": "smooth", "taus": 1}}, "no keyword 'taus'"),
        ({"sead": 1}, "sead"),
    ],
)
def test_what_is_unknown_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        train.Config.model_validate({**small(), **change})


def test_settings_of_old_records_that_did_nothing_are_dropped() -> None:
    config = train.Config.model_validate(small()).plain()
    old = {**config, "training": {**config["training"], "mixup": 0, "ema": 0, "channels_last": None}}
    assert train.Config.of_record(json.dumps(old)).key == train.Config.model_validate(small()).key
    with pytest.raises(ValidationError, match="mixup"):
        train.Config.of_record(json.dumps({**old, "training": {**old["training"], "mixup": 0.2}}))


# --- streams, and going on ---


def test_runs_with_one_seed_start_alike_and_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Stop(Exception):  # noqa: N818
        pass

    def step(run: Any, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append((run.model[1].weight.detach().clone(), labels.clone()))
        raise Stop

    monkeypatch.setattr(train._Run, "_step", step)
    for loss, seed in (("smooth", 3), ("cross_entropy", 3), ("smooth", 4)):
        with pytest.raises(Stop):
            train.train(small(loss, seed=seed), progress=False)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][0], seen[2][0])
    assert not torch.equal(seen[0][1], seen[2][1])


def test_a_run_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train.train(small(), progress=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("loss", ["smooth", "noised"])
def test_a_killed_run_goes_on_to_the_same_last_bit(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(loss, model={"name": "mlp", "hidden": 16, "dropout": 0.2})
    whole = train.train(config, progress=False)
    step, steps = train._Run._step, list[int]()

    def killed(run: Any, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(run.step)
        step(run, inputs, labels)

    monkeypatch.setattr(train._Run, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, folder=tmp_path, progress=False, save_every=0)
    monkeypatch.setattr(train._Run, "_step", lambda run, *batch: (steps.append(run.step), step(run, *batch))[1])
    again = train.train(config, folder=tmp_path, progress=False)
    assert steps == list(range(10))  # nothing twice
    assert {name: again[name] for name in METRICS} == {name: whole[name] for name in METRICS}
    with pytest.raises(ValueError, match="another run"):
        train.train(small("cross_entropy"), folder=tmp_path, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where() -> None:
    with pytest.raises(train.DivergedError, match=r"'smooth' is (nan|inf).* at step \d+ of 5 in epoch 1 of 2"):
        train.train(small(training={**small()["training"], "optimizer": "sgd", "learning_rate": 1e38}), progress=False)


# --- what is measured ---


def test_noisy_validation_is_measured_on_its_labels_and_on_the_true_ones() -> None:
    noisy = small(data={"name": "sample", "validation": 10, "noise": 1.0, "fraction": 0.3})
    row = train.train(noisy, progress=False)
    assert row["validation_clean.top1"] > row["validation.top1"]
    assert "validation_clean.top1" not in train.train(small(), progress=False)


def test_logit_adjustment_changes_the_evaluation_alone() -> None:
    tail = {"name": "sample", "imbalance": 30}
    plain = train.train(small("cross_entropy", data=tail), progress=False)
    how = {**small()["training"], "logit_adjustment": 1.0}
    moved = train.train(small("cross_entropy", data=tail, training=how), progress=False)
    assert moved["train.loss"] == plain["train.loss"]
    assert moved["few_top5"] > plain["few_top5"]
    assert (
        moved["many_top5"] < plain["many_top5"] if "many_top5" in plain else moved["medium_top5"] < plain["medium_top5"]
    )


def test_weights_can_wait() -> None:
    loss = {"name": "cross_entropy", "weight": "balanced"}
    tail, how = {"name": "sample", "imbalance": 30}, small()["training"]
    first = {
        share: train.train(small(loss, data=tail, training={**how, "reweight_after": share}), progress=False)
        for share in (0.0, 0.5)
    }
    plain = train.train(small("cross_entropy", data=tail), progress=False)
    epochs = {share: json.loads(row["epochs"]) for share, row in first.items()}
    assert epochs[0.5][0]["training"] == json.loads(plain["epochs"])[0]["training"]
    assert epochs[0.5][1]["training"] != json.loads(plain["epochs"])[1]["training"]
    assert epochs[0.0][0]["training"] != epochs[0.5][0]["training"]


def test_balanced_softmax_is_cross_entropy_of_shifted_scores() -> None:
    counts = np.array([8, 2, 6])
    scores, target = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    loss = losses.build({"name": "balanced_softmax"}, counts, reduction="mean").double()
    weights = torch.tensor(counts) * scores.exp()  # the definition: e^x weighed by the class's rows
    expected = -(weights / weights.sum(1, keepdim=True)).gather(1, target[:, None]).log().mean()
    torch.testing.assert_close(loss(scores, target), expected, rtol=1e-6, atol=1e-6)


# --- models ---


def toy_images(rows: int = 400, classes: int = 4, tests: int = 200) -> DataSet:
    """Images whose class is the colour of a square somewhere."""
    draw = np.random.default_rng(1)
    splits = []
    for count in (rows, 0, tests):
        labels = draw.integers(0, classes, count)
        pixels = draw.integers(0, 90, (count, 32, 32, 3), dtype=np.uint8)
        for image, label, y, x in zip(
            pixels, labels, draw.integers(0, 20, count), draw.integers(0, 20, count), strict=True
        ):
            image[y : y + 12, x : x + 12, label % 3] += 120 if label < 3 else 60
        splits.append(Split(pixels, labels))
    counts = np.bincount(splits[0].labels, minlength=classes)
    names = tuple(map(str, range(classes)))
    return DataSet(*splits, names, None, counts, (0.2, 0.2, 0.2), (0.15, 0.15, 0.15), "f", {})


FAST = {
    "data": {"name": "cifar100"},
    "model": {"name": "fast"},
    "loss": {"name": "smooth", "k": 1},
    "training": {"epochs": 3, "batch": 50, "learning_rate": 0.1, "nesterov": True, "schedule": "one_cycle"},
}


def test_the_fast_net_learns() -> None:
    how = {**FAST["training"], "precision": "float32"}
    row = train.train({**FAST, "training": how}, data=toy_images(), progress=False)
    assert row["top1"] > 0.6
    assert row["precision"] == "float32"


def test_bf16_is_chosen_by_a_probe_once_and_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 0.0, 0.1] * 3)  # float32 takes 1, bf16 0.1
    monkeypatch.setattr(train.time, "process_time", lambda: next(clock))
    how = {**FAST["training"], "epochs": 1, "batch": 8}
    for _ in range(2):  # the second time the answer is known: the clock would be exhausted
        row = train.train({**FAST, "training": how}, data=toy_images(16, tests=16), progress=False)
        assert row["precision"] == "bf16"
        assert row["train.loss"] > 0


def test_whitening_makes_patches_uncorrelated() -> None:
    inputs = torch.randn(64, 3, 10, 10) @ torch.randn(10, 10)
    filters = models.whitening(inputs)
    out = torch.nn.functional.conv2d(inputs, filters).movedim(1, 0).flatten(1)
    torch.testing.assert_close(torch.cov(out), torch.eye(12), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("name", "shape"), [("fast", (8, 3, 64, 64)), ("resnet18", (8, 3, 32, 32)), ("fast", (8, 3, 32, 32))]
)
def test_networks_take_small_images_of_both_sizes(name: str, shape: tuple[int, ...]) -> None:
    config = train.Config.model_validate(
        {"data": {"name": "cifar100"}, "model": {"name": name, "head": "cosine"}, "loss": {"name": "smooth"}}
    )
    net = models.build(config.model, 7, torch.randn(shape))
    assert net(torch.randn(shape)).shape == (8, 7)


def test_widths_grow() -> None:
    sizes = [
        models.parameters(models.build(models.Fast(name="fast", width=width), 100, torch.randn(99, 3, 32, 32)))
        for width in ("quarter", "half", "full")
    ]
    assert sizes == sorted(set(sizes))
    assert 150_000 < sizes[0] < 250_000


def test_next_words_are_learned() -> None:
    config = {
        "data": {"name": "words", "vocabulary": 100, "rows": 4000},
        "model": {"name": "next_word"},
        "loss": {"name": "smooth", "k": 3},
        "training": {"epochs": 2, "batch": 200, "optimizer": "adamw", "learning_rate": 0.02},
    }
    row = train.train(config, progress=False)
    commonest = np.bincount(data.load(config["data"]).test.labels).max() / row["rows"]
    assert row["top1"] > commonest
    assert row["rows"] == len(row["ranks"])


def test_a_split_without_rows_is_refused() -> None:
    empty = toy_images(0)
    with pytest.raises(ValueError, match="training rows"):
        train.train(
            {"data": {"name": "cifar100"}, "model": {"name": "linear"}, "loss": {"name": "smooth", "k": 1}}, data=empty
        )


# --- chapter 18's script for ImageNet on several processes ---

CHAPTER = Path(__file__).parents[2] / "notebooks" / "18_imagenet.md"
SMALLER = {
    "5, 1024, 1e-4, 224": "2, 16, 1e-4, 32",
    'resnet50(weights="DEFAULT")': "resnet18(weights=None)",
    '"num_workers": 8': '"num_workers": 0',
}


@pytest.mark.slow
def test_the_recipe_for_imagenet_runs_as_printed(tmp_path: Path) -> None:
    """But for its sizes, on two processes and a tree of few small images; started again it goes on."""
    text = CHAPTER.read_text(encoding="utf-8")
    found = re.search(r"```bash\n(torchrun .*?)\n```\n\n```python\n# train_imagenet\.py\n(.*?)```", text, re.DOTALL)
    assert found
    command, script = found[1], found[2]
    for size, less in SMALLER.items():
        assert script.count(size) == 1
        script = script.replace(size, less)
    (tmp_path / "train_imagenet.py").write_text(script)
    draw = np.random.default_rng(0)
    for part, name, row in ((p, n, r) for p in ("train", "val") for n in range(20) for r in range(3)):
        folder = tmp_path / "imagenet" / part / f"n{name:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{row}.JPEG")
    program, option, _, *rest = command.split()
    assert [program, option, *rest] == ["torchrun", "--nproc-per-node", "train_imagenet.py", "/data/imagenet"]
    words = ["--standalone", option, "2", rest[0], str(tmp_path / "imagenet")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words], cwd=tmp_path, capture_output=True, text=True,
            timeout=400, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stdout.splitlines()

    assert [line.split()[0] for line in run()] == ["1", "2"]
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["epochs"] == 2
    saved["epochs"], saved["schedule"]["last_epoch"] = 1, 3  # as after the first epoch, of three steps
    torch.save(saved, tmp_path / "last.pt")
    assert [line.split()[0] for line in run()] == ["2"]
