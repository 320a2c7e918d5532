"""Sweeps: what a chapter's records are made by, from a YAML file or a mapping in the chapter's own cell (chapter 14).

    runs = sweep.records_of("14_cifar100", SWEEPS, profile=profile, records=records)

is the front door: with records="committed" it reads the chapter's table; with records="run" it runs what has no record
yet, with a progress bar, and returns the same kind of table. Interrupt it at any moment and call it again: every
finished run lies in a file of its own, named by the hash of its configuration, and long runs go on from a checkpoint.
`python -m topk_lab gather CHAPTER` folds the files into the table.

SWEEPS is {name: sweep}; a file NAME.yml holds one, or `base: OTHER` and what it has instead of OTHER.yml. A sweep:

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
      then: {candidates: 8, training: {epochs: 5}}        # the best 8 once more, nearer to the runs that count
    profiles: {smoke: {seeds: [0], data: {name: sample}}} # what a smaller size has instead; `full` is as written

An axis may set several settings, joined by " + ". Ranges are `log` or `uniform`; the candidates' random numbers depend
on the axis and the candidate alone, so that all contenders see the same learning rates. Tuning runs of two conditions
that come to the same configuration are one run. Rows say `sweep` (NAME, NAME.tuning or NAME.then), `contender`,
`candidate`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from topk_lab import data, losses, train
from topk_lab import records as tables
from topk_lab.data import Strict
from topk_lab.train import Config

PROFILES = ("smoke", "laptop", "full")
CONFIDENCE = 0.99
FEWEST = 3
"""Runs that differ in the seed only, for an interval."""
_METRIC = re.compile(r"((validation|train)\.)?(\w+_)?(top\d+|\d+|nll|ece|loss)")

Section = dict[str, Any]
Rows = Mapping[str, Mapping[str, Any]]
Search = dict[str, "Range | list[Any]"]


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
        return float(f"{low * (high / low) ** share if self.log else low + (high - low) * share:.3g}")


class Contender(Strict):
    """One loss, and what goes with it."""

    name: str = ""
    loss: Section
    model: Section = {}
    training: Section = {}
    search: Search = {}

    def title(self) -> str:
        """Its name, or its loss in one line."""
        settings = (f"{name}={tables.text_of(value)}" for name, value in self.loss.items() if name != "name")
        return self.name or " ".join([str(self.loss["name"]), *settings])


class Round(Strict):
    """Settings over those of the runs that count, or of the round before."""

    data: Section = {}
    training: Section = {}
    seeds: list[int] = [1000]


class Then(Round):
    """The best candidates of a search once more; the choice is among them."""

    candidates: int


class Tuning(Round):
    """How every contender's settings are chosen."""

    metric: str = "validation.top5"
    candidates: int | None = None
    search: Search = {}
    then: Then | None = None


class Sweep(Strict):
    """See this module's description."""

    description: str = ""
    data: Section
    model: Section
    training: Section = {}
    seeds: list[int] = [0]
    data_seed_follows: bool = False  # whether data.seed is the run's seed in the runs that count
    conditions: dict[str, list[Any]] = {}
    contenders: list[Contender]
    tuning: Tuning | None = None
    threads: int | None = 1
    profiles: dict[Literal["smoke", "laptop", "full"], Section] = {}

    def at(self, profile: str) -> Sweep:
        """The sweep in another size."""
        over = {str(name): value for name, value in self.profiles.items()}.get(profile, {})
        return Sweep.model_validate(_merged(self.model_dump(exclude_unset=True), over))

    def by_contender(self) -> list[Sweep]:
        """The same, a sweep for each contender: its settings can be chosen, and used, before another one begins."""
        return [self.model_copy(update={"contenders": [contender]}) for contender in self.contenders]


@dataclass(frozen=True)
class Run:
    """A run that a sweep asks for; `about` are columns of its row."""

    config: Config
    threads: int | None
    about: Mapping[str, Any]


def read(path: Path) -> dict[str, Sweep]:
    """The sweep of a file, by its name."""
    try:
        return {path.stem: Sweep.model_validate(_settings(path))}
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from None


def _settings(path: Path) -> dict[str, Any]:
    """A file's settings, over those of the file beside it that its `base` names."""
    settings: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if "base" not in settings:
        return settings
    below = path.with_name(f"{settings.pop('base')}.yml")
    if not below.is_file():
        raise ValueError(f"{path}: its base {below.stem!r} is not there: no file {below}")
    return _merged(_settings(below), settings)


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's numbers: 1e-3 is one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings over mappings; a section with another `name` replaces the one below, and so does a `k`."""
    found = dict(below)
    for name, value in above.items():
        old = found.get(name)
        if isinstance(old, dict) and isinstance(value, Mapping) and name != "k":
            alike = value.get("name", old.get("name")) == old.get("name")
            value = _merged(old, value) if alike else value
        found[name] = value
    return found


