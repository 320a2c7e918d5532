"""The losses that keep the contract, in one table: `test_contract.py` has one test for every promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topk

CLASSES = 13


@dataclass(frozen=True)
class Case:
    function: Callable[..., Tensor]
    module: type[nn.Module]
    keywords: dict[str, Any] = field(default_factory=dict)
    kinked: bool = False  # piecewise linear: second derivatives are zero
    precision: float = 1e-7  # of values that an iteration approaches

    def __call__(self, scores: Tensor, target: Tensor, **keywords: Any) -> Tensor:
        return self.function(scores, target, **{**self.keywords, **keywords})


def _cases() -> dict[str, Case]:
    smooth = (topk.smooth_topk_loss, topk.SmoothTopKLoss)
    transition = (topk.transition_topk_loss, topk.TransitionTopKLoss)
    noised = (topk.noised_topk_loss, topk.NoisedTopKLoss)
    differentiable = (topk.differentiable_topk_loss, topk.DifferentiableTopKLoss)
    hinge = (topk.topk_hinge_loss, topk.TopKHingeLoss)
    many = {1: 0.25, 3: 0.25, 10: 0.5}
    cases = {
        "smooth": Case(*smooth, {"k": 3}),
        "smooth, large k": Case(*smooth, {"k": 10, "tau": 0.5}),
        "smooth, many k": Case(*smooth, {"k": many}),
        "transition": Case(*transition, {"k": 3}),
        "transition, fixed": Case(*transition, {"k": 3, "transition": 0.5, "label_smoothing": 0.1}),
        "transition, many k": Case(*transition, {"k": many}),
        "noised, exact": Case(*noised, {"k": 3, "samples": None}),
        "noised, exact, many k": Case(*noised, {"k": many, "samples": None, "margins": 0.3, "scale": 4.0}),
        "ldam": Case(topk.ldam_loss, topk.LDAMLoss, {"margins": 0.3, "scale": 2.0}),
        "focal": Case(topk.focal_loss, topk.FocalLoss),
    }
    for method in ("odd_even", "bitonic", "splitter_selection", "neuralsort", "softsort", "sinkhorn"):
        precision = 1e-5 if method == "sinkhorn" else 1e-7
        cases[method] = Case(*differentiable, {"k": 3, "m": 6, "method": method}, precision=precision)
    cases["odd_even, many k"] = Case(*differentiable, {"k": {1: 0.2, 3: 0.3, 5: 0.5}, "m": 8})
    cases["odd_even, all classes"] = Case(*differentiable, {"k": 3, "m": 16, "top1": "cross_entropy"})
    for variant in ("calibrated", "kth", "alpha", "beta", "smooth_limit", "entropy"):
        cases[f"hinge, {variant}"] = Case(*hinge, {"k": 3, "variant": variant}, kinked=variant != "entropy")
    for variant in ("topk_entropy", "alpha_smooth", "beta_smooth", "polyhedral", "polyhedral_smooth"):
        options = {"k": 3, "variant": variant, "smoothing": 10.0}  # so that several classes share p
        cases[f"hinge, {variant}"] = Case(*hinge, options, kinked=variant == "polyhedral")
    cases["hinge, alpha_smooth, many k"] = Case(*hinge, {"k": many, "variant": "alpha_smooth", "smoothing": 10.0})
    ranking = {"autkc": Case(topk.autkc_loss, topk.AUTKCLoss, {"k": 3})}
    for surrogate in ("logistic", "square", "hinge"):
        case = Case(topk.autkc_loss, topk.AUTKCLoss, {"k": many, "surrogate": surrogate}, kinked=surrogate == "hinge")
        ranking[f"autkc, {surrogate}, many k"] = case
    ranking["ldr"] = Case(topk.ldr_loss, topk.LDRLoss, {"temperature": 0.7})
    ranking["ldr, adaptive"] = Case(topk.ldr_loss, topk.LDRLoss, {"alpha": 2.0}, precision=1e-6)
    softmax_at_k = (topk.softmax_at_k_loss, topk.SoftmaxAtKLoss)
    ranking["softmax_at_k"] = Case(*softmax_at_k, {"k": 3})
    ranking["softmax_at_k, many k"] = Case(*softmax_at_k, {"k": many, "temperature": 0.5, "weight_temperature": 2.0})
    return {**cases, **ranking}


CASES = _cases()
NOISE = Case(topk.noised_topk_loss, topk.NoisedTopKLoss, {"k": 3, "samples": 4})  # two calls give two numbers
ALL = {**CASES, "noised": NOISE}
FUNCTIONS: dict[str, list[Case]] = {}
"""The cases of every public function."""
for _case in ALL.values():
    FUNCTIONS.setdefault(_case.function.__name__, []).append(_case)


def _each(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", [*cases.values()], ids=[*cases])


every_loss = _each(CASES)
every_loss_and_noise = _each(ALL)
every_loss_with_k = _each({name: case for name, case in ALL.items() if "k" in case.keywords})
every_function = _each({name: cases[0] for name, cases in FUNCTIONS.items()})
every_function_with_k = _each({name: cases[0] for name, cases in FUNCTIONS.items() if "k" in cases[0].keywords})
every_table = pytest.mark.parametrize("losses", [*FUNCTIONS.values()], ids=[*FUNCTIONS])


def batch(rows: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return (2 * torch.randn(rows, CLASSES, dtype=torch.float64)).to(dtype), torch.arange(rows) * 5 % CLASSES


def value_and_gradient(loss: Callable[..., Tensor], scores: Tensor, *rest: Any, **keywords: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    scores = scores.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(scores, *rest, **keywords)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]
