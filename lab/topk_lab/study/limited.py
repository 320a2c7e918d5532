"""Many small models trained at once: what a limited model makes of a synthetic set under each loss (chapter 3).

The models of all seeds are one batch: inputs (seeds, rows, dimension), weights (seeds, dimension, classes), scores
(seeds, rows, classes), and one call of the loss for all. A seed has its own distribution, sample and first weights,
which every loss shares, so losses are compared seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Memory
from torch import Tensor
from tqdm import tqdm

import topk
from topk_lab import figures
from topk_lab.figures import RowLoss
from topk_lab.study import synthetic
from topk_lab.study.statistics import t_interval
from topk_lab.study.synthetic import normal, stream

Weights = tuple[Tensor, ...]
Found = dict[str, dict[str, list[float]]]

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
    """A family of sets (`topk_lab.study.synthetic`) and the model that has to follow them."""

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


def best_rates(setting: Setting, effort: Effort) -> dict[str, float]:
    """For every loss the rate of `RATES` with the highest top-2 accuracy on fresh rows, over seeds of its own."""
    seeds = [1000 + seed for seed in range(effort.tuning_seeds)]
    inputs, labels = sample(setting, seeds, effort.rows, "train")
    fresh, fresh_labels = sample(setting, seeds, effort.rows, "test")
    many = tuple(layer.repeat(len(RATES), 1, 1) for layer in first_weights(setting, seeds))
    rates = torch.tensor(RATES).repeat_interleave(len(seeds))
    best = {}
    for name, loss in LOSSES.items():
        weights = train(loss, many, inputs.repeat(len(RATES), 1, 1), labels, rates, effort.steps)
        _, top2 = accuracies(scores_of(weights, fresh.repeat(len(RATES), 1, 1)), fresh_labels)
        best[name] = RATES[int(top2.reshape(len(RATES), -1).mean(1).argmax())]
    return best


def compare(setting: Setting, effort: Effort) -> Found:
    """By loss: the rate, and by seed the accuracies on the rows trained on and on fresh ones."""
    rates = best_rates(setting, effort)
    seeds = list(range(effort.seeds))
    parts = {
        "train": sample(setting, seeds, effort.rows, "train"),
        "test": sample(setting, seeds, effort.test_rows, "test"),
    }
    start = first_weights(setting, seeds)
    found: Found = {}
    for name, loss in LOSSES.items():
        weights = train(loss, start, *parts["train"], rates[name], effort.steps)
        found[name] = {"rate": [rates[name]]}
        for part, (x, y) in parts.items():
            top1, top2 = accuracies(scores_of(weights, x), y)
            found[name] |= {f"{part} top-1": _rounded(top1), f"{part} top-2": _rounded(top2)}
    return found


def compare_all(settings: Sequence[Setting], effort: Effort, keep: Path | None = None) -> dict[Setting, Found]:
    """`compare` for every setting; with a folder to `keep` what is found, a scan that was killed goes on from there."""
    remembered = Memory(keep, verbose=0).cache(_compare, ignore=["setting"])
    versions = f"topk {topk.__version__}, torch {torch.__version__}"
    bar = tqdm(settings, unit="setting", disable=keep is None)
    return {setting: remembered(setting, name_of(setting), effort, versions) for setting in bar}


def _compare(setting: Setting, name: str, effort: Effort, versions: str) -> Found:
    return compare(setting, effort)


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


def verdicts(found: Mapping[Setting, Found]) -> pd.DataFrame:
    """A row for every setting and loss but cross-entropy: differences of accuracies to it in points, over paired seeds.

    `mean`, `top1` and `train`: of top-2 and top-1 on fresh rows and of top-2 on the rows trained on; `text` the
    interval; `alone` and `corrected`: on which side of 0 the 95 % interval of `mean` lies, by itself and widened for
    the number of rows (Bonferroni); `fitted`: cross-entropy's top-2 on the rows trained on; `edge`: whether the loss
    chose the largest rate.
    """
    rows = []
    comparisons = len(found) * (len(LOSSES) - 1)
    for setting, by_loss in found.items():
        base = by_loss["cross-entropy"]
        for loss in list(LOSSES)[1:]:
            gaps = {
                metric: 100 * (np.array(by_loss[loss][metric]) - np.array(base[metric]))
                for metric in ("test top-2", "test top-1", "train top-2")
            }
            alone, corrected = (t_interval(gaps["test top-2"], 1 - 0.05 / count) for count in (1, comparisons))
            rows.append({
                **asdict(setting), "setting": name_of(setting), "family": family_of(setting), "loss": loss,
                "mean": alone.mean, "top1": gaps["test top-1"].mean(), "train": gaps["train top-2"].mean(),
                "text": f"{alone.mean:+.1f} ({alone.low:+.1f}, {alone.high:+.1f})",
                "alone": alone.side, "corrected": corrected.side,
                "fitted": 100 * np.mean(base["train top-2"]), "edge": by_loss[loss]["rate"][0] == max(RATES),
            })  # fmt: skip
    return pd.DataFrame(rows)


def family_of(setting: Setting) -> str:
    """The kind of set, mixtures by their number of Gaussians."""
    return setting.kind + (f" of {setting.modes}" if setting.kind == "mixtures" else "")


def draw_guesses(setting: Setting, rates: Mapping[str, float], effort: Effort, alt: str) -> dict[str, list[float]]:
    """Shows the plane by first guess and by set of two guesses under models of seed 0, with the rows trained on.

    Returns {loss: top-1 and top-2 accuracy on fresh rows, per cent}.
    """
    inputs, labels = sample(setting, [0], effort.rows, "train")
    fresh, fresh_labels = sample(setting, [0], effort.test_rows, "test")
    side = torch.linspace(-2.3, 2.3, 161)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(1, -1, 2)
    pairs = list(combinations(range(setting.classes), 2))
    names = [[str(c) for c in range(setting.classes)], [f"{{{a}, {b}}}" for a, b in pairs]]
    figure, axes = plt.subplots(2, len(rates), figsize=(6.6, 6.4), sharex=True, sharey=True)
    found = {}
    for column, (loss, rate) in zip(axes.T, rates.items(), strict=True):
        trained = train(LOSSES[loss], first_weights(setting, [0]), inputs, labels, rate, effort.steps)
        found[loss] = [100 * value.item() for value in accuracies(scores_of(trained, fresh), fresh_labels)]
        scores = scores_of(trained, plane)[0]
        two = scores.topk(2).indices.sort(1).values.tolist()
        regions = (scores.argmax(1), torch.tensor([pairs.index((a, b)) for a, b in two]))
        for guesses, (axis, region, words) in enumerate(zip(column, regions, names, strict=True), 1):
            colours = plt.get_cmap("cividis", len(words) + 1)
            axis.pcolormesh(side, side, region.reshape(161, 161) + 1, cmap=colours, vmin=-0.5, vmax=len(words) + 0.5,
                            alpha=0.55, rasterized=True)  # fmt: skip
            for value in region.unique().tolist():
                inner = plane[0][(region == value) & (plane[0].abs() < 2.1).all(1)]
                if len(inner) > 150:
                    centre = inner[(inner - inner.mean(0)).norm(dim=1).argmin()].tolist()
                    axis.text(*centre, words[value], fontsize=11, ha="center", va="center", weight="bold")
            for c in range(setting.classes):
                axis.scatter(*inputs[0, labels == c].T, s=9, marker=figures.MARKERS[c], color=figures.COLOURS[c],
                             linewidth=0.3, edgecolor="white")  # fmt: skip
            axis.set_title((f"{loss}: " if guesses == 1 else "") + f"top-{guesses} {found[loss][guesses - 1]:.0f} %")
            axis.grid(False)
    axes[0, 0].set_ylabel("first guess")
    axes[1, 0].set_ylabel("set of two guesses")
    columns = {f"top-{k}": [values[k - 1] for values in found.values()] for k in (1, 2)}
    figures.show(figure, alt, {"loss": list(found), **columns})
    return found
