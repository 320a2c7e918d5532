"""`python -m topk.lab choose FILE`: from the records of a sweep that tunes, the sweep of the runs that count.

A file that tunes is a sweep (topk.lab.grid) whose grid holds candidates, all with the same validation split:

    data: {name: cifar100, validation: 50}
    grid:
      - loss: [{name: smooth, k: 5}]           # whole sections and settings of the data tell groups apart
        loss.tau: [0.3, 1.0, 3.0]              # single settings of loss, training and model are what is tuned
        training.learning_rate: [1e-3, 1e-2]
    final:                                     # what the runs with the chosen settings have instead
      metric: top5                             # of the validation split: the largest mean over seeds is chosen
      data: {validation: 0}
      grid: {seed: [0, 1, 2]}                  # their grid, beside the chosen settings

Every group must have as many candidates as every other. The test split has no say: only `validation.<metric>` is read.
The file that is written is a sweep like any other; its comments tell the budget and how good the chosen ones were.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from topk.lab import grid, records
from topk.lab.summary import aligned

_FINAL = ("metric", "data", "model", "training", "grid", "description")
_SEEDS = ("seed", "data.seed")


@dataclass(frozen=True)
class Chosen:
    """The best candidate of a group.

    Args:
        about: the values that tell the group apart, by axis.
        settings: the chosen values of the tuned settings, by axis.
        value: the mean of the metric on the validation split.
        candidates: how many there were.
        losers: the same mean for every candidate, best first, this one among them.
    """

    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    value: float
    candidates: int
    losers: tuple[float, ...]


def choose(sweep: grid.Sweep, folder: Path | str, metric: str) -> list[Chosen]:
    """The best candidate of every group; ValueError where records are missing or budgets differ."""
    folder = Path(folder)
    missing = [key for key in sweep.configs if not (folder / f"{key}.json").exists()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(sweep.configs)} candidates have no record yet: run the sweep first")
    groups: dict[str, dict[str, list[tuple[Mapping[str, Any], float]]]] = {}
    for key, choice in sweep.choices.items():
        value = _validation(records.read(folder / f"{key}.json"), metric)
        about = {axis: item for axis, item in choice.values.items() if not _is_tuned(axis) and not _is_seed(axis)}
        tuned = {axis: item for axis, item in choice.values.items() if _is_tuned(axis)}
        group = groups.setdefault(json.dumps([choice.grid, about], sort_keys=True), {})
        group.setdefault(json.dumps(tuned, sort_keys=True), []).append((about | tuned, value))
    return _with_equal_budgets([_best(group) for group in groups.values()])


def _is_tuned(axis: str) -> bool:
    return all(part.split(".")[0] in ("loss", "training", "model") and "." in part for part in axis.split(" + "))


def _is_seed(axis: str) -> bool:
    return all(part in _SEEDS for part in axis.split(" + "))


def _validation(record: Mapping[str, Any], metric: str) -> float:
    held_out = record["result"]["final"].get("validation")
    if held_out is None:
        raise ValueError("a file that tunes must have data.validation, this record has none: " + record["key"])
    if not isinstance(held_out.get(metric), int | float):
        raise ValueError(f"metric must be one of {', '.join(sorted(held_out))}, got {metric!r}")
    return float(held_out[metric])


def _best(group: Mapping[str, list[tuple[Mapping[str, Any], float]]]) -> Chosen:
    means = {name: fmean(value for _, value in runs) for name, runs in group.items()}
    best = max(means, key=lambda name: means[name])  # the first of equals
    values = group[best][0][0]
    return Chosen(
        {axis: value for axis, value in values.items() if not _is_tuned(axis)},
        {axis: value for axis, value in values.items() if _is_tuned(axis)},
        means[best],
        len(means),
        tuple(sorted(means.values(), reverse=True)),
    )


def _with_equal_budgets(found: list[Chosen]) -> list[Chosen]:
    budgets = {chosen.candidates for chosen in found}
    if len(budgets) > 1:
        raise ValueError(f"every group must have as many candidates as every other, they have {sorted(budgets)}")
    return found


def final_sweep(path: Path | str, folder: Path | str, profile: str = "laptop") -> str:
    """The text of the sweep file whose runs have the settings that a file's candidates were chosen by."""
    sweep = grid.read(path, profile)
    if sweep.final is None:
        raise ValueError(f"{path} has no section `final`: it does not tune")
    unknown = sorted(set(sweep.final) - set(_FINAL))
    if unknown:
        raise ValueError(f"{path}: {unknown[0]!r} is unknown in `final`; known are {', '.join(_FINAL)}")
    final = dict(sweep.final)
    metric = final.pop("metric", "top5")
    chosen = choose(sweep, folder, metric)
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    over = content.get("profiles", {}).get(profile) or {}
    shared = {
        name: {**content.get(name, {}), **over.get(name, {}), **final.get(name, {})}
        for name in grid.SECTIONS
        if name in content or name in final
    }
    lines = [
        f"# Written by `python -m topk.lab choose {Path(path).name}`: edit that file, not this one.",
        f"# Each run below is the best of {chosen[0].candidates} candidates by {metric} on the validation split.",
        *([f"description: {_flow(final['description'])}"] if "description" in final else []),
        *(f"{name}: {_flow(value)}" for name, value in shared.items()),
        "grid:",
        "  run:",
    ]
    for item in chosen:
        lines.append(f"    - {_flow(_sections({**item.about, **item.settings}))}  # {metric} {item.value:.4f}")
    lines += [f"  {axis}: {_flow(values)}" for axis, values in final.get("grid", {}).items()]
    if over:
        lines += [f"profiles: {{{profile}: {{}}}}  # whose settings stand above"]
    return "\n".join(lines) + "\n"


