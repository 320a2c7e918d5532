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
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from topk._cpu import (
    SMALLEST,
    buffers,
    chunks,
    exponentials,
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
    finite_or_zero,
    largest_classes,
    largest_wrong_and_own,
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
    "logistic": torch.nn.functional.softplus,
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
    """loss (rows,), the best classes and y, their slopes, and shift and slope of all others (rows, 2)."""
    wide = torch.empty(0, scores.shape[1], dtype=row_dtype(scores), device=scores.device)
    places = _places(options, wide)
    values, index = ordered_topk(scores, len(places) + 1)
    own, shift = target_scores(scores, target), finite_or_zero(values[:, 0])
    bad, impossible = not_finite_above(values[:, 0]), own == -torch.inf
    wrong, index = without_target(values, index, target)
    index = torch.cat((index, target[:, None]), 1)
    x = torch.cat((wrong, own[:, None]), 1).to(places.dtype) - shift[:, None].to(places.dtype)
    total = torch.ones_like(x[:, 0])
    if options.surrogate != "hinge":
        listed = torch.where(torch.isfinite(x), x, -torch.inf).exp()
        total = listed.sum(1) + sum_exponentials(scores, shift, index).to(x.dtype)
        x = listed / total[:, None]
    exists = wrong > -torch.inf
    lead = torch.where(exists, x[:, :-1] - x[:, -1:], 0.0)
    loss = (places * torch.where(exists, SURROGATES[options.surrogate](lead), 0.0)).sum(1)
    slopes = places * torch.where(exists, _SLOPES[options.surrogate](lead), 0.0)
    slopes, rest = torch.cat((slopes, -slopes.sum(1, keepdim=True)), 1), torch.zeros_like(total)
    if options.surrogate != "hinge":  # through the softmax
        mean = (slopes * x).sum(1, keepdim=True)
        slopes, rest = x * (slopes - mean), -mean[:, 0] / total
    loss = loss.masked_fill(impossible, torch.inf).masked_fill(bad, torch.nan)
    slopes = slopes.masked_fill(impossible[:, None], 0.0).masked_fill(bad[:, None], torch.nan)
    rest = rest.masked_fill(impossible, 0.0).masked_fill(bad, torch.nan)
    dtype = scores.dtype
    return loss.to(dtype), index, slopes.to(dtype), torch.stack((shift, rest.to(dtype)), 1)


def autkc_backward(
    grad: Tensor, scores: Tensor, target: Tensor, options: AUTKCOptions, saved: tuple[Tensor, ...]
) -> Tensor:
    """grad * d loss / d scores: one exponential a class, or with the hinge a scatter."""
    index, slopes, rest = saved
    if options.surrogate == "hinge":
        result = (0.0 * rest[:, 1:]).expand_as(scores).contiguous()
    else:
        result = scaled_exponentials(scores, rest[:, 0], grad * rest[:, 1])
    return result.scatter_(1, index, grad[:, None] * slopes)


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
    level = start - (mean - log_total + math.log(n)) / strength
    f = rate * level - 1.0
    slope = (level - variance / strength).detach()
    low, high = torch.where(f <= 0.0, rate, bracket[0]), torch.where(f >= 0.0, rate, bracket[1])
    rises = slope > 1e-4 * start
    newton = rate - f / torch.where(rises, slope, 1.0)
    kept = rises & (newton >= low) & (newton <= high)
    return torch.where(kept, newton, (low + high) / 2), (low.detach(), high.detach())


def ldr_forward(scores: Tensor, target: Tensor, options: LDROptions) -> tuple[Tensor, ...]:
    """loss (rows,) and shift, 1 / t, the slope of a class that has the shift's score, and y's (rows, 4)."""
    temperature, margin, alpha, _ = options
    n, dtype = scores.shape[1], row_dtype(scores)
    largest = largest_wrong(scores, target)
    own = target_scores(scores, target)
    shift = finite_or_zero(torch.where(largest == -torch.inf, own - margin, largest))  # y may be the only class left
    bad, impossible = not_finite_above(largest, own), own == -torch.inf
    # Relative to the best wrong class plus margin, y stands at -gap.
    gap = torch.where(bad | impossible, 0.0, shift.to(dtype) - own.to(dtype)) + margin
    t, price = torch.full_like(gap, temperature), torch.zeros_like(gap)
    if alpha is None or n == 1:
        others = _sums(scores, target, shift, 1.0 / t, powers=1)[0]
    else:
        search = _own_temperature(gap, n, options, scores.dtype)
        rate, found = next(search), None
        while found is None:
            try:
                rate = search.send(_sums(scores, target, shift, rate, powers=3))
            except StopIteration as stop:
                found = stop.value
        t, others = found
        price = alpha * math.log(n) / temperature / 2 * (t - temperature).square()
    at_target = (-gap / t).exp()
    total = others + at_target
    entropy = torch.where(gap < 0.0, torch.log1p(others / at_target.clamp(min=1.0)), total.log() + gap / t)
    loss = t * (entropy - math.log(n)) - price
    loss = loss.masked_fill(impossible, torch.inf).masked_fill(bad, torch.nan)
    shares = torch.stack((1.0 / total, -others / total), 1).masked_fill(impossible[:, None], 0.0)
    table = torch.cat((1.0 / t[:, None], shares), 1).masked_fill(bad[:, None], torch.nan)
    return loss.to(scores.dtype), torch.cat((shift[:, None], table.to(scores.dtype)), 1)


def _own_temperature(
    gap: Tensor, n: int, options: LDROptions, dtype: torch.dtype
) -> Generator[Tensor, Sequence[Tensor], tuple[Tensor, Tensor]]:
    """t and the sum over the wrong classes of exp((x - best wrong) / t) (rows,); yields 1 / t, gets `_sums` there."""
    assert options.alpha is not None
    strength = options.alpha * math.log(n) / options.temperature
    rate = torch.full_like(gap, 1.0 / options.temperature)
    bracket = rate, rate * options.alpha / (options.alpha - 1.0)
    enough, exact = (2e-5, 1e-14) if dtype == torch.float64 else (6e-3, 5e-7)  # for the sum, and for the rate itself
    size = torch.full_like(gap, 0.1)  # as if such a step had come before the first
    for _ in range(_STEPS):
        before, (total, first, second) = rate, (yield rate)
        mean = first / total.clamp(min=1.0)
        variance = (second / total.clamp(min=1.0) - mean * mean).relu()
        moments = _with_target(total, first, second, -gap * rate)
        rate, bracket = _next(rate, bracket, moments, n, options.temperature, strength)
        step = rate / before - 1.0
        earlier, size = size, step.abs()
        after = (size / earlier.clamp(min=1e-20)).square() * size  # what is left, as steps shrink quadratically
        spread = size * (1.0 + variance.sqrt())  # two cumulants give the sum to a sixth of its cube
        if rate.is_cpu and not bool(((spread > enough) | ((after > exact) & (size < earlier))).any()):
            break
    return 1.0 / rate, total * (mean * step + variance * step * step / 2).exp()


def _with_target(total: Tensor, first: Tensor, second: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_moments` of all leads, relative to the larger of the best wrong class's and y's, from the wrong ones' sums."""
    top = y.clamp(min=0.0)
    wrong, own = (-top).exp(), (y - top).exp()
    mass = wrong * total + own
    mean = (wrong * first + own * y) / mass
    square = (wrong * second + own * y * y) / mass
    return mass.log() + top, mean, square - mean * mean


def _sums(scores: Tensor, target: Tensor, shift: Tensor, rate: Tensor, powers: int) -> list[Tensor]:
    """Sums over the wrong classes of exp(u), u exp(u), u^2 exp(u), as many as asked for; u = (x - shift) rate."""
    found = [torch.empty_like(rate) for _ in range(powers)]
    u_space, e_space = buffers(scores, 2)
    for part in chunks(scores):
        u, e = (space[: part.stop - part.start] for space in (u_space, e_space))
        torch.sub(scores[part], shift[part, None], out=u).mul_(rate[part, None].to(u.dtype))
        _exponentials_of(u, e).scatter_(1, target[part, None], 0.0)
        for place, sums in enumerate(found):
            if place:
                e.mul_(u)
            sums[part] = e.sum(1).to(rate.dtype)
    return found


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
        gap = torch.where(impossible, 0.0, shift.to(dtype) - own.to(dtype)) + self.options.margin
        search = _own_temperature(gap, self.options.classes, self.options, scores.dtype)
        rate, found = next(search), None
        while found is None:
            sums = yield Sum(self._sums(part, shift, rate))
            try:
                rate = search.send(sums.to(dtype))
            except StopIteration as stop:
                found = stop.value
        t, others = found
        listed = ((part.wrong_values() - shift[:, None]).to(dtype) / t[:, None]).exp().sum(1)
        return torch.stack(((others - listed).clamp(min=0.0), t))

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
    values, _ = ordered_topk(scores, ks[-1])
    own, shift, dtype = target_scores(scores, target), finite_or_zero(values[:, 0]), row_dtype(scores)
    bad, impossible = not_finite_above(values[:, 0]), own == -torch.inf
    others = sum_exponentials(scores, shift, target[:, None], 1.0 / temperature).to(dtype)
    lead = torch.where(bad | impossible, 0.0, own.to(dtype) - shift.to(dtype))
    at_target = (lead / temperature).exp()
    entropy = torch.where(at_target > 0.5, torch.log1p(others / at_target.clamp(min=0.5)), 0.0)
    entropy = torch.where(at_target > 0.5, entropy, (others + at_target).log() - lead / temperature)
    share, steep = torch.zeros_like(lead), torch.zeros_like(lead)
    for k, weight in zip(ks, weights, strict=True):
        border = values[:, k - 1].to(dtype)
        each = torch.where(border == -torch.inf, 1.0, ((own.to(dtype) - border) / width).sigmoid())
        share, steep = share + weight * each, steep + weight * each * (1.0 - each) / width
    slope = share / temperature / (others + at_target)
    loss = (share * entropy).masked_fill(impossible, torch.inf).masked_fill(bad, torch.nan)
    table = torch.stack((slope, steep * entropy - slope * others), 1)
    table = table.masked_fill(impossible[:, None], 0.0).masked_fill(bad[:, None], torch.nan)
    return loss.to(scores.dtype), torch.cat((shift[:, None], table.to(scores.dtype)), 1)


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

    sigmoid((x_y - x_[k]) / weight_temperature) times cross-entropy at a temperature, x_[k] held fixed.

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
