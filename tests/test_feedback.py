"""Comments and the edit link: nothing without a repository, and below chapters and prose where they are switched on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("sphinx")

import small_site

from book.pipeline import layout

GISCUS = {"repo_id": "R_1", "category": "Comments", "category_id": "DIC_1"}


def built(folder: Path, feedback: dict[str, Any]) -> dict[str, str]:
    """The pages of a small site, made with the book's own extension."""
    names = ("book/index", "book/api", "notebooks/06_smooth")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.rst").write_text("A page\n======\n")
    (folder / "book" / "index.rst").write_text("A page\n======\n\n.. toctree::\n\n   api\n   ../notebooks/06_smooth\n")
    options = {"repository_url": layout.address(), "repository_branch": "main"}
    theme = {"html_theme": "sphinx_book_theme", "html_theme_options": options}
    out = small_site.built(folder, "book/index", strict=False, extensions=["feedback"], feedback=feedback, **theme)
    return {name: (out / f"{name}.html").read_text() for name in names}


def test_it_is_off_in_the_book() -> None:
    assert layout.config()["sphinx"]["config"]["feedback"] == {"edit": False, "giscus": {}}


def test_off_means_nothing(tmp_path: Path) -> None:
    assert not any("giscus" in page or "Suggest an edit" in page for page in built(tmp_path, {"edit": False}).values())


def test_on_means_a_link_to_the_text_and_comments(tmp_path: Path) -> None:
    found = built(tmp_path, {"edit": True, "giscus": GISCUS})
    assert f'{layout.address()}/edit/main/notebooks/06_smooth.md"' in found["notebooks/06_smooth"]
    assert 'data-repo-id="R_1"' in found["notebooks/06_smooth"]
    assert f'data-repo="{"/".join(layout.address().split("/")[-2:])}"' in found["book/index"]
    assert "Suggest an edit" not in found["book/api"]


def test_generated_pages_are_those_without_a_text() -> None:
    sys.path.insert(0, str(layout.ROOT / "book" / "_ext"))
    import feedback

    parts = yaml.safe_load((layout.ROOT / "_toc.yml").read_text())["parts"]
    files = [entry["file"] for part in parts for entry in part["chapters"]]
    assert {file for file in files if not (layout.ROOT / f"{file}.md").exists()} == set(feedback._GENERATED)


def test_a_missing_identifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="missing: category_id"):
        built(tmp_path, {"giscus": GISCUS | {"category_id": ""}})
