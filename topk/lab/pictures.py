"""The pictures that every loss's chapter draws: along the target's lead, over two wrong scores, on the simplex.

A loss is given as a function of scores (rows, classes) and targets (rows,) that returns one number a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

RowLoss = Callable[[Tensor, Tensor], Tensor]


def value_and_gradient(loss: RowLoss, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of every row and its gradient."""
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, target)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    return value.detach(), gradient


def along_the_target(
    losses: Mapping[str, RowLoss],
    wrong: Sequence[float],
    leads: Tensor,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Figure, dict[str, list[float]]]:
    """Two panels, loss and pull on the target, as its score runs over `leads` while the wrong scores stay."""
    rows = torch.cat((leads[:, None], torch.tensor(wrong).expand(len(leads), -1)), 1).double()
    target = torch.zeros(len(leads), dtype=torch.long)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2))
    data: dict[str, list[float]] = {"score of the target": leads.tolist()}
    for name, loss in losses.items():
        value, gradient = value_and_gradient(loss, rows, target)
        style = (styles or {}).get(name, {})
        left.plot(leads, value, label=name, **style)
        right.plot(leads, -gradient[:, 0], label=name, **style)
        data[name] = value.tolist()
    left.set(title="loss", xlabel="score of the target $x_y$")
    right.set(title="pull on the target", xlabel="score of the target $x_y$")
    left.legend(fontsize=8.5)
    return figure, data


def over_two_wrong_scores(losses: Mapping[str, RowLoss], reach: float = 4.0) -> tuple[Figure, dict[str, list[float]]]:
    """Three classes, x_y = 0: one panel a loss, with the loss as colour and arrows where training moves the scores."""
    target = torch.zeros(1, dtype=torch.long)
    figure, axes = plt.subplots(1, len(losses), figsize=(7.8, 3.0), sharey=True, squeeze=False)
    fine, coarse = (torch.linspace(-reach, reach, size, dtype=torch.float64) for size in (61, 9))
    data: dict[str, list[float]] = {"both wrong scores": fine[::6].tolist()}
    for panel, (name, loss) in zip(axes[0], losses.items(), strict=True):
        value, _ = value_and_gradient(loss, _grid(fine), target.expand(len(fine) ** 2))
        _, gradient = value_and_gradient(loss, _grid(coarse), target.expand(len(coarse) ** 2))
        picture = panel.contourf(fine, fine, value.reshape(len(fine), -1), levels=12)
        u, v = (-gradient[:, i].reshape(len(coarse), -1) for i in (1, 2))
        panel.quiver(coarse, coarse, u, v, color="white", angles="xy", width=0.008)
        panel.set(title=name, xlabel="$x_1 - x_y$", aspect="equal")
        panel.grid(False)
        figure.colorbar(picture, ax=panel, shrink=0.7)
        data[f"{name}, x1 = x2"] = value.reshape(len(fine), -1).diagonal()[::6].tolist()
    axes[0][0].set_ylabel("$x_2 - x_y$")
    return figure, data


def _grid(axis: Tensor) -> Tensor:
    first, second = torch.meshgrid(axis, axis, indexing="xy")
    return torch.stack((torch.zeros_like(first), first, second), -1).reshape(-1, 3)


def on_the_simplex(
    losses: Mapping[str, RowLoss], steps: int = 60, cap: float = 4.0
) -> tuple[Figure, dict[str, list[float]]]:
    """Three classes as probabilities, scores x = log p, target in the lower left corner: the loss as colour."""
    counts = [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    p = (torch.tensor(counts, dtype=torch.float64) + 0.02) / (steps + 0.06)
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    place = p @ corner
    edge = torch.tensor([count[2] == 0 for count in counts])
    figure, axes = plt.subplots(1, len(losses), figsize=(7.8, 2.7), squeeze=False)
    data: dict[str, list[float]] = {"p of the target, on the edge to class 1": p[edge, 0].tolist()}
    for panel, (name, loss) in zip(axes[0], losses.items(), strict=True):
        value = loss(p.log(), torch.zeros(len(p), dtype=torch.long))
        panel.tricontourf(place[:, 0], place[:, 1], value.clamp(max=cap), levels=14)
        outline = corner[[0, 1, 2, 0]]
        panel.plot(outline[:, 0], outline[:, 1], color="black", linewidth=1, linestyle="solid")
        for label, spot, side in zip(("target", "1", "2"), corner.tolist(), ("right", "left", "center"), strict=True):
            panel.text(*spot, f" {label} ", ha=side, va="bottom" if side == "center" else "top")
        panel.set(title=name, aspect="equal", xlim=(-0.25, 1.15), ylim=(-0.15, 1.05))
        panel.axis("off")
        data[name] = value[edge].tolist()
    return figure, data
