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
    return ((rows, top), torch.int64), ((rows, top + 1), None), ((rows, 3), None), ((rows, len(ks)), None)


def margins(scores: Tensor, target: Tensor, ks: list[int]) -> Tensor:
    """x_y - x_[k+1] (rows, number of ks); +inf where there is no (k+1)-th score, -inf where y is impossible."""
    values = scores.topk(max(ks) + 1, dim=1).values
    return _lead(target_scores(scores, target)[:, None], values[:, ks])


def _lead(x_target: Tensor, following: Tensor) -> Tensor:
    return torch.where(x_target == -torch.inf, -torch.inf, x_target - following)


def forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the indices of T (rows, k), the slopes on T and on y (rows, k + 1), a table and a (rows, ks).

    The table (rows, 3) holds the shift t and the scale c with which a class outside T has the slope c exp(x - t), and
    what smoothing takes off every possible class.
    """
    ks, weights, width, smoothing = options
    rows = scores.shape[0]
    if not ks:
        nothing = scores.new_zeros((rows, 0))
        table = scores.new_zeros((rows, 3))
        return table[:, 0].clone(), nothing.long(), table[:, :1].clone(), table, nothing
    wide = wide_type(scores)
    values, index = ordered_topk(scores, ks[-1] + 1)
    index = index[:, :-1].contiguous()
    x_target = target_scores(scores, target)
    largest, shift = values[:, 0], _finite(values[:, -1])
    bad, impossible = not_finite_above(largest), x_target == -torch.inf
    mix = _mix(extras[0], _lead(x_target[:, None], values[:, ks]), width)

    # Log-sum-exps relative to the row's largest score: of T for every prefix, of the rest, of all. They are >= 0,
    # except in rows without any possible class, where 0 serves as well as anything.
    origin = _finite(largest).to(wide)
    top = values[:, :-1].to(wide) - origin[:, None]
    mine = x_target.to(wide) - origin
    offset = shift.to(wide) - origin
    rest = offset + sum_exponentials(scores, shift, index).to(wide).log()
    prefix = top.logcumsumexp(1).clamp_(min=0.0)
    every = torch.logaddexp(prefix[:, -1], rest)
    hit = index == target[:, None]
    inside = (hit.cumsum(1) > 0)[:, [k - 1 for k in ks]] & ~impossible[:, None]
    prefix = prefix[:, [k - 1 for k in ks]]

    entropy = every - mine
    if smoothing > 0.0:
        possible = scores > -torch.inf
        count = possible.sum(1).clamp_(min=1)
        mean = torch.where(possible, scores, 0.0).sum(1, dtype=wide) / count
        smoothed = (1.0 - smoothing) * entropy + smoothing * (every - (mean - origin))
    else:
        smoothed = entropy
    share = torch.tensor(weights, dtype=wide, device=scores.device)
    grouped_share = share * mix
    plain = sum(weights) - grouped_share.sum(1)
    grouped = torch.where(inside, every[:, None] - prefix, entropy[:, None])
    loss = plain * smoothed + (grouped_share * grouped).sum(1)
    loss = loss.masked_fill_(impossible, torch.inf).masked_fill_(bad, torch.nan)

    total = sum(weights)
    taken = grouped_share * inside
    slopes = (top - every[:, None]).exp_().mul_(total)
    for place, k in enumerate(ks):
        slopes[:, :k] -= taken[:, place, None] * (top[:, :k] - prefix[:, place, None]).exp_()
    outside = grouped_share.sum(1) - taken.sum(1) + (1.0 - smoothing) * plain
    at_target = total * (mine - every).exp_() - outside - (taken * (mine[:, None] - prefix).exp_()).sum(1)
    slopes = torch.cat((slopes, at_target.masked_fill_(impossible, 0.0)[:, None]), 1)
    slopes = slopes.masked_fill_(bad[:, None], torch.nan)
    scale = (total * (offset - every).exp_()).masked_fill_(bad, torch.nan)
    floor = plain * smoothing / count if smoothing > 0.0 else torch.zeros_like(scale)
    table = torch.stack((shift.to(wide), scale, floor), 1)
    kind = scores.dtype
    return loss.to(kind), index, slopes.to(kind), table.to(kind), mix.to(kind)
