"""Polynomials whose coefficients run along the first axis: how many of many independent trials succeed (chapter 10)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def product(left: Tensor, right: Tensor) -> Tensor:
    """Product of polynomials, truncated to the length of `right`."""
    result = left[:1] * right
    for i in range(1, min(left.shape[0], right.shape[0])):
        result[i:].addcmul_(left[i : i + 1], right[:-i])
    return result


LANES = 2**13
"""Polynomials that the CPU advances together by one step of a recursion."""


def lanes_for(rows: int, classes: int, k: int) -> int:
    """In how many lanes to deal the classes of a row: enough work for a call, but long lanes."""
    return min(max(1, LANES // rows), max(1, classes // (4 * k)))


def success_counts(trials: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Pr[S = j], j = 0..k (k + 1, rows), with S the successes of all trials (steps, lanes, rows) of a row.

    A recursion over the steps of every lane, then truncated products of the lanes: only positive numbers are added.
    """
    _, lanes, rows = trials.shape
    now = trials.new_zeros((k + 2, lanes, rows))  # one row of zeros above Pr[S = 0]
    now[1] = 1.0
    then = torch.zeros_like(now)
    for trial in trials.unbind(0):
        torch.lerp(now[1:], now[:-1], trial, out=then[1:])
        now, then = then, now
    merged = now[1:].to(dtype)
    while merged.shape[1] > 1:
        half = merged.shape[1] // 2
        pairs = product(merged[:, :half], merged[:, half : 2 * half])
        merged = torch.cat((pairs, merged[:, 2 * half :]), 1)
    return merged[:, 0]


def tree(factors: Tensor, k: int) -> Tensor:
    """Product over the last axis of polynomials, kept to degree k, in steps that torch can differentiate twice."""
    while factors.shape[-1] > 1:
        length, half = factors.shape[0], factors.shape[-1] // 2
        left, right, rest = factors[..., :half], factors[..., half : 2 * half], factors[..., 2 * half :]
        degree = min(2 * (length - 1), k)
        flat = (0,) * (2 * (factors.dim() - 1))
        shifted = [
            pad(left[i] * right[: degree + 1 - i], (*flat, i, max(0, degree + 1 - i - length)))
            for i in range(min(length, degree + 1))
        ]
        factors = torch.stack(shifted).sum(0)
        if rest.shape[-1] > 0:
            factors = torch.cat((factors, pad(rest, (*flat, 0, degree + 1 - length))), -1)
    result = factors[..., 0]
    return pad(result, (*(0,) * (2 * (result.dim() - 1)), 0, k + 1 - result.shape[0]))
