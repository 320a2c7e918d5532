"""The training loop: what it computes, that it can be killed, that it may run on several processes."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_sets import features, images
from PIL import Image
from torch.nn import functional as F

import topk
from topk.lab import checkpoints, objectives, speed, training
from topk.lab.evaluation import Evaluation
from topk.lab.optimisation import Average, learning_rate, optimizer

HERE = Path(__file__).parent
KEYWORDS: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "smooth": {"k": 3},
    "transition": {"k": {1: 0.5, 3: 0.5}},
    "noised": {"k": 3, "samples": 3, "margins": "class", "max_margin": 0.3},
    "differentiable": {"k": {"1": 0.5, "4": 0.5}, "m": 8},
    "hinge": {"k": 3, "variant": "alpha"},
    "ldam": {"scale": 10.0},
    "focal": {"gamma": 1.0},
}


def configuration(loss: str = "cross_entropy", model: str = "linear", seed: int = 0, **settings: Any) -> dict[str, Any]:
    settings = {"epochs": 3, "batch": 64, "learning_rate": 0.3, "precision": "float32", **settings}
    return {
        "data": {"name": "synthetic/rings"},
        "model": {"name": model},
        "loss": {"name": loss, **KEYWORDS[loss]},
        "training": settings,
        "seed": seed,
    }


def run(config: dict[str, Any], data: Any = None, **keywords: Any) -> dict[str, Any]:
    data = features() if data is None else data
    return training.train(config, data=data, device="cpu", progress=False, **keywords)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """The result but for the time it took."""
    return {name: value for name, value in result.items() if name != "seconds"}


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", KEYWORDS)
def test_complete_configuration_is_complete(loss: str) -> None:
    full = training.complete(configuration(loss))
    assert training.complete(full) == full
    assert training.complete(json.loads(json.dumps(full, sort_keys=True))) == full
    assert set(full["training"]) == set(training.DEFAULTS)
    plain = configuration(loss)
    plain["training"]["learning_rate"] = 1
    assert training.complete(plain)["training"]["learning_rate"] == 1.0


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (None, {"sed": 1}, "'sed'.*did you mean 'seed'"),
        ("training", {"epoch": 3}, "'epoch'.*did you mean 'epochs'"),
        ("training", {"epochs": 0}, "training.epochs must be at least 1, got 0"),
        ("training", {"learning_rate": "1e-3"}, "training.learning_rate must be of type float, got '1e-3' .*1.0e-3"),
        ("training", {"optimizer": "adam"}, "training.optimizer must be one of 'sgd', 'adamw', got 'adam'"),
        ("training", {"ema": 1.0}, "training.ema"),
        ("training", {"compile": "yes"}, "training.compile"),
        ("loss", {"name": "smoth"}, "'smoth'.*did you mean 'smooth'"),
        ("loss", {"name": "smooth", "taw": 1.0}, "'taw'.*did you mean 'tau'"),
        ("loss", {"name": "smooth", "reduction": "sum"}, "'reduction'"),
        ("loss", {"name": "focal", "margins": 1.0}, "'margins'"),
        ("loss", {"name": "noised", "max_margin": 1.0}, "'max_margin'"),
        ("model", {"name": "linaer"}, "'linaer'.*did you mean 'linear'"),
        ("data", {"name": "synthetic/rings", "nois": 0.1}, "'nois'.*did you mean 'noise'"),
    ],
)
def test_mistakes_are_named(section: str | None, change: dict[str, Any], message: str) -> None:
    config = configuration()
    if section is None:
        config |= change
    elif section == "training":
        config["training"] |= change
    else:
        config[section] = change
    with pytest.raises((ValueError, TypeError), match=message):
        training.complete(config)


def test_label_smoothing_belongs_to_the_losses_that_know_it() -> None:
    full = training.complete(configuration("transition", label_smoothing=0.1))
    assert full["loss"]["label_smoothing"] == 0.1
    with pytest.raises(ValueError, match="label_smoothing must be 0 for loss 'smooth'"):
        training.complete(configuration("smooth", label_smoothing=0.1))
    data = features(rows=64)
    result = run(configuration(label_smoothing=0.2, epochs=1, learning_rate=1e-12), data)
    scores = torch.tensor(data.train.inputs) @ torch.zeros(12, 10)
    assert result["epochs"][0]["training"]["loss"] > 0.9 * float(
        F.cross_entropy(scores, torch.tensor(data.train.labels))
    )


def test_losses_are_those_of_the_module() -> None:
    counts = np.array([50, 20, 10, 5])
    scores, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    ldam = objectives.build({"name": "ldam", "max_margin": 0.2, "scale": 7.0}, counts)
    margins = topk.class_margins(counts, 0.2)
    torch.testing.assert_close(
        ldam(scores, target), topk.ldam_loss(scores, target, margins=margins, scale=7.0, reduction="sum")
    )
    balanced = objectives.build({"name": "cross_entropy", "weight": "balanced"}, counts, reduction="mean")
    weight = torch.tensor(85 / (4 * counts), dtype=torch.float32)
    torch.testing.assert_close(balanced(scores, target), F.cross_entropy(scores, target, weight))
    many = objectives.build({"name": "smooth", "k": {"1": 0.25, "3": 0.75}}, counts, reduction="mean")
    torch.testing.assert_close(many(scores, target), topk.smooth_topk_loss(scores, target, {1: 0.25, 3: 0.75}))
    with pytest.raises(ValueError, match=r"loss\.k must be at most the number of classes, 4, got 5"):
        objectives.build({"name": "smooth"}, counts)


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", KEYWORDS)
def test_every_loss_learns(loss: str) -> None:
    result = run(configuration(loss, epochs=6, learning_rate=0.05 if loss == "ldam" else 0.3))
    first, last = (result["epochs"][place] for place in (0, -1))
    assert last["training"]["loss"] < first["training"]["loss"]
    assert last["top3"] > 0.6
    assert result["final"]["curve"][:10] == last["curve"]
    json.dumps(result, allow_nan=False)


def test_the_loop_is_gradient_descent() -> None:
    """One batch an epoch, written out again by hand."""
    data = features(rows=64)
    config = configuration(schedule="cosine", momentum=0.9, weight_decay=0.01, clip=1.0, learning_rate=0.5)
    tiny = configuration(epochs=1, learning_rate=1e-30, momentum=0.0, weight_decay=0.0)
    result = run(config, data)

    inputs, target = torch.tensor(data.train.inputs), torch.tensor(data.train.labels)
    model = _first_weights(tiny, data)
    velocity = [torch.zeros_like(p) for p in model]
    losses = []
    for epoch in range(3):
        loss = F.cross_entropy(F.linear(inputs, *model), target)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, model)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        gradients = [g * min(1.0, 1.0 / float(norm + 1e-6)) for g in gradients]
        rate = 0.5 * (1 + math.cos(math.pi * epoch / 3)) / 2
        with torch.no_grad():
            for p, g, v in zip(model, gradients, velocity, strict=True):
                v.mul_(0.9).add_(g + (0.01 if p.dim() > 1 else 0.0) * p)
                p -= rate * v
    assert [epoch["training"]["loss"] for epoch in result["epochs"]] == pytest.approx(losses, rel=1e-5)
    scores = F.linear(torch.tensor(data.test.inputs), *model)
    expected = topk.metrics.topk_accuracy(scores, torch.tensor(data.test.labels), (1, 5))
    assert result["final"]["top5"] == pytest.approx(float(expected[5]), abs=1e-9)


def _first_weights(config: dict[str, Any], data: Any) -> list[torch.Tensor]:
    """The weights a run starts from, read from the checkpoint of a run that moves nowhere."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        run(config, data, folder=Path(folder))
        state = torch.load(Path(folder) / checkpoints.NAME, weights_only=True)["model"]
    return [value.requires_grad_() for value in state.values()]


