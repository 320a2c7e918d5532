r"""The subset distribution: k of n at random, likelier where scores are higher (book, chapter "Subsets").

    Pr[S] = exp(sum over S of x / T) / e_k(exp(x / T)),        S among all subsets of k elements.

Its inclusion probabilities pi_i = Pr[i in S], the gradient of T log e_k, are the soft top-k of greatest entropy, and
their Jacobian is the covariance of the indicators over T. Both come from one polynomial, as in chapter 10. With
w_i = exp(x_i / T - level), P_i = w_i / (1 + w_i) and the polynomial A(z) = prod(1 - P_i + P_i z) of probabilities,

    pi_i = w_i alpha_{k-1} / A_k,        A(z) = (1 + w_i z) alpha(z),

for every level. We take the one with sum P = k, the threshold of the logistic mask: then A peaks at k. Where w <= 1 the
division alpha_j = A_j - w alpha_{j-1} amplifies no error. That leaves 2 k scores at most, the head: there the factors
before and the factors behind are multiplied, which adds positive numbers only.

The derivative along v is the same calculation on dual numbers, w_i having the derivative w_i v_i: polynomials carry a
second row. It is symmetric, so one function serves as jvp and as vjp; and it is plain torch, so it has derivatives.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl
from torch.nn.functional import pad, softplus

from topk._cpu import largest
from topk.arguments import REDUCTIONS, check_choice, check_ignore_index
from topk.losses.polynomials import product
from topk.operators.rows import (
    LOWEST,
    Constant,
    Context,
    RowFunction,
    as_rows,
    check_k,
    check_scores,
    check_temperature,
    compiled,
    float_type,
    hard_mask,
    per_row,
)
from topk.operators.threshold import threshold_level

POWER_SUM_LIMIT = 8
"""Up to this k Newton's identities are used for the value: beyond it their cancellation shows in float32."""

_WIDE_BELOW = 32  # factors, from which on their products are taken in float64
_SETTLED, _BROKEN = 1.0, 2.0


# --- polynomials of dual numbers: (1 or 2, degree + 1, rows, ...) ----------------------------------------------------


def _dual_product(left: Tensor, right: Tensor) -> Tensor:
    """Truncated to the length of `right`."""
    value = product(left[0], right[0])
    if left.shape[0] == 1:
        return value[None]
    return torch.stack((value, product(left[0], right[1]) + product(left[1], right[0])))


def _tree(factors: Tensor, degree: int) -> Tensor:
    """The product over the last axis of linear factors (1 or 2, 2, rows, n), to this degree, padded with zeros."""
    wide = float_type(factors)
    while factors.shape[-1] > 1:
        if factors.shape[-1] <= _WIDE_BELOW:
            factors = factors.to(wide)
        half, longer = factors.shape[-1] // 2, min(2 * factors.shape[1] - 1, degree + 1)
        grown = pad(factors, (0, 0, 0, 0, 0, longer - factors.shape[1]))
        pairs = _dual_product(factors[..., :half], grown[..., half : 2 * half])
        factors = torch.cat((pairs, grown[..., 2 * half :]), -1)
    result = factors[..., 0].to(wide)
    return pad(result, (0, 0, 0, degree + 1 - result.shape[1]))


def _with_factor(polynomial: Tensor, factor: Tensor) -> Tensor:
    """Times the linear factor (1 or 2, 2, rows)."""
    shifted = pad(polynomial[:, :-1], (0, 0, 1, 0))
    value = polynomial * factor[:1, :1] + shifted * factor[:1, 1:]
    if factor.shape[0] == 1:
        return value
    return torch.stack((value[0], value[1] + shifted[0] * factor[1, 1]))


def _up_to(polynomial: Tensor, k: Tensor) -> Tensor:
    """The coefficients moved so that the k-th of every row comes last, zeros before."""
    place = torch.arange(polynomial.shape[1], device=k.device)[:, None] + (k - polynomial.shape[1] + 1)
    moved = polynomial.gather(1, place.clamp(min=0).expand_as(polynomial))
    return torch.where(place < 0, 0.0, moved)


def _factors(u: Tensor, v: Tensor | None) -> Tensor:
    """1 - P + P z (1 or 2, 2, ...), from u = log w."""
    success = torch.sigmoid(u)
    value = torch.stack((torch.sigmoid(-u), success))
    return value[None] if v is None else torch.stack((value, torch.stack((torch.zeros_like(u), success * v))))


