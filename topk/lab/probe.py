"""A loss and its gradient on fixed scores: what a record keeps to show that today's code still computes its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-5
_ROWS = 4
_DIGITS = 9


def probe(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Loss and gradient of a configuration's loss on the probe; None where the configuration names no loss.

    The probe: four rows of float64 scores whose right classes rank first, second, sixth and among the last, class
    counts of a long tail, and for a loss that draws random numbers a generator that starts from 0.
    """
    loss = config.get("loss", config.get("parameters", {}).get("loss"))
    if not isinstance(loss, Mapping):
        return None
    from topk.lab import objectives

    classes = _classes(loss)
    scores, target = _rows(classes)
    counts = np.ceil(500 * 0.01 ** (np.arange(classes) / (classes - 1))).astype(np.int64)
    module = objectives.build(loss, counts, generator=torch.Generator().manual_seed(0), reduction="mean").double()
    scores.requires_grad_()
    value = module(scores, target)
    (gradient,) = torch.autograd.grad(value, scores)
    return {"loss": round(value.item(), _DIGITS), "gradient": [round(x, _DIGITS) for x in gradient.flatten().tolist()]}


def _classes(loss: Mapping[str, Any]) -> int:
    """Room for every k of the loss; exactly as many as it has weights or margins where it lists them."""
    for name in ("weight", "margins"):
        if isinstance(loss.get(name), list | tuple):
            return len(loss[name])
    k = loss.get("k")
    largest = max(map(int, k)) if isinstance(k, Mapping) else int(k or 1)
    return max(24, largest + 4)


def _rows(classes: int) -> tuple[Tensor, Tensor]:
    """Scores without ties or random numbers, so that every version of torch has the same."""
    position = torch.arange(_ROWS * classes, dtype=torch.float64).reshape(_ROWS, classes)
    scores = 3 * torch.sin(1.7 * position + 0.01 * position**2)
    order = scores.argsort(1, descending=True)
    ranks = torch.tensor([0, 1, 5, classes - 3]).clamp(0, classes - 1)
    return scores, order.gather(1, ranks[:, None])[:, 0]


def difference(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str | None:
    """How two probes differ by more than the tolerance, or None."""
    if one is None or other is None:
        return None if one is other else "only one of them has a probe"
    if len(one["gradient"]) != len(other["gradient"]):
        return "the probes have different sizes"
    loss = abs(one["loss"] - other["loss"])
    gradient = max((abs(a - b) for a, b in zip(one["gradient"], other["gradient"], strict=True)), default=0.0)
    if max(loss, gradient) <= TOLERANCE:
        return None
    return f"on the probe the loss differs by {loss:.2g}, its gradient by {gradient:.2g}"


def why_stale(record: Mapping[str, Any]) -> str | None:
    """Why the record no longer tells what today's code would compute, or None."""
    reason = difference(record["probe"], probe(record["config"]))
    return f"stale: {reason}" if reason else None
