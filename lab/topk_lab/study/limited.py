"""Many small models trained at once: what a limited model makes of a synthetic set under each loss (chapter 3).

The models of all seeds are one batch: inputs (seeds, rows, dimension), weights (seeds, dimension, classes), scores
(seeds, rows, classes), and one call of the loss for all. A seed has its own distribution, sample and first weights,
which every loss shares, so losses are compared seed by seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import topk
from topk.lab import provenance, records, shipped, synthetic
from topk.lab.streams import normal, stream

RowLoss = Callable[[Tensor, Tensor], Tensor]
Weights = tuple[Tensor, ...]
Found = dict[str, dict[str, list[float]]]

CHAPTER = "03_when_cross_entropy_fails"
K = 2
RATES = (0.03, 0.2, 1.0, 5.0)
"""Learning rates of Adam that every loss may choose from."""

LOSSES: dict[str, RowLoss] = {
    "cross-entropy": lambda scores, target: F.cross_entropy(scores, target, reduction="none"),
    "smooth": lambda scores, target: topk.smooth_topk_loss(scores, target, K, reduction="none"),
    "transition": lambda scores, target: topk.transition_topk_loss(scores, target, K, reduction="none"),
    "noised": lambda scores, target: topk.noised_topk_loss(scores, target, K, reduction="none"),
    "differentiable": lambda scores, target: topk.differentiable_topk_loss(scores, target, K, reduction="none"),
    "calibrated hinge": lambda scores, target: topk.topk_hinge_loss(scores, target, K, reduction="none"),
}
"""The losses at k = 2 with their defaults, one number a row."""

MODELS = {"linear": None, "MLP": 8}
"""Hidden units (tanh) of the limited models."""


@dataclass(frozen=True)
class Setting:
    """A family of sets (`topk.lab.synthetic`) and the model that has to follow them."""

    kind: str
    classes: int
    modes: int
    difficulty: float
    model: str

    @property
    def dimension(self) -> int:
        """Inputs of the plane, but of the line for segments."""
        return 1 if self.kind == "segments" else 2


@dataclass(frozen=True)
class Effort:
    """How long and on how much to train: rows of a class to train and to test on, steps, seeds, seeds to tune on."""

    rows: int = 24
    test_rows: int = 100
    steps: int = 200
    seeds: int = 20
    tuning_seeds: int = 5


def sample(setting: Setting, seeds: Sequence[int], rows: int, part: str) -> tuple[Tensor, Tensor]:
    """Inputs (seeds, classes * rows, dimension) and the labels, which all seeds share."""
    shapes = [
        synthetic.Shape(setting.classes, setting.dimension, setting.modes, setting.difficulty, seed) for seed in seeds
    ]
    made = [synthetic.make(setting.kind, shape, rows, part) for shape in shapes]
    return torch.from_numpy(np.stack([inputs for inputs, _ in made])), torch.from_numpy(made[0][1])


def first_weights(setting: Setting, seeds: Sequence[int]) -> Weights:
    """Normal weights of variance 1 / inputs, a row of biases below them; of each layer (seeds, inputs + 1, outputs)."""
    hidden = MODELS[setting.model]
    widths = [setting.dimension, *([] if hidden is None else [hidden]), setting.classes]
    layers = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        count = (inputs + 1) * outputs
        draws = [normal(np.random.PCG64(stream(seed, f"weights/{number}")), count) for seed in seeds]
        shaped = np.stack(draws).reshape(len(seeds), inputs + 1, outputs) / math.sqrt(inputs)
        layers.append(torch.from_numpy(shaped.astype(np.float32)))
    return tuple(layers)


def scores_of(weights: Weights, inputs: Tensor) -> Tensor:
    """The models' scores (seeds, rows, classes)."""
    values = inputs
    for number, layer in enumerate(weights):
        values = torch.baddbmm(layer[:, -1:], values if number == 0 else values.tanh(), layer[:, :-1])
    return values


