"""Many limited models at once: each is the model it would be alone, trained by the Adam everyone knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from topk_lab.study import limited, synthetic
from topk_lab.study.limited import LOSSES, MODELS, Effort, Setting

SETTING = Setting("mixtures", 4, 2, 0.5, "8 units", rows=5)
SMALL = Effort(test_rows=7, steps=6, seeds=3, tuning_seeds=2)


@pytest.mark.parametrize("model", MODELS)
def test_training_is_torchs_adam_with_a_cosine(model: str) -> None:
    setting = Setting("mixtures", 4, 2, 0.5, model)
    inputs, labels = limited.sample(setting, [3], 5, "train")
    start = limited.first_weights(setting, [3])
    trained = limited.train(limited.row_loss("cross-entropy"), start, inputs, labels, 0.1, 20)
    layers = [layer.clone().requires_grad_() for layer in start]
    optimiser = torch.optim.Adam(layers, lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 20)
    for _ in range(20):
        optimiser.zero_grad()
        values = inputs[0]
        for number, layer in enumerate(layers):
            values = (values.tanh() if number else values) @ layer[0, :-1] + layer[0, -1]
        F.cross_entropy(values, labels).backward()
        optimiser.step()
        schedule.step()
    for mine, expected in zip(trained, layers, strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "noised"])
def test_a_model_does_not_see_the_others(name: str) -> None:
    inputs, labels = limited.sample(SETTING, [0, 1], 5, "train")
    start = limited.first_weights(SETTING, [0, 1])
    rates = torch.tensor([0.1, 0.3])
    together = limited.train(limited.row_loss(name), start, inputs, labels, rates, 8)
    alone = limited.train(limited.row_loss(name), tuple(layer[1:] for layer in start), inputs[1:], labels, 0.3, 8)
    for many, one in zip(together, alone, strict=True):
        torch.testing.assert_close(many[1:], one, rtol=1e-4, atol=1e-5)


def test_seeds_differ_and_repeat() -> None:
    inputs, labels = limited.sample(SETTING, [0, 1, 0], 5, "train")
    fresh, _ = limited.sample(SETTING, [0], 5, "test")
    assert inputs.shape == (3, 20, 2)
    assert labels.tolist() == [c for c in range(4) for _ in range(5)]
    assert torch.equal(inputs[0], inputs[2])
    assert not torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], fresh[0])
    first = limited.first_weights(SETTING, [0, 1, 0])
    assert [tuple(layer.shape) for layer in first] == [(3, 3, 8), (3, 9, 4)]
    assert all(torch.equal(layer[0], layer[2]) and not torch.equal(layer[0], layer[1]) for layer in first)


def test_accuracies_count_hits() -> None:
    scores = torch.tensor([[[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]])
    top1, top2 = limited.accuracies(scores, torch.tensor([0, 1]))
    assert top1.tolist() == [0.5, 0.0]
    assert top2.tolist() == [1.0, 0.0]


def test_the_best_choice_is_the_best_on_fresh_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = [0.2] * 12, [0.2, 0.2, 0.3, 0.3, 0.6, 0.6, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1], [0.3] * 12
    found = iter([*first, *second, *third])
    monkeypatch.setattr(
        limited, "accuracies", lambda scores, labels: (None, torch.tensor([next(found) for _ in scores]))
    )
    monkeypatch.setattr(limited, "LOSSES", {"smooth": LOSSES["smooth"]})
    assert limited.choices(SETTING, SMALL) == {"smooth": (limited.RATES[2], LOSSES["smooth"][2][1])}


def test_comparison_is_complete_and_repeats() -> None:
    found = limited.compare(SETTING, SMALL)
    assert set(found) == {"Bayes", *LOSSES}
    for name, (_, _, values) in LOSSES.items():
        assert found[name]["rate"][0] in limited.RATES
        assert found[name]["own"][0] in values
        for part in ("train", "test"):
            one, two = found[name][f"{part} top-1"], found[name][f"{part} top-2"]
            assert len(one) == len(two) == SMALL.seeds
            assert all(0 <= a <= b <= 1 for a, b in zip(one, two, strict=True))
    assert limited.compare(SETTING, SMALL) == found


@pytest.mark.parametrize(("kind", "modes"), [("mixtures", 5), ("segments", 4), ("rings", 1), ("spirals", 1)])
def test_the_best_possible_is_what_the_posterior_reaches(kind: str, modes: int) -> None:
    """Naming the likeliest classes hits as often as the posterior says."""
    setting = Setting(kind, 4, modes, 0.75, "linear")
    inputs, labels = limited.sample(setting, [3], 5000, "test")
    likely = synthetic.posterior(kind, setting.shape(3), inputs[0].numpy())
    hits = limited.accuracies(torch.from_numpy(likely)[None], labels)
    expected = limited.best_possible(setting, inputs, [3])
    for k, found in enumerate(hits, 1):
        assert found.item() == pytest.approx(expected[f"test top-{k}"][0], abs=0.012)


def test_a_killed_scan_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [SETTING, dataclasses.replace(SETTING, difficulty=1.0)]
    begun: list[limited.Setting] = []
    compare = limited.compare

    def killed_at_the_second(setting: limited.Setting, *rest: Any) -> limited.Found:
        begun.append(setting)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return compare(setting, *rest)

    monkeypatch.setattr(limited, "compare", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        limited.compare_all(settings, SMALL, tmp_path)
    found = limited.compare_all(settings, SMALL, tmp_path)
    assert begun == [settings[0], settings[1], settings[1]]
    assert found == {setting: compare(setting, SMALL) for setting in settings}
    limited.compare_all(settings, dataclasses.replace(SMALL, steps=SMALL.steps + 1), tmp_path)
    assert len(begun) == 5  # another effort: nothing kept is of use


def test_verdicts_are_paired_differences_in_points() -> None:
    def values(top2: list[float]) -> dict[str, list[float]]:
        return {"rate": [25.0], "test top-1": [0.5, 0.5, 0.4], "test top-2": top2, "train top-2": [0.9, 0.7, 0.8]}

    found = {loss: values([0.7, 0.8, 0.6]) for loss in LOSSES} | {"smooth": values([0.8, 0.9, 0.7001])}
    found["Bayes"] = {"test top-1": [0.9, 0.9, 0.8], "test top-2": [0.95, 0.95, 0.95]}
    frame = limited.verdicts({SETTING: found}).set_index("loss")
    assert set(frame.index) == set(LOSSES) - {"cross-entropy"}
    assert frame.loc["smooth", "mean"] == pytest.approx(10, abs=0.01)
    assert frame.loc["smooth", "side"] == 1
    assert frame.loc["noised", ["mean", "side", "train"]].tolist() == [0, 0, 0]
    assert frame.loc["noised", ["missed", "room", "fitted"]].tolist() == pytest.approx([40, 25, 80])
    assert frame["edge"].all()
    assert set(frame["family"]) == {"mixtures of 2"}


def test_scan_holds_every_combination_once() -> None:
    settings = limited.scan()
    assert len(settings) == len(set(settings)) == 4 * 2 * 2 * len(MODELS)
    assert {setting.model for setting in settings} == set(MODELS)
