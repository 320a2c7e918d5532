"""Diagrams of structures, each one call like those of `figures`: a comparator network, a tree, and trips to memory.

comparators(layers, values, chances, alt="...")     # a network, one score's way through it as the width of a wire
tree([["a", "b"], ["ab"]], alt="...")               # leaves below, each two of them under their product
round_trips({"torch": [("add", 2, 1)]}, alt="...")  # operations above, memory below, arrows as wide as what they move
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from topk_lab import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Layers = Sequence[Sequence[tuple[int, int]]]


def comparators(
    layers: Layers,
    values: Sequence[Sequence[float]],
    chances: Sequence[Sequence[float]],
    alt: str,
    title: str = "",
    width: float = 7.0,
) -> None:
    """A network of comparators (low, high), drawn from left to right with the highest wire on top.

    Before the first layer and after each, a wire carries a value, written at both ends, and the chance that the score
    in question is on it, which is the width of its orange line and is written at the right. `width` is that of the
    figure in inches.
    """
    wires, x = len(values[0]), 0.0
    figure, axis = plt.subplots(figsize=(width, 0.6 + min(0.42 * wires, 4.0)))
    since, now = [0.0] * wires, list(chances[0])
    for layer, after in zip(layers, chances[1:], strict=True):
        x += 0.3
        for column in _columns(layer):
            x += 0.5
            for low, high in column:
                axis.plot([x, x], [low, high], color=figures.BLUE, marker="o", markersize=4, linewidth=1.5,
                          linestyle="solid", zorder=3)  # fmt: skip
                for wire in (low, high):
                    _wire(axis, wire, since[wire], x, now[wire])
                    since[wire], now[wire] = x, after[wire]
    end = x + 0.8
    for wire in range(wires):
        _wire(axis, wire, since[wire], end, now[wire])
    for wire in range(wires):
        axis.text(-0.015 * end, wire, f"{values[0][wire]:.2g}".replace("-", "−"), ha="right", va="center")
        axis.text(1.015 * end, wire, f"rank {wires - wire}:  {chances[-1][wire]:.2f}", ha="left", va="center")
    beside = 0.7 / width  # as much room for the writing whatever the width
    axis.set(title=title, xlim=(-beside * end, (1 + 2 * beside) * end), ylim=(-0.6, wires - 0.4))
    axis.axis("off")
    last = range(wires - 1, -1, -1)
    figures.show(figure, alt, {
        "rank": [wires - wire for wire in last], "enters": [values[0][wire] for wire in last],
        "leaves": [values[-1][wire] for wire in last], "chance at the end": [chances[-1][wire] for wire in last],
    })  # fmt: skip


def _wire(axis: Axes, wire: int, start: float, end: float, chance: float) -> None:
    """A piece of a wire, as wide as the chance on it."""
    axis.plot([start, end], [wire, wire], color="lightgrey", linewidth=0.8, linestyle="solid", zorder=1)
    if chance > 0.003:
        axis.plot([start, end], [wire, wire], color=figures.ORANGE, linewidth=12 * chance, linestyle="solid",
                  solid_capstyle="butt", zorder=2)  # fmt: skip


def _columns(layer: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The comparators of a layer beside each other where they would cross."""
    columns: list[list[tuple[int, int]]] = []
    for low, high in sorted(layer):
        free = (c for c in columns if all(high < a or low > b for a, b in c))
        column = next(free, None)
        if column is None:
            columns.append(column := [])
        column.append((low, high))
    return columns or [[]]


def tree(levels: Sequence[Sequence[str]], alt: str, title: str = "", size: figures.Size = (7.8, 3.2)) -> None:
    """Levels of words, the leaves first: the i-th of each level stands over the (2i)-th and (2i+1)-th below it."""
    figure, axis = plt.subplots(figsize=size)
    places = [(i + 0.5) / len(levels[0]) for i in range(len(levels[0]))]
    for height, words in enumerate(levels):
        if height:
            pairs = [places[2 * i : 2 * i + 2] for i in range(len(words))]
            above = [sum(pair) / len(pair) for pair in pairs]
            for x, pair in zip(above, pairs, strict=True):
                for end in pair:
                    axis.plot([end, x], [height - 1, height], color=figures.BLACK, linewidth=1.3, linestyle="solid")
            places = above
        for x, text in zip(places, words, strict=True):
            axis.text(x, height, text, ha="center", va="center", fontsize=9, bbox={
                "boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": figures.BLACK})  # fmt: skip
    axis.set(title=title, xlim=(0, 1), ylim=(-0.5, len(levels) - 0.5))
    axis.axis("off")
    figures.show(figure, alt, {f"level {height}": list(words) for height, words in enumerate(levels)})


_LEAST = 0.1  # passes that are drawn


def round_trips(programs: Mapping[str, Sequence[tuple[str, float, float]]], alt: str, width: float = 7.8) -> None:
    """One panel a program: its operations (name, passes read, passes written) above the memory that they go to.

    An arrow is as wide as what it moves, and the number beside it says how many passes; less than a tenth is left out.
    """
    figure, axes = plt.subplots(len(programs), 1, figsize=(width, 1.75 * len(programs)), squeeze=False)
    most = max(map(len, programs.values()))
    for axis, (title, operations) in zip(axes[:, 0], programs.items(), strict=True):
        axis.fill_between([-0.5, most - 0.5], 0, 0.3, color="#D9D9D9", linewidth=0)
        axis.text(most / 2 - 0.5, 0.13, "memory: all scores", ha="center", va="center", fontsize=8.5)
        for x, (name, read, written) in enumerate(operations):
            axis.text(x, 1.3, name, ha="center", va="center", fontsize=9, bbox={
                "boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": figures.BLUE})  # fmt: skip
            apart = 0.2 if min(read, written) >= _LEAST else 0.0
            _trip(axis, x - apart, 0.3, 1.08, read, figures.BLUE)
            _trip(axis, x + apart, 1.08, 0.3, written, figures.VERMILION)
        axis.set(title=title, xlim=(-0.5, most - 0.5), ylim=(0, 1.55))
        axis.axis("off")
    rows = [(title, *operation) for title, operations in programs.items() for operation in operations]
    columns = map(list, zip(*rows, strict=True))
    names = ("program", "operation", "passes read", "passes written")
    figures.show(figure, alt, dict(zip(names, columns, strict=True)))


def _trip(axis: Axes, x: float, start: float, end: float, passes: float, colour: str) -> None:
    """An arrow to or from memory."""
    if passes >= _LEAST:
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.5 * passes, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", (x, end), (x, start), arrowprops=arrow)
        axis.text(x + 0.09, 0.7, f"{passes:.1f}".removesuffix(".0"), fontsize=8.5, color=colour, va="center")
