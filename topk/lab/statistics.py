"""What a few seeds allow to say: intervals for a mean, and differences to cross-entropy on the same seeds.

Deterministic, and without scipy: Student's quantiles come from the closed form for whole degrees of freedom
(Abramowitz and Stegun 26.7.3 and 26.7.4), the bootstrap draws from a generator with a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("t", "bootstrap")


@dataclass(frozen=True)
class Interval:
    """A mean, the ends of its confidence interval (NaN for fewer than two values) and the number of values."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float], confidence: float = 0.95, method: str = "t") -> Interval:
    """The interval of a mean by "t" or "bootstrap"; values that are NaN do not count."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return t_interval(values, confidence) if method == "t" else bootstrap_interval(values, confidence)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """mean -+ t s / sqrt(n), with Student's t for n - 1 degrees of freedom: exact for values that scatter normally."""
    _check_confidence(confidence)
    known = _finite(values)
    count = len(known)
    if count < 2:
        return Interval(float(known.mean()) if count else math.nan, math.nan, math.nan, count)
    mean = float(known.mean())
    half = t_quantile(0.5 + confidence / 2, count - 1) * float(known.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentiles of the means of resampled values. With five seeds or fewer it is too narrow: prefer t there."""
    _check_confidence(confidence)
    known = _finite(values)
    count = len(known)
    if count < 2:
        return Interval(float(known.mean()) if count else math.nan, math.nan, math.nan, count)
    chosen = np.random.default_rng(seed).integers(0, count, (resamples, count))
    low, high = np.quantile(known[chosen].mean(1), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(known.mean()), float(low), float(high), count)


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """Student's t below which a probability lies, for 1, 2, 3, ... degrees of freedom."""
    if not 0 < probability < 1:
        raise ValueError(f"probability must lie between 0 and 1, got {probability!r}")
    if freedom < 1 or int(freedom) != freedom:
        raise ValueError(f"freedom must be a whole number of at least 1, got {freedom!r}")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, math.pi / 2  # bisection in the angle whose tangent is t / sqrt(freedom)
    for _ in range(80):
        middle = (low + high) / 2
        if _t_inside(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _t_inside(angle: float, freedom: int) -> float:
    """The probability of |t| < sqrt(freedom) tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for number in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (number + 1) / (number + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def aggregate(
    frame: pd.DataFrame, by: Sequence[str], metric: str, confidence: float = 0.95, method: str = "t"
) -> pd.DataFrame:
    """One row a group of runs: the metric's mean, low, high and count over the group's seeds.

    Args:
        frame: from `topk.lab.records.load`.
        by: columns that tell groups apart; a group in which a seed occurs twice is refused, since it is two groups.
        metric: a column.
        confidence: of the intervals.
        method: "t" or "bootstrap".
    """
    import pandas as pd

    rows = []
    for values, group in _groups(frame, by):
        _check_seeds(group, by, values)
        found = interval(group[metric].astype(float).tolist(), confidence, method)
        rows.append({**dict(zip(by, values, strict=True)), **_columns(found)})
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "count"])


def paired(
    frame: pd.DataFrame,
    metric: str,
    settings: Sequence[str] = (),
    baseline: str = "cross_entropy",
    confidence: float = 0.95,
    method: str = "t",
) -> pd.DataFrame:
    """One row a loss and setting: mean, low, high of the difference to the baseline, over the seeds that both have.

    Runs with one seed share first weights and batches, so the difference scatters less than either. `count` is the
    number of pairs, `unpaired` the number of this loss's seeds without a partner.

    Args:
        frame: from `topk.lab.records.load`.
        metric: a column.
        settings: columns beside the loss that tell groups apart, such as "data.noise"; only runs that agree in them are
            paired.
        baseline: the loss to compare with, by its name (`loss.name`); it must be there once a setting and seed.
        confidence: of the intervals.
        method: "t" or "bootstrap".
    """
    import pandas as pd

    rows = []
    for values, group in _groups(frame, settings):
        of_baseline = group[group["loss.name"] == baseline]
        _check_seeds(of_baseline, settings, values)
        reference = of_baseline.set_index("seed")[metric].astype(float)
        for (label,), runs in _groups(group[group["loss.name"] != baseline], ["label"]):
            _check_seeds(runs, [*settings, "label"], (*values, label))
            own = runs.set_index("seed")[metric].astype(float)
            difference = (own - reference).dropna()  # aligned by seed
            found = interval(difference.tolist(), confidence, method)
            about = {**dict(zip(settings, values, strict=True)), "label": label}
            rows.append({**about, **_columns(found), "unpaired": len(own) - len(difference)})
    return pd.DataFrame(rows, columns=[*settings, "label", "mean", "low", "high", "count", "unpaired"])


def _groups(frame: pd.DataFrame, by: Sequence[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    if not by:
        return [((), frame)]
    grouped = frame.groupby(list(by), sort=False, dropna=False)
    return [(values if isinstance(values, tuple) else (values,), group) for values, group in grouped]


def _check_seeds(group: pd.DataFrame, by: Sequence[str], values: Sequence[Any]) -> None:
    twice = sorted(set(group["seed"][group["seed"].duplicated()]))
    if not twice:
        return
    place = ", ".join(f"{name} {value}" for name, value in zip(by, values, strict=True)) or "the runs"
    differ = [name for name in group if "." in str(name) and group[name].astype(str).nunique() > 1]
    raise ValueError(
        f"{place}: seed {twice[0]} occurs twice; the runs differ in {', '.join(map(str, differ)) or 'nothing'}"
    )


def _columns(found: Interval) -> dict[str, float]:
    return {"mean": found.mean, "low": found.low, "high": found.high, "count": found.count}


def _finite(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    known = np.asarray(values, dtype=np.float64)
    return known[np.isfinite(known)]


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
