"""Sets of classes: strangeness, thresholds and what is measured, by hand, by chance and beside MAPIE's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import topk
from topk_lab.data import Split
from topk_lab.study import albums, sets


def probabilities(rows: int = 400, classes: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows, and labels drawn with these probabilities."""
    luck = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(rows, classes, generator=luck, dtype=torch.float64)).softmax(1)
    return p, torch.multinomial(p, 1, generator=luck)[:, 0]


def test_strangeness_by_hand() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    expected = {"rank": [3, 1, 2], "lac": [0.8, 0.5, 0.7], "aps": [1.0, 0.5, 0.8], "raps": [1.0, 0.5, 0.8]}
    for kind, values in expected.items():
        torch.testing.assert_close(sets.strangeness(p, kind, 0.1), torch.tensor([values], dtype=torch.float64))
    p, _ = probabilities()
    place = sets.strangeness(p, "rank")
    more = sets.strangeness(p, "raps", 0.1) - sets.strangeness(p, "aps")
    torch.testing.assert_close(more, 0.1 * (place - sets.FREE).clamp(min=0))


def test_rank_sets_have_the_size_that_the_metric_says() -> None:
    p, labels = probabilities()
    own = sets.of_right_class(sets.strangeness(p, "rank"), labels)
    assert torch.equal(own.long(), topk.metrics.ranks(p, labels))
    assert sets.conformal_threshold(own, 0.1) >= topk.metrics.candidates_for(p, labels, 0.9)


@pytest.mark.parametrize(("rows", "miss", "place"), [(9, 0.1, 9), (99, 0.01, 99), (100, 0.05, 96), (19, 0.05, 19)])
def test_conformal_threshold(rows: int, miss: float, place: int) -> None:
    own = torch.randperm(rows).double() + 1
    assert sets.conformal_threshold(own, miss) == place
    assert sets.conformal_threshold(own[: round(1 / miss) - 2], miss) == float("inf")


@pytest.mark.parametrize("kind", sets.KINDS)
def test_coverage_holds_on_average_over_calibration_sets(kind: str) -> None:
    p, labels = probabilities(30_000)
    strange = sets.strangeness(p, kind, 0.01)
    own = sets.of_right_class(strange, labels).view(300, 100)
    covered = [(row[-1] <= sets.conformal_threshold(row[:-1], 0.1)) for row in own]
    assert np.mean(covered) > 0.9 - 4 * 0.3 / 300**0.5


def test_mean_size_is_what_was_asked_for() -> None:
    p, labels = probabilities()
    for size in (1, 2.5, 7):
        found = sets.measured(sets.strangeness(p, "lac"), labels, sets.size_threshold(1 - p, size))
        assert found["size"] == pytest.approx(size)


def test_the_fitted_temperature_is_the_least_loss() -> None:
    p, labels = probabilities(4000)
    assert sets.fitted_temperature(3 * p.log(), labels) == pytest.approx(3, rel=0.1)


def test_learnt_sizes_follow_the_rows() -> None:
    """Half of the rows are clear and half are even: after training the clear ones get one class, the others more."""
    luck = torch.Generator().manual_seed(0)
    clear = torch.arange(600) < 300
    p = torch.where(clear[:, None], 8.0, 0.0) * F.one_hot(torch.zeros(600, dtype=torch.int64), 30)
    p = (p + 0.01 * torch.rand(p.shape, generator=luck)).softmax(1).double()
    rank = topk.metrics.ranks(p, torch.multinomial(p, 1, generator=luck)[:, 0])
    offered = torch.tensor([1, 10, 30])
    cost = sets.sizes_cost(rank, offered, 0.1)
    selector = sets.learnt_sizes(p, cost)
    chosen = offered[selector(sets.selector_inputs(p)).argmax(1)]
    assert chosen[clear].double().mean() < 1.5
    assert chosen[~clear].double().mean() > 20


def test_the_soft_threshold_of_conformal_training() -> None:
    """As the temperature falls the loss becomes the log of the mean size; its gradient is that of differences."""
    luck = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(200, 10, generator=luck, dtype=torch.float64)
    labels = torch.randint(10, (200,), generator=luck)
    logs = scores.log_softmax(1)
    own = sets.of_right_class(logs, labels)[:100].sort().values
    hard = (logs[100:] >= own[4:6].mean()).sum(1).double().mean().log()
    torch.testing.assert_close(sets.set_size_loss(scores, labels, 0.05, 0.01), hard, rtol=0, atol=0.03)
    few = scores[:8].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sets.set_size_loss(x, labels[:8], 0.25, 0.5), few)


def test_more_training_with_the_size_loss_makes_sets_smaller() -> None:
    luck = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (3000,), generator=luck)
    inputs = F.one_hot(labels, 5) + torch.randn(3000, 5, generator=luck)
    head = torch.nn.Linear(5, 5)
    before = sets.set_size_loss(head(inputs), labels)
    sets.tuned_further(head, Split(inputs.numpy(), labels.numpy()), sets.set_size_loss, rate=0.05)
    assert sets.set_size_loss(head(inputs), labels) < before - 0.1


@pytest.mark.parametrize("kind", ["lac", "rank"])  # its APS is the one with random shares
def test_mapie_finds_the_same_sets(kind: str) -> None:
    pytest.importorskip("mapie")
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        """Its inputs are its probabilities."""

        def fit(self, x: Any, y: Any) -> Given:
            self.classes_ = np.arange(x.shape[1])
            return self

        def predict_proba(self, x: Any) -> Any:
            return x

        def predict(self, x: Any) -> Any:
            return x.argmax(1)

    p, labels = probabilities(2000)
    halves, right = p.split(1000), labels.split(1000)
    names = {"lac": "lac", "rank": "top_k"}
    peer = SplitConformalClassifier(Given().fit(p.numpy(), None), [0.9, 0.95, 0.99], names[kind], prefit=True)
    peer.conformalize(halves[0].numpy(), right[0].numpy())
    _, theirs = peer.predict_set(halves[1].numpy())
    strange = sets.strangeness(p, kind)
    own = sets.of_right_class(strange, labels)[:1000]
    for place, coverage in enumerate((0.9, 0.95, 0.99)):
        ours = strange[1000:] <= sets.conformal_threshold(own, 1 - coverage)
        assert (ours.numpy() == theirs[:, :, place]).all()


def test_albums() -> None:
    labels = torch.arange(6).repeat_interleave(4)
    split = Split(F.one_hot(labels, 6).float().numpy(), labels.numpy())
    inputs, right = albums.albums(split, 50, seed=1)
    assert (right.sum(1) == 3).all()
    torch.testing.assert_close(inputs, right / 3)  # the mean of three images that are their class's indicator
    one = albums.one_of(right, seed=1)
    assert (one.sum(1) == 1).all()
    assert ((one == 0) | (right == 1)).all()
    assert len(set(one.argmax(1).tolist())) == 6


def test_albums_are_learnt() -> None:
    labels = torch.arange(8).repeat_interleave(10)
    split = Split((3 * F.one_hot(labels, 8)).float().numpy(), labels.numpy())
    inputs, right = albums.albums(split, 2000, seed=0)
    for loss in albums.LOSSES.values():
        assert albums.measured(albums.trained(loss, inputs, right, 0.1, 0), inputs, right)["among 3"] > 0.95
