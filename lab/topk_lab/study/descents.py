"""Minimising many small functions at once: BFGS with one row a problem, for losses with and without corners.

The line search halves and doubles until the step lowers the value enough and the slope along it has risen (the weak
Wolfe conditions), which needs no second derivative and lets BFGS find its way along corners too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from topk_lab.figures import RowLoss, value_and_gradient
from topk_lab.study.contenders import expected

RowFunction = Callable[[Tensor, Tensor], Tensor]
"""(points (some rows, variables), which rows these are) -> values (some rows,)."""

_ENOUGH, _RISEN = 1e-4, 0.9  # the constants of the weak Wolfe conditions
_TRIALS = 10
_WORTH = 1e-9  # a step that lowers the value by less is none, relative above 1


@dataclass
class _State:
    point: Tensor
    value: Tensor
    gradient: Tensor
    inverse: Tensor  # (rows, variables, variables), the inverse Hessian as BFGS knows it


def minimise(function: RowFunction, start: Tensor, steps: int = 200, rest: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Local minima (rows, variables) and their values (rows,), from `start`.

    A row stops when its gradient is below `rest`, or when steps along two directions, BFGS's own and then the
    steepest, lower its value by next to nothing.
    """
    rows, variables = start.shape
    everyone = torch.arange(rows)
    eye = torch.eye(variables, dtype=start.dtype)
    value, gradient = _evaluate(function, start, everyone)
    state = _State(start.clone(), value, gradient, eye.repeat(rows, 1, 1))
    fresh = torch.ones(rows, dtype=torch.bool)  # whether the inverse Hessian is the unit matrix
    active = everyone[gradient.abs().amax(1) > rest]
    for _ in range(steps):
        if not len(active):
            break
        moved, stuck_afresh = _step(function, state, active, fresh, eye)
        resting = state.gradient[active].abs().amax(1) <= rest
        active = active[(moved | ~stuck_afresh) & ~resting]
    return state.point, state.value


def _evaluate(function: RowFunction, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    points = points.detach().requires_grad_()
    values = function(points, rows)
    (gradient,) = torch.autograd.grad(values.sum(), points)
    return values.detach(), gradient


def _step(function: RowFunction, state: _State, active: Tensor, fresh: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the active rows; which of them moved, and which did not although their direction was the steepest."""
    gradient, was_fresh = state.gradient[active], fresh[active].clone()
    direction = -torch.einsum("rij,rj->ri", state.inverse[active], gradient)
    uphill = (direction * gradient).sum(1) >= 0
    direction = torch.where(uphill[:, None], -gradient, direction)
    point, value, slope, moved = _line_search(function, state, active, direction)
    change, turn, before = point - state.point[active], slope - gradient, state.value[active].clone()
    state.point[active], state.value[active], state.gradient[active] = point, value, slope
    moved &= before - value > _WORTH * value.abs().clamp(min=1.0)
    curved = moved & ((change * turn).sum(1) > 1e-14 * change.norm(dim=1) * turn.norm(dim=1))
    state.inverse[active[curved]] = _updated(
        state.inverse[active[curved]], change[curved], turn[curved], was_fresh[curved], eye
    )
    state.inverse[active[~moved]] = eye
    fresh[active[curved]], fresh[active[~moved]] = False, True
    return moved, was_fresh


def _line_search(
    function: RowFunction, state: _State, active: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Point, value, gradient after the step, and whether there was one; bisection between too long and too short."""
    origin, before = state.point[active], state.value[active]
    along = (direction * state.gradient[active]).sum(1)
    low, high = torch.zeros_like(before), torch.full_like(before, torch.inf)
    length = torch.ones_like(before)
    point, value, gradient = origin.clone(), before.clone(), state.gradient[active].clone()
    moved = torch.zeros_like(before, dtype=torch.bool)
    todo = torch.arange(len(active))
    for _ in range(_TRIALS):
        trial = origin[todo] + length[todo, None] * direction[todo]
        found, slope = _evaluate(function, trial, active[todo])
        low_enough = found < before[todo] + _ENOUGH * length[todo] * along[todo]
        risen = (slope * direction[todo]).sum(1) > _RISEN * along[todo]
        better = low_enough & (found < value[todo])
        place = todo[better]
        point[place], value[place], gradient[place], moved[place] = trial[better], found[better], slope[better], True
        high[todo[~low_enough]] = length[todo[~low_enough]]
        low[todo[low_enough]] = length[todo[low_enough]]
        length = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        todo = todo[~(low_enough & risen)]
        if not len(todo):
            break
    return point, value, gradient, moved


def _updated(inverse: Tensor, change: Tensor, turn: Tensor, fresh: Tensor, eye: Tensor) -> Tensor:
    """BFGS: (1 - r s y') H (1 - r y s') + r s s'; a fresh H is first scaled to the curvature just seen."""
    product = (change * turn).sum(1)
    scale = torch.where(fresh, product / turn.square().sum(1), 1.0)
    left = eye - torch.einsum("ri,rj->rij", change, turn) / product[:, None, None]
    outer = torch.einsum("ri,rj->rij", change, change) / product[:, None, None]
    return left @ (inverse * scale[:, None, None]) @ left.mT + outer


def subgradient_descent(
    loss: RowLoss, q: Tensor, starts: int = 12, steps: int = 1500, seed: int = 4
) -> tuple[float, Tensor]:
    """The least expected loss at q (classes,) over many descents with shrinking steps, and the scores it has there."""
    classes = len(q)
    scores = torch.randn(starts, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[0] = 0
    best, where = torch.full((starts,), torch.inf, dtype=torch.float64), scores.clone()
    for step in range(steps):
        value, gradient = value_and_gradient(lambda x, _: expected(loss, x, q), scores, q)
        better = value < best
        best, where = torch.where(better, value, best), torch.where(better[:, None], scores, where)
        scores = scores - 0.5 / (1 + step / 30) * gradient
    return best.min().item(), where[best.argmin()]
