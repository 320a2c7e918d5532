"""Which backend runs, why another one cannot, and the kernels behind autograd, vmap and the compiler."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_cases import random_scores
from torch import Tensor

from topk import backend, focal_loss, kernels, topk_hinge_loss, transition_topk_loss
from topk.__main__ import report

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # numpy's, about what is masked afterwards
    pytest.mark.skipif(torch.cuda.is_available(), reason="plays a machine without a GPU"),
    pytest.mark.skipif(backend._missing_triton() is not None, reason=f"needs the kernels: {backend._missing_triton()}"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _fresh_verdicts() -> Iterator[None]:
    backend._self_check.cache_clear()
    yield
    backend._self_check.cache_clear()


def test_nobody_gets_the_interpreter_without_asking() -> None:
    assert backend.choose(None, CPU, torch.float32, "hinge") == "torch"
    assert backend.choose("triton", CPU, torch.float32, "hinge") == "triton"
    assert backend.choose("torch", CPU, torch.float32, "hinge") == "torch"
    assert backend.choose(None, CUDA, torch.float32, "hinge") == "torch"  # while TRITON_INTERPRET is set


@pytest.mark.parametrize(
    ("scores", "loss", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.float64), topk_hinge_loss, "compute in float32.*float64"),
        (torch.zeros(2, 9), focal_loss, "focal has no Triton kernel"),
    ],
)
def test_what_kernels_do_not_serve(scores: Tensor, loss: Any, message: str) -> None:
    target = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run: .*{message}"):
        loss(scores, target, backend="triton")
    assert loss(scores, target).isfinite()


def test_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "on cpu" in str(backend.why_not_triton(CPU))
    with pytest.raises(RuntimeError, match=r"cannot run: .*CUDA device .*TRITON_INTERPRET=1.* on cpu"):
        topk_hinge_loss(torch.zeros(2, 9), torch.tensor([0, 1]), backend="triton")


def test_triton_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend._missing_triton.__wrapped__() == "triton is not installed"
    monkeypatch.setattr(backend, "_missing_triton", backend._missing_triton.__wrapped__)
    assert backend.why_not_triton(CPU) == "triton is not installed"


def test_triton_may_be_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch 2.6 and 2.7 bring cannot compile the kernels: the torch path has to serve their users."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(backend, "_missing_triton", backend._missing_triton.__wrapped__)
    for version in ("3.2.0", "3.3.1"):
        monkeypatch.setattr(triton, "__version__", version)
        assert backend.why_not_triton(CPU) == f"triton {version} is installed, and the kernels need 3.4 or newer"
        with pytest.raises(RuntimeError, match=r"cannot run: triton 3\.\d\.\d is installed"):
            topk_hinge_loss(torch.zeros(2, 9), torch.tensor([0, 1]), backend="triton")
    for version in ("3.4.0", "3.10.1+git0", "4.0.0"):
        monkeypatch.setattr(triton, "__version__", version)
        assert backend._missing_triton() is None


# --- by capability ---------------------------------------------------------------------------------------------------


@pytest.fixture
def old_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device of capability 7.5 whose tensors lie on the CPU, and no interpreter to be seen."""
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    agrees = backend._agrees
    monkeypatch.setattr(backend, "_agrees", lambda name, device, dtype: agrees(name, CPU, dtype))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Hinge kernels that forget the margin."""
    hinge = kernels.of("hinge")
    forward = hinge.forward
    monkeypatch.setattr(
        hinge, "forward", lambda s, t, options, i: forward(s, t, options._replace(margin=options.margin - 0.5), i)
    )
    return hinge


def test_a_new_device_is_trusted(old_device: None, broken: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend.choose(None, CUDA, torch.bfloat16, "hinge") == "triton"
    assert backend.choose(None, CUDA, torch.float64, "hinge") == "torch"
    assert backend.choose(None, CUDA, torch.float32, "ldam") == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_old_device_that_passes_is_used(dtype: torch.dtype, old_device: None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch path")
        assert backend.choose(None, CUDA, dtype, "transition") == "triton"
    assert backend.choose("triton", CUDA, dtype, "transition") == "triton"


def test_an_old_device_that_fails_gets_the_torch_path_and_one_warning(old_device: None, broken: ModuleType) -> None:
    with pytest.warns(RuntimeWarning, match="the hinge kernels give other results.*the torch path serves cuda:0"):
        assert backend.choose(None, CUDA, torch.float32, "hinge") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose(None, CUDA, torch.float32, "hinge") == "torch"
        with pytest.raises(RuntimeError, match=r"cannot run: on cuda:0, of capability 7\.5, the hinge kernels give"):
            backend.choose("triton", CUDA, torch.float32, "hinge")
    assert backend.choose(None, CUDA, torch.float32, "transition") == "triton"


def test_an_old_device_whose_compiler_fails(old_device: None, broken: ModuleType, monkeypatch: Any) -> None:
    monkeypatch.delattr(broken, "forward")
    with pytest.warns(RuntimeWarning, match="the hinge kernels failed with AttributeError"):
        assert backend.choose(None, CUDA, torch.float32, "hinge") == "torch"


# --- the kernels behind everything that torch offers -----------------------------------------------------------------

LOSSES = [
    pytest.param(transition_topk_loss, {"k": {1: 0.5, 3: 0.5}, "label_smoothing": 0.1}, id="transition"),
    pytest.param(topk_hinge_loss, {"k": 3, "variant": "entropy"}, id="entropy"),
    pytest.param(topk_hinge_loss, {"k": 3}, id="calibrated"),
]


@pytest.mark.parametrize(("loss", "keywords"), LOSSES)
def test_second_derivatives_are_those_of_the_torch_path(loss: Any, keywords: dict[str, Any]) -> None:
    scores, target = random_scores(3, 7), torch.tensor([1, -100, 6])
    direction = torch.randn(3, 7)

    def derivatives(backend: str, scores: Tensor) -> list[Tensor]:
        def total(x: Tensor) -> Tensor:
            return loss(x, target, reduction="sum", backend=backend, **keywords)

        (slope,) = torch.autograd.grad(total(leaf := scores.clone().requires_grad_()), leaf, create_graph=True)
        curved = torch.autograd.grad((slope * direction.to(slope.dtype)).sum(), leaf)[0] if slope.requires_grad else 0
        hessian = torch.func.hessian(total)(scores)
        along = torch.func.jvp(total, (scores,), (direction.to(scores.dtype),))[1]
        return [slope.detach(), torch.as_tensor(curved), hessian, along]

    ours, expected = derivatives("triton", scores), derivatives("torch", scores.double())
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("loss", "keywords"), LOSSES)
def test_vmap_and_hessians_of_many(loss: Any, keywords: dict[str, Any]) -> None:
    scores, target = random_scores(6, 7).unflatten(0, (3, 2)), torch.randint(7, (3, 2))

    def total(x: Tensor, y: Tensor, backend: str = "triton") -> Tensor:
        return loss(x, y, reduction="sum", backend=backend, **keywords)

    for transform in (torch.func.grad, torch.func.hessian):
        ours = torch.func.vmap(transform(total))(scores, target)
        expected = [transform(total)(x.double(), y, "torch") for x, y in zip(scores, target, strict=True)]
        torch.testing.assert_close(ours.double(), torch.stack(expected), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("loss", "keywords"), LOSSES)
def test_the_compiler_sees_one_graph(loss: Any, keywords: dict[str, Any]) -> None:
    scores, target = random_scores(4, 9).requires_grad_(), torch.randint(9, (4,))

    def call(x: Tensor, y: Tensor) -> Tensor:
        return loss(2.0 * x, y, backend="triton", **keywords)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [(value := f(scores, target), *torch.autograd.grad(value, scores)) for f in (call, compiled)]
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(plain, traced)


def test_the_compiler_follows_a_number_that_changes() -> None:
    scores, target = random_scores(4, 9), torch.randint(9, (4,))
    compiled = torch.compile(
        lambda margin: topk_hinge_loss(scores, target, 3, margin=margin, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    for margin in (1.0, 2.0, 2.5):
        torch.testing.assert_close(compiled(margin), topk_hinge_loss(scores, target, 3, margin=margin))


@pytest.mark.parametrize("name", ["transition", "hinge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_tell_shapes_and_types(name: str, dtype: torch.dtype) -> None:
    scores, target, grad = random_scores(4, 9, dtype), torch.randint(9, (4,)), torch.ones(4)
    for tensors, options in kernels.of(name).examples(4, 9, CPU):
        numbers = [option for option in options if isinstance(option, float)]
        others = json.dumps(["a number" if isinstance(option, float) else option for option in options])
        call = (name, others, numbers, -100)
        forward = (*call, scores, target, list(tensors))
        torch.library.opcheck(torch.ops.topk.kernel_loss.default, forward, test_utils="test_faketensor")
        _, *saved = torch.ops.topk.kernel_loss(*forward)
        backward = (*call, grad, scores, target, list(tensors), saved)
        torch.library.opcheck(torch.ops.topk.kernel_gradient.default, backward, test_utils="test_faketensor")


def test_the_report_says_why_not() -> None:
    assert "triton        no: torch sees no CUDA device; interpreted on the CPU where it is asked for" in report()
