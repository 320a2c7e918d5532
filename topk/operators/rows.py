"""What all operators share: scores as rows, arguments a row, the head of a row, and functions that vmap by rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from topk._cpu import largest, ordered_topk
from topk.arguments import check_number

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
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.movedim(dim, -1).reshape(-1, scores.shape[dim]).to(wide)


def as_scores(rows: Tensor, scores: Tensor, dim: int) -> Tensor:
    """The inverse of `as_rows`, in the type of the scores."""
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
    shape = scores.movedim(dim, -1).shape[:-1]
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


class RowFunction(Function):
    """A function of tensors whose first axis are the rows: a vmapped batch becomes more rows."""

    @classmethod
    def fold(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        """The `vmap` of a subclass."""
        folded = []
        for argument, dim in zip(arguments, in_dims, strict=True):
            if isinstance(argument, Tensor):
                moved = argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
                rows = moved.shape[1]
                argument = moved.flatten(0, 1)
            folded.append(argument)
        outputs = cls.apply(*folded)
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
    ordered = scores.topk(depth, dim=1).values if compiled() else largest(scores, depth)[0]
    return torch.stack((ordered[:, math.ceil(k) - 1], ordered[:, depth - 1], ordered[:, 0]), 1)


class Constant(RowFunction):
    """A function without a derivative."""

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        """Tells autograd so."""
        ctx.outputs = None if isinstance(output, Tensor) else len(output)
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(*([output] if isinstance(output, Tensor) else output))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[None, ...]:
        """Never asked for a gradient."""
        return (None,) * int(ctx.inputs)

    @staticmethod
    def jvp(ctx: Context, *tangents: Any) -> Any:
        """No tangent for any output."""
        return None if ctx.outputs is None else (None,) * ctx.outputs

    @classmethod
    def of(cls, *arguments: Any) -> Any:
        """The function's value."""
        if compiled():
            return cls.forward(*(each.detach() if isinstance(each, Tensor) else each for each in arguments))
        return cls.apply(*arguments)


class _HardMask(Constant):
    """1 on the round(k) largest scores (rows, n), of equal ones those that come first, but never on -inf."""

    @staticmethod
    def forward(scores: Tensor, k: float | Tensor) -> Tensor:
        possible = (scores > -torch.inf).to(scores.dtype)
        if isinstance(k, Tensor):
            place = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            return possible * (place < k.round()[:, None])
        if compiled():
            index = scores.argsort(dim=1, descending=True, stable=True)[:, : round(k)]
        else:
            index = ordered_topk(scores, max(1, round(k)))[1][:, : round(k)]
        return torch.zeros_like(scores).scatter_(1, index, 1.0).mul_(possible)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _HardMask.fold(info, in_dims, *arguments)


def hard_mask(scores: Tensor, k: float | Tensor) -> Tensor:
    """1 on the round(k) largest scores (rows, n), of equal ones those that come first, but never on -inf."""
    mask: Tensor = _HardMask.of(scores, k)
    return mask


def float_type(scores: Tensor) -> torch.dtype:
    """float64 for a few numbers a row, wherever the device has it."""
    return scores.dtype if scores.device.type == "mps" else torch.float64
