"""What the lab's tests share: a cache of their own, one thread, small configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from topk_lab import data


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOPK_DATA", raising=False)
    data.images.cache_clear()
    data.feature_set.cache_clear()
    torch.set_num_threads(1)


def small(loss: Any = "smooth", **over: Any) -> dict[str, Any]:
    """A run of a second on the sample that comes with the package."""
    return {
        "data": {"name": "sample", "validation": 5, "fraction": 0.2},
        "model": {"name": "linear"},
        "loss": {"name": loss} if isinstance(loss, str) else loss,
        "training": {"epochs": 2, "batch": 200, "optimizer": "adamw", "learning_rate": 0.01, "evaluate_every": 0},
        "seed": 3,
        **over,
    }
