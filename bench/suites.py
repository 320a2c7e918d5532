"""Which problems each suite measures."""

from __future__ import annotations

from bench.contenders import Setting

FAMILIES = ("smooth", "transition", "hinge", "noised", "differentiable")


def smoke() -> list[Setting]:
    """Seconds: does everything run and tell the truth?"""
    return [Setting(family, 16, 100, 5) for family in FAMILIES]


def headline() -> list[Setting]:
    """A minute or two: 256 x 1000, k = 5, every loss and operator; what the README prints."""
    losses = [Setting(family, 256, 1000, 5) for family in FAMILIES]
    noise = [Setting("noised", 256, 1000, 5, spread=4.0, epsilon=0.2), Setting("noised", 256, 1000, 5, samples=10)]
    methods = ("bitonic", "splitter_selection", "neuralsort", "softsort")
    return losses + noise + [Setting("differentiable", 256, 1000, 5, method=method) for method in methods]


def cpu() -> list[Setting]:
    """Many minutes: the headline, then n and k."""
    over_k = [Setting("smooth", 256, 1000, k) for k in (1, 2, 3, 8, 10, 20, 50, 100)]
    over_classes = [Setting(family, 256, n, 5) for family in FAMILIES for n in (100, 10_000, 100_000)]
    return headline() + over_k + over_classes + large()


def large() -> list[Setting]:
    """Beyond a thousand classes: 64 rows, k = 20 up to 200,000 classes, and k up to 80."""
    over_classes = [Setting("smooth", 64, n, 20) for n in (25_000, 50_000, 100_000, 200_000)]
    over_k = [Setting("smooth", 64, 100_000, k) for k in (10, 40, 80)]
    return over_classes + over_k


SUITES = {"smoke": smoke, "headline": headline, "cpu": cpu, "large": large}
