r"""Soft top-k as a threshold and a distribution function (book, chapter "Soft top-k").

For a distribution function F, scores x and a temperature T, the mask is

    m_i = F((x_i - b) / T),        b such that m_1 + ... + m_n = k,        0 < k <= n, a whole number or not.

* "logistic": entropic optimal transport of the scores to the anchors 0 and 1 with regularisation 2 T (SOFT, Xie et al.
  2020), whose Sinkhorn iterations are the root of one increasing function;
* "sparse": F(z) = z on [0, 1], the Euclidean projection of x / T onto {0 <= m <= 1, sum m = k};
* "laplace": LapSum (Struski et al. 2025); "gaussian": the mean field of Gaussian noise;
* "fixed": logistic with b = (x_[k] + x_[k+1]) / 2 (DFTopK), whose masks do not sum to k.

The solver. Let Q be the inverse of F and S(b) the sum of the mask. Q(S(b) / n) - Q(k / n) is linear in b where all
scores are equal, and nearly so elsewhere: Newton's steps on it, from half-way between x_[k] and x_[k+1], need about
four steps. They are guarded by a bracket that does not depend on the scale of the scores: k + 1 scores are at least
x_[k+1], hence b >= x_[k+1] - T Q(k / (k+1)), and n - k + 1 are at most x_[k], hence b <= x_[k] - T Q(1 / (n-k+1)).

The derivative. With f_i = F'(z_i), z = (x - b) / T, and <f, 1> their sum, the implicit function theorem gives

    T db = (<f, dx> - <f, z> dT - T dk) / <f, 1>,

so that the Jacobian of the mask in x, (diag(f) - f f^T / <f, 1>) / T, is symmetric, and dm / dk = f / <f, 1>.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from topk import kernels
from topk._cpu import buffers, chunks, exponentials, squares
from topk.autograd import by_position, plain
from topk.backend import choose
from topk.operators.rows import LOWEST, Context, compiled, float_type, fold, order_statistics

_SQRT_2PI = math.sqrt(2.0 * math.pi)
_SOFT = 0.05  # the least share of the sum that its slope must be
_REACH = 16.0
"""Temperatures from b to the largest score: up to this, exponentials that count from that score are exact enough."""


Found = tuple[Tensor, Tensor]
"""anchor and (b - anchor) / T of every row."""


class Family(NamedTuple):
    """F, its density at z given m = F(z), its inverse, its variance, and how many Newton steps are always enough."""

    cdf: Callable[[Tensor], Tensor]
    density: Callable[[Tensor, Tensor], Tensor]
    quantile: Callable[[Tensor], Tensor]
    variance: float | None  # of the distribution; None where F is piecewise linear
    steps: int = 6

    @property
    def logistic(self) -> bool:
        """Whether F is the logistic function."""
        return self.cdf is torch.sigmoid


# Signs, not comparisons: to choose by a mask of booleans costs the CPU more than an exponential a class.


def _laplace_tail(z: Tensor) -> Tensor:
    return 0.5 * (-z.abs()).exp()


def _laplace_cdf(z: Tensor) -> Tensor:
    """The tail t, or 1 - t where z > 0: (1 + sign z) / 2 - t sign z."""
    sign = z.sign()
    return torch.addcmul(0.5 + 0.5 * sign, _laplace_tail(z), sign, value=-1.0)


def _laplace_quantile(p: Tensor) -> Tensor:
    return torch.where(p < 0.5, (2.0 * p).log(), -(2.0 - 2.0 * p).log())


def _normal_cdf(z: Tensor) -> Tensor:
    """torch's ndtr in float32 has no digits where F is small: an error of 3e-8, which n scores add up."""
    return torch.erfc(z * -math.sqrt(0.5)) * 0.5


FAMILIES = {
    "logistic": Family(torch.sigmoid, lambda z, m: torch.addcmul(m, m, m, value=-1.0), torch.logit, math.pi**2 / 3.0),
    "laplace": Family(_laplace_cdf, lambda z, m: _laplace_tail(z), _laplace_quantile, 2.0),
    "gaussian": Family(_normal_cdf, lambda z, m: (-0.5 * z * z).exp() / _SQRT_2PI, torch.special.ndtri, 1.0),
    "sparse": Family(
        lambda z: z.clamp(0.0, 1.0),
        lambda z, m: 1.0 - (z - z.clamp(0.0, 1.0)).abs().sign(),
        lambda p: p,
        None,
        steps=24,
    ),
}
METHODS = (*FAMILIES, "fixed")