def test_runs_with_one_seed_start_alike_and_see_the_same_batches() -> None:
    """With a vanishing learning rate, everything measured is that of the first weights on the epochs' batches."""
    seen = []
    for loss in ("cross_entropy", "noised", "transition", "differentiable"):
        result = run(configuration(loss, model="mlp", learning_rate=1e-30, weight_decay=0.0, batch=60))
        assert (
            result["epochs"][0]["training"]["top1"] != result["epochs"][1]["training"]["top1"]
        )  # 20 rows are left out
        seen.append(
            [{name: value for name, value in e["training"].items() if name != "loss"} for e in result["epochs"]]
        )
    assert all(each == seen[0] for each in seen)
    other = run(configuration(model="mlp", learning_rate=1e-30, weight_decay=0.0, batch=60, seed=1))
    assert [e["training"]["top1"] for e in other["epochs"]] != [e["top1"] for e in seen[0]]


def test_a_seed_decides_everything_and_the_callers_generator_nothing() -> None:
    config = configuration("noised", model="mlp", mixup=0.4)
    config["model"]["dropout"] = 0.3
    first = run(config)
    state = torch.get_rng_state()
    torch.rand(7)
    before = torch.get_rng_state()
    second = run(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(before, state)
    assert numbers(first) == numbers(second)
    assert numbers(first) != numbers(run(config | {"seed": 1}))


def test_mixup_weighs_two_labels() -> None:
    data = features(rows=64)
    config = configuration(mixup=1.0, epochs=1)
    loop = training._Run(training.complete(config), data, training.Processes(torch.device("cpu")))
    others, share = loop._partners(64)
    assert others is not None
    assert 0.5 <= share < 1
    loop.batches.shuffle = False
    inputs, labels = torch.tensor(data.train.inputs), torch.tensor(data.train.labels)
    weights = [p.detach().clone() for p in loop.model.parameters()]
    scores = F.linear(share * inputs + (1 - share) * inputs[others], *weights)
    expected = share * F.cross_entropy(scores, labels) + (1 - share) * F.cross_entropy(scores, labels[others])
    loop._step(inputs, labels)
    assert loop.losses[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_schedules() -> None:
    def rates(schedule: str, warmup: float) -> list[float]:
        settings = {"schedule": schedule, "warmup": warmup, "epochs": 10, "learning_rate": 2.0}
        return [learning_rate(step, 100, settings) for step in range(100)]

    constant, cosine, cycle = rates("constant", 2.0), rates("cosine", 0.0), rates("one_cycle", 0.0)
    assert constant[20:] == [2.0] * 80
    assert np.diff(constant[:21]) == pytest.approx(2.0 / 21)
    assert cosine[0] == 2.0
    assert cosine[50] == pytest.approx(1.0)
    assert 0 < cosine[-1] < 0.001
    assert cycle[0] == pytest.approx(0.08)
    assert cycle[30] == pytest.approx(2.0)
    assert max(cycle) == cycle[30]
    assert 0 < cycle[-1] < 0.002
    assert all(rate > 0 for rate in rates("cosine", 3.0))


def test_biases_do_not_decay_and_the_average_follows() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    settings = {"optimizer": "adamw", "learning_rate": 0.1, "weight_decay": 0.5, "momentum": 0.9}
    groups = optimizer(model, settings).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.5), (3, 0.0)]
    average = Average(model, 0.9)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1.0
        model[1].num_batches_tracked += 5
    average.update(model, 0)
    torch.testing.assert_close(average.model[0].weight, start + 0.9)
    assert average.model[1].num_batches_tracked == 5
    for _ in range(3):
        average.update(model, 10**6)
    torch.testing.assert_close(average.model[0].weight, start + 1 - 0.1 * 0.9**3)


