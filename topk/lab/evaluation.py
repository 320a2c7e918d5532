"""What is measured of a classifier after every epoch, streamed over batches and summed exactly over processes (ch. 14).

All accuracies come from integer counts (`topk.metrics.TopKMeter`), so how rows are split over batches and processes
does not matter. Averages of real numbers are sums in float64 divided once, never averages of averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from topk.metrics import TopKMeter, ranks, shot_groups

__all__ = ["BINS", "COVERAGES", "KS", "Evaluation"]

KS = (1, 2, 3, 5, 10, 20, 50, 100)
"""The numbers of guesses that get a column of their own, as far as there are so many classes."""
COVERAGES = (90, 95, 99)
"""Per cent of the rows for which the number of candidates needed is told."""
BINS = 15
"""Of the confidences, for the calibration error."""


class Evaluation:
    """Counts over a split; `summary` turns them into numbers.

    Args:
        counts: training rows a class, which make the groups many (> 100), medium and few (< 20).
        scale: what scores are multiplied by before the softmax of the likelihood and the confidences: the loss's own
            factor where scores are cosines, else 1.
        device: where the scores will be.
    """

    def __init__(self, counts: NDArray[np.int64], scale: float, device: torch.device) -> None:
        classes = len(counts)
        self.groups = shot_groups([int(count) for count in counts])
        self.scale = scale
        self.meter = TopKMeter(classes, [k for k in KS if k <= classes], device=device)
        # Sums of: the negative log-likelihood; then for every bin its rows, its hits and its confidences.
        self.sums = torch.zeros(1 + 3 * BINS, dtype=torch.float64, device=device)

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Counts a batch of float32 scores."""
        self.meter.update(scores, labels)
        scores = scores * self.scale
        self.sums[0] += F.cross_entropy(scores, labels, reduction="none").double().sum()
        confidence = scores.softmax(1).amax(1).double().nan_to_num()
        hit = (ranks(scores, labels) == 1).double()
        place = (confidence * BINS).long().clamp(max=BINS - 1)
        for row, value in enumerate((torch.ones_like(hit), hit, confidence)):
            self.sums[1 + row * BINS :][:BINS].index_add_(0, place, value)

    def reduce(self, add: Callable[[Tensor], Tensor]) -> Evaluation:
        """Sums over the processes, `add` being the sum of a tensor over them; returns itself."""
        self.meter = self.meter.reduce()
        self.sums = add(self.sums)
        return self

    def summary(self, curve: int | None = None) -> dict[str, Any]:
        """Plain numbers; what is undefined or infinite is None.

        ``top<k>``, ``macro_top<k>`` (average over classes), ``many_top<k>``, ``medium_top<k>``, ``few_top<k>`` (the
        rows of those classes; only groups that exist), ``candidates_<per cent>``, ``nll``, ``ece`` (15 equally wide
        bins, confidence of the first guess), ``rows``, and ``curve``: the accuracies for k = 1, 2, ... up to `curve`.
        """
        meter = self.meter.to("cpu")
        rows = meter.rows
        total, bins = self.sums[0].item(), self.sums[1:].view(3, BINS).cpu()
        result: dict[str, Any] = {"rows": rows}
        result |= _columns("top", meter.accuracy()) | _columns("macro_top", meter.macro())
        for group, accuracies in meter.by_group(self.groups).items():
            result |= _columns(f"{group}_top", accuracies)
        result |= {f"candidates_{share}": meter.candidates(share / 100) for share in COVERAGES}
        result["nll"] = _number(total / rows)
        result["ece"] = _number(float((bins[1] - bins[2]).abs().sum()) / rows)
        result["curve"] = meter.curve()[:curve].tolist()
        return result


def _columns(prefix: str, accuracies: dict[int, Tensor]) -> dict[str, float | None]:
    return {f"{prefix}{k}": _number(float(value)) for k, value in accuracies.items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
