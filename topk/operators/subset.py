r"""The subset distribution: k of n at random, likelier where scores are higher (book, chapter "Subsets").

    Pr[S] = exp(sum over S of x / T) / e_k(exp(x / T)),        S among all subsets of k elements.

Its inclusion probabilities pi_i = Pr[i in S], the gradient of T log e_k, are the soft top-k of greatest entropy, and
their Jacobian is the covariance of the indicators over T. Both come from one polynomial, as in chapter 10. With
w_i = exp(x_i / T - level), P_i = w_i / (1 + w_i) and the polynomial A(z) = prod(1 - P_i + P_i z) of probabilities,

    pi_i = w_i alpha_{k-1} / A_k,        A(z) = (1 + w_i z) alpha(z),

for every level. We take the one with sum P = k, the threshold of the logistic mask: then A peaks at k. Where w <= 1 the
division alpha_j = A_j - w alpha_{j-1} amplifies no error. That leaves 2 k scores at most, the head: there the factors
before and the factors behind are multiplied, which adds positive numbers only.

The CPU needs no threshold. A factor c in all w changes nothing but the scale, and c = k / (the sum of w after the k-th
score) is never below the one with sum P = k, nor far above. Then w > 1/2 holds for few scores, or none: the head.
The polynomial of the others comes from power sums, as in the smooth loss, of the powers that are more than rounding
errors. pi is a polynomial of w of that degree, and its derivative along v is v q(w) + r(w) with two such polynomials.

The derivative along v is the same calculation on dual numbers, w_i having the derivative w_i v_i: polynomials carry a
second row. It is symmetric, so one function serves as jvp and as vjp; and it is plain torch, so it has derivatives.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad, softplus

from topk import kernels
from topk._cpu import SMALLEST, buffers, chunks, exponentials, largest, row_chunks
from topk.autograd import by_position, plain
from topk.backend import choose
from topk.losses.common import largest_classes
from topk.losses.polynomials import product
from topk.losses.smooth import _newton_identities
from topk.operators.rows import LOWEST, Context, compiled, float_type, fold
from topk.operators.threshold import threshold_level

Tensors = tuple[Tensor, ...]
_WIDE_BELOW = 32  # factors, from which on their products are taken in float64
_SETTLED, _BROKEN = 1.0, 2.0
_HEAD_ABOVE = {True: 0.75, False: 0.5}  # w from which on a score belongs to the head on the CPU: k up to 16, or above
_PARTS = 2**22  # numbers kept at a time while a head is left out, element by element
_FAR = 1e-30  # a sum of w, below which all scores after the k-th are as good as out of reach


class Known(NamedTuple):
    """What need not be looked for: whether all k are the largest one, and all temperatures 1."""

    same: bool = False
    unit: bool = False


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
    at_head, full, chance = _joined(head_factors, _tree(_factors(tail, v), most), k)
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
    moved, (alpha, slope) = odds * v, columns[0]
    for value, derivative in columns[1:]:
        slope = torch.addcmul(torch.addcmul(derivative, odds, slope, value=-1.0), moved, alpha, value=-1.0)
        alpha = torch.addcmul(value, odds, alpha, value=-1.0)
    return moved * alpha + odds * (slope - alpha * drift)


# --- the CPU: power sums of the tail ---------------------------------------------------------------------------------


def _log_odds(top: Tensor, level: Tensor, heat: Tensor | None) -> Tensor:
    """(x - level) / T of the largest scores (count, rows)."""
    return (top.T.to(float_type(top)) - level) / (1.0 if heat is None else heat.T)


def _sums(odds: Tensor, v: Tensor | None, least: float, spaces: list[Tensor], out: Tensor) -> None:
    """Writes the sums of w^m, or of v w^m, m = 1.. (terms, rows). Leaves out in time what would lead to denormals."""
    (space, other), smallest = (each[: len(odds)] for each in spaces), SMALLEST[odds.dtype]
    power, inner, until = odds if v is None else torch.mul(odds, v, out=space), odds, 1
    for m, total in enumerate(out.unbind(), 1):
        if m > until:
            until = 2 * m
            if not least * min(until, len(out)) > smallest:
                inner = torch.threshold_(other.copy_(odds), math.exp(smallest / until), 0.0)
        if m > 1:
            power = torch.mul(power, inner, out=space)
        torch.sum(power, 1, out=total)


def _columns(full: Tensor, terms: int) -> Tensor:
    """The coefficients from the (k - 1)-th down, with signs (..., terms, rows)."""
    columns = full[..., :-1, :].flip(-2)[..., :terms, :]
    columns[..., 1::2, :].neg_()
    return columns


def _horner(columns: Tensors, part: slice, odds: Tensor, out: Tensor) -> Tensor:
    """The sum over r of columns[r] w^r for the rows in `part`; a column is (rows, 1)."""
    value, out = columns[-1][part], out[: len(odds)]
    for column in columns[-2::-1]:
        value = torch.addcmul(column[part], value, odds, out=out)
    return value


def _coefficients(sums: Tensor, degree: int) -> Tensor:
    """The product of (1 + w z), up to a degree, from the power sums (terms, rows).

    Newton's identities lose a factor of exp(sum of w^2): where that is large, those of a root are taken, and squared.
    """
    halvings = 0
    if degree > 8:  # else that sum is below 11
        halvings = math.ceil(math.log2(max(1.0, float(sums[1:2].nan_to_num(0.0).sum(0).max()) / 4.0)))
    tail = _newton_identities(pad(sums * 0.5**halvings, (0, 0, 0, degree - len(sums))))
    for _ in range(halvings):
        tail = product(tail, tail)
    return tail


def _slope(sums: Tensor, tail: Tensor) -> Tensor:
    """The derivative of the product of (1 + w z) along v, from the sums of v w^m."""
    terms, signed, result = len(sums), sums.flip(0), torch.empty_like(tail)
    signed[terms % 2 :: 2].neg_()
    shifted = pad(tail, (0, 0, terms, 0)).unfold(0, terms, 1)[:-1].movedim(-1, 1)  # the coefficients before every one
    for part in row_chunks(tail.shape[1], tail.shape[0] * terms, _PARTS):
        torch.sum(shifted[..., part] * signed[:, part], 1, out=result[:, part])
    return result


def _joined_at_once(u: Tensor, v: Tensor | None, tail: Tensor, k: Tensor, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `_joined` gives for a head's log w, u (size, rows), in few calls: rows and directions advance together."""
    (size, rows), (dual, length, _) = u.shape, tail.shape
    same = same or bool((k == length - 1).all())
    if size == 0:
        full = tail if same else _up_to(tail, k)
        chance = torch.where(full[0, -1] > 0, full[0, -1], 1.0)
        return u.new_empty((dual, 0, rows)), full / chance, chance
    slices = list(row_chunks(rows, 4 * size * length, _PARTS))
    if len(slices) > 1:
        cut = ((u[:, part], None if v is None else v[:, part], tail[..., part], k[part], same) for part in slices)
        pieces = zip(*itertools.starmap(_joined_at_once, cut), strict=True)
        at_head, full, chance = (torch.cat(each, -1) for each in pieces)
        return at_head, full, chance
    success = u.sigmoid()
    each = torch.stack((u.neg().sigmoid_(), success, *(() if v is None else (success * v,))))
    each = torch.stack((each, each.flip(1)), 2)[:, :, :, None, None]  # (2 or 3, size, directions, 1, 1, rows)
    parts = u.new_zeros((size + 1, 2, dual, length + 1, rows))  # before and behind, below them a row of zeros
    parts[0, 0, 0, 1] = 1.0
    parts[0, 1, :, 1:] = tail if same else _up_to(tail, k)
    lower, upper = parts[..., :-1, :].unbind(), parts[..., 1:, :].unbind()
    for i, (failure, chance, *moves) in enumerate(zip(*each.unbind(), strict=True)):
        torch.mul(upper[i], failure, out=upper[i + 1]).addcmul_(lower[i], chance)
        for move in moves:
            upper[i + 1][:, 1:].addcmul_(lower[i][:, :1], move)
    before, behind = parts[:-1, 0, :, 1:-1], parts[:-1, 1, :, 1:-1].flip(0, 2)
    left_out = (before * behind[:, :1]).sum(2)
    if v is not None:
        left_out[:, 1] += (before[:, 0] * behind[:, 1]).sum(1)
    full = parts[-1, 1, :, 1:]
    chance = torch.where(full[0, -1] > 0, full[0, -1], 1.0)
    return left_out.transpose(0, 1) * (success / chance), full / chance, chance


