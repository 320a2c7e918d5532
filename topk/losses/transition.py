"""The top-k transition loss after Sawada, Kaneko and Sagi (2020), as reconstructed in the book (chapter 5).

With p = softmax(x), T the k classes of largest score and CE = -log p_y, smoothed if asked for,

    loss = (1 - a) CE + a G,        G = -log sum_{j in T} p_j if y is in T, else -log p_y.

The weight a carries no gradient. It comes from outside, or is read off the lead of y over the (k+1)-th score:

    a = s^2 (3 - 2 s),        s = clip((x_y - x_[k+1]) / width, 0, 1).

With S the sum of p over T, h = a if y is in T and 0 if not, and e the smoothing over n classes, this is

    loss = -(1 - h - e (1 - a)) log p_y - h log S - e (1 - a) mean of log p,
    slope_j = p_j - h [j in T] p_j / S - (1 - h - e (1 - a)) [j = y] - e (1 - a) / n.

So backward is one softmax with corrections on k + 1 classes, which forward has worked out. Several k share one
selection. Rows with something that is not finite are rare: their loss gives them away, and they are mended.
"""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import Tensor

from topk.losses.room import (
    CHUNK,
    Options,
    Room,
    Saved,
    SavedShape,
    buffers,
    centred,
    chunks,
    log_sum_exp,
    target_scores,
)
from topk.losses.selection import ordered_and_next


def _saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    ks = options[0]
    width = max(ks, default=0) + 1
    return ((rows, width), torch.int64), ((rows, width), None), ((rows, 2), None), ((rows, len(ks)), None)


def margins(scores: Tensor, target: Tensor, ks: list[int]) -> Tensor:
    """x_y - x_[k+1] (rows, number of ks); +inf where there is no (k+1)-th score, -inf where y is impossible."""
    mine = target_scores(scores, target)[:, None]
    lead = _lead(mine, scores.topk(ks[-1] + 1, dim=1).values, ks)
    return lead.masked_fill(mine == -torch.inf, -torch.inf)


