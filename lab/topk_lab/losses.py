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
from topk_lab.records import rows_of

TOLERANCE = 1e-5
"""By how much, relative to 1 or above, today's loss or gradient may differ from a record's probe."""
# What the loop decides, or what changes no number.
_NOT_SETTINGS = ("self", "size_average", "reduce", "reduction", "ignore_index", "generator", "backend", "log_prior")


class BalancedSoftmax(nn.Module):
    """Cross-entropy of x + log(share of each class) (Ren et al. 2020): what training prefers, x need not (ch. 17)."""

    log_prior: Tensor  # (classes,)
    weight: Tensor | None

    def __init__(self, log_prior: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> None:
        super().__init__()
        self.register_buffer("log_prior", log_prior)
        self.register_buffer("weight", weight)
        self.reduction = reduction

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
    "autkc": topk.AUTKCLoss,
    "ldr": topk.LDRLoss,
    "softmax_at_k": topk.SoftmaxAtKLoss,
    "focal": topk.FocalLoss,
}


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All keywords of a loss with their defaults; unknown names and keywords are refused."""
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
    settings: Mapping[str, Any], counts: Array, *, generator: torch.Generator | None = None, reduction: str = "sum"
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
    known = {"margins": "class", "weight": "balanced"}
    for key, word in known.items():
        if isinstance(full.get(key), str) and full[key] != word:
            raise ValueError(f"loss.{key} must be {word!r}, a list or null, got {full[key]!r}")
        if isinstance(full.get(key), list | tuple):
            full[key] = torch.tensor(full[key], dtype=torch.float32)
    if isinstance(full.get("margins"), str):
        full["margins"] = topk.class_margins(rows.float(), full.pop("max_margin"))
    if isinstance(full["weight"], str):
        full["weight"] = (rows.sum() / (len(rows) * rows)).float()
    own: dict[str, dict[str, Any]] = {
        "noised": {"generator": generator},
        "balanced_softmax": {"log_prior": (rows / rows.sum()).log().float()},
    }
    return LOSSES[name](**full, **own.get(name, {}), reduction=reduction)


# --- the probe ---


def probe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and gradient on four rows of float64 scores whose right classes rank first, second, sixth and among the
    last, with class counts of a long tail, and a generator that starts from 0.
    """
    k = settings.get("k") or 1
    listed = [len(settings[x]) for x in ("weight", "margins") if isinstance(settings.get(x), list | tuple)]
    classes = listed[0] if listed else max(24, (max(map(int, k)) if isinstance(k, Mapping) else int(k)) + 4)
    position = torch.arange(4 * classes, dtype=torch.float64).reshape(4, classes)
    scores = 3 * torch.sin(1.7 * position + 0.01 * position**2)  # no ties, and the same in every version of torch
    ranks = torch.tensor([0, 1, 5, classes - 3]).clamp(0, classes - 1)
    target = scores.argsort(1, descending=True).gather(1, ranks[:, None])[:, 0]
    counts = np.ceil(500 * 0.01 ** (np.arange(classes) / (classes - 1))).astype(np.int64)
    module = build(settings, counts, generator=torch.Generator().manual_seed(0), reduction="mean").double()
    scores.requires_grad_()
    value = module(scores, target)
    (gradient,) = torch.autograd.grad(value, scores)
    return {"loss": round(value.item(), 9), "gradient": [round(x, 9) for x in gradient.flatten().tolist()]}


def stale(frame: pd.DataFrame) -> dict[str, str]:
    """{key: why} of the records whose loss is no longer computed as it was when they were made."""
    found: dict[str, str] = {}
    for row in rows_of(frame[[name for name in ("key", "config", "probe.loss", "probe.gradient") if name in frame]]):
        if "probe.loss" not in row:  # a chapter that is its own experiment
            continue
        then = np.array([row["probe.loss"], *row["probe.gradient"]])
        try:
            today = _probe_of(json.dumps(json.loads(row["config"])["loss"], sort_keys=True))
        except (TypeError, ValueError) as error:
            found[row["key"]] = f"today's loss refuses its settings: {error}"
            continue
        apart = float((np.abs(today - then) / np.maximum(1, np.abs(then))).max()) if len(today) == len(then) else np.inf
        if apart > TOLERANCE:
            found[row["key"]] = f"on the probe its loss or gradient differs by {apart:.2g}"
    return found


@cache
def _probe_of(loss: str) -> Array:
    found = probe(json.loads(loss))
    return np.array([found["loss"], *found["gradient"]])
