"""What all operators share: scores as rows, arguments a row, the head of a row, and what vmaps by rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topk._cpu import largest
from topk.arguments import check_number
from topk.losses.common import largest_classes

Context = Any
_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LOWEST = -1e12
"""What -inf plays as: far below every other score, and still a number."""


def check_scores(scores: Tensor, dim: int) -> None:
    """Scores are a floating-point tensor with at least one number along `dim`."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a Tensor, got {type(scores).__name__}")
    if scores.dtype not in _TYPES:
        raise TypeError(f"scores must be float32, float64, float16 or bfloat16, got {scores.dtype}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r} of type {type(dim).__name__}")
    if not -scores.dim() <= dim < scores.dim():
        raise ValueError(f"dim must be a dimension of scores of shape {tuple(scores.shape)}, got {dim}")
    if scores.shape[dim] < 1:
        raise ValueError(f"scores must have at least one number along dim={dim}, got shape {tuple(scores.shape)}")


def as_rows(scores: Tensor, dim: int) -> Tensor:
    """(rows, n), in float32 at least."""
    if _in_rows(scores, dim):
        return scores
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.movedim(dim, -1).reshape(-1, scores.shape[dim]).to(wide)


def _in_rows(scores: Tensor, dim: int) -> bool:
    """Whether there is nothing to do, which views would take half as long for as the arithmetic of a few rows."""
    return scores.dim() == 2 and dim in (1, -1) and scores.dtype in (torch.float32, torch.float64)


def as_scores(rows: Tensor, scores: Tensor, dim: int) -> Tensor:
    """The inverse of `as_rows`, in the type of the scores."""
    if _in_rows(scores, dim):
        return rows
    moved = scores.movedim(dim, -1).shape
    return rows.reshape(moved).movedim(-1, dim).to(scores.dtype)


def check_k(k: float | Tensor, n: int, *, whole: bool) -> None:
    """A number 0 < k <= n, a whole one if need be; the values of a tensor are not looked at."""
    if isinstance(k, Tensor) and not whole:
        return
    if whole and (isinstance(k, (bool, Tensor)) or not isinstance(k, int)):
        raise TypeError(f"k must be an int for this method, got {k!r} of type {type(k).__name__}")
    check_number("k", k, above=0.0, most=n)


def per_row(name: str, value: float | Tensor, scores: Tensor, dim: int) -> Tensor:
    """One number a row (rows,): of a tensor that broadcasts to the scores without `dim`, or a Python number."""
    shape = scores.shape[:1] if _in_rows(scores, dim) else scores.movedim(dim, -1).shape[:-1]
    wide = torch.promote_types(scores.dtype, torch.float32)
    if not isinstance(value, Tensor):
        return torch.full((math.prod(shape),), float(value), dtype=wide, device=scores.device)
    if value.device != scores.device:
        raise ValueError(f"{name} must be on the device of scores, expected {scores.device}, got {value.device}")
    try:
        return value.to(wide).expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to shape {tuple(shape)}, one number a row, got shape {tuple(value.shape)}"
        ) from None


def check_temperature(temperature: float | Tensor) -> None:
    """A number > 0; the values of a tensor are not looked at."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, above=0.0)


def fold(function: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """The `vmap` of a function of tensors whose first axis are the rows: a batch becomes more rows."""
    folded = []
    for argument, dim in zip(arguments, in_dims, strict=True):
        if isinstance(argument, Tensor):
            moved = argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            rows = moved.shape[1]
            argument = moved.flatten(0, 1)
        folded.append(argument)
    outputs = function(*folded)
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (info.batch_size, rows)), 0
    return tuple(output.unflatten(0, (info.batch_size, rows)) for output in outputs), (0,) * len(outputs)


def compiled() -> bool:
    """Whether torch.compile is tracing: then nothing may look at values, and no function may have a `jvp`."""
    return torch.compiler.is_compiling()


def order_statistics(scores: Tensor, k: float | Tensor) -> Tensor:
    """x_[ceil k], x_[floor k + 1] and x_[1] (rows, 3); NaN counts as the largest."""
    n = scores.shape[1]
    if isinstance(k, Tensor):
        ordered, level = scores.sort(dim=1, descending=True).values, torch.where(k.isfinite(), k, 0.0)
        places = torch.stack((level.ceil() - 1, level.floor(), torch.zeros_like(level)), 1)
        return ordered.gather(1, places.clamp(0, n - 1).to(torch.int64))
    depth = min(math.floor(k) + 1, n)
    ordered = largest(scores, depth)[0]
    return torch.stack((ordered[:, math.ceil(k) - 1], ordered[:, depth - 1], ordered[:, 0]), 1)


def hard_mask(scores: Tensor, k: float | Tensor) -> Tensor:
    """1 on the round(k) largest scores (rows, n), of equal ones those that come first, but never on -inf."""
    possible = (scores > -torch.inf).to(scores.dtype)
    if isinstance(k, Tensor):
        place = scores.detach().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return possible * (place < k.detach().round()[:, None])
    index = largest_classes(scores, max(1, round(k)))[:, : round(k)]
    return possible * torch.zeros_like(possible).scatter(1, index, 1.0)


def float_type(scores: Tensor) -> torch.dtype:
    """float64 for a few numbers a row, wherever the device has it."""
    return scores.dtype if scores.device.type == "mps" else torch.float64
