"""Sweeps: what a chapter's records are made by, from a YAML file or a mapping in the chapter's own cell (chapter 14).

    runs = sweep.records_of("14_cifar100", SWEEPS, profile=profile, records=records)

is the front door: with records="committed" it reads the chapter's table; with records="run" it runs what has no record
yet, with a progress bar, and returns the same kind of table. Interrupt it at any moment and call it again: every
finished run lies in a file of its own, named by the hash of its configuration, and long runs go on from a checkpoint.
`python -m topk_lab gather CHAPTER` folds the files into the table.

SWEEPS is {name: sweep}; a file NAME.yml holds one. A sweep:

    data: {name: features, set: cifar100-...-pca256}      # sections of the configuration, see topk_lab.train.Config
    model: {name: linear}
    training: {epochs: 5, batch: 500, optimizer: adamw, schedule: one_cycle, evaluate_every: 0}
    seeds: [0, 1, 2, 3, 4]                                # of the runs that count
    conditions: {data.noise: [0.0, 0.4]}                  # every contender is run, and tuned, under each of them
    contenders:
      - loss: {name: cross_entropy}
      - loss: {name: smooth, k: 5}
        search: {loss.tau: {log: [0.1, 10]}}              # beside what all search
    tuning:                                               # leave it out where nothing is tuned
      data: {validation: 50}                              # over the sections above
      seeds: [1000, 1001]
      metric: validation.top5                             # the largest mean over the seeds is chosen
      candidates: 32                                      # without it: every combination of the lists
      search: {training.learning_rate: {log: [1.0e-3, 1.0]}, training.weight_decay: [0.0, 0.1]}
    profiles: {smoke: {seeds: [0], data: {name: sample}}} # what a smaller size has instead; `full` is as written

An axis may set several settings, joined by " + ". Ranges are `log` or `uniform`; the candidates' random numbers depend
on the axis and the candidate alone, so that all contenders see the same learning rates. Tuning runs of two conditions
that come to the same configuration are one run. Rows say `sweep` (NAME, or NAME.tuning), `contender`, `candidate`.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import yaml
from joblib import Parallel, delayed, parallel_config
from pydantic import ValidationError, model_validator
from scipy import stats
from tqdm import tqdm

from topk_lab import data, losses, records, train
from topk_lab.data import Strict
from topk_lab.train import Config

Profile = Literal["smoke", "laptop", "full"]
PROFILES = ("smoke", "laptop", "full")
CONFIDENCE = 0.99
_FEWEST = 3  # runs that differ in the seed only, for an interval
_Section = dict[str, Any]


# --- what a sweep asks for ---


class Range(Strict):
    """Values from `log` or `uniform`, [smallest, largest]."""

    log: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Range:
        low, high = self.log or self.uniform or (1.0, 0.0)
        if (self.log is None) == (self.uniform is None) or low >= high or (self.log is not None and low <= 0):
            raise ValueError(f"a range must be log: [a, b] or uniform: [a, b] with a < b, log's a > 0, got {self}")
        return self

    def at(self, share: float) -> float:
        """The value at this share of the range, to three digits."""
        low, high = self.log or self.uniform or (0.0, 1.0)
        value = low * (high / low) ** share if self.log else low + (high - low) * share
        return float(f"{value:.3g}")


Search = dict[str, Range | list[Any]]


class Contender(Strict):
    """One loss, and what goes with it."""

    name: str = ""
    loss: _Section
    model: _Section = {}
    training: _Section = {}
    search: Search = {}


class Tuning(Strict):
    """How every contender's settings are chosen."""

    data: _Section = {}
    training: _Section = {}
    seeds: list[int] = [1000]
    metric: str = "validation.top5"
    candidates: int | None = None
    search: Search = {}


class Sweep(Strict):
    """See this module's description."""

    description: str = ""
    data: _Section
    model: _Section
    training: _Section = {}
    seeds: list[int] = [0]
    data_seed_follows: bool = False  # whether data.seed is the run's seed in the runs that count
    conditions: dict[str, list[Any]] = {}
    contenders: list[Contender]
    tuning: Tuning | None = None
    threads: int | None = 1
    profiles: dict[Profile, _Section] = {}

    def at(self, profile: str) -> Sweep:
        """The sweep in another size."""
        over = self.profiles.get(profile, {})  # type: ignore[call-overload]
        return Sweep.model_validate(_merged(self.model_dump(exclude_unset=True), over))


