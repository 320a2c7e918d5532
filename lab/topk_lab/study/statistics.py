"""What a few seeds and many test rows allow to say: intervals for a mean, and for differences on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t as student

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Interval:
    """A mean, the ends of its confidence interval (NaN for fewer than two values) and the number of values."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def side(self) -> int:
        """1 or -1 where the interval lies above or below zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        """61.20 ± 0.11."""
        return f"{self.mean:.2f}" + ("" if math.isnan(self.low) else f" ± {self.high - self.mean:.2f}")


def t_interval(values: Sequence[float] | np.ndarray[Any, Any], confidence: float = 0.95) -> Interval:
    """mean -+ t s / sqrt(n), with Student's t for n - 1 degrees of freedom: exact for values that scatter normally.

    Values that are NaN do not count.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    count = len(known)
    mean = float(known.mean()) if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = float(student.ppf(0.5 + confidence / 2, count - 1)) * float(known.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(
    frame: pd.DataFrame, metric: str, baseline: str, confidence: float = 0.95, scale: float = 1.0
) -> dict[str, Interval]:
    """{loss: the interval of scale times its difference to the baseline}, over the seeds that both have.

    Runs with one seed share first weights and batches, so the difference scatters less than either. A loss that has a
    seed twice is two groups of runs, and refused. A metric that no run has, such as the accuracy of classes with many
    images where there are none, is NaN.
    """
    found = {}
    by_loss: dict[str, pd.Series[float]] = {}
    for loss, group in frame.reindex(columns=["loss", "seed", metric]).groupby("loss", sort=False):
        if group["seed"].duplicated().any():
            raise ValueError(_twice(frame[frame["loss"] == loss]))
        by_loss[str(loss)] = group.set_index("seed")[metric].astype(float)
    if baseline not in by_loss:
        raise ValueError(f"baseline must be one of {', '.join(by_loss)}, got {baseline!r}")
    for loss, values in by_loss.items():
        if loss != baseline:
            found[loss] = t_interval((scale * (values - by_loss[baseline])).dropna().to_numpy(), confidence)
    return found


@lru_cache(maxsize=2)
def taken(units: int, draws: int = 2000, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """How often each of these units, such as test rows, is taken in each draw with replacement (units, draws)."""
    generator = np.random.default_rng(seed)
    counts = [np.bincount(generator.integers(units, size=units), minlength=units) for _ in range(draws)]
    return np.array(counts, dtype=np.float32).T


def mean_of_taken_seeds(
    runs: np.ndarray[Any, Any],  # (seeds, draws)
    seed: int = 1,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """For each draw the mean over as many seeds, with replacement (draws,): the same ones whenever the shape is."""
    chosen = np.random.default_rng(seed).integers(len(runs), size=runs.shape)
    return np.asarray(np.take_along_axis(runs, chosen, 0).mean(0), dtype=np.float64)


def hierarchical(
    differences: np.ndarray[Any, Any],  # (seeds, rows)
    *,
    groups: np.ndarray[Any, Any] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[Interval, np.ndarray[Any, np.dtype[np.float64]]]:
    """The mean over seeds and test rows, and how it scatters when both are drawn anew: a hierarchical bootstrap.

    Each draw takes as many seeds, and independently as many rows, with replacement: mean_draw = sum_sr n_s m_r d_sr /
    sum_sr n_s m_r, where n and m say how often each was taken. All seeds share the draw of the rows, as they share the
    test split. The share of draws on the wrong side of a bound is the p-value of book/preregistration.md.

    Args:
        differences: what a row of a run counts for, such as hit minus the baseline's hit: 1, 0 or -1.
        groups: a number for each row; rows that belong together, such as the words of a verse, are taken together.
        confidence: how much of the draws lies between the interval's ends, which are percentiles.
        draws: how many.
        seed: of the draws.

    Returns:
        The interval, whose `count` is the number of seeds, and the draws (draws,).
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"differences must be (seeds, rows), at least one of each, got shape {values.shape}")
    count, rows = values.shape
    group = np.arange(rows) if groups is None else np.unique(groups, return_inverse=True)[1]
    if len(group) != rows:
        raise ValueError(f"groups must name a group for each of the {rows} rows, got {len(group)}")
    sizes = np.bincount(group).astype(np.float32)  # as the counts are: 20 million of them are not copied
    sums = np.stack([np.bincount(group, run) for run in values]).astype(np.float32)
    times = taken(len(sizes), draws, seed)
    found = mean_of_taken_seeds((sums @ times) / (sizes @ times), seed + 1)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high), count), found


def _twice(group: pd.DataFrame) -> str:
    """What is wrong with a loss's runs of which two have one seed."""
    twice = group["seed"][group["seed"].duplicated()]
    differ = [str(name) for name in group if "." in str(name) and group[name].map(str).nunique() > 1]
    return f"seed {twice.iloc[0]} occurs twice; the runs differ in {', '.join(differ) or 'nothing'}"
