"""Every figure of the book is one call here: data in, a picture with its alt text and its data as a table out.

Colours are those of Okabe and Ito, which colour-blind readers tell apart, and every colour has its own dash, so that no
line is told from another by colour alone. Figures are drawn on white; the book's style sheet turns them for dark pages.

    lines(Panel(k, {"smooth": accuracy}, x_label="$k$"), alt="...")     # lines, bands, dots; several panels
    knobs({"tau": (0.1, 1.0)}, draw, start={"tau": 1.0}, alt="...")     # the same panels, following sliders
    draggable({"1": {"smooth": (p, right)}}, steps=20, start=(8, 7), alt="...")  # a label distribution to drag
    dots, bars, heat, scatter, diagram                                   # see each
    along_the_target, over_two_wrong_scores, on_the_simplex              # pictures of a loss
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""Scores (rows, classes) and targets (rows,) -> one number per row."""

Look = Mapping[str, Any]
Size = tuple[float, float]
Table = Mapping[str, Sequence[Any]]

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#AA4F88", "#56B4E9", "#000000", "#777777"
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (9, 2)), "-")
MARKERS = "osd^vDP*X"

LOSSES: dict[str, Look] = {
    name: {"color": colour, "linestyle": dash}
    for name, colour, dash in zip(
        ("cross-entropy", "smooth", "transition", "noised", "differentiable", "calibrated hinge", "kth hinge"),
        (BLACK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY),
        ("-", *DASHES[1:]),
        strict=True,
    )
}
"""A loss looks the same in every figure: a line with one of these names is drawn so."""

REFERENCE: Look = {"color": "grey", "linewidth": 0.9, "linestyle": "dotted"}
"""For lines that others are compared with: a proved slope, a bound."""

SLATE, PALE = "#3E5368", "#BFCCD8"  # for what is no loss; told apart in grey, too
SHADES = LinearSegmentedColormap.from_list("shades", (SLATE, PALE))
SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # fields of one sign and of two; both read in grey
_PIXELS_PER_INCH, _DOTS_PER_INCH, _TABLE_ROWS = 100, 144, 12


def use_style() -> None:
    """Sets matplotlib's defaults."""
    mpl.rcParams.update({
        "axes.axisbelow": True, "axes.grid": True, "axes.labelsize": 10, "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=DASHES), "axes.spines.top": False,
        "axes.titlelocation": "left", "axes.titlesize": 10.5, "figure.constrained_layout.use": True,
        "figure.constrained_layout.w_pad": 0.08, "figure.facecolor": "white", "figure.figsize": (7.0, 3.4),
        "font.size": 10, "grid.alpha": 0.35, "grid.linewidth": 0.6, "image.cmap": SEQUENTIAL, "legend.fontsize": 8.5,
        "legend.frameon": False, "legend.handlelength": 2.8, "lines.linewidth": 1.8, "mathtext.fontset": "cm",
    })  # fmt: skip


def look(loss: str) -> Look:
    """How a loss with settings in its name is drawn, such as "smooth, k = 1 and 5": as its family."""
    words = loss.split(",")[0].split()
    families = ("differentiable", "smooth", "noised", "transition")
    family = next((name for name in families if name in words and words[-1] != "hinge"), loss)
    return LOSSES.get(loss, LOSSES.get(family, {"color": GREY}))


def looks_of(names: Iterable[str], own: Mapping[str, Look] | None = None) -> dict[str, Look]:
    """{name: colour and dash} for a picture with all of these lines: a loss's own where it is free, else the next."""
    found: dict[str, Look] = {}
    for name in names:
        wanted = (own or {}).get(name) or look(name)
        if wanted.get("color") not in (GREY, *(each["color"] for each in found.values())):
            found[name] = wanted
    free = (
        {"color": colour, "linestyle": dash}
        for colour, dash in zip(COLOURS, DASHES, strict=True)
        if colour not in [each["color"] for each in found.values()]
    )
    return {name: found[name] if name in found else next(free) for name in names}


def _for_scripts(looks: Mapping[str, Look]) -> dict[str, list[str]]:
    """{name: [colour, dashes]} as SVG has them; what is black there is light on dark pages."""
    return {
        _plain(name): [
            "currentColor" if style["color"] == BLACK else str(style["color"]),
            " ".join(f"{1.2 * part:g}" for part in style["linestyle"][1]) if len(style["linestyle"]) == 2 else "",
        ]
        for name, style in looks.items()
    }


# --- showing ---


