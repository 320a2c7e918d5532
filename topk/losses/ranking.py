"""Three losses from the literature on ranking and robustness: AUTKC, LDR and softmax at K (book, chapter 23).

With w_1 >= w_2 >= ... the wrong scores, p = softmax(x), q_1 >= q_2 >= ... the wrong classes' p_j, and f a surrogate,

    autkc         (1 / k) sum over j <= k of f(q_j - p_y)                   Wang et al. (2023); hinge: f(w_j - x_y)
    ldr           t log((1 / n) sum_j exp((x_j - x_y + margin [j != y]) / t))              Zhu, Ying and Yang (2023)
    softmax_at_k  sigmoid((x_y - x_[k]) / t_w) log sum_j exp((x_j - x_y) / t)                 Yang et al. (2025)

1 - AUTKC, AUTKC being the mean of top-1 ... top-k accuracy, is the share of the k best wrong classes that are ahead of
y: hence the sum. Classes that do not exist, or are masked, add nothing to it. XCurve sums one class more and divides by
k: (k + 1) / k times this loss at k + 1. With the hinge it is Lapin's beta.

LDR's adaptive temperature is t = t_0 (1 - KL(p_t, uniform) / (alpha log n)), p_t = softmax((x + margin [j != y]) / t),
for which the loss has - (alpha log n / (2 t_0)) (t - t_0)^2 beside it: a row whose class is plain gets a low one. This
form is read from others' code of ALDR-KL, not from the paper: a reconstruction. Of several solutions the largest is
sought, from t_0 on.

Softmax at K weighs cross-entropy by how far y is above x_[k], the k-th largest of all scores, which is held fixed: so
the field is not the gradient of the value. (The authors' code takes x_[k] from the epoch before.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from topk._cpu import (
    SMALLEST,
    buffers,
    chunks,
    exponentials,
    largest_values,
    largest_wrong,
    lowest,
    ordered_topk,
    scaled_exponentials,
    sum_exponentials,
)
from topk.arguments import KArgument, check_choice, check_k, check_number, check_scores
from topk.autograd import Head, Loss
from topk.losses.common import (
    LossModule,
    broken_rows,
    finite_or_zero,
    largest_classes,
    largest_wrong_and_own,
    mended,
    not_finite_above,
    reduced_loss,
    row_dtype,
    target_scores,
    with_tail,
    without_target,
)
from topk.losses.soft import takes_probabilities
from topk.tails import PowerSums, Slice, Sum, Tail, Talk

SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "exponential": torch.exp,
    "logistic": softplus,
    "square": lambda lead: (1.0 + lead).square(),
    "hinge": lambda lead: (1.0 + lead).relu(),
}
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "exponential": torch.exp,
    "logistic": torch.sigmoid,
    "square": lambda lead: 2.0 * (1.0 + lead),
    "hinge": lambda lead: (lead > -1.0).to(lead.dtype),
}

# --- AUTKC -----------------------------------------------------------------------------------------------------------


class AUTKCOptions(NamedTuple):
    """AUTKC's arguments."""

    ks: list[int]
    weights: list[float]  # of the ks
    surrogate: str


def _places(options: AUTKCOptions, like: Tensor) -> Tensor:
    """What the j-th best wrong class counts, j = 1 ... (the largest k, or as many as there are): sum of weight / k."""
    ks, weights, _ = options
    count = min(ks[-1], like.shape[1] - 1)
    counts = [sum(weight / k for k, weight in zip(ks, weights, strict=True) if j < k) for j in range(count)]
    return torch.tensor(counts, dtype=like.dtype, device=like.device)


def autkc_definition(
    scores: Tensor,
    target: Tensor,
    ks: list[int],
    weights: list[float],
    surrogate: str,
    tail: Tensor | None = None,  # (1, rows): the sum of exp(x) over classes that are not listed
) -> Tensor:
    """The loss of every row (rows,)."""
    places = _places(AUTKCOptions(ks, weights, surrogate), scores)
    if len(places) == 0:
        return torch.where(torch.ones_like(scores, dtype=torch.bool), 0.0, scores).sum(1)
    wrong, own = largest_wrong_and_own(scores, target, len(places))
    exists = wrong > -torch.inf
    if surrogate != "hinge":
        total = with_tail(scores.logsumexp(1), tail)
        wrong, own = (wrong - total[:, None]).exp(), (own - total).exp()
    lead = torch.where(exists, wrong - own[:, None], 0.0)
    return (places * torch.where(exists, SURROGATES[surrogate](lead), 0.0)).sum(1)


