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
import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topk import kernels
from topk.losses import ROOMS, Room

_LIBRARY = torch.library.Library("topk", "DEF")
_FORWARD_ARGUMENTS = "Tensor scores, Tensor target, Tensor[] extras, int ignore_index, str backend"
_BACKWARD_ARGUMENTS = (
    "Tensor grad, Tensor scores, Tensor target, Tensor[] extras, Tensor[] saved, int ignore_index, str backend"
)


# --- backends --------------------------------------------------------------------------------------------------------


def why_not_triton(
    device: torch.device,
    kind: torch.dtype = torch.float32,
    name: str | None = None,
    absent: tuple[bool, ...] | None = None,
) -> str | None:
    """None when the Triton kernels (of that loss) can run on such scores, otherwise why not; `absent`: options at None.

    Below compute capability 8.0, which Triton does not promise to serve, the first question of a device runs the
    kernels on small cases and compares them with the torch path; the answer is remembered.
    """
    if name is not None and name not in kernels.NAMES:
        return f"{name} has no Triton kernel"
    if kind not in _KERNEL_TYPES:
        return f"the Triton kernels compute in float32, for float32, float16 and bfloat16 scores; these are {kind}"
    missing = _missing_triton()
    if missing is not None:
        return missing
    interpreted = device.type == "cpu" and _interpreted()
    if device.type != "cuda" and not interpreted:
        return f"the Triton kernels need scores on a CUDA device (or TRITON_INTERPRET=1), these are on {device}"
    if name is not None and absent is not None:
        unserved: str | None = getattr(kernels.kernel_room(name), "why_not", _serves_all)(absent)
        if unserved is not None:
            return unserved
    if interpreted:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _PROMISED:
        return None
    reasons = [_self_check(room, device, kind) for room in ([name] if name is not None else kernels.NAMES)]
    wrong = next((reason for reason in reasons if reason is not None), None)
    return None if wrong is None else f"on {device}, of capability {capability[0]}.{capability[1]}, {wrong}"


def resolve_backend(
    backend: str | None, scores_on: torch.device, kind: torch.dtype, name: str, absent: tuple[bool, ...] | None = None
) -> str:
    """The backend to use for a loss; an explicit one that cannot run raises.

    `absent` says which options are None. Their values do not matter, and would not be constants where torch.compile
    follows a number that changes between calls.
    """
    if backend == "triton":
        reason = why_not_triton(scores_on, kind, name, absent)
        if reason is not None:
            raise RuntimeError(f"backend='triton' cannot run: {reason}")
        return "triton"
    # Interpreted kernels are for tests: nobody gets them without asking.
    if backend == "torch" or scores_on.type != "cuda" or _interpreted():
        return "torch"
    return "torch" if why_not_triton(scores_on, kind, name, absent) is not None else "triton"


# What torch.compiler.assume_constant_result does; that one would import the whole compiler, and triton, with topk.
for _constant in (why_not_triton, resolve_backend):
    _constant._dynamo_marked_constant = True  # type: ignore[union-attr]


def _serves_all(absent: tuple[bool, ...]) -> None:
    """The answer of a kernel room that has no `why_not`."""


_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_PROMISED = (8, 0)
OLDEST_TRITON = (3, 4)
"""3.2 has no gather, and neither 3.2 nor 3.3 compiles a function that returns from within a loop."""


@functools.cache
def _missing_triton() -> str | None:
    """None when a triton that can compile the kernels is installed, otherwise what is wrong."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TRITON:
        return None
    return f"triton {version} is installed, and the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


@functools.cache
def _self_check(name: str, device: torch.device, kind: torch.dtype) -> str | None:
    """None when a loss's kernels compute what the torch path does, otherwise what went wrong; warned of once."""
    try:
        wrong = None if _agrees(name, device, kind) else f"the {name} kernels give other results than the torch path"
    except Exception as error:  # whatever a compiler or a driver may throw, the torch path still works
        wrong = f"the {name} kernels failed with {type(error).__name__}: {str(error)[:200]}"
    if wrong is not None:
        warnings.warn(f"{wrong}; the torch path serves {device} instead", RuntimeWarning, stacklevel=2)
    return wrong


