"""The convex relatives of the hinges against maximisation over their sets, libsdca's formulas and special cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import topk
from topk.losses.hinge_levels import low_and_cut, running_sums
from topk.losses.smooth_hinge import VARIANTS, band, definition

EXACT = {"rtol": 1e-10, "atol": 1e-10}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def ours(scores: Tensor, target: Tensor, k: int, variant: str, **keywords: float) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    loss = topk.topk_hinge_loss(scores, target, k, variant=variant, reduction="none", **keywords)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def rows(count: int, classes: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Targets of every rank."""
    scores = scale * torch.randn(count, classes, dtype=torch.float64)
    return scores, scores.argsort(1, descending=True)[torch.arange(count), torch.arange(count) % classes]


def dense(values: Tensor, target: Tensor) -> Tensor:
    """Numbers of the wrong classes (rows, classes - 1) with a 0 at the target's place."""
    full = torch.zeros(len(values), values.shape[1] + 1, dtype=values.dtype)
    wrong = torch.ones_like(full, dtype=torch.bool).scatter(1, target[:, None], False)
    full[wrong] = values.flatten()
    return full


def probabilities(variant: str, gradient: Tensor, target: Tensor) -> Tensor:
    """p: the gradient, but at y."""
    of_all = variant.startswith("polyhedral")
    return (
        gradient.scatter_add(1, target[:, None], torch.ones_like(gradient[:, :1]))
        if of_all
        else gradient.scatter(1, target[:, None], 0.0)
    )


def objective(variant: str, p: Tensor, scores: Tensor, target: Tensor, k: int, margin: float, gamma: float) -> Tensor:
    """What the loss is the maximum of, at p (rows, classes)."""
    lead, s = scores - scores.gather(1, target[:, None]), p.sum(1).clamp(max=1.0)
    if variant == "topk_entropy":
        return (p * lead - torch.special.xlogy(p, p)).sum(1) - torch.special.xlogy(1 - s, 1 - s)
    if variant in ("alpha_smooth", "beta_smooth"):
        return (p * (lead + margin)).sum(1) - gamma / 2 * (p * p).sum(1)
    value = (p * lead).sum(1) + margin - margin * p.topk(k).values.sum(1)
    return value - (gamma * torch.special.xlogy(p, p).sum(1) if variant == "polyhedral_smooth" else 0.0)


def feasible(variant: str, count: int, classes: int, k: int) -> Tensor:
    """Random p (count, classes - 1 or classes) of the variant's set, many on its border."""
    if variant.startswith("polyhedral"):
        return torch.distributions.Dirichlet(torch.full((classes,), 0.5).double()).sample((count,))
    mask = torch.rand(count, classes - 1, dtype=torch.float64).mul(2.0).clamp(max=1.0)
    for _ in range(200):  # to sum k, entries at most 1
        mask = (mask * (k / mask.sum(1, keepdim=True))).clamp(max=1.0)
    return mask / k * torch.rand(count, 1, dtype=torch.float64).mul(1.2).clamp(max=1.0)


@every_variant
@pytest.mark.parametrize("k", [1, 2, 4])
def test_is_the_maximum_over_its_set(variant: str, k: int) -> None:
    """The gradient is a point of the set that attains the loss, and no other point exceeds it."""
    for scale, gamma in itertools.product((0.2, 1.0, 5.0), (0.1, 1.0, 4.0)):
        scores, target = rows(24, 6, scale)
        loss, gradient = ours(scores, target, k, variant, smoothing=gamma)
        p = probabilities(variant, gradient, target)
        s = p.sum(1)
        assert (p >= -1e-12).all()
        torch.testing.assert_close(gradient.sum(1), torch.zeros(24).double(), **EXACT)
        if variant.startswith("polyhedral"):
            torch.testing.assert_close(s, torch.ones(24).double(), **EXACT)
        else:
            assert (s <= 1 + 1e-10).all()
            bound = torch.ones_like(s) if variant == "beta_smooth" else s
            assert (p.amax(1) <= bound / k + 1e-10).all()
        torch.testing.assert_close(objective(variant, p, scores, target, k, 1.0, gamma), loss, **EXACT)
        for point in feasible(variant, 200, 6, k):
            other = point.expand(24, -1)
            other = other if variant.startswith("polyhedral") else dense(other, target)
            assert (objective(variant, other, scores, target, k, 1.0, gamma) <= loss + 1e-10).all()