def test_divergence_is_told_with_its_place(tmp_path: Path) -> None:
    data = features()
    data.train.inputs[7, 3] = np.inf
    place = r"'smooth' is nan at step \d of 5 in epoch 1 of 3, at learning rate 0\.3\b"
    with pytest.raises(training.DivergedError, match=place):
        run(configuration("smooth", schedule="constant"), data)
    messages = []
    for _ in range(2):  # the second goes on from the first one's checkpoint
        with pytest.raises(training.DivergedError, match=r"is (nan|inf) at step \d of 5 in epoch \d") as caught:
            run(configuration(learning_rate=1e30, epochs=20), folder=tmp_path, save_every=0)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_bar_shows_the_time_left(capfd: pytest.CaptureFixture[str]) -> None:
    training.train(configuration("focal"), data=features(), device="cpu")
    shown = capfd.readouterr().err
    assert "focal, seed 0: 100%" in shown
    assert "<00:00" in shown
    assert "top-5=" in shown


def test_validation_is_watched_and_the_test_set_waits() -> None:
    result = run(configuration(), features(validation=50))
    assert all("top1" not in epoch and epoch["validation"]["rows"] == 50 for epoch in result["epochs"])
    assert result["final"]["rows"] == 100
    assert result["final"]["validation"]["curve"] == result["epochs"][-1]["validation"]["curve"]