def _agrees(name: str, device: torch.device, kind: torch.dtype) -> bool:
    """Whether kernel and torch path agree on the room's examples, for rows that fit a tile and rows that stream."""
    generator = torch.Generator().manual_seed(0)
    relative = 1e-3 if kind == torch.float32 else 1e-2
    for rows, classes in ((5, 37), (2, 9000)):
        scores = (2.0 * torch.randn(rows, classes, generator=generator)).to(device, kind)
        target = torch.randint(classes, (rows,), generator=generator).to(device)
        grad = torch.ones(rows, device=device)
        for extras, options in kernels.kernel_room(name).examples(rows, classes, device):
            results = []
            for backend in ("torch", "triton"):
                loss, saved = _op(name, "fwd")(scores, target, list(extras), -100, backend, *options)
                gradient = _op(name, "bwd")(grad, scores, target, list(extras), saved, -100, backend, *options)
                results.append((loss, gradient))
            if not all(torch.allclose(a, b, relative, 1e-4) for a, b in zip(*results, strict=True)):
                return False
    return True


# --- the ops ---------------------------------------------------------------------------------------------------------


def _compute_type(scores: Tensor) -> torch.dtype:
    return torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype


_AS_IT_IS = contextlib.nullcontext()


def _full_precision(scores: Tensor) -> contextlib.AbstractContextManager[None]:
    """Switches autocast off, where it is on: a matrix product inside a room must not be rounded to bfloat16."""
    device = "cpu" if scores.is_cpu else scores.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


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
    room: Room,
    scores: Tensor,
    target: Tensor,
    extras: list[Tensor],
    ignore_index: int,
    backend: str,
    options: tuple[Any, ...],
) -> tuple[Tensor, list[Tensor], bool]:
    """The loss a row, what backward needs, and whether all targets are known to be classes, none of them ignored."""
    if backend == "triton":
        kernel = kernels.kernel_room(room.name)
        loss, *saved = kernel.forward(scores, target.to(torch.int64), tuple(extras), ignore_index, options)
        return loss, saved, False
    target, ignored, wrong = _rows_in_use(scores, target.to(torch.int64), ignore_index)
    with _full_precision(scores):
        loss, *saved = room.forward(scores.to(_compute_type(scores)), target, tuple(extras), options)
    if ignored is not None:
        loss = loss.masked_fill(ignored, 0.0)
    if wrong is not None:
        loss = loss.masked_fill(wrong, torch.nan)
    return loss, saved, ignored is None and wrong is None


def _run_backward(
    room: Room,
    grad: Tensor,
    scores: Tensor,
    target: Tensor,
    extras: list[Tensor],
    saved: list[Tensor],
    ignore_index: int,
    backend: str,
    options: tuple[Any, ...],
    clean: bool = False,
) -> Tensor:
    """The gradient of sum(grad * loss); `clean`: what `_run_forward` found out about the targets."""
    if backend == "triton":
        kernel = kernels.kernel_room(room.name)
        gradient: Tensor = kernel.backward(
            grad, scores, target.to(torch.int64), tuple(extras), tuple(saved), ignore_index, options
        )
        return gradient
    ignored = wrong = None
    if not clean:
        target, ignored, wrong = _rows_in_use(scores, target.to(torch.int64), ignore_index)
    with _full_precision(scores):
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
        return _run_forward(room, scores, target, extras, ignore_index, backend, options)[:2]

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
        return _run_backward(room, grad, scores, target, extras, saved, ignore_index, backend, options)

    def fake_forward(
        scores: Tensor, target: Tensor, extras: list[Tensor], ignore_index: int, backend: str, *options: Any
    ) -> tuple[Tensor, list[Tensor]]:
        kind = _compute_type(scores)
        rows, classes = scores.shape
        shapes = (kernels.kernel_room(room.name) if backend == "triton" else room).saved(rows, classes, options)
        saved = [scores.new_empty(shape, dtype=dtype or kind) for shape, dtype in shapes]
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
    reduction: str = "none",
) -> Tensor:
    """The loss of every row (rows,), differentiable in the scores, or its sum, or its mean over rows not ignored."""
    loss: Tensor
    if torch.compiler.is_compiling() and not (scores.requires_grad and torch.is_grad_enabled()):
        loss = _op(name, "fwd")(scores, target, list(extras), ignore_index, backend, *options)[0]
    elif torch.compiler.is_compiling():
        loss = _TracedRowLoss.apply(name, options, ignore_index, backend, scores, target, *extras)[0]
    elif _is_plain(scores):
        reduced: Tensor = _PlainLoss.apply(
            (name, options, ignore_index, backend, len(extras)), reduction, scores, target, *extras
        )
        return reduced
    else:
        loss = RowLoss.apply(name, options, ignore_index, backend, scores, target, *extras)[0]
    return _reduce(loss, reduction, _divisor(target, ignore_index, reduction))