@every_variant
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (6, 3), (8, 7), (200, 5), (200, 30)])
def test_fast_equals_the_definition(variant: str, classes: int, k: int) -> None:
    for scale, gamma, margin in itertools.product((0.01, 1.0, 20.0), (0.1, 2.0), (0.5, 1.0)):
        scores, target = rows(20, classes, scale)
        loss, gradient = ours(scores, target, k, variant, smoothing=gamma, margin=margin)
        x = scores.clone().requires_grad_()
        expected = definition(x, target, k, variant, margin, gamma)
        torch.testing.assert_close(loss, expected.detach(), **EXACT)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-8, atol=1e-8)


def test_special_cases() -> None:
    scores, target = rows(30, 9)
    cross_entropy = F.cross_entropy(scores, target, reduction="none")
    torch.testing.assert_close(ours(scores, target, 1, "topk_entropy")[0], cross_entropy, **EXACT)
    # Duchi, Khosravi and Ruan's hinge for one guess, by its n pieces.
    best = scores.sort(1, descending=True).values.cumsum(1)
    pieces = (best - 1.0) / torch.arange(1, 10)
    own = scores.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(ours(scores, target, 1, "polyhedral")[0], 1 + pieces.amax(1) - own, **EXACT)
    # Without a margin the smooth surrogate is cross-entropy at a temperature.
    tempered = 2.0 * F.cross_entropy(scores / 2.0, target, reduction="none")
    found = ours(scores, target, 3, "polyhedral_smooth", margin=1e-13, smoothing=2.0)[0]
    torch.testing.assert_close(found, tempered, **EXACT)


def test_limits_without_smoothing() -> None:
    scores, target = rows(40, 9)
    hinge = {v: topk.topk_hinge_loss(scores, target, 3, variant=v, reduction="none") for v in ("alpha", "beta")}
    wrong = torch.ones_like(scores, dtype=torch.bool).scatter(1, target[:, None], False)
    z = 1.0 + scores[wrong].view(40, 8).topk(3).values - scores.gather(1, target[:, None])
    near = {"rtol": 0.0, "atol": 1e-6}
    alpha = ours(scores, target, 3, "alpha_smooth", smoothing=1e-6)[0]
    torch.testing.assert_close(alpha, z.mean(1).relu(), **near)  # libsdca's: without z_y
    assert (alpha <= hinge["alpha"] + 1e-9).all()
    torch.testing.assert_close(alpha[z[:, 2] >= 0], hinge["alpha"][z[:, 2] >= 0], **near)
    torch.testing.assert_close(ours(scores, target, 3, "beta_smooth", smoothing=1e-6)[0], hinge["beta"], **near)
    hard = topk.topk_hinge_loss(scores, target, 3, variant="polyhedral", reduction="none")
    torch.testing.assert_close(ours(scores, target, 3, "polyhedral_smooth", smoothing=1e-7)[0], hard, **near)


@every_variant
def test_is_convex(variant: str) -> None:
    one, target = rows(200, 7, 2.0)
    other = 2.0 * torch.randn(200, 7, dtype=torch.float64)
    ends = (ours(one, target, 3, variant)[0] + ours(other, target, 3, variant)[0]) / 2
    assert (ours((one + other) / 2, target, 3, variant)[0] <= ends + 1e-12).all()


def test_the_mask_of_the_polyhedral_surrogate_is_the_sparse_soft_topk() -> None:
    x = torch.randn(20, 9, dtype=torch.float64).sort(1, descending=True).values
    mask = band(x, 3, 0.7, "fixed sum")[2] / 0.7
    torch.testing.assert_close(mask, topk.soft_topk(x, 3, method="sparse", temperature=0.7), rtol=1e-9, atol=1e-9)


