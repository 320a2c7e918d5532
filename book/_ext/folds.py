"""A Sphinx extension: folded code, data and tables stand together, right below what they belong to.

So a page reads as text and figures. Below a figure one line has its data, its table and its code, each one click away.
The code behind a sentence is a word at the end of the sentence, and code that shows nothing is folded with its
neighbour. Folded output is named for what it is: a figure or a table where the code is folded too.

Listings with lines that are longer than the text is wide get a class that says how long, so that they are set smaller
instead of being broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

_DATA = "<details><summary>The figure's data"  # how topk_lab.figures begins a figure's table
_COLUMNS = 88  # of code that is as wide as the text; beyond that the classes go up in steps of 4


class JoinFolds(SphinxPostTransform):
    """Runs after the step that folds cells."""

    default_priority = 200
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Each fold goes below its output; of a cell that shows nothing else, into the next fold or the last."""
        for fold in self.document.findall(HideCodeCellNode):
            if "below-input" in fold["classes"]:
                drawn = "figure" if any(fold.findall(nodes.image)) else "table"
                name = drawn if "tag_hide-input" in fold.parent["classes"] else "output"
                fold["prompt_show"], fold["prompt_hide"] = f"The {name}", f"Hide the {name}"
        for cell in list(_folded(self.document)):
            fold, parent = cell.children[0], cell.parent
            place = parent.index(cell)
            before, after = (parent.children[at : at + 1] if at >= 0 else [] for at in (place - 1, place + 1))
            if len(cell.children) == 1 and after and _is_folded(after[0]):
                after[0].children[0].insert(0, fold.children)
                parent.remove(cell)
            elif len(cell.children) == 1 and before and _ends_folded(before[0]):
                before[0].children[-1].extend(fold.children)
                parent.remove(cell)
            elif len(cell.children) > 1:
                cell.remove(fold)
                cell.append(fold)
        for cell in [node for node in self.document.findall(nodes.container) if _ends_folded(node, alone=True)]:
            _gather(cell)


def _gather(cell: nodes.Element) -> None:
    """Puts the folds of a cell on one line: at the end of the paragraph above them, or below its figure."""
    folds = [child for child in cell.children if isinstance(child, HideCodeCellNode)]
    shown = [child for child in cell.children if not isinstance(child, HideCodeCellNode)]
    if not shown:
        place = cell.parent.index(cell)
        above = cell.parent[place - 1] if place else None
        if isinstance(above, nodes.paragraph):
            _continue(above, folds)
            cell.parent.remove(cell)
        elif _is_cell(above) and isinstance(above.children[-1], nodes.container) and _is_line(above.children[-1]):
            _join(above.children[-1], folds)
            cell.parent.remove(cell)
        else:
            cell["classes"].append("topk-folds")
        return
    cell.children[:] = shown
    output = shown[-1]
    last = output.children[-1] if output.children else None
    if isinstance(last, nodes.paragraph):
        _continue(last, folds)
        return
    line = nodes.container(classes=["topk-folds"])
    if isinstance(last, nodes.Element) and _is_data(last):
        output.remove(last)
        last["classes"] = []  # they would make a box around it, and a line is made of its folds
        line.append(last)
    cell.append(line)
    _join(line, folds)


def _continue(paragraph: nodes.Element, folds: list[nodes.Element]) -> None:
    """The folds as words at the end of a paragraph."""
    joined = nodes.container(classes=["cell", "topk-told"])
    paragraph.parent.replace(paragraph, joined)
    joined.append(paragraph)
    _join(joined, folds)


def _join(line: nodes.Element, folds: list[nodes.Element]) -> None:
    """Appends folds to a line; code goes into the fold that has code already, which stays the last."""
    for fold in folds:
        code = next((child for child in line.children if _is_code(child)), None)
        if code is None:
            line.append(fold)
        elif _is_code(fold):
            code.extend(fold.children)
        else:
            line.insert(line.index(code), fold)


def _is_code(node: nodes.Node) -> bool:
    return isinstance(node, HideCodeCellNode) and "below-input" not in node["classes"]


def _is_line(node: nodes.Element) -> bool:
    return "topk-folds" in node["classes"]


def _is_data(output: nodes.Element) -> bool:
    """An output that is nothing but the folded data of a figure."""
    return output.astext().startswith(_DATA)


def _folded(document: nodes.document) -> Iterator[nodes.Element]:
    return (node for node in document.findall(nodes.container) if _is_folded(node))


def _is_folded(node: nodes.Node) -> bool:
    """A code cell that begins with its fold."""
    return _is_cell(node) and isinstance(node.children[0], HideCodeCellNode)


def _ends_folded(node: nodes.Node, alone: bool = False) -> bool:
    """A code cell whose fold stands below its output already, or one that is nothing but folds."""
    return _is_cell(node) and (alone or len(node.children) > 1) and isinstance(node.children[-1], HideCodeCellNode)


def _is_cell(node: nodes.Node | None) -> bool:
    return isinstance(node, nodes.container) and node.get("nb_element") == "cell_code" and bool(node.children)


class MeasureListings(SphinxPostTransform):
    """Says of a listing how long its lines are, where they are long."""

    default_priority = 210
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """92, 96, ... 120 columns; longer ones count as 120."""
        for listing in self.document.findall(nodes.literal_block):
            columns = max((len(line) for line in listing.astext().splitlines()), default=0)
            if columns > _COLUMNS:
                listing["classes"] += ["topk-long", f"topk-long-{min(-(-columns // 4) * 4, 120)}"]


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_post_transform(JoinFolds)
    app.add_post_transform(MeasureListings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
