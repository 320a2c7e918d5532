"""The cheat sheet: its lines run, its costs are those of the record, and it fits on one sheet of paper."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jupytext")
pytest.importorskip("playwright")

import topk
from book.pipeline import browser, layout, picture, printing, site

TEXT = (layout.ROOT / "book" / "cheatsheet.md").read_text()
CARDS = [part.split("\n::::\n")[0] for part in TEXT.split("\n::::{grid-item-card} ")[2:]]  # first: how to read them


def losses_of(card: str) -> dict[str, Any]:
    """What a card's code leaves behind."""
    names: dict[str, Any] = {"torch": torch, "topk": topk, "counts": torch.tensor([50.0, 20, 10, 8, 6, 4, 3, 2])}
    scores = torch.randn(16, 8, requires_grad=True)
    names |= {"scores": scores, "cosines": scores.tanh(), "target": torch.randint(8, (16,))}
    code = re.findall(r"```\{code-block\} python\n(.*?)```", card, re.DOTALL)
    assert len(code) == 1, card
    exec(code[0], names)
    return names


@pytest.mark.parametrize("card", CARDS, ids=[card.split("\n")[0][:24] for card in CARDS])
def test_the_lines_run(card: str) -> None:
    names = losses_of(card)
    if "loss" in names:
        names["loss"].backward()
        assert names["scores"].grad.isfinite().all()
    else:
        assert set(names["accuracy"]) == {1, 5}
        assert 1 <= names["needed"] <= 8
        torch.testing.assert_close(names["mask"].sum(1), torch.full((16,), 5.0))


def test_the_gradients_are_those_of_the_module() -> None:
    """Where the sheet gives them as a formula."""
    x, y, k = torch.tensor([1.9, 1.5, 1.2, -0.3, -1.5, -3.0], dtype=torch.float64), 2, 2
    p, one = x.softmax(0), torch.eye(6, dtype=torch.float64)[y]

    def slope(loss: Any) -> torch.Tensor:
        row = x.clone().requires_grad_()
        return torch.autograd.grad(loss(row, torch.tensor(y), k), row)[0]

    torch.testing.assert_close(slope(lambda r, t, _: torch.nn.functional.cross_entropy(r, t)), p - one)
    strength = 1 - torch.exp(-topk.smooth_topk_loss(x, torch.tensor(y), k))
    smooth = slope(topk.smooth_topk_loss)
    torch.testing.assert_close(smooth[y], -strength / k)
    torch.testing.assert_close((smooth + strength / k * one).sum(), strength / k)
    x[y] = 1.8  # second, ahead of the third by 0.3
    p, inside = x.softmax(0), torch.tensor([1.0, 0, 1, 0, 0, 0], dtype=torch.float64)
    a = 0.3**2 * (3 - 0.6)
    expected = p - a * inside * p / (inside * p).sum() - (1 - a) * one
    torch.testing.assert_close(slope(partial(topk.transition_topk_loss, width=1.0)), expected)
    hinge = slope(topk.topk_hinge_loss)
    torch.testing.assert_close(hinge, torch.eye(6, dtype=torch.float64)[1] - one)


def test_costs_come_from_the_record() -> None:
    filled = site._filled(layout.ROOT / "book" / "cheatsheet.md").decode()
    assert not re.search(r"@[A-Z_]+@", filled)
    costs = re.findall(r"\*\*Cost\*\*&nbsp;(\d+(?:\.\d)?)", filled)
    assert costs == ["1", *(picture.cost(family) for family in picture.FAMILIES)]
    row = picture.costs()["smooth"]
    assert float(picture.cost("smooth")) == pytest.approx(row["ours"] / row["cross_entropy"], abs=0.051)


def test_what_does_not_fit_on_a_sheet_is_refused(tmp_path: Path) -> None:
    chromium = browser.find_chromium()
    if chromium is None:
        pytest.skip("no chromium on this machine")
    page = '<!doctype html><html><head></head><body><article class="bd-article"><h1>A</h1>{}</article></body></html>'
    (tmp_path / "one.html").write_text(page.format("<p>short</p>"))
    (tmp_path / "two.html").write_text(page.format("<p>long</p>" * 200))
    with browser.opened(chromium) as opened:
        printing.write_sheet(tmp_path, opened, tmp_path / "one.pdf", "one.html")
        with pytest.raises(layout.BookError, match=r"two\.html takes \d+ pages"):
            printing.write_sheet(tmp_path, opened, tmp_path / "two.pdf", "two.html")
