"""One public function a loss: it checks the arguments, flattens the scores to rows and reduces.

All of them follow `torch.nn.functional.cross_entropy`: scores (classes,), (rows, classes) or (rows, classes, d1, ...),
targets as class indices, `weight` one number a class (the weighted mean divides by the sum of the weights used),
`ignore_index` rows count for nothing. The loss of half-precision scores is computed and returned in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topk import ops
from topk.arguments import (
    REDUCTIONS,
    KArgument,
    check_choice,
    check_class_tensor,
    check_count,
    check_generator,
    check_ignore_index,
    check_k,
    check_number,
    check_scores,
)
from topk.losses.differentiable import CROSS_ENTROPY_OVER, DISTRIBUTIONS, METHODS, TOP1
from topk.losses.room import wide_type
from topk.losses.transition import margins as transition_margins

Transition = str | float | Tensor | Callable[[Tensor], Tensor]


def smooth_topk_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    tau: float = 1.0,
    margin: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The smooth top-k SVM of Berrada, Zisserman and Kumar (2018); chapter 6.

    With :math:`u = x / (k\tau)` and :math:`e_j` the elementary symmetric polynomials of :math:`e^{u_i}, i \ne y`,

    .. math:: \ell = \tau\,\mathrm{softplus}\big(\text{margin}/\tau + \log e_k - \log e_{k-1} - x_y/(k\tau)\big).

    ``margin=0, tau=1, k=1`` is cross-entropy; ``tau -> 0`` is ``topk_hinge_loss(variant="smooth_limit")``.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices.
        k: the number of guesses, or a mapping ``{k: weight}`` whose weights sum to 1.
        tau: temperature, > 0. The gradient shrinks like 1/k, so tune the learning rate with it.
        margin: by how much the right class must lead, >= 0.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch" or "triton".
    """
    ks, weights = check_k(k, check_scores(scores, target))
    tau = check_number("tau", tau, above=0.0)
    margin = check_number("margin", margin, least=0.0)
    return _reduced("smooth", scores, target, ks, weights, (tau, margin), weight, ignore_index, reduction, backend)


