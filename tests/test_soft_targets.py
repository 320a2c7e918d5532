"""Targets that are probabilities give the expected loss, exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import ALL, CASES, CLASSES, Case, every_loss
from torch import Tensor

import topk
from topk.losses.soft import MOST_CLASSES

ROWS = 5


def probabilities(kind: str, rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    if kind == "one":
        return F.one_hot(torch.arange(rows) * 3 % classes, classes).double()
    if kind == "two":
        share = torch.rand(rows, 1, dtype=torch.float64)
        return share * probabilities("one", rows, classes) + (1 - share) * probabilities("one", rows, classes).flip(0)
    return torch.randn(rows, classes, dtype=torch.float64).softmax(1)


def expected_loss(loss: Case, scores: Tensor, q: Tensor) -> Tensor:
    """(rows,): class by class."""
    every = [loss(scores, torch.full((len(scores),), y), reduction="none") for y in range(scores.shape[1])]
    return (torch.stack(every, 1) * q).sum(1)


@every_loss
@pytest.mark.parametrize("kind", ["one", "two", "all"])
def test_the_expected_loss_and_its_gradient(loss: Case, kind: str) -> None:
    scores = (2 * torch.randn(ROWS, CLASSES, dtype=torch.float64)).requires_grad_()
    q, upstream = probabilities(kind), torch.randn(ROWS, dtype=torch.float64)
    found, expected = loss(scores, q, reduction="none"), expected_loss(loss, scores, q)
    tolerance = {"rtol": 10 * loss.precision, "atol": 10 * loss.precision}
    torch.testing.assert_close(found, expected, **tolerance)
    one, other = (torch.autograd.grad((value * upstream).sum(), scores)[0] for value in (found, expected))
    torch.testing.assert_close(one, other, **tolerance)
    torch.testing.assert_close(loss(scores, q), expected.mean(), **tolerance)
    torch.testing.assert_close(loss(scores, q, reduction="sum"), expected.sum(), **tolerance)
    torch.testing.assert_close(loss.module(**loss.keywords)(scores, q), expected.mean(), **tolerance)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["two", "all"])
def test_cross_entropy_is_torchs(kind: str, smoothing: float) -> None:
    scores, q, weight = torch.randn(ROWS, CLASSES), probabilities(kind).float(), torch.rand(CLASSES)
    entropy = topk.transition_topk_loss(scores, q, 1, transition=0.0, label_smoothing=smoothing)
    torch.testing.assert_close(entropy, F.cross_entropy(scores, q, label_smoothing=smoothing))
    weighted = topk.focal_loss(scores, q, gamma=0.0, weight=weight)
    torch.testing.assert_close(weighted, F.cross_entropy(scores, q, weight=weight))
    images, maps = torch.randn(2, CLASSES, 3, 4), torch.randn(2, CLASSES, 3, 4).softmax(1)
    for reduction in ("none", "mean", "sum"):
        found = topk.focal_loss(images, maps, gamma=0.0, reduction=reduction)
        torch.testing.assert_close(found, F.cross_entropy(images, maps, reduction=reduction))
    single = topk.focal_loss(scores[0], q[0], gamma=0.0)
    torch.testing.assert_close(single, F.cross_entropy(scores[0], q[0]))


@pytest.mark.parametrize("name", ["smooth", "transition", "hinge, calibrated", "hinge, kth", "hinge, smooth_limit"])
def test_all_classes_with_ties_and_masked_ones(name: str) -> None:
    """These take any number of classes; elsewhere more than the stated number is refused."""
    loss, classes = CASES[name], MOST_CLASSES + 9
    scores = torch.randn(ROWS, classes, dtype=torch.float64).round()
    scores[:, 3] = -torch.inf
    scores.requires_grad_()
    q = probabilities("all", ROWS, classes).index_fill(1, torch.tensor([3, 8]), 0.0)
    q = q / q.sum(1, keepdim=True)
    found = loss(scores, q, reduction="none")
    kept = [y for y in range(classes) if y not in (3, 8)]
    every = torch.stack([loss(scores, torch.full((ROWS,), y), reduction="none") for y in kept], 1)
    torch.testing.assert_close(found, (every * q[:, kept]).sum(1))
    one, other = (torch.autograd.grad(v.sum(), scores)[0] for v in (found, (every * q[:, kept]).sum(1)))
    torch.testing.assert_close(one, other)
    assert one.isfinite().all()
    with pytest.raises(ValueError, match="at most 64 classes a row a probability above 0 for this loss, got 71"):
        topk.smooth_topk_loss(scores, q, 11)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_smooth_with_every_class_left_out(k: int, scale: float) -> None:
    """Against enumeration; leaders far ahead, ties, and fewer than k wrong classes that are possible."""
    scores = scale * torch.randn(4, 11, dtype=torch.float64)
    scores[1, :k] += 30.0 * scale
    scores[2] = scores[2].sign()
    scores[3, k:] = -torch.inf
    q = probabilities("all", 4, 11)
    q[3] = F.one_hot(torch.tensor(0), 11) * 0.4
    q[3, :k] += 0.6 / k
    found = topk.smooth_topk_loss(scores, q, k, reduction="none")
    every = torch.stack([topk.smooth_topk_loss(scores, torch.full((4,), y), k, reduction="none") for y in range(11)], 1)
    brute = torch.where(q > 0, q * every, 0.0).sum(1)
    assert ((found - brute).abs() <= 1e-12 * brute.abs().clamp(min=1.0)).all()
    single = topk.smooth_topk_loss(scores[:3].float(), q[:3].float(), k, reduction="none")
    assert ((single - brute[:3]).abs() <= 1e-5 * brute[:3].abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e4])
def test_the_gradient_of_smooth_with_every_class_left_out(k: int, scale: float) -> None:
    """Far leaders, whose coefficients nothing may be divided out of, and fewer than k classes that are possible."""
    scores = scale * torch.randn(3, 9, dtype=torch.float64)
    scores[1], scores[2, k:] = (scores[1] / scale).round() * scale, -torch.inf
    q = probabilities("all", 3, 9)
    q[2] = F.one_hot(torch.tensor(0), 9)
    q[2, :k] += 1.0
    q = q / q.sum(1, keepdim=True)
    x = scores.clone().requires_grad_()
    every = [topk.smooth_topk_loss(x, torch.full((3,), y), k, reduction="none") for y in range(9)]
    brute = sum(torch.where(q[:, y] > 0, q[:, y] * every[y], 0.0).sum() for y in range(9))
    (expected,) = torch.autograd.grad(brute, x)
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        x = scores.to(dtype).requires_grad_()
        (found,) = torch.autograd.grad(topk.smooth_topk_loss(x, q.to(dtype), k, reduction="sum"), x)
        torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=near if scale < 1e4 else 100 * near)


def test_what_is_no_distribution_is_refused() -> None:
    scores, q = torch.randn(ROWS, CLASSES), probabilities("two").float()
    topk.smooth_topk_loss(scores, q * (1 + 9e-4))
    for wrong in (q * 1.002, q * 0.998, q - 0.01, q * torch.nan):
        with pytest.raises(ValueError, match="target must hold probabilities that are >= 0 and sum to 1"):
            topk.smooth_topk_loss(scores, wrong)
    with pytest.raises(TypeError, match="probabilities in the shape of scores"):
        topk.smooth_topk_loss(scores, q[:, :4])
    assert topk.smooth_topk_loss(scores[:0], q[:0]).isnan()
    assert topk.smooth_topk_loss(scores[:0], q[:0], reduction="sum") == 0


def test_noise_is_drawn_for_every_class() -> None:
    scores, q = torch.randn(ROWS, CLASSES, dtype=torch.float64), probabilities("two")
    loss = ALL["noised"]
    mean = torch.stack([loss(scores, q) for _ in range(400)])
    exact = topk.noised_topk_loss(scores, q, 3, samples=None)
    assert (mean.mean() - exact).abs() < 6 * mean.std() / 20


def test_timms_mixup_and_cutmix() -> None:
    """What timm makes of images and labels trains with any loss; its smoothing gives every class a probability."""
    mixup = pytest.importorskip("timm.data").Mixup
    for options in ({"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0, "mixup_alpha": 0.0}):
        for smoothing in (0.0, 0.1):
            make = mixup(**options, label_smoothing=smoothing, num_classes=CLASSES)
            images, q = make(torch.randn(6, 3, 8, 8), torch.arange(6))
            scores = images.flatten(1)[:, :CLASSES].clone().requires_grad_()
            for name in ("smooth", "transition", "hinge, beta", "odd_even"):
                value = CASES[name](scores, q)
                expected = expected_loss(CASES[name], scores.double(), q.double()).mean()
                torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
                assert torch.autograd.grad(value, scores)[0].isfinite().all()
