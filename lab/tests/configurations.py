"""Small configurations for tests."""

from __future__ import annotations

from typing import Any


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