def autkc_forward(scores: Tensor, target: Tensor, options: AUTKCOptions) -> tuple[Tensor, ...]:
    """loss (rows,), the best classes and y (rows, few), and shift, their slopes and that of all others."""
    wide = torch.empty(0, scores.shape[1], dtype=row_dtype(scores), device=scores.device)
    places = _places(options, wide)
    values, index = ordered_topk(scores, len(places) + 1)
    own, shift = target_scores(scores, target), values[:, 0]
    broken = broken_rows(shift, own)
    shift = shift if broken is None else finite_or_zero(shift)
    wrong, index = without_target(values, index, target)
    index = torch.cat((index, target[:, None]), 1)
    x = torch.cat((wrong, own[:, None]), 1).to(places.dtype) - shift[:, None].to(places.dtype)
    if options.surrogate != "hinge":
        x = x.exp_()
        total = x.sum(1, keepdim=True) + sum_exponentials(scores, shift, index)[:, None]
        x = x / total
    places, lead = places * (wrong > -torch.inf), x[:, :-1] - x[:, -1:]
    loss, slopes = (places * SURROGATES[options.surrogate](lead)).sum(1), places * _SLOPES[options.surrogate](lead)
    slopes = torch.cat((slopes, -slopes.sum(1, keepdim=True)), 1)
    if options.surrogate == "hinge":
        slopes = torch.cat((slopes, torch.zeros_like(slopes[:, :1])), 1)
    else:  # through the softmax
        mean = (slopes * x).sum(1, keepdim=True)
        slopes = torch.cat((x * (slopes - mean), -mean / total), 1)
    if broken is not None:
        loss, slopes = mended(broken, loss, slopes)
    dtype = scores.dtype
    return loss.to(dtype), index, torch.cat((shift[:, None], slopes.to(dtype)), 1)


def autkc_backward(
    grad: Tensor, scores: Tensor, target: Tensor, options: AUTKCOptions, saved: tuple[Tensor, ...]
) -> Tensor:
    """grad * d loss / d scores: one exponential a class, or with the hinge a scatter."""
    index, table = saved
    slopes = grad[:, None] * table[:, 1:]
    if options.surrogate == "hinge":
        result = slopes[:, -1:].expand_as(scores).contiguous()
    else:
        result = scaled_exponentials(scores, table[:, 0], slopes[:, -1])
    return result.scatter_(1, index, slopes[:, :-1])


def autkc_head(options: AUTKCOptions) -> Head:
    """The best classes, and for probabilities the sum of exponentials."""
    return Head(options.ks[-1] + 1, [] if options.surrogate == "hinge" else [PowerSums(1.0)])


AUTKC = Loss("autkc", AUTKCOptions, autkc_definition, autkc_forward, autkc_backward, head=autkc_head, joint=True)


@takes_probabilities
def autkc_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    surrogate: str = "exponential",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""A surrogate of one minus the area under the top-k curve up to k (Wang et al. 2023); chapter 23.

    The mean over j <= k of f(q_j - p_y), p = softmax(scores) and q_j the j-th largest of a wrong class. Unlike the
    other losses it is not 0 at k = classes, since it counts fewer guesses too.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        k: the largest number of guesses, or a mapping ``{k: weight}`` whose weights sum to 1.
        surrogate: "exponential", "logistic", "square", or "hinge", which takes scores instead of probabilities.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch" or "compiled".
    """
    ks, weights = check_k(k, check_scores(scores, target))
    check_choice("surrogate", surrogate, SURROGATES)
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    return reduced_loss(AUTKC, AUTKCOptions(ks, weights, surrogate), scores, target, **tail)


# --- LDR -------------------------------------------------------------------------------------------------------------


class LDROptions(NamedTuple):
    """LDR's arguments."""

    temperature: float
    margin: float
    alpha: float | None
    classes: int | None = None