@dataclass(frozen=True)
class Run:
    """A run that a sweep asks for."""

    config: Config
    about: Mapping[str, Any] = field(default_factory=dict)  # columns of its row


def read(path: Path) -> dict[str, Sweep]:
    """The sweep of a file, by its name."""
    try:
        return {path.stem: Sweep.model_validate(yaml.load(path.read_text(encoding="utf-8"), _Loader))}
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's numbers: 1e-3 is one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings over mappings; a section that names something else (`name`) replaces the one below."""
    found = copy.deepcopy(dict(below))
    for name, value in above.items():
        old = found.get(name)
        other = (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and value.get("name", old.get("name")) != old.get("name")
        )
        both = isinstance(old, dict) and isinstance(value, Mapping) and not other and name != "k"
        found[name] = _merged(old, value) if both else value
    return found


def _with(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the axes' values: {"loss.tau": 1, "seed + data.seed": 3, "model": {...}}."""
    for axis, value in values.items():
        for part in axis.split(" + "):
            section, _, name = part.partition(".")
            settings = _merged(settings, {section: {name: value}} if name else {section: value})
    return dict(settings)


def _settings(sweep: Sweep, contender: Contender, condition: Mapping[str, Any]) -> dict[str, Any]:
    shared = {"data": sweep.data, "model": sweep.model, "training": sweep.training}
    own = {"loss": contender.loss, "model": contender.model, "training": contender.training}
    return _with(_merged(shared, own), condition)


def _conditions(sweep: Sweep) -> list[dict[str, Any]]:
    return [
        dict(zip(sweep.conditions, values, strict=True)) for values in itertools.product(*sweep.conditions.values())
    ]


def candidates(tuning: Tuning, contender: Contender) -> list[dict[str, Any]]:
    """The values of the searched axes, candidate after candidate."""
    axes = contender.search | {name: axis for name, axis in tuning.search.items() if name not in contender.search}
    if tuning.candidates is None:
        if any(isinstance(axis, Range) for axis in axes.values()):
            raise ValueError("tuning.candidates must say how many to draw where an axis is a range")
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]  # type: ignore[arg-type]
    shares = {name: (data.bits(0, f"search/{name}", tuning.candidates) >> np.uint64(11)) * 2.0**-53 for name in axes}
    return [
        {name: axis.at(shares[name][i]) if isinstance(axis, Range) else axis[int(shares[name][i] * len(axis))] for name, axis in axes.items()}
        for i in range(tuning.candidates)
    ]  # fmt: skip


def tuning_runs(name: str, sweep: Sweep) -> dict[str, Run]:
    """The candidates' runs by key."""
    found: dict[str, Run] = {}
    for condition, contender, number, values, seed in _tried(sweep):
        config = _tuning_config(sweep, contender, condition, values, seed)
        about = {"sweep": f"{name}.tuning", "contender": contender.name or _short(contender.loss), "candidate": number}
        found.setdefault(config.key, Run(config, about))
    return found


def _tried(sweep: Sweep) -> Iterator[tuple[dict[str, Any], Contender, int, dict[str, Any], int]]:
    if sweep.tuning is None:
        return
    for condition, contender in itertools.product(_conditions(sweep), sweep.contenders):
        for number, values in enumerate(candidates(sweep.tuning, contender)):
            for seed in sweep.tuning.seeds:
                yield condition, contender, number, values, seed


def _tuning_config(sweep: Sweep, contender: Contender, condition: Mapping[str, Any], values: Any, seed: int) -> Config:
    assert sweep.tuning is not None
    settings = _merged(
        _settings(sweep, contender, condition), {"data": sweep.tuning.data, "training": sweep.tuning.training}
    )
    return Config.model_validate({**_with(settings, values), "seed": seed})


def final_runs(name: str, sweep: Sweep, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Run]:
    """The runs that count, by key; `rows` are those of `tuning_runs`, by key."""
    found: dict[str, Run] = {}
    for condition, contender in itertools.product(_conditions(sweep), sweep.contenders):
        settings = _with(_settings(sweep, contender, condition), choose(sweep, contender, condition, rows))
        for seed in sweep.seeds:
            seeds = {"seed + data.seed" if sweep.data_seed_follows else "seed": seed}
            config = Config.model_validate(_with(settings, seeds))
            about = {"sweep": name, "contender": contender.name or _short(contender.loss)}
            found.setdefault(config.key, Run(config, about))
    return found


