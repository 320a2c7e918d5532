"""The noised hinge: given noise, thinned noise, counted noise, no noise, and the expectation over all noise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import brute_force as reference
import numpy as np
import pytest
import torch
from torch import Tensor

import topk
from topk.losses import noised, noised_quadrature, noised_sampling
from topk.losses.noised import LOSS, Options

MASK = 0xFFFFFFFF
# The chance that a right sampler fails a test below is far under 1e-6 a comparison, and the seeds are fixed.
STANDARD_ERRORS = 5.0
KS_LIMIT = 2.7  # times 1 / sqrt(draws): exp(-2 * 2.7^2) = 5e-7


def rows_of(scores: Tensor, target: Tensor) -> list[tuple[Tensor, int]]:
    return list(zip(scores, target.tolist(), strict=True))


def value_and_gradient(scores: Tensor, target: Tensor, k: Any, **options: Any) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    loss = topk.noised_topk_loss(scores, target, k, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeds_of(generator: torch.Generator) -> Tensor:
    """Those that the public function draws."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, generator=generator)


# --- given noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "k"), [(2, 1), (5, 1), (5, 4), (30, 5), (200, 20)])
def test_equals_the_definition_on_the_same_noise(classes: int, k: int) -> None:
    rows, samples, seed, margins = 6, 4, 123, torch.linspace(0.2, 1.0, classes, dtype=torch.float64)
    scores = torch.randn(rows, classes, dtype=torch.float64, requires_grad=True)
    target = torch.randint(classes, (rows,))
    noise = torch.randn(samples, rows, classes, generator=seeded(seed), dtype=torch.float64)
    scores_of_noise = scores.topk(classes, 1).indices  # noise is drawn for classes as they are selected
    noise = torch.zeros_like(noise).scatter(2, scores_of_noise.expand_as(noise), noise)
    extras, options = (margins[target], torch.tensor([seed])), Options([k], [1.0], 0.8, samples, 2.5)
    loss, *saved = LOSS.forward(scores.detach(), target, options, *extras)
    expected = torch.stack(
        [
            reference.noised_topk_loss(row, y, k, noise[:, i].T, 0.8, margins, 2.5)
            for i, (row, y) in enumerate(rows_of(scores, target))
        ]
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    grad = torch.randn(rows, dtype=torch.float64)
    gradient = LOSS.backward(grad, scores.detach(), target, options, tuple(saved), *extras)
    (slopes,) = torch.autograd.grad((grad * expected).sum(), scores)
    torch.testing.assert_close(gradient, slopes, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("classes", [9, 60, 700])
@pytest.mark.parametrize(
    "how", [{"samples": 6}, {"samples": None}, {"epsilon": 0.0}, {"samples": None, "epsilon": 0.1}], ids=str
)
def test_fast_and_plain_are_the_same_number(classes: int, how: dict[str, Any]) -> None:
    """With seeds given, both see the same draws; several k share them where all classes are drawn."""
    scores, target, margins = 2 * torch.randn(8, classes), torch.randint(classes, (8,)), torch.linspace(6.0, 9.0, 8)
    scores[2, 3:7], target[2] = -torch.inf, 1
    scores[3, 4:], target[3] = -torch.inf, 2  # no sixth score
    for k in (1, 5, {2: 0.25, 6: 0.75} if classes < 384 else {6: 1.0}):
        weights = {k: 1.0} if isinstance(k, int) else k
        options = Options([*weights], [*weights.values()], **{"epsilon": 0.7, "samples": 5, "scale": 1.5, **how})
        extras = margins, seeds_of(seeded(4))
        results = []
        for x in (scores, scores.double()):
            x = x.clone().requires_grad_()
            plain = LOSS.formula(x, target, options, *extras)
            slopes = torch.autograd.grad(plain.sum(), x)[0]
            loss, *saved = LOSS.forward(x.detach(), target, options, *extras)
            gradient = LOSS.backward(torch.ones_like(loss), x.detach(), target, options, tuple(saved), *extras)
            tolerance = 1e-5 if x.dtype == torch.float32 else 1e-7
            torch.testing.assert_close(plain.detach(), loss, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(slopes, gradient, rtol=tolerance, atol=tolerance)
            results.append(loss.double())
        if how.get("samples", 1) is None:
            torch.testing.assert_close(*results, rtol=1e-6, atol=4e-6)


def test_several_k_share_one_draw() -> None:
    scores, target = torch.randn(8, 40, dtype=torch.float64), torch.randint(40, (8,))
    weights = {1: 0.2, 4: 0.5, 39: 0.2, 40: 0.1}
    together = value_and_gradient(scores, target, weights, generator=seeded(3))
    apart = [value_and_gradient(scores, target, k, generator=seeded(3)) for k in weights]
    for i in range(2):
        expected = sum(share * result[i] for share, result in zip(weights.values(), apart, strict=True))
        torch.testing.assert_close(together[i], expected, rtol=1e-10, atol=1e-10)


def test_several_k_in_expectation() -> None:
    scores, target = 3 * torch.randn(8, 40, dtype=torch.float64), torch.randint(40, (8,))
    weights = {1: 0.2, 4: 0.5, 39: 0.2, 40: 0.1}
    together = value_and_gradient(scores, target, weights, samples=None, epsilon=0.5)
    apart = [value_and_gradient(scores, target, k, samples=None, epsilon=0.5) for k in weights]
    for i in range(2):
        expected = sum(share * result[i] for share, result in zip(weights.values(), apart, strict=True))
        torch.testing.assert_close(together[i], expected, rtol=1e-9, atol=1e-9)


def test_the_same_seed_gives_the_same_noise() -> None:
    for classes in (50, 1000):
        scores, target = torch.randn(20, classes), torch.randint(classes, (20,))
        first, again, other = (value_and_gradient(scores, target, 5, generator=seeded(s)) for s in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])
        generator = seeded(1)
        assert torch.equal(value_and_gradient(scores, target, 5, generator=generator)[0], first[0])
        assert not torch.equal(value_and_gradient(scores, target, 5, generator=generator)[0], first[0])
        torch.manual_seed(5)
        first = value_and_gradient(scores, target, 5)
        torch.manual_seed(5)
        assert torch.equal(value_and_gradient(scores, target, 5)[0], first[0])
        assert not torch.equal(value_and_gradient(scores, target, 5)[0], first[0])


def test_only_noise_uses_up_random_numbers() -> None:
    scores, target, state = torch.randn(3, 9), torch.randint(9, (3,)), torch.get_rng_state()
    topk.noised_topk_loss(scores, target, 2, samples=None)
    topk.noised_topk_loss(scores, target, 2, epsilon=0.0)
    topk.noised_topk_loss(scores, target, 2, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("classes", [30, 700])
def test_vmap_folds_the_noise(classes: int) -> None:
    scores, target = torch.randn(classes).repeat(3, 4, 1), torch.arange(4)

    def loss(x: Tensor) -> Tensor:
        return topk.noised_topk_loss(x, target, 3, reduction="none")

    torch.manual_seed(8)
    alone = loss(scores[0])
    torch.manual_seed(8)
    same = torch.vmap(loss, randomness="same")(scores)
    torch.testing.assert_close(same, alone.expand(3, 4), rtol=0, atol=0)
    different = torch.vmap(loss, randomness="different")(scores)
    assert (different[0] != different[1]).all()
    assert (different[1] != different[2]).all()
    nested = torch.vmap(torch.vmap(loss, randomness="different"), randomness="different")(scores.expand(2, -1, -1, -1))
    assert len(set(nested[..., 0].flatten().tolist())) == 6
    gradients = torch.vmap(torch.func.grad(lambda x: loss(x).sum()), randomness="different")(scores)
    assert not torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients.sum(2), torch.zeros(3, 4), rtol=0, atol=1e-5)


# --- thinned noise is distributed like plain noise -------------------------------------------------------------------


def make_row(kind: str, classes: int, spread: float) -> Tensor:
    generator = seeded(classes)
    if kind == "gaussian":
        return spread * torch.randn(classes, generator=generator)
    if kind == "tied":
        return torch.zeros(classes)
    if kind == "cluster":
        return torch.where(torch.arange(classes) % 16 == 3, 0.0, -spread)
    if kind == "steps":
        return spread * torch.randint(4, (classes,), generator=generator).float()
    return torch.linspace(-spread, spread, classes)[torch.randperm(classes, generator=generator)]


THINNED = [  # kind, spread, classes, head, depth, epsilon
    ("gaussian", 1.0, 1000, 80, 6, 1.0),
    ("gaussian", 1.0, 1000, 14, 6, 1.0),
    ("gaussian", 1.0, 100, 7, 6, 1.0),
    ("gaussian", 4.0, 1000, 15, 6, 0.2),
    ("gaussian", 4.0, 1000, 9, 6, 1.0),
    ("gaussian", 1.0, 2000, 84, 21, 1.0),
    ("gaussian", 1.0, 300, 30, 21, 2.0),
    ("gaussian", 1.0, 60, 3, 2, 0.3),
    ("tied", 1.0, 400, 20, 3, 1.0),
    ("tied", 1.0, 100, 4, 2, 0.01),
    ("steps", 1.0, 200, 12, 6, 0.7),
    ("cluster", 100.0, 200, 6, 6, 1.0),  # the others of the cluster need no noise to count
    ("tied", 1.0, 30, 3, 3, 1.0),
    ("linear", 3.0, 50, 5, 2, 0.5),
    ("linear", 1.0, 9, 2, 2, 1.0),
]


def draw(row: Tensor, head: int, depth: int, epsilon: float, rows: int, samples: int) -> tuple[Tensor, Tensor]:
    """Noised order statistics (samples, rows, depth), as they are, and their classes."""
    scores = row.expand(rows, -1)
    _, middle, value, index = noised_sampling._drawn(scores, seeded(17), head, depth, epsilon, samples)
    return value + middle[:, None], index


@pytest.mark.parametrize(("kind", "spread", "classes", "head", "depth", "epsilon"), THINNED)
@pytest.mark.parametrize("equal_intervals", [False, True])
@pytest.mark.parametrize("rows", [1000, pytest.param(2500, marks=pytest.mark.slow)])
def test_thinning_is_exact(
    kind: str,
    spread: float,
    classes: int,
    head: int,
    depth: int,
    epsilon: float,
    rows: int,
    equal_intervals: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if equal_intervals and classes > 400 and epsilon > 0.2:
        pytest.skip("too many points")
    monkeypatch.setattr(noised_sampling, "_FEW_POINTS", math.inf if equal_intervals else 0.0)
    row, samples = make_row(kind, classes, spread), 4
    value, index = draw(row, head, depth, epsilon, rows if classes > 100 else 4 * rows, samples)
    assert (value[:, :, 1:] <= value[:, :, :-1]).all()
    assert (index.sort(2).values.diff(dim=2) > 0).all()  # a class counts once
    draws = value[:, :, 0].numel()
    for j in sorted({0, depth // 2, depth - 1}):
        places = torch.arange(0, draws, draws // 200)
        ordered = value[:, :, j].flatten().double().sort().values[places]
        exact = reference.order_statistic_below(row, j, epsilon, ordered)
        assert (exact - places / draws).abs().max() < KS_LIMIT / math.sqrt(draws) + 1 / draws
        # Which class it is: against the derivative of the expectation.
        exact_row = row[None].double()
        order = exact_row.topk(depth).values
        grid = noised_quadrature.expected_order(exact_row, order, order[:, [j]], [j], epsilon)[1]
        share = torch.zeros(1, classes, dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        noised_quadrature.expected_order_gradient(share, one, exact_row, grid[:, 0], j, epsilon)
        counts = torch.bincount(index[:, :, j].flatten(), minlength=classes)
        error = (share[0] * (1 - share[0]) * draws).clamp(min=1.0).sqrt()
        assert ((counts - share[0] * draws).abs() < (STANDARD_ERRORS + 1) * error).all()
        common = share[0] * draws > 5
        squares = ((counts - share[0] * draws).square() / (share[0] * draws))[common].sum()
        freedom = int(common.sum())
        assert squares < freedom + STANDARD_ERRORS * math.sqrt(2 * freedom) + 5
    # The samples of a row share a threshold, which must not tie them together.
    centred = value[:, :, -1].double() - value[:, :, -1].double().mean()
    for a, b in itertools.combinations(range(samples), 2):
        correlation = (centred[a] * centred[b]).mean() / centred.square().mean()
        assert abs(float(correlation)) < STANDARD_ERRORS / math.sqrt(value.shape[1])


def test_thinning_leaves_impossible_and_broken_rows_alone() -> None:
    scores = torch.randn(9, 600)
    scores[1, 4:] = -torch.inf
    scores[1, 0] = -30.0
    scores[2, 40:] = -torch.inf
    scores[3, 5] = torch.nan
    scores[4, 5] = torch.inf
    scores[5] = torch.inf
    scores[6] = torch.nan
    scores[7] = -torch.inf
    target = torch.zeros(9, dtype=torch.int64)
    for options in ({"epsilon": 1.0}, {"epsilon": 0.05}, {"epsilon": 0.0}, {"samples": None}, {"samples": 20}):
        loss, gradient = value_and_gradient(scores, target, 5, generator=seeded(2), **options)
        assert loss[1] == 0
        assert loss[3:7].isnan().all()
        assert loss[7] == torch.inf
        assert loss[[0, 2, 8]].isfinite().all()
        assert gradient[3:7].isnan().all()
        assert gradient[[0, 1, 2, 7, 8]].isfinite().all()
        assert (gradient[[1, 7]] == 0).all()
        assert (gradient[2, 40:] == 0).all()
        clean = torch.where(scores.isnan() | (scores == torch.inf), 0.0, scores)
        if options.get("samples", 5) is None:
            others = value_and_gradient(clean, target, 5, **options)[0]
            torch.testing.assert_close(loss[[0, 2, 8]], others[[0, 2, 8]])


def test_the_head_is_chosen_by_the_scores() -> None:
    scores = torch.randn(64, 1000)
    size = noised_sampling.head_size
    assert size(scores[:, :100], 6, 1.0) == 100
    assert size(scores, 6, 1.0) == noised_sampling.HEAD
    assert size(scores, 30, 1.0) == 120
    assert size(4 * scores, 6, 0.2) == 24
    assert size(scores, 6, 0.2) == 48
    assert size(scores[:0], 6, 0.2) == noised_sampling.HEAD


@pytest.mark.parametrize(
    ("spread", "epsilon", "classes", "k"), [(1, 1.0, 1000, 5), (4, 0.2, 1000, 5), (1, 0.5, 3000, 20)]
)
def test_the_mean_over_many_draws_is_the_expectation(spread: float, epsilon: float, classes: int, k: int) -> None:
    scores, target = spread * torch.randn(30, classes), torch.randint(classes, (30,))
    exact, slope = value_and_gradient(scores, target, k, epsilon=epsilon, samples=None)
    losses, slopes = zip(
        *(value_and_gradient(scores, target, k, epsilon=epsilon, samples=40) for _ in range(10)), strict=True
    )
    spread_of_means = torch.stack(losses).std(0).mean() / math.sqrt(10)
    assert ((torch.stack(losses).mean(0) - exact).abs() < 2 * STANDARD_ERRORS * spread_of_means).all()
    error = (slope.abs() * (1 - slope.abs()) / 400).clamp(min=1e-4).sqrt()
    assert ((torch.stack(slopes).mean(0) - slope).abs() < STANDARD_ERRORS * error + 1e-2).all()


def test_scores_far_from_zero_keep_their_noise() -> None:
    scores, target = torch.randn(50, 600).mul(8).round().div(8), torch.zeros(50, dtype=torch.int64)
    for samples in (5, None):
        near = value_and_gradient(scores, target, 5, samples=samples, generator=seeded(4))
        far = value_and_gradient(scores + 2.0**20, target, 5, samples=samples, generator=seeded(4))
        torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)


def test_noise_far_below_the_spacing_of_floats() -> None:
    epsilon, samples = 1e-3, 4
    for classes in (40, 1000):
        scores = torch.arange(classes).mul(512.0).expand(800, -1)  # next to 5 * 10^5 floats are 1/32 apart
        target = torch.full((800,), classes - 6)
        loss, gradient = value_and_gradient(scores, target, 5, epsilon=epsilon, samples=samples, scale=1 / epsilon)
        noise = loss.double() - 1 / epsilon
        assert abs(float(noise.std()) * math.sqrt(samples) - 1.0) < STANDARD_ERRORS / math.sqrt(2 * 800)
        assert (gradient == 0).all()  # of the target and of the sixth class, which is the same


# --- counted noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK,) * 4, (MASK,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], expected: str) -> None:
    assert " ".join(f"{word:08x}" for word in reference.philox4x32(counter, key)) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 2])
def test_counted_noise_equals_its_slow_twin(seed: int) -> None:
    slow = reference.philox_normals(seed, 5, 6, 7).permute(2, 0, 1)
    fast = noised_sampling.counted_normals(torch.tensor(seed), 0, 5, 6, 7)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=2e-6)
    # A piece of the noise is the same wherever it is computed.
    assert torch.equal(noised_sampling.counted_normals(torch.tensor(seed), 2, 3, 4, 2), fast[:2, 2:, :4])


def test_counted_noise_is_normal_and_independent() -> None:
    noise = noised_sampling.counted_normals(torch.tensor(99), 0, 100, 200, 8).double()
    draws = noise.numel()
    exact = torch.special.ndtr(noise.flatten().sort().values)
    assert (exact - (torch.arange(draws) + 0.5) / draws).abs().max() < KS_LIMIT / math.sqrt(draws)
    flat = noise.flatten(1)
    correlations = torch.corrcoef(flat) - torch.eye(8)
    assert correlations.abs().max() < STANDARD_ERRORS / math.sqrt(flat.shape[1])
    for dim in (1, 2):
        product = (noise.narrow(dim, 1, noise.shape[dim] - 1) * noise.narrow(dim, 0, noise.shape[dim] - 1)).mean()
        assert product.abs() < STANDARD_ERRORS / math.sqrt(draws)


def test_counted_order_statistics() -> None:
    scores, depth = torch.randn(4, 30), 6
    _, middle, value, index = noised_sampling._counted(scores, torch.tensor(7), 3, depth, 0.5, 5)
    noise = reference.philox_normals(7, 7, 30, 5)[3:].permute(2, 0, 1)
    noised = (scores + 0.5 * noise).sort(dim=2, descending=True)
    assert torch.equal(index, noised.indices[:, :, :depth])
    torch.testing.assert_close((value + middle[:, None]).double(), noised.values[:, :, :depth], rtol=1e-5, atol=1e-5)


# --- no noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 5, None])
def test_without_noise_it_is_the_calibrated_hinge(samples: int | None) -> None:
    scores, target = torch.randn(20, 12, dtype=torch.float64).mul(2).round(), torch.randint(12, (20,))  # many ties
    for k in (1, 3, 11, {1: 0.5, 4: 0.5}):
        loss, gradient = value_and_gradient(scores, target, k, epsilon=0.0, samples=samples, margins=1.5)
        exact = scores.clone().requires_grad_()
        hinge = topk.topk_hinge_loss(exact, target, k, variant="calibrated", margin=1.5, reduction="none")
        torch.testing.assert_close(loss, hinge.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, torch.autograd.grad(hinge.sum(), exact)[0], rtol=1e-12, atol=1e-12)


# --- the expectation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "spread", "classes", "k"), [("steps", 1.0, 2000, 1), ("gaussian", 1.0, 100, 5), ("linear", 5.0, 40, 20)]
)
def test_expectation_against_very_many_nodes(kind: str, spread: float, classes: int, k: int) -> None:
    scores = make_row(kind, classes, spread).double()
    scores[0] = -50.0  # so that the hinge is not at rest
    loss = topk.noised_topk_loss(scores, torch.tensor(0), k, samples=None)
    torch.testing.assert_close(loss, reference.noised_topk_loss_expected(scores, 0, k), rtol=0, atol=1e-6)


@pytest.mark.parametrize("top", [1e3, 1e8, 1e17, 3e38])
def test_many_k_whose_levels_are_far_apart(top: float) -> None:
    """Every level has a centre of its own: E[Z_[2]] of two is -1 / sqrt(pi), and the other hinge is at rest."""
    scores = torch.tensor([[top, top, 0.0, -1.0, 3.0]])
    for samples, expected, tolerance in ((None, 0.5 - 0.5 / math.sqrt(math.pi), 1e-6), (40_000, 0.2179, 0.01)):
        options = {"samples": samples, "generator": seeded(3)}
        loss, gradient = value_and_gradient(scores, torch.tensor([0]), {1: 0.5, 3: 0.5}, **options)
        assert loss.item() == pytest.approx(expected, abs=tolerance)
        found = gradient[0].tolist()
        assert found == pytest.approx([-0.25, 0.25, 0.0, 0.0, 0.0], abs=tolerance)
    loss, _ = value_and_gradient(scores, torch.tensor([0]), {1: 0.5, 3: 0.5}, epsilon=0.0)
    assert loss.item() == 0.5


@pytest.mark.parametrize("classes", [2, 3, 10, 400])
@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_expectation_over_kinds_of_scores(classes: int, k: int) -> None:
    if k >= classes:
        pytest.skip("every guess is right")
    rows = [make_row(kind, classes, 1.0).double() for kind in ("gaussian", "tied", "steps", "linear")]
    rows += [20 * rows[0], 0.05 * rows[3], rows[0] ** 3, torch.arange(classes).lt(k + 1).double() * 2]
    scores = torch.stack(rows)
    target = torch.zeros(len(rows), dtype=torch.int64)
    scores[:, 0] -= 50.0  # so that no hinge is at rest
    loss, gradient = value_and_gradient(scores, target, k, samples=None)
    following = [reference.expected_order_statistic(row, k, 1.0, nodes=401) for row in scores]  # has converged
    expected = torch.stack(following) + 1 - scores[:, 0]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(len(rows), dtype=torch.float64), rtol=0, atol=1e-6)
    single = value_and_gradient(scores.float(), target, k, samples=None)
    exact = value_and_gradient(scores.float().double(), target, k, samples=None)
    torch.testing.assert_close(single[0].double(), exact[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(single[1].double(), exact[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("classes", "k"), [(2, 1), (6, 1), (6, 3), (6, 5), (40, 1), (40, 12), (300, 5)])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 7.0])
def test_expectation_and_gradient_equal_the_definition(classes: int, k: int, epsilon: float) -> None:
    scores = (2 * torch.randn(3, classes, dtype=torch.float64)).requires_grad_()
    target = torch.randint(classes, (3,))
    margins = torch.rand(classes, dtype=torch.float64) + 8
    loss, gradient = value_and_gradient(scores, target, k, samples=None, epsilon=epsilon, margins=margins, scale=3.0)
    pairs = rows_of(scores, target)
    following = [reference.expected_order_statistic(row, k, epsilon, nodes=401) for row, _ in pairs]  # has converged
    expected = torch.stack(
        [torch.relu(3 * (margins[y] + f - x[y])) for f, (x, y) in zip(following, pairs, strict=True)]
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), scores)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [2, {1: 0.5, 4: 0.5}])
@pytest.mark.parametrize("samples", [3, None])
def test_derivatives(k: Any, samples: int | None) -> None:
    scores, target = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 5])

    def loss(x: Tensor) -> Tensor:
        return topk.noised_topk_loss(x, target, k, samples=samples, generator=seeded(1), reduction="none")

    # The quadrature is converged to about 1e-8, and so is the agreement of its derivatives.
    assert torch.autograd.gradcheck(loss, scores, check_forward_ad=True, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradgradcheck(loss, scores, atol=1e-5, rtol=1e-4)


def test_second_derivatives_near_masked_classes() -> None:
    scores = torch.tensor([[0.3, -torch.inf, 1.0, 0.2, -0.5]], dtype=torch.float64, requires_grad=True)
    loss = topk.noised_topk_loss(scores, torch.tensor([0]), 1, samples=None)
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    (bend,) = torch.autograd.grad(gradient[0, 2], scores)
    assert bend.isfinite().all()
    assert bend[0, 1] == 0
    assert bend[0, 2] != 0


def test_a_large_number_of_classes_in_reach_of_few() -> None:
    scores, target = 3 * torch.randn(2, 20_000), torch.zeros(2, dtype=torch.int64)
    loss, gradient = value_and_gradient(scores, target, 5, epsilon=0.3, samples=None)
    for i in range(2):
        top = scores[i].topk(200).values.double()
        expected = reference.expected_order_statistic(top, 5, 0.3, nodes=401) + 1 - scores[i, 0].double()
        torch.testing.assert_close(loss[i].double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(2), rtol=0, atol=1e-5)


# --- arguments -------------------------------------------------------------------------------------------------------


def test_margins_and_scale() -> None:
    scores, target = torch.randn(7, 11, dtype=torch.float64), torch.randint(11, (7,))
    target[2] = -100
    margins = torch.rand(11, dtype=torch.float64, requires_grad=True)
    for options in ({"samples": None}, {"samples": 3}, {"epsilon": 0.0}):
        plain = topk.noised_topk_loss(scores, target, 3, margins=20, reduction="none", generator=seeded(1), **options)
        for given, added in ((None, 1.0), (0.25, 0.25), (margins, margins[target.clamp(min=0)])):
            lifted = 0 if given is None else given
            loss = topk.noised_topk_loss(
                scores + 0.0,
                target,
                3,
                margins=given if given is None else lifted + 20,
                scale=2.0,
                reduction="none",
                generator=seeded(1),
                **options,
            )
            shift = added - 20 if given is None else added
            expected = torch.where(target == -100, 0.0, 2.0 * torch.relu(plain + shift))
            torch.testing.assert_close(loss, expected.detach())
            assert not loss.requires_grad


def test_opcheck() -> None:
    for seeds in ([7], [1, 2]):
        torch.library.opcheck(noised.noised_classes, (torch.randn(4, 9), torch.tensor(seeds), 2, 0.7, 3))


def test_only_classes_and_slopes_are_kept() -> None:
    options = Options([1, 5], [0.5, 0.5], 0.7, 6, 1.5)
    arguments = torch.randn(10, 700), torch.randint(700, (10,)), options, torch.ones(10), torch.tensor([11])
    _, slopes, classes = LOSS.forward(*arguments)
    assert slopes.shape == (10, 2)
    assert classes.shape == (10, 6, 2)
    assert classes.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon must be a finite number >= 0, got -0.1"),
        ({"epsilon": math.nan}, ValueError, "epsilon"),
        ({"epsilon": math.inf}, ValueError, "epsilon"),
        ({"epsilon": "1"}, TypeError, "epsilon must be a number"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": 2.0}, TypeError, "samples must be an int, got 2.0"),
        ({"samples": True}, TypeError, "samples must be an int"),
        ({"margins": -1.0}, ValueError, "margins must be a finite number >= 0, got -1.0"),
        ({"margins": torch.ones(4)}, ValueError, r"margins must have shape \(5,\)"),
        ({"margins": torch.ones(5, dtype=torch.int64)}, TypeError, "margins must have a floating-point type"),
        ({"margins": "large"}, TypeError, "margins"),
        ({"scale": 0.0}, ValueError, "scale must be a finite number > 0, got 0.0"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"generator": np.random.default_rng()}, TypeError, "generator must be a torch.Generator or None"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 6}, ValueError, "k must be at most the number of classes, 5, got 6"),
        ({"reduction": "average"}, ValueError, "reduction must be one of"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        topk.noised_topk_loss(torch.randn(3, 5), torch.tensor([0, 1, 2]), **{"k": 2, **options})
