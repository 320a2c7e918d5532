"""What the fair comparison found (chapter 26), as tables for the decision page and for the written-down sentences."""

from __future__ import annotations

import textwrap
from functools import cache
from typing import Any

import pandas as pd

from book.pipeline import pictures
from book.pipeline.layout import ROOT
from topk_lab import figures
from topk_lab.records import folder
from topk_lab.report import low_to_high, signed
from topk_lab.study import fair

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

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 5.0))
    for axis, enlarged in zip(axes, (False, True), strict=True):
        axis.axhline(0, color="grey", linewidth=0.9, linestyle="solid", zorder=1)
        axis.axvline(0, color="grey", linewidth=0.9, linestyle="solid", zorder=1)
        for five, one in _verdicts():
            name, colour = next((kind for part, kind in _KINDS.items() if part in five["sweep"]), _CLEAN)
            if not enlarged or name == _CLEAN[0]:
                _point(axis, five, one, colour)
        axis.set(xlabel="top-5 against cross-entropy (points)", ylabel="top-1 against cross-entropy (points)")
    for name, colour in (_CLEAN, *_KINDS.values()):
        axes[0].plot([], [], "o", color=colour, label=name.split(",")[0])
    for name, shape in (*_SHAPES.items(), ("another loss", "v")):
        axes[1].plot([], [], shape, color="grey", fillstyle="none", label=name)
    axes[1].plot([], [], "o", color="grey", label="filled: half of the weight on k = 1")
    for axis, title in zip(axes, ("every condition", _CLEAN[0]), strict=True):
        axis.set_title(title)
    axes[0].legend(loc="lower right", fontsize=10, handlelength=1)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=10)
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
    """Verdict, difference in points, both intervals."""
    both, seeds = (
        low_to_high(around).replace(" ", "\u00a0") for around in (row["over seeds and images"], row["over seeds"])
    )
    told = f"{_SIGNS[row['verdict']]} {signed(row['difference'])} <small>({both}; {seeds})</small>"
    return figures.minus(told)


@cache
def _answered() -> list[tuple[fair.Sentence, dict[str, Any]]]:
    """Every sentence written down beforehand, with its answer."""
    rows = fair.answers({**fair.final_runs(_runs()), **fair.elsewhere()})
    return list(zip(fair.SENTENCES, rows, strict=True))


_ASKED = {
    "S1": "mixture, linear head", "S2": "mixture, linear head: top-1", "S3": "mixture, 512 units",
    "S4": "smooth, few images", "S5": "as S4, 512 units", "S6": "smooth, wrong labels",
    "S7": "as S6, tuned on wrong labels", "S8": "rare classes, shift or weights",
    "S9": "transition, linear head", "S10": "transition: guesses saved", "S11": "smooth, next word: top-3",
    "S12": "mixture, from pixels",
}  # fmt: skip
"""The sentences in a few words, beside their lines in the picture."""

_ZERO, _POINT, _ROW = 276, 36, 22
"""Of the picture of the answers: where zero is, a point's width and a row's height."""


@cache
def answer_picture() -> str:
    """The sentences' differences with their intervals, as a drawing that follows the page's size and colours."""
    below = _ROW * len(_answered()) + 14
    lines, told = list[str](), list[str]()
    for point in range(-2, 3):
        x = _ZERO + _POINT * point
        lines.append(f'<path class="{"zero" if point == 0 else "grid"}" d="M{x} 8V{below}"/>')
        sign = figures.minus(f"{point:+d}") if point else "0"
        lines.append(f'<text x="{x}" y="{below + 16}" text-anchor="middle">{sign}</text>')
    for number, (sentence, row) in enumerate(_answered()):
        y, answer, found = _ROW * number + 20, row["answer"].split(":")[0], row.get("difference")
        lines.append(f'<text x="0" y="{y + 4}"><tspan class="name">{sentence.name}</tspan></text>')
        lines.append(f'<text x="31" y="{y + 4}">{_ASKED[sentence.name]}</text>')
        if found is None:
            continue
        low, mean, high, least = (
            round(_ZERO + _POINT * value, 1) for value in (found.low, found.mean, found.high, sentence.least)
        )
        lines.append(f'<g class="{answer}"><path d="M{low} {y}H{high}"/><circle cx="{mean}" cy="{y}" r="4"/></g>')
        if sentence.least:
            lines.append(f'<path class="least" d="M{least} {y - 8}V{y + 8}"/>')
        if answer != "open":
            lines.append(f'<text class="{answer}" x="{_ZERO + 74}" y="{y + 4}">{answer}</text>')
        told.append(f"{sentence.name} {answer}, {figures.minus(f'{found.mean:+.2f}')}")
    label = (
        "The twelve predictions with their differences and intervals, in points, in S10 in guesses. "
        + "; ".join(told) + "."
    )  # fmt: skip
    label = "\n".join(textwrap.wrap(label, 105))
    return (
        f'<div class="topk-answers">\n<svg role="img" viewBox="0 0 392 {below + 22}"\naria-label="{label}">\n'
        + "\n".join(lines) + "\n</svg>\n</div>\n"
    )  # fmt: skip


@cache
def answer_table() -> str:
    """A row per sentence: the question in short, its answer with the difference, its interval and the p-value."""
    lines = ["| | question | answer |", "|---|---|---|"]
    for sentence, row in _answered():
        found, told = row.get("difference"), row["answer"]
        answer = told if told.startswith("open") else f"**{told}**"
        if found:
            gain, around = (figures.minus(text) for text in (signed(found.mean), low_to_high(found)))
            count = "" if row["seeds"] == _USUAL else f", {row['seeds']} seeds"
            around = around.replace(" ", "\u00a0")
            answer += f", {gain}<br><small>{around}; p\u00a0{_relation(fair.p_value(row['p']))}{count}</small>"
        lines.append(f"| {sentence.name} | {fair.question(sentence)} | {answer} |")
    return "\n".join(lines) + "\n"


_USUAL = 10
"""The number of seeds that is not worth a word."""


def _relation(p: str) -> str:
    return p.replace(" ", "\u00a0") if p[0] in "<>" else f"=\u00a0{p}"


@cache
def counted() -> str:
    """How many runs the answers stand on."""
    runs = _runs()
    final = fair.final_runs(runs)
    tuning = sum(len(frame) for name, frame in runs.items() if name.endswith(".tuning"))
    ran = f"{sum(map(len, final.values()))} final runs and {tuning:,} tuning runs"
    return f"In all there were {ran}, in {len(final)} conditions.\n"
