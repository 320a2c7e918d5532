"""Losses fused with the last layer are the losses of the layer's scores, in every way that `topk.losses` promises."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import CASES
from torch import Tensor, nn

import topk
from topk import compiled
from topk_lab.study.timing import peak_temporaries

ROWS, FEATURES, CLASSES = 23, 6, 13
CRITERIA: dict[str, nn.Module] = {
    **{name: case.module(**case.keywords) for name, case in CASES.items()},
    "noised, without noise": topk.NoisedTopKLoss(3, epsilon=0.0, margins=torch.linspace(0.1, 2.0, CLASSES)),
    "softmax over all": topk.DifferentiableTopKLoss(1, m=6, top1="cross_entropy", cross_entropy_over="all"),
    "cross-entropy": nn.CrossEntropyLoss(),
    "cross-entropy, smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
}
every_criterion = pytest.mark.parametrize("loss", [*CRITERIA.values()], ids=[*CRITERIA])


def criterion(loss: nn.Module, **changes: Any) -> nn.Module:
    loss = copy.deepcopy(loss)
    for name, value in changes.items():
        setattr(loss, name, value)
    return loss


def layer(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    features, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return features, weight, bias


def targets() -> Tensor:
    target = torch.randint(CLASSES, (ROWS,))
    target[[0, 7, 8]] = -100
    return target


def unfused(loss: nn.Module, features: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
    return loss(F.linear(features, weight, bias), target)


def fused(loss: nn.Module, features: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
    return topk.linear_loss(loss, features, weight, target, bias=bias, chunk=5)


def with_gradients(value: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    upstream = upstream[: value.numel()].view(value.shape).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, inputs, upstream)]


@every_criterion
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_the_unfused_loss(loss: nn.Module, reduction: str, dtype: torch.dtype, allowed: float) -> None:
    inputs, target, upstream = layer(dtype), targets(), torch.randn(ROWS, dtype=torch.float64)
    loss = criterion(loss, reduction=reduction)
    if getattr(loss, "method", None) == "sinkhorn":
        loss.tolerance = 1e-14  # every chunk stops by its own rows
    expected = with_gradients(unfused(loss, *inputs[:2], target, inputs[2]), inputs, upstream)
    found = with_gradients(fused(loss, *inputs[:2], target, inputs[2]), inputs, upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=allowed, atol=allowed * float(other.abs().max().clamp(min=1.0)))


@pytest.mark.parametrize("name", ["smooth", "transition", "hinge, calibrated", "odd_even"])
def test_half_types_are_as_exact_as_their_inputs(name: str) -> None:
    """Against float64 of the same rounded inputs; one chunk or many must not matter."""
    loss, target = CRITERIA[name], targets()
    inputs = layer(torch.bfloat16)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    rounded = F.linear(inputs[0], inputs[1], inputs[2]).detach().double()
    scores = F.linear(exact[0], exact[1], exact[2])
    scores = scores + (rounded - scores).detach()  # the scores that half types make
    expected = with_gradients(loss(scores, target), exact, torch.ones(1))
    found = with_gradients(fused(loss, *inputs[:2], target, inputs[2]), inputs, torch.ones(1))
    assert found[0].dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= 1.5 * 2**-8 * other.abs().max()


def test_weights_gradient_does_not_drift_with_the_number_of_chunks() -> None:
    features, weight = torch.randn(2000, 3).bfloat16(), torch.randn(7, 3).bfloat16().requires_grad_()
    target = torch.randint(7, (2000,))
    few, many = (
        torch.autograd.grad(topk.linear_loss(CRITERIA["smooth"], features, weight, target, chunk=chunk), weight)[0]
        for chunk in (2000, 2)
    )
    assert (few.float() - many.float()).abs().max() <= 2**-8 * few.float().abs().max()


@every_criterion
def test_gradcheck(loss: nn.Module) -> None:
    features, weight, bias = layer()
    features = features.detach()[:5].requires_grad_()
    case = criterion(loss, reduction="none")
    if getattr(case, "transition", None) == "margin":
        case.transition = 0.5  # the gradient holds the weight
    if isinstance(case, topk.SoftmaxAtKLoss):
        pytest.skip("its gradient holds the weight of a row, as the paper's does")

    def call(*inputs: Tensor) -> Tensor:
        return topk.linear_loss(case, *inputs[:2], torch.tensor([0, 3, -100, 8, 2]), bias=inputs[2], chunk=2)

    assert torch.autograd.gradcheck(call, (features, weight, bias), atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["smooth", "transition, fixed", "ldam", "bitonic"])
def test_second_derivatives(name: str, reduction: str) -> None:
    loss, target = criterion(CRITERIA[name], reduction=reduction), targets()
    inputs, directions = layer(), layer()
    found = []
    for make in (unfused, fused):
        value = make(loss, *inputs[:2], target, inputs[2])
        slopes = torch.autograd.grad((value * torch.ones_like(value).cumsum(-1)).sum(), inputs, create_graph=True)
        along = sum((slope * direction.detach()).sum() for slope, direction in zip(slopes, directions, strict=True))
        found.append(torch.autograd.grad(along, inputs))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", [None, "compiled"])
def test_chunks_are_never_compiled(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by themselves, nor where it is asked for, nor for second derivatives."""

    def refuses(*_: Any) -> None:
        raise AssertionError("a chunk was to be compiled")

    monkeypatch.setattr(compiled, "pair_for", refuses)
    monkeypatch.setattr(compiled, "why_not", lambda device: None)
    monkeypatch.setattr(compiled, "COMPILE_SECONDS", 0.0)
    inputs, target = layer(torch.bfloat16), targets()
    found = []
    for chosen in ("torch", backend):
        value = fused(criterion(CRITERIA["smooth"], backend=chosen), *inputs[:2], target, inputs[2])
        slopes = torch.autograd.grad(value, inputs, retain_graph=True)
        bent = torch.autograd.grad(value, inputs[0], create_graph=True)[0].float().square().sum()
        found.append((value, *slopes, *torch.autograd.grad(bent, inputs)))
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_gradients_accumulate_and_backward_may_be_repeated() -> None:
    loss, inputs, target = CRITERIA["smooth"], layer(), targets()
    expected = torch.autograd.grad(unfused(loss, *inputs[:2], target, inputs[2]), inputs)
    for _ in range(3):
        (2.0 * fused(loss, *inputs[:2], target, inputs[2])).backward()
    value = fused(loss, *inputs[:2], target, inputs[2])
    value.backward(retain_graph=True)
    (3.0 * value).backward()
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, 10.0 * gradient)


