"""The noised top-k calibrated hinge of Garcin, Servajean, Joly and Salmon (2022); book, chapter 7.

With Z standard normal, one independent draw a class, and x_[j] the j-th largest score,

    loss = relu(scale (m_y + E[(x + epsilon Z)_[k+1]] - x_y)).

The expectation is taken in one of three ways:

* epsilon = 0: it is x_[k+1], the calibrated hinge;
* a number of samples: the mean over that many draws, whose gradient puts 1/samples on the class that is (k+1)-th in
  each draw, so that these classes are all that is saved; `noised_sampling` draws only what can matter;
* samples = None: by quadrature, exact to far below the rounding of float32; `noised_quadrature` says how, and has the
  gradient.

All is a function of the inputs: noise comes from `seeds`, one for each of as many equal groups of rows, so that a vmap,
which folds its examples into groups, stays right.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topk._cpu import ordered_topk
from topk.arguments import KArgument, check_count, check_generator, check_k, check_number, check_scores
from topk.autograd import Head, Loss
from topk.losses import polynomials
from topk.losses.common import (
    LossModule,
    finite_or_zero,
    largest_classes,
    not_finite_above,
    reduced_loss,
    row_dtype,
    row_margins,
    target_scores,
)
from topk.losses.noised_quadrature import STEPS, ExpectedOrder, expected_order, expected_order_gradient, grid
from topk.losses.noised_sampling import draw
from topk.losses.soft import takes_probabilities


class Options(NamedTuple):
    """The arguments of the loss, besides those that every loss takes."""

    ks: list[int]
    weights: list[float]  # of the ks
    epsilon: float
    samples: int | None
    scale: float


def definition(
    scores: Tensor,  # (rows, classes)
    target: Tensor,  # (rows,)
    margins: Tensor,  # (rows,): m_y
    seeds: Tensor,  # (groups,)
    k: int,
    epsilon: float = 1.0,
    samples: int | None = 5,
    scale: float = 1.0,
    tail: Tensor | None = None,  # for the quadrature, `ExpectedOrder`'s: the expected (k+1)-th score less x_[k+1]
) -> Tensor:
    """The loss of every row (rows,)."""
    if epsilon == 0 or tail is not None:
        following = scores.gather(1, largest_classes(scores, k + 1))[:, k]
        if tail is not None:
            following = torch.where(following == -torch.inf, -torch.inf, following.detach() + tail[0])
    elif samples is None:
        following = expected_score(scores, k, epsilon)
    else:
        classes, noise = noised_classes(scores.detach(), seeds, k, epsilon, samples)
        following = (scores.gather(1, classes) + noise).mean(1)
    return (scale * (margins.to(scores.dtype) + following - target_scores(scores, target))).relu()


def expected_score(scores: Tensor, k: int, epsilon: float) -> Tensor:
    """E[(x + epsilon Z)_[k+1]] (rows,): c + integral of (1{v > c} - F(v)) dv by the trapezoid rule, differentiable.

    F(v) is the probability that at most k noised scores exceed v, the sum of a polynomial's coefficients up to k.
    """
    level = scores.gather(1, largest_classes(scores, k + 1)[:, k:]).detach()
    z = (scores - finite_or_zero(level)) / epsilon
    middle, spacing = (number.to(z.dtype) for number in grid(z.detach(), k))
    steps = torch.tensor(STEPS, dtype=z.dtype, device=z.device)
    nodes = middle[:, None] + spacing[:, None] * steps
    distance = (z[:, None, :] - nodes[:, :, None]).clamp(-30.0, 30.0)
    factors = torch.stack((torch.special.ndtr(-distance), torch.special.ndtr(distance)))
    under = polynomials.tree(factors, k).sum(0)  # F (rows, nodes)
    return level[:, 0] + epsilon * (middle + spacing * ((steps > 0).to(z.dtype) - under).sum(1))


@torch.library.custom_op("topk::noised_classes", mutates_args=())
def noised_classes(scores: Tensor, seeds: Tensor, k: int, epsilon: float, samples: int) -> tuple[Tensor, Tensor]:
    """Which class is (k+1)-th in every draw, and epsilon times its noise (rows, samples); a function of the seeds."""
    _, centre, noised, classes = (part.squeeze(-1) for part in draw(scores, seeds, [k], epsilon, samples))
    noise = noised - (scores.gather(1, classes) - centre[:, None])
    return classes.clone(), finite_or_zero(noise)


@noised_classes.register_fake
def _(scores: Tensor, seeds: Tensor, k: int, epsilon: float, samples: int) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], samples)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)


@noised_classes.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], scores: Tensor, seeds: Tensor, k: int, epsilon: float, samples: int
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    folded = [
        (tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).flatten(0, 1)
        for tensor, dim in zip((scores, seeds), in_dims[:2], strict=True)
    ]
    found = noised_classes(*folded, k, epsilon, samples)
    return tuple(tensor.unflatten(0, (info.batch_size, -1)) for tensor in found), (0, 0)


def forward(scores: Tensor, target: Tensor, options: Options, margins: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
    """loss (rows,), the hinges' slopes (rows, ks), and the classes (rows, draws, ks) or the grids (rows, ks, 3).

    Several k share the draws. Levels are taken relative to a score nearby, so that they keep their digits.
    """
    ks, _, epsilon, samples, _ = options
    dtype = row_dtype(scores)
    if epsilon > 0 and samples is not None:
        best, centre, noised, kept = draw(scores, seeds, ks, epsilon, samples)
        rise = noised.mean(1, dtype=dtype)
    else:
        order, index = ordered_topk(scores, ks[-1] + 1)
        best, centre = order[:, 0], finite_or_zero(order[:, ks])
        if epsilon > 0:
            rise, kept = expected_order(scores, order, centre, ks, epsilon)
        else:
            rise, kept = order[:, ks].to(dtype) - centre.to(dtype), index[:, None, ks]
    loss, slopes = hinges(best, centre, rise, target_scores(scores, target), margins, options)
    return loss.to(scores.dtype), slopes, kept


def hinges(
    best: Tensor,  # (rows,)
    centre: Tensor,  # (rows, ks)
    rise: Tensor,  # (rows, ks): the mean of the (k+1)-th largest noised score, less the centre
    x_target: Tensor,  # (rows,)
    margins: Tensor,  # (rows,)
    options: Options,
) -> tuple[Tensor, Tensor]:
    """loss (rows,) and the hinges' slopes (rows, ks)."""
    weights, scale, dtype = options.weights, options.scale, rise.dtype
    # Where there is no (k+1)-th score the rise is -inf, and so is the gap, or NaN if y is impossible as well.
    gap = margins.to(dtype)[:, None] + ((centre.to(dtype) - x_target[:, None]) + rise)
    bad, impossible = not_finite_above(best), x_target == -torch.inf
    rates = scale * torch.tensor(weights, dtype=dtype, device=rise.device)
    loss = (gap.relu() * rates).sum(1).masked_fill(impossible, torch.inf).masked_fill(bad, torch.nan)
    return loss, ((gap > 0) * rates).masked_fill(bad[:, None], torch.nan)


