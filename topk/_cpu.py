"""All that is tuned for the CPU: work in chunks that fit the cache, kept work spaces, exponentials, selection.

Elsewhere the same functions do the plain thing.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**18
"""Elements worked on at a time: the buffer stays in cache, far below the size of the scores."""

_DEVICE_CHUNK = 2**24  # elsewhere, where a chunk costs launches

SMALLEST = {dtype: math.log(torch.finfo(dtype).tiny) + 8.0 for dtype in (torch.float32, torch.float64)}
"""Logarithms below which `exponentials` gives 0: 8 from denormal numbers, so that products with a gradient are none."""


_LOG2E = math.log2(math.e)


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


def lowest(field: Tensor) -> float:
    """The least number; 0 on other devices, which a look would stall, and which do not mind denormal numbers."""
    return float(field.amin()) if field.is_cpu and field.numel() > 0 else 0.0


def exponentials(field: Tensor, least: float | None = None, *, by_two: bool = False) -> Tensor:
    """exp of every number, in place, with 0 below the smallest normal numbers.

    Denormal results, and exp(-inf), can cost the CPU some fifty times as much; to
    look for them costs next to nothing. `least` is `lowest(field)`, if known. `by_two`
    takes powers of two, in two thirds of the time; a number z loses z / 2 more roundings.
    """
    smallest = SMALLEST[field.dtype]
    if (lowest(field) if least is None else least) > smallest:
        return field.mul_(_LOG2E).exp2_() if by_two else field.exp_()
    zero_below = 1.01 * math.exp(smallest)
    return torch.threshold_(field.clamp_(min=smallest).exp_(), zero_below, 0.0)


def exponents(scores: Tensor, shift: Tensor, rate: float, out: Tensor) -> Tensor:
    """(x - shift) rate, written into `out`."""
    torch.sub(scores, shift[:, None], out=out)
    return out if rate == 1.0 else out.mul_(rate)


def sum_exponentials(scores: Tensor, shift: Tensor, index: Tensor, rate: float = 1.0) -> Tensor:
    """Sum of exp(rate (x - shift)) over the classes of each row that `index` does not list."""
    total = torch.empty_like(shift)
    (buffer,) = buffers(scores, 1)
    for part in chunks(scores):
        field = exponents(scores[part], shift[part], rate, buffer[: part.stop - part.start])
        torch.sum(exponentials(field).scatter_(1, index[part], 0.0), 1, out=total[part])
    return total


def scaled_exponentials(scores: Tensor, shift: Tensor, scale: Tensor, rate: float = 1.0) -> Tensor:
    """A new tensor, scale exp(rate (x - shift))."""
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    for part in chunks(scores):
        field = exponents(scores[part], shift[part], rate, result[part])
        exponentials(field).mul_(scale[part, None])
    return result


def squares(field: Tensor) -> Tensor:
    """The sum of every row's squares, without a gradient. torch's dot product would first make a tensor of products."""
    norms: Tensor = torch.linalg.vector_norm(field, dim=1)
    return norms.square()


def largest_wrong(scores: Tensor, target: Tensor) -> Tensor:
    """The largest score of a class that is not y (rows,)."""
    result = torch.empty_like(scores[:, 0])
    (buffer,) = buffers(scores, 1)
    for part in chunks(scores):
        wrong = buffer[: part.stop - part.start].copy_(scores[part])
        torch.amax(wrong.scatter_(1, target[part, None], -torch.inf), 1, out=result[part])
    return result


_GROUP = 8  # classes compared before `largest` selects
_FEW = 64  # classes that numpy sorts, rather than to look for the largest
_WORTH_WHILE = 2**14  # scores, below which nothing but the number of calls counts


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """torch.topk along the classes, up to four times faster on the CPU.

    The `count` largest lie in the `count` groups of eight whose best are largest, and to find a group's best is cheap.
    """
    rows, classes = scores.shape
    groups = classes // _GROUP
    if not _grouping_pays(scores, count):
        return _descending(scores, count)
    row, step = scores.stride()
    best = scores.as_strided((rows, _GROUP, groups), (row, groups * step, step)).amax(1)
    members = torch.arange(0, _GROUP * groups, groups, device=scores.device)
    by_numpy = _numpy_pays(best, count)
    group = _partitioned(best, count) if by_numpy else best.topk(count, dim=1, sorted=False).indices
    index = (group[:, None] + members[:, None]).flatten(1)
    if _GROUP * groups < classes:  # the classes of no group
        others = torch.arange(_GROUP * groups, classes, device=scores.device)
        index = torch.cat((index, others.expand(rows, -1)), 1)
    values, place = _descending(scores.gather(1, index), count)
    return values, index.gather(1, place)


def _descending(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, in order, and where they are."""
    if not _numpy_pays(scores, count):
        values, index = scores.topk(count, dim=1)
        return values, index
    if scores.shape[1] <= _FEW:
        index = _order(scores)[:, :count]
        return scores.gather(1, index), index
    index = _partitioned(scores, count)
    values = scores.gather(1, index)
    order = _order(values)
    return values.gather(1, order), index.gather(1, order)