def choose(
    sweep: Sweep, contender: Contender, condition: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The candidate with the largest mean of the metric over the tuning seeds, the first of equals; {} without tuning."""
    if sweep.tuning is None:
        return {}
    best, chosen = -math.inf, dict[str, Any]()
    for values in candidates(sweep.tuning, contender):
        keys = [_tuning_config(sweep, contender, condition, values, seed).key for seed in sweep.tuning.seeds]
        reached = [rows[key].get(sweep.tuning.metric, -math.inf) for key in keys]  # a run that diverged has no metrics
        if sum(reached) / len(reached) > best:
            best, chosen = sum(reached) / len(reached), values
    if not chosen and any(candidates(sweep.tuning, contender)):
        raise ValueError(f"no candidate of {_short(contender.loss)} has {sweep.tuning.metric}: did all diverge?")
    return chosen


def _short(loss: Mapping[str, Any]) -> str:
    return " ".join(
        [str(loss["name"]), *(f"{name}={records.text_of(x)}" for name, x in loss.items() if name != "name")]
    )


# --- running ---


def records_of(
    chapter: str,
    sweeps: Mapping[str, Any] | None = None,
    *,
    profile: str = "full",
    records: str = "committed",
    engine: str = "local",
    jobs: int | None = None,
) -> pd.DataFrame:
    """A chapter's runs as a table: the committed ones, or those of the sweeps, run where they have no record yet.

    Args:
        chapter: the chapter's name, which is its notebook's and its table's.
        sweeps: {name: sweep}, mappings or `Sweep`s; None: the files CHAPTER*.yml in this folder or in notebooks/.
        profile: the size in which sweeps are run: "smoke", "laptop" or "full".
        records: "committed" reads the chapter's table, "run" runs.
        engine: "local", or "ray" for a Ray cluster that is running.
        jobs: runs at a time; None: one a core, on a GPU one.
    """
    from topk_lab import records as tables

    if records == "committed":
        return tables.load(chapter)
    if records != "run" or profile not in PROFILES:
        raise ValueError(
            f"records must be 'committed' or 'run', profile one of {PROFILES}, got {records!r}, {profile!r}"
        )
    found = {
        name: sweep if isinstance(sweep, Sweep) else Sweep.model_validate(sweep)
        for name, sweep in (sweeps or files_of(chapter)).items()
    }
    about = {
        "notebook": f"{chapter}.ipynb",
        "notebook_parameters": tables.text_of({"profile": profile, "records": records}),
        "profile": profile,
    }
    rows = run(chapter, {name: sweep.at(profile) for name, sweep in found.items()}, about, engine, jobs)
    return pd.DataFrame(rows)


def files_of(chapter: str) -> dict[str, Sweep]:
    """The sweeps of the files CHAPTER.yml and CHAPTER.*.yml here or in notebooks/."""
    for folder in (Path(), Path("notebooks"), Path(__file__).resolve().parents[2] / "notebooks"):
        paths = sorted([*folder.glob(f"{chapter}.yml"), *folder.glob(f"{chapter}.*.yml")])
        if paths:
            return {name: sweep for path in paths for name, sweep in read(path).items()}
    raise FileNotFoundError(f"chapter {chapter!r} has no sweep: no file {chapter}.yml here or in notebooks/")


def scratch(chapter: str) -> Path:
    """Where the rows of finished runs wait for `gather`, and checkpoints of unfinished ones lie."""
    return Path(os.environ.get("TOPK_RUNS") or data.cache() / "runs") / chapter


def known(chapter: str) -> dict[str, records.Row]:
    """The chapter's rows, from its table and the scratch folder, by the key that today's program gives them.

    A record whose configuration lacks a setting that was added since is found under the key with that setting's
    default; one that today's program refuses is not found.
    """
    found = {}
    for row in records.rows_of(records.load(chapter)):
        try:
            found[Config.of_record(row["config"]).key] = row
        except (KeyError, ValueError):
            continue
    return found | {path.stem: records.restore(path) for path in scratch(chapter).glob("*.json")}


def run(
    chapter: str, sweeps: Mapping[str, Sweep], about: Mapping[str, Any], engine: str = "local", jobs: int | None = None
) -> list[records.Row]:
    """Runs what the sweeps ask for and has no record yet, candidates first; returns the rows of all."""
    rows = known(chapter)
    tuning = {key: run for name, sweep in sweeps.items() for key, run in tuning_runs(name, sweep).items()}
    threads = {key: sweep.threads for name, sweep in sweeps.items() for key in tuning_runs(name, sweep)}
    rows |= _execute(
        chapter, {key: run for key, run in tuning.items() if key not in rows}, threads, about, engine, jobs
    )
    final: dict[str, Run] = {}
    for name, sweep in sweeps.items():
        own = final_runs(name, sweep, rows)
        final |= own
        threads |= dict.fromkeys(own, sweep.threads)
    rows |= _execute(chapter, {key: run for key, run in final.items() if key not in rows}, threads, about, engine, jobs)
    asked = tuning | final
    return [{**rows[key], "sweep": run.about["sweep"]} for key, run in asked.items()]


def _execute(
    chapter: str,
    pending: Mapping[str, Run],
    threads: Mapping[str, int | None],
    about: Mapping[str, Any],
    engine: str,
    jobs: int | None,
) -> dict[str, records.Row]:
    """Runs, each saved as soon as it ends; joblib hands them out, on this machine or over a Ray cluster."""
    place, failed = scratch(chapter), dict[str, str]()
    found: dict[str, records.Row] = {}
    count = jobs or (1 if torch.cuda.is_available() else train.hardware()["cores"])
    calls = (
        delayed(_one)(run.config.plain(), place / "work" / key, threads[key], {**about, **run.about})
        for key, run in pending.items()
    )
    with _backend(engine), tqdm(total=len(pending), unit="run", desc=chapter, disable=not pending) as bar:
        for row in Parallel(n_jobs=min(count, max(1, len(pending))), return_as="generator_unordered")(calls):
            if "traceback" in row:
                failed[row["key"]] = row["traceback"]
            else:
                found[row["key"]] = row
                records.save(row, place / f"{row['key']}.json")
            shutil.rmtree(place / "work" / row["key"], ignore_errors=True)
            bar.update()
    if failed:
        key, reason = next(iter(failed.items()))
        raise RuntimeError(f"{len(failed)} of {len(pending)} runs failed; {len(found)} were saved. {key}:\n{reason}")
    return found


def _backend(engine: str) -> parallel_config:
    if engine == "ray":
        from ray.util.joblib import register_ray  # type: ignore[import-not-found]

        register_ray()
        return parallel_config(backend="ray")
    if engine != "local":
        raise ValueError(f"engine must be 'local' or 'ray', got {engine!r}")
    return parallel_config(backend="loky")


def _one(config: Mapping[str, Any], folder: Path, threads: int | None, about: Mapping[str, Any]) -> records.Row:
    """One run in a worker; one that diverged is a row too, without metrics, since to diverge is a result."""
    full = Config.model_validate(config)
    try:
        return train.train(full, folder=folder, threads=threads, progress=False, **about)
    except train.DivergedError as error:
        about = {**about, "failure": str(error)}
        result = {"final": {}, "epochs": [], "seconds": 0.0}
        source = train.provenance(about.pop("profile", None))
        return records.row(full.plain(), result, losses.probe(full.loss), source, **about)
    except Exception:
        return {"key": full.key, "traceback": traceback.format_exc()}


def result_of(
    chapter: str, compute: Callable[[], Mapping[str, Any]], *, parameters: Mapping[str, Any], records: str = "committed"
) -> tuple[dict[str, Any], records.Row]:
    """Of a chapter that is its own experiment: the result and its row, committed or computed.

    Args:
        chapter: the chapter's name.
        compute: returns the result, numbers in lists and mappings; called where records is "run" and there is none.
        parameters: what decides the result, the notebook's own such as profile; part of the key.
        records: "committed" or "run".
    """
    from topk_lab import records as tables

    if records == "committed":
        row = tables.rows_of(tables.load(chapter).sort_values("date"))[-1]
        return json.loads(row["result"]), row
    config = {"notebook": f"{chapter}.ipynb", "parameters": dict(parameters)}
    path = scratch(chapter) / f"{tables.key_of(config)}.json"
    if not path.is_file():
        began = pd.Timestamp.now()
        result = {"final": compute(), "epochs": [], "seconds": (pd.Timestamp.now() - began).total_seconds()}
        source = train.provenance(parameters.get("profile"))
        tables.save(tables.row(config, result, None, source, sweep=chapter), path)
    row = tables.restore(path)
    return json.loads(row["result"]), row


# --- gathering and reproducing ---


def pending(chapter: str, sweeps: Mapping[str, Sweep], rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every sweep how many runs it asks for, how many have a record, and the command for the rest."""
    found = []
    for name, sweep in sweeps.items():
        tuning = tuning_runs(name, sweep)
        command = f"python -m topk_lab sweep notebooks/{name}.yml"
        if tuning:
            recorded = sum(key in rows for key in tuning)
            found.append({"sweep": f"{name}.tuning", "runs": len(tuning), "recorded": recorded, "command": command})
        runs = len(_conditions(sweep)) * len(sweep.contenders) * len(sweep.seeds)
        ready = all(key in rows for key in tuning)
        recorded = sum(key in rows for key in final_runs(name, sweep, rows)) if ready else 0
        found.append({"sweep": name, "runs": runs, "recorded": recorded, "command": command})
    return found


def gather(chapter: str, sweeps: Mapping[str, Sweep]) -> tuple[Path, int]:
    """Folds the scratch folder's rows into the chapter's table; returns the table and how many rows were new."""
    before, rows, files = records.load(chapter), known(chapter), sorted(scratch(chapter).glob("*.json"))
    table = records.rows_of(before) + [records.restore(path) for path in files]
    unique = {row["key"]: row for row in table}
    about = {item["sweep"]: item for item in records.sweeps(chapter)}
    about |= {item["sweep"]: item for item in pending(chapter, sweeps, rows)}
    path = records.write(chapter, list(unique.values()), list(about.values()))
    for file in files:
        file.unlink()
    return path, len(unique) - len(before)


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
        """Whether it lies there."""
        return self.low <= self.now <= self.high


def reproduce(
    chapter: str, key: str, tolerance: float | None = None, say: Callable[[str], None] = print
) -> list[Comparison]:
    """Runs the configuration of a record again and compares its metrics; says beforehand how.

    To the last digit where processor, torch, threads and data are those of the record. Elsewhere, and where features
    were extracted anew, a metric must lie where another seed would be expected: in the 99 % prediction interval of the
    runs that differ in the seed only, mean -+ t s sqrt(1 + 1/n); with fewer than three of them, within `tolerance`.
    """
    rows = records.rows_of(records.load(chapter))
    (row,) = [row for row in rows if row["key"].startswith(key)] or [{}]
    if not row:
        raise ValueError(f"no record of {chapter} has a key that starts with {key!r}")
    config = Config.of_record(row["config"])
    found = data.parts_of(config.data)
    differ = [
        what
        for what, then, now in (
            ("processor", row["hardware.cpu"], train.hardware()["cpu"]),
            ("GPU", row.get("hardware.gpu"), train.hardware()["gpu"]),
            ("torch", row["versions.torch"], train.versions()["torch"]),
            ("data (extracted or decoded anew)", row["data_fingerprint"], data.fingerprint(json.loads(row["config"])["data"], found)),
        )
        if then != now
    ]  # fmt: skip
    alike = [other for other in rows if _but_for_seeds(other["config"]) == _but_for_seeds(row["config"])]
    if not differ:
        say("comparing to the last digit: processor, torch, threads and data are those of the record")
    elif len(alike) >= _FEWEST:
        say(
            f"other {', '.join(differ)}: comparing with the {CONFIDENCE:.0%} interval over {len(alike)} runs with other seeds"
        )
    elif tolerance is not None:
        say(f"other {', '.join(differ)}, and only {len(alike)} seeds: comparing within {tolerance:g}")
    else:
        raise ValueError(
            f"other {', '.join(differ)}, and only {len(alike)} seeds: say how far metrics may be off, --tolerance"
        )
    now = train.train(config, threads=int(row["threads"]))
    metrics = [
        name
        for name in now
        if re.fullmatch(r"((validation|train)\.)?(\w+_)?(top\d+|\d+|nll|ece|loss)", name) and name in row
    ]
    bounds = {name: _bounds(name, row, alike, tolerance, exact=not differ) for name in metrics}
    return [Comparison(name, float(row[name]), float(now[name]), *bounds[name]) for name in metrics]


def _bounds(name: str, row: Any, alike: list[Any], tolerance: float | None, *, exact: bool) -> tuple[float, float]:
    values = np.array([other[name] for other in alike if name in other], dtype=float)
    if exact:
        return row[name], row[name]
    if len(values) < _FEWEST:
        half = (tolerance or 0.0) * max(1.0, abs(row[name]))
        return row[name] - half, row[name] + half
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * values.std(ddof=1) * math.sqrt(1 + 1 / len(values))
    half = max(
        half, 1e-3 * max(1.0, abs(values.mean()))
    )  # seeds may agree; rounding can still move a row over the edge
    return float(values.mean() - half), float(values.mean() + half)


def _but_for_seeds(text: str) -> str:
    config = json.loads(text)
    config.pop("seed", None)
    config.get("data", {}).pop("seed", None)
    return records.text_of(config)