@every_variant
def test_float32_equals_float64_on_the_same_scores(variant: str) -> None:
    for scale, offset in ((1e-3, 0.0), (1.0, 0.0), (1.0, 1000.0), (30.0, 0.0), (1e4, 0.0)):
        scores = (scale * torch.randn(64, 200) + offset).float()
        target = torch.arange(64)
        expected = ours(scores.double(), target, 5, variant)
        loss, gradient = ours(scores, target, 5, variant)
        torch.testing.assert_close(loss.double(), expected[0], rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(gradient.double(), expected[1], rtol=0, atol=2e-5)


def test_fewer_possible_classes_than_guesses() -> None:
    scores = torch.tensor([[0.0, 1.0, -math.inf, -math.inf, -math.inf]], dtype=torch.float64)
    for variant in ("topk_entropy", "alpha_smooth", "polyhedral", "polyhedral_smooth"):
        loss, gradient = ours(scores, torch.tensor([0]), 3, variant)
        assert loss.item() == 0
        assert (gradient == 0).all()
    loss, gradient = ours(scores, torch.tensor([0]), 3, "beta_smooth")
    assert gradient[0].tolist() == pytest.approx([-1 / 3, 1 / 3, 0, 0, 0])
    assert loss.item() == pytest.approx(2 / 3 - 1 / 18)


@every_variant
def test_no_wrong_class_is_possible(variant: str) -> None:
    scores, target = torch.full((2, 6), -math.inf), torch.tensor([3, 0])
    scores[0, 3], scores[1] = 1.0, torch.arange(6.0)
    loss, gradient = ours(scores, target, 2, variant)
    assert loss[0].item() == 0
    assert (gradient[0] == 0).all()
    torch.testing.assert_close(gradient[1], ours(scores[1:], target[1:], 2, variant)[1][0])


@pytest.mark.parametrize("variant", ["alpha_smooth", "beta_smooth", "polyhedral", "polyhedral_smooth"])
def test_rows_that_need_more_than_their_largest_scores(variant: str) -> None:
    """Many equal scores, or a wide band: then every class is looked at, in these rows alone."""
    scores, target = rows(30, 300)
    scores[::3], scores[1::3] = 0.01 * scores[::3], scores[1::3].round()
    x = scores.clone().requires_grad_()
    expected = definition(x, target, 2, variant, 1.0, 20.0)
    loss, gradient = ours(scores, target, 2, variant, smoothing=20.0)
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    p = probabilities(variant, gradient, target)
    torch.testing.assert_close(objective(variant, p, scores, target, 2, 1.0, 20.0), loss, **EXACT)


def test_a_crowd_behind_the_leader_counts() -> None:
    """None of the crowd is ahead by itself; that there are many of them decides, and most of them are not selected."""
    scores, target = torch.linspace(-0.9, -0.89, 1000).double()[None], torch.tensor([5])
    scores[0, 700] = 0.0
    loss, gradient = ours(scores, target, 3, "polyhedral")
    torch.testing.assert_close(loss, definition(scores, target, 3, "polyhedral"), **EXACT)
    assert (gradient[0] > 0.0).sum() > 500


def test_smoothing_must_be_positive() -> None:
    with pytest.raises(ValueError, match="smoothing must be a finite number > 0, got 0"):
        topk.topk_hinge_loss(torch.randn(4, 6), torch.arange(4), 2, variant="beta_smooth", smoothing=0.0)


@pytest.mark.parametrize("k", [1, 2, 8, 9, 70, 99])
@pytest.mark.parametrize("height", [0.02, 1.0])
def test_the_level_is_a_root(k: int, height: float) -> None:
    """For any number of rounds, with and without ties."""
    scores = torch.randn(32, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) * 3.0
    for z in (scores, scores.round()):
        ranked = z.sort(1, descending=True).values
        low, _ = low_and_cut(ranked, running_sums(ranked), k, height)
        found = (z - low).clamp(0.0, height).sum(1)
        torch.testing.assert_close(found, torch.full_like(found, k * height), rtol=1e-9, atol=1e-9)
