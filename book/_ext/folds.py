"""A Sphinx extension: folded code stands below what it makes, and code that shows nothing is folded with its neighbour.

So a page reads as text and figures, each with its code one click below it. Folded output is named for what it is: a
figure or a table where the code is folded too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform


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


def _folded(document: nodes.document) -> Iterator[nodes.Element]:
    return (node for node in document.findall(nodes.container) if _is_folded(node))


def _is_folded(node: nodes.Node) -> bool:
    """A code cell that begins with its fold."""
    return _is_cell(node) and isinstance(node.children[0], HideCodeCellNode)


def _ends_folded(node: nodes.Node) -> bool:
    """A code cell whose fold stands below its output already."""
    return _is_cell(node) and len(node.children) > 1 and isinstance(node.children[-1], HideCodeCellNode)


def _is_cell(node: nodes.Node) -> bool:
    return isinstance(node, nodes.container) and node.get("nb_element") == "cell_code" and bool(node.children)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_post_transform(JoinFolds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