def transition_topk_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    transition: Transition = "margin",
    width: float = 1.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The top-k transition loss after Sawada, Kaneko and Sagi (2020), as the book reconstructs it; chapter 5.

    With p = softmax(scores), CE = -log p_y and T the k classes of largest score (of equals the lower index),

    .. math:: \ell = (1 - a)\,\mathrm{CE} + a\,G, \qquad G = -\log \textstyle\sum_{j \in T} p_j
        \text{ if } y \in T, \text{ else } -\log p_y.

    The weight a carries no gradient, so unless it is fixed the gradient is not that of the printed value.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices.
        k: the number of guesses, or a mapping ``{k: weight}`` whose weights sum to 1.
        transition: how a is found.
            "margin": per example s^2 (3 - 2 s) with s = clip((x_y - x_[k+1]) / width, 0, 1);
            a number from 0 to 1, or a tensor that holds one, or one for every k: fixed;
            a callable: it gets the detached margins x_y - x_[k+1] in the shape of ``target``, +inf where there is
            no (k+1)-th score, once for every k of weight > 0, and returns a from 0 to 1 in the same shape. Values
            outside raise on the CPU; a NaN makes its row's loss NaN.
            "accuracy" needs memory of what came before: only ``TransitionTopKLoss`` has it.
        width: the lead over the (k+1)-th score at which "margin" has moved over to G, > 0.
        label_smoothing: as in ``F.cross_entropy``, in CE alone, and spread over the classes that are not masked by
            -inf; G stays as it is.
        weight: a number for every class, or None. The row's whole loss is multiplied by its target's, the smoothing
            included, where ``F.cross_entropy`` takes every class's own weight in the smoothing.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch" or "triton".
    """
    classes = check_scores(scores, target)
    ks, weights = check_k(k, classes)
    width = check_number("width", width, above=0.0)
    label_smoothing = check_number("label_smoothing", label_smoothing, least=0.0, most=1.0)
    ignore_index = check_ignore_index(ignore_index)
    mix = _transition_weights(transition, scores, target, ks, weights, ignore_index)
    options = (width, label_smoothing)
    return _reduced("transition", scores, target, ks, weights, options, weight, ignore_index, reduction, backend, mix)


def _transition_weights(
    transition: Transition, scores: Tensor, target: Tensor, ks: list[int], weights: list[float], ignore_index: int
) -> tuple[Tensor, ...]:
    """The weight a for every row and k that counts; nothing where the margins decide."""
    if isinstance(transition, str):
        if transition == "accuracy":
            raise ValueError(
                "transition='accuracy' follows a running accuracy, which only the module TransitionTopKLoss keeps; "
                "expected 'margin', a number, a tensor or a callable"
            )
        check_choice("transition", transition, ("margin", "accuracy"))
        return ()
    classes = scores.shape[0] if scores.dim() == 1 else scores.shape[1]
    kept = _counting(ks, weights, classes)
    shape, kind = (target.numel(), len(kept)), torch.promote_types(scores.dtype, torch.float32)
    if isinstance(transition, Tensor):
        if tuple(transition.shape) not in ((), (len(ks),)) or not transition.dtype.is_floating_point:
            raise ValueError(
                f"transition as a tensor must be floating-point with shape () or ({len(ks)},), one number a k, "
                f"got shape {tuple(transition.shape)} of {transition.dtype}"
            )
        return (transition.detach().to(scores.device, kind).expand(len(ks))[kept].expand(shape),)
    if not callable(transition):
        number = check_number("transition", transition, least=0.0, most=1.0)
        return (scores.new_full(shape, number, dtype=kind),)
    if not kept:
        return (scores.new_empty(shape, dtype=kind),)
    rows, used, safe = _rows(scores, target, ignore_index)
    columns = []
    for margin in transition_margins(rows.detach().to(kind), safe, [ks[place] for place in kept]).unbind(1):
        column = transition(margin.reshape(target.shape))
        if not isinstance(column, Tensor) or column.shape != target.shape:
            got = tuple(column.shape) if isinstance(column, Tensor) else type(column).__name__
            raise ValueError(f"transition must return a tensor of the margins' shape {tuple(target.shape)}, got {got}")
        columns.append(torch.where(used, column.detach().reshape(-1).to(kind), 0.0))
    return (torch.stack(columns, 1),)


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
        target: class indices.
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
        backend: None (choose), "torch" or "triton".
    """
    ks, weights = check_k(k, check_scores(scores, target))
    epsilon = check_number("epsilon", epsilon, least=0.0)
    samples = None if samples is None else check_count("samples", samples)
    scale = check_number("scale", scale, above=0.0)
    check_generator(generator, scores)
    margin = _margins(1.0 if margins is None else margins, scores, target, check_ignore_index(ignore_index))
    if epsilon == 0:
        samples = 1  # without noise, all samples are the same one
    if samples is None or epsilon == 0:
        seeds = torch.zeros(1, dtype=torch.int64, device=scores.device)
    else:
        seeds = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=scores.device, generator=generator)
    options, extras = (epsilon, samples, scale), (margin, seeds)
    return _reduced("noised", scores, target, ks, weights, options, weight, ignore_index, reduction, backend, extras)


