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
    check_ignore_index,
    check_k,
    check_number,
    check_scores,
)


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

    `ks` is None for a loss that knows no k. A k equal to the number of classes is dropped here: every guess is right.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, (None, "torch", "triton"))
    ignore_index = check_ignore_index(ignore_index)
    classes = scores.shape[0] if scores.dim() == 1 else scores.shape[1]
    if weight is not None:
        weight = check_class_tensor("weight", weight, scores, classes)
    rows = scores.unsqueeze(0) if scores.dim() == 1 else scores.movedim(1, -1).reshape(-1, classes)
    flat = target.reshape(-1)
    if ks is not None:
        kept = [(k, p) for k, p in zip(ks, weights, strict=True) if k < classes]
        options = ([k for k, _ in kept], [p for _, p in kept], *options)
    loss = ops.row_loss(name, rows, flat, extras, options, ignore_index, ops.resolve_backend(backend, scores.device))
    return _reduce(loss, flat, target.shape, weight, ignore_index, reduction)


def _reduce(
    loss: Tensor, flat: Tensor, shape: torch.Size, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    if weight is None and reduction == "sum":
        return loss.sum()
    if weight is None and reduction == "none":
        return loss.reshape(shape)
    used = flat != ignore_index
    if weight is None:
        return loss.sum() / used.sum()
    share = torch.where(used, weight.to(loss.dtype)[torch.where(used, flat, 0).long()], 0.0)
    if reduction == "none":
        return (loss * share).reshape(shape)
    total = torch.where(used, loss * share, 0.0).sum()
    return total / share.sum() if reduction == "mean" else total
