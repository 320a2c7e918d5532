"""From a loss's `forward` and `backward` to every derivative: autograd, torch.func, forward mode, torch.compile.

A loss works on rows: scores (rows, classes) in float32 or float64 and targets (rows,) that are classes. What every
loss needs around that is here, once: float16 and bfloat16 scores are computed in float32 and their gradient is rounded
once; autocast is off inside; ignored rows give 0 and no gradient whatever they hold; a wrong target raises on the CPU
and makes its row NaN elsewhere, where to look would wait for the device.

Eager calls go through `RowLoss`, whose backward calls `RowLossGradient`, whose backward differentiates `definition`.
A tracer (torch.compile, export, meta tensors) gets `definition` itself, so that the compiler can fuse it; it meets an
opaque operation only where the largest scores are selected or a Triton kernel runs.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from topk import compiled, kernels
from topk.arguments import IGNORED, WRONG, check_targets

if TYPE_CHECKING:
    from topk.tails import Tail


class Head(NamedTuple):
    """How many of the largest scores a loss looks at one by one, and the tails, one for every k, for all, or none.

    `noise`: epsilon and the number of samples where noise is added first, so that every sample has its own largest.
    """

    depth: int
    tails: Sequence[Tail]
    noise: tuple[float, int] | None = None


@dataclass(frozen=True)
class Loss:
    """What a file in `topk.losses` offers. `options` is a NamedTuple of the loss's arguments.

    definition(scores, target, *tensors, **options) -> loss (rows,): the formula in plain torch, differentiable, without
        a look at the numbers. Unless it is `joint`, a loss with `ks` and `weights` among its options is the weighted
        sum of definitions with one `k` each; a tensor with a column for every k then gives each its own.
    forward(scores, target, options, *tensors) -> (loss (rows,), *saved): the same number, made fast.
    backward(grad, scores, target, options, saved, *tensors) -> gradient of sum(grad * loss), a new tensor.

    sparse(...) -> classes and slopes (rows, few), which add up to what `backward` gives for the same arguments; None
        where most classes have a slope.

    head(options) -> what the loss needs to know of a row where processes share the classes; `definition` is then given
        the head's scores and, as `tail` (numbers, rows), what is said of all others (`topk.tails`).

    Without `forward` and `backward`, `definition` is differentiated. `tensors` have one entry (or row of entries) for
    every row of scores, or for every one of as many equal groups of rows, so that vmap can fold its axis into rows.
    """

    name: str
    options: type[Any]
    definition: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, ...]] | None = None
    backward: Callable[..., Tensor] | None = None
    sparse: Callable[..., tuple[Tensor, Tensor] | None] | None = None
    head: Callable[[Any], Head] | None = None
    joint: bool = False
    centred: bool = True  # whether `definition` is given scores less their largest; else it takes differences itself
    saved_by_compiling: Callable[[Any], float] = lambda options: 0.0  # seconds for every score, measured

    def formula(
        self, scores: Tensor, target: Tensor, options: Any, *tensors: Tensor, tails: Sequence[Tensor] = ()
    ) -> Tensor:
        """The definition, and what is common to all losses: NaN for rows with NaN or +inf, +inf where y is masked.

        All of them depend on differences of scores alone, which keep their digits once the largest score is 0. (But not
        those between scores far below it.)
        """
        largest = scores.detach().amax(1)
        broken = ~(largest < torch.inf)
        impossible = scores.gather(1, target[:, None]).squeeze(1) == -torch.inf
        taint = torch.where(broken, torch.nan, 1.0).to(scores.dtype)  # a factor that the gradient meets as well
        origin = largest[:, None] if self.centred else 0.0
        # A masked class keeps its -inf, and gets no gradient.
        scores = torch.where(scores == -torch.inf, -torch.inf, scores * taint[:, None] - origin)
        scores = torch.where((broken | impossible)[:, None], 0.0, scores)
        return torch.where(impossible, torch.inf, self.summed(scores, target, options, *tensors, tails=tails)) * taint

    def summed(
        self, scores: Tensor, target: Tensor, options: Any, *tensors: Tensor, tails: Sequence[Tensor] = ()
    ) -> Tensor:
        """The definition, or the weighted sum of as many as there are `ks`."""
        fields = options._asdict()
        if len(tails) == 1:
            fields["tail"] = tails[0]
        if self.joint or "ks" not in fields:
            return self.definition(scores, target, *tensors, **fields)
        ks, weights = fields.pop("ks"), fields.pop("weights")
        loss = torch.zeros_like(scores[:, 0])
        for place, k in enumerate(ks):
            if len(tails) > 1:
                fields["tail"] = tails[place]
            own = [tensor[:, place] if tensor.dim() == 2 else tensor for tensor in tensors]
            loss = loss + weights[place] * self.definition(scores, target, *own, k=k, **fields)
        return loss


class Call(NamedTuple):
    """What a call holds besides tensors."""

    loss: Loss
    options: Any
    ignore_index: int
    backend: str  # "torch", "compiled" or "triton"
    by_itself: bool = False  # whether the backend was chosen, not asked for
    ran: list[compiled.Pair] | None = None  # of "compiled": what forward used, unless it met what that cannot do


def row_loss(call: Call, scores: Tensor, target: Tensor, *tensors: Tensor) -> Tensor:
    """The loss of every row (rows,), differentiable in the scores (rows, classes)."""
    loss: Tensor
    if not is_traced(scores):
        loss = RowLoss.apply(_chosen(call, scores, tensors), scores, target, *tensors)[0]
    elif call.backend == "triton":
        numbers = [option for option in call.options if isinstance(option, float)]
        others = _as_text(*(_NUMBER if isinstance(option, float) else option for option in call.options))
        loss = _kernel_loss(call.loss.name, others, numbers, call.ignore_index, scores, target, list(tensors))[0]
    else:
        loss = _traced_loss(call, scores, target, tensors)
    return loss


def _chosen(call: Call, scores: Tensor, tensors: tuple[Tensor, ...]) -> Call:
    """The call with "compiled" in place of "torch" where that pays, and "torch" in place of it where it cannot be."""
    by_itself = call.by_itself and call.backend == "torch" and scores.is_cpu
    if not by_itself and call.backend != "compiled":
        return call
    plain = scores.requires_grad and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    if not plain or scores.numel() == 0:
        return call._replace(backend="torch")
    if by_itself and not compiled.is_due(call, scores, tensors):
        return call
    return call._replace(backend="compiled", ran=[])


def compute_dtype(scores: Tensor) -> torch.dtype:
    """The type that the loss of these scores is computed and returned in."""
    return torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype


def is_traced(scores: Tensor) -> bool:
    """Whether somebody records the operations, so that no number may be looked at."""
    if torch.compiler.is_compiling():
        return True
    plain = type(scores) in (Tensor, torch.nn.Parameter) or torch._C._are_functorch_transforms_active()
    return not plain or scores.is_meta or torch._C._len_torch_dispatch_stack() > 0


_UNCHANGED = contextlib.nullcontext()


def without_autocast(scores: Tensor) -> contextlib.AbstractContextManager[None]:
    """A matrix product inside a loss must not be rounded to bfloat16."""
    device = scores.device.type
    return (
        torch.autocast(device, enabled=False) if device != "meta" and torch.is_autocast_enabled(device) else _UNCHANGED
    )


def settled(values: Tensor, state: Tensor) -> Tensor:
    """The rows' values with 0 where the row is ignored and NaN where its target is wrong."""
    instead = torch.where(state == WRONG, torch.nan, 0.0).to(values.dtype)
    shape = (-1,) + (1,) * (values.dim() - 1)
    return torch.where((state >= 0).view(shape), values, instead.view(shape))