def ldr_definition(
    scores: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    margin: float = 1.0,
    alpha: float | None = None,
    classes: int | None = None,  # how many there are, where not all are listed
    tail: Tensor | None = None,  # (1, rows): the sum of exp(x / temperature) over those that are not; or `AtOwn`'s
) -> Tensor:
    """The loss of every row (rows,)."""
    n, own = classes or scores.shape[1], target_scores(scores, target)
    lead = (scores - own[:, None] + margin).scatter(1, target[:, None], 0.0)
    t, price, origin = torch.full_like(own, temperature), torch.zeros_like(own), torch.zeros_like(own)
    strength = 0.0 if alpha is None else alpha * math.log(n) / temperature
    if tail is not None and len(tail) == 2:  # the loss has no slope in this t
        t, tail = tail[1].detach(), tail[:1]
        origin = finite_or_zero(scores.detach().scatter(1, target[:, None], -torch.inf).amax(1))
        price = strength / 2 * (t - temperature).square()
    elif alpha is not None and strength > 0.0:
        shift, rate = lead.detach().amax(1), 1.0 / t
        bracket = rate, rate * alpha / (alpha - 1.0)
        for _ in range(_STEPS):
            rate, bracket = _next(rate, bracket, _moments(lead.detach(), shift, rate), n, temperature, strength)
        rate, _ = _next(rate, bracket, _moments(lead, shift, rate), n, temperature, strength)
        t = 1.0 / rate  # with the derivatives of the solution
        price = strength / 2 * (t - temperature).square()
    exists = lead > -torch.inf
    scaled = torch.where(exists, torch.where(exists, lead, 0.0) / t[:, None], -torch.inf)
    return t * (with_tail(scaled.logsumexp(1), tail, (origin + margin - own) / t) - math.log(n)) - price


_STEPS = 30  # of a compiler; others stop when they are there


