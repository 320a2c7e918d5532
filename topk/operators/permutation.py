r"""Relaxed permutations: for every rank a distribution over the elements (book, chapters 8 and "Soft top-k").

    "odd_even", "bitonic", "splitter_selection": comparator networks whose swaps happen with a probability;
    "neuralsort": rank r has the softmax of ((n + 1 - 2 r) x_j - sum_l |x_j - x_l|) / T (Grover et al. 2019);
    "softsort": that of -|x_[r] - x_j| / T (Prillo and Eisenschlos 2020);
    "sinkhorn": n times the entropic transport plan between the scores and n even anchors from 1 to 0.

Rows of the first two kinds and of softsort are distributions; the columns of networks and of sinkhorn sum to 1 as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from topk.arguments import check_choice, check_count, check_number
from topk.losses.differentiable import (
    DISTRIBUTIONS,
    METHODS,
    Options,
    _lowest,
    _newton_step,
    _plan,
    _transport_exponents,
    swap_probability,
    transport_potentials,
)
from topk.losses.networks import network
from topk.operators.rows import as_rows, check_scores, float_type


def soft_permutation(
    scores: Tensor,
    *,
    method: str = "odd_even",
    ranks: int | None = None,
    temperature: float = 1.0,
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
    iterations: int = 200,
    tolerance: float = 1e-6,
    dim: int = -1,
) -> Tensor:
    """The matrix (..., ranks, n), its entry (r, j) the share of element j at rank r, the largest first.

    Args:
        scores: (..., n) along ``dim``, any floating-point type; half types are computed in float32.
        method: a comparator network ("odd_even", "bitonic", "splitter_selection"), "neuralsort", "softsort" or
            "sinkhorn".
        ranks: only so many of the first ranks; None: all.
        temperature: of the relaxation, > 0: one over the inverse temperature of ``differentiable_topk_loss``.
        distribution: the networks' swap probability, as in ``differentiable_topk_loss``.
        art_lambda: the power of "logistic_phi", >= 0 and < 1.
        iterations: at most so many of Sinkhorn's; where values cannot be looked at, exactly so many. Two Newton steps
            on the marginals follow.
        tolerance: how far the marginals may be off before those.
        dim: where the elements are. The ranks stand before them, at the end.
    """
    check_scores(scores, dim)
    n = scores.shape[dim]
    check_choice("method", method, METHODS)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    ranks = n if ranks is None else check_count("ranks", ranks)
    if ranks > n:
        raise ValueError(f"ranks must be at most the number of elements, {n}, got {ranks}")
    beta = 1.0 / check_number("temperature", temperature, above=0.0)
    art_lambda = check_number("art_lambda", art_lambda, least=0.0, below=1.0)
    settings = Options(
        [], [], method, distribution, beta, art_lambda, n, "sort", "kept", check_count("iterations", iterations),
        check_number("tolerance", tolerance, above=0.0), False,
    )  # fmt: skip
    rows = as_rows(scores, dim)
    broken = ~(rows.detach().amax(1) < torch.inf)
    rows = torch.where(broken[:, None], 0.0, rows)
    # Impossible elements take the ranks that no other can, and those are left empty.
    matrix = _NAMES.get(method, _network)(rows, ranks, settings) * (rows > -torch.inf)[:, None]
    matrix = torch.where(broken[:, None, None], torch.nan, matrix)
    return matrix.reshape(*scores.movedim(dim, -1).shape[:-1], ranks, n).to(scores.dtype)


def _network(rows: Tensor, ranks: int, settings: Options) -> Tensor:
    """Every wire carries its value and its distribution over the elements through the layers."""
    n = rows.shape[1]
    values = (rows * settings.inverse_temperature).clamp(min=_lowest(rows.dtype))
    content = torch.eye(n, dtype=rows.dtype, device=rows.device).expand(rows.shape[0], n, n)
    for layer in network(settings.method, n, ranks):
        low, high = torch.tensor(layer, device=rows.device).T
        small, large = values[:, low], values[:, high]
        stay = swap_probability(large - small, settings)
        values = values.index_copy(1, torch.cat((low, high)), _exchanged(small, large, stay))
        stay = stay[:, :, None]
        content = content.index_copy(1, torch.cat((low, high)), _exchanged(content[:, low], content[:, high], stay))
    return content.flip(1)[:, :ranks]


def _exchanged(low: Tensor, high: Tensor, stay: Tensor) -> Tensor:
    return torch.cat((torch.lerp(high, low, stay), torch.lerp(low, high, stay)), 1)


def _neuralsort(rows: Tensor, ranks: int, settings: Options) -> Tensor:
    possible = rows > -torch.inf
    known = torch.where(possible, rows, 0.0)
    gaps = ((known[:, :, None] - known[:, None]).abs() * possible[:, None]).sum(2)
    rank = torch.arange(1, ranks + 1, device=rows.device)
    factor = (possible.sum(1, keepdim=True) + 1 - 2 * rank).to(rows.dtype)
    return _ranked(factor[:, :, None] * known[:, None] - gaps[:, None], possible, rank, settings)


def _softsort(rows: Tensor, ranks: int, settings: Options) -> Tensor:
    possible = rows > -torch.inf
    known = torch.where(possible, rows, 0.0)
    ordered = known.gather(1, rows.argsort(dim=1, descending=True, stable=True)[:, :ranks])
    logits = -(ordered[:, :, None] - known[:, None]).abs()
    return _ranked(logits, possible, torch.arange(1, ranks + 1, device=rows.device), settings)


def _ranked(logits: Tensor, possible: Tensor, rank: Tensor, settings: Options) -> Tensor:
    """The softmax over the possible elements; ranks that only impossible ones could take are empty."""
    logits = (logits * settings.inverse_temperature).masked_fill(~possible[:, None], _lowest(logits.dtype))
    return logits.softmax(2) * (rank <= possible.sum(1, keepdim=True))[:, :, None]


def _sinkhorn(rows: Tensor, ranks: int, settings: Options) -> Tensor:
    """The iterations without a gradient; two Newton steps on the marginals from there have the right derivatives."""
    exponent = _transport_exponents(rows.to(float_type(rows)), settings)
    row, column = transport_potentials(exponent.detach(), settings.iterations, settings.tolerance)
    for _ in range(2):
        row, column = _newton_step(exponent, row, column)
    return _plan(exponent, row, column).mT[:, :ranks].to(rows.dtype)


_NAMES = {"neuralsort": _neuralsort, "softsort": _softsort, "sinkhorn": _sinkhorn}
