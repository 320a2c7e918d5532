"""Which problems each suite measures, and on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.contenders import RELATIVES, Setting
from bench.operators import OPERATORS

FAMILIES = ("smooth", "transition", "hinge", "noised", "differentiable")
LARGE = 2**26
"""Elements of a problem that is large for a data-centre GPU: 64 M."""


@dataclass(frozen=True)
class Suite:
    """Settings in the order in which they are measured, where, for how long each, and which are also compiled."""

    settings: Callable[[], list[Setting]]
    device: str = "cpu"
    seconds: float = 3.0
    compiles: Callable[[Setting], bool] = lambda setting: False


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
    """Many minutes: the headline, then k, n, the batch and number types."""
    over_k = [Setting("smooth", 256, 1000, k) for k in (1, 2, 3, 8, 10, 20, 50, 100)]
    over_classes = [Setting(family, 256, n, 5) for family in FAMILIES for n in (100, 10_000, 100_000)]
    over_batch = [Setting(family, rows, 1000, 5) for family in FAMILIES for rows in (1, 16, 4096)]
    halves = [Setting(family, 256, 1000, 5, dtype="bfloat16") for family in FAMILIES]
    return headline() + over_k + over_classes + over_batch + halves + large()


def large() -> list[Setting]:
    """Beyond a thousand classes: 64 rows, k = 20 up to 200,000 classes, and k up to 80."""
    over_classes = [Setting("smooth", 64, n, 20) for n in (25_000, 50_000, 100_000, 200_000)]
    over_k = [Setting("smooth", 64, 100_000, k) for k in (10, 40, 80)]
    return over_classes + over_k


def scale() -> list[Setting]:
    """Many minutes: last layers of 1000 to a million classes, and 4096 rows of 100,000."""
    small, large = (
        [Setting(family, 256, n, 5, features=32) for n in sizes for family in ("smooth", "cross_entropy", "hinge")]
        for sizes in ((1000, 10_000, 100_000), (1_000_000,))
    )
    few = [Setting(family, 4096, 100_000, 5, features=32) for family in ("hinge", "noised", "differentiable")]
    goal = Setting("smooth", 4096, 100_000, 5, features=256)
    return [*small, Setting("smooth", 64, 1_000_000, 5, features=128), *few, *reversed(large), goal]


def gpu() -> list[Setting]:
    """Some minutes on a data-centre GPU: what the goals are about first, so that a run cut short has them."""
    thousand = [Setting(family, 65_536, 1000, 5) for family in FAMILIES]
    goals = [*thousand, Setting("smooth", 65_536, 1000, 50), Setting("noised", 65_536, 1000, 5, samples=10)]
    over_classes = [Setting(family, LARGE // n, n, 5) for n in (128, 8192, 131_072, 1_048_576) for family in FAMILIES]
    over_k = [Setting("smooth", 65_536, 1000, k) for k in (1, 2, 10, 20, 100)]
    over_k += [Setting("transition", 65_536, 1000, k) for k in (1, 20, 100)]
    halves = [
        replace(setting, dtype=dtype)
        for dtype in ("bfloat16", "float16")
        for setting in thousand
        if setting.family != "hinge"
    ]
    over_batch = [Setting(family, rows, 1000, 5) for family in ("smooth", "transition") for rows in (1, 16, 4096)]
    small = [
        Setting(family, 256, n, 5) for family in ("smooth", "transition") for n in (100, 10_000, 100_000, 1_048_576)
    ]
    return goals + headline() + over_classes + over_k + halves + over_batch + small


def relatives() -> list[Setting]:
    """A minute: 256 x 1000, k = 5, the hinges' convex relatives, the losses from ranking and that of sets."""
    return [Setting(family, 256, 1000, 5) for family in RELATIVES]


def soft_topk() -> list[Setting]:
    """Ten minutes, mostly Sinkhorn's: the soft top-k operators at 256 x 1000, k = 10 and others, and on long rows."""
    every = [Setting(family, 256, 1000, 10) for family in OPERATORS if family != "sort"]
    over_k = [Setting(family, 256, 1000, k) for family in ("subset", "logistic") for k in (2, 5, 8, 50)]
    sorted_whole = Setting("sort", 256, 32, 5)  # a network holds a matrix a row
    return [*every, *over_k, sorted_whole, *(Setting(family, 16, 100_000, 10) for family in ("logistic", "subset"))]


SUITES = {
    "smoke": Suite(smoke, seconds=0.5),
    "headline": Suite(headline, seconds=10.0),  # a peer takes 0.1 s a call
    "cpu": Suite(cpu, compiles=lambda s: (s.batch, s.classes) == (256, 1000) and s.dtype == "float32"),
    "large": Suite(large),
    "relatives": Suite(relatives),
    "operators": Suite(soft_topk),
    "scale": Suite(scale),
    "gpu": Suite(
        gpu, "cuda", 0.5, compiles=lambda s: s in [Setting(s.family, rows, 1000, 5) for rows in (256, 65_536)]
    ),
}