def _with(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the axes' values: {"loss.tau": 1, "seed + data.seed": 3, "model": {...}}."""
    for axis, value in values.items():
        for part in axis.split(" + "):
            section, _, name = part.partition(".")
            settings = _merged(settings, {section: {name: value}} if name else {section: value})
    return dict(settings)


def _cases(sweep: Sweep) -> Iterator[tuple[Contender, dict[str, Any]]]:
    """Every contender under every condition, and its settings there."""
    shared = {"data": sweep.data, "model": sweep.model, "training": sweep.training}
    for values in itertools.product(*sweep.conditions.values()):
        for contender in sweep.contenders:
            own = {"loss": contender.loss, "model": contender.model, "training": contender.training}
            yield contender, _with(_merged(shared, own), dict(zip(sweep.conditions, values, strict=True)))


def candidates(tuning: Tuning, contender: Contender) -> list[dict[str, Any]]:
    """The values of the searched axes, candidate after candidate."""
    axes = {**contender.search, **{name: axis for name, axis in tuning.search.items() if name not in contender.search}}
    if tuning.candidates is None:
        lists = [axis for axis in axes.values() if isinstance(axis, list)]
        if len(lists) < len(axes):
            raise ValueError("tuning.candidates must say how many to draw where an axis is a range")
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]
    found: list[dict[str, Any]] = [{} for _ in range(tuning.candidates)]
    for name, axis in axes.items():
        shares = (data.bits(0, f"search/{name}", tuning.candidates) >> np.uint64(11)) * 2.0**-53
        for values, share in zip(found, shares.tolist(), strict=True):
            values[name] = axis.at(share) if isinstance(axis, Range) else axis[int(share * len(axis))]
    return found


Tried = tuple[int, dict[str, Any], list[Config]]
"""A candidate's number, its values, and its configurations, one a tuning seed."""


def _tried(sweep: Sweep, contender: Contender, settings: Mapping[str, Any]) -> list[Tried]:
    """The search's candidates."""
    if (tuning := sweep.tuning) is None:
        return []
    drawn = enumerate(candidates(tuning, contender))
    return [(number, values, _configs(settings, values, tuning)) for number, values in drawn]


def _tried_then(sweep: Sweep, contender: Contender, settings: Mapping[str, Any], rows: Rows) -> list[Tried]:
    """The candidates among which is chosen: the search's, or its best in their second runs."""
    tried, tuning = _tried(sweep, contender, settings), sweep.tuning
    if tuning is None or tuning.then is None:
        return tried
    best = sorted(tried, key=lambda candidate: -_reached(tuning.metric, candidate, rows))[: tuning.then.candidates]
    return [(number, values, _configs(settings, values, tuning, tuning.then)) for number, values, _ in best]


def _configs(settings: Mapping[str, Any], values: Mapping[str, Any], *rounds: Round) -> list[Config]:
    """A candidate's configurations in the last of the rounds."""
    for each in rounds:
        settings = _merged(settings, {"data": each.data, "training": each.training})
    return [Config.model_validate({**_with(settings, values), "seed": seed}) for seed in rounds[-1].seeds]


def _reached(metric: str, candidate: Tried, rows: Rows) -> float:
    """The metric's mean over a candidate's runs; one that diverged has no metrics, and is not chosen."""
    return float(np.mean([rows[config.key].get(metric, -math.inf) for config in candidate[2]]))


def tuning_runs(name: str, sweep: Sweep) -> dict[str, Run]:
    """The candidates' runs by key."""
    tried = ((contender, _tried(sweep, contender, settings)) for contender, settings in _cases(sweep))
    return _runs(f"{name}.tuning", sweep, tried)


def then_runs(name: str, sweep: Sweep, rows: Rows) -> dict[str, Run]:
    """The best candidates' second runs by key, if there are any; `rows` holds those of `tuning_runs`."""
    if sweep.tuning is None or sweep.tuning.then is None:
        return {}
    tried = ((contender, _tried_then(sweep, contender, settings, rows)) for contender, settings in _cases(sweep))
    return _runs(f"{name}.then", sweep, tried)