def _lead(mine: Tensor, values: Tensor, ks: list[int]) -> Tensor:
    return mine - (values[:, ks[0] :] if len(ks) == 1 else torch.stack([values[:, k] for k in ks], 1))


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the indices of T and y, the corrections of p there (rows, k + 1), two flags, a (rows, ks).

    The flags (rows, 2) are what smoothing takes off every possible class, and 1 for a row without any.
    """
    ks, weights, width, smoothing = options
    rows, classes = scores.shape
    if not ks:
        empty = [scores.new_zeros(s, dtype=kind or scores.dtype) for s, kind in _saved(rows, classes, options)]
        return scores.new_zeros(rows), *empty
    log_p = _log_probabilities(scores, smoothing > 0.0)  # first: while it computes, the scores come into the cache
    values, top = ordered_and_next(scores, ks[-1])
    x_target = scores.gather(1, target[:, None])
    if extras:
        mix = _checked(extras[0])
        grouped = _where_among_top(mix, top == target[:, None], ks)
    else:
        mix = grouped = _from_lead(_lead(x_target, values, ks), width)  # who leads the (k+1)-th score is among the k
    places = torch.cat((top, target[:, None]), 1)
    best = _in_parts(scores, places) if log_p is None else log_p.gather(1, places)
    loss, corrections = _without_smoothing(best, grouped, options)
    flags, at_target = loss.new_zeros((rows, 2)), corrections[:, -1:]
    if smoothing > 0.0 and log_p is not None:
        taken = smoothing * (sum(weights) - sum(w * mix[:, i, None] for i, w in enumerate(weights)))
        mean, count = _mean_of_possible(log_p, scores)
        loss -= taken * mean.masked_fill(taken == 0.0, 0.0)
        at_target += taken
        flags[:, :1] = taken / count
    whole = torch.addcmul(loss, at_target, best[:, -1:])
    if not (scores.is_cpu and math.isfinite(float(whole.sum()))):
        # Where G alone is left, log p_y does not matter, even if it is beyond float32.
        whole = torch.where((at_target == 0.0) & (x_target > -torch.inf), loss, whole)
        whole = _mended(whole, corrections, flags, values[:, :1], x_target)
    return whole.squeeze(1), places, corrections, flags, mix


def _log_probabilities(scores: Tensor, everywhere: bool) -> Tensor | None:
    """log p, in a work space if that has room, since new memory is slow; None if it has not, unless `everywhere`."""
    if everywhere or not scores.is_cpu:
        return scores.log_softmax(1)
    return torch.log_softmax(scores, 1, out=buffers(scores, 1)[0]) if 0 < scores.numel() <= CHUNK else None


def _in_parts(scores: Tensor, places: Tensor) -> Tensor:
    """log p at `places`, through a work space."""
    (buffer,) = buffers(scores, 1)
    best = torch.empty_like(places, dtype=scores.dtype)
    for part in chunks(scores):
        log_p = torch.log_softmax(scores[part], 1, out=buffer[: part.stop - part.start])
        torch.gather(log_p, 1, places[part], out=best[part])
    return best


def _mean_of_possible(log_p: Tensor, scores: Tensor) -> tuple[Tensor, Tensor | int]:
    """The mean of log p over the classes that are not masked by -inf, and their number; spoils `log_p`."""
    total = log_p.sum(1, keepdim=True)
    if log_p.is_cpu and math.isfinite(float(total.sum())):
        return total / log_p.shape[1], log_p.shape[1]
    masked = scores == -torch.inf
    total = log_p.masked_fill_(masked, 0.0).sum(1, keepdim=True)
    count = log_p.copy_(~masked).sum(1, keepdim=True)  # counted here, since the sum of a mask makes it an int64 first
    return total / count, count


def _checked(mix: Tensor) -> Tensor:
    """A copy of the weights a that came from outside."""
    if mix.is_cpu and bool(((mix < 0.0) | (mix > 1.0)).any()):
        low, high = (float(v) for v in mix.aminmax())
        raise ValueError(f"transition must give weights from 0 to 1, got values from {low:g} to {high:g}")
    return mix.clone(memory_format=torch.contiguous_format)


def _from_lead(lead: Tensor, width: float) -> Tensor:
    if width != 1.0:
        lead = lead.div_(width)
    step = lead.clamp_(0.0, 1.0).nan_to_num_()  # -inf minus -inf: an impossible y leads nobody
    return step * step * torch.rsub(step, 3.0, alpha=2.0)


def _where_among_top(mix: Tensor, found: Tensor, ks: list[int]) -> Tensor:
    """The weights a where y is among the k largest, else 0."""
    hit = torch.stack([found[:, :k].any(1) for k in ks], 1)
    return mix * hit


def _without_smoothing(log_p: Tensor, grouped: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """-h log S (rows, 1), and what has to be added to p on T and y (rows, k + 1), but for the smoothing."""
    ks, weights, _, _ = options
    p = log_p[:, :-1].exp()
    if len(ks) == 1:
        share, group = grouped * -weights[0], p.sum(1, keepdim=True)
        slopes = share / group
        loss, taken = share * group.log(), share
    else:
        share, group = grouped * grouped.new_tensor(weights).neg_(), p.cumsum(1)[:, [k - 1 for k in ks]]
        loss, taken = (share * group.log()).sum(1, keepdim=True), share.sum(1, keepdim=True)
        # The j-th largest score belongs to the groups of all k >= j.
        slopes = (share / group).flip(1).cumsum(1).flip(1)[:, [bisect_right(ks, j) for j in range(ks[-1])]]
    return loss, torch.cat((slopes * p, torch.rsub(taken, -sum(weights))), 1)


def _mended(loss: Tensor, corrections: Tensor, flags: Tensor, largest: Tensor, x_target: Tensor) -> Tensor:
    """The loss with NaN in bad rows and +inf where y is impossible, whose gradient is p alone."""
    impossible, dead = x_target == -torch.inf, largest == -torch.inf
    corrections.masked_fill_(impossible, 0.0)
    flags[:, :1].masked_fill_(dead, 0.0)
    flags[:, 1:].masked_fill_(dead, 1.0)
    return loss.masked_fill(impossible, torch.inf).masked_fill(~(largest < torch.inf), torch.nan)


# --- backward --------------------------------------------------------------------------------------------------------


def backward(grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """grad * d loss / d scores: softmax, corrected on T and y."""
    ks, weights, _, smoothing = options
    if not ks:
        return torch.zeros_like(scores, memory_format=torch.contiguous_format)
    places, corrections, flags, _ = saved
    total = sum(weights)
    result = scores.softmax(1).mul_((grad if total == 1.0 else grad * total)[:, None])
    if smoothing > 0.0:
        result.sub_(grad[:, None] * flags[:, :1]).masked_fill_(scores == -torch.inf, 0.0)
    result.scatter_add_(1, places, grad[:, None] * corrections)
    dead = flags[:, 1]
    return result if scores.is_cpu and not bool(dead.any()) else result.masked_fill_(dead[:, None] > 0.0, 0.0)


# --- the same number once more, for second derivatives ---------------------------------------------------------------


def formula(scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """The loss a row by log-sum-exps over masks; a and T are constants."""
    ks, weights, _, smoothing = options
    places, _, _, mix = saved
    scores = centred(scores)
    x_target = target_scores(scores, target)
    impossible = x_target == -torch.inf
    possible = scores > -torch.inf
    every = log_sum_exp(scores, possible)
    entropy = every - torch.where(impossible, 0.0, x_target)
    mean = torch.where(possible, scores, 0.0).sum(1) / possible.sum(1).clamp(min=1)
    smoothed = (1.0 - smoothing) * entropy + smoothing * (every - mean)
    loss = torch.zeros_like(x_target)
    for place, (k, weight) in enumerate(zip(ks, weights, strict=True)):
        top = places[:, :k]
        hit = (top == target[:, None]).any(1) & ~impossible
        group = log_sum_exp(scores, torch.zeros_like(possible).scatter(1, top, True))
        a = mix[:, place]
        loss = loss + weight * ((1.0 - a) * smoothed + a * torch.where(hit, every - group, entropy))
    return loss


TRANSITION = Room(
    name="transition",
    options="int[] ks, float[] weights, float width, float label_smoothing",
    extras=("mix",),  # none where the margins decide
    saved=_saved,
    forward=forward,
    backward=backward,
    formula=formula,
)