def test_images_with_everything_on() -> None:
    config = configuration(
        "smooth", "small", mixup=0.2, ema=0.9, clip=1.0, optimizer="adamw", learning_rate=0.01, batch=32
    )
    config["model"] |= {"width": 4, "head": "cosine", "scale": 10.0}
    config["training"] |= {"epochs": 4, "crop": 1, "cutout": 2, "warmup": 0.5, "schedule": "one_cycle"}
    result = run(config, images())
    assert result["epochs"][-1]["training"]["loss"] < result["epochs"][0]["training"]["loss"]
    assert result["precision"] == "float32"


def test_precision_is_bf16_only_where_asked_or_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(model="small", epochs=1)
    config["model"]["width"] = 4
    results = {}
    for faster in (False, True):
        monkeypatch.setattr(training, "faster_in_bf16", lambda *_, answer=faster: answer)
        config["training"]["precision"] = "auto"
        results[faster] = run(config, images())["precision"]
    assert results == {False: "float32", True: "bf16"}
    monkeypatch.undo()
    monkeypatch.setenv("TOPK_DATA", str(tmp_path))
    assert run(config, images())["precision"] in ("float32", "bf16")
    assert run(configuration(precision="auto"))["precision"] == "float32"


def test_probe_is_kept_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPK_DATA", str(tmp_path))
    model, inputs = torch.nn.Linear(4, 3), torch.rand(8, 4)
    taken = {False: 1.0, True: 0.5}
    asked = []

    def seconds(_: Any, __: Any, bf16: bool) -> float:
        asked.append(bf16)
        return taken[bf16]

    monkeypatch.setattr(speed, "_seconds", seconds)
    monkeypatch.setattr(speed, "_found", {})
    assert speed.faster_in_bf16(model, inputs, "one")
    assert len(asked) == 6
    monkeypatch.setattr(speed, "_found", {})  # another process
    taken[True] = 9.0
    assert speed.faster_in_bf16(model, inputs, "one")
    assert len(asked) == 6
    assert not speed.faster_in_bf16(model, inputs, "two")
    assert len(asked) == 8  # hopeless at once
    assert all(parameter.grad is None for parameter in model.parameters())


def test_estimate_is_a_time() -> None:
    assert 0 < training.estimate(configuration(), data=features(), device="cpu") < 60


def test_set_by_its_settings() -> None:
    config = configuration(epochs=1, model="mlp")
    config["data"] |= {"rows": 30, "test_rows": 20, "validation": 5}
    result = training.train(config, device="cpu", progress=False)
    assert result["final"]["validation"]["rows"] == 25
    assert len(result["data_fingerprint"]) == 64


# --- what is measured ------------------------------------------------------------------------------------------------


def test_evaluation_by_definition() -> None:
    draw = np.random.default_rng(3)
    counts = np.array([500, 150, 60, 30, 10, 5])
    scores = torch.tensor(draw.normal(size=(90, 6)), dtype=torch.float32)
    labels = torch.tensor(draw.integers(6, size=90))
    evaluation = Evaluation(counts, 2.0, torch.device("cpu"))
    for start in (0, 40, 41):
        end = {0: 40, 40: 41, 41: 90}[start]
        evaluation.update(scores[start:end], labels[start:end])
    found = evaluation.summary()

    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    rank = (order == labels.numpy()[:, None]).argmax(1) + 1
    assert found["rows"] == 90
    assert found["curve"] == pytest.approx([(rank <= k).mean() for k in range(1, 7)])
    assert found["top3"] == pytest.approx((rank <= 3).mean())
    assert found["macro_top2"] == pytest.approx(np.mean([(rank[labels == c] <= 2).mean() for c in range(6)]))
    for group, classes in {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}.items():
        assert found[f"{group}_top1"] == pytest.approx((rank[np.isin(labels, classes)] <= 1).mean())
    assert found["candidates_90"] == next(k for k in range(1, 7) if (rank <= k).mean() >= 0.9)
    p = torch.softmax(2 * scores.double(), 1).numpy()
    assert found["nll"] == pytest.approx(-np.log(p[np.arange(90), labels]).mean(), rel=1e-6)
    confidence, error = p.max(1), 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            error += inside.mean() * abs((rank[inside] == 1).mean() - confidence[inside].mean())
    assert found["ece"] == pytest.approx(error, abs=1e-6)