def _runs(title: str, sweep: Sweep, tried: Iterable[tuple[Contender, list[Tried]]]) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for contender, candidates_of_it in tried:
        for number, _, configs in candidates_of_it:
            about = {"sweep": title, "contender": contender.title(), "candidate": number}
            for config in configs:
                found.setdefault(config.key, Run(config, sweep.threads, about))
    return found


def final_runs(name: str, sweep: Sweep, rows: Rows) -> dict[str, Run]:
    """The runs that count, by key; `rows` holds those of `tuning_runs` and `then_runs`."""
    found: dict[str, Run] = {}
    seed_axis = "seed + data.seed" if sweep.data_seed_follows else "seed"
    for contender, settings in _cases(sweep):
        chosen = choose(sweep, _tried_then(sweep, contender, settings, rows), rows)
        for seed in sweep.seeds:
            config = Config.model_validate(_with(settings, {**chosen, seed_axis: seed}))
            about = {"sweep": name, "contender": contender.title()}
            found.setdefault(config.key, Run(config, sweep.threads, about))
    return found


def choose(sweep: Sweep, tried: Sequence[Tried], rows: Rows) -> dict[str, Any]:
    """The candidate with the largest mean of the metric, the first of equals; {} without tuning."""
    if (tuning := sweep.tuning) is None:
        return {}
    best = max(tried, key=lambda candidate: _reached(tuning.metric, candidate, rows))
    if _reached(tuning.metric, best, rows) == -math.inf:
        raise ValueError(f"no candidate of {best[2][0].loss} has {tuning.metric!r}: did all diverge?")
    return best[1]


def stages(name: str, sweep: Sweep, rows: Rows) -> Iterator[dict[str, Run]]:
    """What is to run: the candidates, the best again, the runs that count; each needs the `rows` of those before."""
    yield tuning_runs(name, sweep)
    yield then_runs(name, sweep, rows)
    yield final_runs(name, sweep, rows)


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
    if records == "committed":
        return tables.load(chapter)
    if records != "run" or profile not in PROFILES:
        raise ValueError(f"records must be 'committed' or 'run', profile in {PROFILES}, got {records!r}, {profile!r}")
    found = {name: Sweep.model_validate(sweep).at(profile) for name, sweep in (sweeps or files_of(chapter)).items()}
    parameters = tables.text_of({"profile": profile, "records": records})
    about = {"notebook": f"{chapter}.ipynb", "notebook_parameters": parameters, "profile": profile}
    rows = known(chapter)
    asked, failed = list[tuple[str, Run]](), list[Exception]()
    for name, part in _parts(found):
        try:
            for runs in stages(name, part, rows):
                rows |= _execute(chapter, runs, rows, about, engine, jobs)
                asked += runs.items()
        except (RuntimeError, ValueError) as error:  # the other contenders do not wait for this one
            failed.append(error)
    if failed:
        raise failed[0]
    return pd.DataFrame([{**rows[key], "sweep": run.about["sweep"]} for key, run in asked])


def _parts(sweeps: Mapping[str, Sweep]) -> Iterator[tuple[str, Sweep]]:
    """Every sweep's contenders, one after the other."""
    return ((name, part) for name, sweep in sweeps.items() for part in sweep.by_contender())


def files_of(chapter: str) -> dict[str, Sweep]:
    """The sweeps of the files CHAPTER.yml and CHAPTER.*.yml here or in notebooks/."""
    for folder in (Path(), Path("notebooks"), Path(__file__).resolve().parents[2] / "notebooks"):
        paths = sorted([*folder.glob(f"{chapter}.yml"), *folder.glob(f"{chapter}.*.yml")])
        if paths:
            return {name: sweep for path in paths for name, sweep in read(path).items()}
    raise FileNotFoundError(f"chapter {chapter!r} has no sweep: no file {chapter}.yml here or in notebooks/")


def scratch(chapter: str) -> Path:
    """Where the rows of finished runs wait for `gather`, and checkpoints of unfinished ones lie."""
    return Path(os.environ.get("TOPK_RUNS") or data.cache() / "runs").resolve() / chapter


def known(chapter: str) -> dict[str, tables.Row]:
    """The chapter's rows, from its table and the scratch folder, by the key that today's program gives them.

    A record whose configuration lacks a setting that was added since is found under the key with that setting's
    default; one that today's program refuses is not found.
    """
    found = {}
    for row in [*tables.rows(chapter), *map(tables.restore, scratch(chapter).glob("*.json"))]:
        with contextlib.suppress(KeyError, ValueError):
            found[Config.of_record(row["config"]).key] = row
    return found