def png(figure: Figure, palette: bool = False) -> bytes:
    """The figure as it is shown, closed afterwards; with a palette of 256 colours it is a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    plt.close(figure)
    if not palette:
        return buffer.getvalue()
    from PIL import Image

    small = io.BytesIO()
    coverage = Image.Quantize.MAXCOVERAGE  # keeps colours that few pixels have
    Image.open(buffer).convert("RGB").quantize(256, coverage).save(small, format="png", optimize=True)
    return small.getvalue()


def show(figure: Figure, alt: str, data: Table | None = None, palette: bool = False) -> None:
    """Shows a figure with its text for readers who cannot see it, and its data as a folded table.

    Of long columns some evenly spaced rows are shown, first and last among them. `palette` is for fields of colour:
    they make heavy pages otherwise, and dark pages leave them as they are.
    """
    from IPython.display import HTML, display

    width = int(figure.get_figwidth() * _PIXELS_PER_INCH)
    bundle = {"image/png": png(figure, palette), "text/plain": f"<figure: {alt}>"}
    about = {"width": width, "alt": alt, **({"field": True} if palette else {})}
    display(bundle, raw=True, metadata={"image/png": about})  # type: ignore[no-untyped-call]
    if data:
        display(HTML(_folded_table(data)))  # type: ignore[no-untyped-call]


def _folded_table(data: Table) -> str:
    frame = pd.DataFrame({name: pd.Series(list(column), dtype=object) for name, column in data.items()})
    chosen = np.linspace(0, len(frame) - 1, min(len(frame), _TABLE_ROWS)).round().astype(int)
    table = frame.iloc[chosen].to_html(
        index=False, border=0, justify="left", na_rep="", escape=False, float_format="{:.4g}".format
    )
    note = f" ({len(chosen)} of {len(frame)} points)" if len(chosen) < len(frame) else ""
    return f"<details><summary>The figure's data{note}</summary>{table}</details>"


def _numbers(values: Iterable[Any]) -> list[float]:
    return [float(value) + 0.0 for value in values]  # no -0


def _plain(text: str) -> str:
    """A label without the marks of TeX: tables are read, or read aloud, as they are."""
    return text.replace("$", "").replace("\\", "").replace("\n", " ")


def _with_greek(name: str) -> str:
    """An argument's name as a formula has it: tau becomes its letter."""
    letters = {"tau": "τ", "epsilon": "ε", "lambda": "λ", "alpha": "α", "beta": "β", "gamma": "γ", "mu": "μ"}
    return " ".join(letters.get(word, word) for word in name.split(" "))


# --- lines ---


