"""The convex relatives of the hinges: maxima over a set of probabilities, less a strictly convex term (chapter 4).

With w_1 >= w_2 >= ... the scores of the wrong classes minus x_y, z = margin + w, p >= 0 over the wrong classes, s their
sum, and gamma = `smoothing`:

    topk_entropy       max <p, w> - sum p log p - (1 - s) log(1 - s)     s <= 1, p_j <= s / k    Lapin et al. (2016)
    alpha_smooth       max <p, z> - gamma / 2 |p|^2                      s <= 1, p_j <= s / k
    beta_smooth        max <p, z> - gamma / 2 |p|^2                      s <= 1, p_j <= 1 / k

and, p now over all classes, s = 1 and sigma_k(p) the sum of the k largest p_j,

    polyhedral         margin - x_y + max <p, x> - margin sigma_k(p)     Finocchiaro, Frongillo et al. (2022)
    polyhedral_smooth  the same with - gamma sum p log p inside the maximum

The first three are libsdca's and have the values that libsdca 0.3.0 computes. Its alpha, plain or smoothed, leaves y's
own z_y = 0 out of the k largest, unlike its first versions and unlike "alpha": for gamma -> 0 it is the relu of the
mean of the k largest z_j of *wrong* classes, which is below "alpha" where fewer than k of them violate the margin and
"alpha" is not 0. The last two are built by the embedding theorem (the surrogate is the conjugate of minus the Bayes
risk), since of that paper, and of Yang and Koyejo's (2020) differentiable convex loss, only the abstracts could be
read: reconstructions.

The p that attains the maximum is the gradient, and in all five it is one function of x_j with a few numbers a row:

    topk_entropy       min(exp(x_j - a), s / k)          a in closed form
    alpha, beta        clip(x_j - a, 0, b) / gamma       a and b from a few averages of the largest scores
    polyhedral         equal on the classes x_j >= a, 0 elsewhere
    polyhedral_smooth  softmax((x - m) / gamma), m = clip(x - a, 0, margin) with sum k margin: the sparse soft top-k

Where the k-th wrong class is masked (-inf) the loss is 0, but for beta_smooth's: its sum runs over what exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from topk._cpu import buffers, chunks, exponentials, largest_values
from topk.autograd import Head, Loss
from topk.losses.common import (
    broken_rows,
    finite_or_zero,
    largest_classes,
    mended,
    row_dtype,
    target_scores,
    with_tail,
    without_target,
)
from topk.losses.hinge_levels import Level, at_level, band, levels, low_and_cut, running_sums
from topk.tails import PowerSums

VARIANTS = ("topk_entropy", "alpha_smooth", "beta_smooth", "polyhedral", "polyhedral_smooth")


class Options(NamedTuple):
    """The arguments of the loss, besides those that every loss takes."""

    ks: list[int]
    weights: list[float]  # of the ks
    variant: str
    margin: float
    smoothing: float


def definition(
    scores: Tensor,
    target: Tensor,
    k: int,
    variant: str,
    margin: float = 1.0,
    smoothing: float = 1.0,
    tail: Tensor | None = None,  # of classes not listed: topk_entropy's sum of exp(x - w_k), or what `Level` finds
) -> Tensor:
    """The loss of every row (rows,)."""
    order = largest_classes(scores, scores.shape[1])
    x, own, of_all = scores.gather(1, order), target_scores(scores, target), variant in VARIANTS[3:]
    x = x if of_all else without_target(x, order, target)[0] - own[:, None]  # w_1 >= w_2 >= ...
    missing = x[:, k if of_all else 0 if variant == "beta_smooth" else k - 1] == -torch.inf
    x = torch.where(missing[:, None], 0.0, x)
    if tail is not None and variant != "topk_entropy":
        loss = at_level(x, own, k, variant, margin, smoothing, tail)
    elif variant == "polyhedral":
        loss = margin + _top_average(x, k, margin)[0] - own
    elif variant == "polyhedral_smooth":
        mask = band(x, k, margin, "fixed sum")[2]
        loss = margin + smoothing * ((x - mask) / smoothing).logsumexp(1) - own
    elif variant == "topk_entropy":
        kth = (x[:, k - 1] + own).detach()
        rests = with_tail(x[:, k - 1 :].logsumexp(1), tail, kth - own)[:, None]
        for u in range(k - 2, -1, -1):
            rests = torch.cat((torch.logaddexp(x[:, u], rests[:, 0])[:, None], rests), 1)
        loss = softplus(capped_average(x[:, :k], rests)[0], threshold=50.0)
    else:
        low, _, p = band(margin + x, k, smoothing / k, variant)
        loss = _squared((margin + x - low[:, None]).relu(), low, p, smoothing)[0]
    return torch.where(missing, 0.0, loss)


def _squared(lead: Tensor, low: Tensor, p: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """<p, z> - gamma / 2 |p|^2 and sum p (rows,); p is given times gamma, lead = relu(z - low)."""
    total = p.sum(1) / gamma
    return torch.linalg.vecdot(p, lead - p / 2) / gamma + low * total, total


# --- the numbers of a row: from its scores in falling order ---


def capped_average(lead: Tensor, rests: Tensor) -> tuple[Tensor, Tensor]:
    """max <p, w> - sum p log p over p_j <= 1 / k with sum 1 (rows,), and u, how many p_j are at 1 / k (rows, 1).

    lead: w_1 ... w_k; rests: log of the sum of exp(w_j) over j > u, for u = 0 ... k - 1. Of the classes not at 1 / k
    p_j is proportional to exp(w_j), so that u is the first for which w_{u+1} does not exceed 1 / k.
    """
    k = lead.shape[1]
    others = torch.arange(k, 0, -1, dtype=lead.dtype, device=lead.device)  # k - u
    levels = rests - others.log()
    u = ((lead - rests).detach() <= -others.log()).to(torch.int8).argmax(1, keepdim=True)
    return (running_sums(lead)[:, :-1] + others * levels).gather(1, u)[:, 0] / k + math.log(k), u


def _top_average(x: Tensor, k: int, margin: float) -> tuple[Tensor, Tensor]:
    """max <p, x> - margin sigma_k(p) and the least score with p_j > 0 (rows,); all these p_j are equal.

    The largest of x_1 - margin and (x_1 + ... + x_j - k margin) / j over j > k.
    """
    count = torch.arange(k + 1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    average = ((x.cumsum(1)[:, k:] - k * margin) / count).amax(1)
    alone = x[:, 0] - margin
    return torch.maximum(alone, average), torch.where(average > alone, average, x[:, 0])


# --- fast: the numbers of a row from its largest scores, the gradient from these numbers ---


def forward(scores: Tensor, target: Tensor, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,) and for every k what `_field` needs, (rows, 5 ks)."""
    return _forward(scores, target, options, _listed(options) + 8)  # a few more, which are selected in the same time