def _execute(
    chapter: str,
    runs: Mapping[str, Run],
    rows: Mapping[str, Any],
    about: Mapping[str, Any],
    engine: str,
    jobs: int | None,
) -> dict[str, tables.Row]:
    """The rows of those runs that have none, each saved as soon as it ends; joblib, or Ray under it, hands them out.

    Ray's workers save into the same folder, which all machines must share; its rows come back together at the end.
    """
    todo = {key: run for key, run in runs.items() if key not in rows}
    place, found, failed = scratch(chapter), dict[str, tables.Row](), dict[str, str]()
    count = jobs or (1 if torch.cuda.is_available() else train.hardware()["cores"])
    if engine == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    calls = (delayed(_one)(run, place, {**about, **run.about}) for run in todo.values())
    backend, as_they_end = {"local": ("loky", "generator_unordered"), "ray": ("ray", "list")}[engine]
    jobs = max(1, min(count, len(todo)))
    with parallel_config(backend=backend), tqdm(total=len(todo), unit="run", desc=chapter, disable=not todo) as bar:
        for row in Parallel(n_jobs=jobs, return_as=as_they_end)(calls):
            if "traceback" in row:
                failed[row["key"]] = row["traceback"]
            else:
                found[row["key"]] = row
            bar.update()
    for key, reason in failed.items():
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed, {len(found)} are saved. {key}:\n{reason}")
    return found


def _one(run: Run, place: Path, about: Mapping[str, Any]) -> tables.Row:
    """One run in a worker, which saves it. To diverge is a result: a row without metrics, which says `failure`."""
    key, config = run.config.key, run.config
    try:
        row = train.train(config, folder=place / "work" / key, threads=run.threads, progress=False, **about)
    except train.DivergedError as error:
        source = train.provenance(about["profile"])
        about = {name: value for name, value in about.items() if name != "profile"} | {"failure": str(error)}
        result = {"final": {}, "epochs": [], "seconds": 0.0}
        row = tables.row(config.plain(), result, losses.probe(config.loss), source, **about)
    except Exception:
        return {"key": key, "traceback": traceback.format_exc()}
    tables.save(row, place / f"{key}.json")
    shutil.rmtree(place / "work" / key, ignore_errors=True)
    return row


def result_of(
    chapter: str, compute: Callable[[], Mapping[str, Any]], *, parameters: Mapping[str, Any], records: str = "committed"
) -> tuple[dict[str, Any], tables.Row]:
    """Of a chapter that is its own experiment: the result and its row, committed or computed.

    Args:
        chapter: the chapter's name.
        compute: returns the result, numbers in lists and mappings; called where records is "run" and there is none.
        parameters: what decides the result, the notebook's own such as profile; part of the key.
        records: "committed" or "run".
    """
    if records == "committed":
        row = tables.rows_of(tables.load(chapter).sort_values("date"))[-1]
        return json.loads(row["result"]), row
    config = {"notebook": f"{chapter}.ipynb", "parameters": dict(parameters)}
    path = scratch(chapter) / f"{tables.key_of(config)}.json"
    if not path.is_file():
        began = time.monotonic()
        result = {"final": compute(), "epochs": [], "seconds": time.monotonic() - began}
        tables.save(tables.row(config, result, None, train.provenance(parameters.get("profile")), sweep=chapter), path)
    row = tables.restore(path)
    return json.loads(row["result"]), row


# --- gathering and reproducing ---


