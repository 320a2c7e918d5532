"""The losses of the experiments, by name and keywords: those of `topk` and cross-entropy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import topk
from topk.arguments import check_k
from topk.lab.settings import check_name, completed

__all__ = ["LOSSES", "build", "complete", "scale_of"]

LOSSES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "smooth": topk.SmoothTopKLoss,
    "transition": topk.TransitionTopKLoss,
    "noised": topk.NoisedTopKLoss,
    "differentiable": topk.DifferentiableTopKLoss,
    "hinge": topk.TopKHingeLoss,
    "ldam": topk.LDAMLoss,
    "focal": topk.FocalLoss,
}
# What the loop decides, or what changes no number.
_NOT_SETTINGS = ("self", "size_average", "reduce", "reduction", "ignore_index", "generator", "backend")


def complete(settings: Mapping[str, Any], label_smoothing: float = 0.0) -> dict[str, Any]:
    """All keywords of a loss, defaults filled in; unknown names and keywords are refused.

    Beside the loss's own keywords: margins="class" stands for `topk.class_margins` of the training counts with the
    largest margin `max_margin` (ldam, noised); weight="balanced" weighs every class by rows / (classes * its rows), a
    list gives the weights themselves. `k` is a number or a mapping to weights; its keys may be text, as JSON has them.

    Args:
        settings: {"name": one of `LOSSES`, ...keywords}.
        label_smoothing: the value for the losses that have this keyword where `settings` has none; others refuse any
            but 0.
    """
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise ValueError(f"loss must be a mapping with a name, got {settings!r}")
    name = check_name("loss.name", settings["name"], LOSSES)
    signature = inspect.signature(LOSSES[name]).parameters.values()
    defaults: dict[str, Any] = {"name": name}
    for parameter in signature:
        if parameter.name not in _NOT_SETTINGS:
            defaults[parameter.name] = None if parameter.default is parameter.empty else parameter.default
    if "label_smoothing" in defaults:
        defaults["label_smoothing"] = float(label_smoothing)
    elif label_smoothing:
        raise ValueError(
            f"training.label_smoothing must be 0 for loss {name!r}, which has none, got {label_smoothing!r}"
        )
    if name == "ldam":
        defaults["margins"] = "class"
    if "margins" in defaults and settings.get("margins", defaults["margins"]) == "class":
        defaults["max_margin"] = 0.5
    # Keywords that take values of several types: their own modules check them.
    several = {key: defaults[key] for key in ("k", "transition", "margins", "samples") if key in defaults}
    full = completed("loss", defaults | dict.fromkeys(several), settings)
    full |= {key: settings.get(key, default) for key, default in several.items()}
    if isinstance(full.get("k"), Mapping):
        full["k"] = {
            str(int(k)): float(weight) for k, weight in sorted(full["k"].items(), key=lambda item: int(item[0]))
        }
    return full


def build(
    settings: Mapping[str, Any],
    counts: NDArray[np.int64],
    *,
    generator: torch.Generator | None = None,
    reduction: str = "sum",
) -> nn.Module:
    """The loss as a module.

    Args:
        settings: see `complete`.
        counts: training rows a class.
        generator: where the noised loss draws from; on the device of the scores.
        reduction: "sum", "mean" or "none".
    """
    full = complete(settings)
    name = full.pop("name")
    if isinstance(full.get("k"), Mapping):
        full["k"] = {int(k): weight for k, weight in full["k"].items()}
    if "k" in full and max(check_k(full["k"])[0]) > len(counts):
        raise ValueError(f"loss.k must be at most the number of classes, {len(counts)}, got {full['k']!r}")
    if isinstance(full.get("margins"), str):
        check_name("loss.margins", full["margins"], ("class",))
        full["margins"] = topk.class_margins(torch.as_tensor(counts).float().clamp(min=1), full.pop("max_margin"))
    elif isinstance(full.get("margins"), list | tuple):
        full["margins"] = torch.tensor(full["margins"], dtype=torch.float32)
    full["weight"] = _weights(full["weight"], counts)
    if name == "noised":
        full["generator"] = generator
    return LOSSES[name](**full, reduction=reduction)


def scale_of(loss: nn.Module) -> float:
    """What the loss multiplies scores by before they are compared with a softmax: 1 but for the cosine losses."""
    scale = getattr(loss, "scale", 1.0)
    return float(scale)


def _weights(weight: Any, counts: NDArray[np.int64]) -> Tensor | None:
    if weight is None:
        return None
    if isinstance(weight, str):
        check_name("loss.weight", weight, ("balanced",))
        rows = torch.as_tensor(counts).double().clamp(min=1)
        return (rows.sum() / (len(rows) * rows)).float()
    return torch.tensor(weight, dtype=torch.float32)
