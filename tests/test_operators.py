"""Soft top-k operators against brute force, closed forms, slow textbook iterations and the peers' packages."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import kl_divergence

import topk
from tests.test_peers import peer
from topk.operators import KSubset, noised_kth, perturbed_topk, soft_permutation, subset

FAMILIES = ("logistic", "sparse", "laplace", "gaussian")


def subsets(n: int, k: int) -> Tensor:
    places = torch.tensor(list(itertools.combinations(range(n), k)))
    return torch.zeros(len(places), n, dtype=torch.float64).scatter_(1, places, 1.0)


def by_enumeration(scores: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The mask, and log e_k, from all subsets."""
    every = subsets(scores.shape[-1], k)
    logits = scores / temperature @ every.T
    return logits.softmax(-1) @ every, logits.logsumexp(-1)


# --- thresholds ------------------------------------------------------------------------------------------------------


def by_bisection(scores: Tensor, k: float, temperature: float, method: str) -> Tensor:
    cdf = {
        "logistic": torch.sigmoid,
        "sparse": lambda z: z.clamp(0.0, 1.0),
        "laplace": lambda z: torch.where(z < 0, 0.5 * z.clamp(max=0).exp(), 1 - 0.5 * (-z.clamp(min=0)).exp()),
        "gaussian": torch.special.ndtr,
    }[method]
    low, high = scores.amin(1) - 60 * temperature, scores.amax(1) + 60 * temperature
    for _ in range(200):
        middle = (low + high) / 2
        more = cdf((scores - middle[:, None]) / temperature).sum(1) > k
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return cdf((scores - low[:, None]) / temperature)


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize(("n", "k"), [(2, 1), (7, 2.5), (30, 0.25), (30, 29.5), (1000, 10), (1000, 999), (64, 32)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_threshold_masks(method: str, n: int, k: float, scale: float, offset: float) -> None:
    scores = offset + scale * torch.randn(5, n, dtype=torch.float64)
    scores[0] = offset  # all equal
    scores[1] = offset + (scores[1] - offset).div(scale).round().mul(scale)  # ties
    for temperature in (0.3, 2.0):
        mask = topk.soft_topk(scores, k, method=method, temperature=temperature)
        torch.testing.assert_close(mask, by_bisection(scores, k, temperature, method), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("n", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_masks_sum_to_k_in_float32(method: str, n: int, scale: float) -> None:
    for k in (1, 5, 20, 100):
        mask = topk.soft_topk(scale * torch.randn(2, n), k, method=method)
        assert ((mask.double().sum(1) - k).abs() <= 1e-5 * k).all()


@pytest.mark.parametrize("method", FAMILIES)
def test_masks_of_ties_and_of_leaders_sum_to_k_in_float32(method: str) -> None:
    """Errors of equal scores add up; far leaders leave little between the k-th score and the next."""
    for n, scale, k in ((1000, 0.3, 1), (20_000, 0.3, 1), (30, 1000.0, 3), (1000, 1000.0, 20)):
        mask = topk.soft_topk((scale * torch.randn(20, n)).round(), k, method=method)
        assert ((mask.double().sum(1) - k).abs() <= 1e-5 * k).all()


def test_the_logistic_mask_is_entropic_optimal_transport() -> None:
    """Sinkhorn's iterations for anchors 0 and 1, squared cost and regularisation 2 T, n times the plan's column 1."""
    scores, k, temperature = torch.randn(3, 12, dtype=torch.float64), 4, 0.3
    n = scores.shape[1]
    exponent = -((scores[:, :, None] - torch.tensor([0.0, 1.0], dtype=torch.float64)) ** 2) / (2 * temperature)
    mass = torch.tensor([(n - k) / n, k / n], dtype=torch.float64).log()
    column = torch.zeros(3, 2, dtype=torch.float64)
    for _ in range(3000):
        row = -math.log(n) - (exponent + column[:, None]).logsumexp(2)
        column = mass - (exponent + row[:, :, None]).logsumexp(1)
    plan = (exponent + row[:, :, None] + column[:, None]).exp()
    mask = topk.soft_topk(scores, k, method="logistic", temperature=temperature)
    torch.testing.assert_close(mask, n * plan[:, :, 1], rtol=0, atol=1e-12)


def test_the_sparse_mask_is_the_euclidean_projection() -> None:
    """Its optimality: no feasible direction comes closer to x / T, tried for many feasible masks."""
    scores = torch.randn(12, dtype=torch.float64)
    mask = topk.soft_topk(scores, 4, method="sparse", temperature=0.7)
    for other in torch.cat((subsets(12, 4), topk.soft_topk(torch.randn(500, 12, dtype=torch.float64), 4))):
        assert (scores / 0.7 - mask) @ (other - mask) <= 1e-12


def test_thresholds_have_gradients_in_scores_k_and_temperature() -> None:
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([2.2, 3.5, 1.2], dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    for method in FAMILIES:

        def mask(x: Tensor, count: Tensor, heat: Tensor, method: str = method) -> Tensor:
            return topk.soft_topk(x, count, method=method, temperature=heat)

        inputs = (scores, k, temperature)
        torch.autograd.gradcheck(mask, inputs, check_forward_ad=True, check_batched_grad=True)
        torch.autograd.gradgradcheck(mask, inputs)
        (by_k,) = torch.autograd.grad(mask(*inputs).sum(), k)
        torch.testing.assert_close(by_k, torch.ones_like(k))


def test_a_wrong_k_or_temperature_in_a_tensor_makes_its_row_nan() -> None:
    scores = torch.randn(6, 5)
    k = torch.tensor([2.0, -1.0, 6.0, torch.nan, 0.0, 5.0])
    mask = topk.soft_topk(scores, k, method="logistic")
    assert mask[1:4].isnan().all()
    torch.testing.assert_close(mask[[0, 4, 5]].sum(1), torch.tensor([2.0, 0.0, 5.0]))
    assert topk.soft_topk(scores, 2, temperature=torch.tensor(-1.0)).isnan().all()


# --- subsets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 2), (9, 4), (12, 1), (12, 11), (12, 6), (12, 12)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_subset_masks(n: int, k: int, scale: float) -> None:
    scores = scale * torch.randn(4, n, dtype=torch.float64)
    scores[0] = scores[0].round()
    scores.requires_grad_()
    expected, log_sum = by_enumeration(scores, k, 0.7)
    mask = topk.soft_topk(scores, k, temperature=0.7)
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(mask)
    torch.testing.assert_close(
        torch.autograd.grad((mask * weight).sum(), scores)[0],
        torch.autograd.grad((expected * weight).sum(), scores)[0],
        rtol=0,
        atol=1e-9,
    )
    chosen = subsets(n, k)[0]
    log_prob = KSubset(scores, k, 0.7).log_prob(chosen)
    torch.testing.assert_close(log_prob, scores @ chosen / 0.7 - log_sum, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [2, 5, 8, 9, 10, 12])
@pytest.mark.parametrize(("spread", "others"), [(0.0, 0), (1e-3, 0), (0.0, 30)])
def test_subset_masks_keep_their_digits_where_more_than_k_scores_tie(k: int, spread: float, others: int) -> None:
    """In float32 the hardest rows for power sums: k + 1 scores that are (nearly) equal, and others far below."""
    scores = torch.cat((spread * torch.randn(200, k + 1), torch.full((200, others), -50.0)), 1)
    upstream = torch.rand_like(scores) * 2.0 - 1.0
    found = []
    for dtype in (torch.float32, torch.float64):
        rows = scores.to(dtype).requires_grad_()
        mask = topk.soft_topk(rows, k, temperature=1.0)
        found.append((mask.detach().double(), torch.autograd.grad(mask, rows, upstream.to(dtype))[0].double()))
    for one, other, allowed in zip(*found, (3e-6, 6e-6), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=allowed)


@pytest.mark.parametrize(("k", "ties"), [(5, 25), (20, 60), (20, 100), (50, 250), (100, 210)])
def test_subset_masks_of_long_heads_and_heavy_tails(k: int, ties: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties near w = 1/2, where most power sums count: both types against products of all factors, in float64."""
    scores = torch.cat((1e-3 * torch.randn(4, ties), torch.full((4, 300), -8.0)), 1)
    upstream = torch.randn_like(scores)
    found = []
    for dtype in (torch.float32, torch.float64):
        for parts in (subset._PARTS, 2**10):  # all rows at once, and row by row
            monkeypatch.setattr(subset, "_PARTS", parts)
            rows = scores.to(dtype).requires_grad_()
            mask = topk.soft_topk(rows, k)
            found.append((mask.detach(), torch.autograd.grad(mask, rows, upstream.to(dtype))[0]))
    rows = scores.double().requires_grad_()
    mask = topk.soft_topk(rows, k)
    (general,) = torch.autograd.grad(mask, rows, upstream.double(), create_graph=True)  # not by power sums
    for (one, gradient), allowed in zip(found, (2e-6, 2e-6, 1e-10, 1e-10), strict=True):
        torch.testing.assert_close(one.double(), mask.detach(), rtol=0, atol=allowed)
        torch.testing.assert_close(gradient.double(), general.detach(), rtol=0, atol=allowed)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("k", [1, 2, 5, 16, 17])
def test_subset_masks_do_not_depend_on_how_temperature_one_is_given(k: int, spread: float) -> None:
    """Rows without a head, with one, and with one that is longer than first looked at."""
    scores = (spread * torch.randn(6, 40, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn_like(scores)
    found = []
    for temperature in (1.0, torch.ones(6, dtype=torch.float64)):
        mask = topk.soft_topk(scores, k, temperature=temperature)
        found += [(mask, torch.autograd.grad(mask, scores, upstream)[0])]
    general = torch.autograd.grad(topk.soft_topk(scores, k), scores, upstream, create_graph=True)[0]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(found[0][1], general.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("n", "k"), [(5, 2), (11, 9)])  # by power sums, and by products
def test_subsets_have_gradients_in_scores_and_temperature(n: int, k: int) -> None:
    scores = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def mask_and_entropy(x: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
        return topk.soft_topk(x, k, temperature=heat), KSubset(x, k, heat).entropy()

    torch.autograd.gradcheck(mask_and_entropy, (scores, temperature), check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(mask_and_entropy, (scores, temperature), fast_mode=True)


@pytest.mark.parametrize(
    ("n", "k"),
    [
        (1000, 1), (1000, 5), (1000, 8), (1000, 20), pytest.param(1000, 100, marks=pytest.mark.slow),
        pytest.param(100_000, 5, marks=pytest.mark.slow), pytest.param(100_000, 100, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_subset_masks_in_float32(n: int, k: int) -> None:
    for scale in (1.0, 30.0):
        scores = scale * torch.randn(2, n)
        mask, exact = topk.soft_topk(scores, k), topk.soft_topk(scores.double(), k)
        assert ((mask.double().sum(1) - k).abs() <= 1e-5 * k).all()
        torch.testing.assert_close(mask.double(), exact, rtol=0, atol=3e-6)


def test_the_distribution_against_enumeration() -> None:
    scores = torch.randn(3, 7, dtype=torch.float64)
    heat = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    p = KSubset(scores, 3, heat, validate_args=True)  # the compiler turns the default off, for good
    q = KSubset(scores.roll(1), 3)
    every = p.enumerate_support()
    assert every.shape == (35, 3, 7)
    log_p, log_q = p.log_prob(every), q.log_prob(every)
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(p.entropy(), -(log_p.exp() * log_p).sum(0))
    torch.testing.assert_close(p.mean, (log_p.exp()[:, :, None] * every).sum(0))
    torch.testing.assert_close(kl_divergence(p, q), (log_p.exp() * (log_p - log_q)).sum(0))
    assert kl_divergence(p, KSubset(scores, 2)).isinf().all()
    assert (p.log_prob(p.mode) >= log_p.amax(0) - 1e-12).all()
    assert p.expand((2, 3)).log_prob(every[:1]).shape == (2, 3)
    assert repr(p).startswith("KSubset(")
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.ones(3, 7, dtype=torch.float64))
    torch.testing.assert_close(pickle.loads(pickle.dumps(p)).mean, p.mean)


@pytest.mark.parametrize(("n", "k", "scale"), [(6, 2, 1.0), (7, 5, 2.0), (5, 1, 0.3)])
def test_samples_pass_a_chi_square_test(n: int, k: int, scale: float) -> None:
    distribution = KSubset(scale * torch.randn(n, dtype=torch.float64), k)
    every = distribution.enumerate_support()
    drawn = distribution.sample((20_000,))
    counts = (drawn @ every.T == k).sum(0)
    assert counts.sum() == 20_000
    expected = 20_000 * distribution.log_prob(every).exp()
    rare = expected < 5
    observed = [*counts[~rare].tolist(), int(counts[rare].sum())]
    predicted = [*expected[~rare].tolist(), float(expected[rare].sum())]
    if predicted[-1] == 0:
        observed, predicted = observed[:-1], predicted[:-1]
    assert stats.chisquare(observed, predicted, sum_check=False).pvalue > 1e-4


def test_samples_where_little_is_open() -> None:
    scores = torch.tensor([[1e4, 0.0, -1e4, -torch.inf], [0.0, 0.0, -torch.inf, -torch.inf], [torch.nan] * 4])
    drawn = KSubset(scores, 2, validate_args=False).sample((3,))
    assert (drawn[:, 0] == torch.tensor([1.0, 1.0, 0.0, 0.0])).all()
    assert (drawn[:, 1] == torch.tensor([1.0, 1.0, 0.0, 0.0])).all()
    assert drawn[:, 2].isnan().all()


def test_rsample_is_straight_through() -> None:
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    distribution = KSubset(scores, 2)
    weight = torch.randn(6, dtype=torch.float64)
    drawn = distribution.rsample()
    assert distribution.support.check(drawn)
    found = torch.autograd.grad(drawn @ weight, scores)[0]
    every = distribution.enumerate_support()
    chance = distribution.log_prob(every).exp().detach()
    centred = every - chance @ every
    torch.testing.assert_close(found, (centred.T * chance) @ centred @ weight)


def test_subset_loss() -> None:
    scores = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    khot = (torch.rand(5, 7) < 0.4).long()
    khot[0], khot[1] = 0, 1
    khot[2] = torch.nn.functional.one_hot(torch.tensor(3), 7)
    khot[3, 2] = -100
    losses = topk.subset_loss(scores, khot, reduction="none", temperature=0.5)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    assert losses[0] == losses[3] == 0
    torch.testing.assert_close(losses[1].abs(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(losses[2], torch.nn.functional.cross_entropy(scores[2] / 0.5, torch.tensor(3)))
    count = int(khot[4].sum())
    torch.testing.assert_close(losses[4], -KSubset(scores[4], count, 0.5).log_prob(khot[4].double()))
    expected = (topk.soft_topk(scores[4], count, temperature=0.5) - khot[4]) / 0.5
    torch.testing.assert_close(gradient[4], expected.detach())
    assert (gradient[[0, 3]] == 0).all()
    mean = topk.subset_loss(scores, khot, temperature=0.5)
    torch.testing.assert_close(mean, losses.sum() / 4)
    torch.testing.assert_close(topk.subset_loss(scores.T, khot.T, dim=0, temperature=0.5, largest_k=7), mean)
    torch.testing.assert_close(topk.subset_loss(scores, khot, temperature=0.5, reduction="sum"), losses.sum())
    masked = scores.detach().clone()
    masked[4, khot[4].argmax()] = -torch.inf
    assert topk.subset_loss(masked, khot, reduction="none")[4] == torch.inf
    every_row = [row for row in range(5) if row != 3]
    torch.autograd.gradcheck(lambda x: topk.subset_loss(x, khot[every_row], reduction="none"), (scores[every_row],))
    with pytest.raises(ValueError, match=r"khot must be a Tensor of the scores' shape \(5, 7\), got \(5, 6\)"):
        topk.subset_loss(scores, khot[:, :6])


def test_subset_loss_takes_nothing_but_zeros_and_ones() -> None:
    scores, khot = torch.randn(3, 7), torch.zeros(3, 7)
    khot[0, :3] = khot[1, 5] = 1.0
    for wrong in (0.02, 2.0, -1.0, torch.nan):
        khot[1, 2] = wrong
        with pytest.raises(ValueError, match=f"khot must hold zeros and ones, or ignore_index=-100 .*, got {wrong:g}"):
            topk.subset_loss(scores, khot)
    with pytest.raises(ValueError, match="largest_k must be at least the number of ones of every row, 3, got 2"):
        topk.subset_loss(scores, (khot == 1).int(), largest_k=2)
    # Where nobody may look, such rows are NaN.
    each = torch.vmap(lambda x, y: topk.subset_loss(x[None], y[None], largest_k=3))
    khot[2, :4] = 1.0
    assert each(scores, khot).isnan().tolist() == [False, True, True]
    slopes = torch.func.grad(lambda x: each(x, khot).sum())(scores)
    assert slopes.isnan().all(1).tolist() == [False, True, True]


# --- noise and permutations ------------------------------------------------------------------------------------------


def by_long_quadrature(z: Tensor, k: int) -> Tensor:
    v = torch.linspace(float(z.min()) - 10, float(z.max()) + 10, 20_001, dtype=torch.float64)
    shares = []
    for i in range(len(z)):
        counts = torch.zeros(k, len(v), dtype=torch.float64)
        counts[0] = 1.0
        for trial in torch.special.ndtr(torch.cat((z[:i], z[i + 1 :]))[:, None] - v):
            counts = counts * (1 - trial) + torch.cat((torch.zeros_like(counts[:1]), counts[:-1])) * trial
        density = (-0.5 * (z[i] - v) ** 2).exp() / math.sqrt(2 * math.pi)
        shares.append(torch.trapezoid(counts.sum(0) * density, v))
    return torch.stack(shares)


@pytest.mark.parametrize(("n", "k", "scale"), [(2, 1, 1.0), (6, 5, 1.0), (6, 1, 5.0), (12, 3, 0.1), (30, 4, 30.0)])
def test_quadrature_of_the_noised_mask(n: int, k: int, scale: float) -> None:
    scores = scale * torch.randn(n, dtype=torch.float64)
    for temperature in (0.3, 1.0):
        mask = perturbed_topk(scores, k, temperature=temperature, samples=None)
        torch.testing.assert_close(mask, by_long_quadrature(scores / temperature, k), rtol=0, atol=1e-10)


def test_draws_agree_with_quadrature_in_value_and_two_derivatives() -> None:
    scores = torch.randn(5, dtype=torch.float64)

    def drawn(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return perturbed_topk(x, 2, samples=200_000, generator=generator)[1]

    def exact(x: Tensor) -> Tensor:
        return perturbed_topk(x, 2, samples=None)[1]

    torch.testing.assert_close(drawn(scores), exact(scores), rtol=0, atol=5e-3)
    for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        torch.testing.assert_close(derivative(drawn, scores), derivative(exact, scores), rtol=0, atol=1e-2)


def test_gumbel_noise_draws_without_replacement() -> None:
    scores = torch.randn(6, dtype=torch.float64)
    mask = perturbed_topk(scores, 1, noise="gumbel", samples=100_000)
    torch.testing.assert_close(mask, scores.softmax(0), rtol=0, atol=6e-3)


def test_the_noised_kth_score_of_pytopk() -> None:
    noised = peer("pytopk.noised_topk")
    scores = torch.randn(4, 9, requires_grad=True)
    z = torch.randn(10, 4, 9, generator=torch.Generator().manual_seed(3))
    theirs = noised._NoisedTopK.apply(scores, z.permute(1, 2, 0), 3, 0.5, -1, -1)
    ours = noised_kth(scores, 3, epsilon=0.5, samples=10, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(4)
    for found, expected in zip(
        torch.autograd.grad(ours @ weight, scores), torch.autograd.grad(theirs @ weight, scores), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("distribution", ["logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal"])
@pytest.mark.parametrize("method", ["odd_even", "bitonic"])
def test_permutations_of_diffsort(method: str, distribution: str) -> None:
    scores = torch.randn(5, 8, dtype=torch.float64 if distribution != "gaussian" else torch.float32)
    net = peer("difftopk").DiffTopkNet
    size = scores.shape[1]
    theirs = net(method, size, size, steepness=2.0, art_lambda=0.4, distribution=distribution)(scores.float())[1]
    ours = soft_permutation(scores.float(), method=method, temperature=0.5, distribution=distribution, art_lambda=0.4)
    torch.testing.assert_close(ours, theirs.mT.flip(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["neuralsort", "softsort"])
def test_neuralsort_and_softsort_of_difftopk(method: str) -> None:
    module: Any = peer(f"difftopk.{method}")
    theirs: Any = {"neuralsort": "NeuralSort", "softsort": "SoftSort"}[method]
    scores = torch.randn(5, 8)
    expected = getattr(module, theirs)(tau=0.5)(scores)
    if method == "neuralsort":  # theirs ascends, and has the ranks last
        expected = expected.mT.flip(1)
    torch.testing.assert_close(soft_permutation(scores, method=method, temperature=0.5), expected)


@pytest.mark.parametrize("method", ["odd_even", "bitonic", "splitter_selection", "sinkhorn"])
def test_permutations_are_doubly_stochastic(method: str) -> None:
    scores = torch.randn(3, 7, dtype=torch.float64)
    matrix = soft_permutation(scores, method=method)
    one = torch.ones(3, 7, dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(1), one)
    torch.testing.assert_close(matrix.sum(2), one)
    torch.testing.assert_close(soft_permutation(scores, method=method, ranks=7)[:, :2], matrix[:, :2])
    hard = soft_permutation(scores, method=method, temperature=1e-2, distribution="logistic", iterations=5000)
    order = torch.nn.functional.one_hot(scores.argsort(1, descending=True), 7)
    assert ((hard > 0.5) == order).all()


@pytest.mark.parametrize("temperature", [0.03, 0.37, 1.0, 2.9])
def test_the_sparse_mask_moves_only_what_is_between_0_and_1(temperature: float) -> None:
    torch.manual_seed(1)
    scores = torch.randn(50, 40, dtype=torch.float64, requires_grad=True)
    mask = topk.soft_topk(scores, 7, method="sparse", temperature=temperature)
    pull = torch.randn_like(mask)
    (gradient,) = torch.autograd.grad(mask, scores, pull)
    inside = ((mask > 0) & (mask < 1)).to(mask)
    assert inside.sum(1).max() > 1
    mean = (inside * pull).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(gradient, inside * (pull - mean) / temperature)


@pytest.mark.filterwarnings("ignore:sinkhorn. after")
def test_sinkhorn_at_every_temperature() -> None:
    """From warm plans to hard ones, with ties and near ties: the marginals hold, and the gradient is a number."""
    scores = torch.randn(40, 20, dtype=torch.float64)
    scores[10:20] = scores[10:20].round()
    scores[20:30] = scores[20:30].round() + 1e-3 * scores[:10]
    scores[30:35, 12:] = -torch.inf
    for temperature in (10.0, 1.0, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6, 1e-12, 1e-18):
        x = scores.clone().requires_grad_()
        mask = topk.soft_topk(x, 3, method="sort", sorter="sinkhorn", temperature=temperature)
        (gradient,) = torch.autograd.grad((mask * torch.randn_like(mask)).sum(), x)
        assert ((mask.sum(1) - 3.0).abs() < 1e-7).all(), temperature
        assert (mask >= 0.0).all()
        assert (mask <= 1.0 + 1e-7).all()
        assert gradient.isfinite().all()
    tied = torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    for scale in (1e3, 1e16, 1e30):
        mask = topk.soft_topk(scale * tied, 2, method="sort", sorter="sinkhorn")
        torch.testing.assert_close(mask, torch.tensor([[1.0, 0.0, 0.5, 0.5]]))
    apart = scores[:1, :5].argsort().to(torch.float64)
    hard = topk.soft_topk(apart, 3, method="sort", sorter="sinkhorn", temperature=1e-4)
    torch.testing.assert_close(hard, (apart > 1.5).to(torch.float64))


def test_bad_rows_and_numbers_of_the_noised_kth() -> None:
    scores = torch.randn(3, 5)
    scores[0, 1], scores[1, 4] = torch.nan, torch.inf
    assert noised_kth(scores, 2).isnan().tolist() == [True, True, False]
    fixed = topk.soft_topk(torch.randn(3, 5), 2, method="fixed", temperature=torch.tensor([-1.0, 0.0, 1.0]))
    assert fixed.isnan().all(1).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="epsilon must be a finite number > 0, got -1"):
        noised_kth(scores, 2, epsilon=-1)


@pytest.mark.parametrize("temperature", [1e-20, 1e-10, 1e-6, 1e6])
def test_quadrature_far_from_the_border(temperature: float) -> None:
    scores = torch.tensor([[1.0, 0.0, -1.0, 0.3]], requires_grad=True)
    mask = topk.soft_topk(scores, 2, method="perturbed", samples=None, temperature=temperature)
    (gradient,) = torch.autograd.grad(mask[0, 0], scores)
    assert gradient.isfinite().all()
    if temperature < 1.0:
        torch.testing.assert_close(mask.detach(), torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    masked = torch.tensor([[1.0, -torch.inf, 0.0, 0.5]])
    mask = topk.soft_topk(masked, 2, method="perturbed", samples=None, temperature=temperature)
    torch.testing.assert_close(mask.sum(), torch.tensor(2.0))
