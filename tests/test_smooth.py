"""The smooth top-k SVM against its definitions, over k, classes, scales, kinds of scores and types."""

from __future__ import annotations

import itertools
from typing import Any

import brute_force as reference
import pytest
import torch
import torch.nn.functional as F

import topk
from topk.losses import smooth
from topk.losses.smooth import LOSS, Options

KS = (1, 2, 3, 5, 10, 20, 50, 100)
SCALES = (1e-4, 1e-2, 1.0, 1e2, 1e4)


def make_scores(kind: str, rows: int, classes: int, scale: float, k: int) -> torch.Tensor:
    """Scores in float32-representable values, so that every type starts from the same numbers where it can."""
    generator = torch.Generator().manual_seed(classes * 1000 + k)
    if kind == "gaussian":
        scores = torch.randn(rows, classes, generator=generator)
    elif kind == "tied":
        scores = torch.zeros(rows, classes)
    elif kind == "k tied":
        scores = torch.randn(rows, classes, generator=generator).clamp(max=1.0)
        scores[:, : k + 1] = 2.0
    else:
        scores = torch.linspace(-1.0, 1.0, classes).repeat(rows, 1)
    return (scores * scale).float()


def truth(scores: torch.Tensor, target: torch.Tensor, k: int, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows at once, each with its target in the place of the first class, and that in the target's."""
    place = torch.arange(scores.shape[1]).repeat(len(scores), 1).scatter(1, target[:, None], 0)
    place[:, 0] = target
    front = scores.gather(1, place)
    losses = reference.smooth_topk_loss_log_space(front, 0, k, **options)
    return losses, reference.smooth_topk_gradient_log_space(front, 0, k, **options).gather(1, place)


def ours(scores: torch.Tensor, target: torch.Tensor, k: int, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.detach().clone().requires_grad_()
    loss = topk.smooth_topk_loss(scores, target, k, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    return loss.detach(), gradient


def by_definition(
    scores: torch.Tensor, target: torch.Tensor, k: int, tau: float = 1.0, margin: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.detach().clone().requires_grad_()
    loss = LOSS.formula(scores, target, Options([k], [1.0], tau, margin))
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


both_ways = pytest.mark.parametrize("way", [ours, by_definition])


@pytest.mark.parametrize(("classes", "k"), [(n, k) for n in (2, 3, 5, 8) for k in range(1, n)])
def test_equals_enumeration(classes: int, k: int) -> None:
    scores = torch.randn(4, classes, dtype=torch.float64, requires_grad=True)
    target = torch.randint(classes, (4,))
    for tau, margin in itertools.product((0.3, 1.0, 4.0), (0.0, 1.0, 2.5)):
        loss = topk.smooth_topk_loss(scores, target, k, tau=tau, margin=margin, reduction="none")
        rows = zip(scores, target.tolist(), strict=True)
        expected = torch.stack([reference.smooth_topk_loss(row, y, k, tau, margin) for row, y in rows])
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        gradients = [torch.autograd.grad(value.sum(), scores, retain_graph=True)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_log_space_reference_equals_enumeration() -> None:
    scores = (3 * torch.randn(9, dtype=torch.float64)).requires_grad_()
    for k, target in itertools.product((1, 2, 4, 8), (0, 5, 8)):
        expected = reference.smooth_topk_loss(scores, target, k, tau=0.7)
        (gradient,) = torch.autograd.grad(expected, scores)
        torch.testing.assert_close(reference.smooth_topk_loss_log_space(scores, target, k, tau=0.7), expected)
        torch.testing.assert_close(
            reference.smooth_topk_gradient_log_space(scores.detach(), target, k, tau=0.7), gradient
        )


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("kind", ["gaussian", "tied", "k tied", "linear"])
def test_accuracy_table(kind: str, k: int) -> None:
    """The stated bounds: float64 1e-10; float32 loss 3e-6 (relative above 1), gradient 2e-5 / k."""
    for classes in sorted({k + 1, k + 2, 2 * k + 1, 1000}):
        target = torch.tensor([0, classes // 2, classes - 1]).repeat(len(SCALES))
        scores = torch.cat([make_scores(kind, 3, classes, scale, k) for scale in SCALES])
        exact, slopes = truth(scores, target, k)
        for way in (ours, by_definition):
            for dtype, of_loss, of_gradient in ((torch.float64, 1e-10, 1e-10), (torch.float32, 3e-6, 2e-5 / k)):
                where = f"{way.__name__}: {kind}, n={classes}, k={k}, {dtype}"
                loss, gradient = way(scores.to(dtype), target, k)
                assert ((loss - exact).abs() / exact.clamp(min=1)).max() <= of_loss, where
                assert (gradient - slopes).abs().max() <= of_gradient, where


@pytest.mark.parametrize("tau", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("k", [1, 5, 20])
@both_ways
def test_accuracy_at_other_temperatures(way: Any, k: int, tau: float) -> None:
    scores = make_scores("gaussian", 4, 300, 3.0, k)
    target = torch.tensor([0, 7, 150, 299])
    expected, expected_gradient = truth(scores, target, k, tau=tau, margin=0.5)
    loss, gradient = way(scores, target, k, tau=tau, margin=0.5)
    assert ((loss - expected).abs() / expected.clamp(min=1)).max() <= 3e-6
    assert (gradient - expected_gradient).abs().max() <= 2e-5 / k


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_half_types_lose_only_the_rounding(dtype: torch.dtype, k: int) -> None:
    """Against the truth on the same rounded input: float32 accuracy, and a gradient rounded once."""
    scores = make_scores("gaussian", 4, 200, 3.0, k).to(dtype)
    target = torch.tensor([0, 7, 100, 199])
    expected, expected_gradient = truth(scores, target, k)
    loss, gradient = ours(scores, target, k)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert ((loss - expected).abs() / expected.clamp(min=1)).max() <= 3e-6
    rounding = expected_gradient.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
    assert ((gradient - expected_gradient).abs() <= rounding + 2e-5 / k).all()


def test_special_cases() -> None:
    scores = 3 * torch.randn(6, 11, dtype=torch.float64)
    target = torch.randint(11, (6,))
    torch.testing.assert_close(
        topk.smooth_topk_loss(scores, target, 1, margin=0.0), F.cross_entropy(scores, target), rtol=1e-12, atol=1e-12
    )
    # tau -> 0: the hard hinge on the k-th largest wrong score
    wrong = scores.scatter(1, target[:, None], -torch.inf).topk(4).values[:, 3]
    own = scores.gather(1, target[:, None])[:, 0]
    hard = (1 + (wrong - own) / 4).clamp(min=0)
    loss = topk.smooth_topk_loss(scores, target, 4, tau=1e-5, reduction="none")
    torch.testing.assert_close(loss, hard, rtol=1e-4, atol=1e-4)
    # margin 0: the probability that y belongs to a random k-subset drawn with probability ~ exp(sum of u)
    k, u, y = 3, scores[0] / 3, int(target[0])
    subsets = list(itertools.combinations(range(11), k))
    weights = torch.softmax(torch.stack([u[list(s)].sum() for s in subsets]), 0)
    hit = sum(w for w, s in zip(weights, subsets, strict=True) if y in s)
    loss = topk.smooth_topk_loss(scores[0], target[0], k, margin=0.0)
    torch.testing.assert_close(loss, -torch.as_tensor(hit).log(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("classes", [12, 130])
def test_many_k_is_the_weighted_sum(classes: int) -> None:
    scores = (2 * torch.randn(5, classes, dtype=torch.float64)).requires_grad_()
    target = torch.randint(classes, (5,))
    mapping = {1: 0.2, 5: 0.3, 11: 0.4, classes: 0.1}
    several = topk.smooth_topk_loss(scores, target, mapping, tau=0.5, reduction="none")
    alone = sum(p * topk.smooth_topk_loss(scores, target, k, tau=0.5, reduction="none") for k, p in mapping.items())
    torch.testing.assert_close(several, alone, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), scores, retain_graph=True)[0] for value in (several, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 9])
@both_ways
def test_masked_and_broken_rows(way: Any, k: int) -> None:
    scores = torch.randn(7, 20, dtype=torch.float64)
    target = torch.arange(7)
    scores[0, 10:] = -torch.inf  # masked classes: as if they were not there
    scores[1, 12] = torch.nan
    scores[2, 12] = torch.inf
    scores[3, 3] = -torch.inf  # the target itself
    scores[4] = -torch.inf  # fewer than k wrong classes are possible
    scores[4, 4] = 1.0
    scores[5, 5] = torch.inf
    clean = torch.randn(7, 20, dtype=torch.float64)
    scores[6] = clean[6]
    loss, gradient = way(scores, target, k)
    expected, expected_gradient = way(scores[:1, :10], target[:1], k)
    torch.testing.assert_close(loss[:1], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient[:1, :10], expected_gradient, rtol=1e-12, atol=1e-12)
    assert (gradient[0, 10:] == 0).all()
    assert loss[[1, 2, 5]].isnan().all()
    assert gradient[[1, 2, 5]].isnan().all()
    assert loss[3] == torch.inf
    assert gradient[3].isfinite().all()
    assert gradient[3, 3] == 0
    assert loss[4] == 0
    assert (gradient[4] == 0).all()
    assert loss[6].isfinite()
    assert gradient[6].isfinite().all()


@pytest.mark.parametrize(("classes", "k", "lead"), [(1000, 5, 8.0), (1000, 8, 8.0), (4000, 6, 30.0), (4000, 9, 30.0)])
@pytest.mark.parametrize("above", [0.0, 0.05])
@both_ways
def test_a_crowd_behind_few_leaders(way: Any, classes: int, k: int, lead: float, above: float) -> None:
    """The tail's coefficients span dozens of orders of magnitude here, and all but one of the head's odds are huge."""
    scores = torch.zeros(1, classes)
    scores[0, : k - 1] = lead * k
    scores[0, k - 1] = above * k
    target = torch.tensor([classes - 1])
    expected, expected_gradient = truth(scores, target, k)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-5 / k)):
        loss, gradient = way(scores.to(dtype), target, k)
        torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=3e-6)
        assert (gradient - expected_gradient).abs().max() <= bound


@both_ways
@pytest.mark.parametrize("k", [2, 9])
def test_a_leader_far_ahead_costs_the_others_no_digits(way: Any, k: int) -> None:
    scores = make_scores("gaussian", 3, 100, 1.0, k)
    scores[:, 5] = 1e5
    target = torch.tensor([0, 7, 99])
    expected, expected_gradient = truth(scores, target, k)
    loss, gradient = way(scores, target, k)
    assert ((loss - expected).abs() / expected.clamp(min=1)).max() <= 3e-6
    assert (gradient - expected_gradient).abs().max() <= 2e-5 / k


@pytest.mark.parametrize("k", [1000, 4000])
def test_thousands_of_guesses_and_a_crowd(k: int) -> None:
    """k - 1 leaders far ahead of ties: here the tilt needs the most steps, and too few of them underflow in float32."""
    classes, lead = 21841, 18.0
    scores = torch.zeros(1, classes)
    scores[0, : k - 1] = lead * k
    crowd = classes - k  # wrong classes at 0; the target is at 0 too
    few = torch.arange(0, 60, dtype=torch.float64)  # how many of them are among the j largest: more are no use

    def log_e(j: int) -> torch.Tensor:
        ahead = j - few
        allowed = (ahead >= 0) & (ahead <= k - 1)
        ahead = ahead.clamp(0, k - 1)
        ways = _log_choose(k - 1, ahead) + _log_choose(crowd, few) + lead * ahead
        return torch.where(allowed, ways, -torch.inf).logsumexp(0)

    exact = F.softplus(1.0 + log_e(k) - log_e(k - 1))
    target = torch.tensor([classes - 1])
    scores.requires_grad_()
    loss = topk.smooth_topk_loss(scores, target, k)
    assert abs(loss.item() - exact.item()) < 3e-6 * exact.item()
    (gradient,) = torch.autograd.grad(loss, scores)
    assert abs(gradient.sum().item()) < 2e-5 / k


def _log_choose(n: int, j: torch.Tensor) -> torch.Tensor:
    top = torch.tensor(n + 1.0, dtype=torch.float64)
    return top.lgamma() - (j + 1).lgamma() - (top - j).lgamma()


@pytest.mark.parametrize("k", [1, 5, 8, 9])
@pytest.mark.parametrize("kind", ["gaussian", "tied"])
def test_second_derivatives_with_many_classes(kind: str, k: int) -> None:
    """Against differences of the reference's gradient: no probability may underflow on the way, in float32 either."""
    scores, target = make_scores(kind, 2, 600, 1.0, k).double(), torch.tensor([3, 599])
    direction = torch.randn_like(scores)
    step = 1e-4 * direction
    expected = (truth(scores + step, target, k)[1] - truth(scores - step, target, k)[1]) / 2e-4
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        x = scores.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(topk.smooth_topk_loss(x, target, k, reduction="sum"), x, create_graph=True)
        (product,) = torch.autograd.grad((gradient * direction.to(dtype)).sum(), x)
        assert (product - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("k", [1, 3, 6, 9, 10])
def test_derivatives(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smooth, "POWER_SUM_LIMIT", 5)  # both paths at small sizes
    scores = (2 * torch.randn(1, 11, dtype=torch.float64)).requires_grad_()  # rows apart: test_contract.py
    target = torch.tensor([7])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return topk.smooth_topk_loss(x, target, k, tau=0.8, reduction="none")

    assert torch.autograd.gradcheck(loss, scores, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, scores, check_fwd_over_rev=True)


def test_both_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, target = 5 * torch.randn(8, 400), torch.randint(400, (8,))
    results = []
    for limit in (8, 0):
        monkeypatch.setattr(smooth, "POWER_SUM_LIMIT", limit)
        results.append([ours(scores, target, k) for k in (1, 2, 5, 8)])
    for few, many in zip(*results, strict=True):
        torch.testing.assert_close(few, many, rtol=3e-6, atol=3e-6)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, target = torch.randn(37, 50), torch.randint(50, (37,))
    whole = [ours(scores, target, k) for k in (5, 12)]
    monkeypatch.setattr(smooth, "_SUM_CHUNK", 150)
    monkeypatch.setattr(smooth, "_LANE_CHUNK", 150)
    for k, (loss, gradient) in zip((5, 12), whole, strict=True):
        small = ours(scores, target, k)
        torch.testing.assert_close(small[0], loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(small[1], gradient, rtol=1e-6, atol=1e-6)


def test_saved_state_is_small() -> None:
    """O(k) numbers a row beyond the scores, whatever n is."""
    for k in (5, 20):
        _, *saved = smooth.forward(torch.randn(4, 5000), torch.arange(4), Options([k], [1.0], 1.0, 1.0))
        assert sum(part[0].numel() for part in saved) <= 10 * k + 10
