"""Three classes in one picture: expected losses over the plane of scores, with the way training moves them.

A constant added to all scores changes no loss, so three scores are a point of a plane; the score of class i grows
towards corner i. The plane falls into sectors, one for every order of the scores.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from topk_lab import figures
from topk_lab.figures import RowLoss, value_and_gradient
from topk_lab.study.calibration import regrets
from topk_lab.study.contenders import expected

# Rows: the plane's two axes as scores. Class 0 grows to the lower left, 1 to the lower right, 2 upwards.
AXES = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, -1.0, 2.0]], dtype=torch.float64)
AXES = AXES / AXES.norm(dim=1, keepdim=True)


def grid(reach: float, size: int) -> tuple[Tensor, Tensor]:
    """The coordinates along one axis, and the scores (size * size, 3) at all points."""
    axis = torch.linspace(-reach, reach, size, dtype=torch.float64)
    first, second = torch.meshgrid(axis, axis, indexing="xy")
    return axis, torch.stack((first, second), -1).reshape(-1, 2) @ AXES


def field(loss: RowLoss, scores: Tensor, q: Tensor) -> Tensor:
    """sum_y q_y times the loss's gradient at every row of scores."""
    rows, classes = scores.shape
    target = torch.arange(classes).repeat(rows)
    _, gradient = value_and_gradient(loss, scores.repeat_interleave(classes, 0), target)
    return torch.einsum("y,ryi->ri", q, gradient.reshape(rows, classes, classes))


def draw(losses: Mapping[str, RowLoss], q: Tensor, k: int, alt: str, columns: int = 3, reach: float = 3.0) -> None:
    """Shows one panel a loss: the expected loss as colour, arrows where training moves, where the least values lie.

    Hatched: where the first k lose accuracy against the k likeliest classes. Ringed dots: points of the grid at its
    least value, up to a ten-thousandth of the picture's range. The table has each loss's least value on the grid and
    where it is. Two or three columns are together as wide as a phone shows, so their panels differ in size.
    """
    height, side = -(-len(losses) // columns), {2: 2.3, 3: 1.63}.get(columns, 1.8)
    figure, axes = plt.subplots(height, columns, figsize=(side * columns, (side + 0.15) * height), squeeze=False)
    axis, scores = grid(reach, 97)
    coarse, few = grid(0.92 * reach, 7)
    sharp, everywhere = grid(reach, 289)  # borders between the orders are straight lines
    wrong = (regrets(everywhere, q.expand_as(everywhere), k) > 1e-9).reshape(len(sharp), -1).double()
    table: dict[str, list[float | str]] = {"loss": [], "least on the grid": [], "x1": [], "x2": [], "x3": []}
    for panel in axes.flat[len(losses) :]:
        panel.axis("off")
    for panel, (name, loss) in zip(axes.flat, losses.items(), strict=False):
        value = expected(loss, scores, q.expand_as(scores))
        panel.contourf(axis, axis, value.reshape(len(axis), -1), levels=10)
        with plt.rc_context({"hatch.linewidth": 0.8}):  # black lines on a veil are seen on dark and on light
            area = panel.contourf(sharp, sharp, wrong, levels=[0.5, 1.5], colors=[(1.0, 1.0, 1.0, 0.4)], hatches=["/"])
        area.set(edgecolor="black", linewidth=0.0)
        panel.contour(sharp, sharp, wrong, levels=[0.5], colors="black", linewidths=1.4, linestyles="solid")
        steps = (-field(loss, few, q) @ AXES.T).reshape(len(coarse), -1, 2)
        steps = steps * (1.3 * float(coarse[1] - coarse[0]) / steps.norm(dim=-1).max().clamp(min=1e-12))
        steps[steps.norm(dim=-1) < 0.01 * float(coarse[1] - coarse[0])] = torch.nan  # no dot where nothing moves
        panel.quiver(
            coarse, coarse, steps[..., 0], steps[..., 1],
            color="white", angles="xy", scale_units="xy", scale=1.0, width=0.009,
        )  # fmt: skip
        least = value <= value.min() + 1e-4 * (value.max() - value.min())
        spots = (scores[least] @ AXES.T)[:: max(1, int(least.sum()) // 60)]
        size, ring = (4.2, 1.3) if len(spots) < 10 else (2.6, 0.7)
        rings = {"color": "white", "markeredgecolor": figures.VERMILION, "markeredgewidth": ring}
        panel.plot(spots[:, 0], spots[:, 1], "o", markersize=size, clip_on=False, zorder=4, **rings)
        for place in range(3):
            spot = AXES[:, place] / AXES[:, place].norm() * reach * (0.98 if place == 2 else 1.12)
            panel.text(*(0.86 * spot).tolist(), str(place + 1), ha="center", va="center", color="black", fontsize=9,
                       bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "linewidth": 0.5})  # fmt: skip
        panel.set(title=name, aspect="equal", xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, reach))
        panel.title.set_fontsize(8.5)
        panel.grid(False)
        best = scores[int(value.argmin())]
        for column, entry in zip(table.values(), (name, float(value.min()), *best.tolist()), strict=True):
            column.append(entry if isinstance(entry, str) else round(entry, 4))
    figures.show(figure, alt, table, palette=True)
