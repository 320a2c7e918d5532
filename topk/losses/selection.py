"""The largest scores of every row: torch.topk, quicker on the CPU, and with a rule for ties."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from topk.losses.room import CHUNK

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