def _by_power_sums(scores: Tensor, k: Tensor, temperature: Tensor, most: int, known: Known) -> Tensors:
    """pi, log e_k and the pivot, the k-th score; for the derivative w, the head's places and two tables (rows, ...).

    One has the signed coefficients of pi / w; one, wide, the least log w, the head's log w and the tail's coefficients.
    """
    dtype, count, longer = scores.dtype, *(min(scores.shape[1], each) for each in (most + 1, 2 * most))
    top, index = largest(scores, count)
    same = known.same or bool((k == most).all())
    kth = top[:, most - 1] if same else top.gather(1, (k - 1).clamp_(min=0)[:, None])[:, 0]
    every, level, heat = same and known.unit and float((top[:, 0] - kth).max()) < torch.inf, kth, None
    if not every:
        sound = (top[:, 0] < torch.inf) & (temperature > 0)
        usual = (kth > -torch.inf) & (k > 0) & sound
        every, heat = bool(usual.all()), None if known.unit else temperature[:, None]
        level = torch.where(usual, kth, torch.inf)  # there every w is 0
    kept, mask = (torch.empty_like(scores, memory_format=torch.contiguous_format) for _ in range(2))
    rest, least = torch.empty_like(kth), torch.empty_like(kth)
    for part in chunks(scores):
        odds = torch.sub(scores[part], level[part, None], out=kept[part])
        if heat is not None:
            odds.div_(heat[part])
        torch.amin(odds, 1, out=least[part])
        exponentials(odds, float(least[part].min())).scatter_(1, index[part], 0.0)
        torch.sum(odds, 1, out=rest[part])
    log_odds = _log_odds(top, level, heat)
    odds = log_odds.exp()
    beyond = (odds[most:] if same else torch.where(torch.arange(count)[:, None] < k, 0.0, odds)).sum(0)
    log_scale = (k / beyond.add_(rest).clamp_(min=_FAR)).log_()
    if not every:
        log_scale = torch.where(usual, log_scale, torch.where(sound, -torch.inf, torch.nan))
    above = math.log(_HEAD_ABOVE[most <= 16])
    if count < longer and bool((log_odds[-1] + log_scale > above).any()):  # the head may be longer
        kept.scatter_(1, index, odds.T.to(dtype))
        top, index = largest(scores, longer)
        kept.scatter_(1, index, 0.0)
        log_odds = _log_odds(top, level, heat)
        odds = log_odds.exp()
    log_odds += log_scale
    reach = log_odds.nan_to_num(-torch.inf).amax(1).tolist()  # falls
    size = sum(each > above for each in reach)
    highest = min(reach[min(size, len(reach) - 1)], -1e-3)
    terms = min(most, max(1, math.ceil(math.log(torch.finfo(dtype).eps) / highest)))
    kept.scatter_(1, index[:, size:], odds[size:].T.to(dtype))
    index, log_odds, scale = index[:, :size], log_odds[:size], log_scale.exp().to(dtype)
    sums, spaces = scores.new_empty((terms, len(scores))), buffers(scores, 2)
    least = least + log_scale
    for part in chunks(scores):
        odds = torch.threshold_(kept[part].mul_(scale[part, None]), math.exp(SMALLEST[dtype]), 0.0)
        _sums(odds, None, float(least[part].min()), spaces, sums[:, part])
    tail = _coefficients(sums.to(log_odds.dtype), most)
    at_head, full, chance = _joined_at_once(log_odds, None, tail[None], k, same)
    table = _columns(full[0], terms).to(dtype)
    columns, at_head = table[:, :, None].unbind(), at_head[0].T.to(dtype)
    for part in chunks(scores):
        odds = kept[part]
        torch.mul(odds, _horner(columns, part, odds, spaces[0]), out=mask[part]).scatter_(1, index[part], at_head[part])
    total = (chance.log() + softplus(log_odds, threshold=40.0).sum(0) - k * log_scale).to(dtype)
    pivot = kth
    if not every:
        pivot, status = torch.where(usual, kth, 0.0), torch.where(usual, 0.0, torch.where(sound, _SETTLED, _BROKEN))
        mask, total = _settled(mask, total, scores, k, temperature, pivot, status)
    return mask, total, pivot, kept, index, table.T, torch.cat((least[None], log_odds, tail)).T