def _listed(options: Options) -> int:
    """How many wrong classes to look at first. Measured on normal scores: then few rows have more p_j > 0."""
    most = options.ks[-1]
    counts = {"topk_entropy": most, "alpha_smooth": most + 8, "beta_smooth": most + 8}
    return counts.get(options.variant, 4 * most + 4)


def _forward(scores: Tensor, target: Tensor, options: Options, count: int) -> tuple[Tensor, Tensor]:
    """The same from the `count` largest scores; of the rows for which they are too few, from all."""
    count = min(count, scores.shape[1]) if scores.is_cpu else scores.shape[1]
    own, of_all = target_scores(scores, target), options.variant in VARIANTS[3:]
    values = largest_values(scores, count) if of_all else largest_values(scores, count - 1, target)
    plain = scores.is_cpu and math.isfinite(float((values[:, 0] - values[:, -1] + own).sum()))
    parts = [_numbers(scores, target, values, own, plain, k, options) for k in options.ks]
    loss, table, short = parts[0]
    if len(parts) > 1 or options.weights != [1.0]:
        loss = torch.stack([weight * part[0] for weight, part in zip(options.weights, parts, strict=True)]).sum(0)
        table, short = torch.cat([part[1] for part in parts], 1), torch.stack([part[2] for part in parts]).any(0)
    broken = None if plain else broken_rows(values[:, 0], own)
    if broken is not None:
        loss, table = mended(broken, loss, table)
    loss = loss.to(scores.dtype)
    if count < scores.shape[1] and options.variant != "topk_entropy" and bool(short.any()):
        loss[short], table[short] = _forward(scores[short], target[short], options, scores.shape[1])
    return loss, table


