"""Where a number comes from: commit, date, hardware, versions. No host names, no users, no paths."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import topk

_PACKAGES = ("torch", "torchvision", "numpy", "triton", "timm", "papermill", "ray")


def provenance(profile: str | None = None, commit: str | None = None) -> dict[str, Any]:
    """The `provenance` part of a record made on this machine now; `commit` where the caller knows it better."""
    return {
        "commit": commit or commit_here(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "profile": profile,
    }


@cache
def commit_here() -> str | None:
    """The commit of the checkout this package runs from, `+dirty` where `topk/` differs from it; None outside one."""
    folder = Path(topk.__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", "version.py") is None:
        return None  # installed, though perhaps inside another project's checkout
    commit = _git(folder, "rev-parse", "HEAD")
    return f"{commit}+dirty" if commit and _git(folder, "status", "--porcelain", "--", ".") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source(folder: Path) -> str:
    """A digest of a package's code."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


@cache
def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what decides a run's numbers."""
    found = {"python": platform.python_version(), "topk": topk.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, system, and the GPU's name or None."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _processor(), "cores": cores(), "memory": _memory(), "system": platform.system(), "gpu": gpu}


def cores() -> int:
    """The cores this process may use: its affinity, and a container's quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return count


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None
