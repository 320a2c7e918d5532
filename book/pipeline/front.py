"""The figure of the front page: how it starts, its picture for readers without scripts, the element that holds both.

`book/_static/front.js` makes it move.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from typing import Any

from book.pipeline import pictures
from book.pipeline.layout import ROOT

PATH = ROOT / "book" / "_static" / "front.png"
CLASSES = ("wolf", "akita", "husky", "fox", "cat", "chair")
SCORES = (1.9, 1.5, 1.2, -0.3, -1.5, -3.0)
RIGHT, K = 2, 3
WORDS = (
    "The scores of six classes for a photograph of a husky: wolf 1.9, akita 1.5, husky 1.2, fox -0.3, cat -1.5, "
    "chair -3. Below, for each of five losses, how a step moves every score. With three guesses the husky is already "
    "among them. Cross-entropy pushes wolf and akita down all the same; the other losses hardly touch them."
)


def element() -> str:
    """What the front page holds."""
    start = json.dumps({"classes": CLASSES, "scores": SCORES, "right": RIGHT, "k": K})
    return (
        f'<div class="topk-front" role="group" aria-label="{html.escape(WORDS)}">'
        f'<img src="../_static/{PATH.name}" alt="{html.escape(WORDS)}">'
        f'<script type="application/json">{start}</script></div>\n'
        '<script src="../_static/five-losses.js" defer></script><script src="../_static/front.js" defer></script>'
    )


def steps(scores: tuple[float, ...], right: int, k: int) -> dict[str, tuple[float, list[float]]]:
    """loss -> its value and how a step of gradient descent moves every score, by the module."""
    import torch

    import topk

    losses: dict[str, Callable[[Any, Any], Any]] = {
        "cross-entropy": torch.nn.functional.cross_entropy,
        "smooth": lambda x, y: topk.smooth_topk_loss(x, y, k),
        "transition": lambda x, y: topk.transition_topk_loss(x, y, k, width=1.0),
        "noised": lambda x, y: topk.noised_topk_loss(x, y, k, samples=None),
        "differentiable": lambda x, y: topk.differentiable_topk_loss(x, y, k),
    }
    found = {}
    for name, loss in losses.items():
        row = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
        value = loss(row, torch.tensor(right))
        value.backward()
        assert row.grad is not None
        found[name] = (value.item(), (-row.grad).tolist())
    return found


def draw() -> Any:
    """The figure: the scores, and below them a row of bars for each loss."""
    import matplotlib.pyplot as plt

    from topk_lab import figures

    found = steps(SCORES, RIGHT, K)
    figure, axes = plt.subplots(1 + len(found), figsize=(7, 5.6), sharex=True, height_ratios=[3] + [1] * len(found))
    guessed = sorted(SCORES, reverse=True)[:K]
    axes[0].bar(CLASSES, SCORES, color=[figures.BLACK if score in guessed else "#bbbbbb" for score in SCORES])
    axes[0].set(title=f"scores of a photograph of a husky; black: the {K} guesses", ylabel="score")
    for axis, (name, (value, step)) in zip(axes[1:], found.items(), strict=True):
        _bars(axis, step, (figures.BLUE, figures.VERMILION))
        axis.set_title(f"{name}: loss {value:.2f}, and how a step moves the scores", fontsize=9)
    axes[-1].get_xticklabels()[RIGHT].set_fontweight("bold")
    return figure


def _bars(axis: Any, step: list[float], colours: tuple[str, str]) -> None:
    axis.bar(CLASSES, step, color=[colours[by < 0] for by in step])
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(ylim=(-1, 1), yticks=[-1, 0, 1])


PICTURE = pictures.Drawn(PATH, draw)
