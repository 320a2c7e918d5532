"""Who runs: our losses on every backend, the peers' packages, cross-entropy, and plain copies as the floor.

A contender is built for a setting and a device, and then called with scores and target; it returns a scalar loss.
`gate` compares loss and gradient on a small problem with the loss's definition, on the device that is measured, and the
runner prints no number for a contender that fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import topk
from bench import operators
from bench.operators import OPERATORS
from topk import backend
from topk.autograd import Loss
from topk_lab.study.timing import Work

LossCall = Callable[[Tensor, Tensor], Tensor]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BY_DEFINITION = 20_000  # classes; beyond, a gate compares with our float64 path


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
    dtype: str = "float32"
    features: int = 0  # of a last layer before the loss; 0: the scores are given

    def label(self) -> str:
        """A short name for progress bars."""
        kind = "" if self.dtype == "float32" else f" {self.dtype}"
        layer = f"x{self.features}" if self.features else ""
        return f"{self.family} {self.batch}x{self.classes}{layer} k={self.k}{kind}"

    def problem(self, rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Normal scores of the setting's spread, or features, and uniform targets, the same at every call."""
        generator = torch.Generator(device).manual_seed(rows * 1_000_003 + self.classes)
        columns = self.features or self.classes
        scores = torch.randn(rows, columns, generator=generator, device=device) * self.spread
        target = torch.randint(self.classes, (rows,), generator=generator, device=device)
        return scores.to(TYPES[self.dtype]), target

    def weight(self, device: torch.device | str = "cpu") -> Tensor:
        """A last layer's, for which normal features give normal scores."""
        generator = torch.Generator(device).manual_seed(self.classes)
        weight = torch.randn(self.classes, self.features, generator=generator, device=device)
        return weight.div_(math.sqrt(self.features)).to(TYPES[self.dtype]).requires_grad_()


@dataclass(frozen=True)
class Contender:
    """A name, the loss it computes, how to build it, and where it would take too long or does not exist."""

    name: str
    family: str
    build: Callable[[Setting, torch.device], LossCall]
    truth: Callable[[Setting, Tensor, Tensor], Tensor] | None = None
    needs: tuple[str, ...] = ()
    largest: int = 2**62  # elements of the scores times k
    tolerance: float = 1e-4
    averages: int = 1  # losses that draw noise are averaged over this many calls in the gate
    lacks: tuple[str, ...] = ()  # methods of the family that it does not offer
    types: tuple[str, ...] = tuple(TYPES)
    runs_on: Callable[[Setting, torch.device], str | None] = lambda setting, device: None  # a reason why not
    compiled: bool = False
    backward: bool = True
    layer: bool = False  # whether it takes features, and computes the scores itself
    passes: int = 3  # times the bytes of the scores, the least that this work has to move

    def why_not(self, setting: Setting, device: torch.device = torch.device("cpu")) -> str | None:  # noqa: B008
        """None, or the reason why this contender sits this setting out."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        if setting.method in self.lacks:
            return f"{self.name} has no {setting.method} without further packages"
        if setting.dtype not in self.types:
            return f"{self.name} does not take {setting.dtype}"
        cost = setting.batch * setting.classes * setting.k
        if cost > self.largest:
            return f"too slow for a problem of this size ({cost:.2g})"
        if self.compiled and device.type == "cpu" and shutil.which("g++") is None:
            return "torch.compile needs g++ on a CPU"
        return self.runs_on(setting, device)

    def work(self, setting: Setting, scores: Tensor, target: Tensor) -> Work:
        """Forward and backward as one call without arguments, which is what a clock times."""
        call = self.build(setting, scores.device)
        return functools.partial(_gradient, call, scores, target) if self.backward else lambda: call(scores, target)

    def gate(self, setting: Setting, device: torch.device | str = "cpu") -> None:
        """Raises unless the contender computes its loss and its gradient on this device."""
        if self.truth is None:
            return
        device = torch.device(device)
        setting, rows, averages = self._gated(setting, device)
        loss, gradient = expected(self.truth, setting, rows)
        scores, target = setting.problem(rows)
        scores, target = scores.to(device).requires_grad_(), target.to(device)
        call = self.build(setting, device)
        values, slopes = _Mean(), _Mean()
        for _ in range(averages):
            value = call(scores, target)
            slopes.add(torch.autograd.grad(value, scores)[0].double().cpu())
            values.add(value.detach().double().cpu())
        self._compare("loss", setting, values, loss, torch.finfo(value.dtype).eps)
        self._compare("gradient", setting, slopes, gradient, torch.finfo(scores.dtype).eps)

    def _gated(self, setting: Setting, device: torch.device) -> tuple[Setting, int, int]:
        """The problem of the gate: the setting's own classes, so that a kernel's path for long rows is tried too.

        Noise is averaged over many calls; on a CPU that is too slow for long rows.
        """
        rows = min(setting.batch, 16 if device.type == "cuda" else 4)  # 16, like large batches: no other kernel is made
        if self.averages > 1 and device.type == "cpu":
            setting = dataclasses.replace(setting, classes=min(setting.classes, _BY_DEFINITION))
        return setting, rows, self.averages if setting.classes <= 10_000 else min(self.averages, 100)

    def _compare(self, what: str, setting: Setting, found: _Mean, truth: Tensor, eps: float) -> None:
        """The error's length against the truth's, and against the noise of the mean where there is one."""
        error = torch.linalg.vector_norm(found.mean - truth)
        size = torch.linalg.vector_norm(truth)
        allowed = (self.tolerance + 4 * eps) * (size.clamp(min=1) if what == "loss" else 3 * size + 1e-12)
        if found.count > 1:
            allowed = allowed + 6 * found.variance_of_mean.sum().sqrt()
        if not error <= allowed:
            raise AssertionError(
                f"{self.name} is wrong at {setting.label()}: its {what} is off by {error:.3g}, where {allowed:.3g} is "
                f"allowed; it gets no time"
            )


class _Mean:
    """Mean and variance of tensors that come one at a time (Welford): two of them are held, however many come."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros(())

    def add(self, value: Tensor) -> None:
        """One more."""
        self.count += 1
        before = value - self.mean
        self.mean = self.mean + before / self.count
        self._squares = self._squares + before * (value - self.mean)

    @property
    def variance_of_mean(self) -> Tensor:
        """The variance of what came, over their number."""
        return self._squares / ((self.count - 1) * self.count)


