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

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from topk._cpu import ordered_topk, scaled_exponentials, sum_exponentials
from topk.arguments import KArgument, check_choice, check_k, check_number, check_scores
from topk.autograd import Head, Loss
from topk.losses import smooth_hinge
from topk.losses.common import (
    LossModule,
    finite_or_zero,
    largest_classes,
    largest_wrong_scores,
    log_sum_exp,
    not_finite_above,
    reduced_loss,
    row_dtype,
    target_scores,
    with_tail,
    without_target,
)
from topk.losses.soft import takes_probabilities
from topk.tails import PowerSums

VARIANTS = ("calibrated", "kth", "alpha", "beta", "smooth_limit", "entropy")


class Options(NamedTuple):
    """The arguments of the loss, besides those that every loss takes."""

    ks: list[int]
    weights: list[float]  # of the ks
    variant: str
    margin: float


def definition(
    scores: Tensor,  # (rows, classes)
    target: Tensor,  # (rows,)
    k: int,
    variant: str = "calibrated",
    margin: float = 1.0,
    tail: Tensor | None = None,  # (1, rows), for entropy: the sum of exp(x - w_k) over classes that are not listed
) -> Tensor:
    """The loss of every row (rows,)."""
    own = target_scores(scores, target)
    top = largest_classes(scores, k + 1)
    if variant == "calibrated":
        return (margin + scores.gather(1, top)[:, k] - own).relu()
    lead = largest_wrong_scores(scores, target, k) - own[:, None]  # w_1 >= ... >= w_k
    if variant == "kth":
        return (margin + lead[:, -1]).relu()
    if variant == "smooth_limit":
        return (margin + lead[:, -1] / k).relu()
    if variant == "beta":
        return (margin + lead).relu().mean(1)
    if variant == "alpha":
        z = margin + lead
        last, lower = z[:, -1], without_target(top, top, target)[0][:, -1] < target
        last = torch.where((last > 0) | ((last == 0) & lower), last, 0.0)  # z_y = 0 takes the last place if it is due
        mean = (z[:, :-1].sum(1) + last) / k
        return torch.where(z[:, -1] == -torch.inf, 0.0, mean).relu()
    best_wrong = without_target(top, top, target)[0][:, : k - 1]
    left_out = torch.cat((best_wrong, target[:, None]), 1)
    beyond = torch.ones_like(scores, dtype=torch.bool).scatter(1, left_out, False)
    others = with_tail(log_sum_exp(scores, beyond), tail, (lead[:, -1] + own).detach())
    return softplus(others - own, threshold=50.0)


def forward(scores: Tensor, target: Tensor, options: Options) -> tuple[Tensor, ...]:
    """loss (rows,), the best classes (rows, depth), the slopes on them and on y (rows, depth + 1), t (rows,).

    t is the last of these classes' score; it serves entropy's backward.
    """
    values, index = ordered_topk(scores, options.ks[-1] + 1)
    x_target = target_scores(scores, target)
    bad, impossible = not_finite_above(values[:, 0]), x_target == -torch.inf
    if options.variant != "calibrated":
        values, index = without_target(values, index, target)
    if options.variant == "entropy":
        loss, slopes, at_target = _truncated_entropy(scores, target, values, index, x_target, options)
    else:
        loss, slopes, at_target = _piecewise(target, values, index, x_target, options)
    loss = loss.masked_fill(impossible, torch.inf).masked_fill(bad, torch.nan)
    slopes = torch.cat((slopes, at_target.masked_fill(impossible, 0.0)[:, None]), 1).masked_fill(
        bad[:, None], torch.nan
    )
    dtype = scores.dtype
    return loss.to(dtype), index.contiguous(), slopes.to(dtype), finite_or_zero(values[:, -1])