def _traced_loss(call: Call, scores: Tensor, target: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    target, classes = target.to(torch.int64), scores.shape[1]
    ignored = target == call.ignore_index
    used = (target >= 0) & (target < classes) & ~ignored
    with without_autocast(scores):
        rows = torch.where(used[:, None], scores, 0.0).to(compute_dtype(scores))
        loss = call.loss.formula(rows, torch.where(used, target, 0), call.options, *tensors)
    return torch.where(used, loss, torch.where(ignored, 0.0, torch.nan).to(loss.dtype))


# --- eager calls -----------------------------------------------------------------------------------------------------


def row_values(call: Call, scores: Tensor, target: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The loss of every row, the rows' states (raw targets where a kernel runs), and what backward needs."""
    if call.backend == "triton":
        target = target.to(torch.int64)
        kernel = kernels.of(call.loss.name)
        loss, *saved = kernel.forward(scores, target, call.options, call.ignore_index, *tensors)
        return loss, target.clone(), *saved
    state, all_used = check_targets(target, scores.shape[1], call.ignore_index)
    rows, safe = scores.to(compute_dtype(scores)), state if all_used else state.clamp(min=0)
    with without_autocast(scores):
        if call.ran is not None:
            rows = rows if all_used else torch.where((state >= 0)[:, None], rows, 0.0)
            pair = compiled.pair_for(call, rows, safe, tensors)
            done = None if pair is None else compiled.forward(pair, rows, safe, tensors)
            if pair is not None and done is not None:
                call.ran.append(pair)
                loss, *saved = done
                return loss if all_used else settled(loss, state), state.clone(), *saved
        if call.loss.forward is None:
            loss, saved = call.loss.formula(rows, safe, call.options, *tensors), []
        else:
            loss, *saved = call.loss.forward(rows, safe, call.options, *tensors)
    # An output that is an input could not be saved.
    return loss if all_used else settled(loss, state), state.clone(), *saved


def row_gradients(
    call: Call, grad: Tensor, scores: Tensor, state: Tensor, tensors: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> Tensor:
    """The gradient of sum(grad * loss), in the type of the scores."""
    if call.backend == "triton":
        kernel = kernels.of(call.loss.name)
        gradient: Tensor = kernel.backward(grad, scores, state, call.options, call.ignore_index, saved, *tensors)
        return gradient
    all_used = state.is_cpu and state.numel() > 0 and int(state.min()) >= 0
    rows, safe = scores.to(compute_dtype(scores)), state if all_used else state.clamp(min=0)
    with without_autocast(scores):
        if call.ran:
            rows = rows if all_used else torch.where((state >= 0)[:, None], rows, 0.0)
            gradient = compiled.backward(call.ran[0], grad.to(rows.dtype).contiguous(), rows, saved)
        elif call.loss.backward is None:
            pull = torch.func.vjp(lambda x: call.loss.formula(x, safe, call.options, *tensors), rows)[1]
            gradient = pull(grad.to(rows.dtype))[0]
        else:
            gradient = call.loss.backward(grad, rows, safe, call.options, saved, *tensors)
    return (gradient if all_used else settled(gradient, state)).to(scores.dtype)


def few_gradients(
    call: Call, grad: Tensor, scores: Tensor, state: Tensor, tensors: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor] | None:
    """The same as classes and slopes (rows, few), some classes perhaps twice; None where the loss has no such form."""
    if call.backend == "triton" or call.loss.sparse is None:
        return None
    safe = state.clamp(min=0)
    found = call.loss.sparse(grad, scores.to(compute_dtype(scores)), safe, call.options, saved, *tensors)
    return None if found is None else (found[0], settled(found[1], state))


class _Bound:
    """Arguments that were given by position, and what else somebody may ask of them."""

    __slots__ = ("_signature", "args", "kwargs")

    def __init__(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._signature, self.args, self.kwargs = signature, args, kwargs

    def apply_defaults(self) -> None:
        """There are none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect.Signature.bind(self._signature, *self.args, **self.kwargs), name)


class _Positions(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """As it comes."""
        return _Bound(self, args, kwargs)


def by_position(function: Any) -> Any:
    """The Function, all of whose arguments are given by position: torch would parse the signature of `forward` in every
    call and bind the arguments to it, which takes as long as the loss of a few rows."""
    function.forward.__signature__ = _Positions(list(inspect.signature(function.forward).parameters.values()))
    return function


def plain(grad: Tensor) -> bool:
    """Whether a backward pass need not have a derivative, nor be traced, nor run for a batch."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch  # asked last, for a tracer does not know it
    batched = functorch.is_legacy_batchedtensor(grad)  # `is_grads_batched=True` of torch.autograd.grad
    return not (batched or functorch.is_functorch_wrapped_tensor(grad))


@by_position
class RowLoss(torch.autograd.Function):
    """The loss of every row, the rows' states and what backward needs. Inputs: call, scores, target, *tensors."""

    @staticmethod
    def forward(call: Call, scores: Tensor, target: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return row_values(call, scores, target, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, scores, _, *tensors = inputs
        _, state, *saved = output
        ctx.mark_non_differentiable(state, *saved)
        ctx.save_for_backward(scores, state, *tensors, *saved)
        ctx.save_for_forward(scores, state, *tensors, *saved)
        ctx.call, ctx.tensors = call, len(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, 2 + ctx.tensors
        if plain(grad):
            gradient = row_gradients(ctx.call, grad, saved[0], saved[1], saved[2:count], saved[count:])
        else:
            gradient = RowLossGradient.apply(ctx.call, ctx.tensors, grad, *saved)
        return None, gradient, None, *([None] * ctx.tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        scores, *rest = ctx.saved_tensors
        slope = _slope(ctx.call, ctx.tensors, scores, rest, tangents[1])
        return slope, *([None] * (len(rest) - ctx.tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        result = RowLoss.apply(inputs[0], *_folded(info.batch_size, in_dims[1:], inputs[1:]))
        return tuple(r.unflatten(0, (info.batch_size, -1)) for r in result), (0,) * len(result)


@by_position
class RowLossGradient(torch.autograd.Function):
    """The gradient of sum(grad * loss). Inputs: call, number of tensors, grad, scores, states, *tensors, *saved."""

    @staticmethod
    def forward(call: Call, count: int, grad: Tensor, scores: Tensor, state: Tensor, *rest: Tensor) -> Tensor:
        return row_gradients(call, grad, scores, state, rest[:count], rest[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, ctx.tensors, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, scores, *rest = ctx.saved_tensors
        slope = _slope(ctx.call, ctx.tensors, scores, rest, tangent)
        bent = grad[:, None] * _curvature(ctx.call, ctx.tensors, scores, rest, tangent)
        return None, None, slope.to(grad.dtype), bent.to(scores.dtype), *([None] * len(rest))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        grad, scores, *rest = ctx.saved_tensors
        grad_tangent, tangent = tangents[2], tangents[3]
        result = torch.zeros_like(scores)
        if grad_tangent is not None:
            result = result + RowLossGradient.apply(ctx.call, ctx.tensors, grad_tangent, scores, *rest)
        if tangent is not None:
            result = result + grad[:, None] * _curvature(ctx.call, ctx.tensors, scores, rest, tangent)
        return result.to(scores.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        call, count = inputs[:2]
        tensors = _folded(info.batch_size, in_dims[2:], inputs[2:])
        if call.ran:  # compiled for another number of rows
            call = call._replace(backend="torch", ran=None)
            state = torch.where(tensors[2] == IGNORED, call.ignore_index, tensors[2])
            tensors[3 + count :] = row_values(call, tensors[1], state, tuple(tensors[3 : 3 + count]))[2:]
        result = RowLossGradient.apply(call, count, *tensors)
        return result.unflatten(0, (info.batch_size, -1)), 0


def _folded(size: int, dims: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Turns a vmapped axis of `size` into more rows, for every tensor alike."""
    batched = (
        tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
        for tensor, dim in zip(tensors, dims, strict=True)
    )
    return [tensor.flatten(0, 1) for tensor in batched]


def _slope(call: Call, count: int, scores: Tensor, rest: Any, direction: Tensor) -> Tensor:
    """How fast every row's loss changes along `direction` (rows,)."""
    ones = torch.ones_like(scores[:, 0], dtype=compute_dtype(scores))
    gradient: Tensor = RowLossGradient.apply(call, count, ones, scores, *rest)
    return (gradient * direction).to(ones.dtype).sum(1)


def _curvature(call: Call, count: int, scores: Tensor, rest: Any, direction: Tensor) -> Tensor:
    """Every row's Hessian times its `direction` (rows, classes)."""
    target, tensors = rest[0], rest[1 : 1 + count]
    used = (target >= 0) & (target < scores.shape[1]) & (target != call.ignore_index)
    safe = torch.where(used, target, 0)

    def total(x: Tensor) -> Tensor:
        x = torch.where(used[:, None], x, 0.0)  # an ignored row may hold anything
        loss = call.loss.formula(x.to(compute_dtype(x)), safe, call.options, *tensors)
        return torch.where(used, loss, 0.0).sum()

    curvature = torch.func.vjp(torch.func.grad(total), scores)[1]
    product: Tensor = curvature(direction.to(scores.dtype))[0]
    return product


# --- kernels under a tracer ------------------------------------------------------------------------------------------


_NUMBER = "a number"


def _as_text(*options: Any) -> str:
    """Options that are no floats, which a compiler follows where they change between calls."""
    return json.dumps(options)


_as_text._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _call_of(name: str, others: str, numbers: list[float], ignore_index: int) -> Call:
    loss: Loss = importlib.import_module(f"topk.losses.{name}").LOSS
    left = iter(numbers)
    options = [next(left) if option == _NUMBER else option for option in json.loads(others)]
    return Call(loss, loss.options(*options), ignore_index, "triton")


@torch.library.custom_op("topk::kernel_loss", mutates_args=())
def _kernel_loss(
    name: str, others: str, numbers: list[float], ignore_index: int,
    scores: Tensor, target: Tensor, tensors: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """The loss of every row and what `kernel_gradient` needs."""
    loss, _, *saved = row_values(_call_of(name, others, numbers, ignore_index), scores, target, tuple(tensors))
    return [loss, *saved]


@_kernel_loss.register_fake
def _(*inputs: Any) -> list[Tensor]:
    *call, scores, _, _ = inputs
    shapes = kernels.of(call[0]).saved(*scores.shape, _call_of(*call).options)
    saved = [scores.new_empty(shape, dtype=dtype or torch.float32) for shape, dtype in shapes]
    return [scores.new_empty(scores.shape[:1], dtype=torch.float32), *saved]


@torch.library.custom_op("topk::kernel_gradient", mutates_args=())
def _kernel_gradient(
    name: str, others: str, numbers: list[float], ignore_index: int,
    grad: Tensor, scores: Tensor, target: Tensor, tensors: list[Tensor], saved: list[Tensor],
) -> Tensor:  # fmt: skip
    """The gradient of sum(grad * loss)."""
    call = _call_of(name, others, numbers, ignore_index)
    return row_gradients(call, grad, scores, target.to(torch.int64), tuple(tensors), tuple(saved))


@_kernel_gradient.register_fake
def _(*inputs: Any) -> Tensor:
    scores = inputs[-4]
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *ctx.call, scores, target, tensors = inputs
    ctx.tensors = len(tensors)
    ctx.save_for_backward(scores, target, *tensors, *output[1:])


def _kernel_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    scores, target, *rest = ctx.saved_tensors
    tensors, saved = rest[: ctx.tensors], rest[ctx.tensors :]
    gradient = _kernel_gradient(*ctx.call, grads[0], scores, target, tensors, saved)
    return None, None, None, None, gradient, None, [None] * ctx.tensors


torch.library.register_autograd("topk::kernel_loss", _kernel_backward, setup_context=_remember)
