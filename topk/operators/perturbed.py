r"""Soft top-k by noise (book, chapters "Soft top-k" and 7).

    m_i = Pr[x_i + T Z_i is among the k largest],        Z independent: standard normal, or Gumbel.

Draws: the mean of the hard masks of some noised scores y = x + T Z. Its derivative holds the draws and reweights them
by the density they would have at other scores, p(y; x) / p(y; x'), whose derivatives of every order at x = x' are
those of Berthet et al. (2020); the mean of the other draws is taken off first, which changes no expectation.

Quadrature (normal noise only): with v a threshold, z = x / T, P_i(v) = Phi(z_i - v) and S(v) the number of successes,

    m_i = integral of phi(z_i - v) Pr[S without i < k at v] dv,
    Pr[S without i < k] = Pr[S < k] + Pr[S = k] pi_i,        pi the inclusion probabilities at the odds P / (1 - P).

The second factor rises from 0 to 1 near the c where sum P is k - 1/2, over a width s. A normal distribution function
that rises as it does has a known integral, Phi((z_i - c) / sqrt(1 + s^2)). What is left is smooth and dies off like a
normal tail on both sides of c, so that the trapezoid rule on one grid a row converges faster than any power.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.special import log_ndtr, ndtr

from topk.arguments import check_choice, check_count, check_generator, check_number
from topk.operators.rows import (
    as_rows,
    as_scores,
    check_k,
    check_scores,
    check_temperature,
    float_type,
    hard_mask,
    per_row,
)
from topk.operators.subset import _factors, _tree, subset_mask
from topk.operators.threshold import threshold

NOISES = ("gaussian", "gumbel")
_BELOW, _ABOVE, _SPACING = 14, 16, 0.65  # nodes on either side of c, and between them in units of the spread


def perturbed_topk(
    scores: Tensor,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    noise: str = "gaussian",
    samples: int | None = 100,
    generator: torch.Generator | None = None,
    dim: int = -1,
) -> Tensor:
    """The probability of every element to be among the k largest once noise is added; sums to k.

    Args:
        scores: any shape and floating-point type; half types are computed in float32.
        k: how many, from 1 to n.
        temperature: how much noise, in units of the scores; a number or one number a row.
        noise: "gaussian" or "gumbel".
        samples: how many draws, all held in memory at once; or None: quadrature, for Gaussian noise only.
        generator: where the draws come from; None: torch's own.
        dim: where the elements are.
    """
    check_scores(scores, dim)
    check_k(k, scores.shape[dim], whole=True)
    check_temperature(temperature)
    check_choice("noise", noise, NOISES)
    check_generator(generator, scores)
    rows, scale = as_rows(scores, dim), per_row("temperature", temperature, scores, dim)
    if samples is not None:
        return as_scores(_sampled(rows, k, scale, noise, check_count("samples", samples), generator), scores, dim)
    if noise != "gaussian":
        raise ValueError(f"samples must be a number of draws for noise={noise!r}, got None")
    return as_scores(_integrated(rows, k, scale), scores, dim)


def noised_kth(
    scores: Tensor,
    k: int,
    *,
    epsilon: float = 1.0,
    samples: int = 10,
    generator: torch.Generator | None = None,
    dim: int = -1,
) -> Tensor:
    """The mean over draws of the k-th largest noised score, (x + epsilon Z)_[k] (Garcin et al. 2022).

    Its gradient is the share of draws in which an element is k-th. The scores' shape without `dim`.
    """
    check_scores(scores, dim)
    check_k(k, scores.shape[dim], whole=True)
    epsilon = check_number("epsilon", epsilon, above=0.0)
    check_generator(generator, scores)
    rows = as_rows(scores, dim)
    drawn = rows + epsilon * _draw("gaussian", rows, check_count("samples", samples), generator)
    kth = drawn.topk(k, dim=-1).values[..., -1].mean(0)
    kth = kth * torch.where(rows.detach().amax(1) < torch.inf, 1.0, torch.nan)
    return kth.reshape(scores.movedim(dim, -1).shape[:-1]).to(scores.dtype)


def _draw(noise: str, rows: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    shape = (samples, *rows.shape)
    if noise == "gaussian":
        return torch.randn(shape, dtype=rows.dtype, device=rows.device, generator=generator)
    uniform = torch.rand(shape, dtype=rows.dtype, device=rows.device, generator=generator)
    return -(-uniform.clamp(min=torch.finfo(rows.dtype).tiny).log()).log()


def _sampled(
    rows: Tensor, k: int, scale: Tensor, noise: str, samples: int, generator: torch.Generator | None
) -> Tensor:
    z = _draw(noise, rows, samples, generator)
    drawn = (rows + scale[:, None] * z).detach()  # (samples, rows, n)
    hard = hard_mask(drawn.flatten(0, 1), k).view(drawn.shape)
    mean = hard.mean(0)
    possible = rows > -torch.inf
    distance = torch.where(possible, drawn - rows, 0.0) / scale[:, None]
    potential = 0.5 * distance.square() if noise == "gaussian" else distance + (-distance).exp()
    potential = torch.where(possible, potential + scale.log()[:, None], 0.0).sum(-1, keepdim=True)
    weight = (potential.detach() - potential).exp()  # 1
    spread = hard - mean if samples > 1 else hard
    change = (spread * (weight - 1.0)).sum(0) / max(1, samples - 1)
    broken = ~(rows.detach().amax(1) < torch.inf)
    return torch.where(broken, torch.nan, 0.0)[:, None] + mean + change


def _integrated(rows: Tensor, k: int, scale: Tensor) -> Tensor:
    """Works in float64, on (rows, nodes, n) numbers."""
    n = rows.shape[1]
    wide, possible = float_type(rows), rows > -torch.inf
    broken = ~(rows.detach().amax(1) < torch.inf)
    settled = possible.sum(1) <= k
    safe = torch.where((broken | settled)[:, None] & ~possible | broken[:, None], 0.0, rows)
    _, offset, anchor = threshold(safe, k - 0.5, scale, "gaussian")
    centre = (offset / scale).detach()
    there = safe > -torch.inf
    z = torch.where(there, safe - anchor[:, None], 0.0) / scale[:, None]
    z = torch.where(there, z, -1e6).clamp(min=-1e6).to(wide)
    centre = centre.to(wide)[:, None]
    chance = ndtr(z.detach() - centre)
    density = (-0.5 * (z.detach() - centre).square()).exp().sum(1) / math.sqrt(2.0 * math.pi)
    spread = ((chance * (1.0 - chance)).sum(1).sqrt() / density)[:, None]
    spread = torch.where(spread.isfinite() & (spread > 0), spread.clamp(max=1.0), 1.0)
    steps = torch.arange(-_BELOW, _ABOVE, device=rows.device, dtype=wide) + 0.5
    distance = z[:, None, :] - (centre + _SPACING * spread * steps)[:, :, None]  # (rows, nodes, n)
    flat = distance.flatten(0, 1).clamp(min=-1e3, max=1e3)  # where log_ndtr and its slope are numbers
    odds = (log_ndtr(flat) - log_ndtr(-flat)).clamp(min=-700.0, max=700.0)
    coefficients = _tree(_factors(odds, None), k)[0]
    whole = torch.full_like(odds[:, 0], k).to(torch.int64)
    inclusion = subset_mask(odds, whole, torch.ones_like(odds[:, 0]), k)[0] if k < n else torch.ones_like(odds)
    under = coefficients[:k].sum(0)[:, None] + coefficients[k][:, None] * inclusion
    excess = under.view(distance.shape) - ndtr(steps * _SPACING)[:, None]
    bell = (-0.5 * flat.view(distance.shape).square()).exp() * (_SPACING / math.sqrt(2.0 * math.pi))
    mask = ndtr((z - centre) / (1.0 + spread.square()).sqrt()) + spread * (bell * excess).sum(1)
    mask = torch.where(settled[:, None], possible.to(wide), torch.where(possible, mask, 0.0))
    return torch.where(broken[:, None], torch.nan, mask).to(rows.dtype)
