"""Brute-force definitions: obviously right, at any cost. What the tests and the book compare against.

Everything here is written from the definition, in float64, one row at a time: scores (classes,), target an int,
result a 0-dim tensor that autograd can differentiate. Nothing is shared with `topk.losses` or the kernels.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def wrong_scores(scores: Tensor, target: int) -> Tensor:
    """All scores but the target's, in class order."""
    return torch.cat((scores[:target], scores[target + 1 :]))


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
    """The same for many classes: log e_0..log e_k of all wrong classes, one class after another, in log space."""
    u = wrong_scores(scores.double(), target) / (k * tau)
    log_e = torch.full((k + 1,), -torch.inf, dtype=torch.float64, device=scores.device)
    log_e[0] = 0.0
    for value in u:
        log_e = torch.cat((log_e[:1], torch.logaddexp(log_e[1:], log_e[:-1] + value)))
    gap = margin / tau + log_e[k] - log_e[k - 1] - scores[target].double() / (k * tau)
    return tau * torch.logaddexp(gap, torch.zeros_like(gap))


def smooth_topk_gradient_log_space(
    scores: Tensor, target: int, k: int, tau: float = 1.0, margin: float = 1.0
) -> Tensor:
    """Its gradient from prefixes and suffixes in log space: d log e_k / d u_i = e^{u_i} e_{k-1}(without i) / e_k."""
    u = wrong_scores(scores.double(), target) / (k * tau)

    def append(log_e: Tensor, value: Tensor) -> Tensor:
        return torch.cat((log_e[:1], torch.logaddexp(log_e[1:], log_e[:-1] + value)))

    start = torch.full((k + 1,), -torch.inf, dtype=torch.float64, device=scores.device)
    start[0] = 0.0
    prefixes = list(itertools.accumulate(u, append, initial=start))
    suffixes = list(itertools.accumulate(u.flip(0), append, initial=start))[::-1]
    before, after = torch.stack(prefixes[:-1]), torch.stack(suffixes[1:])
    log_e = prefixes[-1]
    inclusion = []
    for degree in (k, k - 1):
        if degree == 0:
            inclusion.append(torch.zeros_like(u))
            continue
        without = torch.logsumexp(before[:, :degree] + after[:, :degree].flip(1), 1)
        inclusion.append((u + without - log_e[degree]).exp())
    slope = torch.sigmoid(margin / tau + log_e[k] - log_e[k - 1] - scores[target].double() / (k * tau))
    gradient = slope / k * (inclusion[0] - inclusion[1])
    return torch.cat((gradient[:target], -slope[None] / k, gradient[target:]))


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
