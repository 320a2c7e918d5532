"""What the fair comparison found (chapter 26), as tables for the decision page and for the written-down sentences."""

from __future__ import annotations

from functools import cache
from typing import Any

import pandas as pd

from book.pipeline import pictures
from book.pipeline.layout import ROOT
from topk_lab import figures
from topk_lab.records import folder
from topk_lab.report import low_to_high, signed
from topk_lab.study import fair

_CHAPTER = "../notebooks/26_fair.ipynb#every-loss-in-every-condition"
_SIGNS = {"ahead": "**ahead**", "behind": "behind", "level": "level"}


@cache
def _runs() -> dict[str, pd.DataFrame]:
    return fair.runs()


@cache
def _verdicts() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Condition after condition and loss after loss: the verdict in top-5 and the one in top-1."""
    final = fair.final_runs(_runs())
    return list(zip(fair.verdicts(final, "top5"), fair.verdicts(final, "top1"), strict=True))


@cache
def verdict_table() -> str:
    """Condition after condition a row per loss, top-5 and top-1 side by side."""
    lines = ["| | top-5 | top-1 |", "|---|---|---|"]
    before = ""
    for five, one in _verdicts():
        condition = fair.CONDITIONS[five["sweep"]]
        if condition != before:
            lines.append(f"| **{condition}** | | |")
        lines.append(f"| {five['loss']} | {_cell(five)} | {_cell(one)} |")
        before = condition
    return "\n".join(lines) + "\n"


_KINDS = {"noise": ("wrong labels", figures.VERMILION), "tails": ("rare classes", figures.GREEN)}
_CLEAN = ("clean labels, equally frequent classes", figures.BLUE)
_SHAPES = {"smooth": "o", "transition": "s", "noised": "^", "differentiable": "D"}


def draw() -> Any:
    """Every loss in every condition as a point of the plane of two gains, and the crowded part of it enlarged."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.7))
    for axis, enlarged in zip(axes, (False, True), strict=True):
        axis.axhline(0, color="grey", linewidth=0.9, linestyle="solid", zorder=1)
        axis.axvline(0, color="grey", linewidth=0.9, linestyle="solid", zorder=1)
        for five, one in _verdicts():
            name, colour = next((kind for part, kind in _KINDS.items() if part in five["sweep"]), _CLEAN)
            if not enlarged or name == _CLEAN[0]:
                _point(axis, five, one, colour)
        axis.set(xlabel="top-5 against cross-entropy (points)", ylabel="top-1 against cross-entropy (points)")
    for name, colour in (_CLEAN, *_KINDS.values()):
        axes[0].plot([], [], "o", color=colour, label=name)
    for name, shape in (*_SHAPES.items(), ("another loss", "v")):
        axes[1].plot([], [], shape, color="grey", fillstyle="none", label=name)
    axes[1].plot([], [], "o", color="grey", label="filled: half of the weight on k = 1")
    for axis, title in zip(axes, ("every condition", _CLEAN[0]), strict=True):
        axis.set_title(title)
    axes[0].legend(loc="lower right", fontsize=8)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncol=6, fontsize=8)
    return figure


def _point(axis: Any, five: dict[str, Any], one: dict[str, Any], colour: str) -> None:
    """The two gains of a loss, a cross as long as their intervals over seeds and images."""
    family = next((family for family in _SHAPES if family in five["loss"]), "")
    mixed = "1 and 5" in five["loss"] or family == "differentiable"
    x, y = five["over seeds and images"], one["over seeds and images"]
    place = five["difference"], one["difference"]
    axis.hlines(place[1], x.low, x.high, color=colour, linewidth=0.8)
    axis.vlines(place[0], y.low, y.high, color=colour, linewidth=0.8)
    axis.plot(*place, _SHAPES.get(family, "v"), color=colour, markerfacecolor=colour if mixed else "white")


PICTURE = pictures.Drawn(
    ROOT / "book" / "_static" / "verdicts.png", draw, lambda: (folder() / "fair.parquet").read_bytes()
)


def _cell(row: dict[str, Any]) -> str:
    """Verdict, linked to where it comes from, difference in points, both intervals."""
    both, seeds = (
        low_to_high(around).replace(" ", "\u00a0") for around in (row["over seeds and images"], row["over seeds"])
    )
    return f"[{_SIGNS[row['verdict']]}]({_CHAPTER}) {signed(row['difference'])} <small>({both}; {seeds})</small>"


@cache
def answer_table() -> str:
    """A row per sentence: the question in short, its answer, the difference and its interval, the p-value."""
    lines = ["| | question | answer | difference | interval | p | seeds |", "|---|---|---|---|---|---|---|"]
    rows = fair.answers({**fair.final_runs(_runs()), **fair.elsewhere()})
    for sentence, row in zip(fair.SENTENCES, rows, strict=True):
        found = row.get("difference")
        numbers = " | | | "
        if found:
            gain = figures.minus(f"{signed(found.mean)} | {low_to_high(found)}")
            numbers = f"{gain} | {fair.p_value(row['p'])} | {row['seeds']}"
        answer = row["answer"] if row["answer"].startswith("open") else f"**{row['answer']}**"
        lines.append(f"| {sentence.name} | {fair.question(sentence)} | {answer} | {numbers} |")
    return "\n".join(lines) + "\n"


@cache
def counted() -> str:
    """How many runs the answers stand on."""
    runs = _runs()
    final = fair.final_runs(runs)
    tuning = sum(len(frame) for name, frame in runs.items() if name.endswith(".tuning"))
    ran = f"{sum(map(len, final.values()))} final runs and {tuning:,} tuning runs"
    return f"In all there were {ran}, in {len(final)} conditions.\n"
