"""Records as plain text: one line a group of runs that differ in their seeds only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from topk.lab.statistics import t_interval

if TYPE_CHECKING:
    import pandas as pd

_SECTIONS = ("data.", "model.", "training.", "parameters.")
_METRICS = ("top1", "top5", "nll")


def table(frame: pd.DataFrame) -> str:
    """Loss, the settings that vary, runs, mean and half-width of the 95 % interval over seeds of the main metrics."""
    if frame.empty:
        return "no records"
    columns = [str(name) for name in frame]
    settings = [name for name in columns if name.startswith(_SECTIONS) and _varies(frame, name)]
    metrics = [name for name in _METRICS if name in columns] or _numbers_of(frame)
    rows = [["loss", *settings, "runs", *metrics, "seconds"]]
    for values, group in frame.groupby(["label", *settings], sort=False, dropna=False):
        cells = [_shown(group[name].astype(float).tolist()) for name in metrics]
        rows.append([*map(_text, values), str(len(group)), *cells, f"{group['run_seconds'].mean():.1f}"])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Columns padded to their widest cell, two blanks between."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _varies(frame: pd.DataFrame, name: str) -> bool:
    return name != "parameters.seed" and frame[name].astype(str).nunique() > 1


def _numbers_of(frame: pd.DataFrame) -> list[str]:
    """For a notebook's own metrics: the columns after what every run has."""
    columns = list(frame.columns)
    after = columns[columns.index("profile") + 1 :]
    return [name for name in after if frame[name].dtype.kind == "f"][:4]


def _shown(values: list[float]) -> str:
    found = t_interval(values)
    half = found.high - found.mean
    return f"{found.mean:.4g}" + ("" if math.isnan(half) else f" ± {half:.2g}")


def _text(value: Any) -> str:
    return "-" if value is None or value != value else str(value)