def _moments(lead: Tensor, shift: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log sum exp(u), mean and variance of u under softmax(u), u = (lead - shift) rate (rows,)."""
    exists = lead > -torch.inf  # else 0 times infinity, in the slope in the rate
    u = torch.where(exists, lead - shift[:, None], 0.0) * rate[:, None]
    e = torch.where(exists, u.exp(), 0.0)
    total = e.sum(1)
    mean = (e * u).sum(1) / total
    return total.log(), mean, (e * u * u).sum(1) / total - mean * mean


def _next(
    rate: Tensor, bracket: tuple[Tensor, Tensor], moments: tuple[Tensor, ...], n: int, start: float, strength: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A step towards the rate 1 / t that solves f = rate (start - KL / strength) - 1 = 0, and the bracket it leaves.

    KL = mean - log sum exp + log n, d KL / d rate = variance / rate. f is not positive at rate = 1 / start, not
    negative where KL <= log n makes it so, and concave until one class has most: there Newton's steps from the left
    fall short of the first root. Where they would leave the bracket, or f does not rise, it is halved.
    """
    log_total, mean, variance = moments
    level = (log_total - mean) / strength + (start - math.log(n) / strength)
    f = rate * level - 1.0
    slope = torch.sub(level, variance, alpha=1.0 / strength).detach()
    below, rises = f <= 0.0, slope > 1e-4 * start
    low, high = torch.where(below, rate, bracket[0]).detach(), torch.where(below, bracket[1], rate).detach()
    newton = rate - f / torch.where(rises, slope, 1.0)
    kept = rises & (newton >= low) & (newton <= high)
    return torch.where(kept, newton, (low + high) / 2), (low, high)


def ldr_forward(scores: Tensor, target: Tensor, options: LDROptions) -> tuple[Tensor, ...]:
    """loss (rows,) and shift, 1 / t, the slope of a class that has the shift's score, and y's (rows, 4)."""
    temperature, margin, alpha, _ = options
    n, dtype = scores.shape[1], row_dtype(scores)
    shift, own = largest_wrong(scores, target), target_scores(scores, target)
    broken = broken_rows(shift, own)
    if broken is not None:
        shift = finite_or_zero(torch.where(shift == -torch.inf, own - margin, shift))  # y may be the only class left
        own = torch.where(broken[0] | broken[1], shift, own)
    wide = shift.to(dtype)
    lead = own.to(dtype) - wide - margin  # of y, to the best wrong class plus margin
    if alpha is None or n == 1:
        rate, price = torch.full_like(lead, 1.0 / temperature), 0.0
        others = sum_exponentials(scores, shift, target[:, None], 1.0 / temperature).to(dtype)
    else:
        search = _own_temperature(lead, n, options, scores.dtype)
        rate, found = next(search), None
        while found is None:
            try:
                rate = search.send(_sums(scores, target, shift, rate))
            except StopIteration as stop:
                found = stop.value
        rate, others = found
        price = alpha * math.log(n) / temperature / 2 * (1.0 / rate - temperature).square()
    y = lead * rate
    share = 1.0 / (others + y.exp())
    loss = (softplus(others.log() - y, threshold=50.0) - math.log(n)) / rate - price
    table = torch.stack((wide, rate, share, -others * share), 1)
    if broken is not None:
        loss, table[:, 2:] = mended(broken, loss, table[:, 2:])
    return loss.to(scores.dtype), table.to(scores.dtype)


def _own_temperature(
    lead: Tensor, n: int, options: LDROptions, dtype: torch.dtype
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """1 / t and the sum over the wrong classes of exp((x - best wrong) / t) (rows,); yields 1 / t, gets `_sums`."""
    assert options.alpha is not None
    strength = options.alpha * math.log(n) / options.temperature
    rate = torch.full_like(lead, 1.0 / options.temperature)
    bracket = rate, rate * options.alpha / (options.alpha - 1.0)
    enough, exact = (2e-5, 1e-14) if dtype == torch.float64 else (6e-3, 5e-7)  # for the sum, and for the rate itself
    size: Tensor | float = 0.1  # as if such a step had come before the first
    for _ in range(_STEPS):
        before, sums, y = rate, (yield rate), lead * rate
        total = sums[0].clamp(min=torch.finfo(sums.dtype).tiny)
        mean, square = (sums[1:] / total).unbind()
        variance = torch.addcmul(square, mean, mean, value=-1.0)
        odds, beyond = y - total.log(), y - mean  # y comes in: by what share, and how far from the others' mean
        shift = odds.sigmoid() * beyond
        moments = y - logsigmoid(odds), mean + shift, torch.addcmul(variance, shift, beyond) * (-odds).sigmoid()
        rate, bracket = _next(rate, bracket, moments, n, options.temperature, strength)
        step = rate / before - 1.0
        earlier, size = size, step.abs()
        spread = size * (1.0 + variance.sqrt())  # two cumulants give the sum to a sixth of its cube
        left = (size / earlier).square() * size  # to go, as steps shrink quadratically
        if rate.is_cpu and not bool(((spread > enough) | ((left > exact) & (size < earlier))).any()):
            break
    return rate, sums[0] * (torch.addcmul(mean, variance, step, value=0.5) * step).exp()


def _sums(scores: Tensor, target: Tensor, shift: Tensor, rate: Tensor) -> Tensor:
    """Sums over the wrong classes of exp(u), u exp(u), u^2 exp(u) (3, rows); u = (x - shift) rate."""
    found = scores.new_empty((3, len(rate)))
    u_space, e_space = buffers(scores, 2)
    for part in chunks(scores):
        u, e = (space[: part.stop - part.start] for space in (u_space, e_space))
        torch.sub(scores[part], shift[part, None], out=u).mul_(rate[part, None].to(u.dtype))
        _exponentials_of(u, e).scatter_(1, target[part, None], 0.0)
        for place, sums in enumerate(found):
            torch.sum(e.mul_(u) if place else e, 1, out=sums[part])
    return found.to(rate.dtype)


def _exponentials_of(u: Tensor, out: Tensor) -> Tensor:
    """exp(u), written into `out`; what is masked in `u` becomes a number, so that no 0 meets -inf."""
    lowest_u, least = lowest(u), -160.0 if u.dtype == torch.float32 else -1200.0
    if not (u.is_cpu and lowest_u >= least):  # nor is NaN
        u.clamp_(min=least)
    return torch.exp(u, out=out) if lowest_u > SMALLEST[u.dtype] else exponentials(out.copy_(u), lowest_u)


def ldr_backward(
    grad: Tensor, scores: Tensor, target: Tensor, options: LDROptions, saved: tuple[Tensor, ...]
) -> Tensor:
    """grad * d loss / d scores: one exponential a class."""
    shift, rate, slope, at_target = saved[0].unbind(1)
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    for part in chunks(scores):
        torch.sub(scores[part], shift[part, None], out=result[part])
        exponentials(result[part].mul_(rate[part, None])).mul_((grad * slope)[part, None])
    return result.scatter_(1, target[:, None], (grad * at_target)[:, None])


@dataclass(frozen=True)
class AtOwn(Tail):
    """The sum of exp((x - best wrong) / t) at a row's own temperature t, and t: a sum of three numbers a step."""

    options: LDROptions
    rank: int = 1

    def talk(self, part: Slice) -> Talk:
        """Newton's steps, those of one process."""
        assert self.options.classes is not None
        scores, shift, own = part.scores, part.shift(self.rank), part.own_scores()
        dtype, impossible = row_dtype(scores), not_finite_above(part.values.amax(1)) | (own == -torch.inf)
        lead = torch.where(impossible, 0.0, own.to(dtype) - shift.to(dtype)) - self.options.margin
        search = _own_temperature(lead, self.options.classes, self.options, scores.dtype)
        rate, found = next(search), None
        while found is None:
            sums = yield Sum(self._sums(part, shift, rate))
            try:
                rate = search.send(sums.to(dtype))
            except StopIteration as stop:
                found = stop.value
        rate, others = found
        listed = ((part.wrong_values() - shift[:, None]).to(dtype) * rate[:, None]).exp().sum(1)
        return torch.stack(((others - listed).clamp(min=0.0), 1.0 / rate))

    def _sums(self, part: Slice, shift: Tensor, rate: Tensor) -> Tensor:
        """`_sums` over the slice, (3, rows)."""
        found = part.scores.new_zeros((3, part.scores.shape[0]))
        for rows, (u, e) in part.leads(shift, part.at_target, 2):
            _exponentials_of(u.mul_(rate[rows, None].to(u.dtype)), e)
            for place, sums in enumerate(found):
                torch.sum(e.mul_(u) if place else e, 1, out=sums[rows])
        return found

    def kept(self, slopes: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The slope of a class that has the shift's score, and 1 / t."""
        return slopes[:1] / numbers[1], 1.0 / numbers[1:]

    def field(self, lead: Tensor, slopes: Tensor, settings: Tensor) -> Tensor:
        """One exponential a class."""
        return exponentials(lead.mul_(settings)).mul_(slopes)


def ldr_head(options: LDROptions) -> Head:
    """One sum of exponentials; where rows have their own temperature, the best wrong score as well."""
    if options.alpha is None or options.classes == 1:
        return Head(1, [PowerSums(1.0 / options.temperature)])
    return Head(2, [AtOwn(options)])


LDR = Loss("ldr", LDROptions, ldr_definition, ldr_forward, ldr_backward, head=ldr_head)


@takes_probabilities
def ldr_loss(
    scores: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    margin: float = 1.0,
    alpha: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The label-distributionally robust losses LDR-KL and ALDR-KL of Zhu, Ying and Yang (2023); chapter 23.

    max over distributions p of sum p_j (x_j - x_y + margin [j != y]) - t KL(p, uniform), which is a cross-entropy at
    temperature t. It knows no k. With alpha every row has its own t; see ``topk.losses.ranking``.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        temperature: t, or where it starts from, > 0.
        margin: by how much the right class must lead, >= 0.
        alpha: None for a fixed temperature, or > 1: rows go down to temperature (1 - 1 / alpha) at most.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch" or "compiled".
    """
    classes = check_scores(scores, target)
    temperature = check_number("temperature", temperature, above=0.0)
    margin = check_number("margin", margin, least=0.0)
    alpha = None if alpha is None else check_number("alpha", alpha, above=1.0)
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    return reduced_loss(LDR, LDROptions(temperature, margin, alpha, classes), scores, target, **tail)


# --- softmax at K ----------------------------------------------------------------------------------------------------


class SoftmaxAtKOptions(NamedTuple):
    """Softmax at K's arguments."""

    ks: list[int]
    weights: list[float]  # of the ks
    temperature: float
    weight_temperature: float


def softmax_at_k_definition(
    scores: Tensor,
    target: Tensor,
    k: int,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    tail: Tensor | None = None,  # (1, rows): the sum of exp(x / temperature) over classes that are not listed
) -> Tensor:
    """The loss of every row (rows,)."""
    own = target_scores(scores, target)
    border = scores.detach().gather(1, largest_classes(scores, k)[:, -1:])[:, 0]
    share = torch.where(border == -torch.inf, 1.0, ((own - border) / weight_temperature).sigmoid())
    return share * (with_tail((scores / temperature).logsumexp(1), tail) - own / temperature)


def softmax_at_k_forward(scores: Tensor, target: Tensor, options: SoftmaxAtKOptions) -> tuple[Tensor, ...]:
    """loss (rows,) and shift, the slope of a class that has this score, and y's (rows, 3)."""
    ks, weights, temperature, width = options
    values, dtype = largest_values(scores, ks[-1]), row_dtype(scores)
    own, shift = target_scores(scores, target), values[:, 0]
    broken = broken_rows(shift, own)
    shift = shift if broken is None else finite_or_zero(shift)
    others = sum_exponentials(scores, shift, target[:, None], 1.0 / temperature).to(dtype)
    wide, own = shift.to(dtype), own.to(dtype)
    lead = (own - wide) / temperature
    entropy = softplus(others.log() - lead, threshold=50.0)
    each = torch.stack([((own - values[:, k - 1]) / width).sigmoid() for k in ks], 1)
    rates = each.new_tensor(weights)
    share, steep = each @ rates, (each - each * each) @ rates / width
    slope = share / temperature / (others + lead.exp())
    table = torch.stack((wide, slope, steep * entropy - slope * others), 1)
    loss = share * entropy
    if broken is not None:
        loss, table[:, 1:] = mended(broken, loss, table[:, 1:])
    return loss.to(scores.dtype), table.to(scores.dtype)


def softmax_at_k_backward(
    grad: Tensor, scores: Tensor, target: Tensor, options: SoftmaxAtKOptions, saved: tuple[Tensor, ...]
) -> Tensor:
    """grad * the field: one exponential a class."""
    shift, slope, at_target = saved[0].unbind(1)
    result = scaled_exponentials(scores, shift, grad * slope, 1.0 / options.temperature)
    return result.scatter_(1, target[:, None], (grad * at_target)[:, None])


SOFTMAX_AT_K = Loss(
    "softmax_at_k",
    SoftmaxAtKOptions,
    softmax_at_k_definition,
    softmax_at_k_forward,
    softmax_at_k_backward,
    head=lambda options: Head(options.ks[-1], [PowerSums(1.0 / options.temperature)]),
)


@takes_probabilities
def softmax_at_k_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The recommendation loss SL@K of Yang et al. (2025), for one relevant item a row; chapter 23.

    sigmoid((x_y - x_[k]) / weight_temperature) times cross-entropy at a temperature, x_[k] held fixed. With k all
    classes it is 0, as the other losses are: a list of everything cannot leave y out.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        k: the length of the list, or a mapping ``{k: weight}`` whose weights sum to 1.
        temperature: of cross-entropy, > 0.
        weight_temperature: how sharply rows beyond the list are left out, > 0.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch" or "compiled".
    """
    ks, weights = check_k(k, check_scores(scores, target))
    temperature = check_number("temperature", temperature, above=0.0)
    width = check_number("weight_temperature", weight_temperature, above=0.0)
    options = SoftmaxAtKOptions(ks, weights, temperature, width)
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    return reduced_loss(SOFTMAX_AT_K, options, scores, target, **tail)


# --- modules ---------------------------------------------------------------------------------------------------------


class AUTKCLoss(LossModule):
    """Module form of :func:`topk.autkc_loss`."""

    function = staticmethod(autkc_loss)

    def __init__(
        self,
        k: KArgument = 5,
        *,
        surrogate: str = "exponential",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())


class LDRLoss(LossModule):
    """Module form of :func:`topk.ldr_loss`."""

    function = staticmethod(ldr_loss)

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        margin: float = 1.0,
        alpha: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())


class SoftmaxAtKLoss(LossModule):
    """Module form of :func:`topk.softmax_at_k_loss`."""

    function = staticmethod(softmax_at_k_loss)

    def __init__(
        self,
        k: KArgument = 5,
        *,
        temperature: float = 1.0,
        weight_temperature: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())