def differentiable_topk_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    method: str = "odd_even",
    distribution: str = "cauchy",
    inverse_temperature: float = 1.0,
    art_lambda: float = 0.25,
    m: int = 16,
    top1: str = "softmax",
    cross_entropy_over: str = "kept",
    iterations: int = 200,
    tolerance: float = 1e-6,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The differentiable top-k cross-entropy of Petersen, Kuehne, Borgelt and Deussen (2022); chapter 8.

    The target and the m - 1 largest other scores are sorted by a relaxed operator; :math:`Q_k` is the probability that
    the target lands among the first k. A mapping for k is the paper's :math:`P_K`; it stands inside the logarithm, so
    this is not a sum of losses. An int puts all weight on one k. With log1(v) = log(v (1 - 2e-7) + 1e-7):

    ===============  =================================================================================
    "softmax"        -log1(P(1) softmax_y + sum over k >= 2 of P(k) Q_k)
    "cross_entropy"  P(1) cross_entropy + (sum over k >= 2 of P(k)) (-log1(sum over k >= 2 of P(k) Q_k))
    "sort"           -log1(sum over k >= 1 of P(k) Q_k)
    ===============  =================================================================================

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices.
        k: the number of guesses, or a mapping ``{k: weight}`` whose weights sum to 1; none above min(m, classes).
        method: a comparator network ("odd_even", "bitonic", "splitter_selection"), "neuralsort", "softsort" or
            "sinkhorn". The q_r of neuralsort and softsort do not sum to 1, so their loss can be negative.
        distribution: the networks' swap probability: "logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal"
            or "optimal".
        inverse_temperature: the networks' steepness, one over the others' temperature, > 0.
        art_lambda: the power of "logistic_phi", >= 0 and < 1.
        m: how many scores are kept. With m >= classes all are, and enter in class order, on which a network's result
            then depends.
        top1: one of the names above.
        cross_entropy_over: with top1="cross_entropy", whether its softmax is over the "kept" scores or "all".
        iterations: at most so many of Sinkhorn's; on devices other than the CPU, exactly so many.
        tolerance: how far the marginals of "sinkhorn" may be off; beyond it the CPU warns.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch" or "triton".
    """
    classes = check_scores(scores, target)
    ks, weights = check_k(k, classes)
    m = check_count("m", m)
    if ks[-1] > min(m, classes):
        raise ValueError(
            f"k must be at most min(m, classes), since only m scores are kept: got k = {ks[-1]} with m = {m} "
            f"and {classes} classes"
        )
    check_choice("method", method, METHODS)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_choice("top1", top1, TOP1)
    check_choice("cross_entropy_over", cross_entropy_over, CROSS_ENTROPY_OVER)
    inverse_temperature = check_number("inverse_temperature", inverse_temperature, above=0.0)
    art_lambda = check_number("art_lambda", art_lambda, least=0.0, below=1.0)
    iterations = check_count("iterations", iterations)
    tolerance = check_number("tolerance", tolerance, above=0.0)
    # Inside the logarithm a k that cannot miss still counts; alone it leaves nothing to compute.
    used = [(each, p) for each, p in zip(ks, weights, strict=True) if p > 0.0]
    if used[0][0] == classes:
        used = []
    # With gradients in sight, forward computes them on the way.
    slopes = torch.is_grad_enabled() and scores.requires_grad
    options = (
        [each for each, _ in used],
        [p for _, p in used],
        method,
        distribution,
        inverse_temperature,
        art_lambda,
        min(m, classes),
        top1,
        cross_entropy_over,
        iterations,
        tolerance,
        slopes,
    )
    return _reduced("differentiable", scores, target, None, [], options, weight, ignore_index, reduction, backend)


def ldam_loss(
    scores: Tensor,
    target: Tensor,
    *,
    margins: float | Tensor,
    scale: float = 30.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The label-distribution-aware margin loss of Cao, Wei, Gaidon, Arechiga and Ma (2019); chapter 4.

    Cross-entropy of scale (x - margins_y e_y): rare classes must lead by more, see ``class_margins``.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type; cosines in the paper.
        target: class indices.
        margins: a number for every class, or one >= 0 for all.
        scale: what the scores are multiplied by, > 0.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch" or "triton".
    """
    check_scores(scores, target)
    scale = check_number("scale", scale, above=0.0)
    ignore_index = check_ignore_index(ignore_index)
    margin = _margins(margins, scores, target, ignore_index)
    return _reduced("ldam", scores, target, None, [], (scale,), weight, ignore_index, reduction, backend, (margin,))


