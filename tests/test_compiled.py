"""The compiled backend: the same losses, chosen by count, never a surprise. What compiles takes its time: `slow`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import CASES, Case
from torch import Tensor

import topk
from topk import compiled

SAMPLE = [name for name in CASES if name not in ("sinkhorn", "noised, exact, many k")]  # these take minutes to compile


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_seen", type(compiled._seen)())
    monkeypatch.setattr(compiled, "_pairs", {})
    monkeypatch.setattr(compiled, "_failed", {})
    monkeypatch.delenv("TOPK_COMPILE", raising=False)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Ties, a masked class, ignored rows and a clean rest."""
    scores = (2 * torch.randn(9, 13)).to(dtype)
    scores[1, 3:9] = 0.5
    scores[2, 4] = -torch.inf
    scores[5] = torch.nan
    target = torch.arange(9)
    target[5] = -100
    return scores, target


def value_and_gradient(loss: Any, scores: Tensor, target: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    scores = scores.detach().requires_grad_()
    value = loss(scores, target, reduction="none", **keywords)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]


# --- when it is chosen -----------------------------------------------------------------------------------------------


def count_compilations(monkeypatch: pytest.MonkeyPatch, error: str | None = None) -> list[Any]:
    """Puts a list in the place of the compiler, and has every fifth call of 10 x 13 scores due."""
    asked: list[Any] = []

    def stand_in(call: Any, scores: Tensor, target: Tensor, tensors: Any) -> Any:
        asked.append((call.loss.name, tuple(scores.shape)))
        raise RuntimeError(error or "no compiler in this test")

    monkeypatch.setattr(compiled, "_compile", stand_in)
    monkeypatch.setattr(compiled, "_missing_compiler", lambda: None)
    monkeypatch.setattr(compiled, "COMPILE_SECONDS", 4.5 * 7e-9 * 130)
    return asked


def test_a_shape_is_compiled_once_it_was_seen_often_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_compilations(monkeypatch)
    scores, target = torch.randn(10, 13, requires_grad=True), torch.arange(10)
    expected = topk.smooth_topk_loss(scores, target, 3)
    for _ in range(3):
        topk.smooth_topk_loss(scores, target, 3)
        topk.smooth_topk_loss(scores[:4], target[:4], 3)  # another shape, which is due later
        topk.smooth_topk_loss(scores, target, 2)  # other settings
    assert asked == []
    with pytest.warns(RuntimeWarning, match="smooth does not compile and stays as it is: RuntimeError: no compiler"):
        found = topk.smooth_topk_loss(scores, target, 3)
    assert asked == [("smooth", (10, 13))]
    assert torch.equal(found, expected)
    for _ in range(9):  # neither tried nor warned of again
        topk.smooth_topk_loss(scores, target, 3).backward()
    assert len(asked) == 1


def test_what_never_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_compilations(monkeypatch)
    scores, target = torch.randn(10, 13, requires_grad=True), torch.arange(10)
    for _ in range(12):
        topk.smooth_topk_loss(scores, target, 3, backend="torch")
        topk.smooth_topk_loss(scores.detach(), target, 3)  # no gradient is wanted
        topk.smooth_topk_loss(scores, target, 11)  # large k: nothing is gained
        topk.topk_hinge_loss(scores, target, 3)
        torch.func.grad(lambda x: topk.smooth_topk_loss(x, target, 3))(scores.detach())
    monkeypatch.setenv("TOPK_COMPILE", "0")
    for _ in range(12):
        topk.smooth_topk_loss(scores, target, 3)
    assert asked == []


