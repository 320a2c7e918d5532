"""What a loss's room offers, and the few tools that several rooms share.

A room works on rows: scores of shape (rows, classes) in float32 or float64, targets of shape (rows,) that are
all valid class indices. Everything around that is done once, elsewhere: argument checks, shapes, class weights
and reduction in `topk.functional`; half types, ignored rows, autograd, vmap and compile in `topk.ops`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Options = tuple[Any, ...]
Saved = tuple[Tensor, ...]
SavedShape = tuple[tuple[int, ...], torch.dtype | None]

CHUNK = 2**18
"""Elements worked on at a time: the buffer stays in cache, far below the size of the scores."""

_DEVICE_CHUNK = 2**24  # elsewhere, where a chunk costs launches

SMALLEST = {kind: math.log(torch.finfo(kind).tiny) + 8.0 for kind in (torch.float32, torch.float64)}
"""Logarithms below which `exponentials` gives 0: 8 from denormal numbers, so that products with a gradient are none."""


@dataclass(frozen=True)
class Room:
    """One loss, as `topk.ops` needs it.

    name: also the name of the kernel's file, of the test, of the chapter.
    options: the loss's own arguments in torch's schema language, such as "int[] ks, float tau"; they arrive in
        every function below as one tuple, in this order.
    extras: names of further tensors, each with one entry (or row of entries) a row of the scores; may be left out.
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


def exponentials(field: Tensor, least: float | None = None) -> Tensor:
    """exp of every number, in place, with 0 for what is below the smallest normal numbers; `least`: `lowest(field)`.

    Denormal results, and exp(-inf), can cost the CPU a hundred times as much; to look for them costs next to nothing.
    """
    smallest = SMALLEST[field.dtype]
    if (lowest(field) if least is None else least) > smallest:
        return field.exp_()
    return torch.threshold_(field.clamp_(min=smallest).exp_(), 1.01 * math.exp(smallest), 0.0)


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
