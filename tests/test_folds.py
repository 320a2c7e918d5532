"""Folded code on a page: below what it makes, and what shows nothing together with the next fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bs4")
import nbformat
import small_site
from bs4 import BeautifulSoup, Tag


def _cell(source: str, *tags: str, text: str = "") -> Any:
    outputs = [nbformat.v4.new_output("stream", text=text)] if text else []
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}, outputs=outputs)


def test_folds_join_and_stand_below_their_output(tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# A page"),
        _cell("one = 1", "hide-input"),
        _cell("two = 2", "hide-cell", text="not seen"),
        _cell("print(one + two)", "hide-input", text="seen"),
        _cell("assert one + two == 3", "hide-cell"),
        nbformat.v4.new_markdown_cell("Text."),
        _cell("last = 1", "hide-cell"),
        _cell("print(last)", text="code in sight"),
        _cell("print(table)", "hide-input", "hide-output", text="1 2 3"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "page.ipynb")
    out = small_site.built(
        tmp_path, "page", extensions=["myst_nb", "folds"], nb_execution_mode="off", nb_code_prompt_show="Code"
    )
    found = BeautifulSoup((out / "page.html").read_text(), "html.parser").select("div.cell")
    assert len(found) == 4
    first, alone, plain, table = found
    parts = [child for child in first.children if isinstance(child, Tag)]
    assert [part.name for part in parts] == ["div", "details"]
    assert parts[0].get_text().strip() == "seen"
    folded = parts[1].get_text()
    order = [folded.index(part) for part in ("one = 1", "two = 2", "not seen", "print(one", "assert one")]
    assert order == sorted(order)
    assert alone.find("details") is not None
    assert "last = 1" in alone.get_text()
    assert plain.find("details") is None
    named = {fold.select_one("p.collapsed").get_text(): fold.get_text() for fold in table.find_all("details")}
    assert list(named) == ["The table", "Code"]
    assert "1 2 3" in named["The table"]
    assert "print(table)" in named["Code"]