def threshold_mask(
    scores: Tensor,  # (rows, n)
    k: float | Tensor,  # a number, or (rows,)
    temperature: Tensor,  # (rows,)
    method: str,
    backend: str | None = None,
    unit: bool = False,
) -> Tensor:
    """The mask (rows, n). `unit`: whether all temperatures are known to be 1."""
    if method == "fixed":
        count, n = int(k), scores.shape[1]
        level = scores.topk(min(count + 1, n), dim=1).values[:, count - 1 :].mean(1)
        possible, broken = scores > -torch.inf, ~((scores.detach().amax(1) < torch.inf) & (temperature > 0))
        level = torch.where((level == -torch.inf) | (count >= n), scores.detach().amin(1) + LOWEST, level)
        z = (scores - level[:, None]).masked_fill(~possible, LOWEST) / temperature[:, None]
        return torch.sigmoid(z) + torch.where(broken, torch.nan, 0.0)[:, None]
    return threshold(scores, k, temperature, method, backend, unit)[0]


def threshold(
    scores: Tensor, k: float | Tensor, temperature: Tensor, method: str, backend: str | None = None, unit: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The mask (rows, n), b - anchor and the anchor (rows,)."""
    kernel = choose(backend, scores.device, scores.dtype, "threshold") == "triton"
    known, goal = (Known(None, unit), k) if isinstance(k, Tensor) else (Known(k, unit), torch.full_like(temperature, k))
    mask, offset, anchor = (_Mask if compiled() else _ForwardMask).apply(
        scores, goal, temperature, known, method, kernel
    )
    return mask, offset, anchor


class Known(NamedTuple):
    """What need not be looked for: k, if it is the same number for all rows, and whether all temperatures are 1."""

    k: float | None = None
    unit: bool = False


def _solve(
    scores: Tensor,
    k: Tensor,
    temperature: Tensor,
    known: Known,
    method: str,
    kernel: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """anchor and (b - anchor) / T (rows,), +-inf or nearly so where it is settled; writes the mask, if one is given."""
    if kernel:
        anchor, level = kernels.of("threshold").forward(scores, k, temperature, method, mask)
        return anchor, level
    parts = list(chunks(scores))
    if len(parts) == 1:
        return _solve_chunk(Rows.of(scores, k, temperature, known, method, mask), mask)
    anchor, level = torch.empty_like(temperature), torch.empty_like(temperature)
    for part in parts:
        goal = None if mask is None else mask[part]
        rows = Rows.of(scores[part], k[part], temperature[part], known, method, goal)
        anchor[part], level[part] = _solve_chunk(rows, goal)
    return anchor, level


def _solve_chunk(rows: Rows, mask: Tensor | None) -> Found:
    found = _by_power_sums(rows)
    if found is None:
        found = _by_moments(rows) or _by_order(rows)
        if mask is not None:
            rows.move(found[1])
    return found[0], found[1].to(rows.scores.dtype)


@torch.library.custom_op("topk::threshold_level", mutates_args=())
def threshold_level(scores: Tensor, k: Tensor, temperature: Tensor, method: str, kernel: bool) -> tuple[Tensor, Tensor]:
    """anchor and (b - anchor) / T (rows,), without a derivative: one opaque step to a compiler."""
    return _solve(scores, k, temperature, Known(), method, kernel)


@threshold_level.register_fake
def _(scores: Tensor, k: Tensor, temperature: Tensor, method: str, kernel: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(temperature), torch.empty_like(temperature)


@threshold_level.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    return fold(threshold_level, info, in_dims, *arguments)


@by_position
class _Mask(Function):
    """m (rows, n) and b - anchor (rows,), differentiable, and the anchor (rows,), a constant near b."""

    @staticmethod
    def forward(
        scores: Tensor, k: Tensor, temperature: Tensor, known: Known, method: str, kernel: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if compiled():
            anchor, level = threshold_level(scores, k, temperature, method, kernel)
            u = (scores - anchor[:, None]).clamp(min=LOWEST) / temperature[:, None]
            mask = FAMILIES[method].cdf(u - level[:, None])
        else:
            mask = torch.empty_like(scores, memory_format=torch.contiguous_format)
            anchor, level = _solve(scores, k, temperature, known, method, kernel, mask)
        return mask, level if known.unit else level * temperature, anchor

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[2], *output)
        ctx.save_for_forward(inputs[0], inputs[2], *output)
        ctx.known, ctx.method, ctx.kernel = inputs[3:]

    @staticmethod
    def slopes(ctx: Context, *, with_z: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f and z (rows, n), the temperature and 1 / <f, 1> (rows, 1), the latter 0 where nothing moves."""
        scores, temperature, mask, offset, anchor = ctx.saved_tensors
        z = mask  # where neither the density nor the caller needs it
        if with_z or ctx.method != "logistic":
            z = ((scores - anchor[:, None]).clamp(min=LOWEST) - offset[:, None]) / temperature[:, None]
        density = FAMILIES[ctx.method].density(z, mask)
        total = density.sum(1, keepdim=True)
        moves = total > torch.finfo(total.dtype).tiny
        inverse = torch.where(moves, 1.0 / torch.where(moves, total, 1.0), 0.0)
        return density, z, temperature[:, None], inverse

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, grad_offset: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        density, z, temperature, inverse = _Mask.slopes(ctx, with_z=ctx.needs_input_grad[2])
        grad = torch.zeros_like(density) if grad is None else grad
        lead = 0.0 if grad_offset is None else grad_offset[:, None]
        share = (lead - torch.linalg.vecdot(density, grad)[:, None] / temperature) * inverse
        gradient = density * (grad / temperature + share)
        for_temperature = -(gradient * z).sum(1) if ctx.needs_input_grad[2] else None
        return gradient, -(share * temperature)[:, 0], for_temperature, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold((_Mask if compiled() else _ForwardMask).apply, info, in_dims, *arguments)


def _logistic_pull(
    grad: Tensor, grad_offset: Tensor | None, temperature: Tensor, mask: Tensor, unit: bool
) -> tuple[Tensor, Tensor]:
    """The gradients in the scores and in k, a chunk at a time: the density is m (1 - m)."""
    result, for_k = torch.empty_like(mask), torch.empty_like(temperature)
    tiny = torch.finfo(mask.dtype).tiny
    for part in chunks(mask):
        m = mask[part]
        density = torch.addcmul(m, m, m, value=-1.0, out=buffers(m, 1)[0])
        pull = torch.mul(density, grad[part], out=result[part])
        lead = 0.0 if grad_offset is None else _wide(grad_offset[part]) * _wide(temperature[part])
        total, pulled = _wide(density.sum(1)), _wide(pull.sum(1))
        with np.errstate(all="ignore"):
            share = np.where(total > tiny, (lead - pulled) / total, 0.0)
        steps = _narrow(share, mask)
        pull.addcmul_(density, steps[:, None])
        if not unit:
            pull.div_(temperature[part, None])
        torch.neg(steps, out=for_k[part])
    return result, for_k


class _ForwardMask(_Mask):
    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, grad_offset: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        scores, temperature, mask, offset, anchor = ctx.saved_tensors
        if grad is None or not plain(grad):
            return _Mask.backward(ctx, grad, grad_offset, _)
        if ctx.kernel:
            lead = torch.zeros_like(temperature) if grad_offset is None else grad_offset
            each = kernels.of("threshold").backward(grad, lead, scores, temperature, offset, anchor, ctx.method)
            return *each, None, None, None
        if ctx.method == "logistic" and grad.is_cpu and not ctx.needs_input_grad[2]:
            pulls = _logistic_pull(grad, grad_offset, temperature, mask, ctx.known.unit)
            return *pulls, None, None, None, None
        return _Mask.backward(ctx, grad, grad_offset, _)

    @staticmethod
    def jvp(ctx: Context, scores: Tensor | None, k: Tensor | None, temperature: Tensor | None, *_: Any) -> Any:
        density, z, scale, inverse = _Mask.slopes(ctx, with_z=temperature is not None)
        push = torch.zeros_like(z) if scores is None else scores
        if temperature is not None:
            push = push - z * temperature[:, None]
        level = (density * push).sum(1, keepdim=True)
        if k is not None:
            level = level - scale * k[:, None]
        level = level * inverse
        return density * (push - level) / scale, level[:, 0], None


class Rows(NamedTuple):
    """What the solver knows of some rows, and its work space: u is to become (x - anchor) / T, mass F(u - level)."""

    scores: Tensor
    k: Tensor
    temperature: Tensor
    known: Known
    family: Family
    mass: Tensor
    u: Tensor
    free: Tensor

    @staticmethod
    def of(scores: Tensor, k: Tensor, temperature: Tensor, known: Known, method: str, mask: Tensor | None) -> Rows:
        """With kept work space, and the masses written where the mask is wanted, if it is."""
        spaces = buffers(scores, 3) if mask is None else [mask, *buffers(scores, 2)]
        return Rows(scores, k, temperature, known, FAMILIES[method], *spaces)

    def standardize(self, anchor: Tensor) -> None:
        """Differences from a score near b keep their digits, whatever the offset and scale of all scores."""
        torch.sub(self.scores, anchor[:, None], out=self.u)
        if not self.known.unit:
            self.u.div_(self.temperature[:, None])

    def move(self, level: Tensor) -> None:
        """Brings the masses to a level, and `free` to u - level."""
        torch.sub(self.u, level.to(self.u.dtype)[:, None], out=self.free)
        torch.sigmoid(self.free, out=self.mass) if self.family.logistic else self.mass.copy_(self.family.cdf(self.free))

    def newton(self, level: Tensor, k: Tensor, aim: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next level, the sum S at this one, and how far off that is, in float64 where there is any."""
        n, family = self.u.shape[1], self.family
        self.move(level)
        total = self.mass.sum(1)
        slope = total - squares(self.mass) if family.logistic else family.density(self.free, self.mass).sum(1)
        total, slope = total.to(level.dtype), slope.to(level.dtype)
        share = total / n
        link = family.quantile(share)
        gain = n * family.density(link, share) / slope.clamp(min=torch.finfo(level.dtype).tiny)
        excess = (total - k).abs() / torch.minimum(k, n - k)
        # Where the sum's own rounding is all there is to see, a step would follow it.
        step = torch.where(excess <= 4.0 * torch.finfo(self.u.dtype).eps, 0.0, (link - aim) * gain)
        return level + step, total, excess if family.variance is None else torch.maximum(excess, step.abs())

    def settle(self, level: Tensor) -> Tensor | None:
        """The root in float64, by a few steps from a level near it; None unless every row's is found."""
        k = self.k.to(torch.float64)
        aim = self.family.quantile(k / self.u.shape[1])
        for _ in range(4):
            level, _, off = self.newton(level, k, aim)
            found = (off <= self.enough()) & (level.abs() < torch.inf) & (self.temperature > 0)
            if bool(found.all()):
                return level
        return None

    def enough(self) -> float:
        """An excess and a step whose squares do not count; where F is linear in pieces, an excess that is rounding."""
        eps = torch.finfo(self.u.dtype).eps
        return 4.0 * eps if self.family.variance is None else 2.0 * math.sqrt(eps)


def _by_power_sums(rows: Rows) -> Found | None:
    """What `_by_order` finds, and the masses there, for the logistic function; None if not found.

    Every exponential E = exp((x - max) / T) is taken once: m = E / (E + v) with v = exp((b - max) / T). The sums of E
    and of its square are those of c equal numbers e, which would need v = e (c - k) / k: close where few are chosen.
    Newton's steps in log v on log S are as good as linear there: with q = sum m^2 / S, the second derivative is at most
    q (1 - q) and the first 1 - q, so that a step leaves an error of about q / 2 times its square. How much q changes on
    the way is bounded, too: |d log q / d log v| <= 1 - q.
    """
    scores, u = rows.scores, rows.u
    if not scores.is_cpu or not rows.family.logistic or not len(scores):
        return None
    largest = scores.amax(1)
    rows.standardize(largest)
    exponentials(u, by_two=True)
    first, second = _sums(u)
    k = _wide(rows.k) if rows.known.k is None else rows.known.k
    with np.errstate(all="ignore"):
        level = np.log(first / k - second / first)  # of e (c - k) / k, with c = first^2 / second and e = second / first
        for _ in range(4):
            _divide(rows, level)
            total, square = _sums(rows.mass)
            share = square / total
            step = np.log(total / k) / (1.0 - share)
            level += step
            if not (np.abs(level).max() < _REACH and share.max() < 1.0 - _SOFT):
                return None
            if (share * np.exp(np.abs(step)) * step * step).max() <= rows.enough() ** 2:
                _divide(rows, level)
                highest, temperature = _wide(largest), 1.0 if rows.known.unit else _wide(rows.temperature)
                anchor = _narrow(highest + temperature * level, scores)  # near b: differences
                left = level - (_wide(anchor) - highest) / temperature  # from there keep their digits
                return anchor, _narrow(left, scores)
    return None


Numbers = np.ndarray[Any, np.dtype[np.float64]]
"""One a row, for numpy, whose calls cost a third of torch's."""


def _wide(numbers: Tensor) -> Numbers:
    return numbers.detach().numpy().astype(np.float64)


def _narrow(numbers: Numbers, like: Tensor) -> Tensor:
    return torch.from_numpy(numbers.astype(np.float64 if like.dtype is torch.float64 else np.float32))


def _sums(field: Tensor) -> tuple[Numbers, Numbers]:
    """The sums of a row's numbers and of their squares."""
    return _wide(field.sum(1)), _wide(squares(field))


def _divide(rows: Rows, level: Numbers) -> None:
    """The masses E / (E + v), with v the exponential of the level."""
    v = _narrow(np.exp(level), rows.u)
    torch.div(rows.u, torch.add(rows.u, v[:, None], out=rows.free), out=rows.mass)


def _by_moments(rows: Rows) -> Found | None:
    """What `_by_order` finds, from where b would be if the scores were normally distributed; None if not found.

    Where the temperature is not far below the scores' spread that is close, and saves the selection.
    """
    scores, temperature, family, u = rows.scores, rows.temperature, rows.family, rows.u
    if not scores.is_cpu or family.variance is None:
        return None
    first, n = scores[:, 0], scores.shape[1]
    torch.sub(scores, first[:, None], out=u)
    mean = u.mean(1)
    spread = (squares(u) / n - mean * mean) / family.variance
    aim = family.quantile(rows.k.to(torch.float64) / n)
    anchor = (first + mean - aim * (temperature * temperature + spread).sqrt()).to(scores.dtype)
    rows.standardize(anchor)
    level = rows.settle(torch.zeros_like(aim))
    return None if level is None else (anchor, level)


def _by_order(rows: Rows) -> Found:
    """anchor and (b - anchor) / T, from the bracket, and the level that the masses are at.

    What is settled without an equation comes out of it as such.
    """
    scores, k, temperature, known, family, _, u, *_ = rows
    n, wide = scores.shape[1], float_type(scores)
    upper, lower, largest = order_statistics(scores, k if known.k is None else known.k).unbind(1)
    anchor = torch.where(upper.isfinite(), upper, 0.0)
    full, empty = (lower == -torch.inf) | (k >= n), k <= 0
    broken = ~((k >= 0) & (k <= n) & (largest < torch.inf) & (temperature > 0))
    settled = full | empty | broken
    goal = torch.where(settled, 0.5, k).to(wide)
    drop = torch.where(settled, 0.0, (lower - upper) / temperature).to(wide)
    # A little wider than the bounds, since the root may lie on one.
    low = drop - family.quantile(goal / (goal.floor() + 1.0)) - 1e-3
    high = 1e-3 - family.quantile((goal - goal.ceil() + 1.0) / (n + 1.0 - goal.ceil()))
    level = (low + high) / 2.0 if family.variance is None else drop / 2.0
    aim = family.quantile(goal / n)
    rows.standardize(anchor)
    for _ in range(family.steps):
        step, total, off = rows.newton(level, goal, aim)
        low, high = torch.where(total > goal, level, low), torch.where(total < goal, level, high)
        inside = (step > low) & (step < high)
        there = off <= 64.0 * torch.finfo(u.dtype).eps
        level = torch.where(inside, step, torch.where(there, level, (low + high) / 2.0))
        if u.is_cpu and not bool((((off > rows.enough()) | ~(inside | there)) & ~settled).any()):
            break
    # A threshold below all scores but those of -inf chooses all of them, and one beyond them chooses none.
    far = LOWEST / temperature
    level = torch.where(full, far / 10.0, torch.where(empty, -10.0 * far, level.to(u.dtype)))
    return anchor, torch.where(broken, torch.nan, level)
