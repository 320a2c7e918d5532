"""How weights are moved: the learning rate of every step, the optimizer, the average of the weights (chapter 14)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Average", "learning_rate", "optimizer"]


def learning_rate(step: int, steps: int, settings: Mapping[str, Any]) -> float:
    """The learning rate of a step, 0 <= step < steps, where `steps` are those of the whole run.

    "constant" and "cosine" rise linearly during the warm-up; "one_cycle" rises from 1/25 and falls to 1e-5 of the
    peak, both along a cosine. A function of the step alone, so a resumed run needs no memory of it.
    """
    peak = float(settings["learning_rate"])
    warm: float = steps * settings["warmup"] / settings["epochs"]
    if settings["schedule"] == "one_cycle":
        warm = warm or 0.3 * steps
        low, share = (0.04, 1 - step / warm) if step < warm else (1e-5, (step - warm) / max(1.0, steps - warm))
        return peak * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    if settings["schedule"] == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm))) / 2


def optimizer(model: nn.Module, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """SGD or AdamW over the model; biases and the factors of normalisations do not decay."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = learned[0].device.type in ("cpu", "cuda")
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=settings["learning_rate"], momentum=settings["momentum"], fused=fused)
    return torch.optim.AdamW(groups, lr=settings["learning_rate"], fused=fused)


class Average:
    """The exponential moving average of a model's weights and statistics, itself a model: the one that is evaluated.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the first random weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves towards the model's weights of now."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = _tensors(self.model), _tensors(model)
        moving = [place for place, tensor in enumerate(mine) if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[place] for place in moving], [theirs[place] for place in moving], 1 - decay)
        for place in set(range(len(mine))) - set(moving):
            mine[place].copy_(theirs[place])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
