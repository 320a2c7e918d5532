"""The soft top-k operators as contenders: what is timed is the chance that the target is chosen, and its gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import topk

if TYPE_CHECKING:
    from bench.contenders import LossCall, Setting

THRESHOLDS = ("logistic", "laplace", "gaussian", "sparse")
OPERATORS = ("subset", *THRESHOLDS, "sort")
_SINKHORN = 200  # iterations


def chosen(mask: Tensor, target: Tensor) -> Tensor:
    """The mean share of the target."""
    return mask.gather(1, target[:, None]).mean()


def ours(setting: Setting, device: torch.device) -> LossCall:
    """One call of the operator named by the setting's family."""
    return lambda x, y: chosen(topk.soft_topk(x, setting.k, method=setting.family), y)


def softmax_and_topk(setting: Setting, device: torch.device) -> LossCall:
    """The floor: the cheapest soft mask and the hard choice, without an equation to solve."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        x.detach().topk(setting.k, dim=1)
        return chosen(F.softmax(x, dim=1), y)

    return call


def smooth_loss(setting: Setting, device: torch.device) -> LossCall:
    """The loss that needs the same polynomial as the subset mask."""
    return lambda x, y: topk.smooth_topk_loss(x, y, setting.k)


def sinkhorn(setting: Setting, device: torch.device) -> LossCall:
    """The logistic mask as entropic optimal transport to the anchors 0 and 1, and the derivative of its fixed point."""

    @torch.no_grad()
    def level(x: Tensor) -> Tensor:
        costs = torch.stack((torch.zeros_like(x), x), 2)  # minus the costs, up to factors that scaling takes out
        goal = torch.tensor([x.shape[1] - setting.k, setting.k], dtype=x.dtype, device=x.device).log()
        column = torch.zeros_like(goal)
        for _ in range(_SINKHORN):
            row = torch.logsumexp(costs + column, 2)
            column = goal - torch.logsumexp(costs - row[:, :, None], 1, keepdim=True)
        return column[..., 0] - column[..., 1]

    return lambda x, y: chosen(_by_implicit_function(x, level(x), setting), y)


# --- truths ----------------------------------------------------------------------------------------------------------


def truth(setting: Setting, scores: Tensor, target: Tensor) -> Tensor:
    """By the formulas, in the type of the scores."""
    own = {"subset": _subsets, "sort": _network}.get(setting.family)
    return chosen(own(scores, setting.k) if own else _threshold(scores, setting), target)


def _network(scores: Tensor, k: int) -> Tensor:
    """Odd and even neighbours in turn: the values, and below them every element's share of each place."""
    n = scores.shape[1]
    wires = torch.cat((scores[:, None], torch.eye(n, dtype=scores.dtype).expand(len(scores), n, n)), 1)
    for layer in range(n):
        low = torch.arange(layer % 2, n - 1, 2)
        first, second = wires[..., low], wires[..., low + 1]
        stay = (second - first)[:, :1].atan() / math.pi + 0.5
        wires = wires.index_copy(2, low, stay * first + (1 - stay) * second)
        wires = wires.index_copy(2, low + 1, stay * second + (1 - stay) * first)
    return wires[:, 1:, n - k :].sum(2)


def _cdf(family: str, z: Tensor) -> Tensor:
    match family:
        case "logistic":
            return torch.sigmoid(z)
        case "laplace":
            return torch.where(z < 0, 0.5 * torch.exp(-z.abs()), 1.0 - 0.5 * torch.exp(-z.abs()))
        case "gaussian":
            return 0.5 * torch.erfc(-z * math.sqrt(0.5))
        case _:
            return z.clamp(0.0, 1.0)


def _threshold(scores: Tensor, setting: Setting) -> Tensor:
    """b by bisection."""
    fixed = scores.detach()
    low, high = fixed.amin(1, keepdim=True) - 50.0, fixed.amax(1, keepdim=True) + 50.0
    for _ in range(100):
        middle = (low + high) / 2
        above = _cdf(setting.family, fixed - middle).sum(1, keepdim=True) > setting.k
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return _by_implicit_function(scores, middle, setting)


def _by_implicit_function(scores: Tensor, level: Tensor, setting: Setting) -> Tensor:
    """One more Newton step from the root (rows, 1): its derivative is that of the implicit function theorem."""
    fixed = scores.detach()
    with torch.enable_grad():
        level = level.requires_grad_()
        (slope,) = torch.autograd.grad(_cdf(setting.family, fixed - level).sum(), level)
    level = level.detach()
    level = level - (_cdf(setting.family, scores - level).sum(1, keepdim=True) - setting.k) / slope
    return _cdf(setting.family, scores - level)


def _subsets(scores: Tensor, k: int) -> Tensor:
    """The gradient of log e_k."""
    with torch.enable_grad():
        inner = scores if scores.requires_grad else scores.detach().requires_grad_()
        (mask,) = torch.autograd.grad(_log_polynomial(inner, k).sum(), inner, create_graph=True)
    return mask


def _log_polynomial(scores: Tensor, k: int) -> Tensor:
    """log e_k of the exponentials (rows,), built up a class at a time."""
    sums = F.pad(torch.ones_like(scores[:, :1]), (0, k))
    for weight in scores.exp().unbind(1):
        sums = sums + weight[:, None] * F.pad(sums[:, :-1], (1, 0))
    return sums[:, k].log()


# --- a loss for sets -------------------------------------------------------------------------------------------------


def subset_loss(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """The loss of the k classes from the target on."""
    return topk.subset_loss(scores, _from_target_on(scores, target, k), largest_k=k)


def subset_loss_truth(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """The same by its formula."""
    return (_log_polynomial(scores, k) - (scores * _from_target_on(scores, target, k)).sum(1)).mean()


def _from_target_on(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """Ones at the k classes (rows, n)."""
    right = (target[:, None] + torch.arange(k, device=target.device)) % scores.shape[1]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, right, True)
