"""The README's picture: the losses themselves, and what a step of each costs beside its peer, from the record."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from book.pipeline import pictures
from book.pipeline.layout import ROOT, BookError

_PROBLEM = {"batch": "256", "classes": "1000", "k": "5", "dtype": "float32"}
FAMILIES = ("smooth", "transition", "noised", "differentiable", "hinge")
_K = 5
_CLASSES = 100


def record() -> Path:
    """The record that the README names under its table."""
    named = re.search(r"`(bench/results/[^`<]+/headline\.csv)`", (ROOT / "README.md").read_text())
    if named is None:
        raise BookError("README.md names no record bench/results/MACHINE/headline.csv")
    return ROOT / named[1]


def words() -> str:
    """What there is to see."""
    faster = [pair["peer"] / pair["ours"] for pair in costs().values() if "peer" in pair]
    return (
        f"Left: each loss of one example with {_CLASSES} classes as the right class moves past the fifth wrong score; "
        "above a lead of 0 it is among the first five. Right: milliseconds a step on one CPU, 256 rows of 1000 "
        f"classes; other packages take {min(faster):.0f} to {max(faster):.0f} times as long as ours."
    )


def losses() -> tuple[list[float], dict[str, list[float]]]:
    """The right class's lead over the fifth wrong score, and the losses there, for fixed wrong scores."""
    import torch

    import topk

    wrong = torch.linspace(2, -2, _CLASSES - 1, dtype=torch.float64)
    leads = torch.linspace(-4, 6, 101, dtype=torch.float64)
    scores = torch.cat(((leads + wrong[_K - 1])[:, None], wrong.expand(len(leads), -1)), dim=1)
    target = torch.zeros(len(leads), dtype=torch.long)
    values = {
        "cross-entropy": torch.nn.functional.cross_entropy(scores, target, reduction="none"),
        "smooth": topk.smooth_topk_loss(scores, target, _K, reduction="none"),
        "transition": topk.transition_topk_loss(scores, target, _K, reduction="none"),
        "noised": topk.noised_topk_loss(scores, target, _K, samples=None, reduction="none"),
        "differentiable": topk.differentiable_topk_loss(scores, target, _K, reduction="none"),
        "calibrated hinge": topk.topk_hinge_loss(scores, target, _K, reduction="none"),
    }
    return leads.tolist(), {name: value.tolist() for name, value in values.items()}


def costs() -> dict[str, dict[str, Any]]:
    """family -> median milliseconds of ours and, where there is one, of the peer; the first problem of each family."""
    found: dict[str, dict[str, Any]] = {}
    with record().open(newline="") as lines:
        for row in csv.DictReader(lines):
            if not row["p50_ms"] or any(row[name] != value for name, value in _PROBLEM.items()):
                continue
            pair = found.setdefault(row["family"], {})
            package, _, rest = row["contender"].partition(" ")
            kind = "ours" if package == "topk" else "peer" if package in ("difftopk", "pytopk") else row["contender"]
            if rest in (row["family"], "") and kind not in pair:
                pair[kind] = float(row["p50_ms"])
                pair[f"name of {kind}"] = package
    return {family: pair for family, pair in found.items() if "ours" in pair}


def cost(family: str) -> str:
    """A step of this loss in units of cross-entropy's, timed in the same run."""
    pair = costs()[family]
    return f"{pair['ours'] / pair['cross_entropy']:.1f}"


def draw() -> Any:
    """The figure."""
    import matplotlib.pyplot as plt

    from topk_lab import figures

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    leads, lines = losses()
    for name, line in lines.items():
        left.plot(leads, line, label=name, **figures.LOSSES[name])
    left.set(title="loss, k = 5", xlabel="lead of the right class over the fifth wrong score", ylim=(-0.2, 8))
    left.legend(fontsize=8.5)
    _bars(right)
    return figure


def _bars(axes: Any) -> None:
    from topk_lab import figures

    found = costs()
    bars = [("cross-entropy", found["smooth"]["cross_entropy"], figures.BLACK)]
    for family, pair in found.items():
        look = figures.LOSSES["calibrated hinge" if family == "hinge" else family]
        bars.append((family, pair["ours"], look["color"]))
        if "peer" in pair:
            bars.append((f"{family}, {pair['name of peer']}", pair["peer"], "#999999"))
    names, times, colours = zip(*bars, strict=True)
    places = range(len(bars))
    axes.barh(places, times, color=colours, height=0.7)
    axes.bar_label(axes.containers[0], [f"{value:.2g}" for value in times], padding=3, fontsize=8.5)
    axes.set_yticks(places, names)
    axes.grid(axis="y", visible=False)
    axes.set(title="ms a step, forward and backward (CPU)", xlim=(0, 1.1 * max(times)))
    axes.invert_yaxis()


PICTURE = pictures.Drawn(ROOT / "book" / "_static" / "losses.png", draw, lambda: record().read_bytes())
