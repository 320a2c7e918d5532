"""Brute-force definitions: obviously right, at any cost. What the tests and the book compare against.

Everything here is written from the definition, in float64, one row at a time: scores (classes,), target an int,
result a 0-dim tensor that autograd can differentiate. Nothing is shared with the package.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def wrong_scores(scores: Tensor, target: int) -> Tensor:
    """All scores but the target's, in class order; of one row (classes,) or of several (rows, classes)."""
    return torch.cat((scores[..., :target], scores[..., target + 1 :]), -1)


# --- smooth top-k SVM (chapters 6 and 10) ----------------------------------------------------------------------------


def smooth_topk_loss(scores: Tensor, target: int, k: int, tau: float = 1.0, margin: float = 1.0) -> Tensor:
    """By enumeration: e_j is the sum over all j-subsets S of the wrong classes of exp(sum of u over S)."""
    u = wrong_scores(scores.double(), target) / (k * tau)
    log_e = [
        torch.logsumexp(torch.stack([u[list(subset)].sum() for subset in itertools.combinations(range(len(u)), j)]), 0)
        for j in (k - 1, k)
    ]
    gap = margin / tau + log_e[1] - log_e[0] - scores[target].double() / (k * tau)
    return tau * torch.logaddexp(gap, torch.zeros_like(gap))


def smooth_topk_loss_log_space(scores: Tensor, target: int, k: int, tau: float = 1.0, margin: float = 1.0) -> Tensor:
    """The same for many classes: log e_0..log e_k of all wrong classes, one class after another, in log space.

    Of one row, or of several with the same target.
    """
    u = wrong_scores(scores.double(), target) / (k * tau)
    log_e = _log_polynomials(u, k)[-1]
    gap = margin / tau + log_e[..., k] - log_e[..., k - 1] - scores[..., target].double() / (k * tau)
    return tau * torch.logaddexp(gap, torch.zeros_like(gap))


def smooth_topk_gradient_log_space(
    scores: Tensor, target: int, k: int, tau: float = 1.0, margin: float = 1.0
) -> Tensor:
    """Its gradient from prefixes and suffixes in log space: d log e_k / d u_i = e^{u_i} e_{k-1}(without i) / e_k."""
    u = wrong_scores(scores.double(), target) / (k * tau)
    prefixes, suffixes = _log_polynomials(u, k), _log_polynomials(u.flip(-1), k)[::-1]
    before, after = torch.stack(prefixes[:-1], -2), torch.stack(suffixes[1:], -2)  # (..., wrong classes, k + 1)
    log_e = prefixes[-1]
    inclusion = []
    for degree in (k, k - 1):
        if degree == 0:
            inclusion.append(torch.zeros_like(u))
            continue
        without = torch.logsumexp(before[..., :degree] + after[..., :degree].flip(-1), -1)
        inclusion.append((u + without - log_e[..., degree, None]).exp())
    own = scores[..., target].double() / (k * tau)
    slope = torch.sigmoid(margin / tau + log_e[..., k] - log_e[..., k - 1] - own)[..., None]
    gradient = slope / k * (inclusion[0] - inclusion[1])
    return torch.cat((gradient[..., :target], -slope / k, gradient[..., target:]), -1)


def _log_polynomials(u: Tensor, k: int) -> list[Tensor]:
    """log e_0..log e_k (..., k + 1) of no class, of the first, of the first two, ..., of all."""

    def append(log_e: Tensor, value: Tensor) -> Tensor:
        return torch.cat((log_e[..., :1], torch.logaddexp(log_e[..., 1:], log_e[..., :-1] + value[..., None])), -1)

    start = torch.full((*u.shape[:-1], k + 1), -torch.inf, dtype=torch.float64, device=u.device)
    start[..., 0] = 0.0
    return list(itertools.accumulate(u.unbind(-1), append, initial=start))


# --- noised hinge (chapter 7) ----------------------------------------------------------------------------------------


