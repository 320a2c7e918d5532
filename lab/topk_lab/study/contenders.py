"""Every loss of the package with the settings that chapters 2, 9 and 27 look at, by name, as functions of k."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import topk
from topk_lab.figures import RowLoss

RARE_MARGINS = (0.9, 0.5, 0.2)
"""Margins of the first classes, the others' is 0.1, where classes are meant to differ."""


@dataclass(frozen=True)
class Contender:
    """A loss and how its minimum is found.

    Attributes:
        name: as tables print it.
        family: the chapter's name for it.
        at: k -> loss.
        search: "corners" for piecewise linear losses, whose minimum is found exactly; "descent"; or "field" for those
            whose gradient is not that of their value.
        symmetric: whether renaming the classes changes nothing.
        kinks, mean_kinks: for "corners": at which leads of the target its kinks are, and whether alpha's mean is one.
    """

    name: str
    family: str
    at: Callable[[int], RowLoss]
    search: str = "descent"
    symmetric: bool = True
    kinks: Callable[[int], tuple[float, ...]] = lambda k: (1.0,)
    mean_kinks: bool = False


def _rows(function: Callable[..., Tensor], **options: Any) -> Callable[[int], RowLoss]:
    return lambda k: lambda scores, target: function(scores, target, k, reduction="none", **options)


def _without_k(function: Callable[..., Tensor], **options: Any) -> Callable[[int], RowLoss]:
    return lambda k: lambda scores, target: function(scores, target, reduction="none", **options)


def _half_top1(function: Callable[..., Tensor]) -> Callable[[int], RowLoss]:
    """Half the weight on k = 1, half on k."""
    return lambda k: lambda scores, target: function(scores, target, _mixed(k), reduction="none")


def _mixed(k: int) -> int | dict[int, float]:
    return {1: 0.5, k: 0.5} if k > 1 else 1


def _ldam_by_class(k: int) -> RowLoss:
    def loss(scores: Tensor, target: Tensor) -> Tensor:
        margins = scores.new_full((scores.shape[1],), 0.1)
        margins[: len(RARE_MARGINS)] = margins.new_tensor(RARE_MARGINS)[: len(margins)]
        return topk.ldam_loss(scores, target, margins=margins, scale=5.0, reduction="none")

    return loss


def _differentiable(mixed: bool = False, fewer: int = 0, **options: Any) -> Callable[[int], RowLoss]:
    """`mixed`: half the weight on k = 1; `fewer`: so many scores are dropped, but never below k + 1."""

    def at(k: int) -> RowLoss:
        def loss(scores: Tensor, target: Tensor) -> Tensor:
            kept, guesses = max(k + 1, scores.shape[1] - fewer), _mixed(k) if mixed else k
            with warnings.catch_warnings():  # Sinkhorn warns where far scores keep its marginals from settling
                warnings.simplefilter("ignore", RuntimeWarning)
                return topk.differentiable_topk_loss(scores, target, guesses, m=kept, reduction="none", **options)

        return loss

    return at


def contenders() -> list[Contender]:
    """All of them, in the order of the chapters."""
    return [*_baselines(), *_hinges(), *_smoothed(), *_differentiable_ones()]


def relatives() -> list[Contender]:
    """The convex relatives of the hinges (chapter 4) and the losses from ranking (chapter 23)."""
    hinge, autkc, ldr = topk.topk_hinge_loss, topk.autkc_loss, topk.ldr_loss
    convex = ("topk_entropy", "alpha_smooth", "beta_smooth", "polyhedral_smooth")
    return [
        *(Contender(name.replace("_", " "), "convex", _rows(hinge, variant=name)) for name in convex),
        Contender("polyhedral", "convex", _rows(hinge, variant="polyhedral"), "corners"),
        *(Contender(f"AUTKC, {name}", "ranking", _rows(autkc, surrogate=name)) for name in ("exponential", "logistic")),
        Contender("AUTKC, hinge", "ranking", _rows(autkc, surrogate="hinge"), "corners"),
        Contender("LDR", "ranking", _without_k(ldr)),
        Contender("LDR, adaptive", "ranking", _without_k(ldr, alpha=2.0)),
        Contender("softmax at K", "ranking", _rows(topk.softmax_at_k_loss), "field"),
    ]


