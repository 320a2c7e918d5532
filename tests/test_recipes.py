"""The recipes page (book/recipes.md): every piece of code runs, where the library it is for is installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import topk

PAGE = (Path(__file__).parent.parent / "book" / "recipes.md").read_text()
SECTIONS = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S)
_PIECE = re.compile(r"^```(?:python|\{code-block\} python\n:emphasize-lines: [\d,-]+\n)\n(.*?)^```", flags=re.M | re.S)
RECIPES = {title: _PIECE.findall(text) for title, text in SECTIONS}
LIBRARIES = ("lightning", "transformers", "timm", "skorch", "torchmetrics")


def test_the_page_serves_every_library() -> None:
    for library in LIBRARIES:
        assert any(re.search(rf"^(from|import) {library}\b", code, flags=re.M) for _, code in pieces()), library
    assert "No module named 'topk'" in PAGE  # what people search for


def pieces() -> list[tuple[str, str]]:
    return [(title, code) for title, blocks in RECIPES.items() for code in blocks]


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize(("title", "code"), pieces(), ids=[title for title, _ in pieces()])
def test_recipe_runs(title: str, code: str) -> None:
    imported = sorted(set(re.findall(r"^(?:import|from) (\w+)", code, flags=re.M)))
    missing = [name for name in imported if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    assert all(len(line) <= 100 for line in code.splitlines())
    torch.manual_seed(0)
    exec(compile(code, f"book/recipes.md, {title}", "exec"), {"__name__": "recipe"})


def test_gradient_accumulation_of_the_trainer_recipe_is_the_whole_batch() -> None:
    """Sums over micro-batches, each over the items of all, are the mean; means of micro-batches are not."""
    scores, labels = torch.randn(12, 100), torch.randint(100, (12,))
    parts = [
        topk.smooth_topk_loss(scores[part], labels[part], k=5, reduction="sum") for part in (slice(3), slice(3, 12))
    ]
    whole = topk.smooth_topk_loss(scores, labels, k=5)
    torch.testing.assert_close(sum(parts) / 12, whole)


def test_the_hinge_of_xcurve_is_ours_and_a_mixture() -> None:
    """Its definition, written out: the K + 1 largest wrong scores, summed and divided by K."""
    scores, labels, most = torch.randn(8, 20), torch.randint(20, (8,)), 4
    own = scores.gather(1, labels[:, None])
    wrong = scores.scatter(1, labels[:, None], -torch.inf).sort(descending=True).values[:, : most + 1]
    theirs = ((1 + wrong - own).clamp(min=0).sum(1) / most).mean()
    ours = topk.topk_hinge_loss(scores, labels, dict.fromkeys(range(1, most + 2), 1 / (most + 1)), variant="kth")
    torch.testing.assert_close(ours * (most + 1) / most, theirs)
    torch.testing.assert_close(topk.autkc_loss(scores, labels, most + 1, surrogate="hinge") * (most + 1) / most, theirs)


def test_hard_pixels() -> None:
    """The box about segmentation: scores of an image, and the hardest tenth of its pixels."""
    loss = topk.smooth_topk_loss(torch.randn(2, 7, 5, 4), torch.randint(7, (2, 5, 4)), 2, reduction="none")
    assert loss.shape == (2, 5, 4)
    assert loss.flatten().topk(loss.numel() // 10).values.mean() > loss.mean()
