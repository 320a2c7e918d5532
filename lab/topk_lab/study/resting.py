"""Where a loss comes to rest over three classes, as a place in the triangle of probabilities (chapter 2)."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from topk_lab.study.calibration import corners, regrets
from topk_lab.study.contenders import Contender, expected
from topk_lab.study.descents import minimise

FAR = 30.0
"""Scores stay within -+ this: where a class is impossible, its score falls without end."""


def rest(contender: Contender, k: int, q: Tensor) -> tuple[Tensor, Tensor]:
    """softmax of the scores at the least expected loss (rows, 3), and whether their top-k set is a best one (rows,)."""
    scores = _best_corners(contender, k, q) if contender.search == "corners" else _descended(contender, k, q)
    return scores.softmax(1), regrets(scores, q, k) < 1e-6


def _best_corners(contender: Contender, k: int, q: Tensor) -> Tensor:
    """Exact; of several minima the one whose scores are closest together."""
    points = corners(3, k, contender.kinks(k), contender.mean_kinks)
    dealt = torch.cat([points[:, list(order)] for order in permutations(range(3))])
    dealt = dealt[(dealt.amax(1) - dealt.amin(1)).argsort(stable=True)]
    target = torch.arange(3).repeat(len(dealt))
    losses = contender.at(k)(dealt.repeat_interleave(3, 0), target).reshape(-1, 3)
    values = q @ losses.T
    least = values <= values.amin(1, keepdim=True) + 1e-9
    return dealt[least.to(torch.int8).argmax(1)]


def _descended(contender: Contender, k: int, q: Tensor) -> Tensor:
    loss = contender.at(k)

    def bounded(points: Tensor) -> Tensor:
        return FAR * torch.tanh(points / FAR)

    points, _ = minimise(lambda x, rows: expected(loss, bounded(x), q[rows]), q.clamp(min=1e-3).log(), 100)
    return bounded(points)