def _numbers(
    scores: Tensor, target: Tensor, values: Tensor, own: Tensor, plain: bool, k: int, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (rows,), anchor, rest, bound, scale and the pull on y (rows, 5), and where more than `values` counts.

    plain: all of `values` and `own` are known to be finite.
    """
    _, _, variant, margin, gamma = options
    dtype = row_dtype(scores)
    anchor = values[:, k - 1] if variant == "topk_entropy" else values[:, 0]
    last = values[:, {"beta_smooth": 0, "polyhedral": k, "polyhedral_smooth": k}.get(variant, k - 1)]
    missing = None if plain else last == -torch.inf
    anchor = anchor if missing is None else finite_or_zero(anchor)
    wide = anchor.to(dtype)
    x, gap = values.to(dtype) - wide[:, None], wide - own.to(dtype)
    x = x if missing is None else torch.where(missing[:, None], 0.0, x)
    pull, rest = torch.ones_like(gap), torch.zeros_like(gap)
    if variant == "topk_entropy":
        loss, bound, scale, pull = _entropy_numbers(x[:, :k], gap, _sum_beyond(scores, target, anchor, k))
        low = rest
    elif variant == "polyhedral":
        low, least = _top_average(x, k, margin)  # classes above `low` would raise it, even where x_1 alone has p_j > 0
        size = (x >= least[:, None]).sum(1, keepdim=True).clamp(min=1)
        anchor = values.gather(1, size - 1)[:, 0]
        loss, bound, scale = margin + low + gap, rest, 1.0 / size[:, 0].to(x.dtype)
    elif variant == "polyhedral_smooth":
        low = low_and_cut(x, running_sums(x), k, margin)[0][:, 0]
        anchor, rest = _split(wide + low, scores)
        bound = (-low - margin).relu()  # the largest x_j - m_j, relative to low
        total = _sum_less_mask(scores, (anchor, rest.to(scores.dtype), bound.to(scores.dtype)), options).to(dtype)
        loss, scale = margin + gap + low + bound + gamma * total.log(), 1.0 / total
    else:
        z = x + (gap + margin)[:, None]
        low, bound = levels(z, k, gamma / k, variant)[:2]
        lead = (z - low[:, None]).relu_()
        loss, pull = _squared(lead, low, torch.minimum(lead, bound[:, None]), gamma)
        low = low - gap - margin
        scale, (anchor, rest) = torch.full_like(low, 1.0 / gamma), _split(wide + low, scores)
    short = low <= x[:, -1]  # what ties with the last is not listed either
    if missing is not None:
        loss, bound, scale, pull, short = (e.masked_fill(missing, 0) for e in (loss, bound, scale, pull, short))
    numbers = torch.stack((anchor.to(dtype), rest, bound, scale, pull), 1)
    return loss, numbers.to(scores.dtype), short


def _split(level: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest number of the scores' type and what is left: a difference to both in turn keeps its digits."""
    anchor = level.to(scores.dtype)
    return anchor, level - anchor


def _sum_beyond(scores: Tensor, target: Tensor, anchor: Tensor, k: int) -> Tensor:
    """Sum of exp(x - the k-th wrong score) over the wrong classes but the k best, which would add 1 each (rows,)."""
    # The ones of a few classes leave float32 its digits.
    total = torch.empty_like(anchor, dtype=scores.dtype if k <= 8 else row_dtype(scores))
    (buffer,) = buffers(scores, 1)
    for part in chunks(scores):
        field = torch.sub(scores[part], anchor[part, None], out=buffer[: part.stop - part.start]).clamp_(max=0.0)
        torch.sum(exponentials(field).scatter_(1, target[part, None], 0.0), 1, dtype=total.dtype, out=total[part])
    return (total.to(row_dtype(scores)) - k).clamp_(min=0.0)


def _entropy_numbers(lead: Tensor, gap: Tensor, beyond: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, high, scale, s: p = scale min(exp(x), exp(high)), relative to the k-th wrong score, not at its bound."""
    k = lead.shape[1]
    listed = torch.cat((torch.log1p(beyond)[:, None], lead[:, :-1].flip(1)), 1).logcumsumexp(1).flip(1)
    average, u = capped_average(lead, listed)
    average, others, rest = average + gap, (k - u[:, 0]).to(lead.dtype), listed.gather(1, u)[:, 0]
    s = average.sigmoid()
    return softplus(average, threshold=50.0), rest - others.log(), s * others / k * (-rest).exp(), s


def _less_mask(scores: Tensor, numbers: Sequence[Tensor], options: Options, out: Tensor) -> Tensor:
    """exp((x - m) / gamma) up to a factor, into `out`; m is the sparse soft top-k of height `margin`."""
    anchor, rest, bound = numbers
    half = options.margin / 2  # y - clip(y, 0, margin) is y - half drawn to 0 by half
    torch.sub(scores, anchor[:, None], out=out).sub_((rest + half)[:, None])
    torch.ops.aten.softshrink.out(out, half, out=out).sub_(bound[:, None])
    return exponentials(out if options.smoothing == 1.0 else out.div_(options.smoothing))


def _sum_less_mask(scores: Tensor, numbers: Sequence[Tensor], options: Options) -> Tensor:
    """The sum of `_less_mask` over all classes (rows,)."""
    total = torch.empty_like(numbers[0])
    (buffer,) = buffers(scores, 1)
    for part in chunks(scores):
        field = _less_mask(scores[part], [each[part] for each in numbers], options, buffer[: part.stop - part.start])
        torch.sum(field, 1, out=total[part])
    return total


def backward(
    grad: Tensor,  # (rows,)
    scores: Tensor,
    target: Tensor,
    options: Options,
    saved: tuple[Tensor, ...],
) -> Tensor:
    """grad * d loss / d scores: p on the classes, less their sum on y."""
    result, pull = torch.empty_like(scores, memory_format=torch.contiguous_format), torch.zeros_like(grad)
    for place, (table, weight) in enumerate(zip(saved[0].split(5, 1), options.weights, strict=True)):
        field, share = result if place == 0 else torch.empty_like(result), grad * weight
        for part in chunks(scores):
            _field(scores[part], table[part], share[part], options, field[part])
        if place:
            result += field
        pull.addcmul_(share, table[:, 4])
    if options.variant in VARIANTS[:3]:
        return result.scatter_(1, target[:, None], -pull[:, None])
    return result.scatter_add_(1, target[:, None], -pull[:, None])


def _field(scores: Tensor, table: Tensor, grad: Tensor, options: Options, out: Tensor) -> None:
    """grad p, written into `out`."""
    anchor, rest, bound, scale, _ = table.unbind(1)
    scale = (scale * grad)[:, None]
    if options.variant == "polyhedral":
        torch.ge(scores, anchor[:, None], out=out).mul_(scale)
    elif options.variant == "polyhedral_smooth":
        _less_mask(scores, (anchor, rest, bound), options, out).mul_(scale)
    elif options.variant == "topk_entropy":
        torch.sub(scores, anchor[:, None], out=out)
        exponentials(torch.minimum(out, bound[:, None], out=out)).mul_(scale)
    else:
        torch.sub(scores, anchor[:, None], out=out).sub_(rest[:, None]).relu_()
        torch.minimum(out, bound[:, None], out=out).mul_(scale)


def head(options: Options) -> Head:
    """For the entropy as for Lapin's other; for the others about as many classes as have a slope."""
    if options.variant == "topk_entropy":
        return Head(options.ks[-1] + 1, [PowerSums(1.0, rank=k) for k in options.ks])
    depth = _listed(options) + 1
    tails = [Level(k, options.variant, options.margin, options.smoothing, depth - 1) for k in options.ks]
    return Head(depth, tails)


LOSS = Loss("smooth_hinge", Options, definition, forward, backward, head=head)
