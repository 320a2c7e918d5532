"""`python -m topk.lab reproduce RECORD`: runs a record's configuration again and compares the metrics.

On the same processor model with as many threads and the same torch the metrics must be the same to the last digit.
Elsewhere rounding differs and with it, after some thousand steps, the run: there a metric must lie where another seed
would be expected, in the 99 % prediction interval of the runs beside the record that differ from it in the seed only,

    mean -+ t s sqrt(1 + 1/n).

A record with fewer than three such neighbours is compared with a tolerance that the caller names.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from topk.lab import records
from topk.lab.provenance import provenance
from topk.lab.statistics import t_quantile

CONFIDENCE = 0.99
_FEWEST = 3
_SEEDS = (("seed",), ("data", "seed"))


@dataclass(frozen=True)
class Comparison:
    """A metric then and now, and the bounds within which now must lie."""

    metric: str
    then: float
    now: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether it lies there; two NaN are the same."""
        return self.low <= self.now <= self.high or (math.isnan(self.then) and math.isnan(self.now))


def reproduce(path: Path, *, tolerance: float | None = None, exact: bool | None = None) -> list[Comparison]:
    """Runs the configuration of a record again and compares every final metric.

    Args:
        path: the record's file.
        tolerance: how far a metric may be off where there are too few neighbours, relative to 1 or, above, to itself.
        exact: whether to ask for the same digits; None: where processor, threads and torch are those of the record.
    """
    record = records.read(path)
    if "notebook" in record["config"]:
        raise ValueError(f"{path} is of a notebook: run a sweep into an empty folder and compare")
    here = provenance()
    exact = _same_machine(record["provenance"], here) if exact is None else exact
    result = _run(record)
    now = records.plain(result)
    if now["data_fingerprint"] != record["result"]["data_fingerprint"]:
        raise ValueError("the data in the cache are not those of the record: their fingerprints differ")
    then, now = _numbers(record["result"]["final"]), _numbers(now["final"])
    if then.keys() != now.keys():
        raise ValueError(f"the metrics have other names than then: {sorted(then.keys() ^ now.keys())}")
    bounds = {name: (value, value) for name, value in then.items()} if exact else _bounds(path, record, tolerance)
    return [Comparison(name, then[name], now[name], *bounds[name]) for name in then]


def _run(record: Mapping[str, Any]) -> dict[str, Any]:
    from topk.lab.training import train

    before = torch.get_num_threads()
    torch.set_num_threads(record["provenance"]["threads"])
    try:
        return train(record["config"], progress=True)
    finally:
        torch.set_num_threads(before)


def _same_machine(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    same = all(then["hardware"].get(name) == now["hardware"].get(name) for name in ("cpu", "gpu"))
    return same and then["versions"].get("torch") == now["versions"].get("torch")


def _numbers(final: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in records.flat(final).items():
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found[name] = math.nan if value is None else float(value)
    return found


def _bounds(path: Path, record: records.Record, tolerance: float | None) -> dict[str, tuple[float, float]]:
    own = _without_seeds(record["config"])
    runs = [records.read(other) for other in records.paths(path.parent)]
    alike = [_numbers(run["result"]["final"]) for run in runs if _without_seeds(run["config"]) == own]
    then = _numbers(record["result"]["final"])
    if len(alike) < _FEWEST:
        if tolerance is None:
            raise ValueError(
                f"{path} was made on another machine and has {len(alike)} runs with other seeds beside it; "
                f"say how far metrics may be off with --tolerance"
            )
        return {name: _around(value, tolerance * max(1.0, abs(value))) for name, value in then.items()}
    return {name: _predicted([run[name] for run in alike if name in run]) for name in then}


def _around(value: float, half: float) -> tuple[float, float]:
    return value - half, value + half


def _predicted(values: list[float]) -> tuple[float, float]:
    count = len(values)
    spread = t_quantile(0.5 + CONFIDENCE / 2, count - 1) * stdev(values) * math.sqrt(1 + 1 / count)
    # Seeds may agree to the last digit, as candidates do; rounding can still move one row over the edge.
    return _around(mean(values), max(spread, 1e-3 * max(1.0, abs(mean(values)))))


def _without_seeds(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for place in _SEEDS:
        section = plain if len(place) == 1 else plain.get(place[0], {})
        section.pop(place[-1], None)
    return plain


def add_arguments(commands: Any) -> None:
    """The command `reproduce`."""
    parser = commands.add_parser(
        "reproduce", help="run a record's configuration again and compare", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("record", type=Path, help="the record's file")
    parser.add_argument("--tolerance", type=float, help="for records with fewer than three seeds beside them")
    parser.set_defaults(run=_command)


def _command(chosen: argparse.Namespace) -> int:
    from topk.lab.summary import aligned

    compared = reproduce(chosen.record, tolerance=chosen.tolerance)
    shown = [item for item in compared if not item.holds or item.metric.count(".") == 0]
    rows = [["metric", "then", "now", "allowed", ""]]
    for item in shown:
        allowed = f"{item.low:.6g} to {item.high:.6g}"
        rows.append([item.metric, f"{item.then:.6g}", f"{item.now:.6g}", allowed, "" if item.holds else "differs"])
    print(aligned(rows))
    differ = sum(not item.holds for item in compared)
    print(f"{len(compared) - differ} of {len(compared)} metrics reproduced")
    return 1 if differ else 0
