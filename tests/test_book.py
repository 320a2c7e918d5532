"""The book: its pages, labels, references and address. What the pipeline itself must catch is tried on broken input."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from pybtex.database import parse_string

pytest.importorskip("jupytext")
from book.pipeline import chapters, checks, execute, layout, pages

ROOT = layout.ROOT
TWIN = """\
---
kernelspec: {name: python3, display_name: Python 3, language: python}
---

# A chapter

Text.

```{code-cell} ipython3
:tags: [setup]

pass
```

```{code-cell} ipython3
:tags: [parameters]

profile = "smoke"
```

"""


@pytest.fixture
def small_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty notebooks folder in place of the book's own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for module in (layout, checks):
        monkeypatch.setattr(module, "NOTEBOOKS", folder)
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setattr(execute, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(execute, "EXECUTED", tmp_path / "executed")
    (tmp_path / "topk").mkdir()
    return folder


def test_every_page_is_in_the_table_of_contents_and_exists() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    assert len(files) == len(set(files))
    written = {f"book/{path.stem}" for path in (ROOT / "book").glob("*.md")}
    written |= {f"notebooks/{path.stem}" for path in layout.twins()}
    generated = {f"book/{name.removesuffix('.md')}" for name in ("api.md", "equations.md", "status.md")}
    assert set(files) == written | generated


def test_settings_move_to_sphinx_in_one_step(tmp_path: Path) -> None:
    """What `jupyter-book config sphinx` writes has all that the book's own settings say."""
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, tmp_path)
    code = "from jupyter_book.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code, "config", "sphinx", str(tmp_path)], check=True, capture_output=True)
    written = runpy.run_path(str(tmp_path / "conf.py"))
    settings = layout.config()["sphinx"]
    assert {name: written[name] for name in settings["config"]} == settings["config"]
    assert {*settings["local_extensions"], *settings["extra_extensions"], "myst_nb"} <= set(written["extensions"])
    assert written["external_toc_path"] == "_toc.yml"
    assert written["myst_enable_extensions"] == layout.config()["parse"]["myst_enable_extensions"]


def test_every_label_has_a_function_and_a_test() -> None:
    assert pages.gaps() == []


def test_a_gap_in_the_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pages.equation_table()
    label = next(iter(table))
    wrong = {
        **{key: value for key, value in table.items() if key != label},
        "eq-nowhere": {"function": "topk.nothing", "test": "tests/test_smooth.py::test_nothing"},
    }
    monkeypatch.setattr(pages, "equation_table", lambda: wrong)
    complaints = "\n".join(pages.gaps())
    for part in (label, "eq-nowhere", "topk.nothing", "test_nothing"):
        assert part in complaints


def test_the_sheet_of_formulas_takes_them_from_the_chapters() -> None:
    page = pages.equations({twin.stem: chapters.read(twin) for twin in layout.twins()})
    sheet, statements = page.split("## All statements")
    for group in pages.formula_groups():
        anchor = group["title"].lower().replace(" ", "-").replace(",", "")
        assert f"](#{anchor})" in sheet
    loss = chapters.numbers().formulas["eq-tr-loss"]
    assert pages._unpunctuated(loss) == loss.removesuffix(" .")
    assert f"{{eq}}`eq-tr-loss`\n: $$\n  {loss.removesuffix(' .')}\n  $$" in sheet
    assert all(f"`{label}`" in statements for label in pages.equation_table())


def test_the_status_page_tells_where_every_chapter_ran() -> None:
    notebooks = {twin.stem: chapters.read(twin) for twin in layout.twins()}
    names = sorted(notebooks)
    for notebook in notebooks.values():
        notebook.metadata["run"] = {
            "profile": "smoke",
            "seconds": 1.5,
            "machine": "A, 2 cores",
            "versions": {"torch": "9"},
        }
    page = pages.status(notebooks)
    assert page.count("| smoke | 1.5 | 9 |") == len(names)
    assert "- A, 2 cores: all chapters" in page
    assert "- torch 9" in page
    notebooks[names[1]].metadata["run"]["machine"] = "B"
    del notebooks[names[2]].metadata["run"]["machine"]
    page = pages.status(notebooks)
    assert "- B: chapters 2\n- not noted: chapters 3\n" in page
    assert "- A, 2 cores: chapters 1, 4, 5" in page


def test_the_address_is_written_by_hand_in_one_place() -> None:
    address = layout.address()
    for path in [*layout.twins(), *(ROOT / "book").rglob("*.md"), *(ROOT / "book" / "pipeline").glob("*.py")]:
        assert address not in path.read_text().replace(chapters.setup_source(), ""), path
    assert address in chapters.setup_source()
    assert f"@v{layout.version()}" in chapters.setup_source()