def test_only_what_needs_a_gradient_gets_one() -> None:
    loss, target = CRITERIA["odd_even"], targets()
    for wanted in range(3):
        inputs = [tensor.detach().requires_grad_(place == wanted) for place, tensor in enumerate(layer())]
        expected = torch.autograd.grad(unfused(loss, *inputs[:2], target, inputs[2]), inputs[wanted])
        fused(loss, *inputs[:2], target, inputs[2]).backward()
        torch.testing.assert_close(inputs[wanted].grad, expected[0])
        assert all(tensor.grad is None for place, tensor in enumerate(inputs) if place != wanted)
    value = fused(loss, *(tensor.detach() for tensor in layer()[:2]), target, None)
    assert not value.requires_grad


@pytest.mark.parametrize("name", ["smooth", "odd_even"])
def test_autocast(name: str) -> None:
    loss, target, inputs = CRITERIA[name], targets(), layer(torch.float32)
    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for make in (unfused, fused):
            value = make(loss, *inputs[:2], target, inputs[2])
            found.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).abs().max() <= 2 * 2**-8 * other.abs().max()


@every_criterion
def test_nothing_to_average(loss: nn.Module) -> None:
    inputs = layer()
    for target in (torch.full((ROWS,), -100), targets()[:0]):
        features = inputs[0][: len(target)]
        for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
            case = criterion(loss, reduction=reduction)
            value = fused(case, features, inputs[1], target, inputs[2])
            torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
            for gradient in torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True):
                assert (gradient == 0).all()
        assert fused(criterion(loss, reduction="none"), features, inputs[1], target, inputs[2]).shape == target.shape


