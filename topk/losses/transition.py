"""The top-k transition loss after Sawada, Kaneko and Sagi (2020), as reconstructed in the book (chapter 5).

With p = softmax(x), T the k classes of largest score and CE = -log p_y, smoothed if asked for,

    loss = (1 - a) CE + a G,        G = -log sum_{j in T} p_j if y is in T, else -log p_y.

The weight a carries no gradient. It comes from outside, or is read off the lead of y over the (k+1)-th score:

    a = s^2 (3 - 2 s),        s = clip((x_y - x_[k+1]) / width, 0, 1).

Several k share one selection, T of the largest, and one sum over the classes outside it: with L the log-sum-exp of
the scores in T_k, and of all scores, G = L_all - L_k. The gradient is p minus one number on the classes of T and one
on y, so backward is one exponential a class, and what is kept is O(k) a row: the values on T and y are worked out in
forward, from the same few numbers a row, and written over whatever the exponential gives there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from topk.losses.room import (
    Options,
    Room,
    Saved,
    SavedShape,
    finite_or_zero,
    log_sum_exp,
    not_finite_above,
    ordered_topk,
    scaled_exponentials,
    sum_exponentials,
    target_scores,
    wide_type,
)


def _saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    ks = options[0]
    top = max(ks, default=0)
    return ((rows, top), torch.int64), ((rows, top + 3), None), ((rows,), None), ((rows, len(ks)), None)


def margins(scores: Tensor, target: Tensor, ks: list[int]) -> Tensor:
    """x_y - x_[k+1] (rows, number of ks); +inf where there is no (k+1)-th score, -inf where y is impossible."""
    mine = target_scores(scores, target)[:, None]
    following = scores.topk(ks[-1] + 1, dim=1).values[:, ks]
    return torch.where(mine == -torch.inf, -torch.inf, mine - following)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the indices of T (rows, k), the slopes (rows, k + 3), t = x_[k+1] (rows,), a (rows, ks).

    The slopes are those on T, on y, of a class whose score is t, and what smoothing takes off every possible class.
    """
    ks, _, _, smoothing = options
    rows, kind, wide = scores.shape[0], scores.dtype, wide_type(scores)
    if not ks:
        return scores.new_zeros(rows), *(scores.new_zeros(s, dtype=d or kind) for s, d in _saved(*scores.shape, options))
    if extras[0].is_cpu and bool(((extras[0] < 0.0) | (extras[0] > 1.0)).any()):
        low, high = (float(v) for v in extras[0].aminmax())
        raise ValueError(f"transition must give weights from 0 to 1, got values from {low:g} to {high:g}")
    values, index = ordered_topk(scores, ks[-1] + 1)
    index = index[:, :-1].contiguous()
    shift = values[:, -1].clamp(min=torch.finfo(kind).min)
    rest = sum_exponentials(scores, shift, index)[:, None]
    # All relative to the row's largest score. NaN and +inf make everything below NaN; -inf leaves 0 where it belongs.
    top = values.to(wide)
    origin = top[:, :1].clamp(min=torch.finfo(kind).min)
    top, mine = top - origin, scores.gather(1, target[:, None]).to(wide) - origin
    possible = mine > -torch.inf
    hit = (index == target[:, None]) & possible
    loss, slopes, at_target, plain, mix = _combine(top, mine, rest, hit, extras[0], options)
    floor = torch.zeros_like(at_target)
    if smoothing > 0.0:
        smoothed = smoothing * plain
        mean, count = _possible_mean(scores)
        loss.add_(torch.where(possible, smoothed * (mine + origin - mean), 0.0))
        at_target.add_(smoothed)
        floor = smoothed / count
    slopes = torch.cat((slopes, torch.where(possible, at_target, at_target * 0.0), floor), 1)
    return loss.squeeze(1).to(kind), index, slopes.to(kind), shift, mix.to(kind)


