"""What a loss's room offers, and the few tools that several rooms share.

A room works on rows: scores of shape (rows, classes) in float32 or float64, targets of shape (rows,) that are
all valid class indices. Everything around that is done once, elsewhere: argument checks, shapes, class weights
and reduction in `topk.functional`; half types, ignored rows, autograd, vmap and compile in `topk.ops`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Options = tuple[Any, ...]
Saved = tuple[Tensor, ...]
SavedShape = tuple[tuple[int, ...], torch.dtype | None]

CHUNK = 2**18
"""Elements worked on at a time: the buffer stays in cache, far below the size of the scores."""

_DEVICE_CHUNK = 2**24  # elsewhere, where a chunk costs launches

_GROUP = 8  # classes compared before `largest` selects
_WORTH_WHILE = 2**14  # scores, below which nothing but the number of calls counts

LOG2_E = math.log2(math.e)  # powers of 2, because torch.exp takes a hundred times longer where its result is denormal


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


def wide_type(scores: Tensor) -> torch.dtype:
    """The type for a few numbers a row: float64 wherever the device has it, so that differences keep their digits."""
    return scores.dtype if scores.device.type == "mps" else torch.float64


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """torch.topk along the classes, up to four times faster on the CPU.

    The `count` largest lie in the `count` groups of eight whose best are largest, and to find a group's best is cheap.
    """
    rows, classes = scores.shape
    groups = classes // _GROUP
    if not _grouping_pays(scores, count):
        return _descending(scores, count)
    best = scores[:, : _GROUP * groups].unflatten(1, (_GROUP, groups)).amax(1)
    members = torch.arange(0, _GROUP * groups, groups)
    index = (_places(best, count)[:, None] + members[:, None]).flatten(1)
    if _GROUP * groups < classes:  # the classes of no group
        index = torch.cat((index, torch.arange(_GROUP * groups, classes).expand(rows, -1)), 1)
    values, place = _descending(scores.gather(1, index), count)
    return values, index.gather(1, place)


def _descending(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, in order, and where they are."""
    if not _numpy_pays(scores, count):
        values, index = scores.topk(count, dim=1)
        return values, index
    index = _places(scores, count)
    values = scores.gather(1, index)
    order = torch.from_numpy(values.detach().numpy().argsort(axis=1)[:, ::-1].copy())
    return values.gather(1, order), index.gather(1, order)


