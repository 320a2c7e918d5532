"""What every loss promises, whatever its mathematics: one test a promise, for the losses in `contract.py`."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import (
    CASES,
    CLASSES,
    NOISE,
    Case,
    batch,
    every_function,
    every_function_with_k,
    every_loss,
    every_loss_and_noise,
    every_loss_with_k,
    every_table,
    value_and_gradient,
)
from torch import Tensor, nn
from torch.utils import _device

import topk
from topk import _cpu

# --- shapes, weights, reductions -------------------------------------------------------------------------------------


@every_loss
def test_shapes(loss: Case) -> None:
    scores, target = torch.randn(4, CLASSES, 2, 3, dtype=torch.float64), torch.randint(CLASSES, (4, 2, 3))
    values, gradients = value_and_gradient(loss, scores, target, reduction="none")
    assert values.shape == target.shape
    assert gradients.shape == scores.shape
    for i, j, k in ((0, 0, 0), (3, 1, 2), (2, 0, 1)):
        value, gradient = value_and_gradient(loss, scores[i, :, j, k], target[i, j, k], reduction="none")
        assert value.shape == ()
        torch.testing.assert_close(value, values[i, j, k], rtol=loss.precision, atol=loss.precision)
        torch.testing.assert_close(gradient, gradients[i, :, j, k], rtol=loss.precision, atol=loss.precision)
    rows = scores.movedim(1, -1).reshape(-1, CLASSES)
    torch.testing.assert_close(loss(scores, target), loss(rows, target.reshape(-1)))


@every_loss
def test_reductions_weights_and_ignored_rows(loss: Case) -> None:
    scores, target = batch()
    target[[1, 4]] = -1
    scores[1] = torch.nan  # an ignored row may hold anything
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.1
    used = target != -1
    alone = loss(scores[used], target[used], reduction="none")
    share = weight[target[used]]
    tail = {"ignore_index": -1}
    values, gradients = value_and_gradient(loss, scores, target, reduction="none", **tail)
    torch.testing.assert_close(values[used], alone)
    assert (values[~used] == 0).all()
    assert (gradients[~used] == 0).all()
    torch.testing.assert_close(loss(scores, target, **tail), alone.mean())
    torch.testing.assert_close(loss(scores, target, reduction="sum", **tail), alone.sum())
    weighted = loss(scores, target, weight=weight, reduction="none", **tail)
    torch.testing.assert_close(weighted[used], alone * share)
    torch.testing.assert_close(loss(scores, target, weight=weight, **tail), (alone * share).sum() / share.sum())
    torch.testing.assert_close(loss(scores, target, weight=weight, reduction="sum", **tail), (alone * share).sum())
    _, gradients = value_and_gradient(loss, scores, target, weight=weight, **tail)
    assert (gradients[~used] == 0).all()
    assert gradients.isfinite().all()


@every_loss_and_noise
def test_nothing_to_average(loss: Case) -> None:
    for rows in (0, 3):
        scores, target = torch.randn(rows, CLASSES, requires_grad=True), torch.full((rows,), -100)
        assert loss(scores, target).isnan()
        assert loss(scores, target, reduction="sum") == 0
        assert loss(scores, target, reduction="none").shape == (rows,)
        (gradient,) = torch.autograd.grad(loss(scores, target, reduction="sum"), scores)
        assert gradient.shape == scores.shape
        assert (gradient == 0).all()


@every_loss_with_k
def test_every_guess_is_right_when_k_is_the_number_of_classes(loss: Case) -> None:
    if loss.function is topk.autkc_loss:
        pytest.skip("it averages over fewer guesses too")
    scores, target = batch()
    enough = {"m": CLASSES} if "m" in loss.keywords else {}
    value, gradient = value_and_gradient(loss, scores, target, k=CLASSES, **enough)
    assert value == 0
    assert (gradient == 0).all()
    value, gradient = value_and_gradient(loss, scores, target, k=CLASSES - 1, **enough)
    assert value.isfinite()
    assert gradient.isfinite().all()


# --- types and memory layouts ----------------------------------------------------------------------------------------


@every_loss_and_noise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(loss: Case, dtype: torch.dtype) -> None:
    """The loss of half types is float32's on the same numbers; the gradient is float32's, rounded once."""
    scores, target = batch(dtype=dtype)
    value, gradient = value_and_gradient(loss, scores, target, reduction="none")
    wide_value, wide_gradient = value_and_gradient(loss, scores.float(), target, reduction="none")
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(value, wide_value)
    assert torch.equal(gradient, wide_gradient.to(dtype))


@every_function
def test_targets_of_any_integer_type(loss: Case) -> None:
    """Nor do the narrow ones wrap: in uint8 -100 is 156, and 257 is 1."""
    scores, target = batch()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        torch.testing.assert_close(
            value_and_gradient(loss, scores, target.to(dtype)), value_and_gradient(loss, scores, target)
        )
    scores, target = torch.randn(4, 200, dtype=torch.float64), torch.tensor([156, 156, 3, 1])
    weight = torch.rand(200, dtype=torch.float64)
    for keywords in ({}, {"weight": weight}, {"ignore_index": 257}, {"ignore_index": 257, "weight": weight}):
        for reduction in ("mean", "none"):
            found = loss(scores, target.to(torch.uint8), reduction=reduction, **keywords)
            assert torch.equal(found, loss(scores, target, reduction=reduction, **keywords))


@every_loss_with_k
def test_a_k_of_weight_zero_does_not_count(loss: Case) -> None:
    scores, target = batch()
    scores[1, int(target[1])] = -torch.inf
    only, with_others = {3: 1.0}, {5: 0.0, 3: 1.0, 1: 0.0}
    expected = value_and_gradient(loss, scores, target, k=only, reduction="none")
    found = value_and_gradient(loss, scores, target, k=with_others, reduction="none")
    assert expected[0][1] == torch.inf
    torch.testing.assert_close(found, expected)


@every_loss_and_noise
def test_row_gradients_of_any_kind(loss: Case) -> None:
    scores, target = batch()
    _, per_row = value_and_gradient(loss, scores, target, reduction="none")
    for grad in (torch.randn(6, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64).expand(6)):
        torch.manual_seed(3)
        scores.requires_grad_()
        value = loss(scores, target, reduction="none")
        (gradient,) = torch.autograd.grad(value, scores, grad)
        torch.testing.assert_close(gradient, grad[:, None] * per_row)


@every_loss_and_noise
def test_scores_with_any_strides(loss: Case) -> None:
    scores, target = batch()
    expected = value_and_gradient(loss, scores, target)
    wide = torch.zeros(12, 2 * CLASSES, dtype=torch.float64)
    wide[::2, ::2] = scores
    for other in (scores.T.contiguous().T, wide[::2, ::2]):
        assert not other.is_contiguous()
        torch.testing.assert_close(value_and_gradient(loss, other, target), expected)
    row = scores[:1].expand(6, CLASSES)
    torch.testing.assert_close(
        value_and_gradient(loss, row, target), value_and_gradient(loss, row.contiguous(), target)
    )


@every_loss_and_noise
def test_inputs_are_left_alone(loss: Case) -> None:
    scores, target = batch()
    before = scores.clone(), target.clone()
    value_and_gradient(loss, scores, target)
    assert torch.equal(scores, before[0])
    assert torch.equal(target, before[1])


# --- broken and extreme rows -----------------------------------------------------------------------------------------


@every_loss_and_noise
def test_broken_rows_stay_alone(loss: Case) -> None:
    scores, target = batch()
    clean = scores.clone()
    scores[0, 7], scores[2, int(target[2])], scores[4, 9] = torch.nan, torch.nan, torch.inf
    values, gradients = value_and_gradient(loss, scores, target, reduction="none")
    broken = torch.tensor([True, False, True, False, True, False])
    assert values[broken].isnan().all()
    assert gradients[broken].isnan().any(1).all()
    assert gradients[~broken].isfinite().all()
    if loss is not NOISE:
        expected = value_and_gradient(loss, clean, target, reduction="none")
        torch.testing.assert_close(values[~broken], expected[0][~broken])
        torch.testing.assert_close(gradients[~broken], expected[1][~broken])


@every_loss_and_noise
def test_masked_classes(loss: Case) -> None:
    """-inf scores get no gradient; with the target itself masked the loss is +inf, as in cross-entropy."""
    scores, target = batch()
    scores[:, 11:] = -torch.inf
    target = target % 11
    values, gradients = value_and_gradient(loss, scores, target, reduction="none")
    assert values.isfinite().all()
    assert gradients.isfinite().all()
    assert (gradients[:, 11:] == 0).all()
    target[3] = 12
    values, gradients = value_and_gradient(loss, scores, target, reduction="none")
    assert values[3] == torch.inf
    assert values[[0, 1, 2, 4, 5]].isfinite().all()
    assert gradients.isfinite().all()
    assert (gradients[:, 11:] == 0).all()


@every_loss
def test_huge_and_tiny_scores(loss: Case) -> None:
    for scale in (1e-30, 1e-4, 1e4, 1e30):
        scores, target = batch(dtype=torch.float32)
        value, gradient = value_and_gradient(loss, scores * scale, target)
        assert value.isfinite()
        assert gradient.isfinite().all()


# --- torch's machinery -----------------------------------------------------------------------------------------------


@every_loss
def test_derivatives(loss: Case) -> None:
    scores, target = batch(3)
    scores.requires_grad_()
    if loss.function is topk.transition_topk_loss and "transition" not in loss.keywords:
        pytest.skip("its field is not a gradient: the weight of the grouped part is held fixed")
    if loss.function is topk.softmax_at_k_loss:
        pytest.skip("its field is not a gradient: the border is held fixed")
    if loss.keywords.get("method") == "sinkhorn":
        pytest.skip("to the solver's tolerance: see test_differentiable.py")

    def value(x: Tensor) -> Tensor:
        return loss(x, target, reduction="none")

    # Along random directions: every single slope is compared with the definition in the loss's own tests.
    assert torch.autograd.gradcheck(value, scores, check_forward_ad=True, fast_mode=True)
    if not loss.kinked:
        assert torch.autograd.gradgradcheck(value, scores, check_fwd_over_rev=True, fast_mode=True)


@every_loss
def test_functional_transforms(loss: Case) -> None:
    scores, target = batch(2)
    _, expected = value_and_gradient(loss, scores, target, reduction="none")
    per_row = torch.func.vmap(torch.func.grad(lambda x, y: loss(x, y)))(scores, target)
    torch.testing.assert_close(per_row, expected)
    two = torch.stack((scores, scores + 0.1))
    both = torch.func.vmap(lambda x: loss(x, target, reduction="none"))(two)
    torch.testing.assert_close(both[0], loss(two[0], target, reduction="none"))
    torch.testing.assert_close(both[1], loss(two[1], target, reduction="none"))
    hessian, direction = torch.func.hessian(lambda x: loss(x, target))(scores), torch.randn_like(scores)
    torch.testing.assert_close((hessian * direction).sum((2, 3)), _curvature(loss, scores, target, direction))
    if not loss.kinked:
        assert hessian.abs().max() > 1e-8


def _curvature(loss: Case, scores: Tensor, target: Tensor, direction: Tensor) -> Tensor:
    """The Hessian of the loss times a direction."""
    scores = scores.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(scores, target), scores, create_graph=True)
    return torch.autograd.grad((gradient * direction).sum(), scores)[0]


@every_loss
def test_second_derivatives_of_ignored_rows_are_zero(loss: Case) -> None:
    scores, target = batch()
    used = torch.tensor([True, False, True, False, True, True])
    scores[1], scores[3, 2] = torch.nan, torch.inf
    target[~used] = -100
    direction = torch.randn_like(scores)
    found = _curvature(loss, scores, target, direction)
    assert (found[~used] == 0).all()
    torch.testing.assert_close(found[used], _curvature(loss, scores[used], target[used], direction[used]))


@every_loss
def test_second_derivatives_far_from_zero(loss: Case) -> None:
    scores, target = batch(dtype=torch.float32)
    direction = torch.randn_like(scores)
    expected = _curvature(loss, scores.double().add(4096.0).float().double() - 4096.0, target, direction.double())
    found = _curvature(loss, scores.double().add(4096.0).float(), target, direction)
    assert (found - expected).abs().max() <= 2e-4 * max(1e-3, expected.abs().max())


@every_function
def test_traces_and_linearizes(loss: Case) -> None:
    scores, target = batch()
    value, gradient = value_and_gradient(loss, scores, target)
    direction = torch.randn_like(scores)
    linear_value, push = torch.func.linearize(lambda x: loss(x, target), scores)
    torch.testing.assert_close(linear_value, value)
    torch.testing.assert_close(push(direction), (gradient * direction).sum(), rtol=1e-5, atol=1e-7)


@every_loss_and_noise
def test_another_default_device(loss: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores stay where they are, and so do the work spaces that a thread keeps; modules and shapes need no numbers."""
    monkeypatch.undo()  # torch does not know the poisoned functions as makers of tensors
    _device._device_constructors.cache_clear()
    for classes in (CLASSES, 2500):
        scores, target = torch.randn(3, classes), torch.arange(3)
        expected = value_and_gradient(loss, scores, target)
        _cpu._kept.__dict__.clear()
        with torch.device("meta"):
            found = value_and_gradient(loss, scores, target)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(value_and_gradient(loss, scores, target), expected)
    with torch.device("meta"):
        loss.module(**loss.keywords)
        scores = torch.empty(3, CLASSES)
        shapes = value_and_gradient(loss, scores, torch.zeros(3, dtype=torch.int64))
    assert shapes[0].is_meta
    assert shapes[1].shape == scores.shape


