"""The losses of the experiments, by name and keywords, and the probe that tells when a record is stale (chapter 14).

    loss: {name: smooth, k: 5, tau: 1.0}
    loss: {name: smooth, k: {1: 0.5, 5: 0.5}}

Keywords are those of `topk`'s modules. Beside them: `margins: class` stands for `topk.class_margins` of the training
counts with the largest margin `max_margin`; `weight: balanced` weighs every class by rows / (classes * its rows).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import topk
from topk_lab.data import Array

TOLERANCE = 1e-5
"""By how much, relative to 1 or above, today's loss or gradient may differ from a record's probe."""
# What the loop decides, or what changes no number.
_NOT_SETTINGS = ("self", "size_average", "reduce", "reduction", "ignore_index", "generator", "backend", "log_prior")
_PROBE_ROWS, _DIGITS = 4, 9


class BalancedSoftmax(nn.Module):
    """Cross-entropy of x + log(rows of each class) (Ren et al. 2020): training prefers frequent classes, so that the
    scores alone need not (chapter 17).
    """

    weight: Tensor | None

    def __init__(self, log_prior: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.register_buffer("log_prior", log_prior)  # (classes,)
        self.register_buffer("weight", weight)

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Scores (rows, classes)."""
        return F.cross_entropy(scores + self.log_prior, target, self.weight, reduction=self.reduction)


LOSSES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "balanced_softmax": BalancedSoftmax,
    "smooth": topk.SmoothTopKLoss,
    "transition": topk.TransitionTopKLoss,
    "noised": topk.NoisedTopKLoss,
    "differentiable": topk.DifferentiableTopKLoss,
    "hinge": topk.TopKHingeLoss,
    "ldam": topk.LDAMLoss,
    "focal": topk.FocalLoss,
}


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All keywords of a loss with their defaults, as JSON has them; unknown names and keywords are refused."""
    name = settings.get("name")
    if name not in LOSSES:
        raise ValueError(f"loss.name must be one of {', '.join(LOSSES)}, got {name!r}")
    full: dict[str, Any] = {"name": name}
    for parameter in inspect.signature(LOSSES[name]).parameters.values():
        if parameter.name not in _NOT_SETTINGS:
            full[parameter.name] = None if parameter.default is parameter.empty else parameter.default
    if name == "ldam":
        full["margins"] = "class"
    if settings.get("margins", full.get("margins")) == "class":
        full["max_margin"] = 0.5
    unknown = sorted(set(settings) - set(full))
    if unknown:
        raise ValueError(f"loss {name!r} has no keyword {unknown[0]!r}; it has {', '.join(full)}")
    full |= settings
    if isinstance(full.get("k"), Mapping):
        full["k"] = {int(k): float(full["k"][k]) for k in sorted(full["k"], key=int)}
    return full


def build(
    settings: Mapping[str, Any],
    counts: Array,
    *,
    generator: torch.Generator | None = None,
    reduction: str = "sum",
) -> nn.Module:
    """The loss as a module.

    Args:
        settings: see `complete`.
        counts: training rows of each class.
        generator: where the noised loss draws from; on the device of the scores.
        reduction: "sum", "mean" or "none".
    """
    full = complete(settings)
    name, rows = full.pop("name"), torch.as_tensor(counts).double().clamp(min=1)
    if isinstance(full.get("margins"), str):
        if full["margins"] != "class":
            raise ValueError(f"loss.margins must be 'class', a number or a list, got {full['margins']!r}")
        full["margins"] = topk.class_margins(rows.float(), full.pop("max_margin"))
    for key in ("weight", "margins"):
        if isinstance(full.get(key), list | tuple):
            full[key] = torch.tensor(full[key], dtype=torch.float32)
    if isinstance(full["weight"], str):
        if full["weight"] != "balanced":
            raise ValueError(f"loss.weight must be 'balanced', a list or null, got {full['weight']!r}")
        full["weight"] = (rows.sum() / (len(rows) * rows)).float()
    if name == "noised":
        full["generator"] = generator
    if name == "balanced_softmax":
        full["log_prior"] = (rows / rows.sum()).log().float()
    return LOSSES[name](**full, reduction=reduction)


# --- the probe ---


def probe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and gradient on four rows of float64 scores whose right classes rank first, second, sixth and among the
    last, with class counts of a long tail, and a generator that starts from 0.
    """
    classes = _classes(settings)
    scores, target = _rows(classes)
    counts = np.ceil(500 * 0.01 ** (np.arange(classes) / (classes - 1))).astype(np.int64)
    module = build(settings, counts, generator=torch.Generator().manual_seed(0), reduction="mean").double()
    scores.requires_grad_()
    value = module(scores, target)
    (gradient,) = torch.autograd.grad(value, scores)
    return {"loss": round(value.item(), _DIGITS), "gradient": [round(x, _DIGITS) for x in gradient.flatten().tolist()]}


def _classes(settings: Mapping[str, Any]) -> int:
    """Room for every k of the loss; exactly as many as it has weights or margins where it lists them."""
    for name in ("weight", "margins"):
        if isinstance(settings.get(name), list | tuple):
            return len(settings[name])
    k = settings.get("k") or 1
    return max(24, (max(map(int, k)) if isinstance(k, Mapping) else int(k)) + 4)


def _rows(classes: int) -> tuple[Tensor, Tensor]:
    """Scores without ties or random numbers, so that every version of torch has the same."""
    position = torch.arange(_PROBE_ROWS * classes, dtype=torch.float64).reshape(_PROBE_ROWS, classes)
    scores = 3 * torch.sin(1.7 * position + 0.01 * position**2)
    order = scores.argsort(1, descending=True)
    ranks = torch.tensor([0, 1, 5, classes - 3]).clamp(0, classes - 1)
    return scores, order.gather(1, ranks[:, None])[:, 0]


def stale(frame: pd.DataFrame) -> dict[str, str]:
    """{key: why} of the records whose loss is no longer computed as it was when they were made."""
    found = {}
    for row in frame[frame["probe.loss"].notna()].itertuples() if "probe.loss" in frame else ():
        record = row._asdict() if False else frame.loc[row.Index]
        loss = json.loads(record["config"])["loss"]
        reason = _difference(loss, record["probe.loss"], record["probe.gradient"])
        if reason:
            found[str(record["key"])] = reason
    return found


def _difference(loss: Mapping[str, Any], value: float, gradient: Array) -> str | None:
    try:
        today = _probe_of(json.dumps(loss, sort_keys=True))
    except (TypeError, ValueError) as error:
        return f"today's loss refuses its settings: {error}"
    now = np.array([today["loss"], *today["gradient"]])
    then = np.array([value, *gradient])
    if now.shape != then.shape:
        return f"its probe has {len(then)} numbers, today's {len(now)}"
    apart = float((np.abs(now - then) / np.maximum(1, np.abs(then))).max())
    return f"on the probe its loss or gradient differs by {apart:.2g}" if apart > TOLERANCE else None


@cache
def _probe_of(loss: str) -> dict[str, Any]:
    return probe(json.loads(loss))