def _moved_by_power_sums(v: Tensor, k: Tensor, saved: list[Tensor], known: Known) -> Tensor:
    """The derivative of pi along v, in the same way: log e has the derivative sum over m of -(-z)^m sum v w^m."""
    kept, index, table, wide = saved
    dtype, (size, terms) = kept.dtype, (index.shape[1], table.shape[1])
    least, log_odds, tail = wide[:, 0], wide.T[1 : size + 1], wide.T[size + 1 :]
    sums, result, spaces = kept.new_empty((terms, len(kept))), torch.empty_like(kept), buffers(kept, 2)
    for part in chunks(kept):
        _sums(kept[part], v[part], float(least[part].min()), spaces, sums[:, part])
    tail = torch.stack((tail, _slope(sums.to(tail.dtype), tail)))
    at_index = v.gather(1, index).T.to(tail.dtype)
    at_head, full, _ = _joined_at_once(log_odds, at_index, tail, k, known.same)
    drift, pair = full[1, -1], _columns(full, terms)
    of_head = (at_head[0] * (at_index - drift) + at_head[1]).T.to(dtype)
    others = torch.addcmul(pair[1], pair[0], drift, value=-1.0).to(dtype)[..., None].unbind()
    own = (table.T * torch.arange(1, terms + 1)[:, None])[..., None].unbind()
    for part in chunks(kept):
        odds, out = kept[part], result[part]
        first, second = _horner(own, part, odds, spaces[0]), _horner(others, part, odds, spaces[1])
        torch.addcmul(second, first, v[part], out=out).mul_(odds).scatter_(1, index[part], of_head[part])
    return result


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