def _of_each(losses: list[Case], change: Any) -> Any:
    """A function of scores (losses, rows, classes): one graph for all losses, and their gradients apart."""
    return lambda x, y: torch.stack([loss(change(each), y) for loss, each in zip(losses, x, strict=True)])


@every_table
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiles_in_one_piece(losses: list[Case], backend: str) -> None:
    torch._dynamo.reset()
    scores, target = batch()
    scores = scores.expand(len(losses), -1, -1)
    each = _of_each(losses, lambda x: x)
    compiled = torch.compile(each, fullgraph=True, backend=backend)
    found, expected = (value_and_gradient(loss, scores, target) for loss in (compiled, each))
    for place, loss in enumerate(losses):  # a compiled iteration takes all its steps, an eager one stops before
        near = {"rtol": loss.precision, "atol": loss.precision}
        torch.testing.assert_close([part[place] for part in found], [part[place] for part in expected], **near)


@pytest.mark.parametrize("recording", [True, False])
def test_compiles_where_no_gradient_is_wanted(recording: bool) -> None:
    torch._dynamo.reset()
    scores, target = batch()
    compiled = torch.compile(lambda x, y: topk.smooth_topk_loss(x, y, 3), fullgraph=True, backend="aot_eager")
    expected = topk.smooth_topk_loss(scores, target, 3)
    with torch.set_grad_enabled(recording):
        torch.testing.assert_close(compiled(scores.detach().requires_grad_(not recording), target), expected.detach())


