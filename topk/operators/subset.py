r"""The subset distribution: k of n at random, likelier where scores are higher (book, chapter "Subsets").

    Pr[S] = exp(sum over S of x / T) / e_k(exp(x / T)),        S among all subsets of k elements.

Its inclusion probabilities pi_i = Pr[i in S], the gradient of T log e_k, are the soft top-k of greatest entropy, and
their Jacobian is the covariance of the indicators over T. Both come from one polynomial, as in chapter 10. With
w_i = exp(x_i / T - level), P_i = w_i / (1 + w_i) and the polynomial A(z) = prod(1 - P_i + P_i z) of probabilities,

    pi_i = w_i alpha_{k-1} / A_k,        A(z) = (1 + w_i z) alpha(z),

for every level. We take the one with sum P = k, the threshold of the logistic mask: then A peaks at k. Where w <= 1 the
division alpha_j = A_j - w alpha_{j-1} amplifies no error. That leaves 2 k scores at most, the head: there the factors
before and the factors behind are multiplied, which adds positive numbers only.

Up to k = _POWER_SUM_LIMIT the CPU needs no threshold: the level is the k-th score, and the polynomial of the tail comes
from power sums, as in the smooth loss.

The derivative along v is the same calculation on dual numbers, w_i having the derivative w_i v_i: polynomials carry a
second row. It is symmetric, so one function serves as jvp and as vjp; and it is plain torch, so it has derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad, softplus

from topk import kernels
from topk._cpu import CHUNK, SMALLEST, buffers, chunks, exponentials, largest
from topk.backend import choose
from topk.losses import polynomials
from topk.losses.common import largest_classes
from topk.losses.polynomials import product
from topk.losses.smooth import _left_out, _newton_identities, _with_head
from topk.operators.rows import LOWEST, Context, compiled, float_type, fold, plain
from topk.operators.threshold import threshold_level

_WIDE_BELOW = 32  # factors, from which on their products are taken in float64
_SETTLED, _BROKEN = 1.0, 2.0
_POWER_SUM_LIMIT = 8
"""Where k + 1 scores tie, A at the level of the k-th score peaks at k / 2, ever farther above A_k, and float32 divides
by w from there on: worst errors of 2e-6 (mask) and 3e-6 (gradient times T) at k = 8, of 6e-6 and 1e-5 at 10."""


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
    at_head, full, chance = _joined(head_factors, _tail(tail, v, most), k)
    at_head = at_head.to(u.dtype)
    if v is not None:
        drift = full[1, -1, :, None].to(u.dtype)
        of_head = at_head[0] * (v.gather(1, index) - drift) + at_head[1]
        return _moved(odds, v, full.to(u.dtype)).scatter(1, index, of_head), drift[:, 0]
    coefficients = full[:, :-1, :, None].to(u.dtype)
    alpha = coefficients[0, 0].expand_as(odds).clone()
    for coefficient in coefficients[0, 1:].unbind(0):
        torch.addcmul(coefficient, alpha, odds, value=-1.0, out=alpha)
    log_sum = chance.log().to(u.dtype) + softplus(u, threshold=40.0).sum(1)
    return alpha.mul_(odds).scatter_(1, index, at_head[0]), log_sum


def _joined(head_factors: Tensor, tail: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over A_k: the head's pi (1 or 2, rows, size), the product of all factors up to k (1 or 2, k + 1, rows); and A_k.

    Of the second row, if any, pi is without the part that its own w and A_k contribute.
    """
    dual = tail.shape[0] == 2
    behind = _up_to(tail, k).flip(1)  # from the k-th coefficient down
    first = torch.zeros_like(behind[:, :-1])
    first[0, 0] = 1.0
    before = [first + 0.0 * behind[:, :-1]]  # as many dimensions as `behind` has under vmap
    for factor in head_factors[..., :-1].unbind(-1):
        before.append(_with_factor(before[-1], factor))
    left_out = []
    for i in range(head_factors.shape[-1] - 1, -1, -1):
        others = (before[i] * behind[:1, 1:]).sum(1)
        if dual:
            others = torch.stack((others[0], others[1] + (before[i][0] * behind[1, 1:]).sum(0)))
        left_out.append(others)
        behind = _with_factor(behind, head_factors[..., i], falling=True)
    at_head = torch.stack(left_out[::-1], -1)  # Pr[k - 1 of the others succeed]
    full = behind.flip(1)
    chance = torch.where(full[0, -1] > 0, full[0, -1], 1.0)
    return at_head * (head_factors[0, 1] / chance[:, None]), full / chance, chance