def test_evaluation_does_not_choke_on_what_is_not_finite() -> None:
    evaluation = Evaluation(np.array([5, 5, 5]), 1.0, torch.device("cpu"))
    evaluation.update(torch.tensor([[1.0, torch.nan, 0.0], [2.0, 1.0, -torch.inf]]), torch.tensor([0, 2]))
    found = evaluation.summary()
    assert found["top1"] == 0
    assert found["nll"] is None
    assert found["candidates_99"] == 4
    json.dumps(found, allow_nan=False)


# --- checkpoints -----------------------------------------------------------------------------------------------------

KILLED = {
    "head": ("mlp", "noised", {"mixup": 0.3, "ema": 0.95, "optimizer": "adamw", "learning_rate": 0.01, "epochs": 12}),
    "images": ("small", "transition", {"mixup": 0.0, "ema": 0.9, "epochs": 5, "cutout": 2, "batch": 16}),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("kind", KILLED)
def test_killed_run_goes_on_as_if_nothing_had_happened(kind: str, tmp_path: Path) -> None:
    """A process of its own forks the run again and again and kills it at random moments."""
    done = subprocess.run(
        [sys.executable, __file__, "kill", kind, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= 3
    assert told["resumed"] == told["whole"]


def _kill(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    model, loss, settings = KILLED[kind]
    config = configuration(loss, model, **settings)
    if kind == "head":
        config["model"] |= {"dropout": 0.2, "hidden": 32}
        data = features(validation=40)
    else:
        config["model"]["width"] = 4
        config["loss"]["transition"] = "accuracy"
        data = images()
    whole = numbers(run(config, data))
    taken = _attempt(config, data, folder / "timed", None)
    assert taken is not None
    draw, kills = np.random.default_rng(0), 0
    while _attempt(config, data, folder / "killed", draw.uniform(0.02, 0.35) * taken) is None:
        kills += 1
        assert kills < 200
    resumed = json.loads((folder / "killed" / "result.json").read_text())
    print(json.dumps({"kills": kills, "whole": whole, "resumed": resumed}))


def _attempt(config: dict[str, Any], data: Any, folder: Path, after: float | None) -> float | None:
    """Runs on, saving at every step, in a process that is killed `after` seconds; the time if it reached the end."""
    import threading
    import time

    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            result = numbers(run(config, data, folder=folder, save_every=0))
            (folder / "result.json").write_text(json.dumps(result))
        finally:
            os._exit(0 if (folder / "result.json").exists() else 1)
    timer = threading.Timer(after, os.kill, (child, signal.SIGKILL)) if after is not None else None
    if timer is not None:
        timer.start()
    _, status = os.waitpid(child, 0)
    if timer is not None:
        timer.cancel()
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) == 0
    return time.monotonic() - began


def test_finished_run_is_read_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(configuration(), folder=tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr(training._Run, "_step", None)
    again = run(configuration(), folder=tmp_path)
    assert numbers(again) == numbers(first)
    assert again["seconds"] >= first["seconds"] * 0.5


def test_checkpoints_of_others_are_refused_and_kept(tmp_path: Path) -> None:
    run(configuration(epochs=1), folder=tmp_path)
    path = tmp_path / checkpoints.NAME
    content = path.read_bytes()
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        run(configuration(epochs=2), folder=tmp_path)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"version": 99}, path)
    with pytest.raises(ValueError, match="has version 99, expected 1"):
        run(configuration(epochs=1), folder=tmp_path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        run(configuration(epochs=1), folder=tmp_path)
    path.write_bytes(content)
    run(configuration(epochs=1), folder=tmp_path)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["TOPK_TRAP"],))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoint_with_code_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPK_TRAP", str(tmp_path / "sprung"))
    torch.save({"version": 1, "run": _Trap()}, tmp_path / checkpoints.NAME)
    with pytest.raises(ValueError, match="cannot be read"):
        run(configuration(), folder=tmp_path)
    (tmp_path / checkpoints.NAME).write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(ValueError, match="cannot be read"):
        run(configuration(), folder=tmp_path)
    assert not (tmp_path / "sprung").exists()


# --- several processes -----------------------------------------------------------------------------------------------

# Without normalisation of batches, with weights of classes, an incomplete last batch of the evaluation, mixed losses;
# and with it.
SHARED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "linear": ("linear", "cross_entropy", {"clip": 0.5}),
    "mlp": ("mlp", "ldam", {"ema": 0.9, "learning_rate": 0.05}),
    "accuracy": ("linear", "transition", {}),
    "odd": ("linear", "smooth", {"batch": 400}),  # more than there are: one batch, shared unevenly
    "normalised": ("small", "smooth", {"batch": 24, "learning_rate": 0.05, "epochs": 2}),
}