@pytest.mark.slow
@every_table
def test_compiles_with_inductor(losses: list[Case]) -> None:
    torch._dynamo.reset()
    losses = [loss for loss in losses if loss is not NOISE]
    scores, target = batch(dtype=torch.float32)
    scores = scores.expand(len(losses), -1, -1)
    network = nn.Linear(CLASSES, CLASSES)
    each = _of_each(losses, lambda x: network(x).tanh())
    compiled = torch.compile(each, fullgraph=True)
    found, expected = value_and_gradient(compiled, scores, target), value_and_gradient(each, scores, target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_function
def test_autocast(loss: Case) -> None:
    scores, target = batch(dtype=torch.float32)
    network = nn.Linear(CLASSES, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(scores)
        value = loss(output, target)
    assert output.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(output.float(), target))
    value.backward()
    assert network.weight.grad is not None
    assert network.weight.grad.isfinite().all()


# --- modules ---------------------------------------------------------------------------------------------------------


@every_loss_and_noise
def test_modules_are_shells(loss: Case) -> None:
    scores, target = batch()
    weight = torch.rand(CLASSES, dtype=torch.float64)
    tail = {"ignore_index": int(target[0]), "reduction": "sum"}
    module = loss.module(**loss.keywords, weight=weight, **tail)
    expected = value_and_gradient(loss, scores, target, weight=weight, **tail)
    torch.testing.assert_close(value_and_gradient(module, scores, target), expected)
    twins = [pickle.loads(pickle.dumps(module)), copy.deepcopy(module)]
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    twins.append(loss.module(**loss.keywords, weight=torch.ones_like(weight), **tail))
    twins[-1].load_state_dict(torch.load(stream, weights_only=True))
    for twin in twins:
        torch.testing.assert_close(value_and_gradient(twin, scores, target), expected)
        assert repr(twin) == repr(module)
    assert "weight=Tensor(13,)" in repr(module)
    assert f"ignore_index={int(target[0])}" in repr(module)
    assert module.to(torch.float32).weight.dtype == torch.float32
    assert module.to("meta").weight.device.type == "meta"


@every_function
def test_modules_have_the_functions_keywords(loss: Case) -> None:
    of_function = list(inspect.signature(loss.function).parameters.values())[2:]
    of_module = [p for p in inspect.signature(loss.module).parameters.values() if p.name != "momentum"]
    assert [(p.name, p.kind, p.default) for p in of_module] == [(p.name, p.kind, p.default) for p in of_function]


# --- bad arguments ---------------------------------------------------------------------------------------------------

GOOD = (torch.randn(4, CLASSES), torch.arange(4))


@every_function
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": [[1.0]]}, TypeError, "scores must be a Tensor, got list"),
        ({"scores": torch.ones(4, CLASSES, dtype=torch.int64)}, TypeError, "scores must be float32.*torch.int64"),
        ({"scores": torch.tensor(1.0)}, ValueError, "scores must have shape.*scalar"),
        ({"target": 3}, TypeError, "target must be a Tensor.*got int"),
        ({"target": torch.rand(4)}, TypeError, "target must hold class indices.*torch.float32"),
        ({"target": torch.rand(4, CLASSES)}, ValueError, "target must hold probabilities"),
        ({"target": torch.arange(5)}, ValueError, r"target must have shape \(4,\).*got \(5,\)"),
        ({"target": torch.tensor([0, 1, CLASSES, 2])}, ValueError, "target must hold.*0 to 12.*got 13 at position 2"),
        ({"target": torch.tensor([0, -1, 1, 2])}, ValueError, "target must hold.*got -1 at position 1"),
        ({"weight": torch.ones(CLASSES + 1)}, ValueError, r"weight must have shape \(13,\).*got \(14,\)"),
        ({"weight": torch.ones(CLASSES, dtype=torch.int64)}, TypeError, "weight must have a floating-point type"),
        ({"weight": [1.0] * CLASSES}, TypeError, "weight must be a Tensor.*got list"),
        ({"reduction": "average"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'average'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of None, 'torch', 'compiled', 'triton', got 'cuda'"),
        (
            {"backend": "triton", "scores": GOOD[0].double()},
            RuntimeError,
            "backend='triton' cannot run: .*(float64|no Triton kernel)",
        ),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    ],
)
def test_bad_arguments(loss: Case, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"scores": GOOD[0], "target": GOOD[1], **loss.keywords, **change}
    with pytest.raises(error, match=message):
        loss.function(**arguments)


@every_function_with_k
@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k must be at least 1, got 0"),
        (-2, ValueError, "k must be at least 1, got -2"),
        (CLASSES + 1, ValueError, "k must be at most .*13.*got 14"),
        (2.0, TypeError, "k must be an int or a mapping.*got 2.0 of type float"),
        (True, TypeError, "k must be an int.*got True"),
        ("5", TypeError, "k must be an int.*got '5'"),
        ({}, ValueError, "k as a mapping must name"),
        ({1: 0.5, 2: 0.4}, ValueError, "weights of k must sum to 1.*0.9"),
        ({1: 1.5, 2: -0.5}, ValueError, r"k must map to finite weights >= 0, got k\[2\] = -0.5"),
        ({1: math.nan}, ValueError, "k must map to finite weights"),
        ({1: "all"}, TypeError, r"k must map to real weights, got k\[1\] = 'all'"),
        ({1.0: 1.0}, TypeError, "k must be an int or a mapping.*got 1.0"),
        ({CLASSES + 1: 1.0}, ValueError, "k must be at most"),
    ],
)
def test_bad_k(loss: Case, k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(*GOOD, k=k)
    if not (isinstance(k, int) and k > CLASSES) and k != {CLASSES + 1: 1.0}:
        with pytest.raises(error, match=message):
            loss.module(**{**loss.keywords, "k": k})


def test_numbers_of_numpy_are_numbers() -> None:
    scores, target = batch()
    plain = topk.smooth_topk_loss(scores, target, 3, tau=0.5, ignore_index=2)
    assert topk.smooth_topk_loss(scores, target, np.int64(3), tau=np.float32(0.5), ignore_index=np.int32(2)) == plain
    relaxed = topk.differentiable_topk_loss(scores, target, {np.int64(3): np.float64(1.0)}, m=np.int64(6))
    assert relaxed == topk.differentiable_topk_loss(scores, target, 3, m=6)


SPECIFIC = [
    ("smooth", {"tau": 0.0}, ValueError, "tau must be a finite number > 0, got 0.0"),
    ("smooth", {"tau": -1.0}, ValueError, "tau must be a finite number > 0, got -1.0"),
    ("smooth", {"tau": math.inf}, ValueError, "tau must be a finite number > 0, got inf"),
    ("smooth", {"tau": "1"}, TypeError, "tau must be a number, got '1'"),
    ("smooth", {"margin": -0.1}, ValueError, "margin must be a finite number >= 0, got -0.1"),
    ("transition", {"transition": "linear"}, ValueError, "transition"),
    ("transition", {"transition": 1.5}, ValueError, "transition.*1.5"),
    ("transition", {"width": 0.0}, ValueError, "width must be a finite number > 0, got 0.0"),
    ("transition", {"label_smoothing": 1.1}, ValueError, "label_smoothing must be a finite number.*got 1.1"),
    ("noised, exact", {"epsilon": -1.0}, ValueError, "epsilon must be a finite number >= 0, got -1.0"),
    ("noised, exact", {"samples": 0}, ValueError, "samples must be at least 1, got 0"),
    ("noised, exact", {"samples": 2.5}, TypeError, "samples must be an int.*got 2.5"),
    ("noised, exact", {"margins": torch.ones(3)}, ValueError, r"margins must have shape \(13,\).*got \(3,\)"),
    ("noised, exact", {"scale": 0.0}, ValueError, "scale must be a finite number > 0, got 0.0"),
    ("noised, exact", {"generator": 3}, TypeError, "generator must be a torch.Generator.*got int"),
    ("odd_even", {"method": "bubble"}, ValueError, "method must be one of 'odd_even'.*got 'bubble'"),
    ("odd_even", {"distribution": "normal"}, ValueError, "distribution must be one of .*got 'normal'"),
    ("odd_even", {"top1": "smce"}, ValueError, "top1 must be one of 'softmax', 'cross_entropy', 'sort', got 'smce'"),
    ("odd_even", {"inverse_temperature": 0.0}, ValueError, "inverse_temperature must be .*> 0, got 0.0"),
    ("odd_even", {"m": 2}, ValueError, "k.*m"),
    ("odd_even", {"m": 4.0}, TypeError, "m must be an int.*got 4.0"),
    ("hinge, alpha", {"variant": "gamma"}, ValueError, "variant must be one of .*got 'gamma'"),
    ("hinge, alpha", {"margin": -1.0}, ValueError, "margin must be a finite number >= 0, got -1.0"),
    ("ldam", {"margins": torch.ones(3)}, ValueError, r"margins must have shape \(13,\).*got \(3,\)"),
    ("ldam", {"scale": -1.0}, ValueError, "scale must be a finite number > 0, got -1.0"),
    ("hinge, beta_smooth", {"smoothing": 0.0}, ValueError, "smoothing must be a finite number > 0, got 0.0"),
    ("autkc", {"surrogate": "linear"}, ValueError, "surrogate must be one of 'exponential', .*got 'linear'"),
    ("ldr", {"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
    ("ldr", {"alpha": 1.0}, ValueError, "alpha must be a finite number > 1, got 1.0"),
    ("softmax_at_k", {"weight_temperature": 0.0}, ValueError, "weight_temperature must be .* > 0, got 0.0"),
    ("focal", {"gamma": -1.0}, ValueError, "gamma must be a finite number >= 0, got -1.0"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), SPECIFIC)
def test_bad_keywords(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    loss = CASES[name]
    with pytest.raises(error, match=message):
        loss(*GOOD, **change)
    if "m" not in change and not isinstance(change.get("margins"), Tensor):
        with pytest.raises(error, match=message):
            loss.module(**{**loss.keywords, **change})


def test_cross_entropy_is_among_them() -> None:
    """Three of the losses are cross-entropy at one setting, weights, ignored rows and all."""
    scores, target = batch()
    target[2] = -100
    tail = {"weight": torch.rand(CLASSES, dtype=torch.float64), "ignore_index": -100}
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(scores, target, reduction=reduction, **tail)
        for value in (
            topk.smooth_topk_loss(scores, target, 1, margin=0.0, reduction=reduction, **tail),
            topk.transition_topk_loss(scores, target, 3, transition=0.0, reduction=reduction, **tail),
            topk.focal_loss(scores, target, gamma=0.0, reduction=reduction, **tail),
        ):
            torch.testing.assert_close(value, expected)
