"""A loss's definition, fused by torch's own compiler for scores on the CPU (book, chapter 12).

`Loss.formula` guards every row against NaN and +inf. Here the bare definition is compiled, and a glance at each batch
guards it: one in which something of that kind is found goes the ordinary way. The compiler decides what forward keeps
and what backward works out again.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from topk.autograd import Call

COMPILE_SECONDS = 20.0
"""What the compiler takes for one loss, setting and shape: 10 to 25 s of one core, measured."""

Kernel = Callable[[list[Tensor]], Sequence[Tensor]]


class Pair(NamedTuple):
    """Forward and backward of one loss, setting and shape."""

    forward: Kernel  # [scores, target, *tensors] -> loss, extremes, *saved
    backward: Kernel  # [*saved, gradient of the loss] -> gradient of the scores, ...
    scores_at: frozenset[int]  # where among the saved the scores stand


def why_not(device: torch.device) -> str | None:
    """None where definitions can be compiled, otherwise why not."""
    if device.type != "cpu":
        return f"definitions are compiled for scores on the CPU, these are on {device}"
    return _missing_compiler()


@functools.cache
def _missing_compiler() -> str | None:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # a torch without inductor, or an inductor without a C++ compiler
        return f"torch finds no C++ compiler ({type(error).__name__}: {str(error)[:200]})"
    return None


_seen: Counter[Any] = Counter()
_pairs: dict[Any, Pair] = {}
_failed: dict[Any, str] = {}
_lock = threading.RLock()


def is_due(call: Call, scores: Tensor, tensors: tuple[Tensor, ...]) -> bool:
    """Whether such a call was met so often that to compile it would have paid by now.

    That is counted, not timed, so that a run and its repetition switch at the same call.
    """
    saved = call.loss.saved_by_compiling(call.options) * scores.numel()
    if saved == 0.0 or os.environ.get("TOPK_COMPILE") == "0":
        return False
    key = _key(call, scores, tensors)
    _seen[key] += 1
    return _seen[key] > COMPILE_SECONDS / saved and key not in _failed and why_not(scores.device) is None


def _key(call: Call, scores: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    layouts = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in (scores, *tensors)]
    return call.loss.name, str(call.options), torch.get_num_threads(), *layouts


def pair_for(call: Call, scores: Tensor, target: Tensor, tensors: tuple[Tensor, ...]) -> Pair | None:
    """What such calls compile to; where that fails, raises if it was asked for, or warns once and gives None."""
    key = _key(call, scores, tensors)
    if key not in _pairs:
        with _lock:
            if key not in _pairs and key not in _failed:
                try:
                    _pairs[key] = _compile(call, scores, target, tensors)
                except Exception as error:  # whatever a compiler may throw, the ordinary way still works
                    _failed[key] = f"{type(error).__name__}: {str(error)[:500]}"
                    if call.by_itself:
                        text = f"{call.loss.name} does not compile and stays as it is: {_failed[key]}"
                        warnings.warn(text, RuntimeWarning, stacklevel=2)
        if key in _failed and not call.by_itself:
            raise RuntimeError(f"backend='compiled' cannot run: {_failed[key]}")
    return _pairs.get(key)


def forward(pair: Pair, scores: Tensor, target: Tensor, tensors: tuple[Tensor, ...]) -> list[Tensor] | None:
    """The loss of every row and what backward needs besides the scores; None if a score is not what it should be."""
    loss, extremes, *saved = pair.forward([scores, target, *tensors])
    upper, _ = extremes.tolist()
    if not math.isfinite(upper):
        return None
    given = {tensor.untyped_storage().data_ptr() for tensor in (target, *tensors)}
    own = (kept for kept in saved if kept is not scores)  # an output must not be an input
    return [loss, extremes, *(kept.clone() if kept.untyped_storage().data_ptr() in given else kept for kept in own)]


def backward(pair: Pair, grad: Tensor, scores: Tensor, saved: Sequence[Tensor]) -> Tensor:
    """The gradient of sum(grad * loss)."""
    extremes, *rest = saved
    own = iter(rest)
    kept = [scores if place in pair.scores_at else next(own) for place in range(len(rest) + len(pair.scores_at))]
    gradient = pair.backward([*kept, grad])[0]
    some_masked = float(extremes[1]) == -math.inf
    return torch.where(scores == -torch.inf, 0.0, gradient) if some_masked else gradient


def _compile(call: Call, scores: Tensor, target: Tensor, tensors: tuple[Tensor, ...]) -> Pair:
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    loss, options = call.loss, call.options
    kernels: list[Any] = []

    def with_extremes(scores: Tensor, target: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, with a number that is finite if all is well, and the smallest score."""
        largest = scores.detach().amax(1)
        own = scores.detach().gather(1, target[:, None])
        value = loss.summed(scores - largest[:, None] if loss.centred else scores, target, options, *tensors)
        return value, torch.stack((largest.sum() + own.sum(), scores.detach().amin()))

    def keeping(gm: Any, example_inputs: Any) -> Any:
        kernels.append(compile_fx_inner(gm, example_inputs, is_backward=bool(kernels)))
        return kernels[-1]

    traced = aot_function(
        with_extremes,
        fw_compiler=keeping,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    leaf = scores.detach().requires_grad_()
    constants = torch._guards.TracingContext(FakeTensorMode(allow_non_fake_inputs=True))  # a definition may hold some
    # Backward may be run again: it must not write its result over what forward saved.
    with torch.enable_grad(), torch._guards.tracing(constants), config.patch(donated_buffer=False):
        value, _ = traced(leaf, target, *tensors)
        (expected,) = torch.autograd.grad(value.sum(), leaf)
    _, _, *saved = kernels[0]([scores, target, *tensors])
    pair = Pair(kernels[0], kernels[1], frozenset(place for place, kept in enumerate(saved) if kept is scores))
    if not torch.equal(pair.backward([*saved, torch.ones_like(value)])[0], expected):
        raise RuntimeError("this version of torch hands the tensors that forward saves to backward in another order")
    return pair