def _inclusion(u: Tensor, v: Tensor | None, k: Tensor, index: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """pi (rows, n), or its derivative along v, and log e_k(w) (rows,); u = log w."""
    head = u.gather(1, index)
    head_factors = _factors(head, None if v is None else v.gather(1, index)).to(float_type(u))
    tail = u.scatter(1, index, -torch.inf)
    if v is None and most <= POWER_SUM_LIMIT:
        odds = tail.exp_()
        behind, scale = _from_power_sums(odds, most), torch.zeros_like(u[:, 0])
    else:
        behind, scale = _tree(_factors(tail, v), most), softplus(tail, threshold=40.0).sum(1)
        odds = tail.exp()
    one = torch.zeros_like(behind)
    one[0, 0] = 1.0
    before = [one + 0.0 * behind]  # as many dimensions as `behind` has under vmap
    for factor in head_factors[..., :-1].unbind(-1):
        before.append(_with_factor(before[-1], factor))
    left_out = []
    for i in range(index.shape[1] - 1, -1, -1):
        other = pad(_up_to(behind, k), (0, 0, 1, 0))[:, :-1].flip(1)
        pairs = before[i][:1] * other
        value = pairs.sum(1)
        if v is not None:
            value = torch.stack((value[0], value[1] + (before[i][1] * other[0]).sum(0)))
        left_out.append(value)
        behind = _with_factor(behind, head_factors[..., i])
    at_head = torch.stack(left_out[::-1], -1)  # (1 or 2, rows, size): Pr[k - 1 of the others succeed]
    full = _up_to(behind, k)
    chance = torch.where(full[0, -1] > 0, full[0, -1], 1.0)
    full = full / chance
    log_sum = chance.log().to(u.dtype) + softplus(head, threshold=40.0).sum(1) + scale
    at_head = (at_head * (head_factors[0, 1] / chance[:, None])).to(u.dtype)
    coefficients = full[:, :-1, :, None].to(u.dtype)
    alpha = coefficients[0, 0].expand_as(odds)
    if v is None:
        alpha = alpha.clone()
        for coefficient in coefficients[0, 1:].unbind(0):
            torch.addcmul(coefficient, alpha, odds, value=-1.0, out=alpha)
        return alpha.mul_(odds).scatter_(1, index, at_head[0]), log_sum
    moved = odds * v
    slope = coefficients[1, 0].expand_as(odds)
    for value, derivative in zip(coefficients[0, 1:].unbind(0), coefficients[1, 1:].unbind(0), strict=True):
        slope = derivative - odds * slope - moved * alpha
        alpha = value - odds * alpha
    drift = full[1, -1, :, None].to(u.dtype)
    at_tail = moved * alpha + odds * slope - odds * alpha * drift
    of_head = at_head[0] * (v.gather(1, index) - drift) + at_head[1]
    return at_tail.scatter(1, index, of_head), log_sum


def _from_power_sums(odds: Tensor, degree: int) -> Tensor:
    """prod(1 + w z) (1, degree + 1, rows) by Newton's identities, e_m the mean of (-1)^(i-1) e_{m-i} p_i, i = 1..m."""
    power, sums = odds.clone(), [odds.sum(1)]
    for _ in range(1, degree):
        sums.append(power.mul_(odds).sum(1))
    signed = [(-1) ** i * each.to(float_type(odds)) for i, each in enumerate(sums)]
    products = [torch.ones_like(signed[0])]
    for m in range(1, degree + 1):
        products.append(torch.stack([signed[i] * products[m - 1 - i] for i in range(m)]).mean(0))
    return torch.stack(products)[None]


# --- mask and log e_k ------------------------------------------------------------------------------------------------


class _Plan(Constant):
    """Of every row the pivot and 0, _SETTLED or _BROKEN (rows, 2), and the head's places (rows, size)."""

    @staticmethod
    def forward(scores: Tensor, k: Tensor, temperature: Tensor, most: int) -> tuple[Tensor, Tensor]:
        n = scores.shape[1]
        anchor, level = threshold_level(scores, k.to(scores.dtype), temperature, "logistic")
        settled = (level.abs() > abs(LOWEST / 20) / temperature).to(scores.dtype)
        size = min(2 * most, n)
        index = scores.topk(size, dim=1).indices if compiled() else largest(scores, size)[1]
        broken = level.isnan()
        status = torch.where(broken, _BROKEN, settled * _SETTLED)
        return torch.stack((anchor + torch.where(status > 0, 0.0, level) * temperature, status), 1), index

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _Plan.fold(info, in_dims, *arguments)


class _Subset(RowFunction):
    """pi (rows, n) and log e_k(exp u) (rows,), from u (rows, n) less the level: both differentiable."""

    @staticmethod
    def forward(u: Tensor, k: Tensor, status: Tensor, index: Tensor, most: int) -> tuple[Tensor, Tensor]:
        mask, total = _inclusion(u, None, k, index, most)
        if compiled() or not u.is_cpu or bool((status != 0).any()):
            chosen = (u > LOWEST / 2) & (k > 0)[:, None]
            settled, broken = status == _SETTLED, torch.where(status == _BROKEN, torch.nan, 0.0)
            mask = torch.where(settled[:, None], chosen.to(u.dtype), mask) + broken[:, None]
            total = torch.where(settled, torch.where(chosen, u, 0.0).sum(1), total) + broken
        return mask, total

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        u, k, status, index, ctx.most = inputs
        ctx.save_for_backward(u, k, status, index, output[0])
        ctx.save_for_forward(u, k, status, index, output[0])

    @staticmethod
    def along(ctx: Context, v: Tensor) -> Tensor:
        u, k, status, index, _ = ctx.saved_tensors
        derivative = _inclusion(u, v, k, index, ctx.most)[0]
        return torch.where((status == _SETTLED)[:, None], 0.0, derivative)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        result = None if grad is None else _Subset.along(ctx, grad)
        if grad_total is not None:
            direct = ctx.saved_tensors[4] * grad_total[:, None]
            result = direct if result is None else result + direct
        return result, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return (_Subset if compiled() else _ForwardSubset).fold(info, in_dims, *arguments)


class _ForwardSubset(_Subset):
    @staticmethod
    def jvp(ctx: Context, u: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _Subset.along(ctx, u), (ctx.saved_tensors[4] * u).sum(1)


def subset_mask(
    scores: Tensor,  # (rows, n)
    k: Tensor,  # (rows,), whole numbers
    temperature: Tensor,  # (rows,)
    most: int,  # the largest k
) -> tuple[Tensor, Tensor, Tensor]:
    """pi (rows, n), u = (x - pivot) / T (rows, n) and log e_k(exp u) (rows,), the pivot being where P is 1/2."""
    plan, index = _Plan.of(scores, k, temperature, most)
    pivot, status = plan.unbind(1)
    u = (scores - pivot[:, None]).clamp(min=LOWEST) / temperature[:, None]
    mask, total = (_Subset if compiled() else _ForwardSubset).apply(u, k, status, index, most)
    return mask, u, total


# --- the distribution ------------------------------------------------------------------------------------------------


class _KHot(constraints.Constraint):
    """Vectors of zeros and exactly k ones."""

    is_discrete = True
    event_dim = 1

    def __init__(self, k: int) -> None:
        self.k = k
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return ((value == 0) | (value == 1)).all(-1) & (value.sum(-1) == self.k)


class KSubset(Distribution):
    r"""k of n elements at random, Pr[S] proportional to exp(sum over S of scores / temperature).

    A sample is a vector of zeros and k ones. Elements with a score of -inf are never in it.

    Args:
        scores: (..., n), any floating-point type; half types are computed in float32.
        k: how many, from 1 to n, and at most as many as there are finite scores.
        temperature: > 0, a number or a tensor that broadcasts to the batch shape.
        validate_args: as in every distribution of torch.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"scores": constraints.independent(constraints.real, 1)}
    has_rsample = True
    has_enumerate_support = True

    def __init__(
        self, scores: Tensor, k: int, temperature: float | Tensor = 1.0, validate_args: bool | None = None
    ) -> None:
        check_scores(scores, -1)
        check_k(k, scores.shape[-1], whole=True)
        check_temperature(temperature)
        self.scores, self.k = scores, k
        self.temperature = per_row("temperature", temperature, scores, -1).view(scores.shape[:-1])
        super().__init__(scores.shape[:-1], scores.shape[-1:], validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> KSubset:
        """The same distribution for a larger batch."""
        new: KSubset = self._get_checked_instance(KSubset, _instance)  # type: ignore[no-untyped-call]
        shape = torch.Size(batch_shape)
        new.scores, new.k = self.scores.expand(*shape, *self.event_shape), self.k
        new.temperature = self.temperature.expand(shape)
        super(KSubset, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Vectors of zeros and k ones."""
        return _KHot(self.k)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """pi and u (..., n), log e_k(exp u) (...)."""
        rows = as_rows(self.scores, -1)
        count = torch.full_like(rows[:, 0], self.k).to(torch.int64)
        mask, u, total = subset_mask(rows, count, self.temperature.reshape(-1), self.k)
        return mask.view(self.scores.shape), u.view(self.scores.shape), total.view(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """The inclusion probabilities: the soft top-k mask of greatest entropy."""
        return self._parts()[0]

    @property
    def variance(self) -> Tensor:
        """Of every element's indicator."""
        mean = self.mean
        return mean * (1.0 - mean)

    @property
    def mode(self) -> Tensor:
        """The k largest scores, of equal ones those that come first."""
        return hard_mask(as_rows(self.scores, -1), self.k).view(self.scores.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log Pr of a set, as a vector of zeros and k ones."""
        if self._validate_args:
            self._validate_sample(value)
        _, u, total = self._parts()
        log_prob = torch.where(value != 0, u * value, 0.0).sum(-1) - total
        return torch.where(log_prob < LOWEST / 2, -torch.inf, log_prob)

    def entropy(self) -> Tensor:
        """log e_k - <mean, scores / temperature>."""
        mask, u, total = self._parts()
        return total - (mask * u).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent trials with sum P = k, tried again until k of them succeed: within a few tries, on average."""
        shape = self._extended_shape(torch.Size(sample_shape))
        _, u, _ = self._parts()
        chance = torch.sigmoid(u).expand(shape).reshape(-1, shape[-1])
        mode = self.mode.expand(shape).reshape(-1, shape[-1])
        open_ended = ((chance > 0) & (chance < 1)).any(1) & (mode.sum(1) == self.k)
        result = mode + 0.0 * u.expand(shape).reshape(-1, shape[-1])  # a NaN row stays one
        waiting = open_ended.nonzero()[:, 0]
        while len(waiting):
            drawn = torch.rand_like(chance[waiting]) < chance[waiting]
            fits = drawn.sum(1) == self.k
            result[waiting[fits]] = drawn[fits].to(result.dtype)
            waiting = waiting[~fits]
        return result.view(shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A sample with the gradient of the mean: the straight-through estimator of SIMPLE (Ahmed et al. 2023)."""
        mean = self.mean
        return self.sample(sample_shape) + (mean - mean.detach())

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All n choose k vectors (count, ..., n)."""
        n = self.event_shape[0]
        places = torch.tensor(list(itertools.combinations(range(n), self.k)), device=self.scores.device)
        values = torch.zeros(len(places), n, dtype=self.mode.dtype, device=self.scores.device)
        values = values.scatter_(1, places, 1.0).view(-1, *(1,) * len(self.batch_shape), n)
        return values.expand(-1, *self.batch_shape, n) if expand else values


@register_kl(KSubset, KSubset)  # type: ignore[untyped-decorator]
def _kl(p: KSubset, q: KSubset) -> Tensor:
    if p.event_shape != q.event_shape:
        raise ValueError(f"p and q must choose from as many elements, got {p.event_shape[0]} and {q.event_shape[0]}")
    mask, u, total = p._parts()
    if p.k != q.k:
        return torch.full_like(total, torch.inf)
    _, other, other_total = q._parts()
    divergence = (mask * (u - other)).sum(-1) - total + other_total
    return torch.where(divergence > -LOWEST / 2, torch.inf, divergence)


def subset_loss(
    scores: Tensor,
    khot: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int = -1,
    ignore_index: int = -100,
    reduction: str = "mean",
    largest_k: int | None = None,
) -> Tensor:
    r"""-log Pr[S = the given set] under ``KSubset``: a loss for targets of several right classes.

    With k the number of ones of the row and e_k the elementary symmetric polynomial,

    .. math:: \ell = \log e_k(e^{x / T}) - \sum_{i \in S} x_i / T,

    whose gradient is (mask - khot) / T, the mask being ``soft_topk(scores, k, temperature=T)``. A row without a one has
    loss 0, and so has one of ones only. k = 1 is cross-entropy.

    Args:
        scores: any shape and floating-point type; the loss of half types is computed and returned in float32.
        khot: zeros and ones of the same shape, any type.
        temperature: > 0, a number or a tensor that broadcasts to the scores without ``dim``.
        dim: where the classes are.
        ignore_index: a row with this value anywhere in ``khot`` gives 0 and no gradient, and the mean is without it.
        reduction: "mean", "sum" or "none".
        largest_k: an upper bound of k, so that nothing need look at ``khot``: on devices, and in torch.compile.
    """
    check_scores(scores, dim)
    if not isinstance(khot, Tensor) or khot.shape != scores.shape:
        got = tuple(khot.shape) if isinstance(khot, Tensor) else type(khot).__name__
        raise ValueError(f"khot must be a Tensor of the scores' shape {tuple(scores.shape)}, got {got}")
    check_temperature(temperature)
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_ignore_index(ignore_index)
    rows, chosen = as_rows(scores, dim), khot.movedim(dim, -1).reshape(-1, scores.shape[dim])
    ignored = (chosen == ignore_index).any(1)
    chosen = torch.where(ignored[:, None], 0, chosen) != 0
    if largest_k is None:
        largest_k = max(1, int(chosen.sum(1).max())) if len(chosen) else 1
    else:
        check_k(largest_k, scores.shape[dim], whole=True)
    rows = torch.where(ignored[:, None], 0.0, rows)
    _, u, total = subset_mask(rows, chosen.sum(1), per_row("temperature", temperature, scores, dim), largest_k)
    lost = (chosen & (rows == -torch.inf)).any(1)
    loss = torch.where(lost, torch.inf, total - torch.where(chosen, u, 0.0).sum(1))
    if reduction == "none":
        return loss.view(scores.movedim(dim, -1).shape[:-1])
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum()