class Band(NamedTuple):
    """A line with the interval around it."""

    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Lines over one axis.

    Attributes:
        x: places on the axis.
        lines: {name: values or `Band`}; a line named like a loss looks like that loss everywhere.
        scale: "linear", "log" (both axes), "log x" or "log y".
        points: dots instead of lines (stems where a slider moves them).
        looks: {name: matplotlib's line properties} where the colour cycle is not wanted.
        levels, verticals: {text: place} of thin grey lines across the panel.
        marks: {name: (x, y)} of single marks, large, open and in the colour of the line of that name, else dots in a
            colour of their own.
        marked: what the open marks are, for the legend.
        x_ticks: {place: text}.
    """

    x: Iterable[Any]
    lines: Mapping[str, Any]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    scale: str = "linear"
    y_range: tuple[float | None, float | None] | None = None
    points: bool = False
    markers: bool = False
    looks: Mapping[str, Look] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    verticals: Mapping[str, float] = field(default_factory=dict)
    marks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    marked: str = ""
    x_ticks: Mapping[float, str] = field(default_factory=dict)


def lines(
    *panels: Panel,
    alt: str,
    size: Size | None = None,
    columns: int = 3,
    share_y: bool = False,
    data: Table | None = None,
) -> None:
    """Shows panels of lines side by side, with one legend, and the numbers as a table (or other `data`).

    `size` is that of the figure in inches, `columns` the most panels beside each other.
    """
    show(_drawn(panels, size, columns, share_y), alt, _data_of(panels) if data is None else data)


def _drawn(panels: Sequence[Panel], size: Size | None, columns: int = 3, share_y: bool = False) -> Figure:
    down = -(-len(panels) // columns)
    figure, axes = _grid(len(panels), columns, size or (7.0 if len(panels) == 1 else 7.8, 3.4 * down), sharey=share_y)
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel)
        if share_y:
            axis.label_outer(remove_inner_ticks=False)
            axis.set_xlabel(panel.x_label)
    names = [
        [*panel.lines, *(name for name in (*panel.marks, panel.marked) if name and name not in panel.lines)]
        for panel in panels
    ]
    if len(panels) > 1 and all(each == names[0] for each in names) and len(names[0]) > 1:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncol=_legend_columns(names[0], figure.get_figwidth()))
    else:
        for axis in (axis for axis, each in zip(axes, names, strict=True) if len(each) > 1):
            axis.legend()
    return figure


def _grid(count: int, columns: int, size: Size, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row after row; places left over are empty."""
    across = min(columns, count)
    figure, axes = plt.subplots(-(-count // across), across, figsize=size, squeeze=False, **shared)
    for empty in axes.flat[count:]:
        empty.axis("off")
    return figure, list(axes.flat[:count])


def _label_outside(axes: Sequence[Axes], columns: int) -> None:
    """Names and numbers of axes on the outside alone: at the left, and at the bottom of every column of panels."""
    for place, axis in enumerate(axes):
        x_label = axis.get_xlabel()
        axis.label_outer()
        if place + columns >= len(axes):  # the last of its column, even where the row goes on below others
            axis.set_xlabel(x_label)
            axis.tick_params("x", labelbottom=True)


def _legend_columns(names: Sequence[str], width: float = 7.0) -> int:
    """As many as fit below a figure of this width in inches, by the number of letters."""
    widest, line = (118.0, 8) if width >= 7.0 else (16.3 * width, 11)
    for count in range(len(names), 1, -1):
        rows = -(-len(names) // count)
        if sum(line + max(map(len, names[at : at + rows])) for at in range(0, len(names), rows)) <= widest:
            return -(-len(names) // rows)
    return 1


def _draw(axis: Axes, panel: Panel) -> None:
    x = _numbers(panel.x)
    for number, (name, values) in enumerate(panel.lines.items()):
        style: dict[str, Any] = dict(panel.looks.get(name, LOSSES.get(name, {})))
        if panel.points or panel.markers:
            style = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4, **style}
        if panel.points:
            style["linestyle"] = "none"
        band = values if isinstance(values, Band) else None
        (drawn,) = axis.plot(x, _numbers(band.mean if band else values), label=name, **style)
        if band:
            edges = (_numbers(band.low), _numbers(band.high))
            axis.fill_between(x, *edges, color=drawn.get_color(), alpha=0.17, linewidth=0)
    known = {str(line.get_label()): line for line in axis.lines}
    open_mark: Look = {"marker": "o", "markersize": 9, "fillstyle": "none", "markeredgewidth": 1.8}
    for number, (name, place) in enumerate(panel.marks.items()):
        if name in known:
            own = str(known[name].get_marker())
            style = {**open_mark, "color": known[name].get_color(), **({} if own == "None" else {"marker": own})}
        else:
            colour = LOSSES.get(name, {"color": COLOURS[number + 1]})["color"]
            style = {"marker": MARKERS[number % len(MARKERS)], "color": colour, "label": name}
        axis.plot(*map(float, place), linestyle="none", **style)
    if panel.marked:
        axis.plot([], [], linestyle="none", label=panel.marked, **{**open_mark, "color": "grey"})
    for text, level in panel.levels.items():
        axis.axhline(level, color="grey", linewidth=0.9, linestyle="solid", zorder=1)
        axis.annotate(text, (0.01, level), xycoords=("axes fraction", "data"), fontsize=8, color="grey",
                      xytext=(0, 2), textcoords="offset points")  # fmt: skip
    for text, at in panel.verticals.items():
        axis.axvline(at, color="grey", linewidth=0.9, linestyle="solid", zorder=1)
        axis.annotate(text, (at, 1.0), xycoords=("data", "axes fraction"), fontsize=8, color="grey", va="top",
                      ha="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.scale in ("log", "log x"):
        axis.set_xscale("log")
    if panel.scale in ("log", "log y"):
        axis.set_yscale("log")
    if panel.y_range is not None:
        axis.set_ylim(*panel.y_range)
    counted = all(place.is_integer() for place in x)
    for side, kind, whole in ((axis.xaxis, axis.get_xscale(), counted), (axis.yaxis, axis.get_yscale(), False)):
        if kind == "log":
            _plain_powers(side)
        else:
            side.set_major_locator(_round(whole))
    if panel.x_ticks:
        axis.set_xticks([*panel.x_ticks], [*panel.x_ticks.values()])
        axis.minorticks_off()


def _round(whole: bool) -> MaxNLocator:
    """Ticks in steps of 1, 2 or 5, never of 2.5."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=whole)


def _plain_powers(side: Axis) -> None:
    """Names of places on a logarithmic axis: 0.1, 1, 10 where it is short, with 2 and 5 where it is shorter still."""
    power = LogFormatterSciNotation()
    power.set_axis(side)

    def name(place: float, minor: bool) -> str:
        low, high = sorted(side.get_view_interval())
        if not 5e-4 < low < high < 2e5:
            return "" if minor else str(power(place))
        if minor and (high > 50 * low or f"{place:e}"[0] not in "25"):
            return ""
        return f"{place:g}" if place < 9e3 else f"{place:,.0f}"

    side.set_major_formatter(lambda place, _: name(place, False))
    side.set_minor_formatter(lambda place, _: name(place, True))


def _data_of(panels: Sequence[Panel]) -> dict[str, list[Any]]:
    """The panels' numbers; a panel with an axis of its own brings it."""
    found: dict[str, list[Any]] = {}
    axis: list[float] | None = None
    for panel in panels:
        mark = f"{_plain(panel.title)}: " if len(panels) > 1 and panel.title else ""
        if _numbers(panel.x) != axis:
            axis = _numbers(panel.x)
            name = _plain(panel.x_label or "x")
            found[name if name not in found else f"{mark}{name}"] = axis
        for name, values in panel.lines.items():
            if isinstance(values, Band):
                parts = zip(*map(_numbers, values), strict=True)
                found[mark + _plain(name)] = [
                    "not run" if math.isnan(mean) else f"{mean:.4g} [{low:.4g}, {high:.4g}]"
                    for mean, low, high in parts
                ]
            else:
                found[mark + _plain(name)] = _numbers(values)
        for name, place in panel.marks.items():
            found[f"{mark}{_plain(name)}, marked"] = [f"{float(place[0]):.4g}, {float(place[1]):.4g}"]
    return found


def knobs(
    settings: Mapping[str, Sequence[float]],
    draw: Callable[..., Sequence[Panel]],
    *,
    start: Mapping[str, float],
    alt: str,
    compare: Sequence[float] = (),
) -> None:
    """Panels of lines that follow sliders, with no kernel: every combination of settings is worked out here.

    Args:
        settings: for every slider, its name and values.
        draw: for one value of each (keywords by name with spaces as underscores), panels with a title, a `y_range` and
            at most seven names of lines between them. Only the lines' values may depend on the settings.
        start: the values shown first.
        alt: what there is to see, in words.
        compare: values of the first slider that the picture for readers without scripts compares by the first line of
            each panel; when empty, that picture shows the panels as they start.
    """
    names = list(settings)
    drawn = {}
    for place in product(*(range(len(values)) for values in settings.values())):
        chosen = {name: settings[name][at] for name, at in zip(names, place, strict=True)}
        drawn[",".join(map(str, place))] = _called(draw, chosen)
    panels = next(iter(drawn.values()))
    sliders = [
        {"name": _with_greek(name), "values": list(values), "start": list(values).index(start[name])}
        for name, values in settings.items()
    ]
    named = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    if len(named) > len(COLOURS):
        raise ValueError(f"panels must name at most {len(COLOURS)} lines between them, got {', '.join(named)}")
    looks = looks_of(named, {name: style for panel in panels for name, style in panel.looks.items()})
    if any(panel.points and panel.scale in ("log", "log y") for panel in panels):
        raise ValueError("stems start at zero, so they need an axis that is not logarithmic")
    words = ("title", "x_label", "y_label")  # the script sets no formulas
    frame = {
        "knobs": sliders,
        "panels": [
            {name: _plain(getattr(panel, name)) for name in words}
            | {"y_range": panel.y_range, "points": panel.points, "x": _short(panel.x)}
            | {"log": [panel.scale in ("log", side) for side in ("log x", "log y")]}
            | {"lines": [_plain(name) for name in panel.lines]}
            for panel in panels
        ],
        "frames": {at: [[_short(line) for line in p.lines.values()] for p in found] for at, found in drawn.items()},
        "looks": _for_scripts(looks),
    }
    _show_script("topk-knobs", "knobs.js", frame, _still(draw, start, names[0], compare), alt)


def simplex_grid(steps: int) -> Tensor:
    """Distributions over three classes, (points, 3): class 1 has i, class 2 j of `steps` shares; i runs slowest."""
    counts = [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    return torch.tensor(counts, dtype=torch.float64) / steps


def draggable(
    rests: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    *,
    steps: int,
    start: tuple[int, int],
    alt: str,
    knob: str = "k",
) -> None:
    """A distribution over three classes to drag, and where each of at most four losses rests, with no kernel.

    Args:
        rests: {value of the knob: {loss: (p at rest (points, 3), whether it ranks right (points,))}}, at the points of
            `simplex_grid(steps)`.
        start: the shares i and j of the distribution shown first.
        alt: what there is to see, in words.
        knob: what the values choose.
    """
    names = list(next(iter(rests.values())))
    spots = [(i, j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    frames: dict[str, list[list[list[Any]]]] = {}
    for value, found in rests.items():
        frames[value] = [[[] for _ in range(steps + 1)] for _ in names]
        for table, (p, right) in zip(frames[value], found.values(), strict=True):
            for (i, _), place, good in zip(spots, p.tolist(), right.tolist(), strict=True):
                table[i].append({"p": [round(share, 3) for share in place], "right": bool(good)})
    picture = _simplex_still(rests, simplex_grid(steps)[spots.index(start)], spots.index(start), knob)
    begin = {"first": start[0], "second": start[1], "view": 0}
    frame = {"steps": steps, "knob": knob, "names": names, "start": begin, "rests": frames}
    frame["looks"] = _for_scripts(looks_of(names))
    _show_script("topk-simplex", "simplex.js", frame, picture, alt)


def _simplex_still(rests: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], q: Tensor, at: int, knob: str) -> Figure:
    """The picture for readers without scripts: one triangle a value of the knob."""
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    figure, axes = _grid(len(rests), len(rests), (7.0, 3.4))
    for axis, (value, found) in zip(axes, rests.items(), strict=True):
        outline, middle = corner[[0, 1, 2, 0]], corner.mean(0)
        axis.plot(outline[:, 0], outline[:, 1], color="black", linewidth=1, linestyle="solid")
        for number in range(3):
            ends = torch.stack((corner[number], 1.5 * middle - 0.5 * corner[number]))
            axis.plot(ends[:, 0], ends[:, 1], color="grey", linewidth=0.6, linestyle="solid")
            x, y = (1.12 * corner[number] - 0.12 * middle).tolist()
            axis.text(x, y, f"class {number + 1}", ha="center", va="center")
        axis.plot(*(q @ corner).tolist(), "o", color="black", fillstyle="none", markersize=15, label="$q$")
        for (name, (p, right)), marker in zip(found.items(), "os^D", strict=False):
            colour = looks_of(found)[name]["color"]
            fill = colour if right[at] else "none"
            axis.plot(*(p[at] @ corner).tolist(), marker, color=colour, markerfacecolor=fill, label=name)
        axis.set(aspect="equal", xlim=(-0.2, 1.2), ylim=(-0.15, 1.05))
        axis.set_title(f"{knob} = {value}", y=0.93)
        axis.axis("off")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=5)
    return figure


def _show_script(box: str, script: str, frame: Mapping[str, Any], picture: Figure, alt: str) -> None:
    """An interactive figure: its numbers, the script that draws them, and a picture for readers without scripts."""
    still = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png(picture)).decode()}">'
    show_scripted(box, script, frame, still, alt)


def show_scripted(box: str, script: str, frame: Mapping[str, Any], still: str, alt: str) -> None:
    """Something that needs no kernel: a box with what readers without scripts see, the numbers, and the script.

    The script is one function with what all of them share (`dom.js`).
    """
    folder = resources.files("topk_lab")
    code = "".join(folder.joinpath(name).read_text() for name in ("dom.js", script))
    data = json.dumps(frame, separators=(",", ":")).replace("</", "<\\/")
    page = (
        f'<div class="{box}" role="group" aria-label="{html.escape(alt)}">{still}'
        f'<script type="application/json">{data}</script></div>'
        f'<script>(function () {{\n"use strict";\n{code}}})();</script>'
    )
    from IPython.display import display

    display({"text/html": page, "text/plain": f"<interactive figure: {alt}>"}, raw=True)  # type: ignore[no-untyped-call]


def _called(draw: Callable[..., Sequence[Panel]], chosen: Mapping[str, float]) -> Sequence[Panel]:
    return draw(**{name.replace(" ", "_"): value for name, value in chosen.items()})


def _still(
    draw: Callable[..., Sequence[Panel]], start: Mapping[str, float], first: str, compare: Sequence[float]
) -> Figure:
    """The picture for readers without scripts."""
    at_start = _called(draw, start)
    rest = ", ".join(f"{name} {value:g}" for name, value in start.items() if not compare or name != first)
    found = {f"{first} {value:g}": _called(draw, {**start, first: value}) for value in compare}
    still, looks = [], looks_of(dict.fromkeys(name for panel in at_start for name in panel.lines))
    for number, panel in enumerate(at_start):
        shown = {text: next(iter(panels[number].lines.values())) for text, panels in found.items()} or panel.lines
        own = panel.looks if found else {**looks, **panel.looks}
        still.append(replace(panel, lines=shown, markers=panel.points, points=False, looks=own))
    figure = _drawn(still, (7.6, 3.4) if len(still) > 1 else (5.4, 3.4))
    figure.suptitle(f"at {rest}" if rest else "", fontsize=9, color="grey")
    return figure


def _short(values: Iterable[Any]) -> list[float]:
    """Four digits are more than a screen shows."""
    return [float(f"{float(value):.4g}") for value in values]


# --- intervals, bars, maps ---


def dots(
    panels: Mapping[str, Mapping[str, Any]],
    alt: str,
    x_label: str = "points",
    *,
    share_x: bool = False,
    looks: Mapping[str, Look] | None = None,
    columns: int = 0,
    size: Size | None = None,
) -> None:
    """One panel a title, one line a name: a mean with its interval (anything with mean, low and high).

    With `share_x` lengths may be compared across panels. `looks` are for names that are no loss, `columns` the most
    panels beside each other, if not all of them.
    """
    names = list(next(iter(panels.values())))
    columns = columns or len(panels)
    size = size or (8.0, -(-len(panels) // columns) * (0.9 + 0.24 * len(names)))
    figure, axes = _grid(len(panels), columns, size, sharex=share_x, sharey=True)
    data: dict[str, list[Any]] = {"": names}
    for axis, (title, found) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color="black", linewidth=1, linestyle="solid")
        for place, name in enumerate(reversed(names)):
            interval, colour = found[name], {**look(name), **(looks or {}).get(name, {})}["color"]
            axis.plot([interval.low, interval.high], [place, place], color=colour, linestyle="solid")
            axis.plot(interval.mean, place, marker="o", markersize=4, color=colour)
        axis.set(title=title, yticks=range(len(names)), yticklabels=names[::-1], xlabel=x_label)
        axis.set_ylim(-0.6, len(names) - 0.4)
        data[title] = [f"{i.mean:+.2f} [{i.low:+.2f}, {i.high:+.2f}]" for i in (found[name] for name in names)]
    if share_x:
        _label_outside(axes, columns)
    show(figure, alt, data)


def bars(
    series: Mapping[str, Mapping[str, float]],
    alt: str,
    *,
    x_label: str = "",
    title: str = "",
    line: float | None = None,
    scale: str = "linear",
    width: float = 6.8,
) -> None:
    """Horizontal bars, a name a row and a series a shade from dark to pale, stacked; `line` across them.

    Where a series is a loss, or rows of the only series are, bars have the loss's colour. On a logarithmic axis with a
    `line`, bars start there and are not stacked. `width` is that of the figure in inches.
    """
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    figure, axis = plt.subplots(figsize=(width, 1.0 + 0.3 * len(names)))
    start = line if line is not None and scale == "log" else 0.0
    left = np.full(len(names), start)
    for place, (label, values) in enumerate(series.items()):
        lengths = np.array([values.get(name, start) - start for name in names])
        colours = _bar_colours(label, names, place, len(series))
        axis.barh(names, lengths, 0.7, left=left, color=colours, edgecolor="white", linewidth=0.5, label=label)
        if not start:
            left += lengths
    if line is not None:
        axis.axvline(line, color=BLACK, linewidth=1.2, path_effects=[withStroke(linewidth=3.2, foreground="white")])
    axis.set(title=title, xlabel=x_label, xscale=scale)
    everything = [x for values in series.values() for x in values.values()]
    if scale == "log":
        everything += [] if line is None else [line]
        axis.set_xlim(min(everything) / 1.5, max(everything) * 1.2)
        axis.xaxis.set_major_formatter("{x:g}")
        named = "25" if width > 6 or max(everything) < 100 * min(everything) else ""  # else they would touch
        axis.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in named else "")
    else:
        axis.xaxis.set_major_locator(_round(all(float(x).is_integer() for x in everything)))
        low, high = axis.dataLim.intervalx
        if low < high:
            axis.set_xlim(low * 1.04, high * 1.04)  # no bar touches the frame
    axis.margins(y=0.01)
    axis.invert_yaxis()
    if len(series) > 1 and any([*values] != [label] for label, values in series.items()):  # else the axis names them
        figure.legend(loc="outside lower center", ncol=_legend_columns([*series], width))
    show(figure, alt, {"": names, **{label: [values.get(n) for n in names] for label, values in series.items()}})


def _bar_colours(label: str, names: Sequence[str], place: int, count: int) -> list[Any]:
    """The series' colour if it is a loss, else its shade; in a series alone, rows that name a loss have its colour."""
    shade = SHADES(place / (count - 1) if count > 1 else 0.4)
    rows = [look(re.split("[,:]", name)[0])["color"] if count == 1 else GREY for name in names]
    return [LOSSES[label]["color"] if label in LOSSES else shade if row == GREY else row for row in rows]


def minus(text: str) -> str:
    """With a minus sign for the hyphen before a number."""
    return re.sub(r"(?<![\w.])-(?=\.?\d)", "\N{MINUS SIGN}", text)


def heat(
    panels: Mapping[str, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    alt: str,
    *,
    label: str = "",
    x_label: str = "",
    reach: float | None = None,
    marks: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
    across: int = 5,
    letters: float = 8,
    size: Size | None = None,
    data: Table | None = None,
) -> None:
    """One map a title, of numbers (rows, columns), with `marks` (texts of the same shape) or the numbers written in.

    With `reach` colours have two signs and end at -reach and reach. With `kinds`, {name: colour}, the numbers say which
    of these a cell is, and a legend stands in place of the bar. `letters` is the size of type in points.
    """
    width, down = min(across, len(panels)), -(-len(panels) // across)
    size = size or (1.6 + width * (0.8 + 0.42 * len(columns)), down * (0.9 + 0.26 * len(rows)))
    figure, axes = _grid(len(panels), across, size, sharex=True, sharey=True)
    everything = np.concatenate([np.ravel(np.array(values, dtype=np.float64)) for values in panels.values()])
    low, high = (-reach, reach) if reach else (np.nanmin(everything), np.nanmax(everything))
    colours: Any = DIVERGING if reach else SEQUENTIAL
    if kinds:
        colours, low, high = ListedColormap([*kinds.values()]), -0.5, len(kinds) - 0.5
    numbers: dict[str, list[Any]] = {"": list(rows)}
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        cells = np.array(values, dtype=np.float64)
        picture = axis.imshow(cells, colours, aspect="auto", vmin=float(low), vmax=float(high))
        for (r, c), value in np.ndenumerate(cells):
            text = minus(f"{value:.2g}" if marks is None else marks[title][r][c])
            dark = sum(picture.cmap(picture.norm(np.asarray(value)))[:3]) < 1.4
            axis.text(c, r, text, ha="center", va="center", fontsize=letters, color="white" if dark else "black")
        axis.set_title(title, fontsize=9.5)
        axis.set_xticks(range(len(columns)), columns, fontsize=letters)
        axis.set_yticks(range(len(rows)), rows, fontsize=letters)
        axis.set_xlabel(x_label)
        axis.grid(False)
        if kinds:  # white lines between the squares
            axis.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
            axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
            axis.grid(which="minor", color="white", linewidth=1.2, alpha=1, linestyle="solid")
            axis.tick_params(which="both", length=0)
        numbers |= {f"{title}, {name}": cells[:, place].tolist() for place, name in enumerate(columns)}
    _label_outside(axes, across)
    if kinds:
        keys = [Patch(facecolor=colour, label=name) for name, colour in kinds.items()]
        figure.legend(handles=keys, loc="outside lower center", ncol=_legend_columns([*kinds], figure.get_figwidth()))
    else:
        figure.colorbar(axes[-1].images[0], ax=axes, shrink=0.6, label=label, extend="both" if reach else "neither")
    show(figure, alt, numbers if data is None else data, palette=True)


def scatter(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    alt: str,
    *,
    x_label: str = "",
    y_label: str = "",
    guides: str = "axes",
    across: int = 4,
    written: Mapping[tuple[float, float], str] | None = None,
    size: Size | None = None,
    data: Table | None = None,
) -> None:
    """One panel a title, one marker a name: clouds (x, y).

    `guides`: "axes", lines through 0; "diagonal"; or "", which leaves the frame without numbers. `written` puts words
    beside points, in place of a legend; `data` replaces the table of all points.
    """
    width, down = min(across, len(panels)), -(-len(panels) // across)
    size = size or (7.8 if width > 1 else 6.6, (2.2 if width > 2 else 3.9) * down)
    figure, axes = _grid(len(panels), across, size, sharex=bool(guides), sharey=bool(guides))
    table: list[tuple[str, float, float]] = []
    few = sum(len(x) for clouds in panels.values() for x, _ in clouds.values()) <= 60
    for axis, (title, clouds) in zip(axes, panels.items(), strict=True):
        for (name, (x, y)), marker, colour in zip(clouds.items(), MARKERS, COLOURS, strict=False):
            shade = LOSSES.get(name, {"color": colour})["color"]
            size_of: Look = {"s": 46, "alpha": 1.0} if few else {"s": 16, "alpha": 0.7}
            axis.scatter(x, y, marker=marker, color=shade, linewidth=0, label=name, **size_of)
            table += [(f"{title}, {name}", *point) for point in zip(x, y, strict=True)]
        if guides == "diagonal":
            axis.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle="solid")
        elif guides == "axes":
            axis.axhline(0, color="grey", linewidth=0.8, linestyle="solid")
            axis.axvline(0, color="grey", linewidth=0.8, linestyle="solid")
        else:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        axis.margins(x=0.2 if written else None)
        for place, words in (written or {}).items():
            axis.annotate(words, place, fontsize=8.5, xytext=(6, -3), textcoords="offset points",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # fmt: skip
        axis.set_title(title, fontsize=9.5 if width > 2 else None)
        axis.set(xlabel=x_label, ylabel=y_label)
    _label_outside(axes, across)
    if guides == "diagonal":
        low, high = (choose(*axes[0].get_xlim(), *axes[0].get_ylim()) for choose in (min, max))
        for axis in axes:
            axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    if guides and not written:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=5)
    points = dict(zip(("", "x", "y"), map(list, zip(*table, strict=True)), strict=True))
    show(figure, alt, points if data is None else data)


def diagram(
    boxes: Mapping[str, tuple[float, float, str]],
    arrows: Sequence[tuple[str, str, str]],
    alt: str,
    size: tuple[float, float] = (7.8, 6.0),
    letters: float = 8.5,
    half: float = 0.0,
) -> None:
    """Boxes {name: (x, y, colour)}, places between 0 and 1, and arrows (from, to, words on it).

    `letters` is the size of type in points; frames are as wide as it asks for, or `half` to either side of their
    middle, and as high as their lines.
    """
    from matplotlib.patches import FancyBboxPatch

    figure, axis = plt.subplots(figsize=size)
    drawn, half = {}, half or 0.083 * letters / 8.5
    for name, (x, y, colour) in boxes.items():
        tall = max(0.026, (0.75 * name.count("\n") + 0.7) * letters / 72 / size[1])
        frame = FancyBboxPatch((x - half, y - tall), 2 * half, 2 * tall, boxstyle="round,pad=0.008", facecolor="white",
                               edgecolor=colour, linewidth=1.5)  # fmt: skip
        drawn[name] = axis.add_patch(frame)
        axis.text(x, y, name, ha="center", va="center", fontsize=letters, linespacing=1.3)
    for start, end, words in arrows:
        (x0, y0, colour), (x1, y1, _) = boxes[start], boxes[end]
        ends = {"patchA": drawn[start], "patchB": drawn[end], "shrinkA": 2, "shrinkB": 2}
        axis.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.3, **ends})
        axis.text((x0 + x1) / 2, (y0 + y1) / 2, words, fontsize=letters - 1, ha="center", va="center",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.03, 1.03))
    axis.axis("off")
    columns = zip(*(map(_plain, arrow) for arrow in arrows), strict=True)
    show(figure, alt, dict(zip(("from", "to", "where"), map(list, columns), strict=True)))


# --- pictures of a loss ---


def value_and_gradient(loss: RowLoss, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of every row and its gradient."""
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, target)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    return value.detach(), gradient


def along_the_target(
    losses: Mapping[str, RowLoss],
    wrong: Sequence[float],
    own: Tensor,
    *,
    ranges: Sequence[tuple[float | None, float | None] | None] = (None, None),
    x_label: str = "score of the target $x_y$",
) -> list[Panel]:
    """Two panels, loss and pull on the target, as its score runs over `own` while the wrong scores stay."""
    rows = torch.cat((own[:, None], torch.as_tensor(wrong).expand(len(own), -1)), 1).double()
    target = torch.zeros(len(own), dtype=torch.long)
    found = {name: value_and_gradient(loss, rows, target) for name, loss in losses.items()}
    values, pulls = {n: v for n, (v, _) in found.items()}, {n: -g[:, 0] for n, (_, g) in found.items()}
    return [
        Panel(own, values, "loss", x_label, "loss", y_range=ranges[0]),
        Panel(own, pulls, "pull on the target", x_label, "pull", y_range=ranges[1]),
    ]


def over_two_wrong_scores(
    losses: Mapping[str, RowLoss],
    alt: str,
    reach: float = 4.0,
    cap: float = math.inf,
    bar: str = "",
    columns: int = 0,
    size: Size | None = None,
) -> None:
    """Three classes, x_y = 0: one panel a loss, with the loss as colour and arrows where training moves the scores.

    With a name for the `bar` all panels have one scale of colours, up to `cap`, and of arrows, and one bar. `columns`
    is the most panels beside each other, if not all of them.
    """
    target = torch.zeros(1, dtype=torch.long)
    across = columns or len(losses)
    figure, axes = _grid(len(losses), across, size or ((7.0, 2.6) if bar else (7.8, 3.0)), sharey=True)
    fine, coarse = (torch.linspace(-reach, reach, size, dtype=torch.float64) for size in (61, 9))
    parts = {
        name: [value_and_gradient(loss, _plane(x), target.expand(len(x) ** 2))[i] for i, x in enumerate((fine, coarse))]
        for name, loss in losses.items()
    }
    top = max(float(value.max()) for value, _ in parts.values())
    levels: Any = MaxNLocator(12).tick_values(0, min(top, cap)) if bar else 12
    longest = max(float(gradient[:, 1:].norm(dim=1).max()) for _, gradient in parts.values())
    arrows: Look = {"scale_units": "xy", "scale": 1.1 * longest / float(coarse[1] - coarse[0])} if bar else {}
    data: dict[str, list[float]] = {"both wrong scores": fine[::6].tolist()}
    for axis, (name, (value, gradient)) in zip(axes, parts.items(), strict=True):
        picture = axis.contourf(fine, fine, value.reshape(len(fine), -1), levels=levels,
                                extend="max" if bar and top > levels[-1] else "neither")  # fmt: skip
        u, v = (-gradient[:, i].reshape(len(coarse), -1) for i in (1, 2))
        axis.quiver(coarse, coarse, u, v, color="white", angles="xy", width=0.008, **arrows)
        axis.set(title=name, xlabel="$x_1 - x_y$", aspect="equal", xticks=np.linspace(-reach, reach, 5))
        axis.grid(False)
        if not bar:
            figure.colorbar(picture, ax=axis, shrink=0.7)
        data[f"{_plain(name)}, x1 = x2"] = value.reshape(len(fine), -1).diagonal()[::6].tolist()
    if bar:
        figure.colorbar(picture, ax=axes, shrink=0.9, label=bar)
    for axis in axes[::across]:
        axis.set_ylabel("$x_2 - x_y$")
    show(figure, alt, data, palette=True)


def _plane(axis: Tensor) -> Tensor:
    first, second = torch.meshgrid(axis, axis, indexing="xy")
    return torch.stack((torch.zeros_like(first), first, second), -1).reshape(-1, 3)


def on_the_simplex(
    losses: Mapping[str, RowLoss],
    alt: str,
    steps: int = 60,
    cap: float = 4.0,
    bar: str = "",
    columns: int = 0,
    size: Size | None = None,
) -> None:
    """Three classes as probabilities, scores x = log p, target in the lower left corner: the loss as colour.

    With a name for the `bar` all panels have one scale, up to `cap`, and one bar. `columns` is the most panels beside
    each other, if not all of them.
    """
    counts = [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    p = (torch.tensor(counts, dtype=torch.float64) + 0.02) / (steps + 0.06)
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    place = p @ corner
    edge = torch.tensor([count[2] == 0 for count in counts])
    figure, axes = _grid(len(losses), columns or len(losses), size or ((7.0, 2.1) if bar else (7.8, 2.7)))
    levels: Any = np.linspace(0, cap, 17) if bar else 14
    data: dict[str, list[float]] = {"p of the target, on the edge to class 1": p[edge, 0].tolist()}
    for axis, (name, loss) in zip(axes, losses.items(), strict=True):
        value = loss(p.log(), torch.zeros(len(p), dtype=torch.long))
        picture = axis.tricontourf(place[:, 0], place[:, 1], value.clamp(max=cap * (1 - 1e-6)), levels=levels)
        outline = corner[[0, 1, 2, 0]]
        axis.plot(outline[:, 0], outline[:, 1], color="black", linewidth=1, linestyle="solid")
        for label, spot, side in zip(("target", "1", "2"), corner.tolist(), ("right", "left", "center"), strict=True):
            axis.text(spot[0], spot[1], f" {label} ", ha=side, va="bottom" if side == "center" else "top")
        axis.set(title=name, aspect="equal", xlim=(-0.25, 1.15), ylim=(-0.15, 1.05))
        axis.axis("off")
        data[name] = value[edge].tolist()
    if bar:
        figure.colorbar(picture, ax=axes, shrink=0.9, label=bar, ticks=range(math.ceil(cap) + 1))
    show(figure, alt, data, palette=True)
