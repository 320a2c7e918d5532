"""Many small models trained at once: what a limited model makes of a synthetic set under each loss (chapter 3).

The models of all seeds are one batch: inputs (seeds, rows, dimension), weights (seeds, dimension, classes), scores
(seeds, rows, classes), and one call of the loss for all. A seed has its own distribution, sample and first weights,
which every loss shares, so losses are compared seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Memory
from matplotlib.colors import to_rgb
from scipy.stats import false_discovery_control, ttest_1samp
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
RATES = (0.01, 0.05, 0.2, 1.0, 5.0, 25.0)
"""Learning rates of Adam that every loss may choose from."""

LOSSES: dict[str, tuple[Callable[..., Tensor], str, tuple[float, ...]]] = {
    "cross-entropy": (F.cross_entropy, "label_smoothing", (0.0, 0.03, 0.1)),
    "smooth": (partial(topk.smooth_topk_loss, k=K), "tau", (0.3, 1.0, 3.0)),
    "transition": (partial(topk.transition_topk_loss, k=K), "width", (1.0, 4.0, 16.0)),
    "noised": (partial(topk.noised_topk_loss, k=K), "epsilon", (0.2, 1.0, 4.0)),
    "differentiable": (partial(topk.differentiable_topk_loss, k=K), "inverse_temperature", (0.3, 1.0, 3.0)),
    "calibrated hinge": (partial(topk.topk_hinge_loss, k=K), "margin", (0.3, 1.0, 3.0)),
}
"""The losses at k = 2, each with a setting of its own and the values that it may choose from."""

MODELS = {"linear": None, "2 units": 2, "4 units": 4, "8 units": 8, "16 units": 16, "64 units": 64}
"""Hidden units (tanh) of the models."""


def row_loss(name: str, own: float | None = None) -> RowLoss:
    """The loss of this name with its own setting, or with its default: one number per row."""
    loss, setting, _ = LOSSES[name]
    return partial(loss, reduction="none", **({} if own is None else {setting: own}))


@dataclass(frozen=True)
class Setting:
    """A family of sets (`topk_lab.study.synthetic`), the model that has to follow them, training rows per class."""

    kind: str
    classes: int
    modes: int
    difficulty: float
    model: str
    rows: int = 24

    def shape(self, seed: int) -> synthetic.Shape:
        """The distribution that belongs to a seed."""
        return synthetic.Shape(self.classes, self.dimension, self.modes, self.difficulty, seed)

    @property
    def dimension(self) -> int:
        """Inputs of the plane, but of the line for segments."""
        return 1 if self.kind == "segments" else 2


@dataclass(frozen=True)
class Effort:
    """Rows per class to tune and to test on, steps, seeds, seeds to tune on."""

    test_rows: int = 100
    steps: int = 200
    seeds: int = 20
    tuning_seeds: int = 2


def sample(setting: Setting, seeds: Sequence[int], rows: int, part: str) -> tuple[Tensor, Tensor]:
    """Inputs (seeds, classes * rows, dimension) and the labels, which all seeds share."""
    made = [synthetic.make(setting.kind, setting.shape(seed), rows, part) for seed in seeds]
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


def choices(setting: Setting, effort: Effort) -> dict[str, tuple[float, float]]:
    """For every loss the rate and the own setting with the highest top-2 accuracy on fresh rows, over seeds of its own.

    All rates are one batch of models.
    """
    seeds = [1000 + seed for seed in range(effort.tuning_seeds)]
    inputs, labels = sample(setting, seeds, setting.rows, "train")
    fresh, fresh_labels = sample(setting, seeds, effort.test_rows, "test")
    many = tuple(layer.repeat(len(RATES), 1, 1) for layer in first_weights(setting, seeds))
    rates = torch.tensor(RATES).repeat_interleave(len(seeds))
    best = {}
    for name, (_, _, values) in LOSSES.items():
        reached = dict[tuple[float, float], float]()
        for own in values:
            loss, several = row_loss(name, own), (len(RATES), 1, 1)
            weights = train(loss, many, inputs.repeat(several), labels, rates, effort.steps)
            _, top2 = accuracies(scores_of(weights, fresh.repeat(several)), fresh_labels)
            means = top2.reshape(len(RATES), -1).mean(1).nan_to_num(0.0)
            reached |= {(rate, own): mean for rate, mean in zip(RATES, means.tolist(), strict=True)}
        best[name] = max(reached, key=lambda pair: reached[pair])
    return best


def compare(setting: Setting, effort: Effort) -> Found:
    """By loss: what it chose, and by seed the accuracies on the rows trained on and on fresh ones.

    Under "Bayes" stand the best accuracies that any model can have, on the same fresh rows.
    """
    chosen = choices(setting, effort)
    seeds = list(range(effort.seeds))
    parts = {
        "train": sample(setting, seeds, setting.rows, "train"),
        "test": sample(setting, seeds, effort.test_rows, "test"),
    }
    start = first_weights(setting, seeds)
    found: Found = {"Bayes": best_possible(setting, parts["test"][0], seeds)}
    for name, (rate, own) in chosen.items():
        weights = train(row_loss(name, own), start, *parts["train"], rate, effort.steps)
        found[name] = {"rate": [rate], "own": [own]}
        for part, (x, y) in parts.items():
            top1, top2 = accuracies(scores_of(weights, x), y)
            found[name] |= {f"{part} top-1": _rounded(top1), f"{part} top-2": _rounded(top2)}
    return found


def best_possible(setting: Setting, inputs: Tensor, seeds: Sequence[int]) -> dict[str, list[float]]:
    """The expected accuracies of naming the one and the two likeliest classes, by seed."""
    found = {"test top-1": list[float](), "test top-2": list[float]()}
    for seed, points in zip(seeds, inputs.numpy(), strict=True):
        likely = np.sort(synthetic.posterior(setting.kind, setting.shape(seed), points), axis=1)[:, ::-1]
        for k in (1, 2):
            found[f"test top-{k}"].append(round(float(likely[:, :k].sum(1).mean()), 4))
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


def scan() -> list[Setting]:
    """Four kinds of sets of four classes, two difficulties, every model, few and many rows per class."""
    kinds = [("rings", 1), ("spirals", 1), ("segments", 4), ("mixtures", 5)]
    return [
        Setting(kind, 4, modes, difficulty, model, rows)
        for rows in (24, 100)
        for kind, modes in kinds
        for difficulty in (0.25, 0.75)
        for model in MODELS
    ]


def name_of(setting: Setting) -> str:
    """A setting as a key of a record."""
    return ", ".join(f"{name} {value}" for name, value in asdict(setting).items())


def verdicts(found: Mapping[Setting, Found], level: float = 0.05) -> pd.DataFrame:
    """A row for every setting and loss but cross-entropy: differences of accuracies to it in points, over paired seeds.

    `mean`, `top1` and `train`: of top-2 and top-1 on fresh rows and of top-2 on the rows trained on; `side`: 1 or -1
    where `mean` is told apart from 0 by Benjamini and Hochberg over all rows; `missed`: what cross-entropy's top-1
    lacks of the best possible; `room`: the same of its top-2; `fitted`: its top-2 on the rows trained on; `edge`:
    whether the loss chose the smallest or the largest rate.
    """
    rows = []
    for setting, by_loss in found.items():
        base, best = by_loss["cross-entropy"], by_loss["Bayes"]
        missed, room = (100 * np.mean(np.subtract(best[of], base[of])) for of in ("test top-1", "test top-2"))
        for loss in list(LOSSES)[1:]:
            gaps = {
                of: 100 * np.subtract(by_loss[loss][of], base[of]) for of in ("test top-2", "test top-1", "train top-2")
            }
            top2 = gaps["test top-2"]
            rows.append({
                **asdict(setting), "setting": name_of(setting), "family": family_of(setting), "loss": loss,
                "mean": top2.mean(), "half": t_interval(top2).high - top2.mean(), "p": _p_value(top2),
                "top1": gaps["test top-1"].mean(), "train": gaps["train top-2"].mean(), "missed": missed,
                "room": room, "fitted": 100 * np.mean(base["train top-2"]),
                "edge": by_loss[loss]["rate"][0] in (min(RATES), max(RATES)),
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["side"] = np.sign(frame["mean"]).astype(int) * (false_discovery_control(frame["p"]) < level)
    return frame


def _p_value(differences: np.ndarray) -> float:
    """Of the paired t test; 1 where no seed differs."""
    return float(ttest_1samp(differences, 0).pvalue) if differences.any() else 1.0


def family_of(setting: Setting) -> str:
    """The kind of set, mixtures by their number of Gaussians."""
    return setting.kind + (f" of {setting.modes}" if setting.kind == "mixtures" else "")


def draw_guesses(
    setting: Setting, chosen: Mapping[str, tuple[float, float]], effort: Effort, alt: str
) -> dict[str, list[float]]:
    """Shows the plane by first guess and by set of two guesses under models of seed 0, with the rows trained on.

    A region has the colour of the class that is guessed there, or stripes in the colours of both.

    Returns {loss: top-1 and top-2 accuracy on fresh rows, per cent}.
    """
    inputs, labels = sample(setting, [0], setting.rows, "train")
    fresh, fresh_labels = sample(setting, [0], effort.test_rows, "test")
    side = torch.linspace(-2.3, 2.3, 161)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(1, -1, 2)
    pairs = list(combinations(range(setting.classes), 2))
    names = [[str(c) for c in range(setting.classes)], [f"{{{a}, {b}}}" for a, b in pairs]]
    figure, axes = plt.subplots(2, len(chosen), figsize=(4.9, 5.6), sharex=True, sharey=True)
    tints = 0.55 + 0.45 * np.array([to_rgb(colour) for colour in figures.COLOURS])
    stripe = np.add.outer(np.arange(161), np.arange(161)) // 6 % 2
    found = {}
    for column, (loss, (rate, own)) in zip(axes.T, chosen.items(), strict=True):
        trained = train(row_loss(loss, own), first_weights(setting, [0]), inputs, labels, rate, effort.steps)
        found[loss] = [100 * value.item() for value in accuracies(scores_of(trained, fresh), fresh_labels)]
        scores = scores_of(trained, plane)[0]
        two = scores.topk(2).indices.sort(1).values.tolist()
        regions = (scores.argmax(1), torch.tensor([pairs.index((a, b)) for a, b in two]))
        for guesses, (axis, region, words) in enumerate(zip(column, regions, names, strict=True), 1):
            members = np.array(pairs if guesses == 2 else [(c, c) for c in range(setting.classes)])
            inside = np.take_along_axis(members[region.reshape(161, 161)], stripe[..., None], 2)[..., 0]
            axis.imshow(tints[inside], extent=(-2.3, 2.3, -2.3, 2.3), origin="lower", interpolation="nearest")
            for value in region.unique().tolist():
                inner = plane[0][(region == value) & (plane[0].abs() < 2.1).all(1)]
                if len(inner) > 150:
                    centre = inner[(inner - inner.mean(0)).norm(dim=1).argmin()].tolist()
                    axis.text(*centre, words[value], fontsize=9, ha="center", va="center", weight="bold",
                              color=figures.COLOURS[value] if guesses == 1 else "black", zorder=3,
                              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5})  # fmt: skip
            for c in range(setting.classes):
                axis.scatter(*inputs[0, labels == c].T, s=12, marker=figures.MARKERS[c], color=figures.COLOURS[c],
                             linewidth=0.4, edgecolor="white", label=f"class {c}")  # fmt: skip
            shown = ("first guess", "set of two guesses")[guesses - 1]
            title = f"{loss},\n{shown}: {found[loss][guesses - 1]:.0f} %"
            axis.set(title=title, xlabel="$z_1$", ylabel="$z_2$")
            axis.label_outer()
            axis.grid(False)
    columns = {f"top-{k}": [values[k - 1] for values in found.values()] for k in (1, 2)}
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=setting.classes)
    figures.show(figure, alt, {"loss": list(found), **columns}, palette=True)
    return found
