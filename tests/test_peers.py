"""The losses of other packages and ours, on the same scores (extra `peers`)."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from types import ModuleType
from typing import Any

import brute_force as reference
import pytest
import torch

import topk
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
    gradients = [reference.smooth_topk_gradient_log_space(x, y, 5, tau) for x, y in pairs]
    gradient = torch.stack(gradients).float() / len(pairs)
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


# --- difftopk's differentiable top-k cross-entropy --------------------------------------------------------------------


class TestDifftopkCrossEntropy:
    """Its networks built on torch-sparse need a package of their own and are left out."""

    def compare(
        self, theirs: str, ours: str, k: list[float], classes: int, m: int | None, mode: str, **options: Any
    ) -> None:
        names = {"sm": "softmax", "smce": "cross_entropy", "sort": "sort"}
        scores, target = torch.randn(16, classes), torch.randint(classes, (16,))
        options = {"distribution": "cauchy", "inverse_temperature": 0.8, **options}
        loss = peer("difftopk").TopKCrossEntropyLoss(theirs, p_k=k, n=classes, m=m, top1_mode=mode, **options)
        options |= {"method": ours, "m": m or classes, "top1": names[mode]}
        mixture = {rank + 1: weight for rank, weight in enumerate(k) if weight}

        def mine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return topk.differentiable_topk_loss(x, y, mixture, **options)

        expected = value_and_gradient(loss, scores, target)
        for found, peers in zip(value_and_gradient(mine, scores, target), expected, strict=True):
            torch.testing.assert_close(found, peers, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mode", ["sm", "smce", "sort"])
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ("odd_even", "odd_even"),
            ("bitonic__non_sparse", "bitonic"),
            ("neuralsort", "neuralsort"),
            ("softsort", "softsort"),
        ],
    )
    @pytest.mark.parametrize("k", [[0, 0, 0, 0, 1.0], [0.5, 0, 0, 0, 0.5], [0.2] * 5], ids=str)
    @pytest.mark.parametrize(("classes", "m"), [(40, 16), (30, 10), (9, None), (16, None)])
    def test_values_and_gradients(
        self, theirs: str, ours: str, k: list[float], classes: int, m: int | None, mode: str
    ) -> None:
        self.compare(theirs, ours, k, classes, m, mode)

    @pytest.mark.parametrize("theirs", ["odd_even", "bitonic__non_sparse"])
    @pytest.mark.parametrize(
        "distribution", ["logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal"]
    )
    def test_distributions(self, theirs: str, distribution: str) -> None:
        ours = theirs.removesuffix("__non_sparse")
        self.compare(theirs, ours, [0.5, 0, 0, 0.5], 30, 16, "sm", distribution=distribution, art_lambda=0.4)


# --- pytopk ----------------------------------------------------------------------------------------------------------

COUNTS = [500, 240, 120, 60, 30, 15, 8, 4, 2, 1]


def linear_rows(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores whose hinge no moderate noise can open or close: there the mean over draws is the loss of the mean."""
    scores, target = torch.randn(rows, classes), torch.randint(classes, (rows,))
    scores.scatter_(1, target[:, None], torch.where(torch.arange(rows) % 4 == 0, 40.0, -40.0)[:, None])
    return scores, target


@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize("epsilon", [0.01, 1.0])
def test_noised_losses_for_the_same_noise(k: int, epsilon: float) -> None:
    """pytopk's functional forms with given normals, against the definition with the same normals."""
    functional, noised = peer("pytopk.functional"), peer("pytopk.noised_topk")._noised_topk
    scores, target, noise = torch.randn(6, 10), torch.randint(10, (6,)), torch.randn(6, 10, 4)
    margins = topk.class_margins(torch.tensor(COUNTS), 0.3)

    def balanced(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.bal_noised_topk_loss(x, y, k, epsilon, noised, noise)

    def imbalanced(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.imbal_noised_topk_loss(x, y, k, margins, epsilon, noised, noise, 50)

    for theirs, options in ((balanced, (1.0, 1.0)), (imbalanced, (margins, 50.0))):

        def defined(x: torch.Tensor, y: torch.Tensor, options: tuple = options) -> torch.Tensor:
            rows = zip(x, y.tolist(), noise.double(), strict=True)
            return torch.stack([reference.noised_topk_loss(s, t, k, z, epsilon, *options) for s, t, z in rows]).mean()

        expected = value_and_gradient(theirs, scores, target)
        found = value_and_gradient(defined, scores.double(), target)
        for ours, their in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.float(), their, rtol=1e-4, atol=1e-5)


def test_class_margins_are_those_of_the_imbalanced_loss() -> None:
    theirs = peer("pytopk").ImbalNoisedTopK(k=2, epsilon=0.1, max_m=0.3, cls_num_list=COUNTS)
    torch.testing.assert_close(topk.class_margins(torch.tensor(COUNTS), 0.3).float(), theirs.m_list)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["balanced", "imbalanced"])
def test_noised_losses_agree_in_expectation(k: int, kind: str) -> None:
    """Both packages' draws, averaged, against our quadrature: values and gradients within 4 standard errors."""
    epsilon, samples, rows = 0.7, 20_000, 8
    scores, target = linear_rows(rows, 10)
    if kind == "balanced":
        theirs = peer("pytopk").BalNoisedTopK(k, epsilon, n_sample=samples)
        options: dict[str, Any] = {}
    else:
        theirs = peer("pytopk").ImbalNoisedTopK(k, epsilon, 0.3, COUNTS, scale=3, n_sample=samples)
        options = {"margins": topk.class_margins(torch.tensor(COUNTS), 0.3), "scale": 3.0}

    def ours(x: torch.Tensor, y: torch.Tensor, samples: int | None = samples) -> torch.Tensor:
        return topk.noised_topk_loss(x, y, k, epsilon=epsilon, samples=samples, **options)

    value, gradient = value_and_gradient(lambda x, y: ours(x, y, None), scores.double(), target)
    share = gradient * rows / options.get("scale", 1.0)  # how often a class is the (k+1)-th, less [j = y]
    gradient_error = 4 * (share.abs() * (1 - share.abs())).clamp(min=1 / samples).div(samples).sqrt() / rows
    value_error = 4 * epsilon / math.sqrt(samples * rows)  # an order statistic varies no more than one class's noise
    for loss in (theirs, ours):
        found_value, found_gradient = value_and_gradient(loss, scores, target)
        assert (found_value - value).abs() <= options.get("scale", 1.0) * value_error
        assert bool(((found_gradient - gradient).abs() <= options.get("scale", 1.0) * gradient_error).all())
