"""The noised top-k calibrated hinge of Garcin, Servajean, Joly and Salmon (2022); book, chapter 7.

With Z standard normal, one independent draw a class, and x_[j] the j-th largest score,

    loss = relu(scale (m_y + E[(x + epsilon Z)_[k+1]] - x_y)).

The expectation is taken in one of three ways:

* epsilon = 0: it is x_[k+1], the calibrated hinge;
* a number of samples: the mean over that many draws (`noised_sampling`), whose gradient puts 1/samples on the class
  that is (k+1)-th in each draw, so that these indices are all that is saved;
* samples = None: by quadrature, exact to far below the rounding of float32 (`noised_quadrature`).

Several k share one draw, or have a grid each. The op is a function of its inputs: noise comes from the extra `seeds`,
one for each of as many equal groups of rows, so that a vmap, which folds its examples into groups, stays right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from topk.losses.noised_quadrature import expected_order, expected_order_formula, expected_order_gradient
from topk.losses.noised_sampling import centre, sampled_orders
from topk.losses.room import Options, Room, Saved, SavedShape, not_finite_above, target_scores, wide_type
from topk.losses.selection import ordered_topk


class _Settings(NamedTuple):
    """The room's options by name."""

    ks: list[int]
    weights: list[float]
    epsilon: float
    samples: int | None
    scale: float

    @property
    def by_quadrature(self) -> bool:
        return self.samples is None and self.epsilon > 0

    @property
    def draws(self) -> int:
        """How many indices a row and k are kept: without noise, all draws are the same one."""
        return 1 if self.samples is None or self.epsilon == 0 else self.samples


def _saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    settings = _Settings(*options)
    count = len(settings.ks)
    how = ((rows, count, 3), torch.float64) if settings.by_quadrature else ((rows, settings.draws, count), torch.int64)
    return ((rows, count), torch.float64), how


def forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the hinges' slopes (rows, ks), and the grids (rows, ks, 3) or the indices (rows, draws, ks)."""
    margins, seeds = extras
    settings = _Settings(*options)
    rows, classes = scores.shape
    if not settings.ks:
        empty = [scores.new_zeros(shape, dtype=dtype) for shape, dtype in _saved(rows, classes, options)]
        return scores.new_zeros(rows), *empty
    largest, middle, rise, kept = _smoothed_order(scores, seeds, settings)
    x_target = target_scores(scores, target)
    # Where there is no (k+1)-th score the rise is -inf, and so is the gap, or NaN if y is impossible as well.
    gap = margins.to(rise.dtype)[:, None] + ((middle.to(rise.dtype) - x_target[:, None]) + rise)
    bad, impossible = not_finite_above(largest), x_target == -torch.inf
    rates = settings.scale * torch.tensor(settings.weights, dtype=rise.dtype, device=scores.device)
    loss = (gap.relu() * rates).sum(1).masked_fill(impossible, torch.inf).masked_fill(bad, torch.nan)
    slope = ((gap > 0) * rates).masked_fill(bad[:, None], torch.nan)
    return loss.to(scores.dtype), slope.to(torch.float64), kept


def _smoothed_order(scores: Tensor, seeds: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest score (rows,), `centre` and E[(x + epsilon Z)_[k+1]] less it (rows, ks), and what to save."""
    ks, depth = settings.ks, max(settings.ks) + 1
    if not settings.by_quadrature and settings.epsilon > 0:
        return sampled_orders(scores, seeds, ks, settings.epsilon, settings.draws)
    order, index = ordered_topk(scores, depth)
    middle = centre(order[:, ks])
    if settings.by_quadrature:
        return order[:, 0], middle, *expected_order(scores, order, middle, ks, settings.epsilon)
    rise = order[:, ks].to(wide_type(scores)) - middle.to(wide_type(scores))
    return order[:, 0], middle, rise, index[:, None, ks]


def backward(grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """grad * d loss / d scores: -slope on y, and slope spread over the classes that may be (k+1)-th."""
    settings = _Settings(*options)
    slope, kept = saved
    wide = wide_type(scores)
    slope = slope.to(wide)
    push = (grad.to(wide)[:, None] * slope).masked_fill(slope == 0, 0.0)
    result = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    if settings.ks:
        result = _broken_rows_to_nan(result, slope[:, 0])
    if settings.by_quadrature:
        for place, k in enumerate(settings.ks):
            expected_order_gradient(result, push[:, place], scores, kept[:, place], k, settings.epsilon)
    else:
        spread = (push / kept.shape[1])[:, None, :].expand(kept.shape).flatten(1)
        result.scatter_add_(1, kept.flatten(1), spread.to(scores.dtype))
    pull = push.sum(1).masked_fill(target_scores(scores, target) == -torch.inf, 0.0)
    return result.scatter_add_(1, target[:, None], -pull.to(scores.dtype)[:, None])


def _broken_rows_to_nan(result: Tensor, slope: Tensor) -> Tensor:
    """A row with NaN or +inf has a NaN slope, and a NaN gradient everywhere."""
    broken = slope.isnan()
    if result.is_cpu and not bool(broken.any()):
        return result
    return result.masked_fill_(broken[:, None], torch.nan)


def formula(scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """The loss a row up to a constant: the hinges' slopes are given, and so is which class is (k+1)-th."""
    settings = _Settings(*options)
    slope, kept = saved[0].to(scores.dtype), saved[1]
    x_target = target_scores(scores, target)
    x_target = torch.where(x_target == -torch.inf, 0.0, x_target)
    loss = torch.zeros_like(x_target)
    for place, k in enumerate(settings.ks):
        if settings.by_quadrature:
            level = expected_order_formula(scores, kept[:, place], k, settings.epsilon)
        else:
            level = scores.gather(1, kept[:, :, place]).mean(1)
        silent = slope[:, place] == 0
        loss = loss + torch.where(silent, 0.0, slope[:, place] * (torch.where(silent, 0.0, level) - x_target))
    return loss


NOISED = Room(
    name="noised",
    options="int[] ks, float[] weights, float epsilon, int? samples, float scale",
    extras=("margins", "seeds"),
    saved=_saved,
    forward=forward,
    backward=backward,
    formula=formula,
)