def _moved(odds: Tensor, v: Tensor, full: Tensor) -> Tensor:
    """The derivative of pi along v where w <= 1, from the product of all factors over A_k (2, k + 1, rows)."""
    drift, columns = full[1, -1, :, None], [column[..., None].unbind() for column in full[:, :-1].unbind(1)]
    if not (odds.is_cpu and plain(odds) and plain(v)):
        moved, (alpha, slope) = odds * v, columns[0]
        for value, derivative in columns[1:]:
            slope = torch.addcmul(torch.addcmul(derivative, odds, slope, value=-1.0), moved, alpha, value=-1.0)
            alpha = torch.addcmul(value, odds, alpha, value=-1.0)
        return moved * alpha + odds * (slope - alpha * drift)
    result = torch.empty_like(odds, memory_format=torch.contiguous_format)
    spaces = buffers(odds, 2, CHUNK // 4)
    for part in chunks(odds, CHUNK // 4):  # four fields in cache
        w, slope = odds[part], result[part]
        moved, alpha = (space[: len(w)] for space in spaces)
        torch.mul(w, v[part], out=moved)
        alpha.copy_(columns[0][0][part].expand_as(w))
        slope.copy_(columns[0][1][part].expand_as(w))
        for value, derivative in columns[1:]:
            torch.addcmul(derivative[part], w, slope, value=-1.0, out=slope).addcmul_(moved, alpha, value=-1.0)
            torch.addcmul(value[part], w, alpha, value=-1.0, out=alpha)
        slope.addcmul_(alpha, drift[part], value=-1.0).mul_(w).addcmul_(moved, alpha)
    return result


def _odds_and_sums(
    scores: Tensor, v: Tensor | None, pivot: Tensor, temperature: Tensor, index: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """w (rows, n), 0 for the head at `index`, and the sums of w^m and of v w^m, m = 1..most (1 or 2, most, rows)."""
    odds = torch.empty_like(scores, memory_format=torch.contiguous_format)
    sums = scores.new_empty((1 if v is None else 2, most, len(scores)))
    unscaled, smallest = bool((temperature == 1).all()), math.exp(SMALLEST[scores.dtype] / 2)
    spaces = buffers(scores, 2, CHUNK // 4)
    for part in chunks(scores, CHUNK // 4):
        w = torch.sub(scores[part], pivot[part, None], out=odds[part])
        power = exponentials(w if unscaled else w.div_(temperature[part, None])).scatter_(1, index[part], 0.0)
        space, moved = (each[: len(w)] for each in spaces)
        for m in range(most):
            if m:
                power = torch.threshold_(torch.mul(power, w, out=space), smallest, 0.0)
            torch.sum(power, 1, out=sums[0, m, part])
            if v is not None:
                torch.sum(torch.mul(power, v[part], out=moved), 1, out=sums[1, m, part])
    return odds, sums


def _top(scores: Tensor, k: Tensor, temperature: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `most` largest scores and where they are, the k-th of them as the pivot, and the rows' status."""
    top, index = largest(scores, min(most, scores.shape[1]))
    kth = top.gather(1, (k - 1).clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
    status = torch.where(kth == -torch.inf, _SETTLED, 0.0).masked_fill_(k <= 0, _SETTLED)
    status = status.masked_fill_(~((top[:, 0] < torch.inf) & (temperature > 0)), _BROKEN)
    return top, index, torch.where(kth.isfinite(), kth, 0.0), status


def _by_power_sums(scores: Tensor, k: Tensor, temperature: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """pi, log e_k and the pivot on the CPU for small k, as the smooth loss has them: the pivot is the k-th score."""
    top, index, pivot, status = _top(scores, k, temperature, most)
    mask, sums = _odds_and_sums(scores, None, pivot, temperature, index, most)  # until the end the mask is its odds
    head = standardised(top, pivot, temperature).T.to(float_type(scores))
    tail = _newton_identities(sums[0].to(head.dtype))
    before, full = _with_head(head, tail)
    behind, full = _up_to(torch.stack((tail, full)), k)
    chance = torch.where(full[-1] > 0, full[-1], 1.0)
    at_head = _left_out(head, before, behind[:-1].flip(0) / chance)
    columns = (full[:-1] / chance).to(scores.dtype)[:, :, None].unbind()
    (space,) = buffers(scores, 1, CHUNK // 2)
    for part in chunks(scores, CHUNK // 2):
        odds, value = mask[part], columns[0][part]
        for column in columns[1:]:
            value = torch.addcmul(column[part], value, odds, value=-1.0, out=space[: part.stop - part.start])
        odds.mul_(value).scatter_(1, index[part], at_head.T[part].to(odds.dtype))
    total = chance.log() + softplus(head, threshold=40.0).sum(0)
    return *_settled(mask, total.to(scores.dtype), scores, k, temperature, pivot, status), pivot


def _moved_by_power_sums(scores: Tensor, v: Tensor, k: Tensor, temperature: Tensor, most: int) -> Tensor:
    """The derivative of pi along v, in the same way: log e has the derivative sum over m of -(-z)^m sum v w^m."""
    top, index, pivot, status = _top(scores, k, temperature, most)
    odds, sums = _odds_and_sums(scores, v, pivot, temperature, index, most)
    value, slope = sums.to(float_type(scores)).unbind()
    slope[1::2].neg_()
    tail = _newton_identities(value)
    tail = torch.stack((tail, polynomials.product(pad(slope, (0, 0, 1, 0)), tail)))
    at_index = v.gather(1, index)
    head_factors = _factors(standardised(top, pivot, temperature).to(tail.dtype), at_index.to(tail.dtype))
    at_head, full, _ = _joined(head_factors, tail, k)
    full, drift = full.to(scores.dtype), full[1, -1, :, None]
    of_head = (at_head[0] * (at_index - drift) + at_head[1]).to(scores.dtype)
    derivative = _moved(odds, v, full).scatter_(1, index, of_head)
    if not bool((status != 0).any()):
        return derivative
    settled, broken = (status == each for each in (_SETTLED, _BROKEN))
    return derivative.masked_fill_(settled[:, None], 0.0).masked_fill_(broken[:, None], torch.nan)


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
        if scores.is_cpu and not compiled() and most <= _POWER_SUM_LIMIT:
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
        if scores.is_cpu and ctx.most <= _POWER_SUM_LIMIT and plain(v):
            return _moved_by_power_sums(scores, v, k, temperature, ctx.most)
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