def _order(scores: Tensor) -> Tensor:
    """Where every row's scores are from the largest down, by numpy."""
    return torch.from_numpy(scores.detach().numpy().argsort(axis=1)[:, ::-1].copy())


def _partitioned(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest are, in any order, by numpy."""
    first = scores.shape[1] - count
    return torch.from_numpy(scores.detach().numpy().argpartition(first, axis=1)[:, first:])


# Measured: torch.topk sorts partially for few of many, is four times slower from count = classes / 64 on, and uses all
# threads; numpy takes much the same time for every count, on one thread, but several times that among scores of -inf,
# unless it sorts them all, which it does without branches.


def _numpy_pays(scores: Tensor, count: int) -> bool:
    rows, classes = scores.shape
    if not scores.is_cpu or rows * classes < _WORTH_WHILE or not count < classes < 128 * count:
        return False
    if not _numpy_is_vectorised():
        return False
    threads = torch.get_num_threads()
    quicker = threads == 1 or (threads <= 3 and classes < 64 * count)
    return quicker and (classes <= _FEW or float(scores.detach().amin()) > -torch.inf)  # nor NaN


def _grouping_pays(scores: Tensor, count: int) -> bool:
    rows, classes = scores.shape
    if not scores.is_cpu or rows * classes < _WORTH_WHILE:
        return False
    if torch.get_num_threads() == 1 and _numpy_is_vectorised():
        return classes >= 48 * count
    many = 2 * _GROUP * count <= classes < 80 * count
    return classes >= max(400 * count, 4000) or (many and not _numpy_pays(scores, count))


@functools.cache
def _numpy_is_vectorised(by_values: bool = False) -> bool:
    """Whether numpy is sooner ready than torch: indices need AVX-512, values alone AVX2."""
    known = torch.backends.cpu.get_cpu_capability()
    return np.lib.NumpyVersion(np.__version__) >= "2.0.0" and ("AVX512" in known or (by_values and "AVX2" in known))


_SORTED = 2048  # classes up to which numpy selects the values sooner than `largest` finds them


def largest_values(scores: Tensor, count: int, without: Tensor | None = None) -> Tensor:
    """The `count` largest scores in falling order, those of the classes `without` (rows,) left out."""
    rows, classes = scores.shape
    selects = scores.is_cpu and rows * classes >= _WORTH_WHILE and classes <= _SORTED and torch.get_num_threads() <= 3
    if not (selects and _numpy_is_vectorised(by_values=True)):
        if without is not None:
            scores = scores.scatter(1, without[:, None], -torch.inf)
        return largest(scores, count)[0]
    result = scores.new_empty((rows, count))
    (buffer,) = buffers(scores, 1)
    # Among many scores of -inf numpy selects slowly, and sorts as fast as ever.
    first = classes - count if lowest(scores) > -torch.inf else 0
    for part in chunks(scores):
        some = buffer[: part.stop - part.start].copy_(scores[part])
        if without is not None:
            some.scatter_(1, without[part, None], -torch.inf)
        if first:
            some.numpy().partition(first, axis=1)
        some.numpy()[:, first:].sort(axis=1)
        result[part] = some[:, classes - count :].flip(1)
    return result


def ordered_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest scores and their indices, descending; among equals the lower class index comes first."""
    values, index = ordered_and_next(scores, count)
    return values[:, :count], index


def ordered_and_next(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `ordered_topk` gives, and among the values the one after them, if any.

    torch.topk leaves the order and the choice among equals open, and a stable sort of every row costs ten times
    as much. So the rows with a tie are repaired: all of them where looking for ties would synchronise with a device.
    """
    values, index = largest(scores, min(count + 1, scores.shape[1]))
    tied = values[:, 1:] == values[:, :-1]
    index = index[:, :count]
    if scores.is_cpu and not bool(tied.any()):
        return values, index
    boundary, first = tied[:, count - 1 :].any(1), values[:, :count]
    if not scores.is_cpu:
        lowest = torch.where(boundary[:, None], _lowest_ties(scores, first, index), index)
        return values, _lower_first(first, lowest)
    index, tied = index.clone(), tied.any(1)
    for rows in boundary.nonzero().squeeze(1).split(max(1, CHUNK // (8 * scores.shape[1]))):
        index[rows] = _lowest_ties(scores[rows], first[rows], index[rows])
    index[tied] = _lower_first(first[tied], index[tied])
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
