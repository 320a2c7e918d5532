"""A Sphinx extension: MathJax lies beside the pages, so formulas are typeset at once and without a network.

The files come from the package sphinx-mathjax-offline (MathJax 3.2.2, Apache License 2.0). Its own extension copies all
24 MB of them; these are the 3 MB that a page may ask for: `mathjax_path`, TeX's extensions, the fonts, and what a
reader who turns on spoken formulas needs, in English.

No line begins with the full stop after a formula or the "-th" of "$k$-th", nor with the per cent sign after a number.
"""

from __future__ import annotations

import re
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.fileutil import copy_asset

NEEDED = (
    "tex-chtml.js",
    "input/tex/extensions",
    "output/chtml/fonts/woff-v2",
    "a11y",
    "sre/mathmaps/base.json",
    "sre/mathmaps/en.json",
)


def _copy(app: Sphinx) -> None:
    target = Path(app.outdir, "_static", Path(app.config.mathjax_path).parent)
    with as_file(files("sphinx-mathjax-offline") / "static" / "mathjax") as mathjax:
        for part in NEEDED:
            whole = (mathjax / part).is_dir()
            copy_asset(mathjax / part, target / part if whole else (target / part).parent)


class KeepTogether(SphinxPostTransform):
    """What belongs together stays on one line."""

    default_priority = 210
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Formulas, their punctuation and what a hyphen joins to them become one word, and so do numbers and %."""
        for formula in list(self.document.findall(nodes.math)):
            parent = formula.parent
            place = parent.index(formula)
            opening, closing = (
                _edge(parent, place + step, pattern) for step, pattern in ((-1, _OPENING), (1, _CLOSING))
            )
            if opening or closing:
                word = nodes.inline(classes=["topk-word"])
                parent.replace(formula, word)
                word.extend([nodes.Text(opening), formula, nodes.Text(closing)])
        for text in list(self.document.findall(nodes.Text)):
            if _PER_CENT.search(text) and not isinstance(text.parent, _VERBATIM):
                text.parent.replace(text, nodes.Text(_PER_CENT.sub("\N{NO-BREAK SPACE}", text)))


def _edge(parent: nodes.Element, place: int, pattern: re.Pattern[str]) -> str:
    """The part of a neighbouring text that the pattern finds, which it loses."""
    text = parent[place] if 0 <= place < len(parent) else None
    found = pattern.search(text) if isinstance(text, nodes.Text) else None
    if found is None or not found[0]:
        return ""
    parent[place] = nodes.Text(pattern.sub("", text))  # not `replace`, which finds a text by what it says
    return found[0]


_OPENING, _CLOSING = re.compile(r"[(\[“‘]*(\b\w+-)?$"), re.compile(r"^(-\w+\b)?[.,;:!?)\]”’]*")  # "(top-", "-th."
_PER_CENT = re.compile(r"(?<=\d) (?=%)")
_VERBATIM = (nodes.raw, nodes.literal, nodes.FixedTextElement, nodes.math, nodes.comment)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", _copy)
    app.add_post_transform(KeepTogether)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
