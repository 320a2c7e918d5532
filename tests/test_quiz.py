"""A quiz: on the site it tells whether the chosen answer is right and why, without scripts it is whole all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupytext")
pytest.importorskip("playwright")

import small_site

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
    return small_site.built(folder, "page", extensions=["myst_parser", "formulas", "quiz"], **settings)


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
    from bs4 import BeautifulSoup

    static = BeautifulSoup((site / "page.html").read_text(), "html.parser").select_one(".topk-quiz")
    assert static is not None
    assert [item.get_text().strip() for item in static.select("ol.answers > li")][1:] == ["Cross-entropy", "Neither"]
    assert [item.get_text()[:6] for item in static.select("details li.right")] == ["Right."]
    printed = BeautifulSoup(printing.document(site, {"": ["page.html"]}), "html.parser")
    assert [fold.has_attr("open") for fold in printed.select(".topk-quiz details")] == [True, True]
    assert "quiz.js" not in str(printed)
