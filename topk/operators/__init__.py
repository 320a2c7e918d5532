"""Soft top-k operators: from scores to a mask in [0, 1] that sums to k, differentiably."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from topk.arguments import check_choice
from topk.operators import threshold
from topk.operators.distribution import KSubset, subset_loss
from topk.operators.permutation import soft_permutation
from topk.operators.perturbed import noised_kth, perturbed_topk
from topk.operators.rows import as_rows, as_scores, check_k, check_scores, check_temperature, hard_mask, per_row
from topk.operators.subset import subset_mask

BACKENDS = (None, "torch", "triton")
METHODS = ("subset", "logistic", "sparse", "laplace", "gaussian", "fixed", "perturbed", "sort")

__all__ = ["KSubset", "noised_kth", "perturbed_topk", "soft_permutation", "soft_topk", "subset_loss"]


def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    *,
    method: str = "subset",
    temperature: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """A mask in [0, 1] that sums to k and tends to the indicator of the k largest scores as the temperature falls.

    ============================================  =====================================================================
    "subset"                                      Pr[i in S], S one of all k-subsets, likelier where scores are higher
    "logistic", "sparse", "laplace", "gaussian"   F((x - b) / temperature), b such that the mask sums to k
    "fixed"                                       logistic with b = (x_[k] + x_[k+1]) / 2: does **not** sum to k
    "perturbed"                                   Pr[i among the k largest after noise]; see ``perturbed_topk``
    "sort"                                        the first k ranks of ``soft_permutation``, summed: with the sorters
                                                  "neuralsort" and "softsort" above 1 in places
    ============================================  =====================================================================

    A score of -inf is never chosen; with at most k finite ones, all of those are. NaN and +inf make their own row NaN.
    Half types are computed in float32, and the mask rounded once into the scores' type.

    Args:
        scores: any shape and floating-point type.
        k: how many: an int from 1 to n. For the four methods in the second line also any number 0 < k <= n, or a
            tensor that broadcasts to the scores without ``dim``, 0 <= k <= n, with a gradient; its values are not
            looked at, and wrong ones make their row NaN.
        method: one of the names above.
        temperature: > 0, a number or (but for "sort") a tensor that broadcasts to the scores without ``dim``, with a
            gradient.
        hard: whether the value is the hard mask, of equal scores those that come first, with the soft mask's gradient.
        dim: where the elements are.
        backend: None (choose), "torch" or "triton", which serves "subset" and the four methods of the second line.
        **options: ``noise``, ``samples`` and ``generator`` of ``perturbed_topk``; ``distribution``, ``art_lambda``,
            ``iterations`` and ``tolerance`` of ``soft_permutation``, and as ``sorter`` its ``method``.
    """
    check_scores(scores, dim)
    check_choice("method", method, METHODS)
    check_k(k, scores.shape[dim], whole=method not in threshold.FAMILIES)
    check_temperature(temperature)
    known = _OPTIONS.get(method, ())
    for name in options:
        if name not in known:
            raise TypeError(f"{name} is no option of method={method!r}, expected {', '.join(known) or 'none'}")
    check_choice("backend", backend, BACKENDS)
    mask = _soft(scores, k, method, temperature, dim, backend, options)
    if not hard:
        return mask
    counts = per_row("k", k, scores, dim) if isinstance(k, Tensor) else k
    return as_scores(hard_mask(as_rows(scores, dim), counts), scores, dim) + (mask - mask.detach())


def _parameters(function: Any, *without: str) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name not in without)


_OPTIONS = {
    "perturbed": _parameters(perturbed_topk, "scores", "k", "temperature", "dim"),
    "sort": ("sorter", *_parameters(soft_permutation, "scores", "ranks", "temperature", "dim", "method")),
}


def _soft(
    scores: Tensor,
    k: float | Tensor,
    method: str,
    temperature: float | Tensor,
    dim: int,
    backend: str | None,
    options: dict[str, Any],
) -> Tensor:
    if backend == "triton" and method not in ("subset", *threshold.FAMILIES):
        raise RuntimeError(f"backend='triton' cannot run: method={method!r} has no Triton kernel")
    if method == "perturbed":
        return perturbed_topk(scores, int(k), temperature=temperature, dim=dim, **options)
    if method == "sort":
        options = {("method" if name == "sorter" else name): value for name, value in options.items()}
        if isinstance(temperature, Tensor):
            raise TypeError("temperature must be a number for method='sort', got a Tensor")
        ranks = soft_permutation(as_rows(scores, dim), ranks=int(k), temperature=temperature, **options)
        return as_scores(ranks.sum(1), scores, dim)
    rows, scale = as_rows(scores, dim), per_row("temperature", temperature, scores, dim)
    unit = not isinstance(temperature, Tensor) and temperature == 1
    if method == "subset":
        counts = torch.full_like(scale, int(k), dtype=torch.int64)
        mask = subset_mask(rows, counts, scale, int(k), backend, same=True, unit=unit)[0]
        return as_scores(mask, scores, dim)
    per_k = per_row("k", k, scores, dim) if isinstance(k, Tensor) else k
    return as_scores(threshold.threshold_mask(rows, per_k, scale, method, backend, unit), scores, dim)
