"""Two losses for classes of unequal size, which know no k: LDAM and focal (book, chapter 4).

Both depend on one number a row, the gap between the wrong classes' log-sum-exp and the right score,

    LDAM:   gap = log sum_{j != y} exp(s x_j) - s (x_y - m_y),   loss = softplus(gap)              Cao et al. (2019)
    focal:  gap = log sum_{j != y} exp(x_j) - x_y,               loss = (1 - p)^gamma softplus(gap)    Lin et al. (2017)

with 1 - p = sigmoid(gap), accurate however close p = p_y is to 0 or 1. With f the loss as a function of the gap, a
wrong class has the slope s f'(gap) q_j, q = softmax(s x) over the wrong classes, and y has -s f'(gap). Focal has

    f'(gap) = gamma (1 - p)^gamma p softplus(gap) + (1 - p)^(gamma + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from topk._cpu import largest_wrong, scaled_exponentials, sum_exponentials
from topk.arguments import check_number, check_scores
from topk.autograd import Head, Loss
from topk.losses.common import (
    LossModule,
    finite_or_zero,
    log_sum_exp,
    not_finite_above,
    reduced_loss,
    row_dtype,
    row_margins,
    target_scores,
    with_tail,
)
from topk.losses.soft import takes_probabilities
from topk.tails import PowerSums


def log_odds_against(scores: Tensor, target: Tensor, tail: Tensor | None = None) -> Tensor:
    """log((1 - p_y) / p_y) = log sum_{j != y} exp(x_j) - x_y (rows,); the least number where no other class is left."""
    wrong = torch.ones_like(scores, dtype=torch.bool).scatter(1, target[:, None], False)
    gap = with_tail(log_sum_exp(scores, wrong), tail) - target_scores(scores, target)
    return gap.clamp(min=torch.finfo(gap.dtype).min)


def ldam_definition(
    scores: Tensor,  # (rows, classes)
    target: Tensor,  # (rows,)
    margins: Tensor,  # (rows,), of every row's class
    scale: float = 30.0,
    tail: Tensor | None = None,  # (1, rows): the sum of exp(scale x) over classes that are not listed
) -> Tensor:
    """The loss of every row (rows,): cross-entropy of scale (x - margin e_y)."""
    return softplus(log_odds_against(scale * scores, target, tail) + scale * margins, threshold=50.0)


def focal_definition(scores: Tensor, target: Tensor, gamma: float = 2.0, tail: Tensor | None = None) -> Tensor:
    """The loss of every row (rows,): (1 - p_y)^gamma times cross-entropy."""
    gap = log_odds_against(scores, target, tail)
    entropy = softplus(gap, threshold=50.0)
    return (gamma * (gap - entropy)).exp() * entropy


class LDAMOptions(NamedTuple):
    """LDAM's own number; the margins are a tensor."""

    scale: float


def ldam_forward(scores: Tensor, target: Tensor, options: LDAMOptions, margins: Tensor) -> tuple[Tensor, ...]:
    """loss (rows,) and the table of `_table`."""
    gap, shift, total = _gap(scores, target, margins, options.scale)
    return softplus(gap, threshold=50.0).to(scores.dtype), _table(shift, total, options.scale * gap.sigmoid(), gap)


def ldam_backward(
    grad: Tensor, scores: Tensor, target: Tensor, options: LDAMOptions, saved: tuple[Tensor, ...], margins: Tensor
) -> Tensor:
    """grad * d loss / d scores: one exponential a class."""
    return _spread(grad, scores, target, saved[0], options.scale)


LDAM = Loss(
    "ldam",
    LDAMOptions,
    ldam_definition,
    ldam_forward,
    ldam_backward,
    head=lambda options: Head(1, [PowerSums(options.scale)]),
)


class FocalOptions(NamedTuple):
    """Focal's own number."""

    gamma: float


def focal_forward(scores: Tensor, target: Tensor, options: FocalOptions) -> tuple[Tensor, ...]:
    """loss (rows,) and the table of `_table`."""
    gap, shift, total = _gap(scores, target, 0.0, 1.0)
    entropy, missed = softplus(gap, threshold=50.0), gap.sigmoid()
    fall = options.gamma * torch.where(gap == torch.inf, 0.0, (-gap).sigmoid() * entropy)
    factor = missed**options.gamma
    return (factor * entropy).to(scores.dtype), _table(shift, total, factor * (fall + missed), gap)


def focal_backward(
    grad: Tensor, scores: Tensor, target: Tensor, options: FocalOptions, saved: tuple[Tensor, ...]
) -> Tensor:
    """grad * d loss / d scores: one exponential a class."""
    return _spread(grad, scores, target, saved[0], 1.0)


