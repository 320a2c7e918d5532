"""A Sphinx extension: a chapter's number is that of its file, so 10_poisson_binomial is chapter 10 in every build.

Equations and theorems take their numbers from it (10.1, 10.2, ...), and pages without a number stay without one.
It also drops the scripts of Thebe, which Jupyter Book adds twice and this book does not use.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector

_CHAPTER = re.compile(r"(?:^|/)(\d\d)_[^/]+$")


def _assign_section_numbers(self: TocTreeCollector, env: BuildEnvironment) -> list[str]:
    before, env.toc_secnumbers = env.toc_secnumbers, {}
    for docname, toc in env.tocs.items():
        match = _CHAPTER.search(docname)
        if match is not None:
            found: dict[str, tuple[int, ...]] = {}
            _number(toc, (int(match[1]),), found)
            env.toc_secnumbers[docname] = found
            env.titles[docname]["secnumber"] = (int(match[1]),)
    return [docname for docname, found in env.toc_secnumbers.items() if before.get(docname) != found]


def _number(toc: nodes.Node, number: tuple[int, ...], found: dict[str, tuple[int, ...]]) -> None:
    """Gives `number` to the first entry of a list, and number + (1,), (2,), ... to the entries below it."""
    for entry in (child for child in toc.children if isinstance(child, nodes.list_item)):
        reference = entry.next_node(addnodes.compact_paragraph)[0]
        reference["secnumber"] = number
        found[reference["anchorname"]] = number
        count = 0
        for below in entry.children:
            if isinstance(below, nodes.bullet_list):
                for item in below.children:
                    count += 1
                    wrapper = nodes.bullet_list("", *[])
                    wrapper.children = [item]
                    _number(wrapper, (*number, count), found)


def _without_thebe(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object) -> None:
    kept = []
    for script in context.get("script_files", []):
        text = f"{getattr(script, 'filename', script)} {getattr(script, 'attributes', {})}"
        if "thebe" not in text.lower():
            kept.append(script)
    context["script_files"] = kept


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    TocTreeCollector.assign_section_numbers = _assign_section_numbers  # type: ignore[method-assign]
    app.connect("html-page-context", _without_thebe, priority=900)
    return {"parallel_read_safe": True}
