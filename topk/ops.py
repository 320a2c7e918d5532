"""Registers every loss's forward and backward with torch, once for all rooms, and chooses the backend.

For a room called `smooth` two ops exist, `topk::smooth_fwd` and `topk::smooth_bwd`, opaque to the compiler and with
fakes. Two autograd functions, shared by all rooms, tie them together: `RowLoss` (loss a row; its backward calls
`RowLossGradient`) and `RowLossGradient` (its backward differentiates the room's `formula`). Both fold a vmap into
rows, and both know forward-mode derivatives, so that gradgradcheck, func.grad, vmap and hessian agree.

The ops also do what every room would otherwise repeat: float16 and bfloat16 scores are computed in float32 and the
gradient is rounded once; autocast is switched off inside; ignored rows give 0 and no gradient whatever they hold;
wrong target values raise on the CPU and give NaN for their row on other devices, where looking would cost a
synchronisation.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topk.losses import ROOMS, Room

_LIBRARY = torch.library.Library("topk", "DEF")
_FORWARD_ARGUMENTS = "Tensor scores, Tensor target, Tensor[] extras, int ignore_index, str backend"
_BACKWARD_ARGUMENTS = (
    "Tensor grad, Tensor scores, Tensor target, Tensor[] extras, Tensor[] saved, int ignore_index, str backend"
)


# --- backends --------------------------------------------------------------------------------------------------------


def why_not_triton(device: torch.device) -> str | None:
    """None when the Triton kernels can run on this device, otherwise the reason why not."""
    if device.type != "cuda":
        return f"the Triton kernels need scores on a CUDA device, these are on {device}"
    return "this version has no Triton kernels yet"


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend to use; an explicit one that cannot run raises."""
    if backend == "triton":
        reason = why_not_triton(device)
        if reason is not None:
            raise RuntimeError(f"backend='triton' cannot run: {reason}")
        return "triton"
    return "torch"


# --- the ops ---------------------------------------------------------------------------------------------------------


def _compute_type(scores: Tensor) -> torch.dtype:
    return torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Switches autocast off, where it is on: a matrix product inside a room must not be rounded to bfloat16."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _rows_in_use(scores: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Valid targets for every row, which rows are ignored and which are wrong (None: no row)."""
    classes = scores.shape[1]
    if scores.is_cpu and target.numel() > 0 and (ignore_index < 0 or ignore_index >= classes):
        low, high = map(int, target.aminmax())
        if low >= 0 and high < classes:  # the usual case, for two operations
            return target, None, None
    ignored = target == ignore_index
    wrong = ((target < 0) | (target >= classes)) & ~ignored
    if scores.is_cpu:
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"target must hold class indices from 0 to {classes - 1} (or ignore_index, {ignore_index}), "
                f"got {int(target[row])} at position {row}"
            )
        if not bool(ignored.any()):
            return target, None, None
        return torch.where(ignored, 0, target), ignored, None
    return torch.where(ignored | wrong, 0, target), ignored, wrong


def _run_forward(
    room: Room, scores: Tensor, target: Tensor, extras: list[Tensor], ignore_index: int, options: tuple[Any, ...]
) -> tuple[Tensor, list[Tensor]]:
    target, ignored, wrong = _rows_in_use(scores, target.to(torch.int64), ignore_index)
    with _full_precision(scores.device):
        loss, *saved = room.forward(scores.to(_compute_type(scores)), target, tuple(extras), options)
    if ignored is not None:
        loss = loss.masked_fill(ignored, 0.0)
    if wrong is not None:
        loss = loss.masked_fill(wrong, torch.nan)
    return loss, saved


def _run_backward(
    room: Room,
    grad: Tensor,
    scores: Tensor,
    target: Tensor,
    extras: list[Tensor],
    saved: list[Tensor],
    ignore_index: int,
    options: tuple[Any, ...],
) -> Tensor:
    target, ignored, wrong = _rows_in_use(scores, target.to(torch.int64), ignore_index)
    with _full_precision(scores.device):
        result = room.backward(grad, scores.to(_compute_type(scores)), target, tuple(extras), tuple(saved), options)
    if ignored is not None:
        result = result.masked_fill_(ignored[:, None], 0.0)
    if wrong is not None:
        result = result.masked_fill_(wrong[:, None], torch.nan)
    return result.to(scores.dtype)


