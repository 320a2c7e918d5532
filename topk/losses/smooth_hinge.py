"""The convex relatives of the hinges: maxima over a set of probabilities, less a strictly convex term (chapter 4).

With w_1 >= w_2 >= ... the scores of the wrong classes minus x_y, z = margin + w, p >= 0 over the wrong classes, s their
sum, and gamma = `smoothing`:

    topk_entropy       max <p, w> - sum p log p - (1 - s) log(1 - s)     s <= 1, p_j <= s / k    Lapin et al. (2016)
    alpha_smooth       max <p, z> - gamma / 2 |p|^2                      s <= 1, p_j <= s / k
    beta_smooth        max <p, z> - gamma / 2 |p|^2                      s <= 1, p_j <= 1 / k

and, p now over all classes, s = 1 and sigma_k(p) the sum of the k largest p_j,

    polyhedral         margin - x_y + max <p, x> - margin sigma_k(p)     Finocchiaro, Frongillo et al. (2022)
    polyhedral_smooth  the same with - gamma sum p log p inside the maximum

The first three are libsdca's, whose alpha leaves y's own z_y = 0 out of the k largest: where fewer than k wrong classes
violate the margin it is below what "alpha" becomes with a large k, and for gamma -> 0 it is the relu of the mean of the
k largest z_j of *wrong* classes. The last two are built by the embedding theorem (the surrogate is the conjugate of
minus the Bayes risk), since of that paper, and of Yang and Koyejo's (2020) differentiable convex loss, only the
abstracts could be read: reconstructions.

The p that attains the maximum is the gradient, and in all five it is one function of x_j with a few numbers a row:

    topk_entropy       min(exp(x_j - a), s / k)          a in closed form
    alpha, beta        clip(x_j - a, 0, b) / gamma       a and b by one root of a function that is linear in pieces
    polyhedral         equal on the classes x_j >= a, 0 elsewhere
    polyhedral_smooth  softmax((x - m) / gamma), m = clip(x - a, 0, margin) with sum k margin: the sparse soft top-k

Where the k-th wrong class is masked (-inf) the loss is 0, but for beta_smooth's: its sum runs over what exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from topk._cpu import buffers, chunks, exponentials, ordered_topk, sum_exponentials
from topk.autograd import Head, Loss, Tail
from topk.losses.common import (
    finite_or_zero,
    largest_classes,
    not_finite_above,
    row_dtype,
    target_scores,
    with_tail,
    without_target,
)

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
    tail: Tensor | None = None,  # (1, rows), for topk_entropy: the sum of exp(x - w_k) over classes not listed
) -> Tensor:
    """The loss of every row (rows,)."""
    order = largest_classes(scores, scores.shape[1])
    x, own = scores.gather(1, order), target_scores(scores, target)
    lead = without_target(x, order, target)[0] - own[:, None]  # w_1 >= w_2 >= ...
    missing = lead[:, k - 1] == -torch.inf
    if variant == "polyhedral":
        loss = margin + _top_average(x, k, margin) - own
    elif variant == "polyhedral_smooth":
        mask = band(x, k, margin, "fixed sum")[2]
        loss = margin + smoothing * ((x - mask) / smoothing).logsumexp(1) - own
    elif variant == "topk_entropy":
        lead = torch.where(missing[:, None], 0.0, lead)
        kth = (lead[:, k - 1] + own).detach()
        rests = with_tail(lead[:, k - 1 :].logsumexp(1), tail, kth - own)[:, None]
        for u in range(k - 2, -1, -1):
            rests = torch.cat((torch.logaddexp(lead[:, u], rests[:, 0])[:, None], rests), 1)
        loss = softplus(capped_average(lead[:, :k], rests)[0], threshold=50.0)
    else:
        z = margin + lead
        loss = _squared(z, band(z, k, smoothing / k, variant)[2] / smoothing, smoothing)
    return loss if variant == "beta_smooth" else torch.where(missing, 0.0, loss)


def _squared(z: Tensor, p: Tensor, gamma: float) -> Tensor:
    """<p, z> - gamma / 2 |p|^2 (rows,)."""
    return (p * torch.where(p > 0.0, z, 0.0)).sum(1) - gamma / 2 * (p * p).sum(1)


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
    best = torch.cat((torch.zeros_like(lead[:, :1]), lead[:, :-1].cumsum(1)), 1)
    return ((best + others * levels) / k + math.log(k)).gather(1, u)[:, 0], u


def _top_average(x: Tensor, k: int, margin: float) -> Tensor:
    """The largest of x_1 - margin and the (x_1 + ... + x_j - k margin) / j over j >= k: max <p, x> - margin sigma_k."""
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    listed = x > -torch.inf
    means = (torch.where(listed, x, 0.0).cumsum(1) - k * margin) / count
    return torch.maximum(x[:, 0] - margin, means.masked_fill(~listed, -torch.inf)[:, k - 1 :].amax(1))


def band(z: Tensor, k: int, height: float, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """low and height (rows,) and gamma p = clip(z - low, 0, height); differentiable. z in falling order.

    variant: "beta_smooth" and "alpha_smooth" with height = gamma / k, or "fixed sum", where p sums to 1 whatever z is.
    Where sum p = 1 the height is given; alpha's, where it is less, follows from z. With u classes above the band, of
    sum a, and m within, of sum b, both are closed forms: what has to be searched for is who is where.
    """
    start, size, free = _band(z.detach(), k, height, variant).unbind(1)
    above, near = z.detach() - start[:, None], 64 * torch.finfo(z.dtype).eps * (size + start.abs())[:, None]
    beyond = above >= size[:, None] - near
    within = (above > near) & ~beyond
    u, m = beyond.sum(1).to(z.dtype), within.sum(1).clamp(min=1).to(z.dtype)
    a, b, left = torch.where(beyond, z, 0.0).sum(1), torch.where(within, z, 0.0).sum(1), k - u
    low = torch.where(within.any(1), (b - left * height) / m, start)
    if variant == "beta_smooth":
        low = torch.where(free > 0.0, 0.0, low)
    if variant == "alpha_smooth":
        own = (left * b + m * a) / (m * u + left * left)
        below = torch.where(left > 0.0, (u * own - a) / left.clamp(min=1.0), start)
        low, size = torch.where(free > 0.0, below, low), torch.where((free > 0.0) & (size > 0.0), own, size)
    p = torch.where(beyond, size[:, None], torch.where(within, z - low[:, None], 0.0))
    return low, size, p


@torch.library.custom_op("topk::hinge_band", mutates_args=())
def _band(z: Tensor, k: int, height: float, variant: str) -> Tensor:
    """low, height, and 1 where sum p is free (rows, 3)."""
    first = finite_or_zero(z[:, k - 1]) - height
    low = _root(lambda t: _excess(z, t, k, height), first, torch.maximum(z[:, 0], first), first)
    size, free = torch.full_like(low, height), torch.zeros_like(low)
    if variant == "beta_smooth":
        free = (low < 0.0).to(low.dtype)
        low = low.relu()
    elif variant == "alpha_smooth":
        free = (low + (z - (low + height)[:, None]).relu().sum(1) / k < 0.0).to(low.dtype)
        if not free.is_cpu or bool(free.any()):
            low, size = _free_band(torch.where((free > 0.0)[:, None], z, 0.0), k, free > 0.0, low, size)
    return torch.stack((low, size, free), 1)


def _free_band(z: Tensor, k: int, free: Tensor, low: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha's low and height in the rows where sum p is free."""
    pays = finite_or_zero(z[:, :k].mean(1)) > 0.0
    most = torch.where(pays, z[:, k - 1].clamp(max=0.0), 0.0)  # k classes at least have p_j > 0
    least = torch.minimum(-finite_or_zero(z[:, :k].mean(1)).relu(), most) - 1.0
    inner = _root(lambda t: _cone_excess(z, t, k)[:2], least, most, most)
    excess, _, high = _cone_excess(z, inner, k)
    height = torch.where(pays, high - inner + excess.relu() / k, 0.0)  # excess > 0: no p_j is at s / k
    inner = torch.where(pays, inner, z[:, 0].relu())
    return torch.where(free, inner, low), torch.where(free, height, size)