def _shared(kind: str) -> tuple[dict[str, Any], Any]:
    model, loss, settings = SHARED[kind]
    config = configuration(loss, model, **settings)
    if kind in ("linear", "mlp"):
        config["loss"]["weight"] = "balanced"
    if kind == "accuracy":
        config["loss"]["transition"] = "accuracy"
    if kind == "normalised":
        config["model"]["width"] = 4
        return config, images(held_out=41)
    return config, features(rows=321 if kind == "odd" else 320, held_out=101, validation=33)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """The same numbers as one process with the whole batch, within rounding."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "share", str(tmp_path)], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in SHARED:
        config, data = _shared(kind)
        alone = run(config, data, folder=tmp_path / f"{kind}-alone")
        found = json.loads((tmp_path / f"{kind}.json").read_text())
        assert found.pop("processes") == 2
        _assert_close(found, {n: v for n, v in numbers(alone).items() if n != "processes"}, kind)
        states = [
            torch.load(tmp_path / name / checkpoints.NAME, weights_only=True)["model"]
            for name in (kind, f"{kind}-alone")
        ]
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=2e-4, atol=2e-5, msg=lambda m, k=kind: f"{k}: {m}")


def test_the_recipe_for_imagenet_runs_as_printed(tmp_path: Path) -> None:
    """Chapter 18's commands and script, word by word, on two processes and a tree of few small images."""
    chapter = (Path(__file__).parents[1] / "notebooks" / "18_imagenet.md").read_text()
    commands = re.search(r"```bash\n(python -m topk\.lab data import .*?)```", chapter, re.DOTALL)
    script = re.search(r"```python\n# train_imagenet\.py\n(.*?)```", chapter, re.DOTALL)
    assert commands
    assert script
    smaller = {
        '"size": 224': '"size": 32',
        'resnet50", "weights": "DEFAULT"': 'resnet18", "weights": None',
        '"epochs": 5, "batch": 1024': '"epochs": 2, "batch": 16',
    }
    text = script[1]
    for size, small in smaller.items():
        assert text.count(size) == 1
        text = text.replace(size, small)
    (tmp_path / "train_imagenet.py").write_text(text)
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in range(20):
            folder = tmp_path / "imagenet" / part / f"n{name:08d}"
            folder.mkdir(parents=True)
            for row in range(3):
                Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{row}.JPEG")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOPK_DATA": str(tmp_path / "cache")}
    for line in commands[1].strip().splitlines():
        words = shlex.split(line.replace("/data/imagenet", str(tmp_path / "imagenet")), comments=True)
        if words[0] == "torchrun":
            words[words.index("--nproc-per-node") + 1] = "2"
            words[:1] = ["python", "-m", "torch.distributed.run"]
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment
        )
        assert done.returncode == 0, done.stderr[-9000:]
    log = tmp_path / "runs" / "imagenet"
    assert (log / checkpoints.NAME).exists()
    assert len((log / "log.jsonl").read_text().splitlines()) == 2


def _share(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    for kind in SHARED:
        config, data = _shared(kind)
        result = run(config, data, folder=folder / kind)
        if torch.distributed.get_rank() == 0:
            (folder / f"{kind}.json").write_text(json.dumps(numbers(result)))
    torch.distributed.destroy_process_group()


def _assert_close(found: Any, expected: Any, place: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name, value in expected.items():
            _assert_close(found[name], value, f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            _assert_close(found[number], value, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), place
    else:
        assert found == expected, place


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        _kill(sys.argv[2], Path(sys.argv[3]))
    else:
        _share(Path(sys.argv[2]))
