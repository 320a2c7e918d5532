"""`python -m topk`: which versions are here, which backends can run, and why the others cannot."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import topk
from topk import backend

_PACKAGES = ("torch", "triton", "torchvision", "numpy", "jupyter-book", "papermill", "difftopk", "diffsort", "pytopk")


def report() -> str:
    """The report as text."""
    lines = [f"topk {topk.__version__}, Python {platform.python_version()}, {platform.platform()}", "", "packages"]
    for name in _PACKAGES:
        try:
            lines.append(f"  {name:13} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name:13} not installed")
    lines += ["", "backends", f"  torch         any device; {torch.get_num_threads()} CPU threads here"]
    if not torch.cuda.is_available():
        reason = backend.why_not_triton(torch.device("cpu"))
        interpreted = "; interpreted on the CPU where it is asked for" if reason is None else ""
        lines.append(f"  triton        no: torch sees no CUDA device{interpreted}")
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = torch.cuda.get_device_name(number)
        major, minor = torch.cuda.get_device_capability(number)
        reason = backend.why_not_triton(torch.device("cuda", number))
        verdict = "yes" if reason is None else f"no: {reason}"
        lines.append(f"  triton        cuda:{number} {name}, capability {major}.{minor}: {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
