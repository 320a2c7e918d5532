"""What a loss's room offers, and the few tools that several rooms share.

A room works on rows: scores of shape (rows, classes) in float32 or float64, targets of shape (rows,) that are
all valid class indices. Everything around that is done once, elsewhere: argument checks, shapes, class weights
and reduction in `topk.functional`; half types, ignored rows, autograd, vmap and compile in `topk.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Options = tuple[Any, ...]
Saved = tuple[Tensor, ...]
SavedShape = tuple[tuple[int, ...], torch.dtype | None]


@dataclass(frozen=True)
class Room:
    """One loss, as `topk.ops` needs it.

    name: also the name of the kernel's file, of the test, of the chapter.
    options: the loss's own arguments in torch's schema language, such as "int[] ks, float tau"; they arrive in
        every function below as one tuple, in this order.
    extras: names of further tensors, each with one entry (or row of entries) a row of the scores.
    saved: the shapes and types of what forward keeps for backward; None means the type of the computation.
    forward(scores, target, extras, options): (loss a row, then the saved tensors).
    backward(grad, scores, target, extras, saved, options): gradient of sum(grad * loss), in the computation's type;
        a new tensor that the caller may overwrite.
    formula(scores, target, extras, saved, options): the loss a row again, written so that torch can differentiate
        it twice; used for second derivatives only.
    """

    name: str
    options: str
    extras: tuple[str, ...]
    saved: Callable[[int, int, Options], tuple[SavedShape, ...]]
    forward: Callable[[Tensor, Tensor, Saved, Options], tuple[Tensor, ...]]
    backward: Callable[[Tensor, Tensor, Tensor, Saved, Saved, Options], Tensor]
    formula: Callable[[Tensor, Tensor, Saved, Saved, Options], Tensor]


def target_scores(scores: Tensor, target: Tensor) -> Tensor:
    """x_y, the score of every row's own class."""
    return scores.gather(1, target[:, None]).squeeze(1)


def largest_wrong(scores: Tensor, target: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The `depth` largest scores among the classes other than the target, descending, and their indices.

    Which of several tied classes is returned first is left open: use it where ties cannot matter.
    """
    values, index = scores.topk(depth + 1, dim=1)
    # From the slot where the target sits, if it does, everything moves up by one.
    passed = (index == target[:, None]).cumsum(1)[:, :depth] > 0
    return torch.where(passed, values[:, 1:], values[:, :-1]), torch.where(passed, index[:, 1:], index[:, :-1])


def ordered_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores and their indices, descending; among equals the lower class index comes first.

    torch.topk leaves the order and the choice among equals open, and a stable sort of every row costs ten times
    as much, so only the rows with a tie that could matter are sorted again.
    """
    classes = scores.shape[1]
    values, index = scores.topk(min(count + 1, classes), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    values, index = values[:, :count], index[:, :count]
    if scores.is_cpu and not bool(tied.any()):
        return values, index
    if scores.is_cpu:
        rows = tied.nonzero().squeeze(1)
        index = index.index_copy(0, rows, scores[rows].argsort(dim=1, descending=True, stable=True)[:, :count])
    else:  # no host synchronisation: every row again
        index = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return scores.gather(1, index), index


def row_chunks(rows: int, cost: int, budget: int) -> Iterator[slice]:
    """Slices of rows so that a slice costs at most `budget` units at `cost` units a row (but one row at least)."""
    step = max(1, budget // max(1, cost))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def not_finite_above(*values: Tensor) -> Tensor:
    """True where any of the values is NaN or +inf: such a row's loss and gradient are NaN."""
    bad = ~(values[0] < torch.inf)
    for value in values[1:]:
        bad = bad | ~(value < torch.inf)
    return bad


def concatenate(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Glues the results of row chunks together again, position by position."""
    if len(parts) == 1:
        return tuple(parts[0])
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
