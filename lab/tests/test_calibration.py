"""The calibration check: what it minimises, what it finds where the answer is known, and its verdicts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.optimize import linprog
from scipy.stats import norm
from torch import Tensor

import topk
from topk_lab.study import calibration, descents, plane
from topk_lab.study.contenders import Contender, by_name, contenders, expected
from topk_lab.study.resting import rest

KNOWN_SIZES = ((1, 3), (2, 4), (3, 5))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def asked(k: int, classes: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = [calibration.distributions(kind, classes, k, count, generator) for kind in calibration.KINDS]
    return torch.cat(drawn)


# --- distributions, leads, regrets ---


@pytest.mark.parametrize("kind", calibration.KINDS)
@pytest.mark.parametrize(("k", "classes"), KNOWN_SIZES)
def test_distributions(kind: str, k: int, classes: int) -> None:
    q = calibration.distributions(kind, classes, k, 20, torch.Generator().manual_seed(1))
    assert q.shape == (20, classes)
    assert (q > 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones(20, dtype=torch.float64))
    ordered = q.sort(descending=True).values
    assert (ordered[:, k - 1] - ordered[:, k] >= calibration.GAP - 1e-9).all()
    if kind == "near tie":
        torch.testing.assert_close(ordered[:, k - 1] - ordered[:, k], torch.full((20,), calibration.GAP).double())
    assert len({tuple(row.argsort().tolist()) for row in q}) > 1  # no class is favoured by its index


def test_distributions_refuse_unknown_kinds() -> None:
    with pytest.raises(ValueError, match="kind must be one of uniform"):
        calibration.distributions("round", 4, 2, 1, torch.Generator())


def test_leads_and_regrets_by_hand() -> None:
    q = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    scores = torch.tensor([[[0.0, 3.0, 1.0, 2.0], [0.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [5.0, 2.0, 1.0, 2.0]]])
    every = q[:, None].expand(1, 4, 4)
    assert calibration.leads(scores.double(), every, 2).tolist() == [[1.0, -1.0, 0.0, -3.0]]
    # right; class 2 for class 3; two of four at random; class 0 and one of classes 1 and 3
    regrets = calibration.regrets(scores.double(), every, 2)
    torch.testing.assert_close(regrets, torch.tensor([[0.0, 0.1, 0.2, 0.7 - 0.1 - 0.35]], dtype=torch.float64))


def test_expected_loss_by_hand() -> None:
    scores = torch.randn(5, 4, dtype=torch.float64)
    q = torch.rand(5, 4, dtype=torch.float64)
    by_labels = sum(q[:, y] * F.cross_entropy(scores, torch.full((5,), y), reduction="none") for y in range(4))
    torch.testing.assert_close(expected(by_name("cross-entropy").at(2), scores, q), by_labels)


# --- minima ---


def test_descents_find_minima_of_quadratics_and_of_corners() -> None:
    matrix = torch.randn(6, 4, 4, dtype=torch.float64)
    matrix = matrix @ matrix.mT + 0.1 * torch.eye(4)
    centre = torch.randn(6, 4, dtype=torch.float64)

    def quadratic(points: Tensor, rows: Tensor) -> Tensor:
        off = points - centre[rows]
        return torch.einsum("ri,rij,rj->r", off, matrix[rows], off)

    found, value = descents.minimise(quadratic, torch.zeros(6, 4, dtype=torch.float64))
    torch.testing.assert_close(found, centre, rtol=0, atol=1e-4)
    assert value.max() < 1e-8
    found, value = descents.minimise(
        lambda points, rows: (points - centre[rows]).abs().sum(1) + points[:, 0] ** 2 / 4, 3 + centre, steps=300
    )
    best = torch.where(centre[:, 0].abs() <= 2, centre[:, 0] ** 2 / 4, centre[:, 0].abs() - 1)
    assert (value - best).max() < 5e-3  # where corners stop every direction


def entropy_of(q: Tensor) -> Tensor:
    return torch.special.entr(q).sum(1)


@pytest.mark.parametrize(("k", "classes"), KNOWN_SIZES)
def test_known_minima(k: int, classes: int) -> None:
    q = asked(k, classes, 1)
    ordered = q.sort(descending=True).values
    inside, rest = ordered[:, :k], ordered[:, k - 1 :]
    within = (inside * (inside.sum(1, keepdim=True) / inside).log()).sum(1)
    known = {
        "cross-entropy": entropy_of(q),
        "cross-entropy, smoothing 0.1": entropy_of(0.9 * q + 0.1 / classes),
        "hinge, calibrated": 1 - inside.sum(1),
        "truncated entropy": entropy_of(rest) + rest.sum(1) * rest.sum(1).log(),
        "transition, weight 0.5": entropy_of(q) - 0.5 * within,
        "transition, weight 1 (grouped)": entropy_of(q) - within,
    }
    for name, value in known.items():
        outcome = calibration.check(by_name(name), q, k, starts=3)
        torch.testing.assert_close(outcome.value, value, rtol=0, atol=1e-6, msg=name)
        if "weight 1" not in name:
            assert outcome.right.all(), name
            assert outcome.regret.max() < 1e-12, name


def linear_program(variant: str, q: Tensor, k: int) -> float:
    """The least expected alpha or beta hinge: both are maxima over sets, so linear programs in epigraph form."""
    n = len(q)
    costs, rows, levels = [0.0] * n + q.tolist(), [], []
    for y in range(n):
        for size in range(k + 1) if variant == "beta" else (k,):
            choices = [j for j in range(n) if j != y] if variant == "beta" else range(n)
            for chosen in itertools.combinations(choices, size):
                row = [0.0] * (2 * n)
                for j in chosen:
                    row[j] += 1 / k
                    row[y] -= 1 / k
                row[n + y] = -1.0
                rows.append(row)
                levels.append(-sum(j != y for j in chosen) / k)
    bounds = [(None, None)] * n + [(0, None)] * n
    solution = linprog(costs, A_ub=rows, b_ub=levels, bounds=bounds)
    assert solution.success
    return float(solution.fun)


@pytest.mark.parametrize(("k", "classes"), [(1, 3), (2, 3), (2, 4), (3, 5), (2, 5)])
@pytest.mark.parametrize("variant", ["alpha", "beta"])
def test_corners_hold_the_minimum(variant: str, k: int, classes: int) -> None:
    q = asked(k, classes, 3)
    found = calibration.check(by_name(f"hinge, {variant}"), q, k).value
    exact = torch.tensor([linear_program(variant, row, k) for row in q], dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [each.name for each in contenders() if each.search == "corners"])
def test_no_descent_goes_below_the_corners(name: str) -> None:
    contender, q = by_name(name), asked(2, 4, 1)
    exact = calibration.check(contender, q, 2).value
    values, _ = calibration.descent_ends(contender, q, 2, 6, torch.Generator().manual_seed(0), steps=60)
    best = values.amin(1)
    assert (best >= exact - 1e-9).all()
    assert ((best - exact) < 0.02).double().mean() > 0.5  # and most come near: the corners are no other function's


# --- verdicts ---


def test_verdicts() -> None:
    q = torch.tensor([[0.5, 0.3, 0.2]] * 3, dtype=torch.float64)
    right, wrong, tie = [2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [1.0, 0.0, 0.0]
    scores = torch.tensor([[right, wrong], [right, tie], [wrong, tie]], dtype=torch.float64)
    values = torch.tensor([[0.0, 1.0], [0.0, 1e-9], [1e-9, 0.0]], dtype=torch.float64)
    outcome = calibration.judge(values, scores, q, 2)
    assert outcome.right.tolist() == [True, False, False]
    assert outcome.wrong.tolist() == [False, False, True]
    assert outcome.verdicts() == ["right", "open", "wrong"]
    torch.testing.assert_close(outcome.regret, torch.tensor([0.0, 0.05, 0.1], dtype=torch.float64))


def test_the_example_of_three_classes() -> None:
    """q = (.4, .35, .25), one guess: the multiclass hinge has its only minimum where all scores tie."""
    q = torch.tensor([[0.4, 0.35, 0.25]], dtype=torch.float64)
    for variant in ("kth", "alpha", "beta", "smooth limit"):
        outcome = calibration.check(by_name(f"hinge, {variant}"), q, 1)
        assert outcome.wrong.item()
        assert outcome.value.item() == pytest.approx(1.0)
        assert outcome.regret.item() == pytest.approx(0.4 - 1 / 3)
    assert calibration.check(by_name("hinge, calibrated"), q, 1).right.item()


def noised_at(epsilon: float) -> Contender:
    def at(k: int):  # type: ignore[no-untyped-def]
        return lambda s, t: topk.noised_topk_loss(s, t, k, epsilon=epsilon, samples=None, reduction="none")

    return Contender(f"noised at {epsilon}", "noised", at)


@pytest.mark.parametrize("k", [1, 3])
def test_noise_has_a_threshold(k: int) -> None:
    q = torch.tensor([[0.5, 0.47, 0.03]] if k == 1 else [[0.33, 0.28, 0.22, 0.15, 0.02]], dtype=torch.float64)
    largest = quad(lambda t: t * (k + 1) * norm.pdf(t) * norm.cdf(t) ** k, -12, 12)[0]  # of k + 1 normal numbers
    threshold = 1 / largest
    below, above = (
        calibration.check(noised_at(factor * threshold), q, k, starts=3, steps=60) for factor in (0.8, 1.25)
    )
    assert below.right.item()
    assert not above.right.item()
    assert above.regret.item() > 0.01


def test_regret_bounds() -> None:
    """Cross-entropy's square root, the calibrated hinge's line, and both over many inputs at once."""
    for k, classes in KNOWN_SIZES:
        q = asked(k, classes, 30)
        scores = q.log() + 0.7 * torch.randn_like(q)
        regret = calibration.regrets(scores, q, k)
        ce = expected(by_name("cross-entropy").at(k), scores, q) - entropy_of(q)
        window = q.topk(k).values.sum(1)
        hinge = expected(by_name("hinge, calibrated").at(k), scores, q) - (1 - window)
        assert (regret > 0).any()
        assert (regret <= (2 * ce).sqrt() + 1e-12).all()
        assert (regret <= hinge + 1e-12).all()
        assert regret.mean() <= math.sqrt(2 * ce.mean())
        assert regret.mean() <= hinge.mean()


def test_exchange() -> None:
    """Exchanging two scores changes the expected loss by (q_i - q_j)(loss_j - loss_i), for every symmetric loss."""
    q, scores = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    swapped = scores[:, [2, 1, 0, 3]]
    for contender in contenders():
        loss = contender.at(2)
        change = expected(loss, swapped, q) - expected(loss, scores, q)
        at_0, at_2 = (loss(scores, torch.tensor([y])) for y in (0, 2))
        holds = torch.allclose(change, (0.1 - 0.15) * (at_2 - at_0), rtol=0, atol=1e-6)
        assert holds or not contender.symmetric, contender.name


def test_smooth_losses_are_right_and_fields_rest() -> None:
    q = asked(2, 4, 1)
    for name in ("smooth, tau 0.1, margin 1", "smooth, tau 1, margin 0", "focal, gamma 2", "LDAM, equal margins"):
        assert calibration.check(by_name(name), q, 2, starts=3, steps=80).right.all(), name
    sure = torch.tensor([[0.45, 0.4, 0.1, 0.05]], dtype=torch.float64)
    outcome = calibration.check(by_name("transition, width 1"), sure, 2, starts=3)
    assert outcome.right.all()
    assert outcome.rest.max() < 1e-3
    sheltered = torch.tensor([[0.8, 0.1, 0.05, 0.05]], dtype=torch.float64)
    start = torch.tensor([[0.425, 0.1, 0.425, 0.05]], dtype=torch.float64).log()
    ends, rest = calibration.follow(by_name("transition, width 1").at(2), start, sheltered, 50)
    torch.testing.assert_close(ends, start)
    assert rest.max() < 1e-12


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of cross-entropy"):
        by_name("square")


def test_how_clearly_a_loss_prefers_the_right_window() -> None:
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ends = calibration.gap_ends(by_name("cross-entropy"), q, 1, starts=3)
    assert ends.right == pytest.approx(entropy_of(q[None]).item(), abs=1e-8)
    tie = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)  # the best scores that tie give both classes their mean
    assert ends.wrong == pytest.approx(-(q * tie.log()).sum().item(), abs=1e-6)
    torch.testing.assert_close(ends.best.softmax(0), q, rtol=0, atol=1e-5)


def test_how_clearly_the_calibrated_hinge_prefers_the_right_window() -> None:
    """By thm-ca-hinge a wrong window costs at least the probability that it misses, and one that is apart no more."""
    q = torch.tensor([0.24, 0.21, 0.2, 0.18, 0.17], dtype=torch.float64)
    ends = calibration.gap_ends(by_name("hinge, calibrated"), q, 2, starts=1)
    assert (ends.right, ends.wrong) == pytest.approx((0.55, 0.56), abs=1e-12)
    assert ends.best.tolist() == [1, 1, 0, 0, 0]


# --- the picture ---


def test_the_plane_of_three_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(plane.AXES @ plane.AXES.T, torch.eye(2, dtype=torch.float64))
    axis, scores = plane.grid(3.0, 7)
    assert scores.shape == (49, 3)
    assert scores.sum(1).abs().max() < 1e-12
    assert scores[48].tolist() == pytest.approx((axis[-1] * (plane.AXES[0] + plane.AXES[1])).tolist())
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    field = plane.field(by_name("cross-entropy").at(1), scores, q)
    torch.testing.assert_close(field, scores.softmax(1) - q)
    tables = []
    monkeypatch.setattr(plane.figures, "show", lambda figure, alt, table, palette: tables.append((alt, table)))
    plane.draw({"cross-entropy": by_name("cross-entropy").at(1)}, q, 1, alt="words")
    ((alt, table),) = tables
    assert alt == "words"
    assert entropy_of(q[None]).item() - 1e-3 <= table["least on the grid"][0] <= entropy_of(q[None]).item() + 1e-2


def test_the_convex_relatives_minima() -> None:
    """The polyhedral surrogate's is the Bayes risk, the smooth one's that plus the entropy; AUTKC's hinge is beta."""
    draw = torch.Generator().manual_seed(2)
    q = torch.cat([calibration.distributions(kind, 4, 2, 1, draw) for kind in ("uniform", "flat", "near tie")])
    risk = 1.0 - q.topk(2).values.sum(1)
    hard, soft = (calibration.check(by_name(name), q, 2, 4, 80) for name in ("polyhedral", "polyhedral smooth"))
    torch.testing.assert_close(hard.value, risk, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(soft.value, risk - torch.special.xlogy(q, q).sum(1), rtol=0.0, atol=1e-7)
    assert hard.right.all()
    assert soft.right.all()
    beta, autkc = (calibration.check(by_name(name), q, 2) for name in ("hinge, beta", "AUTKC, hinge"))
    torch.testing.assert_close(autkc.value, beta.value, rtol=0.0, atol=1e-9)


# --- resting places against what is proved about them ---

Q = torch.tensor([[0.4, 0.35, 0.25], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2]], dtype=torch.float64)


def test_cross_entropy_rests_at_q() -> None:
    p, right = rest(by_name("cross-entropy"), 1, Q)
    torch.testing.assert_close(p, Q, atol=1e-4, rtol=0)
    assert right.all()


def test_hinges_rest_at_their_exact_minima() -> None:
    apart = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).softmax(0)
    p, right = rest(by_name("hinge, calibrated"), 1, Q)
    assert right.all()
    torch.testing.assert_close(p[1], apart)
    p, right = rest(by_name("hinge, kth"), 1, Q)
    torch.testing.assert_close(p[0], torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(p[1], apart)
    assert right.tolist()[:2] == [False, True]
    assert not rest(by_name("hinge, beta"), 2, Q)[1][2]


def test_the_smooth_loss_ranks_right() -> None:
    for k in (1, 2):
        p, right = rest(by_name("smooth, tau 1, margin 1"), k, Q)
        assert right.all()
        torch.testing.assert_close(p.sum(1), torch.ones(3, dtype=torch.float64))
