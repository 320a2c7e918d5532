"""The records of all machines as one tidy table, which the lab carries for chapter 13."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from topk_lab import records
from topk_lab.study.benchmarks import CHAPTER, CROSS_ENTROPY, EXPECTED, PLAIN_COPY, PROBLEM
from topk_lab.study.timing import gigabytes_per_second

_TEXT = (
    "machine", "suite", "family", "method", "dtype", "contender", "graph_note", "note", "kernels", "device",
    "processor", "driver", "torch", "triton", "topk", "python", "commit", "date",
)  # fmt: skip
_NUMBERS = (
    "batch", "classes", "k", "spread", "epsilon", "samples", "m", "features", "p20_ms", "p50_ms", "p80_ms",
    "warm_p20_ms", "warm_p50_ms", "warm_p80_ms", "graph_p20_ms", "graph_p50_ms", "graph_p80_ms", "peak_bytes",
    "score_bytes", "rounds", "load", "threads",
)  # fmt: skip
_WHOLE = ["batch", "classes", "k", "samples", "m", "features"]


def read(path: Path) -> pd.DataFrame:
    """One CSV of records; `machine` is its folder's name."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.insert(0, "machine", path.parent.name)
    return with_ratios(frame)


def with_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as numbers; what an older record does not have is empty; bandwidths and ratios worked out."""
    frame = frame.assign(**dict.fromkeys((name for name in _TEXT if name not in frame), ""))
    frame = frame.reindex(columns=pd.Index([*_TEXT, *_NUMBERS]))
    for name in _NUMBERS:
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    frame["features"] = frame["features"].fillna(0)  # older records have no such column
    frame[_WHOLE] = frame[_WHOLE].astype("int64")
    frame["score_copies"] = frame["peak_bytes"] / frame["score_bytes"]
    moved = frame["score_bytes"] * np.where(frame["contender"] == PLAIN_COPY, 2, 3)
    for clock in ("", "warm_", "graph_"):
        frame[f"{clock}gbps"] = gigabytes_per_second(moved, frame[f"{clock}p50_ms"])  # type: ignore[arg-type]
        frame[f"{clock}copy_gbps"] = _beside(frame, PLAIN_COPY, f"{clock}gbps")
        frame[f"{clock}times_ce"] = frame[f"{clock}p50_ms"] / _beside(frame, CROSS_ENTROPY, f"{clock}p50_ms")
    return frame


def _beside(frame: pd.DataFrame, contender: str, column: str) -> Any:
    """For every row what `contender` has in that column for the same problem, measured in the same run."""
    keys = ["machine", "suite", *PROBLEM]
    theirs = frame[frame["contender"] == contender].drop_duplicates(keys, keep="last")
    return frame[keys].merge(theirs[[*keys, column]], on=keys, how="left")[column].to_numpy()


def pack(results: Path, into: Path | None = None) -> int:
    """Writes the lab's tables of what was measured and what is expected; returns the number of rows measured."""
    paths = sorted(results.glob("*/*.csv"))
    frame = pd.concat([read(path) for path in paths], ignore_index=True) if paths else with_ratios(pd.DataFrame())
    (into or records.folder() / f"{CHAPTER}.parquet").parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(into or records.folder() / f"{CHAPTER}.parquet", index=False, compression="zstd")
    if into is None and (results / "expected.csv").exists():
        expected = pd.read_csv(results / "expected.csv")
        expected.to_parquet(records.folder() / f"{EXPECTED}.parquet", index=False, compression="zstd")
    return len(frame)