def train(loss: RowLoss, weights: Weights, inputs: Tensor, labels: Tensor, rate: float | Tensor, steps: int) -> Weights:
    """Adam on whole samples, its rate falling to zero along a cosine; every seed is a model of its own.

    Args:
        loss: one number a row.
        weights: the first weights.
        inputs: (seeds, rows, dimension).
        labels: (rows,).
        rate: the learning rate, one for all or one a seed.
        steps: how many.
    """
    layers = [layer.clone().requires_grad_() for layer in weights]
    slopes, squares = [torch.zeros_like(layer) for layer in layers], [torch.zeros_like(layer) for layer in layers]
    target = labels.repeat(len(inputs))
    scale = torch.as_tensor(rate, dtype=torch.float32).reshape(-1, 1, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the noised loss draws from torch's own generator
        for step in range(1, steps + 1):
            scores = scores_of(tuple(layers), inputs)
            total = loss(scores.flatten(0, 1), target).sum() / len(labels)
            size = scale * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            for layer, gradient, slope, square in zip(
                layers, torch.autograd.grad(total, layers), slopes, squares, strict=True
            ):
                slope.lerp_(gradient, 0.1)
                square.lerp_(gradient**2, 0.01)
                mean, power = slope / (1 - 0.9**step), square / (1 - 0.99**step)
                layer.data -= size * mean / (power.sqrt() + 1e-8)
    return tuple(layer.detach() for layer in layers)


def accuracies(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 and top-2 accuracy of every seed's model."""
    found = topk.metrics.ranks(scores.flatten(0, 1), labels.repeat(len(scores))).reshape(len(scores), -1)
    return (found <= 1).float().mean(1), (found <= K).float().mean(1)


def best_rates(setting: Setting, losses: Mapping[str, RowLoss], effort: Effort) -> dict[str, float]:
    """For every loss the rate of `RATES` with the highest top-2 accuracy on fresh rows, over seeds of its own."""
    seeds = [1000 + seed for seed in range(effort.tuning_seeds)]
    inputs, labels = sample(setting, seeds, effort.rows, "train")
    fresh, fresh_labels = sample(setting, seeds, effort.rows, "test")
    many = tuple(layer.repeat(len(RATES), 1, 1) for layer in first_weights(setting, seeds))
    rates = torch.tensor(RATES).repeat_interleave(len(seeds))
    best = {}
    for name, loss in losses.items():
        weights = train(loss, many, inputs.repeat(len(RATES), 1, 1), labels, rates, effort.steps)
        _, top2 = accuracies(scores_of(weights, fresh.repeat(len(RATES), 1, 1)), fresh_labels)
        best[name] = RATES[int(top2.reshape(len(RATES), -1).mean(1).argmax())]
    return best


def compare(setting: Setting, losses: Mapping[str, RowLoss], effort: Effort) -> Found:
    """By loss: the rate, and by seed the accuracies on the rows trained on and on fresh ones."""
    rates = best_rates(setting, losses, effort)
    seeds = list(range(effort.seeds))
    inputs, labels = sample(setting, seeds, effort.rows, "train")
    fresh, fresh_labels = sample(setting, seeds, effort.test_rows, "test")
    start = first_weights(setting, seeds)
    found: Found = {}
    for name, loss in losses.items():
        weights = train(loss, start, inputs, labels, rates[name], effort.steps)
        found[name] = {"rate": [rates[name]]}
        for part, (x, y) in {"train": (inputs, labels), "test": (fresh, fresh_labels)}.items():
            top1, top2 = accuracies(scores_of(weights, x), y)
            found[name] |= {f"{part} top-1": _rounded(top1), f"{part} top-2": _rounded(top2)}
    return found


def compare_all(settings: Sequence[Setting], effort: Effort, keep: Path | None = None) -> dict[Setting, Found]:
    """`compare` for every setting and all `LOSSES`.

    Args:
        settings: what to compare.
        effort: how long and on how much.
        keep: a folder for what is found, a file a setting, with a progress bar: a scan that is killed goes on from
            there, unless the package's code, torch or the effort changed meanwhile.
    """
    if keep is None:
        return {setting: compare(setting, LOSSES, effort) for setting in settings}
    code = provenance.source(Path(topk.__file__).parent)
    found = {}
    for setting in tqdm(settings, unit="setting"):
        made = {"setting": name_of(setting), "effort": asdict(effort), "code": code, "torch": str(torch.__version__)}
        path = keep / f"{name_of(setting)}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("made") != made:
            kept = {"made": made, "found": compare(setting, LOSSES, effort)}
            records.write_json(path, kept)
        found[setting] = kept["found"]
    return found


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def scan(difficulties: Sequence[float], classes: Sequence[int]) -> list[Setting]:
    """Every kind of set with every difficulty and number of classes; mixtures of two and of five Gaussians a class."""
    kinds = [("mixtures", 2), ("mixtures", 5), ("segments", 4), ("rings", 1), ("spirals", 1)]
    return [
        Setting(kind, count, modes, difficulty, model)
        for kind, modes in kinds
        for count in classes
        for model in MODELS
        for difficulty in difficulties
    ]


def name_of(setting: Setting) -> str:
    """A setting as a key of a record."""
    return ", ".join(f"{name} {value}" for name, value in asdict(setting).items())


def recorded(settings: Sequence[Setting]) -> tuple[dict[Setting, Found], dict[str, Any]]:
    """What `compare` found for every setting, from the chapter's committed record, and where the record is from."""
    row = shipped.load(CHAPTER).iloc[0]
    metrics = ("rate", *(f"{part} top-{guesses}" for part in ("train", "test") for guesses in (1, K)))
    found = {
        setting: {
            loss: {metric: json.loads(row[f"{name_of(setting)}.{loss}.{metric}"]) for metric in metrics}
            for loss in LOSSES
        }
        for setting in settings
    }
    return found, {name: row[name] for name in ("date", "commit", "processor", "torch", "threads")}
