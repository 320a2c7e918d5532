"""A Sphinx extension: the text cites "Berrada et al. (2018)"; papers that would be cited alike are 2022a and 2022b."""

from __future__ import annotations

from typing import Any

import sphinxcontrib.bibtex.plugin
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle

from book.pipeline.chapters import years


def _round() -> BracketStyle:
    return BracketStyle(left="(", right=")")


class RoundBrackets(AuthorYearReferenceStyle):
    """Author and year, as the chapters on Colab have them."""

    def __init__(self) -> None:
        super().__init__(bracket_textual=_round(), bracket_parenthetical=_round())


def _tell_apart(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    entries: dict[str, Any] = env.get_domain("cite").bibdata.data.entries  # type: ignore[attr-defined]
    for key, year in years(entries).items():
        entries[key].fields["year"] = year


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the style of references, and makes the years differ before the pages are read."""
    sphinxcontrib.bibtex.plugin.register_plugin(
        "sphinxcontrib.bibtex.style.referencing", "round_brackets", RoundBrackets
    )
    app.setup_extension("sphinxcontrib.bibtex")
    app.connect("env-before-read-docs", _tell_apart)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
