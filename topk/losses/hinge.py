"""The top-k hinge losses that are not smoothed, and the truncated top-k entropy (book, chapter 4).

With w_1 >= w_2 >= ... the scores of the wrong classes minus x_y, and x_[j] the j-th largest of all scores:

    calibrated     relu(margin + x_[k+1] - x_y)                     Yang and Koyejo (2020)
    kth            relu(margin + w_k)                               the same with y left out: not calibrated
    alpha          relu(mean of the k largest z)                    Lapin, Hein and Schiele (2015), where
    beta           mean of relu over the k largest z                    z = w + margin, and z_y = 0
    smooth_limit   relu(margin + w_k / k)                           the limit tau -> 0 of the smooth loss
    entropy        log(1 + sum of exp(w_j) over j >= k)             Lapin, Hein and Schiele (2016); no margin

All depend on differences to x_y alone, so y's slope is minus the sum of the others. At kinks relu'(0) = 0, and of
tied classes the lower index is counted first. Backward is a scatter of what forward kept, O(k) a row; only entropy,
whose every wrong class beyond the k-1 best has a slope, reads the scores again.

Where x_[k+1], or the k-th wrong class, is masked (-inf), the loss is 0, with two exceptions: beta's and entropy's
sums run over what exists.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from topk.losses.room import (
    Options,
    Room,
    Saved,
    SavedShape,
    centred,
    finite_or_zero,
    log_sum_exp,
    not_finite_above,
    scaled_exponentials,
    sum_exponentials,
    target_scores,
    wide_type,
)
from topk.losses.selection import ordered_topk, without_target

VARIANTS = ("calibrated", "kth", "alpha", "beta", "smooth_limit", "entropy")


def _saved(rows: int, classes: int, options: Options) -> tuple[SavedShape, ...]:
    ks, _, variant, _ = options
    depth = max(ks, default=0) + (variant == "calibrated")
    return ((rows, depth), torch.int64), ((rows, depth + 1), None), ((rows,), None)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(scores: Tensor, target: Tensor, extras: Saved, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the best classes (rows, depth), the slopes on them and on y (rows, depth + 1), t (rows,).

    t is the last of these classes' score; it serves entropy's backward.
    """
    ks, _, variant, _ = options
    rows, classes = scores.shape
    if not ks:
        empty = [scores.new_zeros(s, dtype=kind or scores.dtype) for s, kind in _saved(rows, classes, options)]
        return empty[2].clone(), *empty
    values, index = ordered_topk(scores, ks[-1] + 1)
    x_target = target_scores(scores, target)
    bad, impossible = not_finite_above(values[:, 0]), x_target == -torch.inf
    if variant != "calibrated":
        values, index = without_target(values, index, target)
    if variant == "entropy":
        loss, slopes, at_target = _truncated_entropy(scores, target, values, index, x_target, options)
    else:
        loss, slopes, at_target = _piecewise(target, values, index, x_target, options)
    loss = loss.masked_fill(impossible, torch.inf).masked_fill(bad, torch.nan)
    slopes = torch.cat((slopes, at_target.masked_fill(impossible, 0.0)[:, None]), 1).masked_fill(
        bad[:, None], torch.nan
    )
    kind = scores.dtype
    return loss.to(kind), index.contiguous(), slopes.to(kind), finite_or_zero(values[:, -1])


