"""A sweep's file: YAML that describes a grid of runs.

    data: {name: cifar100, validation: 50}     # what all runs share, section by section
    model: {name: resnet18}
    training: {epochs: 30}
    grid:                                      # the runs: the product of these lists, the last one varying fastest
      data.noise: [0.0, 0.4]                   # a setting and its values
      loss:                                    # or a section and what it may be, added to what the runs share
        - {name: cross_entropy}
        - {name: smooth, k: 5}
      run:                                     # or several sections at once
        - {loss: {name: smooth, k: 5}, training: {learning_rate: 0.3}}
      seed + data.seed: [0, 1, 2]              # or several settings that have the same value
    profiles:                                  # each overrides parts of the above; a list replaces a list
      smoke: {training: {epochs: 1}, grid: {seed: [0]}}
      gpu: {workers: 2}

A notebook's sweep names it (`notebook: 15_noise.ipynb`, a file beside the sweep's) and has `parameters` in place of
data, model, loss, training and seed; the lists of its grid belong to parameters, all of which the notebook must know.
Its parameter `profile` is the sweep's profile unless the file says otherwise.

A grid may also be a list of grids, whose runs come one after the other. A file that tunes has a section `final`, see
`topk.lab.tuning`.

The file is data: it names no code but that notebook, and a key that is not known is an error with its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from topk.lab import records

PROFILES = ("smoke", "laptop", "gpu")
SECTIONS = ("data", "model", "loss", "training")
_OVERRIDABLE = (*SECTIONS, "seed", "parameters", "grid", "workers")
_KNOWN = ("description", "notebook", *_OVERRIDABLE, "profiles", "final")
_LARGEST_FILE = 1_000_000
_MOST_NODES = 100_000
_MOST_RUNS = 10_000
_DEEPEST = 20


@dataclass(frozen=True)
class Choice:
    """Where a run stands in its file: the number of its grid, and its value on each axis of it."""

    grid: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _Run:
    settings: dict[str, Any]
    grid: int
    choice: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What a file asks for under one profile.

    Args:
        configs: the completed configuration of every run by its key, in the grid's order.
        profile: the profile.
        notebook: the notebook that each run executes, or None.
        workers: how many runs at a time, where the file says so.
        choices: by key, where the run stands in the grid.
        final: of a file that tunes, what the runs with the chosen settings will have instead (`topk.lab.tuning`).
    """

    configs: Mapping[str, dict[str, Any]]
    profile: str
    notebook: Path | None = None
    workers: int | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)
    final: Mapping[str, Any] | None = None


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's numbers: 1e-3 is one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _File:
    """A YAML file's content, and the line of every key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"{path} is larger than {_LARGEST_FILE} bytes")
        self.lines: dict[tuple[str, ...], int] = {}
        self._nodes = 0
        try:
            loader = _Loader(path.read_text(encoding="utf-8"))
            node = loader.get_single_node()
            self._visit(node, ())
            content = loader.construct_document(node) if node is not None else None
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML that a sweep may have: {error}") from None
        self.content: dict[str, Any] = self.mapping(content, ())

    def _visit(self, node: yaml.Node | None, place: tuple[str, ...]) -> None:
        self._nodes += 1
        if self._nodes > _MOST_NODES or len(place) > _DEEPEST:
            raise ValueError(f"{self.path} is too large once its aliases are followed")
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                here = (*place, str(key.value))
                self.lines.setdefault(here, key.start_mark.line + 1)
                if key.value in seen and key.value != "<<":
                    raise ValueError(f"{self.path}, line {key.start_mark.line + 1}: {key.value!r} is there twice")
                seen.add(key.value)
                self._visit(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                self._visit(value, (*place, str(number)))

    def error(self, message: str, *place: str) -> ValueError:
        """The error with the file and, where it is known, the line of a place."""
        line = next((self.lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self.lines), None)
        return ValueError(f"{self.path}{'' if line is None else f', line {line}'}: {message}")

    def explained(self, error: Exception) -> ValueError:
        """An error about a setting, with the line of the key that it quotes or calls by its section."""
        text = str(error)
        for place in self.lines:
            if len(place) > 1 and (repr(place[-1]) in text or re.search(rf"\.{re.escape(place[-1])}\b", text)):
                return self.error(text, *place)
        return self.error(text)

    def mapping(self, value: Any, place: tuple[str, ...]) -> dict[str, Any]:
        """The value, which must be a mapping whose keys are text."""
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise self.error(f"{'.'.join(place) or 'a sweep'} must be a mapping, got {value!r}", *place)
        return dict(value)

    def check_keys(self, value: Mapping[str, Any], known: tuple[str, ...], place: tuple[str, ...] = ()) -> None:
        """Refuses a key that is not known."""
        for key in value:
            if key not in known:
                raise self.error(f"{key!r} is unknown here; known are {', '.join(known)}", *place, key)


def read(path: Path | str, profile: str = "laptop") -> Sweep:
    """The sweep that a file describes under a profile; ValueError tells the file, the line and what is wrong there."""
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    file = _File(Path(path))
    merged = _with_profile(file, profile)
    notebook = _notebook(file, merged)
    allowed = ("parameters",) if notebook else (*SECTIONS, "seed")
    for name in (*SECTIONS, "seed", "parameters"):
        if name in merged and name not in allowed:
            raise file.error(f"{name!r} does not go with {'a notebook' if notebook else 'no notebook'}", name)
    workers = merged.get("workers")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise file.error(f"workers must be a number of at least 1, got {workers!r}", "workers")
    known = _parameters_of(notebook) if notebook else set()
    configs: dict[str, dict[str, Any]] = {}
    choices: dict[str, Choice] = {}
    for run in _settings(file, merged, allowed):
        try:
            config = _config(run.settings, notebook, known, profile)
            full = records.complete(config)
        except (ValueError, TypeError) as error:
            raise file.explained(error) from None
        key = records.key_of_completed(full)
        configs.setdefault(key, full)
        choices.setdefault(key, Choice(run.grid, run.choice))
    final = None if merged.get("final") is None else file.mapping(merged["final"], ("final",))
    return Sweep(configs, profile, notebook, workers, choices, final)


def _with_profile(file: _File, profile: str) -> dict[str, Any]:
    file.check_keys(file.content, _KNOWN)
    profiles = file.mapping(file.content.get("profiles"), ("profiles",))
    file.check_keys(profiles, PROFILES, ("profiles",))
    for name, part in profiles.items():
        file.check_keys(file.mapping(part, ("profiles", name)), _OVERRIDABLE, ("profiles", name))
    merged = {name: value for name, value in file.content.items() if name not in ("profiles", "description")}
    for name, value in (profiles.get(profile) or {}).items():
        place = ("profiles", profile, name)
        is_section = name not in ("seed", "workers") and not isinstance(value, list)
        merged[name] = (
            {**file.mapping(merged.get(name), (name,)), **file.mapping(value, place)} if is_section else value
        )
    return merged


def _settings(file: _File, merged: Mapping[str, Any], allowed: tuple[str, ...]) -> Iterator[_Run]:
    """The runs before defaults: what they share, and over it one value from each list of their grid."""
    shared: dict[str, Any] = {}
    for name in allowed:
        if name in merged:
            shared[name] = merged[name] if name == "seed" else file.mapping(merged[name], (name,))
    grids = [_checked_grid(file, grid, allowed) for grid in _grids(file, merged.get("grid"))]
    runs = sum(math.prod(map(len, grid.values())) for grid in grids)
    if runs > _MOST_RUNS:
        raise file.error(f"a sweep has at most {_MOST_RUNS} runs, this grid has {runs}", "grid")
    for number, grid in enumerate(grids):
        for values in product(*grid.values()):
            settings = {name: dict(value) if isinstance(value, dict) else value for name, value in shared.items()}
            choice = dict(zip(grid, values, strict=True))
            for axis, value in choice.items():
                _set(file, settings, axis, value, "parameters" in allowed)
            yield _Run(settings, number, choice)


def _grids(file: _File, given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list):
        return [file.mapping(given, ("grid",))]
    return [file.mapping(grid, ("grid", str(number))) for number, grid in enumerate(given)]


def _checked_grid(file: _File, grid: dict[str, Any], allowed: tuple[str, ...]) -> dict[str, Any]:
    for axis, values in grid.items():
        wrong = [part for part in axis.split(" + ") if not _is_axis(part, allowed)]
        if "parameters" not in allowed and wrong:
            raise file.error(f"{wrong[0]!r} is no section or setting; sections are {', '.join(allowed)}", "grid", axis)
        if not isinstance(values, list) or not values:
            raise file.error(f"{axis!r} must be a list of at least one value, got {values!r}", "grid", axis)
    return grid


def _is_axis(axis: str, allowed: tuple[str, ...]) -> bool:
    section, dot, name = axis.partition(".")
    return bool(section in SECTIONS and name) if dot else section in (*allowed, "run")


def _set(file: _File, settings: dict[str, Any], axis: str, value: Any, notebook: bool) -> None:
    section, _, name = axis.partition(".")
    if notebook:
        settings.setdefault("parameters", {})[axis] = value
    elif " + " in axis:
        for part in axis.split(" + "):
            _set(file, settings, part, value, notebook)
    elif axis == "run":
        file.check_keys(file.mapping(value, ("grid", "run")), (*SECTIONS, "seed"), ("grid", "run"))
        for part, settings_of_it in value.items():
            _set(file, settings, part, settings_of_it, notebook)
    elif axis == "seed":
        settings["seed"] = value
    elif name:
        settings.setdefault(section, {})[name] = value
    elif isinstance(value, str):
        settings[section] = {**settings.get(section, {}), "name": value}
    else:
        settings[section] = {**settings.get(section, {}), **file.mapping(value, ("grid", axis))}


def _config(settings: dict[str, Any], notebook: Path | None, known: set[str], profile: str) -> dict[str, Any]:
    if notebook is None:
        return settings
    parameters = dict(settings.get("parameters", {}))
    if "profile" in known:
        parameters.setdefault("profile", profile)
    unknown = sorted(set(parameters) - known)
    if unknown:
        raise ValueError(f"{notebook.name} has no parameter {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return {"notebook": notebook.name, "parameters": parameters}


def _notebook(file: _File, merged: Mapping[str, Any]) -> Path | None:
    """The notebook beside the file; a name with a folder in it is refused."""
    name = merged.get("notebook")
    if name is None:
        return None
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.ipynb", name):
        raise file.error(f"notebook must be the name of an .ipynb file beside the sweep's, got {name!r}", "notebook")
    path = file.path.resolve().parent / name
    if not path.is_file():
        raise file.error(f"there is no notebook {path}", "notebook")
    return path


def _parameters_of(notebook: Path) -> set[str]:
    from topk.lab.notebook_runs import parameters_of

    return parameters_of(notebook)
