"""The uses of a soft top-k: what they choose and how they are compared."""

from __future__ import annotations

import pytest
import torch

from topk_lab.study import uses


def _split(features: int = 40, rows: int = 600) -> uses.Split:
    """Twenty features tell the four classes; the others are noise of a larger variance."""
    torch.manual_seed(0)
    labels = torch.randint(4, (rows,))
    inputs = 3 * torch.randn(rows, features)
    inputs[:, :20] = 2 * torch.eye(4).repeat(1, 5)[labels] + 0.5 * torch.randn(rows, 20)
    half = rows // 2
    test = (inputs[half:], labels[half:])
    return uses.Split((inputs[:half], labels[:half]), test, test)


@pytest.mark.parametrize("name", ["logistic", "subset", "L1"])
def test_chooses_features_that_tell(name: str) -> None:
    run = uses.Run("features", name, 0.1, 0.003 if name == "L1" else 0.1, 0)
    found = uses.choose_features(run, _split(), "test")
    assert sum(i < 20 for i in found["chosen"]) >= 14
    assert found["top1"] > 0.9


def test_variance_takes_the_loud_ones() -> None:
    found = uses.choose_features(uses.Run("features", "variance", 0, 0, 0), _split(), "test")
    assert min(found["chosen"]) >= 20
    assert found["top1"] < 0.5


def test_kept_shares() -> None:
    shares = uses.kept(torch.tensor([[0.1, 0.6, 0.3]]), 2)
    torch.testing.assert_close(shares, torch.tensor([[0.0, 2 / 3, 1 / 3]]))


def test_same_search_for_all() -> None:
    pairs = {tuple((r.rate, r.knob) for r in uses.candidates("features", name)) for name in uses.OPERATORS}
    assert len(pairs) == 1
    assert len(pairs.pop()) == uses.CANDIDATES
    assert not uses.candidates("features", "random")