def test_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "on the CPU, these are on cuda" in str(compiled.why_not(torch.device("cuda")))
    scores, target = torch.randn(10, 13, requires_grad=True), torch.arange(10)
    count_compilations(monkeypatch, "the compiler broke")
    with pytest.raises(RuntimeError, match="backend='compiled' cannot run: RuntimeError: the compiler broke"):
        topk.smooth_topk_loss(scores, target, 3, backend="compiled")
    monkeypatch.setattr(compiled, "_missing_compiler", lambda: "torch finds no C++ compiler")
    with pytest.raises(RuntimeError, match=r"backend='compiled' cannot run: torch finds no C\+\+ compiler"):
        topk.smooth_topk_loss(scores, target, 3, backend="compiled")


def test_targets_are_checked_as_ever() -> None:
    with pytest.raises(ValueError, match=r"target must hold.*got 13 at position 1"):
        topk.smooth_topk_loss(torch.randn(2, 13, requires_grad=True), torch.tensor([0, 13]), 3, backend="compiled")


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("loss", [CASES[name] for name in SAMPLE], ids=SAMPLE)
def test_equals_the_torch_path(loss: Case) -> None:
    scores, target = batch()
    plain = value_and_gradient(loss, scores, target, backend="torch")
    found = value_and_gradient(loss, scores, target, backend="compiled")
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    assert (found[1][5] == 0).all()
    assert found[1][2, 4] == 0
    again = value_and_gradient(loss, scores, target, backend="compiled")
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    leaf = scores.detach().requires_grad_()
    torch.manual_seed(3)
    value = loss(leaf, target, backend="compiled", reduction="sum")
    for _ in range(2):  # backward leaves what forward saved as it is
        assert torch.equal(torch.autograd.grad(value, leaf, retain_graph=True)[0], found[1])
    for place, broken in ((3, torch.nan), (4, torch.inf)):  # the ordinary way, and for this batch only
        scores[place, 11] = broken
        expected = value_and_gradient(loss, scores, target, backend="torch")
        found = value_and_gradient(loss, scores, target, backend="compiled")
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    assert len(compiled._pairs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 5, 8])
def test_accuracy(k: int) -> None:
    for scale in (1e-4, 1.0, 1e4):
        for leaders in (0, k - 1):
            scores = (scale * torch.randn(8, 300)).float()
            scores[:, :leaders] += 30.0 * k * scale
            target = torch.arange(8) * 40
            exact, slope = value_and_gradient(topk.smooth_topk_loss, scores.double(), target, k=k, backend="torch")
            loss, gradient = value_and_gradient(topk.smooth_topk_loss, scores, target, k=k, backend="compiled")
            assert ((loss - exact).abs() / exact.clamp(min=1)).max() <= 3e-6
            assert (gradient - slope).abs().max() <= 2e-5 / k


@pytest.mark.slow
def test_derivatives_and_transforms() -> None:
    scores, target = batch()
    direction = torch.randn(9, 13)

    def derivatives(backend: str) -> list[Tensor]:
        x = scores.detach().requires_grad_()
        loss = topk.smooth_topk_loss(x, target, 3, backend=backend, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (product,) = torch.autograd.grad((gradient.nan_to_num() * direction).sum(), x, retain_graph=True)
        (once_more,) = torch.autograd.grad(loss, x, retain_graph=True)
        pull = torch.func.vmap(lambda grad: torch.autograd.grad(loss, x, grad, retain_graph=True)[0])
        batched = pull(torch.tensor([1.0, -2.0]))
        wrapped = torch.func.vmap(torch.func.grad(lambda a, y: topk.smooth_topk_loss(a, y, 3, backend=backend)))
        return [gradient.detach(), product, once_more, batched, wrapped(scores[:5], target[:5])]

    for found, expected in zip(derivatives("compiled"), derivatives("torch"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    scores, target = batch(dtype)
    plain = value_and_gradient(topk.smooth_topk_loss, scores, target, k=3, backend="torch")
    found = value_and_gradient(topk.smooth_topk_loss, scores, target, k=3, backend="compiled")
    assert [part.dtype for part in found] == [part.dtype for part in plain]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found[0], plain[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], plain[1], rtol=max(tolerance, torch.finfo(dtype).eps), atol=tolerance)