def _piecewise(
    target: Tensor, values: Tensor, index: Tensor, x_target: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its slopes on the best classes and on y, for the variants that are piecewise linear."""
    ks, weights, variant, margin = options
    wide = wide_type(values)
    lead = torch.where(values == -torch.inf, -torch.inf, values.to(wide) - x_target.to(wide)[:, None])
    loss, slopes = torch.zeros_like(lead[:, 0]), torch.zeros_like(lead)
    for k, weight in zip(ks, weights, strict=True):
        if variant in ("alpha", "beta"):
            place = slice(0, k)
            z = lead[:, place] + margin
            term, slope = _alpha(z, index[:, place] < target[:, None]) if variant == "alpha" else _beta(z)
        else:
            place = slice(k, k + 1) if variant == "calibrated" else slice(k - 1, k)
            rate = 1.0 / k if variant == "smooth_limit" else 1.0
            gap = margin + rate * lead[:, place]
            term, slope = gap.relu().squeeze(1), rate * (gap > 0).to(wide)
        loss = loss + weight * term
        slopes[:, place] += weight * slope
    return loss, slopes, -slopes.sum(1)


def _alpha(z: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """relu of the mean of the k largest z, from the k largest wrong ones: z_y = 0 takes the last place if it is due."""
    k, last = z.shape[1], z[:, -1]
    chosen = torch.ones_like(z, dtype=torch.bool)
    chosen[:, -1] = (last > 0) | ((last == 0) & lower[:, -1])
    mean = (torch.where(chosen, z, 0.0).sum(1) / k).masked_fill(last == -torch.inf, 0.0)
    return mean.relu(), (chosen & (mean > 0)[:, None]).to(z.dtype) / k


def _beta(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of relu over the k largest z: z_y = 0 adds nothing wherever it stands."""
    return z.relu().mean(1), (z > 0).to(z.dtype) / z.shape[1]


def _truncated_entropy(
    scores: Tensor, target: Tensor, values: Tensor, index: Tensor, x_target: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its slopes on the best wrong classes and on y; scores are taken relative to the best wrong one."""
    ks, weights, _, _ = options
    wide = wide_type(scores)
    origin, shift = finite_or_zero(values[:, 0]).to(wide), finite_or_zero(values[:, -1])
    beyond = sum_exponentials(scores, shift, torch.cat((index, target[:, None]), 1))
    rest = shift.to(wide) - origin + beyond.to(wide).log()
    best = values.to(wide) - origin[:, None]
    suffix = torch.cat((rest[:, None], best.flip(1)), 1).logcumsumexp(1).flip(1)
    loss, at_target, slopes = torch.zeros_like(rest), torch.zeros_like(rest), torch.zeros_like(best)
    for k, weight in zip(ks, weights, strict=True):
        others = suffix[:, k - 1]
        gap = others + (origin - x_target.to(wide))
        loss = loss + weight * softplus(gap, threshold=50.0)
        missed = weight * gap.sigmoid().masked_fill(others == -torch.inf, 0.0)
        at_target = at_target - missed
        # With no class left the slopes are 0, not exp(-inf + inf).
        others = others.clamp(min=torch.finfo(wide).min)
        slopes[:, k - 1 :] += missed[:, None] * (best[:, k - 1 :] - others[:, None]).exp_()
    return loss, slopes, at_target


# --- backward --------------------------------------------------------------------------------------------------------


def backward(grad: Tensor, scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """grad * d loss / d scores: kept slopes put in their places; entropy's other classes continue from the last one."""
    ks, _, variant, _ = options
    if not ks:
        return torch.zeros_like(scores, memory_format=torch.contiguous_format)
    index, slopes, last = saved
    slopes = grad[:, None] * slopes
    best, at_target = slopes[:, :-1], slopes[:, -1:]
    if variant == "entropy":
        result = scaled_exponentials(scores, last, best[:, -1]).scatter_(1, index, best)
        return result.scatter_(1, target[:, None], at_target)
    background = torch.where(at_target.isnan(), torch.nan, 0.0).to(scores.dtype)
    result = background.expand_as(scores).contiguous()
    return result.scatter_add_(1, index, best).scatter_add_(1, target[:, None], at_target)  # y may be in `index`


# --- the same number once more, for second derivatives ---------------------------------------------------------------


def formula(scores: Tensor, target: Tensor, extras: Saved, saved: Saved, options: Options) -> Tensor:
    """Entropy by log-sum-exps over masks; of the others the linear piece, up to its constant."""
    ks, weights, variant, _ = options
    index, slopes, _ = saved
    places = torch.cat((index, target[:, None]), 1)
    if variant != "entropy":
        return torch.where(slopes == 0, 0.0, slopes * scores.gather(1, places)).sum(1)
    scores = centred(scores)
    x_target = target_scores(scores, target)
    impossible = x_target == -torch.inf
    loss = torch.zeros_like(x_target)
    for k, weight in zip(ks, weights, strict=True):
        left_out = torch.cat((index[:, : k - 1], target[:, None]), 1)
        others = log_sum_exp(scores, torch.ones_like(scores, dtype=torch.bool).scatter(1, left_out, False))
        gap = others - torch.where(impossible, 0.0, x_target)
        loss = loss + weight * torch.where(impossible, others, softplus(gap, threshold=50.0))
    return loss


HINGE = Room(
    name="hinge",
    options="int[] ks, float[] weights, str variant, float margin",
    extras=(),
    saved=_saved,
    forward=forward,
    backward=backward,
    formula=formula,
)