def noised_topk_loss(
    scores: Tensor,
    target: int,
    k: int,
    noise: Tensor,
    epsilon: float = 1.0,
    margins: float | Tensor = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """The (k+1)-th largest of scores + epsilon noise, averaged over the samples; noise (classes, samples) is given."""
    samples = [(scores.double() + epsilon * column).sort(descending=True).values[k] for column in noise.double().T]
    return _noised_hinge(scores, target, torch.stack(samples).mean(), margins, scale)


def noised_topk_loss_expected(
    scores: Tensor, target: int, k: int, epsilon: float = 1.0, margins: float | Tensor = 1.0, scale: float = 1.0
) -> Tensor:
    """The same with the expectation over the noise."""
    return _noised_hinge(scores, target, expected_order_statistic(scores, k, epsilon), margins, scale)


def _noised_hinge(scores: Tensor, target: int, following: Tensor, margins: float | Tensor, scale: float) -> Tensor:
    margin = margins[target].double() if isinstance(margins, Tensor) else margins
    return torch.relu(scale * (margin + following - scores[target].double()))


def order_statistic_below(scores: Tensor, k: int, epsilon: float, levels: Tensor) -> Tensor:
    """Pr[(x + epsilon Z)_[k+1] <= level]: at most k of the independent noised scores exceed it; one class at a time."""
    exceeding = torch.zeros((k + 1, *levels.shape), dtype=torch.float64)
    exceeding[0] = 1.0
    for x in scores.double():
        p = torch.special.ndtr((x - levels) / epsilon)
        exceeding = torch.cat((exceeding[:1] * (1 - p), exceeding[1:] * (1 - p) + exceeding[:-1] * p))
    return exceeding.sum(0)


def expected_order_statistic(scores: Tensor, k: int, epsilon: float, nodes: int = 20_001) -> Tensor:
    """E[(x + epsilon Z)_[k+1]] = low + the integral of Pr[it exceeds v] from low to where that vanishes."""
    kth = float(scores.detach().double().sort(descending=True).values[k])
    low, high = kth - 12.0 * epsilon, kth + 12.0 * epsilon
    levels = torch.linspace(low, high, nodes, dtype=torch.float64)
    return low + torch.trapezoid(1.0 - order_statistic_below(scores, k, epsilon, levels), levels)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The counter-based generator Philox 4x32 with 10 rounds (Salmon, Moraes, Dror and Shaw, 2011)."""
    a, b, c, d = counter
    left_key, right_key = key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ left_key, right % 2**32, (left >> 32) ^ d ^ right_key, left % 2**32
        left_key, right_key = (left_key + 0x9E3779B9) % 2**32, (right_key + 0xBB67AE85) % 2**32
    return a, b, c, d


def philox_normals(seed: int, rows: int, classes: int, samples: int) -> Tensor:
    """The noise of the devices' path, number by number: (rows, classes, samples) in float64.

    The key is the seed's low and high 32 bits, the counter (class, row, sample // 4, 0). Of the four words w the
    first two give samples 0 and 1 (mod 4) by Box-Muller, r cos t and r sin t with r = sqrt(-2 log((w_0 + 1/2) / 2^32))
    and t = 2 pi w_1 / 2^32, the other two samples 2 and 3. The words are rounded to float32, as w_0 + 1/2 is.
    """
    noise = np.empty((rows, classes, samples))
    key = (seed % 2**32, seed >> 32)
    for row, column, sample in itertools.product(range(rows), range(classes), range(samples)):
        words = np.array(philox4x32((column, row, sample // 4, 0), key), dtype=np.uint32).astype(np.float32)
        first, second = words[:2] if sample % 4 < 2 else words[2:]
        radius = math.sqrt(-2.0 * math.log(float(first + np.float32(0.5)) / 2.0**32))
        angle = 2.0 * math.pi * float(second) / 2.0**32
        noise[row, column, sample] = radius * (math.sin(angle) if sample % 2 else math.cos(angle))
    return torch.from_numpy(noise)


# --- differentiable top-k cross-entropy (chapter 8) ------------------------------------------------------------------


def odd_even_network(wires: int, ranks: int) -> list[tuple[int, int]]:
    """Comparators (a, b), first to last: the smaller value leaves on wire a."""
    return [(a, a + 1) for layer in range(wires) for a in range(layer % 2, wires - 1, 2)]


def bitonic_network(wires: int, ranks: int) -> list[tuple[int, int]]:
    """Batcher's recursion: sort one half upwards, the other downwards, merge. `wires` is a power of two."""

    def sort(first: int, size: int, up: bool) -> list[tuple[int, int]]:
        if size == 1:
            return []
        half = size // 2
        return sort(first, half, True) + sort(first + half, half, False) + merge(first, size, up)

    def merge(first: int, size: int, up: bool) -> list[tuple[int, int]]:
        if size == 1:
            return []
        half = size // 2
        here = [(a, a + half) if up else (a + half, a) for a in range(first, first + half)]
        return here + merge(first, half, up) + merge(first + half, half, up)

    return sort(0, wires, True)


def splitter_selection_network(wires: int, ranks: int) -> list[tuple[int, int]]:
    """Splits every set of wires about which equally much is known, until the first `ranks` places are known."""

    def cascade(group: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
        """The larger values to the earlier members; then how many larger values each member is known to have."""
        if len(group) == 1:
            return [], [0]
        half = 1
        while 2 * half < len(group):
            half *= 2
        (left, known_left), (right, known_right) = cascade(group[:half]), cascade(group[half:])
        first = [(group[half + j], group[j]) for j in range(len(group) - half)]
        return first + left + right, known_left + [2 * known + 1 for known in known_right]

    top_down = list(range(wires))[::-1]
    larger = dict.fromkeys(top_down, 0)
    comparators: list[tuple[int, int]] = []
    while True:
        sets = [[wire for wire in top_down if larger[wire] == known] for known in range(ranks)]
        sets = [group for group in sets if len(group) > 1]
        if not sets:
            return comparators
        for group in sets:
            new, known = cascade(group)
            comparators += new
            for wire, more in zip(group, known, strict=True):
                larger[wire] += more


def swap_probability(difference: Tensor, distribution: str, beta: float, art_lambda: float = 0.25) -> Tensor:
    """The probability that two values, high - low = difference, stay where they are."""
    v = beta * difference
    if distribution == "logistic":
        return 1 / (1 + torch.exp(-v))
    if distribution == "logistic_phi":
        return 1 / (1 + torch.exp(-v / (difference.abs() + 1e-10) ** art_lambda))
    if distribution == "gaussian":
        return (1 + torch.erf(v / math.sqrt(2))) / 2
    if distribution == "cauchy":
        return 0.5 + torch.atan(v) / math.pi
    if distribution == "reciprocal":
        return 0.5 + v / (2 * (2 + v.abs()))
    if v.abs() <= 0.25:
        return v + 0.5
    return 0.5 + v.sign() * (0.5 - 1 / (16 * v.abs()))


def network_permutation(scores: Tensor, comparators: list[tuple[int, int]], **swap: Any) -> Tensor:
    """The relaxed permutation (wires, scores): one full matrix a comparator, multiplied. -inf loses for sure."""
    values = scores.double()
    permutation = torch.eye(len(values), dtype=torch.float64)
    for a, b in comparators:
        low, high = values[a], values[b]
        if low == -torch.inf or high == -torch.inf:
            stay = torch.tensor(0.5 if low == high else float(low < high), dtype=torch.float64)
        else:
            stay = swap_probability(high - low, **swap)
        step = torch.eye(len(values), dtype=torch.float64)
        place = (torch.tensor([a, a, b, b]), torch.tensor([a, b, a, b]))
        step = step.index_put(place, torch.stack((stay, 1 - stay, 1 - stay, stay)))
        moved = torch.where(step == 0, 0.0, step * values).sum(1)
        values = torch.where(torch.isin(torch.arange(len(values)), torch.tensor([a, b])), moved, values)
        permutation = step @ permutation
    return permutation


def relaxed_ranks(
    scores: Tensor,
    method: str = "odd_even",
    ranks: int | None = None,
    distribution: str = "cauchy",
    beta: float = 1.0,
    art_lambda: float = 0.25,
) -> Tensor:
    """(ranks, scores): how much of each score lands at rank 1, 2, ...; the full matrix of every method."""
    size = len(scores)
    possible = [j for j in range(size) if scores[j] > -torch.inf]
    values = scores.double()[possible]
    count = len(possible)
    swap = {"distribution": distribution, "beta": beta, "art_lambda": art_lambda}
    if method == "bitonic":  # for other than powers of two, -inf fills the wires below
        padding = (1 << (size - 1).bit_length()) - size
        padded = torch.cat((torch.full((padding,), -torch.inf, dtype=torch.float64), scores.double()))
        return network_permutation(padded, bitonic_network(len(padded), size), **swap).flip(0)[:size, padding:]
    if method in ("odd_even", "splitter_selection"):
        network = odd_even_network if method == "odd_even" else splitter_selection_network
        return network_permutation(scores, network(size, ranks or size), **swap).flip(0)
    if method == "neuralsort":
        distances = (values[:, None] - values).abs().sum(1)
        rows = [torch.softmax(beta * ((count + 1 - 2 * r) * values - distances), 0) for r in range(1, count + 1)]
        small = torch.stack(rows)
    elif method == "softsort":
        ordered = values.sort(descending=True, stable=True).values
        small = torch.softmax(-beta * (ordered[:, None] - values).abs(), 1)
    else:
        small = sinkhorn_plan(values, torch.linspace(1, 0, size, dtype=torch.float64)[:count], beta).T
    result = torch.zeros(size, size, dtype=torch.float64)
    return result.index_put((torch.arange(count)[:, None], torch.tensor(possible)), small)


def sinkhorn_plan(values: Tensor, anchors: Tensor, beta: float) -> Tensor:
    """Doubly stochastic diag(e^f) exp(-beta (v - a)^2) diag(e^g), (values, anchors), iterated until nothing moves."""
    cost = (values[:, None] - anchors) ** 2
    g = torch.zeros_like(anchors)
    while True:
        f = -torch.logsumexp(g - beta * cost, 1)
        new = -torch.logsumexp(f[:, None] - beta * cost, 0)
        still = float((new - g).detach().abs().max()) < 1e-14
        g = new
        if still:
            return torch.exp(f[:, None] + g - beta * cost)


def differentiable_topk_loss(
    scores: Tensor,
    target: int,
    k: int | dict[int, float],
    m: int = 16,
    top1: str = "softmax",
    cross_entropy_over: str = "kept",
    **operator: Any,
) -> Tensor:
    """By the full relaxed permutation matrix of the kept scores; `operator` goes to `relaxed_ranks`."""
    weights = {k: 1.0} if isinstance(k, int) else k
    classes = len(scores)
    scores = scores.double()
    if weights.get(classes) == 1.0:
        return torch.zeros((), dtype=torch.float64)
    kept, own = list(range(classes)), target
    if m < classes:
        others = sorted((j for j in range(classes) if j != target), key=lambda j: (-scores[j].item(), j))
        kept, own = [target, *others[: m - 1]], 0
    values = scores[kept]
    below = [each for each, weight in weights.items() if weight > 0 and each < classes]
    ranks = relaxed_ranks(values, ranks=max(below), **operator)[:, own]

    def q(each: int) -> Tensor:
        return torch.ones((), dtype=torch.float64) if each == classes else ranks[:each].sum()

    def log1(value: Tensor) -> Tensor:
        return torch.log(value * (1 - 2e-7) + 1e-7)

    zero = torch.zeros((), dtype=torch.float64)
    beyond = sum((weight * q(each) for each, weight in weights.items() if each > 1), zero)
    first = weights.get(1, 0.0)
    if top1 == "sort":
        return -log1(first * q(1) + beyond)
    if top1 == "softmax":
        return -log1(first * torch.softmax(values, 0)[own] + beyond)
    over = values if cross_entropy_over == "kept" else scores
    entropy = torch.logsumexp(over, 0) - values[own]
    rest = sum(weight for each, weight in weights.items() if each > 1)
    return (first * entropy if first else zero) - (rest * log1(beyond) if rest else zero)


# --- hinges (chapter 4) -----------------------------------------------------------------------------------------------


def lapin_hinge(scores: Tensor, target: int, k: int, variant: str, margin: float = 1.0) -> Tensor:
    """Hinge alpha or beta over the k largest z = x + margin - x_y, y itself among them with z_y = 0."""
    z = scores.double() + margin - scores[target].double()
    z[target] = 0.0
    largest = z.sort(descending=True).values[:k]
    return largest.mean().relu() if variant == "alpha" else largest.relu().mean()


# --- ranks (chapter 13) ----------------------------------------------------------------------------------------------


def rank(scores: Tensor, target: int) -> Tensor:
    """The target's place when the classes are sorted by falling score, the lower index first among equals.

    A row with NaN has no order: its rank is classes + 1.
    """
    values = scores.tolist()
    if any(value != value for value in values):
        return torch.tensor(len(values) + 1)
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    return torch.tensor(order.index(target) + 1)
