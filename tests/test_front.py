"""The front page: its figure computes what the module computes and can be operated, and every chapter has a card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("jupytext")
pytest.importorskip("playwright")
from book.pipeline import browser, front, layout

CHROMIUM = browser.find_chromium()
STATIC = layout.ROOT / "book" / "_static"
PAGE = layout.ROOT / "book" / "preface.md"


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with browser.opened(CHROMIUM) as found:
        yield found


@pytest.fixture
def page(opened: Any) -> Iterator[Any]:
    """The figure alone."""
    found = opened.new_page(viewport={"width": 800, "height": 1000})
    body = front.element().partition("<script src")[0]
    found.set_content(f"<!doctype html><html><body>{body}</body></html>")
    found.add_style_tag(path=STATIC / "topk.css")
    for name in ("five-losses.js", "front.js"):
        found.add_script_tag(path=STATIC / name)
    yield found
    found.close()


def test_the_figure_computes_what_the_module_computes(page: Any) -> None:
    """At the figure's own start, and where classes are anywhere and the right one is any of them."""
    generator = torch.Generator().manual_seed(0)
    rows = [list(front.SCORES), *(2 * torch.randn(12, len(front.CLASSES), generator=generator)).tolist()]
    for number, scores in enumerate(rows):
        right, k = (number + front.RIGHT) % len(scores), 1 + number % 3
        ask = """([x, y, k]) => Object.entries(topkLosses.five).map(
            ([name, loss]) => [name, loss(x, y, k), topkLosses.gradient(loss, x, y, k).map((v) => -v)])"""
        found = {name: (value, step) for name, value, step in page.evaluate(ask, [scores, right, k])}
        expected = front.steps(tuple(scores), right, k)
        assert list(found) == list(expected)
        for name, (value, step) in expected.items():
            assert found[name][0] == pytest.approx(value, abs=1e-9), (name, scores, k)
            assert found[name][1] == pytest.approx(step, abs=1e-7), (name, scores, k)


def test_what_the_page_says_of_the_start() -> None:
    steps = {k: {name: step for name, (_, step) in front.steps(front.SCORES, front.RIGHT, k).items()} for k in (1, 3)}
    wolf, akita = front.CLASSES.index("wolf"), front.CLASSES.index("akita")
    assert max(steps[3]["cross-entropy"][wolf], steps[3]["cross-entropy"][akita]) < -0.25
    others = [step for name, step in steps[3].items() if name != "cross-entropy"]
    assert all(abs(step[j]) < 0.05 for step in others for j in (wolf, akita))
    assert all(0.65 < step[front.RIGHT] < 0.95 for step in steps[1].values())


def test_scores_follow_keys_and_pointer(page: Any) -> None:
    figure, husky = page.locator(".topk-front"), page.get_by_role("slider", name="score of husky")
    verdict = figure.get_by_role("status")
    assert figure.locator("img").count() == 0
    assert verdict.inner_text() == "The three guesses: wolf, akita, husky. The right class is number 3: a hit."
    husky.focus()
    for _ in range(2):
        page.keyboard.press("PageDown")
    assert husky.get_attribute("aria-valuenow") == "-0.8"
    assert "number 4: a miss" in verdict.inner_text()
    track = figure.locator(".track").nth(front.RIGHT).bounding_box()
    page.mouse.move(track["x"] + 5, track["y"] + track["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + 5, track["y"] + 1)
    page.mouse.up()
    assert float(husky.get_attribute("aria-valuenow")) > 3.8
    assert "number 1: a hit" in verdict.inner_text()
    figure.get_by_label("one guess").check()
    assert verdict.inner_text().startswith("The guess: husky.")
    page.get_by_role("button", name="Start again").click()
    assert husky.get_attribute("aria-valuenow") == "1.2"


def test_the_picture_is_that_of_the_start() -> None:
    assert front.PICTURE.drawn_from() == front.PICTURE.digest(), "run `make address`"


def test_every_chapter_has_a_card() -> None:
    parts = yaml.safe_load((layout.ROOT / "_toc.yml").read_text())["parts"]
    chapters = [entry["file"] for part in parts for entry in part["chapters"] if entry["file"].startswith("notebooks/")]
    text = PAGE.read_text()
    assert [line.removeprefix(":link: ../") for line in text.splitlines() if line.startswith(":link: ")] == chapters