@_band.register_fake
def _(z: Tensor, k: int, height: float, variant: str) -> Tensor:
    return z.new_empty((z.shape[0], 3))


@_band.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], z: Tensor, k: int, height: float, variant: str) -> tuple[Tensor, int]:
    rows = z.movedim(in_dims[0] or 0, 0)
    return _band(rows.flatten(0, 1), k, height, variant).unflatten(0, rows.shape[:2]), 0


def _excess(x: Tensor, a: Tensor, k: int, height: float) -> tuple[Tensor, Tensor]:
    """sum clip(x_j - a, 0, height) - k height, and minus the number of classes in between."""
    above = x - a[:, None]
    return above.clamp(0.0, height).sum(1) - k * height, -((above > 0.0) & (above < height)).sum(1).to(x.dtype)


def _cone_excess(z: Tensor, t: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is 0 at alpha's low level where sum p < 1, its slope in t, and the high level that belongs to t.

    With S(b) the sum of relu(z_j - b), the two levels t <= 0 and h obey S(h) = -k t and S(t) - S(h) = k (h - t).
    """
    count = torch.arange(1, k + 1, dtype=z.dtype, device=z.device)
    high, u = ((z[:, :k].cumsum(1) + k * t[:, None]) / count).max(1)
    above = z - t[:, None]
    slope = 2.0 * k - (above > 0.0).sum(1) - k * k / (u + 1.0)
    return above.relu().sum(1) + 2.0 * k * t - k * high, slope, high


def _root(function: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor, at: Tensor) -> Tensor:
    """Where a falling function that is linear in pieces is 0, or the bound beyond which it would be; from `at` on."""
    for _ in range(80):
        value, slope = function(at)
        low, high = torch.where(value > 0.0, at, low), torch.where(value > 0.0, high, at)
        step = at - value / slope
        # A step onto a bound would be the way back to where the function was evaluated before.
        step = torch.where((step > low) & (step < high), step, (low + high) / 2)
        there = (step - at).abs() <= 1e-15 * at.abs()
        there |= value.abs() <= 1e-15 * (at * slope).abs()
        at = torch.where(there, at, step)
        if at.is_cpu and bool(there.all()):
            break
    return at


# --- fast: the numbers of a row from its largest scores, the gradient from these numbers ---


def forward(scores: Tensor, target: Tensor, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,) and for every k what `_field` needs, (rows, 5 ks)."""
    ks, weights = options.ks, options.weights
    count = min(scores.shape[1], max(4 * ks[-1], 24) + 1) if scores.is_cpu else scores.shape[1]
    parts = [_numbers(scores, target, k, count, options) for k in ks]
    largest, own = scores.amax(1), target_scores(scores, target)
    bad, impossible = not_finite_above(largest), own == -torch.inf
    loss = torch.stack([weight * part[0] for weight, part in zip(weights, parts, strict=True)]).sum(0)
    loss = loss.masked_fill(impossible, torch.inf).masked_fill(bad, torch.nan)
    table = torch.cat([part[1] for part in parts], 1)
    table = table.masked_fill(impossible[:, None], 0.0).masked_fill(bad[:, None], torch.nan)
    return loss.to(scores.dtype), table.to(scores.dtype)


def _numbers(scores: Tensor, target: Tensor, k: int, count: int, options: Options) -> tuple[Tensor, Tensor]:
    """loss (rows,) and anchor, low, high, scale and the pull on y (rows, 5) in float64, from the `count` largest."""
    _, _, variant, margin, smoothing = options
    values, index = ordered_topk(scores, count)
    own = finite_or_zero(target_scores(scores, target)).to(row_dtype(scores))
    if variant in VARIANTS[:3]:
        values, index = without_target(values, index, target)
    anchor = finite_or_zero(values[:, k - 1] if variant == "topk_entropy" else values[:, 0])
    x = torch.where(values < torch.inf, values, 0.0).to(own.dtype) - anchor[:, None].to(own.dtype)
    gap = anchor.to(own.dtype) - own  # of the anchor to y
    if variant == "topk_entropy":
        beyond = sum_exponentials(scores, anchor, torch.cat((index[:, :k], target[:, None]), 1)).to(own.dtype)
        found = _entropy_numbers(x[:, :k], gap, beyond)
    elif variant in VARIANTS[1:3]:
        found = _band_numbers(x, gap + margin, k, smoothing, variant)
    elif variant == "polyhedral":
        found = _flat_numbers(x, gap, k, margin)
    else:
        found = _soft_numbers(scores, x, anchor, gap, k, margin, smoothing)
    loss, *table = found
    missing = (x[:, k - 1] == -torch.inf) if variant in VARIANTS[:3] else x[:, : k + 1].amin(1) == -torch.inf
    if variant != "beta_smooth":
        loss = loss.masked_fill(missing, 0.0)
        table[2:] = [each.masked_fill(missing, 0.0) for each in table[2:]]
    if variant in VARIANTS[1:3]:  # a score next to the lower end keeps that end's digits
        near = (x > table[0][:, None]).sum(1, keepdim=True).clamp(min=1) - 1
        anchor, step = values.gather(1, near)[:, 0], x.gather(1, near)[:, 0]
        table[:2] = [table[0] - step, table[1] - step]
        x = x - step[:, None]
    numbers = torch.stack((anchor.to(own.dtype), *table), 1)
    if count < scores.shape[1] and variant != "topk_entropy":  # the list must hold all that is above `low`
        short = (table[0] < x[:, -1]).nonzero().squeeze(1)
        if len(short):
            loss[short], numbers[short] = _numbers(scores[short], target[short], k, scores.shape[1], options)
    return loss, numbers


Numbers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The loss, low and high, the scale and the pull on y; scores are taken relative to an anchor."""


def _entropy_numbers(lead: Tensor, gap: Tensor, beyond: Tensor) -> Numbers:
    """p = scale min(exp(x), exp(high)), relative to the k-th wrong score, which is never at its bound."""
    k = lead.shape[1]
    missing = lead[:, -1] == -torch.inf
    lead = torch.where(missing[:, None], 0.0, lead)
    listed = torch.cat((torch.log1p(beyond)[:, None], lead[:, :-1].flip(1)), 1).logcumsumexp(1).flip(1)
    average, u = capped_average(lead + gap[:, None], listed + gap[:, None])
    rest = listed.gather(1, u)[:, 0]
    others, loss = (k - u[:, 0]).to(rest.dtype), softplus(average, threshold=50.0)
    s = average.sigmoid()
    high = rest - others.log()
    return loss, torch.zeros_like(s), high, s * others / k * (-rest).exp(), s


def _band_numbers(x: Tensor, gap: Tensor, k: int, gamma: float, variant: str) -> Numbers:
    """p = (clip(x, low, high) - low) scale."""
    z = x + gap[:, None]
    low, height, p = band(z, k, gamma / k, variant)
    p = p / gamma
    return _squared(z, p, gamma), low - gap, low + height - gap, torch.full_like(low, 1.0 / gamma), p.sum(1)


def _flat_numbers(x: Tensor, gap: Tensor, k: int, margin: float) -> Numbers:
    """p = scale on the classes of x >= low."""
    top = _top_average(x, k, margin)
    low = torch.where(top > -margin, top, 0.0)  # where the largest score decides alone
    return margin + top + gap, low, top, torch.ones_like(low), torch.ones_like(low)


def _soft_numbers(
    scores: Tensor, x: Tensor, anchor: Tensor, gap: Tensor, k: int, margin: float, gamma: float
) -> Numbers:
    """p = scale exp((x - m - high) / gamma), with x - m = low + x - clip(x, low, low + margin), at most high."""
    low = band(x, k, margin, "fixed sum")[0]
    high = low.clamp(-margin, 0.0)
    total = torch.empty_like(low)
    (buffer,) = buffers(scores, 1)
    for part in chunks(scores):
        field = buffer[: part.stop - part.start]
        levels = low[part].to(scores.dtype), high[part].to(scores.dtype)
        total[part] = _less_mask(scores[part], anchor[part], *levels, margin, gamma, field).sum(1).to(low.dtype)
    return margin + gap + high + gamma * total.log(), low, high, 1.0 / total, torch.ones_like(low)


def _less_mask(
    scores: Tensor, anchor: Tensor, low: Tensor, high: Tensor, margin: float, gamma: float, out: Tensor
) -> Tensor:
    """exp((x - m - high) / gamma), written into `out`; m is the sparse soft top-k of height `margin`."""
    torch.sub(scores, anchor[:, None], out=out)
    out.sub_(torch.clamp(out, low[:, None], (low + margin)[:, None])).sub_((high - low)[:, None])
    return exponentials(out if gamma == 1.0 else out.div_(gamma))


def backward(
    grad: Tensor,  # (rows,)
    scores: Tensor,
    target: Tensor,
    options: Options,
    saved: tuple[Tensor, ...],
) -> Tensor:
    """grad * d loss / d scores: p on the classes, less their sum on y."""
    result, pull = torch.empty_like(scores, memory_format=torch.contiguous_format), torch.zeros_like(grad)
    tables = saved[0].split(5, 1)
    for place, (table, weight) in enumerate(zip(tables, options.weights, strict=True)):
        field = result if place == 0 else torch.empty_like(result)
        for part in chunks(scores):
            _field(scores[part], table[part], grad[part] * weight, options, field[part])
        if place:
            result += field
        pull = pull + grad * weight * table[:, 4]
    if options.variant in VARIANTS[:3]:
        return result.scatter_(1, target[:, None], -pull[:, None])
    return result.scatter_add_(1, target[:, None], -pull[:, None])


def _field(scores: Tensor, table: Tensor, grad: Tensor, options: Options, out: Tensor) -> None:
    """grad p, written into `out`."""
    anchor, low, high, scale, _ = table.unbind(1)
    scale = (scale * grad)[:, None]
    if options.variant == "polyhedral_smooth":
        _less_mask(scores, anchor, low, high, options.margin, options.smoothing, out).mul_(scale)
        return
    torch.sub(scores, anchor[:, None], out=out)
    if options.variant == "topk_entropy":
        exponentials(torch.minimum(out, high[:, None], out=out)).mul_(scale)
    elif options.variant == "polyhedral":
        chosen = (out >= low[:, None]).to(out.dtype)
        torch.mul(chosen, scale / chosen.sum(1, keepdim=True).clamp(min=1.0), out=out)
    else:
        torch.clamp(out, low[:, None], high[:, None], out=out).sub_(low[:, None]).mul_(scale)


def head(options: Options) -> Head:
    """For the entropy as for Lapin's other; the others may have a slope on any number of classes."""
    if options.variant != "topk_entropy":
        raise ValueError(f"variant must not be {options.variant!r} where the classes are sharded")
    return Head(options.ks[-1] + 1, [Tail(1.0, rank=k) for k in options.ks])


LOSS = Loss("smooth_hinge", Options, definition, forward, backward, head=head)
