"""Argument checks: every error names the argument, the value it got and what was expected.

Only shapes, types and Python numbers are looked at here, so nothing synchronises with a device and
`torch.compile` traces straight through. The values of `target` are checked where a loss runs, by `check_targets`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

KArgument = int | Mapping[int, float]

REDUCTIONS = ("none", "mean", "sum")
BACKENDS = (None, "torch", "triton")
_SCORE_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INDEX_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _is_integer(value: object) -> bool:
    if type(value) is int:  # asking an abstract class takes longer
        return True
    kinds = (numbers.Integral, torch.SymInt)  # a union of types is more than torch.compile of torch 2.6 understands
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_real(value: object) -> TypeGuard[float]:
    return type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def check_scores(scores: Tensor, target: Tensor) -> int:
    """Checks types and shapes of the two tensors; returns the number of classes."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a Tensor, got {type(scores).__name__}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor of class indices, got {type(target).__name__}")
    if scores.dtype not in _SCORE_TYPES:
        raise TypeError(f"scores must be float32, float64, float16 or bfloat16, got {scores.dtype}")
    if target.dtype not in _INDEX_TYPES:
        raise TypeError(
            f"target must hold class indices (an integer type), or probabilities in the shape of scores, "
            f"got {target.dtype} of shape {tuple(target.shape)}"
        )
    if scores.dim() == 0:
        raise ValueError("scores must have shape (classes,), (rows, classes) or (rows, classes, d1, ...), got a scalar")
    if scores.device != target.device:
        raise ValueError(f"target must be on the device of scores, expected {scores.device}, got {target.device}")
    classes = scores.shape[0] if scores.dim() == 1 else scores.shape[1]
    expected = () if scores.dim() == 1 else (scores.shape[0], *scores.shape[2:])
    if target.shape != expected:
        raise ValueError(
            f"target must have shape {tuple(expected)} for scores of shape {tuple(scores.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if classes < 1:
        raise ValueError(f"scores must have at least one class, got shape {tuple(scores.shape)}")
    return classes


def _check_one_k(k: object, classes: int | None) -> int:
    if not _is_integer(k):
        raise TypeError(f"k must be an int or a mapping from int to weight, got {k!r} of type {type(k).__name__}")
    number: int = int(k)  # type: ignore[call-overload]
    if number < 1:
        raise ValueError(f"k must be at least 1, got {number}")
    if classes is not None and number > classes:
        raise ValueError(f"k must be at most the number of classes, {classes}, got {number}")
    return number


def check_k(k: KArgument, classes: int | None = None) -> tuple[list[int], list[float]]:
    """Normalises `k` to two lists, the numbers of guesses (ascending) and their weights."""
    if not isinstance(k, Mapping):
        return [_check_one_k(k, classes)], [1.0]
    if not k:
        raise ValueError("k as a mapping must name at least one number of guesses, got {}")
    ks = sorted(_check_one_k(key, classes) for key in k)
    weights: list[float] = []
    for key in ks:
        weight = k[key]
        if not _is_real(weight):
            raise TypeError(f"k must map to real weights, got k[{key}] = {weight!r}")
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"k must map to finite weights >= 0, got k[{key}] = {weight!r}")
        weights.append(float(weight))
    total = math.fsum(weights)
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"the weights of k must sum to 1, got {dict(k)!r} with sum {total:.9g}")
    return ks, weights


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """A finite real number, optionally bounded."""
    if not _is_real(value):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    bounds = []
    if above is not None:
        bounds.append(f"> {above:g}")
    if least is not None:
        bounds.append(f">= {least:g}")
    if most is not None:
        bounds.append(f"<= {most:g}")
    if below is not None:
        bounds.append(f"< {below:g}")
    number = float(value)
    if (
        not -math.inf < number < math.inf  # math.isfinite would not trace a number that changes between calls
        or (above is not None and not number > above)
        or (least is not None and not number >= least)
        or (most is not None and not number <= most)
        or (below is not None and not number < below)
    ):
        raise ValueError(f"{name} must be a finite number {' and '.join(bounds)}".rstrip() + f", got {value!r}")
    return number


def check_count(name: str, value: object, least: int = 1) -> int:
    """An int of at least `least`."""
    if not _is_integer(value):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    number: int = int(value)  # type: ignore[call-overload]
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """One of a few named options."""
    options = tuple(choices)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def check_ignore_index(ignore_index: object) -> int:
    """Any int."""
    if not _is_integer(ignore_index):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r} of type {type(ignore_index).__name__}")
    number: int = int(ignore_index)  # type: ignore[call-overload]
    return number


def check_class_tensor(name: str, value: Tensor, scores: Tensor, classes: int) -> Tensor:
    """A floating-point vector with one number a class, on the device of the scores."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor with one number a class, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating-point type, got {value.dtype}")
    if tuple(value.shape) != (classes,):
        raise ValueError(f"{name} must have shape ({classes},), one number a class, got {tuple(value.shape)}")
    if value.device != scores.device:
        raise ValueError(f"{name} must be on the device of scores, expected {scores.device}, got {value.device}")
    return value


def check_generator(generator: object, scores: Tensor) -> None:
    """None, or a random number generator on the scores' kind of device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != scores.device.type:
        raise ValueError(f"generator must be on the device of scores, expected {scores.device}, got {generator.device}")


IGNORED, WRONG = -1, -2
"""What stands in the place of a row's class where it has none: its target is `ignore_index`, or no class at all."""


def check_targets(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, bool]:
    """The class of every row (rows,), IGNORED or WRONG; and whether all rows are known to have a class.

    On the CPU a wrong target raises. Elsewhere a look would wait for the device, so the caller makes such rows NaN.
    """
    target = target.to(torch.int64)
    if target.is_cpu and target.numel() and not 0 <= ignore_index < classes:
        low, high = map(int, target.aminmax())
        if low >= 0 and high < classes:
            return target, True
    ignored = target == ignore_index
    wrong = ((target < 0) | (target >= classes)) & ~ignored
    if target.is_cpu and bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target must hold class indices from 0 to {classes - 1} (or ignore_index, {ignore_index}), "
            f"got {int(target[row])} at position {row}"
        )
    return target.masked_fill(ignored, IGNORED).masked_fill(wrong, WRONG), False
