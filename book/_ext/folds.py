"""A Sphinx extension: folded code stands below what it makes, and code that shows nothing is folded with what follows.

So a page reads as text and figures, each with its code one click below it.
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
        """Cell by cell: its fold goes into the next one's where nothing else of it is seen, else below its output."""
        for cell in list(_folded(self.document)):
            fold, parent = cell.children[0], cell.parent
            following = parent.children[parent.index(cell) + 1 :]
            if len(cell.children) == 1 and following and _is_folded(following[0]):
                following[0].children[0].insert(0, fold.children)
                parent.remove(cell)
            elif len(cell.children) > 1:
                cell.remove(fold)
                cell.append(fold)


def _folded(document: nodes.document) -> Iterator[nodes.Element]:
    return (node for node in document.findall(nodes.container) if _is_folded(node))


def _is_folded(node: nodes.Node) -> bool:
    """A code cell that begins with its fold."""
    cell = isinstance(node, nodes.container) and node.get("nb_element") == "cell_code"
    return cell and bool(node.children) and isinstance(node.children[0], HideCodeCellNode)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_post_transform(JoinFolds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