def test_setup_cell_does_nothing_here() -> None:
    names: dict[str, object] = {}
    exec(chapters.setup_source(), names)
    assert "packages" not in names


def test_references_are_complete() -> None:
    for key, entry in chapters.bibliography().items():
        fields = entry.fields
        assert "doi" in fields or fields.get("url", "").startswith("https://"), key
        assert re.fullmatch(r"\d{4}", fields["year"]), key
    text = "".join(twin.read_text() for twin in layout.twins())
    cited = {key.strip() for keys in re.findall(r"\{cite:[pt]\}`([^`]+)`", text) for key in keys.split(",")}
    assert cited <= set(chapters.bibliography())


def test_papers_that_would_be_cited_alike_have_a_letter() -> None:
    entries = parse_string(
        "@book{b, author = {Ada Lovelace}, year = 1843} @book{a, author = {Ada Lovelace}, year = {1843}}"
        "@book{c, author = {Ada Lovelace and Charles Babbage}, year = 1843}",
        "bibtex",
    ).entries
    assert chapters.years(entries) == {"a": "1843a", "b": "1843b", "c": "1843"}
    for key, year in chapters.years(entries).items():
        entries[key].fields["year"] = year
    assert chapters.years(entries)["b"] == "1843b", "as Sphinx keeps them from build to build"
    petersen = {year for key, year in chapters.years(chapters.bibliography()).items() if key.startswith("petersen")}
    assert petersen == {"2022a", "2022b"}


def test_plain_markdown() -> None:
    text = chapters.plain_text(
        ":::{admonition} Exercise 1\n:class: exercise\nWhy?\n:::\n\n:::{dropdown} Solution\nBecause.\n:::\n\n"
        "See {cite:p}`berrada2018smooth`.",
        1,
    )
    assert "> **Exercise 1**" in text
    assert "<summary>Solution</summary>" in text
    assert "Berrada et al., 2018" in text
    assert ":::" not in text
    assert "{" not in text
    with pytest.raises(layout.BookError, match="no plain form"):
        chapters.plain_text(":::{margin}\nText\n:::", 1)
    with pytest.raises(layout.BookError, match="never closed"):
        chapters.plain_text(":::{note}\nText", 1)


def run(folder: Path, code: str) -> tuple[nbformat.NotebookNode, list[str]]:
    (folder / "01_small.md").write_text(f"{TWIN}```{{code-cell}} ipython3\n{code}\n```\n")
    return execute._run_one("01_small", "smoke", 1)


def test_the_cell_that_fails_is_named(small_book: Path) -> None:
    _, complaints = run(small_book, "1 / 0")
    assert len(complaints) == 1
    assert "notebooks/01_small.md, cell 4" in complaints[0]
    assert "ZeroDivisionError" in complaints[0]


def test_cells_that_warn_or_show_nothing_are_named(small_book: Path) -> None:
    bad = ["import warnings\nwarnings.warn('look out')", "[].append(1)", "print(' ')"]
    _, complaints = run(small_book, "\n```\n\n```{code-cell} ipython3\n".join(bad))
    expected = zip((4, 5, 6), ("a warning", "no output", "an empty output"), strict=True)
    assert len(complaints) == 3
    for complaint, (number, words) in zip(complaints, expected, strict=True):
        assert f"notebooks/01_small.md, cell {number}" in complaint
        assert words in complaint


def test_a_good_notebook_runs_once(small_book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    executed, complaints = run(small_book, "import os\nprint(profile, sorted(os.listdir()))")
    assert complaints == []
    assert chapters.code_cells(executed)[-1].outputs[0].text == "smoke []\n"
    assert executed.metadata["run"]["profile"] == "smoke"
    twin = small_book / "01_small.md"
    execute._store(executed, execute.EXECUTED / f"01_small.smoke.{execute.key(chapters.read(twin), 'smoke')}.ipynb")
    execute.run_all([twin], "smoke", 1)
    assert "1 unchanged, 0 to run" in capsys.readouterr().out
    before = execute.key(chapters.read(twin), "smoke")
    twin.write_text(twin.read_text().replace("Text.", "Other text."))
    assert execute.key(chapters.read(twin), "smoke") == before
    twin.write_text(twin.read_text().replace("sorted", "list"))
    assert execute.key(chapters.read(twin), "smoke") != before


def test_two_runs_at_once_are_refused(small_book: Path) -> None:
    with execute._alone(), pytest.raises(layout.BookError, match="run here by another process"):
        execute.run_all([], "smoke", 1)
    assert execute.run_all([], "smoke", 1) == {}
