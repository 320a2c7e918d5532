"""A Sphinx extension: MathJax lies beside the pages, so formulas are typeset at once and without a network.

The files come from the package sphinx-mathjax-offline (MathJax 3.2.2, Apache License 2.0). Its own extension copies all
24 MB of them; these are the 3 MB that a page may ask for: `mathjax_path`, TeX's extensions, the fonts, and what a
reader who turns on spoken formulas needs, in English.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
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


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", _copy)
    return {"parallel_read_safe": True}