def _piecewise(
    target: Tensor, values: Tensor, index: Tensor, x_target: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its slopes on the best classes and on y, for the variants that are piecewise linear."""
    ks, weights, variant, margin = options
    dtype = row_dtype(values)
    lead = torch.where(values == -torch.inf, -torch.inf, values.to(dtype) - x_target.to(dtype)[:, None])
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
            term, slope = gap.relu().squeeze(1), rate * (gap > 0).to(dtype)
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
    dtype = row_dtype(scores)
    origin, shift = finite_or_zero(values[:, 0]).to(dtype), finite_or_zero(values[:, -1])
    beyond = sum_exponentials(scores, shift, torch.cat((index, target[:, None]), 1))
    rest = shift.to(dtype) - origin + beyond.to(dtype).log()
    best = values.to(dtype) - origin[:, None]
    suffix = torch.cat((rest[:, None], best.flip(1)), 1).logcumsumexp(1).flip(1)
    loss, at_target, slopes = torch.zeros_like(rest), torch.zeros_like(rest), torch.zeros_like(best)
    for k, weight in zip(ks, weights, strict=True):
        others = suffix[:, k - 1]
        gap = others + (origin - x_target.to(dtype))
        loss = loss + weight * softplus(gap, threshold=50.0)
        missed = weight * gap.sigmoid().masked_fill(others == -torch.inf, 0.0)
        at_target = at_target - missed
        # With no class left the slopes are 0, not exp(-inf + inf).
        others = others.clamp(min=torch.finfo(dtype).min)
        slopes[:, k - 1 :] += missed[:, None] * (best[:, k - 1 :] - others[:, None]).exp_()
    return loss, slopes, at_target


def backward(
    grad: Tensor,  # (rows,)
    scores: Tensor,
    target: Tensor,
    options: Options,
    saved: tuple[Tensor, ...],
) -> Tensor:
    """grad * d loss / d scores: kept slopes put in their places; entropy's other classes continue from the last one."""
    index, slopes, last = saved
    slopes = grad[:, None] * slopes
    best, at_target = slopes[:, :-1], slopes[:, -1:]
    if options.variant == "entropy":
        result = scaled_exponentials(scores, last, best[:, -1]).scatter_(1, index, best)
        return result.scatter_(1, target[:, None], at_target)
    background = torch.where(at_target.isnan(), torch.nan, 0.0).to(scores.dtype)
    result = background.expand_as(scores).contiguous()
    return result.scatter_add_(1, index, best).scatter_add_(1, target[:, None], at_target)  # y may be in `index`


def sparse(
    grad: Tensor, scores: Tensor, target: Tensor, options: Options, saved: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor] | None:
    """The classes with a slope, and grad times it (rows, depth + 1); None for entropy, where all have one."""
    index, slopes, _ = saved
    if options.variant == "entropy":
        return None
    return torch.cat((index, target[:, None]), 1), grad[:, None] * slopes


def head(options: Options) -> Head:
    """Nothing but the largest scores; of entropy also the sum of exponentials relative to the k-th wrong one."""
    return Head(options.ks[-1] + 1, [PowerSums(1.0, rank=k) for k in options.ks if options.variant == "entropy"])


LOSS = Loss("hinge", Options, definition, forward, backward, sparse, head)


def expected(
    scores: Tensor,  # (rows, classes)
    q: Tensor,  # (rows, classes), probabilities
    *,
    k: KArgument = 5,
    variant: str = "calibrated",
    margin: float = 1.0,
    **_: Any,
) -> Tensor | None:
    """sum over y of q_y times the loss (rows,), for all y at once; None for the variants with sums."""
    if variant not in ("calibrated", "kth", "smooth_limit"):
        return None
    loss, own = torch.zeros_like(scores[:, 0]), torch.where(q != 0.0, scores, 0.0)
    for each, share in zip(*check_k(k, scores.shape[1]), strict=True):
        if each < scores.shape[1] and share > 0.0:
            best = largest_classes(scores, each + 1)
            kth, following = scores.gather(1, best[:, -2:]).split(1, 1)
            others = following.expand_as(scores)
            if variant != "calibrated":  # the k-th largest score of the classes that are not y
                others = kth.expand_as(scores).scatter(1, best[:, :-1], following.expand(-1, each))
            rate = each if variant == "smooth_limit" else 1
            loss = loss + share * (q * (margin + (others - own) / rate).relu()).sum(1)
    return loss


@functools.partial(takes_probabilities, expected=expected)
def topk_hinge_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    variant: str = "calibrated",
    margin: float = 1.0,
    smoothing: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The top-k hinge losses, their smooth and convex relatives, and the two top-k entropies; chapter 4.

    With x_[j] the j-th largest score, w_j the j-th largest score of a wrong class minus x_y, and z the w + margin
    together with z_y = 0:

    ================  ==================================================
    "calibrated"      relu(margin + x_[k+1] - x_y)
    "kth"             relu(margin + w_k)
    "alpha"           relu(mean of the k largest z)
    "beta"            mean of relu over the k largest z
    "smooth_limit"    relu(margin + w_k / k)
    "entropy"         log(1 + sum of exp(w_j) over j >= k)
    ================  ==================================================

    and "topk_entropy", "alpha_smooth", "beta_smooth", "polyhedral", "polyhedral_smooth", all convex: the formulas stand
    in ``topk.losses.smooth_hinge``. "alpha_smooth", as libsdca's alphas, leaves z_y out of the k largest; the last two
    are reconstructions.

    At kinks the slope of relu is 0, and of tied classes the lower index counts as the larger.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        k: the number of guesses, or a mapping ``{k: weight}`` whose weights sum to 1.
        variant: one of the names above.
        margin: by how much the right class must lead, >= 0. It plays no part in the entropies.
        smoothing: gamma of the variants that end in "_smooth", > 0.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch", "compiled" or "triton".
    """
    ks, weights = check_k(k, check_scores(scores, target))
    check_choice("variant", variant, (*VARIANTS, *smooth_hinge.VARIANTS))
    margin = check_number("margin", margin, least=0.0)
    smoothing = check_number("smoothing", smoothing, above=0.0)
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    if variant in smooth_hinge.VARIANTS:
        convex = smooth_hinge.Options(ks, weights, variant, margin, smoothing)
        return reduced_loss(smooth_hinge.LOSS, convex, scores, target, **tail)
    options = Options(ks, weights, variant, margin)
    return reduced_loss(LOSS, options, scores, target, **tail)


class TopKHingeLoss(LossModule):
    """Module form of :func:`topk.topk_hinge_loss`."""

    function = staticmethod(topk_hinge_loss)

    def __init__(
        self,
        k: KArgument = 5,
        *,
        variant: str = "calibrated",
        margin: float = 1.0,
        smoothing: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())