def test_class_weights_ignored_rows_and_more_axes() -> None:
    weights = torch.rand(CLASSES, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        loss = topk.TransitionTopKLoss(3, weight=weights, ignore_index=2, reduction=reduction)
        (features, weight, bias), target = layer(), torch.randint(CLASSES, (ROWS,))
        features = features.detach().requires_grad_()
        with torch.no_grad():
            features[target == 2] = torch.nan  # an ignored row may hold anything
        one, other = (make(loss, features, weight, target, bias) for make in (unfused, fused))
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(
            torch.autograd.grad(other.sum(), (weight, bias)),
            torch.autograd.grad(
                unfused(loss, features[target != 2], weight, target[target != 2], bias).sum(), (weight, bias)
            ),
        )
    (features, weight, bias), target = layer(), torch.randint(CLASSES, (2, 11))
    loss = criterion(CRITERIA["smooth"], reduction="none")
    value = topk.linear_loss(loss, features[:22].view(2, 11, FEATURES), weight, target, bias=bias)
    flat = topk.linear_loss(loss, features[:22], weight, target.view(-1), bias=bias)
    torch.testing.assert_close(value, flat.view(2, 11))
    single = topk.linear_loss(loss, features[0], weight, target[0, 0], bias=bias)
    torch.testing.assert_close(single, value[0, 0])


@every_criterion
def test_probabilities_as_targets(loss: nn.Module) -> None:
    inputs, upstream = layer(), torch.randn(ROWS, dtype=torch.float64)
    one, other = (F.one_hot(torch.randint(CLASSES, (ROWS,)), CLASSES).double() for _ in range(2))
    q = 0.3 * one + 0.7 * other
    for reduction in ("mean", "none"):
        case = criterion(loss, reduction=reduction)
        if isinstance(case, topk.DifferentiableTopKLoss):
            case.tolerance = 1e-14
        expected, found = (
            with_gradients(make(case, *inputs[:2], q, inputs[2]), inputs, upstream) for make in (unfused, fused)
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    images = topk.linear_loss(case, inputs[0][:22].view(2, 11, FEATURES), inputs[1], q[:22].view(2, 11, CLASSES))
    assert images.shape == (2, 11)


def test_cosines() -> None:
    (features, weight, _), target = layer(), targets()
    loss = topk.LDAMLoss(margins=0.2, scale=1.0)
    found = topk.linear_loss(loss, features, weight, target, cosine_scale=30.0, chunk=4)
    cosines = F.normalize(features, dim=-1) @ F.normalize(weight, dim=-1).T
    expected = loss(30.0 * cosines, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, (features, weight)) for v in (found, expected)))


def test_noise_of_chunks_differs_and_comes_again_in_backward() -> None:
    """Equal rows in different chunks meet different noise; the gradient is that of the printed values."""
    loss = topk.NoisedTopKLoss(3, samples=2, margins=10.0, reduction="none")
    features = torch.randn(1, FEATURES, dtype=torch.float64).expand(40, -1).clone().requires_grad_()
    weight = torch.randn(CLASSES, FEATURES, dtype=torch.float64)
    value = topk.linear_loss(loss, features, weight, torch.zeros(40, dtype=torch.int64), chunk=4)
    assert len(value.detach().unique()) == 40
    (slopes,) = torch.autograd.grad(value.sum(), features)
    noise = value.detach() - 10.0 - (slopes * features).sum(1).detach()  # what is left is the mean of epsilon Z
    assert noise.abs().max() < 6.0
    same = topk.linear_loss(loss, features, weight, torch.zeros(40, dtype=torch.int64), chunk=4)
    assert not torch.equal(same, value)
    torch.manual_seed(5)
    one = topk.linear_loss(loss, features, weight, torch.zeros(40, dtype=torch.int64), chunk=4)
    torch.manual_seed(5)
    torch.testing.assert_close(
        one, topk.linear_loss(loss, features, weight, torch.zeros(40, dtype=torch.int64), chunk=4)
    )


def test_torch_func_and_the_compiler_hold_the_scores() -> None:
    loss, (features, weight, bias), target = CRITERIA["smooth"], layer(), targets()
    found = torch.func.grad(lambda w: fused(loss, features, w, target, bias))(weight)
    expected = torch.autograd.grad(unfused(loss, features, weight, target, bias), weight)[0]
    torch.testing.assert_close(found, expected)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(loss, features, weight, target, bias), fused(loss, features, weight, target, bias)
    )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_torchs_operator(smoothing: float) -> None:
    loss, inputs, target = nn.CrossEntropyLoss(label_smoothing=smoothing), layer(), targets()
    found = topk.linear_loss(loss, *inputs[:2], target, bias=inputs[2], by_torch=True)
    torch.testing.assert_close(found, fused(loss, *inputs[:2], target, inputs[2]))