def _divisor(target: Tensor, ignore_index: int, reduction: str, clean: bool = False) -> Tensor | int | None:
    """The number of rows that a mean is over, None for other reductions; `clean`: no row is ignored."""
    if reduction != "mean":
        return None
    return target.shape[0] if clean else (target != ignore_index).sum()


def _reduce(loss: Tensor, reduction: str, divisor: Tensor | int | None) -> Tensor:
    """The rows' losses, their sum, or their sum over `divisor`."""
    if reduction == "none":
        return loss
    if divisor is None:
        return loss.sum()
    return loss.mean() if isinstance(divisor, int) else loss.sum() / divisor


def _is_plain(scores: Tensor) -> bool:
    """Whether there are numbers and nothing but autograd is watching: no subclass, no tracer, no torch.func."""
    usual = type(scores) in (Tensor, torch.nn.Parameter) and not scores.is_meta
    return usual and not (torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


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


def _moved(call: tuple[Any, ...], scores: Tensor, target: Tensor, rest: Sequence[Tensor], direction: Tensor) -> Tensor:
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


class _PlainLoss(torch.autograd.Function):
    """The loss, reduced, for everyday training: the same derivatives as `RowLoss`, without the dispatcher's ways.

    Those, with `setup_context` and a graph for the reduction, cost as much as the arithmetic of a small batch.
    """

    @staticmethod
    def forward(
        ctx: Any, call: tuple[Any, ...], reduction: str, scores: Tensor, target: Tensor, *extras: Tensor
    ) -> Tensor:
        name, options, ignore_index, backend, _ = call
        loss, saved, clean = _run_forward(ROOMS[name], scores, target, list(extras), ignore_index, backend, options)
        divisor = _divisor(target, ignore_index, reduction, clean)
        ctx.save_for_backward(scores, target, *extras, *saved)
        ctx.save_for_forward(scores, target, *extras, *saved)
        ctx.call, ctx.reduction, ctx.divisor, ctx.clean = call, reduction, divisor, clean
        return _reduce(loss, reduction, divisor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        name, options, ignore_index, backend, count = ctx.call
        scores, target, *rest = ctx.saved_tensors
        if ctx.divisor is not None:
            grad = grad / ctx.divisor
        grad = grad.expand(target.shape)
        if torch.is_grad_enabled():
            result = RowLossGradient.apply(*ctx.call, grad, scores, target, *rest)
        else:
            extras, saved = rest[:count], rest[count:]
            result = _run_backward(
                ROOMS[name], grad, scores, target, extras, saved, ignore_index, backend, options, ctx.clean
            )
        return None, None, result, None, *([None] * count)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        scores, target, *rest = ctx.saved_tensors
        return _reduce(_moved(ctx.call, scores, target, rest, tangents[2]), ctx.reduction, ctx.divisor)


# torch binds every call's arguments to this signature, and would otherwise parse it again each time.
for _function in (_TracedRowLoss, RowLoss, RowLossGradient):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]


def _directional(
    call: tuple[Any, ...], scores: Tensor, target: Tensor, rest: Sequence[Tensor], direction: Tensor
) -> tuple[Tensor, Tensor]:
    """For every row, the loss's slope along `direction` (rows,) and its Hessian times it (rows, classes)."""
    name, options, ignore_index, _, count = call
    extras = tuple(rest[:count])
    saved = _saved_for_formula(call, scores, target, extras, tuple(rest[count:]))
    target = target.to(torch.int64)
    used = (target >= 0) & (target < scores.shape[1]) & (target != ignore_index)
    safe = torch.where(used, target, 0)

    def total(x: Tensor) -> Tensor:
        x = torch.where(used[:, None], x, 0.0)  # an ignored row may hold anything
        loss = ROOMS[name].formula(x.to(_compute_type(x)), safe, extras, saved, options)
        return torch.where(used, loss, 0.0).sum()

    slopes, curvature = torch.func.vjp(torch.func.grad(total), scores)[:2]
    slope = (slopes * direction).to(_compute_type(scores)).sum(1)
    return slope, curvature(direction.to(slopes.dtype))[0]


def _saved_for_formula(
    call: tuple[Any, ...], scores: Tensor, target: Tensor, extras: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """What the torch room's forward saves; where a kernel ran, which saves other things, worked out from the start."""
    name, options, ignore_index, backend, _ = call
    if backend != "triton":
        return saved
    translate = getattr(kernels.kernel_room(name), "for_formula", None)
    if translate is not None:
        translated: tuple[Tensor, ...] = translate(scores, target, extras, saved, ignore_index, options)
        return translated
    result: tuple[Tensor, ...] = RowLoss.apply(name, options, ignore_index, "torch", scores.detach(), target, *extras)
    return result[1:]
