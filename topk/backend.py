"""Which backend runs a loss or an operator, and why the others cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings

import torch

from topk import compiled, kernels
from topk.autograd import Call, row_loss

BACKENDS = (None, "torch", "compiled", "triton")


def why_not_triton(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
    absent: tuple[bool, ...] = (),
) -> str | None:
    """None when the Triton kernels (of that loss) can run on such scores, otherwise why not; `absent`: options at None.

    Below compute capability 8.0, which Triton does not promise to serve, the first question of a device runs the
    kernels on small cases and compares them with the torch path; the answer is remembered.
    """
    if name is not None and name not in (*kernels.NAMES, *kernels.OPERATORS):
        return f"{name} has no Triton kernel"
    if dtype not in _KERNEL_TYPES:
        return f"the Triton kernels compute in float32, for float32, float16 and bfloat16 scores; these are {dtype}"
    missing = _missing_triton()
    if missing is not None:
        return missing
    interpreted = device.type == "cpu" and _interpreted()
    if device.type != "cuda" and not interpreted:
        return f"the Triton kernels need scores on a CUDA device (or TRITON_INTERPRET=1), these are on {device}"
    if name is not None and any(absent):
        unserved: str | None = getattr(kernels.of(name), "why_not", _serves_all)(absent)
        if unserved is not None:
            return unserved
    if interpreted:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _PROMISED:
        return None
    names = (name,) if name is not None else kernels.NAMES + kernels.OPERATORS
    reasons = [_self_check(each, device, dtype) for each in names]
    wrong = next((reason for reason in reasons if reason is not None), None)
    return None if wrong is None else f"on {device}, of capability {capability[0]}.{capability[1]}, {wrong}"


def choose(
    backend: str | None, device: torch.device, dtype: torch.dtype, name: str, absent: tuple[bool, ...] = ()
) -> str:
    """The backend to use for a loss; an explicit one that cannot run raises.

    `absent` says which options are None. Their values do not matter, and would not be constants where torch.compile
    follows a number that changes between calls.
    """
    if backend == "triton":
        reason = why_not_triton(device, dtype, name, absent)
        if reason is not None:
            raise RuntimeError(f"backend='triton' cannot run: {reason}")
        return "triton"
    if backend == "compiled":
        reason = compiled.why_not(device)
        if reason is not None:
            raise RuntimeError(f"backend='compiled' cannot run: {reason}")
        return "compiled"
    # Interpreted kernels are for tests: nobody gets them without asking.
    if backend == "torch" or device.type != "cuda" or _interpreted():
        return "torch"
    return "torch" if why_not_triton(device, dtype, name, absent) is not None else "triton"


# What torch.compiler.assume_constant_result does; that one would import the whole compiler, and triton, with topk.
for _constant in (why_not_triton, choose):
    _constant._dynamo_marked_constant = True  # type: ignore[union-attr]


def _serves_all(absent: tuple[bool, ...]) -> None:
    """The answer of kernels that have no `why_not`."""


_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_PROMISED = (8, 0)
OLDEST_TRITON = (3, 4)
"""3.2 has no gather, and neither 3.2 nor 3.3 compiles a function that returns from within a loop."""


@functools.cache
def _missing_triton() -> str | None:
    """None when a triton that can compile the kernels is installed, otherwise what is wrong."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TRITON:
        return None
    return f"triton {version} is installed, and the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


@functools.cache
def _self_check(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when a loss's kernels compute what the torch path does, otherwise what went wrong; warned of once."""
    try:
        wrong = None if _agrees(name, device, dtype) else f"the {name} kernels give other results than the torch path"
    except Exception as error:  # whatever a compiler or a driver may throw, the torch path still works
        wrong = f"the {name} kernels failed with {type(error).__name__}: {str(error)[:200]}"
    if wrong is not None:
        warnings.warn(f"{wrong}; the torch path serves {device} instead", RuntimeWarning, stacklevel=2)
    return wrong


def _agrees(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernel and torch path agree on the kernel's examples, for rows that fit a tile and rows that stream."""
    generator = torch.Generator().manual_seed(0)
    if name in kernels.OPERATORS:
        return _operator_agrees(name, device, dtype, generator)
    loss = importlib.import_module(f"topk.losses.{name}").LOSS
    relative = 1e-3 if dtype == torch.float32 else 1e-2
    for rows, classes in ((5, 37), (2, 9000)):
        scores = (2.0 * torch.randn(rows, classes, generator=generator)).to(device, dtype)
        target = torch.randint(classes, (rows,), generator=generator).to(device)
        for tensors, options in kernels.of(name).examples(rows, classes, device):
            results = []
            for backend in ("torch", "triton"):
                x = scores.detach().requires_grad_()
                value = row_loss(Call(loss, options, -100, backend), x, target, *tensors)
                results.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
            if not all(torch.allclose(a, b, relative, 1e-4) for a, b in zip(*results, strict=True)):
                return False
    return True


def _operator_agrees(name: str, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> bool:
    """The same for the masks of an operator; half types reach its kernels as float32."""
    soft_topk = importlib.import_module("topk.operators").soft_topk
    for rows, n in ((5, 37), (2, 9000)):
        scores = (2.0 * torch.randn(rows, n, generator=generator)).to(device, dtype)
        weight = torch.randn(rows, n, generator=generator).to(device, dtype)
        for method in ("subset",) if name == "subset" else ("logistic", "sparse", "laplace", "gaussian"):
            results = []
            for backend in ("torch", "triton"):
                x = scores.detach().requires_grad_()
                mask = soft_topk(x, 5, method=method, backend=backend)
                results.append((mask.detach(), torch.autograd.grad((mask * weight).sum(), x)[0]))
            relative = 1e-3 if dtype == torch.float32 else 1e-2
            if not all(torch.allclose(a, b, relative, 1e-4) for a, b in zip(*results, strict=True)):
                return False
    return True