def count_of_final(sweep: grid.Sweep) -> int:
    """How many runs will follow the choices of a file that tunes."""
    groups = {
        json.dumps([choice.grid, [item for item in choice.values.items() if not _is_tuned(item[0])]])
        for choice in sweep.choices.values()
    }
    return len(groups) * math.prod(len(values) for values in (sweep.final or {}).get("grid", {}).values())


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by axis as sections: whole ones first, single settings over them."""
    sections: dict[str, Any] = {}
    for axis, value in sorted(values.items(), key=lambda item: "." in item[0]):
        for part in axis.split(" + "):
            section, _, name = part.partition(".")
            if name:
                sections.setdefault(section, {})[name] = value
            elif part == "run":
                for inner, settings in value.items():
                    sections.setdefault(inner, {}).update(settings)
            else:
                sections.setdefault(part, {}).update({"name": value} if isinstance(value, str) else value)
    return sections


def add_arguments(commands: Any) -> None:
    """The command `choose`."""
    parser = commands.add_parser("choose", help="from a tuning sweep's records, the sweep of the runs that count")
    parser.add_argument("file", type=Path, help="the sweep that tunes")
    parser.add_argument("--results", type=Path, default=Path("results"), help="its records (default: results)")
    parser.add_argument("--profile", choices=grid.PROFILES, default="laptop")
    parser.add_argument("--into", type=Path, help="the file to write; without it the choices are only shown")
    parser.set_defaults(run=_command)


def _command(chosen: argparse.Namespace) -> int:
    text = final_sweep(chosen.file, chosen.results, chosen.profile)
    sweep = grid.read(chosen.file, chosen.profile)
    found = choose(sweep, chosen.results, (sweep.final or {}).get("metric", "top5"))
    rows = [["group", "chosen", "validation", "median candidate"]]
    for item in found:
        about = " ".join(f"{axis}={value}" for axis, value in item.about.items())
        settings = " ".join(f"{axis.partition('.')[2]}={value}" for axis, value in item.settings.items())
        rows.append([about, settings, f"{item.value:.4f}", f"{item.losers[len(item.losers) // 2]:.4f}"])
    print(aligned(rows))
    if chosen.into is not None:
        chosen.into.write_text(text, encoding="utf-8")
    return 0
