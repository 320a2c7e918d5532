"""Short probes: which number type a CPU is faster in."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

__all__ = ["faster_in_bf16"]

_CLEARLY = 0.8  # of float32's time; less is not worth the digits
_HOPELESS = (5.0, 1.5)  # times float32's: in the first round, where both still set things up, and later
_ROUNDS = 3
_found: dict[str, bool] = {}


def faster_in_bf16(model: nn.Module, inputs: Tensor, name: str) -> bool:
    """Whether forward and backward take clearly less time under bf16 autocast, on the device of the inputs.

    Both are timed in turns on a copy of the model and the fastest of two rounds counts, after one that sets things up;
    where bf16 is emulated (ten times slower on some machines) one round is enough to know. A process measures once a
    `name`, so that runs of one model agree.
    """
    name = f"{name} {tuple(inputs.shape)} {torch.get_num_threads()}"
    if name not in _found:
        _found[name] = _measured(copy.deepcopy(model).train(), inputs)
    return _found[name]


def _measured(trial: nn.Module, inputs: Tensor) -> bool:
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(_ROUNDS):
        for bf16, taken in times.items():
            taken.append(_seconds(trial, inputs, bf16))
        float32, half = (min(taken[1:] or taken) for taken in times.values())
        if half > _HOPELESS[number > 0] * float32:
            return False
    return half < _CLEARLY * float32


def _seconds(trial: nn.Module, inputs: Tensor, bf16: bool) -> float:
    began = time.perf_counter()
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        scores: Tensor = trial(inputs)
    scores.float().square().mean().backward()
    return time.perf_counter() - began
