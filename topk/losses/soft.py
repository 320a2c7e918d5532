"""Targets that are probabilities over the classes: the expected loss (book, chapter "A million classes").

    loss(x, q) = sum_y q_y loss(x, y),

as F.cross_entropy has it, weights of classes included: a mean divides by the number of rows. Mixup and CutMix give two
classes a row, label smoothing and distillation all of them. Any loss takes up to `MOST_CLASSES` a row, its rows
repeated once for each of them; a loss with an `expected` form, the definition for all y at once, takes any number.
Which classes have a probability is looked at, so that a device waits and a compiler breaks its graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, cast

import torch
from torch import Tensor

from topk.arguments import REDUCTIONS, check_choice, check_class_tensor
from topk.autograd import compute_dtype
from topk.losses.common import PendingScores, as_rows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MOST_CLASSES = 64
"""So many classes of a row may have a probability above 0 where the loss of each is computed by itself."""

_TOLERANCE = 1e-3  # of the sums of probabilities

P = ParamSpec("P")


def takes_probabilities(
    function: Callable[P, Tensor], expected: Callable[..., Tensor | None] | None = None
) -> Callable[P, Tensor]:
    """Lets `target` be probabilities: a floating-point tensor of the scores' shape.

    expected(scores, q, **keywords) -> sum over y of q_y loss(x, y), (rows,), in plain torch, of the function's
        keywords; None where it does not serve them.
    """

    plain = cast(Callable[..., Tensor], function)

    @functools.wraps(function)
    def with_probabilities(scores: Tensor, target: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if not torch.compiler.is_compiling() and is_distributed(scores):
            from topk import shards  # which imports losses

            scores, target = shards.of_dtensor(scores), target.full_tensor() if is_distributed(target) else target
        soft = isinstance(scores, Tensor) and isinstance(target, Tensor) and target.is_floating_point()
        if not soft or target.shape != scores.shape or scores.dim() == 0:
            return plain(scores, target, *arguments, **keywords)
        if arguments:
            keywords["k"] = arguments[0]
        reduction, weight = keywords.pop("reduction", "mean"), keywords.pop("weight", None)
        check_choice("reduction", reduction, REDUCTIONS)
        rows, share = as_rows(scores, target)[0], _checked(target.movedim(1, -1) if target.dim() > 2 else target)
        if weight is not None:
            share = share * check_class_tensor("weight", weight, scores, rows.shape[1]).to(share.dtype)
        share = share.reshape(rows.shape).to(compute_dtype(scores))
        value = _expected_loss(plain, expected, rows, share, keywords)
        if reduction == "none":
            return value.reshape((scores.shape[0], *scores.shape[2:]) if scores.dim() > 1 else ())
        return value.sum() if reduction == "sum" else value.mean()

    return cast(Callable[P, Tensor], with_probabilities)


def is_distributed(tensor: Any) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; torch.distributed is not imported to find out."""
    return type(tensor).__name__ == "DTensor"


def _checked(q: Tensor) -> Tensor:
    """The probabilities; on devices other than the CPU a row that has none becomes NaN."""
    total = q.sum(-1, keepdim=True, dtype=torch.promote_types(q.dtype, torch.float32))
    allowed = max(_TOLERANCE, torch.finfo(q.dtype).eps)
    wrong = ((total - 1.0).abs() > allowed) | (q < 0.0).any(-1, keepdim=True) | total.isnan()
    if not q.is_cpu:
        return q.masked_fill(wrong, torch.nan)
    if bool(wrong.any()):
        place = tuple(wrong.squeeze(-1).nonzero()[0].tolist())
        row = q[place]
        raise ValueError(
            f"target must hold probabilities that are >= 0 and sum to 1 within {allowed:g}, "
            f"got the sum {float(row.sum()):g} and the least {float(row.min()):g} at position {place}"
        )
    return q


def _expected_loss(
    function: Callable[..., Tensor],
    expected: Callable[..., Tensor | None] | None,
    scores: Tensor,  # (rows, classes)
    q: Tensor,
    keywords: dict[str, Any],
) -> Tensor:
    """The rows' losses (rows,)."""
    row, classes = (q != 0.0).nonzero(as_tuple=True)
    most = int(torch.bincount(row, minlength=1).max())
    if expected is not None and most > 2 and not isinstance(scores, PendingScores):
        wide = scores.to(compute_dtype(scores))
        value = expected(wide, q, **keywords)
        if value is not None:
            return value
    if most > MOST_CLASSES:
        raise ValueError(
            f"target must give at most {MOST_CLASSES} classes a row a probability above 0 for this loss, got {most}"
        )
    keywords = {**keywords, "ignore_index": -100, "reduction": "none"}
    chosen = scores.chosen(row) if isinstance(scores, PendingScores) else scores[row]
    each = function(chosen, classes, **keywords)
    return q.new_zeros(len(scores)).index_add(0, row, each.to(q.dtype) * q[row, classes])