def _gradient(call: LossCall, scores: Tensor, target: Tensor) -> Tensor:
    layer = getattr(call, "keywords", {}).get("weight")
    return torch.autograd.grad(call(scores, target), scores if layer is None else (scores, layer))[0]


@functools.lru_cache(maxsize=4)
def expected(truth: Callable[[Setting, Tensor, Tensor], Tensor], setting: Setting, rows: int) -> tuple[Tensor, Tensor]:
    """The mean loss of the gate's problem in float64 and its gradient, of the scores as they were rounded."""
    scores, target = setting.problem(rows)
    exact = scores.double().requires_grad_()
    loss = truth(setting, exact, target)
    (gradient,) = torch.autograd.grad(loss, exact)
    return loss.detach(), gradient


# --- ours ------------------------------------------------------------------------------------------------------------


def _ours(setting: Setting, backend: str | None) -> LossCall:
    """The loss of the setting's family, as a user writes it."""
    match setting.family:
        case "smooth":
            return lambda x, y: topk.smooth_topk_loss(x, y, setting.k, backend=backend)
        case "transition":
            return lambda x, y: topk.transition_topk_loss(x, y, setting.k, backend=backend)
        case "hinge":
            return lambda x, y: topk.topk_hinge_loss(x, y, setting.k, backend=backend)
        case "noised":
            options: dict[str, Any] = {"epsilon": setting.epsilon, "samples": setting.samples}
            return lambda x, y: topk.noised_topk_loss(x, y, setting.k, backend=backend, **options)
        case "differentiable":
            options = {"method": setting.method, "m": setting.m}
            return lambda x, y: topk.differentiable_topk_loss(x, y, setting.k, backend=backend, **options)
    raise ValueError(f"family must be one of smooth, transition, hinge, noised, differentiable, got {setting.family!r}")


