"""Two losses for classes of unequal size, which know no k: LDAM and focal (book, chapter 4).

Both depend on one number a row, the gap between the wrong classes' log-sum-exp and the right score,

    LDAM:   gap = log sum_{j != y} exp(s x_j) - s (x_y - m_y),   loss = softplus(gap)              Cao et al. (2019)
    focal:  gap = log sum_{j != y} exp(x_j) - x_y,               loss = (1 - p)^gamma softplus(gap)    Lin et al. (2017)

with 1 - p = sigmoid(gap), accurate however close p = p_y is to 0 or 1. With f the loss as a function of the gap, a
wrong class has the slope s f'(gap) q_j, q = softmax(s x) over the wrong classes, and y has -s f'(gap). Focal has

    f'(gap) = gamma (1 - p)^gamma p softplus(gap) + (1 - p)^(gamma + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from topk.losses.room import (
    Options,
    Room,
    Saved,
    SavedShape,
    centred,
    finite_or_zero,
    log_sum_exp,
    not_finite_above,
    scaled_exponentials,
    sum_exponentials,
    target_scores,
    wide_type,
)


def _saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    return (((rows, 3), None),)


def _gap(scores: Tensor, target: Tensor, margins: Tensor | float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gap (NaN in bad rows), the largest wrong score t, the sum of exp(scale (x - t)) over the wrong classes."""
    largest = scores.scatter(1, target[:, None], -torch.inf).amax(1)
    shift, x_target, wide = finite_or_zero(largest), target_scores(scores, target), wide_type(scores)
    total = sum_exponentials(scores, shift, target[:, None], scale).to(wide)
    lead = shift.to(wide) - x_target.to(wide) + margins
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


def _gap_formula(scores: Tensor, target: Tensor, margins: Tensor | float, scale: float) -> tuple[Tensor, Tensor]:
    """The gap, differentiable and never -inf, and whether y is impossible: then the loss grows like the gap."""
    scores = centred(scores)
    wrong = torch.ones_like(scores, dtype=torch.bool).scatter(1, target[:, None], False)
    x_target = target_scores(scores, target)
    impossible = x_target == -torch.inf
    gap = log_sum_exp(scale * scores, wrong) - scale * (torch.where(impossible, 0.0, x_target) - margins)
    return gap.clamp(min=torch.finfo(gap.dtype).min), impossible


def ldam_forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,) and the table of `_table`."""
    (scale,) = options
    gap, shift, total = _gap(scores, target, extras[0], scale)
    return softplus(gap, threshold=50.0).to(scores.dtype), _table(shift, total, scale * gap.sigmoid(), gap)


def ldam_backward(
    grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options
) -> Tensor:
    """grad * d loss / d scores: one exponential a class."""
    return _spread(grad, scores, target, saved[0], options[0])


def ldam_formula(scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """The loss a row by a masked log-sum-exp."""
    gap, impossible = _gap_formula(scores, target, extras[0], options[0])
    return torch.where(impossible, gap, softplus(gap, threshold=50.0))


def focal_forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,) and the table of `_table`."""
    (gamma,) = options
    gap, shift, total = _gap(scores, target, 0.0, 1.0)
    entropy, missed = softplus(gap, threshold=50.0), gap.sigmoid()
    fall = gamma * torch.where(gap == torch.inf, 0.0, (-gap).sigmoid() * entropy)
    factor = missed**gamma
    return (factor * entropy).to(scores.dtype), _table(shift, total, factor * (fall + missed), gap)


def focal_backward(
    grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options
) -> Tensor:
    """grad * d loss / d scores: one exponential a class."""
    return _spread(grad, scores, target, saved[0], 1.0)


def focal_formula(scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """The loss a row by a masked log-sum-exp."""
    gap, impossible = _gap_formula(scores, target, 0.0, 1.0)
    entropy = softplus(gap, threshold=50.0)
    log_missed = gap - entropy
    return torch.where(impossible, gap, (options[0] * log_missed).exp() * entropy)


LDAM = Room(
    name="ldam",
    options="float scale",
    extras=("margins",),
    saved=_saved,
    forward=ldam_forward,
    backward=ldam_backward,
    formula=ldam_formula,
)

FOCAL = Room(
    name="focal",
    options="float gamma",
    extras=(),
    saved=_saved,
    forward=focal_forward,
    backward=focal_backward,
    formula=focal_formula,
)