FOCAL = Loss(
    "focal", FocalOptions, focal_definition, focal_forward, focal_backward, head=lambda _: Head(1, [PowerSums(1.0)])
)


def _gap(scores: Tensor, target: Tensor, margins: Tensor | float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gap (NaN in bad rows), the largest wrong score t, the sum of exp(scale (x - t)) over the wrong classes."""
    largest = largest_wrong(scores, target)
    shift, x_target, dtype = finite_or_zero(largest), target_scores(scores, target), row_dtype(scores)
    total = sum_exponentials(scores, shift, target[:, None], scale).to(dtype)
    lead = shift.to(dtype) - x_target.to(dtype) + margins
    bad = not_finite_above(largest, x_target)
    # An impossible y is never right, not even where no other class is possible either.
    gap = (scale * lead + total.log()).masked_fill(x_target == -torch.inf, torch.inf)
    return gap.masked_fill(bad, torch.nan), shift, total


def _table(shift: Tensor, total: Tensor, slope: Tensor, gap: Tensor) -> Tensor:
    """t, the slope of the wrong class that has this score, and y's slope, (rows, 3)."""
    at_target = -slope.masked_fill(gap == torch.inf, 0.0)
    return torch.stack((shift.to(slope.dtype), slope / total.clamp(min=1.0), at_target), 1).to(shift.dtype)


def _spread(grad: Tensor, scores: Tensor, target: Tensor, table: Tensor, scale: float) -> Tensor:
    """The gradient from what `_table` kept."""
    shift, slope, at_target = table.unbind(1)
    result = scaled_exponentials(scores, shift, grad * slope, scale)
    return result.scatter_(1, target[:, None], (grad * at_target)[:, None])


@takes_probabilities
def ldam_loss(
    scores: Tensor,
    target: Tensor,
    *,
    margins: float | Tensor,
    scale: float = 30.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The label-distribution-aware margin loss of Cao, Wei, Gaidon, Arechiga and Ma (2019); chapter 4.

    Cross-entropy of scale (x - margins_y e_y): rare classes must lead by more, see ``class_margins``.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type; cosines in the paper.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        margins: a number for every class, or one >= 0 for all.
        scale: what the scores are multiplied by, > 0.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch", "compiled" or "triton".
    """
    check_scores(scores, target)
    options = LDAMOptions(check_number("scale", scale, above=0.0))
    margin = row_margins(margins, scores, target)
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    return reduced_loss(LDAM, options, scores, target, margin, **tail)


@takes_probabilities
def focal_loss(
    scores: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The focal loss of Lin, Goyal, Girshick, He and Dollar (2017); chapter 4.

    (1 - p_y)^gamma times cross-entropy; ``gamma=0`` is cross-entropy.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        gamma: how fast examples that are right already stop counting, >= 0.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch", "compiled" or "triton".
    """
    check_scores(scores, target)
    options = FocalOptions(check_number("gamma", gamma, least=0.0))
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    return reduced_loss(FOCAL, options, scores, target, **tail)


def class_margins(counts: Tensor | Sequence[float] | np.ndarray[Any, Any], max_margin: float = 0.5) -> Tensor:
    """counts^(-1/4), scaled so that the largest, of the rarest class, is `max_margin`; chapters 4 and 7.

    Args:
        counts: how often every class occurs, > 0: a tensor, a sequence or an array.
        max_margin: the margin of the rarest class, > 0.

    Returns:
        One margin a class, in the type of `counts` if that is a floating-point tensor, else the default type.
    """
    max_margin = check_number("max_margin", max_margin, above=0.0)
    try:
        given = torch.as_tensor(counts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"counts must hold a number for every class, got {type(counts).__name__}") from error
    if given.dtype.is_complex or given.dtype == torch.bool:
        raise TypeError(f"counts must be real numbers, got {given.dtype}")
    if given.dim() != 1 or given.numel() == 0:
        raise ValueError(f"counts must have shape (classes,), one number a class, got {tuple(given.shape)}")
    wrong = ~((given > 0) & (given < torch.inf))
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise ValueError(f"counts must be finite and > 0, got {given[place].item()} for class {place}")
    dtype = given.dtype if isinstance(counts, Tensor) and given.dtype.is_floating_point else torch.get_default_dtype()
    margins = given.to(row_dtype(given)) ** -0.25
    return (margins * (max_margin / margins.max())).to(dtype)


class LDAMLoss(LossModule):
    """Module form of :func:`topk.ldam_loss`; a tensor of margins becomes a buffer."""

    function = staticmethod(ldam_loss)

    def __init__(
        self,
        *,
        margins: float | Tensor,
        scale: float = 30.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())


class FocalLoss(LossModule):
    """Module form of :func:`topk.focal_loss`."""

    function = staticmethod(focal_loss)

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())
