"""The kernels' tests, written once for all losses: cases to run, and the comparison with the torch path.

A kernel is compared with the torch path in float64 on the same rounded scores. A loss joins the tests of `make test`
by a file that calls `compare` and `compare_special_rows`, and those that need a GPU by its lines in `GPU_CASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import topk

TYPES = (torch.float32, torch.float16, torch.bfloat16)

LOSS_TOLERANCE = (2e-6, 2e-6)
"""Relative and absolute, for losses: a dozen roundings in float32, and sums of exponentials of up to n terms."""

GRADIENT_TOLERANCE = {
    torch.float32: (2e-6, 1e-6),  # absolute against a largest slope of order 1
    torch.float16: (1.01 * 2.0**-11, 1e-6),  # the one rounding of the result; then float32 as above
    torch.bfloat16: (
        1.01 * (2.0**-8 if torch.cuda.is_available() else 2.0**-7),
        1e-6,
    ),  # the interpreter cuts digits off
}

GPU_CASES: dict[str, tuple[Callable[..., Tensor], tuple[Mapping[str, Any], ...]]] = {
    "smooth": (
        topk.smooth_topk_loss,
        ({}, {"k": 50}, {"k": {1: 0.5, 20: 0.5}, "tau": 0.5}, {"k": 9, "tau": 0.05, "margin": 0.0}),
    ),
    "transition": (
        topk.transition_topk_loss,
        ({}, {"k": {1: 0.5, 5: 0.5}, "label_smoothing": 0.1}, {"k": 50, "transition": 0.3}),
    ),
    "noised": (
        topk.noised_topk_loss,
        ({"epsilon": 0.0}, {"epsilon": 0.0, "k": {1: 0.5, 50: 0.5}, "margins": 2.0, "scale": 3.0}),
    ),
    "differentiable": (
        topk.differentiable_topk_loss,
        (
            {},
            {"k": {1: 0.5, 5: 0.5}, "method": "bitonic", "distribution": "logistic_phi"},
            {"method": "splitter_selection", "distribution": "gaussian"},
            {"k": {1: 0.2, 5: 0.8}, "top1": "cross_entropy", "cross_entropy_over": "all"},
            {"method": "softsort"},
        ),
    ),
    "hinge": (
        topk.topk_hinge_loss,
        (
            {},
            {"variant": "kth", "k": 50},
            {"variant": "alpha"},
            {"variant": "beta", "k": {1: 0.5, 5: 0.5}},
            {"variant": "smooth_limit"},
            {"variant": "entropy", "k": {1: 0.5, 20: 0.5}},
        ),
    ),
}
"""By loss: the public function and the keywords to try; the losses must not depend on random draws."""


def random_scores(rows: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(rows, classes)).to(dtype)


def losses_and_gradient(
    function: Callable[..., Tensor], scores: Tensor, target: Tensor, grad: Tensor, backend: str | None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """The losses of all rows and the gradient of sum(grad * loss)."""
    leaf = scores.detach().requires_grad_()  # keeps the strides
    losses = function(leaf, target, reduction="none", backend=backend, **keywords)
    (gradient,) = torch.autograd.grad(losses, leaf, grad.to(losses.dtype))
    return losses.detach(), gradient


def compare(
    function: Callable[..., Tensor],
    scores: Tensor,
    target: Tensor,
    grad: Tensor | None = None,
    backend: str = "triton",
    ignore_index: int = -100,
    tolerance: float = 1.0,
    **keywords: Any,
) -> None:
    """Kernel against the float64 torch path; wrong targets, which the CPU refuses there, must give NaN.

    `tolerance` multiplies the tables above, for a loss whose own size calls for it.
    """
    rows, classes = scores.shape
    grad = torch.randn(rows, device=scores.device) if grad is None else grad
    keywords = {"ignore_index": ignore_index, **keywords}
    ours = losses_and_gradient(function, scores, target, grad, backend, **keywords)
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    right = torch.where(wrong, ignore_index, target)
    losses, gradient = losses_and_gradient(function, scores.double(), right, grad.double(), "torch", **keywords)
    losses, gradient = losses.masked_fill(wrong, torch.nan), gradient.masked_fill(wrong[:, None], torch.nan)
    # Within a row of NaN it is open whether a masked class has 0 or NaN.
    open_ = losses.isnan()[:, None] & (scores == -torch.inf) & ~wrong[:, None]
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == scores.dtype
    relative, absolute = (tolerance * t for t in LOSS_TOLERANCE)
    torch.testing.assert_close(ours[0].double(), losses, rtol=relative, atol=absolute, equal_nan=True)
    relative, absolute = GRADIENT_TOLERANCE[scores.dtype]
    torch.testing.assert_close(
        ours[1].double().masked_fill(open_, 0.0),
        gradient.masked_fill(open_, 0.0),
        rtol=max(relative, tolerance * GRADIENT_TOLERANCE[torch.float32][0]),
        atol=tolerance * absolute * max(1.0, float(grad.abs().max()) if rows else 1.0),
        equal_nan=True,
    )


def special_rows(classes: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A row for every special case that all losses promise to treat, and the targets."""
    usual = random_scores(16, classes, torch.float32)
    target = torch.randint(classes, (16,))
    usual[0, 1] = torch.nan
    usual[1, 2] = torch.inf
    usual[2, target[2]] = torch.nan
    usual[3, target[3]] = torch.inf
    usual[4, 3:] = -torch.inf  # hardly a possible class
    usual[4, target[4]] = 0.25
    usual[5, target[5]] = -torch.inf
    usual[6] = -torch.inf
    usual[7] = 0.5  # all tied
    usual[8] = torch.randint(3, (classes,)).float() - 1.0
    usual[9] *= 1000.0
    target[10] = -100
    target[11], usual[11, 0] = -100, torch.nan
    target[12], target[13] = classes, -7
    usual[14] = torch.where(torch.rand(classes) < 0.5, 0.0, -0.0)
    usual[15, :: max(1, classes // 4)] = -torch.inf
    usual[15, target[15]] = 1.0
    return usual.to(dtype).to(device), target.to(device)


def compare_special_rows(function: Callable[..., Tensor], classes: int, dtype: torch.dtype, **keywords: Any) -> None:
    """`compare` on `special_rows`."""
    scores, target = special_rows(classes, dtype)
    compare(function, scores, target, **keywords)


def mask_and_gradient(scores: Tensor, k: Any, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """An operator's mask, and the gradient of sum(weight * mask)."""
    leaf = scores.detach().requires_grad_()
    mask = topk.soft_topk(leaf, k, **options)
    (gradient,) = torch.autograd.grad(mask, leaf, weight.to(mask.dtype))
    return mask.detach(), gradient
