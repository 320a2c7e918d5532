"""One look for every figure of the book: colours that colour-blind readers and grey printers can tell apart.

Colours are those of Okabe and Ito, and every colour has its own dash, so that no line is told from another by colour
alone. Figures are drawn on white; the book's style sheet turns them for dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#AA4F88", "#56B4E9", "#000000"
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (9, 2)), "-")

LOSSES: dict[str, dict[str, Any]] = {
    name: {"color": colour, "linestyle": dash}
    for name, colour, dash in zip(
        ("cross-entropy", "smooth", "transition", "noised", "differentiable", "calibrated hinge", "kth hinge"),
        (BLACK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY),
        ("-", *DASHES[1:]),
        strict=True,
    )
}
"""A loss looks the same in every chapter: `axes.plot(x, y, label="smooth", **LOSSES["smooth"])`."""

SEQUENTIAL = "cividis"
"""For fields with one sign; reads in grey and for colour-blind readers."""

DIVERGING = "PuOr"
"""For fields with two signs."""

_WIDTH_PER_INCH = 100  # CSS pixels
_DOTS_PER_INCH = 144
_TABLE_ROWS = 12


def use_style() -> None:
    """Sets matplotlib's defaults."""
    mpl.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.labelsize": 10,
            "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=DASHES),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10.5,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "figure.figsize": (7.0, 3.4),
            "font.size": 10,
            "grid.alpha": 0.35,
            "grid.linewidth": 0.6,
            "image.cmap": SEQUENTIAL,
            "legend.frameon": False,
            "legend.handlelength": 2.8,
            "lines.linewidth": 1.8,
            "mathtext.fontset": "cm",
        }
    )


def label_panels(axes: Sequence[Axes]) -> None:
    """Writes a, b, c, ... before the panels' titles."""
    for letter, panel in zip("abcdefgh", axes, strict=False):
        panel.set_title(f"{letter}  {panel.get_title(loc='left')}")


def png(figure: Figure, palette: bool = False) -> bytes:
    """The figure as it is shown, closed afterwards; with a palette of 256 colours it is a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    plt.close(figure)
    if not palette:
        return buffer.getvalue()
    from PIL import Image

    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return small.getvalue()


def show(figure: Figure, alt: str, data: Mapping[str, Sequence[Any]] | None = None, palette: bool = False) -> None:
    """Shows a figure with its text for readers who cannot see it, and its data as a folded table.

    Of long columns some evenly spaced rows are shown, first and last among them. `palette` is for fields of colour,
    which are heavy pages otherwise.
    """
    from IPython.display import HTML, display

    width = int(figure.get_figwidth() * _WIDTH_PER_INCH)
    bundle = {"image/png": png(figure, palette), "text/plain": f"<figure: {alt}>"}
    display(bundle, raw=True, metadata={"image/png": {"width": width, "alt": alt}})  # type: ignore[no-untyped-call]
    if data:
        display(HTML(_folded_table(data)))  # type: ignore[no-untyped-call]


def _folded_table(data: Mapping[str, Sequence[Any]]) -> str:
    columns = {name: list(column) for name, column in data.items()}
    length = min(len(column) for column in columns.values())
    step = max(1, -(-(length - 1) // (_TABLE_ROWS - 1)))
    chosen = sorted({*range(0, length, step), length - 1}) if length else []
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(column[row])}</td>" for column in columns.values()) + "</tr>" for row in chosen
    )
    note = f" ({len(chosen)} of {length} points)" if len(chosen) < length else ""
    return (
        f"<details><summary>The figure's data{note}</summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details>"
    )


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else f"{float(value):.4g}"