@by_position
class _Subset(Function):
    """pi (rows, n) and log e_k(exp u) (rows,), u = (x - pivot) / T, differentiable; and the pivot, a constant."""

    @staticmethod
    def forward(scores: Tensor, k: Tensor, temperature: Tensor, most: int, kernel: bool, known: Known) -> Tensors:
        if scores.is_cpu and not compiled() and len(scores):
            return _by_power_sums(scores, k, temperature, most, known)
        nothing = (k.new_empty((len(k), 0)) for _ in range(4))
        if kernel and not compiled():
            return *kernels.of("subset").forward(scores, k, temperature, most), *nothing
        pivot, status = _level(scores, k, temperature, kernel)
        index = largest_classes(scores, min(2 * most, scores.shape[1]))
        mask, total = _inclusion(standardised(scores, pivot, temperature), None, k, index, most)
        return *_settled(mask, total, scores, k, temperature, pivot, status), pivot, *nothing

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensors) -> None:
        scores, k, temperature, ctx.most, ctx.kernel, ctx.known = inputs
        mask, _, *constants = output
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, k, temperature, mask, *constants)
        ctx.save_for_forward(scores, k, temperature, mask, *constants)

    @staticmethod
    def along(ctx: Context, v: Tensor) -> Tensor:
        """The derivative of pi along v, in units of u."""
        scores, k, temperature, _, pivot, *kept = ctx.saved_tensors
        if kept[-1].shape[1] > 0 and plain(v):
            return _moved_by_power_sums(v, k, kept, ctx.known)
        pivot, status = _level(scores, k, temperature, ctx.kernel)
        index = largest_classes(scores, min(2 * ctx.most, scores.shape[1]))
        derivative = _inclusion(standardised(scores, pivot, temperature), v, k, index, ctx.most)[0]
        return torch.where((status == _SETTLED)[:, None], 0.0, derivative)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        scores, _, temperature, mask, pivot = ctx.saved_tensors[:5]
        pull = torch.zeros_like(mask) if grad is None else _Subset.along(ctx, grad)
        if grad_total is not None:
            pull = pull + mask * grad_total[:, None]
        in_place = pull.div_ if grad is not None and plain(pull) else pull.div
        gradient = pull if ctx.known.unit else in_place(temperature[:, None])
        for_temperature = None
        if ctx.needs_input_grad[2]:
            for_temperature = -(gradient * standardised(scores, pivot, temperature)).sum(1)
        return gradient, None, for_temperature, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold((_Subset if compiled() else _ForwardSubset).apply, info, in_dims, *arguments)


class _ForwardSubset(_Subset):
    @staticmethod
    def jvp(ctx: Context, push: Tensor | None, _: Any, heat: Tensor | None, *__: Any) -> tuple[Tensor | None, ...]:
        scores, _, temperature, mask, pivot = ctx.saved_tensors[:5]
        move = torch.zeros_like(mask) if push is None else push
        if heat is not None:
            u = standardised(scores, pivot, temperature)
            move = move - torch.where(u > LOWEST / 2 / temperature[:, None], u, 0.0) * heat[:, None]
        move = move / temperature[:, None]
        return _Subset.along(ctx, move), (mask * move).sum(1), *[None] * 5


def subset_mask(
    scores: Tensor,  # (rows, n)
    k: Tensor,  # (rows,), whole numbers
    temperature: Tensor,  # (rows,)
    most: int,  # the largest k
    backend: str | None = None,
    **known: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """pi (rows, n), log e_k(exp u) (rows,) of u = (x - pivot) / T, and the pivot (rows,)."""
    kernel = choose(backend, scores.device, scores.dtype, "subset") == "triton"
    function = _Subset if compiled() else _ForwardSubset
    mask, total, pivot = function.apply(scores, k, temperature, most, kernel, Known(**known))[:3]
    return mask, total, pivot