def backward(
    grad: Tensor,  # (rows,)
    scores: Tensor,
    target: Tensor,
    options: Options,
    saved: tuple[Tensor, ...],
    *_: Tensor,
) -> Tensor:
    """grad * d loss / d scores: -slope on y, and slope spread over the classes that may be (k+1)-th."""
    slopes, kept = saved
    result = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    broken = slopes[:, 0].isnan()
    if not broken.is_cpu or bool(broken.any()):
        result.masked_fill_(broken[:, None], torch.nan)
    few = sparse(grad, scores, target, options, saved)
    if few is not None:
        return result.scatter_add_(1, *few)
    push, pull = _push_and_pull(grad, scores, target, slopes)
    for place, k in enumerate(options.ks):
        expected_order_gradient(result, push[:, place], scores, kept[:, place], k, options.epsilon)
    return result.scatter_add_(1, target[:, None], -pull.to(scores.dtype))


def sparse(
    grad: Tensor, scores: Tensor, target: Tensor, options: Options, saved: tuple[Tensor, ...], *_: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The classes that were (k+1)-th in some draw, and y, with grad times their slopes; None for the quadrature."""
    slopes, kept = saved
    if kept.is_floating_point():
        return None
    push, pull = _push_and_pull(grad, scores, target, slopes)
    spread = (push / kept.shape[1])[:, None, :].expand(kept.shape).flatten(1)
    return torch.cat((kept.flatten(1), target[:, None]), 1), torch.cat((spread, -pull), 1).to(scores.dtype)


def _push_and_pull(grad: Tensor, scores: Tensor, target: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """What the (k+1)-th score of every k is pushed down by (rows, ks), and y up by (rows, 1)."""
    push = (grad.to(slopes.dtype)[:, None] * slopes).masked_fill(slopes == 0, 0.0)
    return push, push.sum(1, keepdim=True).masked_fill(target_scores(scores, target)[:, None] == -torch.inf, 0.0)


def head(options: Options) -> Head:
    """The largest scores, of every sample where there is noise."""
    if options.samples is None:
        return Head(options.ks[-1] + 1, [ExpectedOrder(k, options.epsilon) for k in options.ks])
    return Head(options.ks[-1] + 1, [], (options.epsilon, options.samples) if options.epsilon > 0.0 else None)


LOSS = Loss("noised", Options, definition, forward, backward, sparse, head)


@takes_probabilities
def noised_topk_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    epsilon: float = 1.0,
    samples: int | None = 5,
    margins: float | Tensor | None = None,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The noised top-k calibrated hinge of Garcin, Servajean, Joly and Salmon (2022); chapter 7.

    With Z one standard normal number a class and x_[j] the j-th largest score,

    .. math:: \ell = \mathrm{relu}\big(\text{scale}\,(m_y + E[(x + \epsilon Z)_{[k+1]}] - x_y)\big).

    ``epsilon=0`` is ``topk_hinge_loss(variant="calibrated")``. The paper's balanced loss is ``epsilon=1`` with 5 or 10
    samples; its imbalanced one ``epsilon=0.01, scale=60, margins=class_margins(counts, 0.2)``, on cosines.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        k: the number of guesses, or a mapping ``{k: weight}`` whose weights sum to 1; all of them share the noise,
            unless some level x_[k+1] is thousands of epsilon from another.
        epsilon: how much noise, in units of the scores, >= 0.
        samples: how many draws of the noise the expectation is taken over, or None: by quadrature, without noise.
        margins: by how much the right class must lead: a number for every class, one >= 0 for all, or None: 1.
        scale: what the difference is multiplied by, > 0.
        generator: where the noise's seed comes from; None: torch's own. Under ``vmap`` the examples share the noise
            with ``randomness="same"`` and have their own with "different".
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch", "compiled" or "triton".
    """
    ks, weights = check_k(k, check_scores(scores, target))
    epsilon = check_number("epsilon", epsilon, least=0.0)
    samples = None if samples is None else check_count("samples", samples)
    scale = check_number("scale", scale, above=0.0)
    check_generator(generator, scores)
    margin = row_margins(1.0 if margins is None else margins, scores, target)
    if epsilon == 0:
        samples = 1  # without noise, all samples are the same one
    if samples is None or epsilon == 0:
        seeds = torch.zeros(1, dtype=torch.int64, device=scores.device)
    else:
        seeds = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=scores.device, generator=generator)
    options = Options(ks, weights, epsilon, samples, scale)
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    return reduced_loss(LOSS, options, scores, target, margin, seeds, **tail)


class NoisedTopKLoss(LossModule):
    """Module form of :func:`topk.noised_topk_loss`; a tensor of margins becomes a buffer.

    The noise is drawn anew at every call, in evaluation mode too; ``samples=None`` draws none. A generator stays on
    its device and is not part of the state dict.
    """

    function = staticmethod(noised_topk_loss)

    def __init__(
        self,
        k: KArgument = 5,
        *,
        epsilon: float = 1.0,
        samples: int | None = 5,
        margins: float | Tensor | None = None,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())