def _register(room: Room) -> None:
    """Defines the room's two ops, their implementation for every device and their fakes."""
    options = f", {room.options}" if room.options else ""
    _LIBRARY.define(f"{room.name}_fwd({_FORWARD_ARGUMENTS}{options}) -> (Tensor, Tensor[])")
    _LIBRARY.define(f"{room.name}_bwd({_BACKWARD_ARGUMENTS}{options}) -> Tensor")

    def forward(
        scores: Tensor, target: Tensor, extras: list[Tensor], ignore_index: int, backend: str, *options: Any
    ) -> tuple[Tensor, list[Tensor]]:
        return _run_forward(room, scores, target, extras, ignore_index, options)

    def backward(
        grad: Tensor,
        scores: Tensor,
        target: Tensor,
        extras: list[Tensor],
        saved: list[Tensor],
        ignore_index: int,
        backend: str,
        *options: Any,
    ) -> Tensor:
        return _run_backward(room, grad, scores, target, extras, saved, ignore_index, options)

    def fake_forward(
        scores: Tensor, target: Tensor, extras: list[Tensor], ignore_index: int, backend: str, *options: Any
    ) -> tuple[Tensor, list[Tensor]]:
        kind = _compute_type(scores)
        rows, classes = scores.shape
        saved = [scores.new_empty(shape, dtype=dtype or kind) for shape, dtype in room.saved(rows, classes, options)]
        return scores.new_empty((rows,), dtype=kind), saved

    def fake_backward(grad: Tensor, scores: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(scores, memory_format=torch.contiguous_format)

    for suffix, real, fake in (("fwd", forward, fake_forward), ("bwd", backward, fake_backward)):
        _LIBRARY.impl(f"{room.name}_{suffix}", real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"topk::{room.name}_{suffix}", fake, lib=_LIBRARY)


for _room in ROOMS.values():
    _register(_room)


# --- autograd --------------------------------------------------------------------------------------------------------


def row_loss(
    name: str,
    scores: Tensor,
    target: Tensor,
    extras: tuple[Tensor, ...],
    options: tuple[Any, ...],
    ignore_index: int,
    backend: str,
) -> Tensor:
    """The loss of every row (rows,), differentiable in the scores."""
    loss: Tensor
    if torch.compiler.is_compiling():
        loss = _TracedRowLoss.apply(name, options, ignore_index, backend, scores, target, *extras)[0]
    elif _is_plain(scores):
        loss = _PlainRowLoss.apply((name, options, ignore_index, backend, len(extras)), scores, target, *extras)
    else:
        loss = RowLoss.apply(name, options, ignore_index, backend, scores, target, *extras)[0]
    return loss


def _is_plain(scores: Tensor) -> bool:
    """Whether nothing but autograd is watching: no subclass of Tensor, no transform of torch.func."""
    return type(scores) in (Tensor, torch.nn.Parameter) and not torch._C._are_functorch_transforms_active()


def _op(name: str, suffix: str) -> Any:
    return getattr(torch.ops.topk, f"{name}_{suffix}").default


def _gradient_op(call: tuple[Any, ...], grad: Tensor, scores: Tensor, target: Tensor, rest: Sequence[Tensor]) -> Tensor:
    name, options, ignore_index, backend, count = call
    result: Tensor = _op(name, "bwd")(
        grad, scores, target, list(rest[:count]), list(rest[count:]), ignore_index, backend, *options
    )
    return result


def _fold(size: int, dims: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Turns a vmapped axis of `size` into more rows, for every tensor alike."""
    folded = []
    for tensor, dim in zip(tensors, dims, strict=True):
        batched = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
        folded.append(batched.flatten(0, 1))
    return folded


def _moved(
    call: tuple[Any, ...], scores: Tensor, target: Tensor, rest: Sequence[Tensor], direction: Tensor
) -> Tensor:
    """How fast every row's loss changes along `direction`."""
    ones = torch.ones_like(scores[:, 0], dtype=_compute_type(scores))
    slopes: Tensor = RowLossGradient.apply(*call, ones, scores, target, *rest)
    return (slopes * direction).to(ones.dtype).sum(1)


class _TracedRowLoss(torch.autograd.Function):
    """Loss a row, for torch.compile, which accepts neither `jvp` nor a second function inside backward.

    Inputs: the room's name, its options, ignore_index, backend, then scores, target and the extras.
    """

    @staticmethod
    def forward(
        name: str,
        options: tuple[Any, ...],
        ignore_index: int,
        backend: str,
        scores: Tensor,
        target: Tensor,
        *extras: Tensor,
    ) -> tuple[Tensor, ...]:
        loss, saved = _op(name, "fwd")(scores, target, list(extras), ignore_index, backend, *options)
        return loss, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, options, ignore_index, backend, scores, target, *extras = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(scores, target, *extras, *saved)
        ctx.call = (name, options, ignore_index, backend, len(extras))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scores, target, *rest = ctx.saved_tensors
        result = _gradient_op(ctx.call, grad, scores, target, rest)
        return None, None, None, None, result, None, *([None] * ctx.call[-1])


class RowLoss(_TracedRowLoss):
    """Loss a row, with every derivative: its backward is itself differentiable, and forward mode works too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _TracedRowLoss.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[4:], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scores, target, *rest = ctx.saved_tensors
        result = RowLossGradient.apply(*ctx.call, grad, scores, target, *rest)
        return None, None, None, None, result, None, *([None] * ctx.call[-1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        scores, target, *rest = ctx.saved_tensors
        return _moved(ctx.call, scores, target, rest, tangents[4]), *([None] * (len(rest) - ctx.call[-1]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        result = RowLoss.apply(*inputs[:4], *_fold(info.batch_size, in_dims[4:], inputs[4:]))
        return tuple(r.unflatten(0, (info.batch_size, -1)) for r in result), (0,) * len(result)


class RowLossGradient(torch.autograd.Function):
    """grad * d loss / d scores, itself differentiable through the room's formula.

    Inputs: the room's name, its options, ignore_index, backend, the number of extras, then grad, scores, target, the
    extras and what forward saved.
    """

    @staticmethod
    def forward(
        name: str,
        options: tuple[Any, ...],
        ignore_index: int,
        backend: str,
        extras: int,
        grad: Tensor,
        scores: Tensor,
        target: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        return _gradient_op((name, options, ignore_index, backend, extras), grad, scores, target, rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = inputs[:5]
        ctx.save_for_backward(*inputs[5:])
        ctx.save_for_forward(*inputs[5:])

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, scores, target, *rest = ctx.saved_tensors
        slope, curvature = _directional(ctx.call, scores, target, rest, tangent)
        bent = (grad[:, None] * curvature).to(scores.dtype)
        return None, None, None, None, None, slope, bent, None, *([None] * len(rest))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        grad, scores, target, *rest = ctx.saved_tensors
        grad_tangent, tangent = tangents[5], tangents[6]
        result = torch.zeros_like(scores)
        if grad_tangent is not None:
            ones = torch.ones_like(grad)
            result = result + grad_tangent[:, None] * RowLossGradient.apply(*ctx.call, ones, scores, target, *rest)
        if tangent is not None:
            result = result + grad[:, None] * _directional(ctx.call, scores, target, rest, tangent)[1]
        return result.to(scores.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        result = RowLossGradient.apply(*inputs[:5], *_fold(info.batch_size, in_dims[5:], inputs[5:]))
        return result.unflatten(0, (info.batch_size, -1)), 0


class _PlainRowLoss(torch.autograd.Function):
    """Loss a row for everyday training: the same derivatives as `RowLoss`, without the way through the dispatcher.

    That way, with `setup_context`, costs as much as the arithmetic of a small batch.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], scores: Tensor, target: Tensor, *extras: Tensor) -> Tensor:
        name, options, ignore_index, _, _ = call
        loss, saved = _run_forward(ROOMS[name], scores, target, list(extras), ignore_index, options)
        ctx.save_for_backward(scores, target, *extras, *saved)
        ctx.save_for_forward(scores, target, *extras, *saved)
        ctx.call = call
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        name, options, ignore_index, _, count = ctx.call
        scores, target, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():
            result = RowLossGradient.apply(*ctx.call, grad, scores, target, *rest)
        else:
            result = _run_backward(ROOMS[name], grad, scores, target, rest[:count], rest[count:], ignore_index, options)
        return None, result, None, *([None] * count)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        scores, target, *rest = ctx.saved_tensors
        return _moved(ctx.call, scores, target, rest, tangents[1])


# torch binds every call's arguments to this signature, and would otherwise parse it again each time.
for _function in (_TracedRowLoss, RowLoss, RowLossGradient):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]


def _directional(
    call: tuple[Any, ...], scores: Tensor, target: Tensor, rest: Sequence[Tensor], direction: Tensor
) -> tuple[Tensor, Tensor]:
    """For every row, the loss's slope along `direction` (rows,) and its Hessian times it (rows, classes)."""
    name, options, ignore_index, _, count = call
    extras, saved = tuple(rest[:count]), tuple(rest[count:])
    target = target.to(torch.int64)
    used = (target >= 0) & (target < scores.shape[1]) & (target != ignore_index)
    safe = torch.where(used, target, 0)

    def total(x: Tensor) -> Tensor:
        loss = ROOMS[name].formula(x.to(_compute_type(x)), safe, extras, saved, options)
        return torch.where(used, loss, 0.0).sum()

    slopes, curvature = torch.func.vjp(torch.func.grad(total), scores)[:2]
    slope = (slopes * direction).to(_compute_type(scores)).sum(1)
    return slope, curvature(direction.to(slopes.dtype))[0]