def _places(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest are, in any order; NaN counts as largest for torch and numpy alike."""
    if not _numpy_pays(scores, count):
        return scores.topk(count, dim=1, sorted=False).indices
    first = scores.shape[1] - count
    return torch.from_numpy(scores.detach().numpy().argpartition(first, axis=1)[:, first:])


# Measured: torch.topk sorts partially for few of many, is four times slower from count = classes / 64 on, and uses all
# threads; numpy takes much the same time for every count, on one thread.


def _numpy_pays(scores: Tensor, count: int) -> bool:
    rows, classes = scores.shape
    if not scores.is_cpu or rows * classes < _WORTH_WHILE or not 64 < classes < 128 * count:
        return False
    if not _numpy_is_vectorised():
        return False
    threads = torch.get_num_threads()
    return threads == 1 or (threads <= 3 and classes < 64 * count)


def _grouping_pays(scores: Tensor, count: int) -> bool:
    rows, classes = scores.shape
    if not scores.is_cpu or rows * classes < _WORTH_WHILE:
        return False
    if torch.get_num_threads() == 1 and _numpy_is_vectorised():
        return classes >= 48 * count
    many = 2 * _GROUP * count <= classes < 64 * count
    return classes >= max(400 * count, 4000) or (many and not _numpy_pays(scores, count))


@functools.cache
def _numpy_is_vectorised() -> bool:
    """Whether numpy partitions and sorts with AVX-512; without, it is slower than torch."""
    return np.lib.NumpyVersion(np.__version__) >= "2.0.0" and "AVX512" in torch.backends.cpu.get_cpu_capability()


def without_target(values: Tensor, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Drops the target from the columns of a selection, or the last column where the target is not in it."""
    # From the slot where the target sits, if it does, everything moves up by one.
    passed = (index == target[:, None]).cumsum(1)[:, :-1] > 0
    return torch.where(passed, values[:, 1:], values[:, :-1]), torch.where(passed, index[:, 1:], index[:, :-1])


def largest_wrong(scores: Tensor, target: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The `depth` largest scores among the classes other than the target, descending, and their indices.

    Which of several tied classes is returned first is left open: use it where ties cannot matter.
    """
    return without_target(*largest(scores, depth + 1), target)


def ordered_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores and their indices, descending; among equals the lower class index comes first.

    torch.topk leaves the order and the choice among equals open, and a stable sort of every row costs ten times
    as much. So the rows with a tie are repaired: all of them where looking for ties would synchronise with a device.
    """
    values, index = largest(scores, min(count + 1, scores.shape[1]))
    tied = values[:, 1:] == values[:, :-1]
    values, index = values[:, :count], index[:, :count]
    if scores.is_cpu and not bool(tied.any()):
        return values, index
    boundary = tied[:, count - 1 :].any(1)
    if not scores.is_cpu:
        lowest = torch.where(boundary[:, None], _lowest_ties(scores, values, index), index)
        return values, _lower_first(values, lowest)
    index, tied = index.clone(), tied.any(1)
    for rows in boundary.nonzero().squeeze(1).split(max(1, CHUNK // (8 * scores.shape[1]))):
        index[rows] = _lowest_ties(scores[rows], values[rows], index[rows])
    index[tied] = _lower_first(values[tied], index[tied])
    return values, index


def _lowest_ties(scores: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """The indices with those equal to the last value replaced by the lowest that have this value."""
    classes = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32)
    equal = torch.where(scores == values[:, -1:], classes, scores.shape[1])
    lowest = equal.topk(values.shape[1], dim=1, largest=False).values.to(torch.int64)
    above = values > values[:, -1:]
    place = torch.arange(values.shape[1], device=scores.device) - above.sum(1, keepdim=True)
    return torch.where(above, index, lowest.gather(1, place.clamp(min=0)).clamp(max=scores.shape[1] - 1))


def _lower_first(values: Tensor, index: Tensor) -> Tensor:
    """The indices rearranged so that those of equal values ascend; the values, descending, stay where they are."""
    by_index = index.argsort(dim=1)
    by_value = values.gather(1, by_index).argsort(dim=1, descending=True, stable=True)
    return index.gather(1, by_index.gather(1, by_value))


def row_chunks(rows: int, cost: int, budget: int) -> Iterator[slice]:
    """Slices of rows so that a slice costs at most `budget` units at `cost` units a row (but one row at least)."""
    step = max(1, budget // max(1, cost))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def chunks(scores: Tensor, chunk: int = CHUNK) -> Iterator[slice]:
    """Slices of rows to work on at a time: of `chunk` elements on the CPU, of many more on devices."""
    return row_chunks(scores.shape[0], scores.shape[1], _budget(scores, chunk))


def _budget(scores: Tensor, chunk: int) -> int:
    return chunk if scores.is_cpu else max(chunk, _DEVICE_CHUNK)


_kept = threading.local()


def buffers(scores: Tensor, count: int, chunk: int = CHUNK, width: int | None = None) -> list[Tensor]:
    """Work spaces for one chunk of rows, to be used before anything else asks for any: the CPU's are used again.

    Fresh memory costs the CPU more than the arithmetic, a microsecond for every page of it. So every thread keeps what
    it needed last, `count * chunk` elements at most.
    """
    rows, classes = scores.shape
    shape = (count, min(rows, max(1, _budget(scores, chunk) // classes)), width or classes)
    size = math.prod(shape)
    if not scores.is_cpu or size > 2 * CHUNK:
        return list(scores.new_empty(shape).unbind())
    kept: Tensor | None = getattr(_kept, str(scores.dtype), None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # else it could not be written outside that mode later
            kept = scores.new_empty(size)
        setattr(_kept, str(scores.dtype), kept)
    return list(kept[:size].view(shape).unbind())


def sum_exponentials(scores: Tensor, shift: Tensor, index: Tensor, rate: float = 1.0) -> Tensor:
    """Sum of exp(rate (x - shift)) over the classes of each row that `index` does not list."""
    total = torch.empty_like(shift)
    (buffer,) = buffers(scores, 1)
    for part in chunks(scores):
        field = torch.sub(scores[part], shift[part, None], out=buffer[: part.stop - part.start])
        torch.sum(field.mul_(rate * LOG2_E).exp2_().scatter_(1, index[part], 0.0), 1, out=total[part])
    return total


def scaled_exponentials(
    scores: Tensor, shift: Tensor, scale: Tensor, index: Tensor, values: Tensor, rate: float = 1.0
) -> Tensor:
    """A new tensor, scale exp(rate (x - shift)), with `values` written at the classes that `index` lists."""
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    for part in chunks(scores):
        field = torch.sub(scores[part], shift[part, None], out=result[part])
        field.mul_(rate * LOG2_E).exp2_().mul_(scale[part, None]).scatter_(1, index[part], values[part])
    return result


def centred(scores: Tensor) -> Tensor:
    """The scores less the largest of their row: formulas of differences lose digits far from 0."""
    return scores - finite_or_zero(scores.detach().amax(1))[:, None]


def log_sum_exp(scores: Tensor, keep: Tensor) -> Tensor:
    """log of the sum of exp(x) over the classes where `keep` is true; differentiable, -inf where there is none."""
    kept = scores.masked_fill(~keep, -torch.inf)
    some = kept.amax(1) > -torch.inf
    return torch.where(some, torch.where(some[:, None], kept, 0.0).logsumexp(1), -torch.inf)


def not_finite_above(*values: Tensor) -> Tensor:
    """True where any of the values is NaN or +inf: such a row's loss and gradient are NaN."""
    bad = ~(values[0] < torch.inf)
    for value in values[1:]:
        bad = bad | ~(value < torch.inf)
    return bad


def finite_or_zero(values: Tensor) -> Tensor:
    """A harmless stand-in for what is not finite, where the row's result is settled otherwise."""
    return torch.where(values.isfinite(), values, 0.0)
