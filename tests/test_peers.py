"""The losses of other packages and ours, on the same scores (extra `peers`)."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from types import ModuleType
from typing import Any

import pytest
import torch

from topk import reference
from topk.svm import MaxTopkSVM, SmoothTopkSVM


def peer(name: str) -> ModuleType:
    """The package, if it is installed; difftopk prints when imported."""
    pytest.importorskip(name.partition(".")[0])
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(name)


def value_and_gradient(loss: Any, scores: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, target)
    (gradient,) = torch.autograd.grad(value, scores)
    return value.detach(), gradient


# --- smooth-topk, as difftopk carries it -----------------------------------------------------------------------------


def takes_the_smooth_branch(scores: torch.Tensor, k: int, tau: float) -> torch.Tensor:
    top = scores.topk(k + 1, 1).values
    return top[:, k - 1] - top[:, k] < k * tau * math.log(1e3)


ignore_its_warnings = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@ignore_its_warnings
@pytest.mark.parametrize("k", [2, 3, 5, 10])
@pytest.mark.parametrize("classes", [13, 100, 1000])
@pytest.mark.parametrize(("tau", "scale"), [(1.0, 1.0), (1.0, 5.0), (3.0, 1.0), (0.3, 0.3), (0.1, 0.1)])
def test_smooth_topk_on_its_smooth_branch(k: int, classes: int, tau: float, scale: float) -> None:
    """Values and gradients to 1e-4; for moderate scores every single row's gradient too, not just its 1/32 share."""
    scores, target = scale * torch.randn(32, classes), torch.randint(classes, (32,))
    smooth = takes_the_smooth_branch(scores, k, tau)
    scores, target = scores[smooth], target[smooth]
    assert len(scores) > 20
    theirs = value_and_gradient(peer("difftopk").SmoothHardTopKLoss(classes, k, tau=tau), scores, target)
    ours = value_and_gradient(SmoothTopkSVM(classes, tau=tau, k=k), scores, target)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-4 / (len(scores) if scale <= tau else 1))


@ignore_its_warnings
@pytest.mark.parametrize("tau", [0.05, 0.1])
def test_smooth_topk_at_small_temperatures_is_as_close_as_it_is_to_the_truth(tau: float) -> None:
    """There the package's row gradients are off by up to 1e-2, ours by rounding: the truth is the float64 reference."""
    scores, target = torch.randn(32, 50), torch.randint(50, (32,))
    smooth = takes_the_smooth_branch(scores, 5, tau)
    scores, target = scores[smooth], target[smooth]
    assert len(scores) > 20
    theirs = value_and_gradient(peer("difftopk").SmoothHardTopKLoss(50, 5, tau=tau), scores, target)
    ours = value_and_gradient(SmoothTopkSVM(50, tau=tau), scores, target)
    pairs = list(zip(scores, target.tolist(), strict=True))
    value = torch.stack([reference.smooth_topk_loss_log_space(x, y, 5, tau) for x, y in pairs]).mean().float()
    gradient = torch.stack([reference.smooth_topk_gradient_log_space(x, y, 5, tau) for x, y in pairs]).float() / len(
        pairs
    )
    for found in (ours, theirs):
        torch.testing.assert_close(found[0], value, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[1], gradient, rtol=0, atol=1e-6 / len(pairs))
    torch.testing.assert_close(theirs[1], gradient, rtol=0, atol=1e-2 / len(pairs))


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_smooth_topk_on_its_hard_branch_is_our_hard_loss(k: int, tau: float) -> None:
    scores, target = torch.randn(64, 20), torch.randint(20, (64,))
    scores[:, :k] += k * tau * math.log(1e3) + scores.max() - scores.min()
    assert not takes_the_smooth_branch(scores, k, tau).any()
    theirs = value_and_gradient(peer("difftopk").SmoothHardTopKLoss(20, k, tau=tau), scores, target)
    for found, expected in zip(value_and_gradient(MaxTopkSVM(20, k=k), scores, target), theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
