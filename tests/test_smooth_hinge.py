"""The convex relatives of the hinges against maximisation over their sets, libsdca's own values and special cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import topk
from topk.losses.hinge_levels import low_and_cut, running_sums
from topk.losses.smooth_hinge import VARIANTS, band, definition

EXACT = {"rtol": 1e-10, "atol": 1e-10}
every_variant = pytest.mark.parametrize("variant", VARIANTS)

# What libsdca 0.3.0 itself gives, compiled, in float64: `primal_loss` of l2_hinge_topk, l2_topk_hinge,
# l2_hinge_topk_smooth, l2_topk_hinge_smooth and l2_entropy_topk, called as its eval_primal_loss does, with c = 1, times
# their coeff_primal_loss. Its SDCA_ACCURATE_MATH changes none of these digits. The last column, the truncated entropy,
# is the objective of grad_topk_softmax_nonconvex in mex_gd.cpp at commit 69946e6, without the regulariser.
# Headers: commit db04566, but l2_hinge_topk.h and log_exp.h of 088a1a1, topk_cone.h and topk_entropy.h of 9eb4ae9.
LIBSDCA_COLUMNS = ("alpha", "beta", "alpha_smooth", "beta_smooth", "topk_entropy", "entropy")
LIBSDCA_SCORES = {
    "six": [2.0, 0.5, -1.0, 0.25, 1.5, -0.75],
    "level": [1.0, 1.0, 1.0, 0.0, 0.0, 1.0],
    "equal": [0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
    "winner": [4.0, 0.5, -1.0, 0.25, 1.5, -0.75],
    "far": [12.5, -3.0, 8.0, -15.5, 0.5, 6.0],
    "twelve": [1.25, -0.5, 0.0, 2.5, -2.0, 0.75, 0.75, -1.25, 1.75, -0.25, 0.5, -3.0],
    "near": [0.125, -0.0625, 0.0, 0.25, -0.1875, 0.0625, 0.1875, -0.125, 0.03125, -0.03125, 0.09375, -0.25],
}
# fmt: off
LIBSDCA = {  # scores, target, k, gamma
    ("six", 0, 2, 1.0): (0.0, 0.25, 0.0, 0.125, 0.7481205159948, 0.4125195225619),
    ("six", 0, 3, 1.0): (0.0, 0.1666666666667, 0.0, 0.1111111111111, 0.7040862835878, 0.2526937112077),
    ("six", 4, 3, 0.1): (0.4166666666667, 0.5, 0.4, 0.4944444444444, 1.095467647311, 0.3879723446525),
    ("six", 3, 1, 10.0): (2.75, 2.75, 0.709375, 0.709375, 2.500070699566, 2.500070699566),
    ("six", 2, 5, 1.0): (2.7, 2.7, 2.6, 2.6, 3.345322976964, 0.8259394198788),
    ("level", 0, 2, 1.0): (1.0, 1.0, 0.8333333333333, 0.8333333333333, 1.555141984618, 1.317950979296),
    ("level", 3, 5, 0.1): (1.8, 1.8, 1.79, 1.79, 2.495492475244, 0.6931471805599),
    ("equal", 2, 3, 10.0): (1.0, 1.0, 0.25, 0.25, 1.791759469228, 1.38629436112),
    ("winner", 0, 2, 1.0): (0.0, 0.0, 0.0, 0.0, 0.1403109552548, 0.06682163610895),
    ("far", 3, 2, 10.0): (26.75, 26.75, 24.475, 24.475, 26.50686205609, 23.62742975111),
    ("far", 5, 2, 0.1): (5.25, 5.25, 5.225, 5.225, 4.950536779547, 2.127429751112),
    ("twelve", 3, 5, 1.0): (0.0, 0.05, 0.0, 0.03, 0.8839657706635, 0.3147003142308),
    ("twelve", 8, 3, 1.0): (0.75, 0.75, 0.6111111111111, 0.6388888888889, 1.611691095141, 0.9237542662318),
    ("twelve", 11, 5, 10.0): (5.4, 5.4, 4.525, 4.525, 6.301993640324, 4.890500103526),
    ("near", 0, 5, 1.0): (1.0, 1.0, 0.910419921875, 0.910419921875, 2.377820257656, 1.898382297873),
    ("near", 11, 2, 0.1): (1.46875, 1.46875, 1.44375, 1.44375, 2.752820257656, 2.641774287764),
}
# fmt: on


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


def libsdca_rows(variant: str) -> Iterator[tuple[Tensor, Tensor, int, float, float]]:
    """Scores, target, k, gamma, and the value of libsdca."""
    for (name, y, k, gamma), values in LIBSDCA.items():
        scores = torch.tensor([LIBSDCA_SCORES[name]], dtype=torch.float64)
        yield scores, torch.tensor([y]), k, gamma, values[LIBSDCA_COLUMNS.index(variant)]


@pytest.mark.parametrize("variant", LIBSDCA_COLUMNS[1:])
def test_equals_libsdca(variant: str) -> None:
    """And would not with another convention: each changes some row by more than 0.02."""
    largest: dict[str, float] = {}
    for scores, target, k, gamma, expected in libsdca_rows(variant):
        loss = ours(scores, target, k, variant, smoothing=gamma)[0].item()
        assert loss == pytest.approx(expected, rel=1e-12, abs=1e-12)
        wrong = {v: ours(scores, target, k, v, smoothing=gamma) for v in LIBSDCA_COLUMNS if v != variant}
        wrong["another k"] = ours(scores, target, k - 1 if k > 1 else 2, variant, smoothing=gamma)
        if not variant.endswith("entropy"):
            wrong["no margin"] = ours(scores, target, k, variant, smoothing=gamma, margin=0.0)
        if variant.endswith("smooth"):
            wrong["gamma / k"] = ours(scores, target, k, variant, smoothing=gamma / k)
            wrong["2 gamma"] = ours(scores, target, k, variant, smoothing=2 * gamma)
        for name, (other, _) in wrong.items():
            largest[name] = max(largest.get(name, 0.0), abs(other.item() - expected))
    assert min(largest.values()) > 0.02, largest


def test_alpha_differs_from_libsdcas_by_the_targets_zero() -> None:
    """Where the k-th wrong z is negative. Theirs, of wrong classes alone, is the limit of either's smoothed one."""
    above = 0
    for scores, target, k, _, expected in libsdca_rows("alpha"):
        z, y = 1.0 + scores - scores[0, target], target[:, None]
        loss = ours(scores, target, k, "alpha")[0].item()
        smoothed = ours(scores, target, k, "alpha_smooth", smoothing=1e-6)[0].item()
        assert smoothed == pytest.approx(expected, abs=1e-6)
        with_zero, without = z.scatter(1, y, 0.0).topk(k).values, z.scatter(1, y, -math.inf).topk(k).values
        assert loss == pytest.approx(with_zero.mean().relu().item(), rel=1e-12)
        assert expected == pytest.approx(without.mean().relu().item(), rel=1e-12)
        above += loss > expected + 0.05
        assert without[0, -1] < 0 or loss == pytest.approx(expected, rel=1e-12)
    assert above == 2  # in these two rows only the first convention gives ours


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
