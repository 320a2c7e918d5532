"""Every figure is one call that shows a picture with its words and its numbers; sliders need no kernel."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import IPython.display
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from torch import Tensor

from topk_lab import diagrams, figures
from topk_lab.figures import Band, Panel
from topk_lab.study.statistics import Interval

Shown = list[tuple[Any, dict[str, Any]]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What a cell would show: the objects and their metadata."""
    found: Shown = []
    monkeypatch.setattr(IPython.display, "display", lambda thing, **options: found.append((thing, options)))
    figures.use_style()
    return found


def cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores, target, reduction="none")


def table(shown: Shown) -> list[list[str]]:
    """The cells of the table under the figure, its head first."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", shown[-1][0].data, re.DOTALL)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


LOSS: dict[str, figures.RowLoss] = {"cross-entropy": cross_entropy}
INTERVAL = Interval(1.0, 0.5, 1.5, 3)
DRAWN: dict[str, Callable[[], None]] = {
    "lines": lambda: figures.lines(Panel([1, 2], {"a": [3, 4]}), alt="words"),
    "several panels": lambda: figures.lines(Panel([1], {"a": [3], "b": [1]}), Panel([2], {"a": [0]}), alt="words"),
    "logarithmic": lambda: figures.lines(Panel([1, 10], {"a": [3, 4]}, scale="log", markers=True), alt="words"),
    "levels": lambda: figures.lines(
        Panel([1, 2], {"a": [3, 4]}, levels={"x": 3.0}, verticals={"y": 1.0}, x_ticks={1: "one"}), alt="words"
    ),
    "dots": lambda: figures.dots({"top-5": {"smooth": INTERVAL, "noised": INTERVAL}}, "words"),
    "dots, rows of panels": lambda: figures.dots(
        {"top-5": {"smooth": INTERVAL}, "top-1": {"smooth": INTERVAL}}, "words", share_x=True, columns=1
    ),
    "bars": lambda: figures.bars({"forward": {"a": 1, "b": 2}, "backward": {"a": 2}}, "words", line=3),
    "heat": lambda: figures.heat({"map": [[1, 2], [3, 4]]}, ["r", "s"], ["c", "d"], "words"),
    "heat with marks": lambda: figures.heat(
        {"m": [[1.0, -2.0]]}, ["r"], ["c", "d"], "words", reach=3, marks={"m": [["+", ""]]}
    ),
    "scatter": lambda: figures.scatter({"p": {"smooth": ([1, 2], [3, 4])}}, "words", written={(1, 3): "here"}),
    "scatter, diagonal": lambda: figures.scatter({"p": {"smooth": ([1, 2], [3, 4])}}, "words", guides="diagonal"),
    "scatter, frames": lambda: figures.scatter({f"{i}": {"a": ([1], [3])} for i in range(5)}, "words", guides=""),
    "diagram": lambda: figures.diagram({"a": (0.2, 0.2, "k"), "b": (0.8, 0.8, "r")}, [("a", "b", "to")], "words"),
    "round trips": lambda: diagrams.round_trips({"p": [("add", 2, 1)], "q": [("mul", 1, 0), ("sum", 0, 1)]}, "words"),
    "two wrong scores": lambda: figures.over_two_wrong_scores(LOSS, "words"),
    "simplex": lambda: figures.on_the_simplex(LOSS, "words", steps=12),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_brings_its_words_and_its_numbers(shown: Shown, name: str) -> None:
    DRAWN[name]()
    (bundle, options), (numbers, _) = shown
    assert bundle["image/png"][:8] == b"\x89PNG\r\n\x1a\n"
    assert bundle["text/plain"] == "<figure: words>"
    assert options["metadata"]["image/png"]["alt"] == "words"
    assert "<details><summary>The figure's data" in numbers.data
    assert len(table(shown)) > 1


def test_the_table_of_lines(shown: Shown) -> None:
    band = Band([1.0, 2.0], [0.5, 1.5], [1.5, 2.5])
    panels = (Panel([1, 2], {"a": [-0.0, 4], "b": band}, "left", "$k$"), Panel([1, 2], {"a": [7, 8]}, "right", "$k$"))
    figures.lines(*panels, alt="words")
    head, first, _ = table(shown)
    assert head == ["k", "left: a", "left: b", "right: a"]  # one axis for both, no marks of TeX
    assert first == ["1", "0", "1 [0.5, 1.5]", "7"]


def test_long_tables_keep_their_ends(shown: Shown) -> None:
    figures.lines(Panel(range(100), {"a": range(100)}), alt="words")
    rows = table(shown)
    assert len(rows) - 1 <= 12
    assert (rows[1][0], rows[-1][0]) == ("0", "99")
    assert f"({len(rows) - 1} of 100 points)" in shown[-1][0].data


def test_a_loss_looks_the_same_everywhere() -> None:
    figure = figures._drawn([Panel([1, 2], {"a": [1, 2], "smooth": [1, 2]}, looks={"a": figures.REFERENCE})], None)
    other, smooth = figure.axes[0].lines
    assert smooth.get_color() == figures.LOSSES["smooth"]["color"]
    assert other.get_color() == "grey"
    assert figures.look("weighted smooth, k = 1 and 5") is figures.LOSSES["smooth"]
    assert figures.look("smooth-limit hinge") == {"color": figures.GREY}
    assert figures.look("calibrated hinge") is figures.LOSSES["calibrated hinge"]


def test_bars_have_a_losss_colour_only_where_they_are_that_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "show", lambda figure, *_: drawn.append(figure.axes[0]))
    figures.bars({"": {"noised, 5 samples": 1, "plain copy": 2}}, "words")
    figures.bars({"first": {"smooth": 20}, "then": {"smooth": 7}}, "words")
    named, copy, first, then = (to_rgb(bar.get_facecolor()) for axis in drawn for bar in axis.patches)
    assert named == to_rgb(figures.LOSSES["noised"]["color"])
    assert not {copy, first, then} & {to_rgb(loss["color"]) for loss in figures.LOSSES.values()}
    assert sum(then) - sum(first) > 1  # apart in grey, too
    assert all(place == round(place) for place in drawn[1].get_xticks())  # whole numbers count something
    assert all(axis.get_xlim()[1] > 1.02 * axis.dataLim.x1 for axis in drawn)  # no bar touches the frame


def test_a_diagrams_frames_hold_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "show", lambda figure, *_: drawn.append(figure))
    boxes = {"all-gather heads:\n13 per row": (0.2, 0.5, "k"), "b": (0.8, 0.5, "r")}
    figures.diagram(boxes, [(*boxes, "")], "words", size=(7.0, 2.1), letters=10)
    drawn[0].draw_without_rendering()
    axis = drawn[0].axes[0]
    for frame, words in zip(axis.patches, axis.texts[:2], strict=True):
        outer, inner = frame.get_window_extent(), words.get_window_extent()
        assert outer.fully_containsx(inner.x0)
        assert outer.fully_containsx(inner.x1)
        assert outer.fully_containsy(inner.y0)
        assert outer.fully_containsy(inner.y1)


def test_logarithmic_axes_name_plain_numbers() -> None:
    figure = figures._drawn([Panel([10, 100_000], {"a": [2e-5, 9.0]}, scale="log")], None)
    figure.draw_without_rendering()
    axis = figure.axes[0]
    across, up = ([text.get_text() for text in side] for side in (axis.get_xticklabels(), axis.get_yticklabels()))
    assert {"10", "1000", "100,000"} <= set(across)
    assert "$\\mathdefault{10^{-3}}$" in up


def test_marks_take_the_colour_of_their_line() -> None:
    marks = {"smooth": (1.0, 1.0), "a measurement": (2.0, 2.0)}
    figure = figures._drawn([Panel([1, 2], {"smooth": [1, 2]}, marks=marks, marked="chosen")], None)
    line, own, other, _ = figure.axes[0].lines
    assert own.get_color() == line.get_color() != other.get_color()
    words = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert words == ["smooth", "a measurement", "chosen"]


def test_one_legend_where_all_panels_say_the_same() -> None:
    same, other = ({"a": [1, 2], "b": [1, 2]}, {"c": [1, 2], "d": [1, 2]})
    together = figures._drawn([Panel([1, 2], same), Panel([1, 2], same)], None)
    assert [len(together.legends), together.axes[0].get_legend()] == [1, None]
    apart = figures._drawn([Panel([1, 2], same), Panel([1, 2], other)], None)
    assert not apart.legends
    assert apart.axes[1].get_legend() is not None
    assert figures._legend_columns(["short"] * 6) == 6
    assert figures._legend_columns(["a name of thirty-seven characters in all"] * 6) == 2
    assert figures._legend_columns(["copy", "cross-entropy", "difftopk smooth", "smooth"], width=4.9) == 2


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_column_of_panels_has_an_axis_below(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "show", lambda figure, *_: drawn.append(figure))
    panels = {f"top-{k}": {"smooth": INTERVAL, "noised": INTERVAL} for k in range(count)}
    figures.dots(panels, "words", "points", share_x=True, columns=2)
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[:count]
    named = [
        axis.get_xlabel() == "points" and any(t.label1.get_visible() for t in axis.xaxis.majorTicks) for axis in axes
    ]
    assert named == [place + 2 >= count for place in range(count)]


def test_sliders_know_every_frame(shown: Shown) -> None:
    def draw(tau: float, number_of_guesses: float) -> list[Panel]:
        return [Panel([0, 1], {"a": [tau, number_of_guesses]}, "loss", "score $x_y$", "y", y_range=(0, 5))]

    settings = {"tau": (0.5, 1.0), "number of guesses": (1, 2, 3)}
    start = {"tau": 1.0, "number of guesses": 2}
    figures.knobs(settings, draw, start=start, alt='a "quoted" word', compare=(0.5, 1.0))
    ((bundle, _),) = shown
    page = bundle["text/html"]
    frame = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])  # type: ignore[index]
    assert [knob["start"] for knob in frame["knobs"]] == [1, 1]
    assert len(frame["frames"]) == 6
    assert frame["frames"]["1,2"] == [[[1.0, 3.0]]]
    assert (frame["panels"][0]["lines"], frame["panels"][0]["x_label"]) == (["a"], "score x_y")
    assert "a &quot;quoted&quot; word" in page
    assert "data:image/png;base64," in page


def test_sliders_may_have_logarithmic_axes(shown: Shown) -> None:
    def draw(price: float) -> list[Panel]:
        panel = Panel([1, 1000], {"a": [price, 1e6]}, "time", "rows", "ms", "log", y_range=(1, 1e7))
        return [panel, Panel([0, 1], {"a": [1, 2]}, y_range=(0, 2))]

    figures.knobs({"price": (1.0, 2.0)}, draw, start={"price": 1.0}, alt="words")
    frame = json.loads(re.search(r'<script type="application/json">(.*?)</script>', shown[0][0]["text/html"])[1])  # type: ignore[index]
    assert [panel["log"] for panel in frame["panels"]] == [[True, True], [False, False]]
    assert frame["frames"]["1"][0] == [[2.0, 1e6]]  # the numbers themselves

    def stems(price: float) -> list[Panel]:
        return [Panel([1, 10], {"a": [price, price]}, scale="log y", y_range=(1, 10), points=True)]

    with pytest.raises(ValueError, match="stems"):
        figures.knobs({"price": (1.0, 2.0)}, stems, start={"price": 1.0}, alt="words")


def test_the_still_of_sliders_compares() -> None:
    def draw(tau: float, k: float) -> list[Panel]:
        return [Panel([0, 1], {"a": [tau, k], "b": [0, 0]}, "loss", "lead", points=True)]

    figure = figures._still(draw, {"tau": 1.0, "k": 2}, "tau", (0.5, 4.0))
    assert [line.get_label() for line in figure.axes[0].lines] == ["tau 0.5", "tau 4"]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [4.0, 2.0]
    assert figure.get_suptitle() == "at k 2"
    figure = figures._still(draw, {"tau": 1.0, "k": 2}, "tau", ())
    assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"]


def test_along_the_target_is_loss_and_pull() -> None:
    own = torch.tensor([0.0, 1.0])
    loss, pull = figures.along_the_target(LOSS, (0.0, -1.0), own, ranges=((0, 5), (0, 1)))
    rows = torch.tensor([[0.0, 0.0, -1.0], [1.0, 0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(loss.lines["cross-entropy"], cross_entropy(rows, torch.zeros(2, dtype=torch.long)))
    torch.testing.assert_close(pull.lines["cross-entropy"], 1 - rows.softmax(1)[:, 0])
    assert (loss.y_range, pull.y_range) == ((0, 5), (0, 1))


def test_fields_of_colour_become_small() -> None:
    def figure() -> Any:
        return figures._drawn([Panel([1, 2], {"a": [1, 2]})], None)

    assert len(figures.png(figure(), palette=True)) < len(figures.png(figure()))


def test_a_distribution_to_drag_holds_every_place(shown: Shown) -> None:
    grid = figures.simplex_grid(4)
    assert len(grid) == 15
    torch.testing.assert_close(grid.sum(1), torch.ones(15, dtype=torch.float64))
    right = grid[:, 0] > 0.5
    figures.draggable({"1": {"a": (grid, right)}, "2": {"a": (grid, ~right)}}, steps=4, start=(2, 1), alt="a triangle")
    ((bundle, _),) = shown
    page = bundle["text/html"]
    frame = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])  # type: ignore[index]
    assert frame["rests"]["1"][0][3][1] == {"p": [0.75, 0.25, 0.0], "right": True}
    assert frame["rests"]["2"][0][3][1]["right"] is False
    assert frame["start"] == {"first": 2, "second": 1, "view": 0}
    assert "data:image/png;base64," in page