RELATIVES: dict[str, Callable[..., Tensor]] = {
    **{
        name: functools.partial(topk.topk_hinge_loss, variant=name)
        for name in ("topk_entropy", "alpha_smooth", "beta_smooth", "polyhedral", "polyhedral_smooth")
    },
    "autkc": topk.autkc_loss,
    "ldr": lambda x, y, k, **tail: topk.ldr_loss(x, y, **tail),
    "adaptive_ldr": lambda x, y, k, **tail: topk.ldr_loss(x, y, alpha=2.0, **tail),
    "softmax_at_k": topk.softmax_at_k_loss,
    "subset_loss": operators.subset_loss,
}
"""The losses of `suites.relatives`, on torch alone, as functions of scores, target and k."""


def _relative(setting: Setting, device: torch.device) -> LossCall:
    return lambda x, y: RELATIVES[setting.family](x, y, setting.k)


def _relative_truth(setting: Setting, scores: Tensor, target: Tensor) -> Tensor:
    """What a tracer is given: the loss's definition."""
    if setting.family == "subset_loss":
        return operators.subset_loss_truth(scores, target, setting.k)
    return torch.compile(_relative(setting, scores.device), backend="eager")(scores, target)


def _torch_path(setting: Setting, device: torch.device) -> LossCall:
    return _ours(setting, "torch")


def _triton_path(setting: Setting, device: torch.device) -> LossCall:
    return _ours(setting, "triton")


