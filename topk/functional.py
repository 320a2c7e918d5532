"""One public function a loss: it checks the arguments, flattens the scores to rows and reduces.

All of them follow `torch.nn.functional.cross_entropy`: scores (classes,), (rows, classes) or (rows, classes, d1, ...),
targets as class indices, `weight` one number a class (the weighted mean divides by the sum of the weights used),
`ignore_index` rows count for nothing. The loss of half-precision scores is computed and returned in float32.
"""

from __future__ import annotations

from typing import Any

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