def test_few_scores_of_cross_entropy_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where a row is ignored, which may hold anything, or a target is wrong, which is an error of ours."""
    loss, (features, weight, bias) = nn.CrossEntropyLoss(), layer()
    target = targets().clamp(min=0)
    expected = with_gradients(unfused(loss, features, weight, target, bias), (features, weight, bias), torch.ones(1))
    with monkeypatch.context() as patch:
        patch.setattr("topk.linear.LinearLoss.apply", None)
        value = topk.linear_loss(loss, features, weight, target, bias=bias)
    found = with_gradients(value, (features, weight, bias), torch.ones(1))
    torch.testing.assert_close(found, expected)
    target[2], features = -100, features.detach().clone()
    features[2] = torch.nan
    value = topk.linear_loss(loss, features, weight, target, bias=bias)
    slopes = torch.autograd.grad(value, (weight, bias))
    assert value.isfinite()
    assert all(bool(slope.isfinite().all()) for slope in slopes)


def test_module() -> None:
    module = topk.LinearTopKLoss(CRITERIA["smooth"], FEATURES, CLASSES, chunk=4).double()
    features, target = layer()[0], targets()
    torch.testing.assert_close(module(features, target), module.loss(module.scores(features), target))
    again = pickle.loads(pickle.dumps(module))
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(features, target), module(features, target))
    assert {*module.state_dict()} == {"linear.weight", "linear.bias"}
    cosine = topk.LinearTopKLoss(CRITERIA["smooth"], FEATURES, CLASSES, cosine_scale=9.0).double()
    torch.testing.assert_close(cosine(features, target), cosine.loss(cosine.scores(features), target))
    assert cosine.scores(features).abs().max() <= 9.0


@pytest.mark.parametrize("name", ["smooth", "transition", "hinge, calibrated", "odd_even"])
def test_the_scores_are_never_held(name: str) -> None:
    rows, classes, chunk = 2048, 4000, 128
    features, weight = torch.randn(rows, 8), torch.randn(classes, 8, requires_grad=True)
    target = torch.randint(classes, (rows,))

    def work(fused: bool, chunk: int = chunk) -> tuple[Tensor, ...]:
        loss = CRITERIA[name]
        if fused:
            value = topk.linear_loss(loss, features, weight, target, chunk=chunk)
        else:
            value = loss(F.linear(features, weight), target)
        return torch.autograd.grad(value, weight)

    chunk_bytes = 4 * chunk * classes
    assert peak_temporaries(lambda: work(True)) < 5 * chunk_bytes
    held = peak_temporaries(lambda: work(False))
    assert held > 16 * chunk_bytes
    assert peak_temporaries(lambda: work(True, rows)) < 1.1 * held  # one chunk of all rows


def test_errors_name_the_argument() -> None:
    loss, (features, weight, bias), target = CRITERIA["smooth"], layer(), targets()
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "loss must be a loss module", {"loss": nn.MSELoss()}),
        (TypeError, "features must be a Tensor", {"features": 3}),
        (ValueError, r"weight must have shape \(classes, features\)", {"weight": weight[0]}),
        (ValueError, r"features must have shape \(..., 6\)", {"features": features[:, :4]}),
        (ValueError, "target must have shape", {"target": target[:4]}),
        (ValueError, r"bias must have shape \(13,\)", {"bias": bias[:4]}),
        (ValueError, "chunk must be at least 1", {"chunk": 0}),
        (ValueError, "cosine_scale must be a finite number > 0", {"cosine_scale": 0.0, "bias": None}),
        (ValueError, "bias must be None", {"cosine_scale": 1.0}),
        (ValueError, "by_torch must be False", {"by_torch": True}),
        (ValueError, "k must be at most the number of classes", {"loss": topk.SmoothTopKLoss(14)}),
        (ValueError, "target must hold class indices from 0 to 12", {"target": target + 1}),
        (ValueError, "transition must not be a function", {"loss": topk.TransitionTopKLoss(3, transition=torch.tanh)}),
        (ValueError, "transition='accuracy'", {"loss": topk.TransitionTopKLoss(3, transition="accuracy")}),
        (
            ValueError,
            "label_smoothing and weight",
            {"loss": nn.CrossEntropyLoss(weight=torch.ones(13), label_smoothing=0.1)},
        ),
    ]
    target = target.clamp(min=0)
    target[3] = 12
    for kind, message, changes in cases:
        given = {"loss": loss, "features": features, "weight": weight, "target": target, "bias": bias, **changes}
        if "target" in changes and len(changes["target"]) == ROWS:
            given["target"] = target + 1
        with pytest.raises(kind, match=message):
            topk.linear_loss(**given)