def _no_triton(setting: Setting, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "interpreted kernels are for tests"
    return backend.why_not_triton(device, TYPES[setting.dtype], setting.family)


def _compiled(build: Callable[[Setting, torch.device], LossCall]) -> Callable[[Setting, torch.device], LossCall]:
    """torch.compile around the loss, for these shapes."""

    def built(setting: Setting, device: torch.device) -> LossCall:
        return cast(LossCall, torch.compile(build(setting, device), dynamic=False))

    return built


# --- last layers -----------------------------------------------------------------------------------------------------


def criterion(setting: Setting) -> torch.nn.Module:
    """The loss that follows the last layer."""
    modules = {
        "smooth": topk.SmoothTopKLoss,
        "transition": topk.TransitionTopKLoss,
        "hinge": topk.TopKHingeLoss,
        "noised": topk.NoisedTopKLoss,
        "differentiable": topk.DifferentiableTopKLoss,
    }
    return torch.nn.CrossEntropyLoss() if setting.family == "cross_entropy" else modules[setting.family](setting.k)


def _scores_held(setting: Setting, device: torch.device) -> LossCall:
    """F.linear, then the loss."""
    loss = criterion(setting)

    def call(x: Tensor, y: Tensor, *, weight: Tensor) -> Tensor:
        return cast(Tensor, loss(F.linear(x, weight), y))

    return functools.partial(call, weight=setting.weight(device))


def _scores_in_chunks(setting: Setting, device: torch.device) -> LossCall:
    loss = criterion(setting)

    def call(x: Tensor, y: Tensor, *, weight: Tensor) -> Tensor:
        return topk.linear_loss(loss, x, weight, y)

    return functools.partial(call, weight=setting.weight(device))


def _two_processes(setting: Setting, device: torch.device) -> LossCall:
    """Each with half the classes."""
    from bench import partner

    other = partner.partner()

    def call(x: Tensor, y: Tensor, *, weight: Tensor) -> Tensor:
        with other.at_work(setting, x.shape[0]):
            return partner.loss_of_half(setting, x, y, weight)

    return functools.partial(call, weight=partner.half(setting, 0))


def _not_on_two(setting: Setting, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "the two processes share a CPU"
    return "noise of sharded classes is counted, which is slow on a CPU" if setting.family == "noised" else None


def _torchs_operator(setting: Setting, device: torch.device) -> LossCall:
    def call(x: Tensor, y: Tensor, *, weight: Tensor) -> Tensor:
        return topk.linear_loss(torch.nn.CrossEntropyLoss(), x, weight, y, by_torch=True)

    return functools.partial(call, weight=setting.weight(device))


def _no_operator(setting: Setting, device: torch.device) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no F.linear_cross_entropy"


def _layer_truth(setting: Setting, features: Tensor, target: Tensor) -> Tensor:
    scores = F.linear(features, setting.weight().detach().to(features.dtype))
    return _TRUTHS.get(setting.family, _cross_entropy_truth)(setting, scores, target)


# --- peers -----------------------------------------------------------------------------------------------------------


def _quiet(make: Callable[[], Any]) -> Any:
    """Some peers print while they are imported or built."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def _difftopk_smooth(setting: Setting, device: torch.device) -> LossCall:
    def make() -> Any:
        import difftopk

        return difftopk.SmoothHardTopKLoss(num_classes=setting.classes, k=setting.k, device=str(device))

    loss = _quiet(make)
    return lambda x, y: loss(x, y)


def _difftopk_differentiable(setting: Setting, device: torch.device) -> LossCall:
    method = {"bitonic": "bitonic__non_sparse"}.get(setting.method, setting.method)

    def make() -> Any:
        import difftopk

        return difftopk.TopKCrossEntropyLoss(
            diffsort_method=method,
            inverse_temperature=1.0,
            p_k=[0.0] * (setting.k - 1) + [1.0],
            n=setting.classes,
            m=setting.m,
            distribution="cauchy",
            top1_mode="sm",
            device=str(device),
        )

    loss = _quiet(make)
    return lambda x, y: loss(x, y)


def _difftopk_network(setting: Setting, device: torch.device) -> LossCall:
    """The first k ranks of its sorting network, summed."""

    def make() -> Any:
        import difftopk

        return difftopk.DiffTopkNet("odd_even", setting.classes, setting.k, steepness=1.0, device=str(device))

    network = _quiet(make)
    return lambda x, y: operators.chosen(network(x)[1].sum(2), y)


def _pytopk(setting: Setting, device: torch.device) -> LossCall:
    import pytopk

    loss = pytopk.BalNoisedTopK(k=setting.k, epsilon=setting.epsilon, n_sample=setting.samples).to(device)
    return lambda x, y: loss(x, y)


# --- floors ----------------------------------------------------------------------------------------------------------


def _copy(setting: Setting, device: torch.device) -> LossCall:
    """What every loss must move: read the scores forward; read them and write the gradient backward."""
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


def _plain_copy(setting: Setting, device: torch.device) -> LossCall:
    """One read and one write into memory that is there already: the bandwidth all others are held against."""
    destination = torch.empty(setting.batch, setting.classes, dtype=TYPES[setting.dtype], device=device)
    return lambda x, y: destination.copy_(x.detach())


def _cross_entropy(setting: Setting, device: torch.device) -> LossCall:
    return lambda x, y: F.cross_entropy(x, y)


# --- truths ----------------------------------------------------------------------------------------------------------


def _options_of(setting: Setting) -> Any:
    """The options of the setting's loss, as its file declares them."""
    own: dict[str, tuple[Any, ...]] = {
        "smooth": (1.0, 1.0),
        "transition": (10.0, 0.0),
        "hinge": ("calibrated", 1.0),
        "differentiable": (setting.method, "cauchy", 1.0, 0.25, min(setting.m, setting.classes)),
    }
    return _loss_of(setting.family).options([setting.k], [1.0], *own[setting.family])


def _loss_of(family: str) -> Loss:
    """The loss that `topk.losses` holds under this name."""
    loss: Loss = importlib.import_module(f"topk.losses.{family}").LOSS
    return loss


def _definition(setting: Setting, scores: Tensor, target: Tensor) -> Tensor:
    """The mean over rows of the definition; for very long rows our own path in float64."""
    if setting.classes > _BY_DEFINITION:
        return _ours(setting, "torch")(scores, target)
    return _loss_of(setting.family).formula(scores, target, _options_of(setting)).mean()


def _noised_truth(setting: Setting, scores: Tensor, target: Tensor) -> Tensor:
    return topk.noised_topk_loss(scores, target, setting.k, epsilon=setting.epsilon, samples=None, backend="torch")


_TRUTHS: dict[str, Callable[[Setting, Tensor, Tensor], Tensor]] = {
    "smooth": _definition,
    "transition": _definition,
    "hinge": _definition,
    "noised": _noised_truth,
    "differentiable": _definition,
}


def _cross_entropy_truth(setting: Setting, scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores, target)


# --- the registry ----------------------------------------------------------------------------------------------------

CROSS_ENTROPY, PLAIN_COPY, TWO_PROCESSES = "cross_entropy", "plain copy", "topk two processes"
_FLOAT32 = ("float32",)


def _ours_on_every_backend(family: str) -> tuple[Contender, ...]:
    averages = 400 if family == "noised" else 1
    shared: dict[str, Any] = {"family": family, "truth": _TRUTHS[family], "averages": averages}
    return (
        Contender(f"topk {family}", build=_torch_path, **shared),
        Contender(f"topk {family} compiled", build=_compiled(_torch_path), compiled=True, **shared),
        Contender(f"topk {family} triton", build=_triton_path, needs=("triton",), runs_on=_no_triton, **shared),
    )


def _last_layers(family: str) -> tuple[Contender, ...]:
    averages = 400 if family == "noised" else 1
    shared: dict[str, Any] = {"family": family, "truth": _layer_truth, "averages": averages, "layer": True}
    return (
        Contender(f"F.linear + {family}", build=_scores_held, **shared),
        Contender(f"topk linear_loss {family}", build=_scores_in_chunks, **shared),
        Contender(
            f"{TWO_PROCESSES} {family}", build=_two_processes, runs_on=_not_on_two, largest=2_000_000_000, **shared
        ),
    )


def _operators(family: str) -> tuple[Contender, ...]:
    """A soft top-k operator and what it is measured against."""
    mine = Contender(f"topk soft_topk {family}", family, operators.ours, operators.truth)
    floor = Contender("softmax + topk", family, operators.softmax_and_topk)
    match family:
        case "logistic":
            return mine, floor, Contender("Sinkhorn", family, operators.sinkhorn, operators.truth, largest=15_000_000)
        case "subset":
            return mine, floor, Contender("topk smooth, the same k", family, operators.smooth_loss)
        case "sort":
            return mine, floor, Contender("difftopk", family, _difftopk_network, operators.truth, ("difftopk",))
        case _:
            return mine, floor


CONTENDERS = (
    Contender(CROSS_ENTROPY, "any", _cross_entropy, _cross_entropy_truth),
    Contender(f"{CROSS_ENTROPY} compiled", "any", _compiled(_cross_entropy), _cross_entropy_truth, compiled=True),
    Contender("copy", "any", _copy),
    Contender(PLAIN_COPY, "any", _plain_copy, backward=False, passes=2),
    *(contender for family in _TRUTHS for contender in _ours_on_every_backend(family)),
    *(Contender(f"topk {family}", family, _relative, _relative_truth) for family in RELATIVES),
    *(contender for family in OPERATORS for contender in _operators(family)),
    *(contender for family in (*_TRUTHS, CROSS_ENTROPY) for contender in _last_layers(family)),
    Contender(
        "F.linear_cross_entropy", CROSS_ENTROPY, _torchs_operator, _layer_truth, runs_on=_no_operator, layer=True
    ),
    Contender(
        "difftopk smooth",
        "smooth",
        _difftopk_smooth,
        _TRUTHS["smooth"],
        ("difftopk",),
        largest=2**25,
        tolerance=1e-2,
        types=_FLOAT32,
    ),
    Contender(
        "difftopk differentiable",
        "differentiable",
        _difftopk_differentiable,
        _TRUTHS["differentiable"],
        ("difftopk",),
        largest=2**26,
        lacks=("splitter_selection",),  # needs torch-sparse
        types=_FLOAT32,
    ),
    Contender(
        "pytopk noised",
        "noised",
        _pytopk,
        _TRUTHS["noised"],
        ("pytopk",),
        largest=2**26,
        averages=400,
        types=_FLOAT32,
    ),
)
"""Everyone; `contenders` says who of them runs at a setting."""


def contenders(setting: Setting, device: torch.device | str = "cpu", compiled: bool = False) -> list[Contender]:
    """Those that run at this setting on this device; compiled ones only where they are asked for."""
    device = torch.device(device)
    return [
        c
        for c in CONTENDERS
        if c.family in ("any", setting.family)
        and c.layer == (setting.features > 0)
        and (compiled or not c.compiled)
        and c.why_not(setting, device) is None
    ]
