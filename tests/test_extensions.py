"""What the book adds to Sphinx: folded code, quizzes, comments and the edit link, each on a small site of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("jupytext")
pytest.importorskip("bs4")
pytest.importorskip("playwright")

import nbformat
import small_site
from bs4 import BeautifulSoup, Tag

from book.pipeline import browser, chapters, layout, printing, quiz

CHROMIUM = browser.find_chromium()
TEXT = """\
Which loss has a gradient on **every** class of a row with $n$ classes?

- [ ] The hinge with $k = 1$
  It has a gradient on two classes at most,
  and on none once the margin is kept.
- [x] Cross-entropy
  Its gradient is $p - e_y$, and no probability is 0.
- [ ] Neither
  One of them has.
"""
QUIZ = f":::{{quiz}}\n{TEXT}:::"
GISCUS = {"repo_id": "R_1", "category": "Comments", "category_id": "DIC_1"}


# --- folds: below what a cell makes, and what shows nothing together with the next fold ------------------------------


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
    assert ["topk-folds" in part["class"] for part in parts] == [False, True]
    assert parts[0].get_text().strip() == "seen"
    folded = parts[1].get_text()
    order = [folded.index(part) for part in ("one = 1", "two = 2", "not seen", "print(one", "assert one")]
    assert order == sorted(order)
    assert [part.name for part in alone.children if isinstance(part, Tag)] == ["p", "details"]  # ends its paragraph
    assert "last = 1" in alone.get_text()
    assert plain.find("details") is None
    named = {fold.select_one("p.collapsed").get_text(): fold.get_text() for fold in table.find_all("details")}
    assert list(named) == ["The table", "Code"]
    assert "1 2 3" in named["The table"]
    assert "print(table)" in named["Code"]


# --- quizzes: they tell whether the chosen answer is right and why, without scripts they are whole all the same ------


def test_a_question_is_read() -> None:
    question = quiz.parse(TEXT.splitlines())
    assert question.text == "Which loss has a gradient on **every** class of a row with $n$ classes?"
    assert [answer.right for answer in question.answers] == [False, True, False]
    assert question.answers[0].why.endswith("at most,\nand on none once the margin is kept.")
    assert question.answers[1].verdict.startswith("**Right.** Its gradient")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Which loss has a gradient on **every** class of a row with $n$ classes?", "", "begins with its question"),
        ("- [x] Cross", "- [ ] Cross", "one answer of a quiz is right, got 0"),
        ("- [ ] Neither", "- [x] Neither", "one answer of a quiz is right, got 2"),
        ("  One of them has.\n", "", "'Neither' of a quiz has no explanation"),
        ("- [", "- (", "2 to 6 answers, .* got 0"),
    ],
)
def test_what_is_missing_is_named(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(layout.BookError, match=f"chapter 3: .*{message}"):
        chapters.plain_text(QUIZ.replace(old, new), 3)


def test_colab_folds_the_explanations() -> None:
    text = chapters.plain_text(QUIZ, 3)
    question, folded = text.split("<details>")
    assert "- **B** Cross-entropy" in question
    assert "Right." not in question
    assert "- **B** **Right.** Its gradient is $p - e_y$" in folded
    assert "- **A** **Not this one.** It has a gradient on two classes at most,\n  and on none" in folded


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with two quizzes, made with the book's own extensions, script and style."""
    folder = tmp_path_factory.mktemp("quiz")
    (folder / "page.md").write_text(f"# A page\n\n{QUIZ}\n\n{QUIZ}\n")
    own = layout.config()["sphinx"]["config"]
    settings = {name: own[name] for name in ("mathjax_path", "mathjax3_config", "html_css_files", "html_js_files")}
    settings["html_static_path"] = [str(layout.ROOT / "book" / "_static")]
    settings["myst_enable_extensions"] = ["colon_fence", "dollarmath", "tasklist"]
    return small_site.built(folder, "page", extensions=["myst_nb", "formulas", "quiz"], **settings)


@pytest.fixture
def page(site: Path) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with browser.opened(CHROMIUM) as opened, browser.served(site) as root:
        found = opened.new_page()
        found.goto(f"{root}/page.html")
        assert browser._typeset(found, "page") == []
        yield found


def test_choosing_tells_whether_it_is_right_and_why(page: Any) -> None:
    first, second = page.locator(".topk-quiz").all()
    told = first.get_by_role("status")
    assert first.get_by_role("group", name="Which loss has a gradient on every class").count() == 1
    assert told.inner_text() == ""
    assert not first.locator("details").is_visible()
    first.get_by_label("Cross-entropy").check()
    assert told.inner_text().startswith("Right. Its gradient is")
    assert told.locator("mjx-container").count() == 1
    assert first.locator("label.right").inner_text() == "Cross-entropy"
    page.keyboard.press("ArrowUp")
    assert told.inner_text().startswith("Not this one. It has a gradient on two classes")
    assert first.locator("label.right").count() == 0
    assert second.get_by_role("status").inner_text() == ""
    assert second.locator("input:checked").count() == 0


def test_without_scripts_and_on_paper_the_page_has_it_all(site: Path) -> None:
    static = BeautifulSoup((site / "page.html").read_text(), "html.parser").select_one(".topk-quiz")
    assert static is not None
    assert [item.get_text().strip() for item in static.select("ol.answers > li")][1:] == ["Cross-entropy", "Neither"]
    assert [item.get_text()[:6] for item in static.select("details li.right")] == ["Right."]
    printed = BeautifulSoup(printing.document(site, {"": ["page.html"]}), "html.parser")
    assert [fold.has_attr("open") for fold in printed.select(".topk-quiz details")] == [True, True]
    assert "quiz.js" not in str(printed)


# --- comments and the edit link: below chapters and prose where they are switched on ---------------------------------


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