def focal_loss(
    scores: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The focal loss of Lin, Goyal, Girshick, He and Dollar (2017); chapter 4.

    (1 - p_y)^gamma times cross-entropy; ``gamma=0`` is cross-entropy.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices.
        gamma: how fast examples that are right already stop counting, >= 0.
        weight: a number for every class, or None.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch" or "triton".
    """
    check_scores(scores, target)
    gamma = check_number("gamma", gamma, least=0.0)
    return _reduced("focal", scores, target, None, [], (gamma,), weight, ignore_index, reduction, backend)


def class_margins(counts: Tensor | Sequence[float] | np.ndarray[Any, Any], max_margin: float = 0.5) -> Tensor:
    """counts^(-1/4), scaled so that the largest, of the rarest class, is `max_margin`; chapters 4 and 7.

    Args:
        counts: how often every class occurs, > 0: a tensor, a sequence or an array.
        max_margin: the margin of the rarest class, > 0.

    Returns:
        One margin a class, in the type of `counts` if that is a floating-point tensor, else the default type.
    """
    max_margin = check_number("max_margin", max_margin, above=0.0)
    try:
        given = torch.as_tensor(counts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"counts must hold a number for every class, got {type(counts).__name__}") from error
    if given.dtype.is_complex or given.dtype == torch.bool:
        raise TypeError(f"counts must be real numbers, got {given.dtype}")
    if given.dim() != 1 or given.numel() == 0:
        raise ValueError(f"counts must have shape (classes,), one number a class, got {tuple(given.shape)}")
    wrong = ~((given > 0) & (given < torch.inf))
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise ValueError(f"counts must be finite and > 0, got {given[place].item()} for class {place}")
    kind = given.dtype if isinstance(counts, Tensor) and given.dtype.is_floating_point else torch.get_default_dtype()
    margins = given.to(wide_type(given)) ** -0.25
    return (margins * (max_margin / margins.max())).to(kind)


def _margins(margins: float | Tensor, scores: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The margin of every row's class (rows,), without gradient."""
    kind = torch.promote_types(scores.dtype, torch.float32)
    if isinstance(margins, Tensor):
        rows, _, safe = _rows(scores, target, ignore_index)
        return check_class_tensor("margins", margins, scores, rows.shape[1]).detach().to(kind)[safe]
    return scores.new_full((target.numel(),), check_number("margins", margins, least=0.0), dtype=kind)


def _rows(scores: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (rows, classes), which rows have a valid target, and that target, 0 in the other rows.

    For what is looked up before the op, which is the one that complains about wrong targets.
    """
    flat = target.reshape(-1).to(torch.int64)
    rows = _flatten(scores)
    used = (flat >= 0) & (flat < rows.shape[1]) & (flat != ignore_index)
    return rows, used, torch.where(used, flat, 0)


def _flatten(scores: Tensor) -> Tensor:
    """The scores as (rows, classes)."""
    if scores.dim() == 2:  # a view of all would be one more step of every backward
        return scores
    return scores.unsqueeze(0) if scores.dim() == 1 else scores.movedim(1, -1).reshape(-1, scores.shape[1])


def _reduced(
    name: str,
    scores: Tensor,
    target: Tensor,
    ks: list[int] | None,
    weights: list[float],
    options: tuple[Any, ...],
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    backend: str | None,
    extras: tuple[Tensor, ...] = (),
) -> Tensor:
    """Rows, the room's op, class weights and reduction: the part that all losses share.

    `ks` is None for a loss that knows no k.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, (None, "torch", "triton"))
    ignore_index = check_ignore_index(ignore_index)
    classes = scores.shape[0] if scores.dim() == 1 else scores.shape[1]
    if weight is not None:
        weight = check_class_tensor("weight", weight, scores, classes)
    rows = _flatten(scores)
    # Compared with a number out of its range, a narrower type wraps.
    flat = (target if target.dim() == 1 else target.reshape(-1)).to(torch.int64)
    if ks is not None:
        kept = _counting(ks, weights, classes)
        options = ([ks[place] for place in kept], [weights[place] for place in kept], *options)
    absent = tuple(option is None for option in options)
    chosen = ops.resolve_backend(backend, scores.device, scores.dtype, name, absent)
    by_row = "none" if weight is not None else reduction
    loss = ops.row_loss(name, rows, flat, extras, options, ignore_index, chosen, by_row)
    if weight is not None:
        return _weighted(loss, flat, target.shape, weight, ignore_index, reduction)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _counting(ks: list[int], weights: list[float], classes: int) -> list[int]:
    """The places of the ks that count: not those of weight 0, nor all classes, among which every guess is right."""
    return [place for place, (k, p) in enumerate(zip(ks, weights, strict=True)) if k < classes and p > 0.0]


def _weighted(
    loss: Tensor, flat: Tensor, shape: torch.Size, weight: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """The rows' losses, each times its class's weight, reduced; the mean is over the sum of these weights."""
    used = flat != ignore_index
    share = torch.where(used, weight.to(loss.dtype)[torch.where(used, flat, 0)], 0.0)
    if reduction == "none":
        return (loss * share).reshape(shape)
    total = torch.where(used, loss * share, 0.0).sum()
    return total / share.sum() if reduction == "mean" else total
