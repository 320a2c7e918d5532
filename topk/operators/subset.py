r"""The subset distribution: k of n at random, likelier where scores are higher (book, chapter "Subsets").

    Pr[S] = exp(sum over S of x / T) / e_k(exp(x / T)),        S among all subsets of k elements.

Its inclusion probabilities pi_i = Pr[i in S], the gradient of T log e_k, are the soft top-k of greatest entropy, and
their Jacobian is the covariance of the indicators over T. Both come from one polynomial, as in chapter 10. With
w_i = exp(x_i / T - level), P_i = w_i / (1 + w_i) and the polynomial A(z) = prod(1 - P_i + P_i z) of probabilities,

    pi_i = w_i alpha_{k-1} / A_k,        A(z) = (1 + w_i z) alpha(z),

for every level. We take the one with sum P = k, the threshold of the logistic mask: then A peaks at k. Where w <= 1 the
division alpha_j = A_j - w alpha_{j-1} amplifies no error. That leaves 2 k scores at most, the head: there the factors
before and the factors behind are multiplied, which adds positive numbers only.

Up to k = POWER_SUM_LIMIT the value needs no threshold on the CPU: the level is the k-th score, and the polynomial of
the tail comes from power sums, as in the smooth loss.

The derivative along v is the same calculation on dual numbers, w_i having the derivative w_i v_i: polynomials carry a
second row. It is symmetric, so one function serves as jvp and as vjp; and it is plain torch, so it has derivatives.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributions import Distribution, constraints, register_kl
from torch.nn.functional import pad, softplus

from topk import kernels
from topk._cpu import CHUNK, SMALLEST, buffers, chunks, exponentials, largest
from topk.arguments import REDUCTIONS, check_choice, check_ignore_index
from topk.backend import choose
from topk.losses import polynomials
from topk.losses.common import largest_classes
from topk.losses.polynomials import product
from topk.losses.smooth import POWER_SUM_LIMIT, _left_out, _newton_identities, _with_head
from topk.operators.rows import (
    LOWEST,
    Context,
    as_rows,
    check_k,
    check_scores,
    check_temperature,
    compiled,
    float_type,
    fold,
    hard_mask,
    per_row,
    plain,
)
from topk.operators.threshold import threshold_level, threshold_mask

_WIDE_BELOW = 32  # factors, from which on their products are taken in float64
_SETTLED, _BROKEN = 1.0, 2.0


# --- polynomials of dual numbers: (1 or 2, degree + 1, rows, ...) ----------------------------------------------------


def _dual_product(left: Tensor, right: Tensor) -> Tensor:
    """Truncated to the length of `right`."""
    value = product(left[0][:, None], right.transpose(0, 1)).transpose(0, 1)
    if left.shape[0] == 1:
        return value
    return torch.stack((value[0], value[1] + product(left[1], right[0])))


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


def _tail(u: Tensor, v: Tensor | None, degree: int) -> Tensor:
    """The product over all elements of 1 - P + P z (1 or 2, degree + 1, rows), u = log w."""
    if not (u.is_cpu and len(u) and plain(u) and (v is None or plain(v))):
        return _tree(_factors(u, v), degree)
    parts = [_in_lanes(u[part], None if v is None else v[part], degree) for part in chunks(u)]
    return torch.cat(parts, 2)


def _in_lanes(u: Tensor, v: Tensor | None, degree: int) -> Tensor:
    """The same by a recursion over lanes of elements, then the product of the lanes: few calls, in cache."""
    rows, n = u.shape
    lanes = polynomials.lanes_for(rows, n, degree)
    steps = -(-n // lanes)

    def dealt(field: Tensor) -> Tensor:
        return pad(field, (0, lanes * steps - n)).view(rows, lanes, steps).permute(2, 1, 0).contiguous()

    success = torch.sigmoid(u)
    trials = dealt(success)
    if v is None:
        return polynomials.success_counts(trials, degree, float_type(u))[None]
    now = u.new_zeros((2, degree + 2, lanes, rows))  # one row of zeros above the constants
    now[0, 1] = 1.0
    then = torch.zeros_like(now)
    for trial, move in zip(trials.unbind(0), dealt(success * v).unbind(0), strict=True):
        torch.lerp(now[:, 1:], now[:, :-1], trial, out=then[:, 1:])
        then[1, 1:].addcmul_(now[0, :-1], move)
        now, then = then, now
    merged = now[:, 1:].to(float_type(u))
    while merged.shape[2] > 1:
        half = merged.shape[2] // 2
        pairs = _dual_product(merged[:, :, :half], merged[:, :, half : 2 * half])
        merged = torch.cat((pairs, merged[:, :, 2 * half :]), 2)
    return merged[:, :, 0]


def _with_factor(polynomial: Tensor, factor: Tensor, *, falling: bool = False) -> Tensor:
    """Times the linear factor (1 or 2, 2, rows); `falling`: the highest coefficient comes first."""
    shifted = pad(polynomial[:, 1:], (0, 0, 0, 1)) if falling else pad(polynomial[:, :-1], (0, 0, 1, 0))
    value = torch.addcmul(polynomial * factor[:1, :1], shifted, factor[:1, 1:])
    if factor.shape[0] == 1:
        return value
    return torch.stack((value[0], torch.addcmul(value[1], shifted[0], factor[1, 1])))


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
    """pi (rows, n) and log e_k(w) (rows,), u = log w, or the derivatives of both along v."""
    head = u.gather(1, index)
    head_factors = _factors(head, None if v is None else v.gather(1, index)).to(float_type(u))
    tail = u.scatter(1, index, -torch.inf)
    odds = tail.exp()
    behind = _up_to(_tail(tail, v, most), k).flip(1)  # from the k-th coefficient down
    first = torch.zeros_like(behind[:, :-1])
    first[0, 0] = 1.0
    before = [first + 0.0 * behind[:, :-1]]  # as many dimensions as `behind` has under vmap
    for factor in head_factors[..., :-1].unbind(-1):
        before.append(_with_factor(before[-1], factor))
    left_out = []
    for i in range(index.shape[1] - 1, -1, -1):
        others = (before[i] * behind[:1, 1:]).sum(1)
        if v is not None:
            others = torch.stack((others[0], others[1] + (before[i][0] * behind[1, 1:]).sum(0)))
        left_out.append(others)
        behind = _with_factor(behind, head_factors[..., i], falling=True)
    at_head = torch.stack(left_out[::-1], -1)  # (1 or 2, rows, size): Pr[k - 1 of the others succeed]
    full = behind.flip(1)
    chance = torch.where(full[0, -1] > 0, full[0, -1], 1.0)
    full = full / chance
    at_head = (at_head * (head_factors[0, 1] / chance[:, None])).to(u.dtype)
    coefficients = full[:, :-1, :, None].to(u.dtype)
    alpha = coefficients[0, 0].expand_as(odds)
    if v is None:
        alpha = alpha.clone()
        for coefficient in coefficients[0, 1:].unbind(0):
            torch.addcmul(coefficient, alpha, odds, value=-1.0, out=alpha)
        log_sum = chance.log().to(u.dtype) + softplus(u, threshold=40.0).sum(1)
        return alpha.mul_(odds).scatter_(1, index, at_head[0]), log_sum
    moved = odds * v
    slope = coefficients[1, 0].expand_as(odds)
    for value, derivative in zip(coefficients[0, 1:].unbind(0), coefficients[1, 1:].unbind(0), strict=True):
        slope = torch.addcmul(torch.addcmul(derivative, odds, slope, value=-1.0), moved, alpha, value=-1.0)
        alpha = torch.addcmul(value, odds, alpha, value=-1.0)
    drift = full[1, -1, :, None].to(u.dtype)
    at_tail = moved * alpha + odds * slope - odds * alpha * drift
    of_head = at_head[0] * (v.gather(1, index) - drift) + at_head[1]
    return at_tail.scatter(1, index, of_head), drift[:, 0]


def _by_power_sums(scores: Tensor, k: Tensor, temperature: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """pi, log e_k and the pivot on the CPU for small k, as the smooth loss has them: the pivot is the k-th score."""
    n = scores.shape[1]
    top, index = largest(scores, min(most, n))
    kth = top.gather(1, (k - 1).clamp(0, n - 1)[:, None])[:, 0]
    pivot = torch.where(kth.isfinite(), kth, 0.0)
    mask = torch.empty_like(scores, memory_format=torch.contiguous_format)  # until the end its odds
    sums, unscaled = scores.new_empty((most, len(scores))), bool((temperature == 1).all())
    (space,) = buffers(scores, 1, CHUNK // 2)
    for part in chunks(scores, CHUNK // 2):
        odds, power = torch.sub(scores[part], pivot[part, None], out=mask[part]), space[: part.stop - part.start]
        odds = exponentials(odds if unscaled else odds.div_(temperature[part, None])).scatter_(1, index[part], 0.0)
        torch.sum(odds, 1, out=sums[0, part])
        for m in range(1, most):
            torch.mul(power if m > 1 else odds, odds, out=power)
            torch.sum(torch.threshold_(power, math.exp(SMALLEST[odds.dtype] / 2), 0.0), 1, out=sums[m, part])
    head = ((top - pivot[:, None]).clamp(min=LOWEST) / temperature[:, None]).T.to(float_type(scores))
    tail = _newton_identities(sums.to(head.dtype))
    before, full = _with_head(head, tail)
    behind, full = _up_to(torch.stack((tail, full)), k)
    chance = torch.where(full[-1] > 0, full[-1], 1.0)
    at_head = _left_out(head, before, behind[:-1].flip(0) / chance)
    columns = (full[:-1] / chance).to(scores.dtype)[:, :, None].unbind()
    for part in chunks(scores, CHUNK // 2):
        odds, value = mask[part], columns[0][part]
        for column in columns[1:]:
            value = torch.addcmul(column[part], value, odds, value=-1.0, out=space[: part.stop - part.start])
        odds.mul_(value).scatter_(1, index[part], at_head.T[part].to(odds.dtype))
    total = chance.log() + softplus(head, threshold=40.0).sum(0)
    status = torch.where(kth == -torch.inf, _SETTLED, 0.0).masked_fill_(k <= 0, _SETTLED)
    status = status.masked_fill_(~((top[:, 0] < torch.inf) & (temperature > 0)), _BROKEN)
    return *_settled(mask, total.to(scores.dtype), scores, k, temperature, pivot, status), pivot


# --- mask and log e_k ------------------------------------------------------------------------------------------------


def _level(scores: Tensor, k: Tensor, temperature: Tensor, kernel: bool) -> tuple[Tensor, Tensor]:
    """Of every row the pivot where P is 1/2, and 0, _SETTLED or _BROKEN (rows,): constants to every derivative."""
    scores, temperature = scores.detach(), temperature.detach()
    anchor, level = threshold_level(scores, k.to(scores.dtype), temperature, "logistic", kernel)
    status = torch.where(level.abs() > abs(LOWEST / 20) / temperature, _SETTLED, 0.0).to(scores.dtype)
    status = status.masked_fill(level.isnan(), _BROKEN)
    return anchor + torch.where(status > 0, 0.0, level) * temperature, status


def standardised(scores: Tensor, pivot: Tensor, temperature: Tensor) -> Tensor:
    """(x - pivot) / T (rows, n)."""
    return (scores - pivot[:, None]).clamp(min=LOWEST) / temperature[:, None]


def _settled(
    mask: Tensor, total: Tensor, scores: Tensor, k: Tensor, temperature: Tensor, pivot: Tensor, status: Tensor
) -> tuple[Tensor, Tensor]:
    """pi and log e_k with what is settled, or broken, without an equation."""
    if scores.is_cpu and not compiled() and not bool((status != 0).any()):
        return mask, total
    chosen = (scores > LOWEST / 2) & (k > 0)[:, None]
    settled, broken = status == _SETTLED, torch.where(status == _BROKEN, torch.nan, 0.0)
    mask = torch.where(settled[:, None], chosen.to(mask.dtype), mask) + broken[:, None]
    collected = torch.where(chosen, scores - pivot[:, None], 0.0).sum(1) / temperature
    return mask, torch.where(settled, collected, total) + broken


class _Subset(Function):
    """pi (rows, n) and log e_k(exp u) (rows,), u = (x - pivot) / T, differentiable; and the pivot, a constant."""

    @staticmethod
    def forward(
        scores: Tensor, k: Tensor, temperature: Tensor, most: int, kernel: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if kernel and not compiled():
            mask, total, pivot = kernels.of("subset").forward(scores, k, temperature, most)
            return mask, total, pivot
        if scores.is_cpu and not compiled() and most <= POWER_SUM_LIMIT:
            return _by_power_sums(scores, k, temperature, most)
        pivot, status = _level(scores, k, temperature, kernel)
        index = largest_classes(scores, min(2 * most, scores.shape[1]))
        mask, total = _inclusion(standardised(scores, pivot, temperature), None, k, index, most)
        return *_settled(mask, total, scores, k, temperature, pivot, status), pivot

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scores, k, temperature, ctx.most, ctx.kernel = inputs
        mask, _, pivot = output
        ctx.mark_non_differentiable(pivot)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, k, temperature, mask, pivot)
        ctx.save_for_forward(scores, k, temperature, mask, pivot)

    @staticmethod
    def along(ctx: Context, v: Tensor) -> Tensor:
        """The derivative of pi along v, in units of u."""
        scores, k, temperature, _, _ = ctx.saved_tensors
        pivot, status = _level(scores, k, temperature, ctx.kernel)
        index = largest_classes(scores, min(2 * ctx.most, scores.shape[1]))
        derivative = _inclusion(standardised(scores, pivot, temperature), v, k, index, ctx.most)[0]
        return torch.where((status == _SETTLED)[:, None], 0.0, derivative)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, grad_total: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        scores, _, temperature, mask, pivot = ctx.saved_tensors
        pull = torch.zeros_like(mask) if grad is None else _Subset.along(ctx, grad)
        if grad_total is not None:
            pull = pull + mask * grad_total[:, None]
        gradient, for_temperature = pull / temperature[:, None], None
        if ctx.needs_input_grad[2]:
            for_temperature = -(gradient * standardised(scores, pivot, temperature)).sum(1)
        return gradient, None, for_temperature, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold((_Subset if compiled() else _ForwardSubset).apply, info, in_dims, *arguments)


class _ForwardSubset(_Subset):
    @staticmethod
    def jvp(ctx: Context, push: Tensor | None, _: Any, heat: Tensor | None, *__: Any) -> tuple[Tensor, Tensor, None]:
        scores, _, temperature, mask, pivot = ctx.saved_tensors
        move = torch.zeros_like(mask) if push is None else push
        if heat is not None:
            u = standardised(scores, pivot, temperature)
            move = move - torch.where(u > LOWEST / 2 / temperature[:, None], u, 0.0) * heat[:, None]
        move = move / temperature[:, None]
        return _Subset.along(ctx, move), (mask * move).sum(1), None


def subset_mask(
    scores: Tensor,  # (rows, n)
    k: Tensor,  # (rows,), whole numbers
    temperature: Tensor,  # (rows,)
    most: int,  # the largest k
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """pi (rows, n), log e_k(exp u) (rows,) of u = (x - pivot) / T, and the pivot (rows,)."""
    kernel = choose(backend, scores.device, scores.dtype, "subset") == "triton"
    mask, total, pivot = (_Subset if compiled() else _ForwardSubset).apply(scores, k, temperature, most, kernel)
    return mask, total, pivot


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
        temperature = self.temperature.reshape(-1)
        mask, total, pivot = subset_mask(rows, count, temperature, self.k)
        u = standardised(rows, pivot, temperature)
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
        rows = as_rows(self.scores, -1)
        chance = threshold_mask(rows, float(self.k), self.temperature.reshape(-1), "logistic")
        chance = chance.view(self.scores.shape).expand(shape).reshape(-1, shape[-1])
        mode = self.mode.expand(shape).reshape(-1, shape[-1])
        open_ended = ((chance > 0) & (chance < 1)).any(1) & (mode.sum(1) == self.k)
        result = mode + 0.0 * chance  # a NaN row stays one
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
    scale = per_row("temperature", temperature, scores, dim)
    _, total, pivot = subset_mask(rows, chosen.sum(1), scale, largest_k)
    u = standardised(rows, pivot, scale)
    lost = (chosen & (rows == -torch.inf)).any(1)
    loss = torch.where(lost, torch.inf, total - torch.where(chosen, u, 0.0).sum(1))
    if reduction == "none":
        return loss.view(scores.movedim(dim, -1).shape[:-1])
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum()
