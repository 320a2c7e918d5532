"""A small site made by Sphinx with the book's own extensions, for tests of what they do to a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from book.pipeline import layout


def built(folder: Path, root: str, *, strict: bool = True, **settings: Any) -> Path:
    """Where the pages are that were made of the sources in `folder`.

    Args:
        folder: holds the sources; its conf.py is written here.
        root: the first page, without its ending.
        strict: whether a warning is an error.
        **settings: of conf.py.
    """
    settings["root_doc"] = root
    (folder / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(layout.ROOT / 'book' / '_ext')!r})\nglobals().update({settings!r})\n"
    )
    out = folder / "html"
    with docutils_namespace():  # so that another test's build in this process is none of ours
        Sphinx(folder, folder, out, folder / "doctrees", "html", status=None, warningiserror=strict).build()
    return out
