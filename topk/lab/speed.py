"""Short probes: which number type a CPU is faster in."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from topk.lab import cache
from topk.lab.provenance import hardware

__all__ = ["faster_in_bf16"]

_CLEARLY = 0.8  # of float32's time; less is not worth the digits
_HOPELESS = (5.0, 1.5)  # times float32's: in the first round, where both still set things up, and later
_ROUNDS = 3
_found: dict[str, bool] = {}


def faster_in_bf16(model: nn.Module, inputs: Tensor, name: str) -> bool:
    """Whether forward and backward take clearly less time under bf16 autocast, on the CPU.

    Both are timed in turns on a copy of the model and the fastest of two rounds counts, after one that sets things up;
    where bf16 is emulated (ten times slower on some machines) one round is enough to know. A machine measures a `name`
    once and keeps the answer in the cache's folder: runs that are compared must not differ in it by chance.
    """
    about = (name, tuple(inputs.shape), torch.get_num_threads(), torch.__version__, hardware()["cpu"])
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:20]
    if key not in _found:
        kept = cache.folder() / ".bf16" / key
        _found[key] = _answer(kept) if kept.exists() else _kept(kept, _measured(copy.deepcopy(model).train(), inputs))
    return _found[key]


def _answer(kept: Path) -> bool:
    return kept.read_text() == "faster"


def _kept(kept: Path, faster: bool) -> bool:
    """Keeps the answer, unless another process has: then that one holds. Where nothing can be written, for now only."""
    new = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        new.write_text("faster" if faster else "slower")
        with contextlib.suppress(FileExistsError):
            os.link(new, kept)
        new.unlink()
        return _answer(kept)
    except OSError:
        return faster


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
    """The processor's time: other programs on the machine do not count."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        scores: Tensor = trial(inputs)
    scores.float().square().mean().backward()
    return time.process_time() - began