def pending(sweeps: Mapping[str, Sweep], rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every sweep how many runs it asks for, how many of them are in `rows`, and the command for the rest."""
    found = []
    for name, sweep in sweeps.items():
        recorded: dict[str, list[bool]] = {f"{name}.tuning": [], f"{name}.then": [], name: []}
        for part in sweep.by_contender():
            ready, asked, cases = True, stages(name, part, rows), sum(1 for _ in _cases(part))
            then = part.tuning.then if part.tuning else None
            sizes = (0, cases * then.candidates * len(then.seeds) if then else 0, cases * len(part.seeds))
            for there, size in zip(recorded.values(), sizes, strict=True):
                own = [key in rows for key in next(asked)] if ready else [False] * size
                there += own
                ready &= all(own)
        command = f"python -m topk_lab sweep notebooks/{name}.yml"
        for title, there in recorded.items():
            found += [{"sweep": title, "runs": len(there), "recorded": sum(there), "command": command}] if there else []
    return found


def _asked(sweeps: Mapping[str, Sweep], rows: Rows) -> dict[str, list[str]]:
    """{key: the sweeps that ask for this run}, as far as the runs in `rows` say which."""
    found: dict[str, list[str]] = {}
    for name, part in _parts(sweeps):
        for runs in stages(name, part, rows):
            for key, run in runs.items():
                found.setdefault(key, []).append(run.about["sweep"])
            if not set(runs) <= set(rows):
                break
    return found


def gather(chapter: str, sweeps: Mapping[str, Sweep]) -> tuple[Path, int]:
    """Folds the scratch folder's rows into the chapter's table; returns the table and how many rows were new.

    Of runs of sweeps those that these sweeps ask for: what ran in a smaller size is no result, and stays in the folder.
    """
    before, found = tables.rows(chapter), known(chapter)
    asked = _asked(sweeps, found)
    titles = {found[key]["key"]: " ".join(names) for key, names in asked.items() if key in found}
    waiting = {path: tables.restore(path) for path in sorted(scratch(chapter).glob("*.json"))}
    files = {path: row for path, row in waiting.items() if row["key"] in asked or "contender" not in row}
    rows = {row["key"]: row for row in [*before, *files.values()]}
    for key in titles.keys() & rows.keys():
        rows[key]["sweep"] = titles[key]
    about = {item["sweep"]: item for item in [*tables.sweeps(chapter), *pending(sweeps, found)]}
    path = tables.write(chapter, list(rows.values()), list(about.values()))
    for file in files:
        file.unlink()
    return path, len(rows) - len(before)


def reproduce(chapter: str, key: str, tolerance: float | None = None) -> pd.DataFrame:
    """Runs the configuration of a record again and compares its metrics; says beforehand how.

    To the last digit where processor, torch, threads and data are those of the record. Elsewhere, and where features
    were extracted anew, a metric must lie where another seed would be expected: in the 99 % prediction interval of the
    runs that differ in the seed only, mean -+ t s sqrt(1 + 1/n); with fewer than three of them, within `tolerance`.

    Returns:
        a row a metric: metric, then, now, low, high, holds.
    """
    rows = tables.rows_of(tables.load(chapter))
    row = next((row for row in rows if row["key"].startswith(key)), None)
    if row is None:
        raise ValueError(f"no record of {chapter} has a key that starts with {key!r}")
    config = Config.of_record(row["config"])
    typed = config.data.model_dump()  # 1 in the record is 1.0 here; what was added since was not part of its print
    settings = {name: typed.get(name, value) for name, value in json.loads(row["config"])["data"].items()}
    fingerprint = data.fingerprint(settings, data.parts_of(config.data))
    here = {"hardware.cpu": train.hardware()["cpu"], "hardware.gpu": train.hardware()["gpu"]}
    here |= {"versions.torch": train.versions()["torch"], "data_fingerprint": fingerprint}
    differ = ", ".join(name for name, now in here.items() if row.get(name) != now)
    alike = [other for other in rows if _but_for_seeds(other["config"]) == _but_for_seeds(row["config"])]
    if differ and len(alike) < FEWEST and tolerance is None:
        raise ValueError(f"{differ} differ, and there are only {len(alike)} seeds: say how far metrics may be off")
    by_seeds = f"by the {CONFIDENCE:.0%} interval over {len(alike)} runs with other seeds"
    how = by_seeds if len(alike) >= FEWEST else f"within {tolerance}"
    print(f"{differ} differ: comparing {how}" if differ else "comparing to the last digit", flush=True)
    now = train.train(config, threads=int(row["threads"]))
    compared = []
    for name in [name for name in now if _METRIC.fullmatch(name) and name in row]:
        values = np.array([other[name] for other in alike if name in other], dtype=float)
        low, high = _bounds(values, row[name], tolerance) if differ else (row[name], row[name])
        compared.append((name, row[name], now[name], low, high, low <= now[name] <= high))
    return pd.DataFrame(compared, columns=["metric", "then", "now", "low", "high", "holds"])


def _bounds(values: data.Array, then: float, tolerance: float | None) -> tuple[float, float]:
    if len(values) < FEWEST:
        return then - (tolerance or 0) * max(1, abs(then)), then + (tolerance or 0) * max(1, abs(then))
    mean, count = values.mean(), len(values)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * values.std(ddof=1) * math.sqrt(1 + 1 / count)
    half = max(half, 1e-3 * max(1, abs(mean)))  # seeds may agree; rounding can still move a row over the edge
    return float(mean - half), float(mean + half)


def _but_for_seeds(text: str) -> str:
    config = json.loads(text)
    data_settings = {name: value for name, value in config.get("data", {}).items() if name != "seed"}
    return tables.text_of({**config, "seed": None, "data": data_settings})