def _baselines() -> list[Contender]:
    entropy, focal, ldam = F.cross_entropy, topk.focal_loss, topk.ldam_loss
    return [
        Contender("cross-entropy", "baseline", _without_k(entropy)),
        Contender("cross-entropy, smoothing 0.1", "baseline", _without_k(entropy, label_smoothing=0.1)),
        Contender("focal, gamma 2", "baseline", _without_k(focal, gamma=2.0)),
        Contender("LDAM, equal margins", "baseline", _without_k(ldam, margins=0.3, scale=5.0)),
        Contender("LDAM, margins by class", "baseline", _ldam_by_class, symmetric=False),
    ]


def _hinges() -> list[Contender]:
    hinge = topk.topk_hinge_loss
    limit, entropy = _rows(hinge, variant="smooth_limit"), _rows(hinge, variant="entropy")
    return [
        *(
            Contender(f"hinge, {name}", "hinge", _rows(hinge, variant=name), "corners", mean_kinks=name == "alpha")
            for name in ("calibrated", "kth", "alpha", "beta")
        ),
        Contender("hinge, calibrated, k = 1 and k", "hinge", _half_top1(hinge), "corners"),
        Contender("hinge, smooth limit", "hinge", limit, "corners", kinks=lambda k: (float(k),)),
        Contender("truncated entropy", "hinge", entropy),
    ]


def _smoothed() -> list[Contender]:
    smooth, noised, transition = topk.smooth_topk_loss, topk.noised_topk_loss, topk.transition_topk_loss
    settings = ((0.1, 1.0), (0.5, 1.0), (1.0, 1.0), (5.0, 1.0), (1.0, 0.0))
    return [
        *(
            Contender(f"smooth, tau {tau:g}, margin {margin:g}", "smooth", _rows(smooth, tau=tau, margin=margin))
            for tau, margin in settings
        ),
        Contender("smooth, tau 1, k = 1 and k", "smooth", _half_top1(smooth)),
        *(
            Contender(f"noised, epsilon {epsilon:g}", "noised", _rows(noised, epsilon=epsilon, samples=None))
            for epsilon in (0.1, 0.5, 1.0, 2.0)
        ),
        Contender("transition, weight 0.5", "transition", _rows(transition, transition=0.5)),
        Contender("transition, weight 1 (grouped)", "transition", _rows(transition, transition=1.0)),
        *(
            Contender(f"transition, width {width:g}", "transition", _rows(transition, width=width), "field")
            for width in (0.2, 1.0, 4.0)
        ),
    ]


def _differentiable_ones() -> list[Contender]:
    def sorting(name: str, symmetric: bool, **options: Any) -> Contender:
        loss = _differentiable(**{"top1": "sort", **options})
        return Contender(f"differentiable, {name}", "differentiable", loss, symmetric=symmetric)

    far: dict[str, Any] = {"iterations": 40, "tolerance": 1e-4}  # far scores do not settle in any number of iterations
    return [
        *(sorting(f"odd_even, beta {beta:g}", False, inverse_temperature=beta) for beta in (1.0, 10.0)),
        sorting("odd_even, one score dropped", True, fewer=1),
        *(sorting(method, False, method=method) for method in ("bitonic", "splitter_selection")),
        *(sorting(method, True, method=method) for method in ("neuralsort", "softsort")),
        sorting("sinkhorn", True, method="sinkhorn", **far),
        *(
            sorting(f"k = 1 and k, top1 {top1}", False, mixed=True, top1=top1)
            for top1 in ("softmax", "cross_entropy", "sort")
        ),
    ]


def by_name(name: str) -> Contender:
    """The contender with this name."""
    known = {each.name: each for each in (*contenders(), *relatives())}
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def expected(loss: RowLoss, scores: Tensor, q: Tensor) -> Tensor:
    """sum over y of q_y loss(scores, y): scores and q (..., classes) -> (...,)."""
    classes = scores.shape[-1]
    rows = scores.reshape(-1, classes)
    target = torch.arange(classes).repeat(len(rows))
    losses = loss(rows.repeat_interleave(classes, 0), target).reshape(scores.shape)
    return (q * losses).sum(-1)
