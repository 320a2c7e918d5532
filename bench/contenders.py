"""Who runs: our losses, the peers' packages, cross-entropy, and a plain copy as the floor.

A contender is built for a setting and then called with scores and target; it returns a scalar loss. `gate` compares
its answer on a small problem with `topk.reference`, and the runner prints no number for one that fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import topk
from topk import reference

LossCall = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """One cell of a suite: the problem that all its contenders solve in turn."""

    family: str
    batch: int
    classes: int
    k: int
    spread: float = 1.0
    epsilon: float = 1.0
    samples: int = 5
    method: str = "odd_even"
    m: int = 16

    def label(self) -> str:
        """A short name for progress bars."""
        return f"{self.family} {self.batch}x{self.classes} k={self.k}"

    def problem(self, rows: int, classes: int) -> tuple[Tensor, Tensor]:
        """Normal scores of the setting's spread and uniform targets, the same at every call."""
        generator = torch.Generator().manual_seed(rows * 1_000_003 + classes)
        scores = torch.randn(rows, classes, generator=generator) * self.spread
        return scores, torch.randint(classes, (rows,), generator=generator)


@dataclass(frozen=True)
class Contender:
    """A name, the loss it computes, how to build it, and where it would take too long or does not exist."""

    name: str
    family: str
    build: Callable[[Setting, int], LossCall]
    truth: Callable[[Setting, Tensor, int], Tensor] | None = None
    needs: tuple[str, ...] = ()
    largest: int = 2**62  # elements of the scores times k
    tolerance: float = 1e-4
    averages: int = 1  # losses that draw noise are averaged over this many calls in the gate
    lacks: tuple[str, ...] = ()  # methods of the family that it does not offer

    def why_not(self, setting: Setting) -> str | None:
        """None, or the reason why this contender sits this setting out."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        if setting.method in self.lacks:
            return f"{self.name} has no {setting.method} without further packages"
        cost = setting.batch * setting.classes * setting.k
        return f"too slow for a problem of this size ({cost:.2g})" if cost > self.largest else None

    def gate(self, setting: Setting) -> None:
        """Raises unless the contender computes its loss, on four rows of at most 500 classes."""
        if self.truth is None:
            return
        scores, target = setting.problem(4, min(setting.classes, 500))
        rows = zip(scores.double(), target.tolist(), strict=True)
        expected = torch.stack([self.truth(setting, row, y) for row, y in rows]).mean()
        call = self.build(setting, scores.shape[1])
        values = torch.stack([call(scores, target).double() for _ in range(self.averages)])
        error = (values.mean() - expected).abs()
        allowed = self.tolerance * expected.abs().clamp(min=1)
        if self.averages > 1:
            allowed = allowed + 6 * values.std() / self.averages**0.5
        if not error <= allowed:
            raise AssertionError(
                f"{self.name} is wrong at {setting.label()}: {values.mean():.6g}, not {expected:.6g}; it gets no time"
            )


def _quiet(make: Callable[[], Any]) -> Any:
    """Some peers print while they are imported or built."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


# --- builders --------------------------------------------------------------------------------------------------------


def _smooth(setting: Setting, classes: int) -> LossCall:
    return lambda x, y: topk.smooth_topk_loss(x, y, setting.k)


def _transition(setting: Setting, classes: int) -> LossCall:
    return lambda x, y: topk.transition_topk_loss(x, y, setting.k)


def _hinge(setting: Setting, classes: int) -> LossCall:
    return lambda x, y: topk.topk_hinge_loss(x, y, setting.k)


def _noised(setting: Setting, classes: int) -> LossCall:
    return lambda x, y: topk.noised_topk_loss(x, y, setting.k, epsilon=setting.epsilon, samples=setting.samples)


def _differentiable(setting: Setting, classes: int) -> LossCall:
    return lambda x, y: topk.differentiable_topk_loss(x, y, setting.k, method=setting.method, m=setting.m)


def _difftopk_smooth(setting: Setting, classes: int) -> LossCall:
    def make() -> Any:
        import difftopk

        return difftopk.SmoothHardTopKLoss(num_classes=classes, k=setting.k)

    loss = _quiet(make)
    return lambda x, y: loss(x, y)


def _difftopk_differentiable(setting: Setting, classes: int) -> LossCall:
    method = {"bitonic": "bitonic__non_sparse"}.get(setting.method, setting.method)

    def make() -> Any:
        import difftopk

        return difftopk.TopKCrossEntropyLoss(
            diffsort_method=method,
            inverse_temperature=1.0,
            p_k=[0.0] * (setting.k - 1) + [1.0],
            n=classes,
            m=setting.m,
            distribution="cauchy",
            top1_mode="sm",
        )

    loss = _quiet(make)
    return lambda x, y: loss(x, y)


def _pytopk(setting: Setting, classes: int) -> LossCall:
    import pytopk

    loss = pytopk.BalNoisedTopK(k=setting.k, epsilon=setting.epsilon, n_sample=setting.samples)
    return lambda x, y: loss(x, y)


def _copy(setting: Setting, classes: int) -> LossCall:
    """The floor: read the scores forward; read them and write the gradient backward."""
    return lambda x, y: cast(Tensor, _Copy.apply(x))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return scores.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (scores,) = ctx.saved_tensors
        return cast(Tensor, scores * grad)


# --- truths ----------------------------------------------------------------------------------------------------------


def _smooth_truth(setting: Setting, row: Tensor, y: int) -> Tensor:
    return reference.smooth_topk_loss_log_space(row, y, setting.k)


def _transition_truth(setting: Setting, row: Tensor, y: int) -> Tensor:
    return reference.transition_topk_loss(row, y, setting.k)


def _hinge_truth(setting: Setting, row: Tensor, y: int) -> Tensor:
    return reference.topk_hinge_loss(row, y, setting.k, "calibrated")


def _noised_truth(setting: Setting, row: Tensor, y: int) -> Tensor:
    return topk.noised_topk_loss(row, torch.tensor(y), setting.k, epsilon=setting.epsilon, samples=None)


def _differentiable_truth(setting: Setting, row: Tensor, y: int) -> Tensor:
    return reference.differentiable_topk_loss(row, y, setting.k, method=setting.method, m=setting.m)


CONTENDERS = (
    Contender("cross_entropy", "any", lambda s, n: F.cross_entropy),
    Contender("copy", "any", _copy),
    Contender("topk smooth", "smooth", _smooth, _smooth_truth),
    Contender("topk transition", "transition", _transition, _transition_truth),
    Contender("topk hinge", "hinge", _hinge, _hinge_truth),
    Contender("topk noised", "noised", _noised, _noised_truth, averages=400),
    Contender("topk differentiable", "differentiable", _differentiable, _differentiable_truth),
    Contender(
        "difftopk smooth", "smooth", _difftopk_smooth, _smooth_truth, ("difftopk",), largest=2**25, tolerance=1e-2
    ),
    Contender(
        "difftopk differentiable",
        "differentiable",
        _difftopk_differentiable,
        _differentiable_truth,
        ("difftopk",),
        lacks=("splitter_selection",),  # needs torch-sparse
    ),
    Contender("pytopk noised", "noised", _pytopk, _noised_truth, ("pytopk",), largest=2**26, averages=400),
)
"""Compiled and Triton contenders belong in this list too: the runner asks each one `why_not`."""


def contenders(setting: Setting) -> list[Contender]:
    """Those that run at this setting."""
    return [c for c in CONTENDERS if c.family in ("any", setting.family) and c.why_not(setting) is None]
