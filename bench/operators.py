"""The soft top-k operators as contenders: what is timed is the chance that the target is chosen, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import topk

if TYPE_CHECKING:
    from bench.contenders import LossCall, Setting

THRESHOLDS = ("logistic", "laplace", "gaussian", "sparse")
OPERATORS = ("subset", *THRESHOLDS)
_SINKHORN = 200  # iterations


def _chosen(mask: Tensor, target: Tensor) -> Tensor:
    return mask.gather(1, target[:, None]).mean()


def ours(setting: Setting, device: torch.device) -> LossCall:
    """One call of the operator named by the setting's family."""
    return lambda x, y: _chosen(topk.soft_topk(x, setting.k, method=setting.family), y)


def softmax_and_topk(setting: Setting, device: torch.device) -> LossCall:
    """The floor: the cheapest soft mask and the hard choice, without an equation to solve."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        x.detach().topk(setting.k, dim=1)
        return _chosen(F.softmax(x, dim=1), y)

    return call


def smooth_loss(setting: Setting, device: torch.device) -> LossCall:
    """The loss that needs the same polynomial as the subset mask."""
    return lambda x, y: topk.smooth_topk_loss(x, y, setting.k)


def sinkhorn(setting: Setting, device: torch.device) -> LossCall:
    """The logistic mask as entropic optimal transport to the anchors 0 and 1, differentiated through its iterations."""

    def call(x: Tensor, y: Tensor) -> Tensor:
        n = x.shape[1]
        cost = torch.stack((torch.zeros_like(x), x), 2)  # log of the kernel, up to factors that scaling takes out
        goal = torch.tensor([n - setting.k, setting.k], dtype=x.dtype, device=x.device).log()
        column = torch.zeros_like(goal)
        for _ in range(_SINKHORN):
            row = -torch.logsumexp(cost + column, 2)
            column = goal - torch.logsumexp(cost + row[:, :, None], 1, keepdim=True)
        return _chosen(torch.sigmoid(x + column[..., 1] - column[..., 0]), y)

    return call


# --- truths ----------------------------------------------------------------------------------------------------------


def truth(setting: Setting, scores: Tensor, target: Tensor) -> Tensor:
    """By the formulas, in the type of the scores."""
    mask = _subsets(scores, setting.k) if setting.family == "subset" else _threshold(scores, setting)
    return _chosen(mask, target)


def _cdf(family: str, z: Tensor) -> Tensor:
    match family:
        case "logistic":
            return torch.sigmoid(z)
        case "laplace":
            return torch.where(z < 0, 0.5 * torch.exp(-z.abs()), 1.0 - 0.5 * torch.exp(-z.abs()))
        case "gaussian":
            return torch.special.ndtr(z)
        case _:
            return z.clamp(0.0, 1.0)


def _threshold(scores: Tensor, setting: Setting) -> Tensor:
    """b by bisection, then one Newton step, whose derivative is that of the implicit function theorem."""
    fixed = scores.detach()
    low, high = fixed.amin(1, keepdim=True) - 50.0, fixed.amax(1, keepdim=True) + 50.0
    for _ in range(100):
        middle = (low + high) / 2
        above = _cdf(setting.family, fixed - middle).sum(1, keepdim=True) > setting.k
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    with torch.enable_grad():
        level = middle.requires_grad_()
        (slope,) = torch.autograd.grad(_cdf(setting.family, fixed - level).sum(), level)
    level = level.detach()
    level = level - (_cdf(setting.family, scores - level).sum(1, keepdim=True) - setting.k) / slope
    return _cdf(setting.family, scores - level)


def _subsets(scores: Tensor, k: int) -> Tensor:
    """The gradient of log e_k, with e_k built up a class at a time."""
    with torch.enable_grad():
        inner = scores if scores.requires_grad else scores.detach().requires_grad_()
        sums = F.pad(torch.ones_like(inner[:, :1]), (0, k))
        for weight in inner.exp().unbind(1):
            sums = sums + weight[:, None] * F.pad(sums[:, :-1], (1, 0))
        return cast(Tensor, torch.autograd.grad(sums[:, k].log().sum(), inner, create_graph=True)[0])