def _possible_mean(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The mean score of the classes that are not masked by -inf, and how many (at least one) they are, (rows, 1)."""
    possible = scores > -torch.inf
    count = possible.sum(1, keepdim=True).clamp(min=1)
    return torch.where(possible, scores, 0.0).sum(1, keepdim=True) / count, count


def _combine(
    top: Tensor, mine: Tensor, rest: Tensor, hit: Tensor, given: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, slopes on T and on a class as good as x_[k+1], on y, weight left to CE, and a; all without smoothing.

    With Z and S_k the sums of exp(x) over all classes and over T_k, g_k = P_K(k) a_k, and h_k = g_k if y is in T_k and
    0 if not,

        loss = log Z - x_y - sum_k h_k (log S_k - x_y),      slope_j = e^{x_j} (1 / Z - sum_{k: j in T_k} h_k / S_k),

    and y has sum_k h_k - 1 on top of that.
    """
    ks, weights, width, _ = options
    total = sum(weights)
    exponentials = top.exp()
    prefix = exponentials[:, :-1].cumsum(1).clamp_(min=1.0)  # below 1 only in a row without any possible class
    every = torch.addcmul(prefix[:, -1:], exponentials[:, -1:], rest)
    share = total / every
    slopes, at_target = exponentials * share, share.clone()
    loss, plain, held, mix = every.log().mul_(total), total, total, []
    for place, (k, weight) in enumerate(zip(ks, weights, strict=True)):
        a = given[:, place, None] if given.shape[1] > 0 else _from_margin(mine, top[:, k, None], width)
        group, grouped = prefix[:, k - 1, None], a * weight
        taken = grouped * hit[:, :k].any(1, keepdim=True)
        ratio = taken / group
        slopes[:, :k].addcmul_(exponentials[:, :k], ratio, value=-1.0)
        at_target.sub_(ratio)
        loss.addcmul_(taken, group.log(), value=-1.0)
        plain, held = plain - grouped, held - taken
        mix.append(a)
    loss.addcmul_(held, mine, value=-1.0)
    at_target.mul_(mine.exp()).sub_(held)
    return loss, slopes, at_target, plain, torch.cat(mix, 1)


def _from_margin(mine: Tensor, following: Tensor, width: float) -> Tensor:
    """a = s^2 (3 - 2 s) with s = clip((x_y - x_[k+1]) / width, 0, 1); for an impossible y nothing depends on it."""
    step = (mine.clamp(min=torch.finfo(mine.dtype).min) - following).div_(width).clamp_(0.0, 1.0)
    return step * step * (3.0 - 2.0 * step)


# --- backward --------------------------------------------------------------------------------------------------------


def backward(grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """grad * d loss / d scores: one exponential a class, then the classes of T and y are written over."""
    if not options[0]:
        return torch.zeros_like(scores, memory_format=torch.contiguous_format)
    index, slopes, shift, _ = saved
    top = index.shape[1]
    slopes = grad[:, None] * slopes
    result = scaled_exponentials(scores, shift, slopes[:, top], index, slopes[:, :top])
    result.scatter_(1, target[:, None], slopes[:, top + 1, None])
    if options[3] > 0.0:
        result.sub_(torch.where(scores == -torch.inf, 0.0, slopes[:, top + 2, None]))
    return result


# --- the same number once more, for second derivatives ---------------------------------------------------------------


def formula(scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """The loss a row by log-sum-exps over masks; a and T are constants."""
    ks, weights, _, smoothing = options
    index, _, _, mix = saved
    x_target = target_scores(scores, target)
    impossible = x_target == -torch.inf
    every = log_sum_exp(scores, torch.ones_like(scores, dtype=torch.bool))
    entropy = every - torch.where(impossible, 0.0, x_target)
    smoothed = torch.lerp(entropy, every - _possible_mean(scores)[0].squeeze(1), smoothing)
    loss = torch.zeros_like(x_target)
    for place, (k, weight) in enumerate(zip(ks, weights, strict=True)):
        group = torch.zeros_like(scores, dtype=torch.bool).scatter(1, index[:, :k], True)
        hit = (index[:, :k] == target[:, None]).any(1) & ~impossible
        a = mix[:, place]
        grouped = torch.where(hit, every - log_sum_exp(scores, group), entropy)
        loss = loss + weight * ((1.0 - a) * smoothed + a * grouped)
    return loss


TRANSITION = Room(
    name="transition",
    options="int[] ks, float[] weights, float width, float label_smoothing",
    extras=("mix",),
    saved=_saved,
    forward=forward,
    backward=backward,
    formula=formula,
)
