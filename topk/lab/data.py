"""Data sets by their settings: CIFAR-100, 64 x 64 ImageNet, image trees, frozen features, synthetic sets (chapter 14).

`load(settings)` gives arrays, class names, counts and a fingerprint. What the settings change is done in this order,
and each step draws from a stream of its own, so that no step's outcome depends on whether another was asked for:

1. **Validation.** `validation` rows of each class (an integer) or a part of each class (a float below 1) leave the
   training split for the validation split, whatever comes later.
2. **Noise.** With probability `noise` the label of a row is drawn anew, uniformly from the classes of its superclass,
   *the true one included*. So for the five classes of CIFAR-100's superclasses a label is wrong with probability
   0.8 * `noise`, and `noise` = 1 leaves nothing but the superclass: a top-5 error of zero stays possible throughout.
   This is the law of Berrada, Zisserman and Kumar (2018), whose text speaks of CIFAR-100's superclasses; their
   published program takes blocks of five consecutive labels (label - label % 5), which with alphabetical labels are
   other groups, and leaves the validation images clean. Here the training and the validation split carry the noise,
   the test split never does.
3. **Fraction.** Of each class that part is kept. A smaller fraction is a subset of a larger one.
4. **Imbalance.** With n rows in the largest class and C classes, class c keeps floor(n * imbalance^(-c / (C - 1)))
   rows, the exponential profile of Cao et al. (2019): class 0 stays whole, the last keeps n / imbalance.

Steps 3 and 4 choose by the clean label, so that the sizes of the classes are exact before noise moves labels about.
The test split is always whole.

`python -m topk.lab data` fills the cache (`topk.lab.data_command`); from a program `fill`, `store` and `export` do.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topk.lab import cache, packed, synthetic
from topk.lab.cache import CacheError, Entry
from topk.lab.filling import export, fill, store
from topk.lab.packed import in_order, split_of
from topk.lab.settings import check_name, completed
from topk.lab.streams import raw, stream, uniform

__all__ = ["DataSet", "ImageFiles", "Split", "add_arguments", "complete", "export", "fill", "load", "store"]

VERSION = 1
"""Part of every fingerprint: a change of what `load` makes of the same settings needs another."""

_COMMON: dict[str, Any] = {"validation": None, "fraction": 1.0, "noise": 0.0, "imbalance": 1.0, "seed": 0}
_SYNTHETIC: dict[str, Any] = {
    "classes": 5,
    "dimension": 2,
    "modes": 4,
    "rows": 200,
    "test_rows": 1000,
    "difficulty": 0.5,
}
_KINDS: dict[str, dict[str, Any]] = {
    "cifar100": {"parts": None},
    "imagenet64": {"parts": None},
    "imagefolder": {"set": "", "size": 224},
    "features": {"set": ""},
    "sample": {},
    **{f"synthetic/{kind}": _SYNTHETIC for kind in synthetic.KINDS},
}


@dataclass(frozen=True)
class ImageFiles:
    """Images that stay in their files: looks like an array (rows, size, size, 3) as far as its shape is asked for.

    `paths` are bytes, with '/', relative to `folder`. `size` is the side of what batches are made of.
    """

    folder: Path
    paths: np.ndarray
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the batches' images, all rows together."""
        return len(self.paths), self.size, self.size, 3

    @property
    def ndim(self) -> int:
        """Four, as for images in an array."""
        return 4

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Split:
    """Inputs, uint8 images (rows, height, width, channels) or float32 features (rows, features), and int64 labels."""

    inputs: np.ndarray | ImageFiles
    labels: np.ndarray


@dataclass(frozen=True)
class DataSet:
    """A data set as `load` gives it.

    `superclass` maps classes to superclasses; `counts` are the training rows of each class, as labelled; `mean` and
    `std` are the channels' (empty for features), over all training images in the cache; `fingerprint` identifies
    settings and content; `complete` tells whether the cache holds every part of the training split.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    superclass: np.ndarray | None
    counts: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    settings: dict[str, Any]
    complete: bool = True


# --- settings --------------------------------------------------------------------------------------------------------


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a data set, defaults filled in; unknown names and keys are refused, values are checked.

    Common keys: ``validation`` 0, ``fraction`` 1.0, ``noise`` 0.0, ``imbalance`` 1.0, ``seed`` 0 (see this module's
    description). Further ones by name:

    ===================  ==========================================================================================
    "cifar100"           ``parts`` of the training split to use, None for all that are in the cache
    "imagenet64"         ``parts``, as above
    "imagefolder"        ``set``, the name it was imported under; ``size``, of images that are streamed from files
    "features"           ``set``, the name it was stored under
    "sample"             nothing: the small real sample in the package (`topk.lab.sample`)
    "synthetic/<kind>"   ``classes`` 5, ``dimension`` 2, ``modes`` 4, ``rows`` 200 and ``test_rows`` 1000 of each
                         class, ``difficulty`` 0.5; kinds as `topk.lab.synthetic` lists them
    ===================  ==========================================================================================
    """
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise ValueError(f"data must be a mapping with a name, got {settings!r}")
    name = check_name("data.name", settings["name"], _KINDS)
    full = completed("data", {"name": name, **_COMMON, **_KINDS[name]}, settings)
    full["validation"] = _checked_validation(full["validation"])
    _check_range(full, "fraction", 0, 1, above=True)
    _check_range(full, "noise", 0, 1)
    _check_range(full, "imbalance", 1, math.inf)
    _check_range(full, "seed", 0, 2**63)
    if "set" in full:
        cache.check_name(full["set"])
    if "size" in full:
        _check_range(full, "size", 1, packed.LARGEST_SIDE)
    if full.get("parts") is not None:
        full["parts"] = _checked_parts(full["parts"])
    if "difficulty" in full:
        _check_range(full, "difficulty", 0, 1)
        for key in ("classes", "dimension", "modes", "rows", "test_rows"):
            _check_range(full, key, 2 if key == "classes" else 1, 10**9)
    return full


def _check_range(settings: Mapping[str, Any], key: str, low: float, high: float, *, above: bool = False) -> None:
    value = settings[key]
    if not (low <= value <= high) or (above and value == low) or not math.isfinite(value):
        sign = ">" if above else ">="
        raise ValueError(f"data.{key} must be {sign} {low} and <= {high}, got {value!r}")


def _checked_validation(value: object) -> int | float:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"data.validation must be a number of rows a class or a fraction, got {value!r}")
    if isinstance(value, float) and value in (0.0,):
        return 0
    if value < 0 or (isinstance(value, float) and not value < 1):
        raise ValueError(f"data.validation must be an integer >= 0 or a fraction below 1, got {value!r}")
    return value


def _checked_parts(value: object) -> list[str]:
    if not isinstance(value, list | tuple) or not value:
        raise TypeError(f"data.parts must be a list of parts of the training split or null, got {value!r}")
    if any(not isinstance(part, str) or split_of(part) != "train" for part in value):
        raise ValueError(f"data.parts must name parts of the training split, got {value!r}")
    return in_order(list(dict.fromkeys(value)))


# --- loading ---------------------------------------------------------------------------------------------------------


def load(settings: Mapping[str, Any]) -> DataSet:
    """The data set that the settings describe, from the cache or, if synthetic, made on the spot.

    Arrays that are used whole stay memory-mapped and read-only; the same settings give the same arrays everywhere.

    Args:
        settings: {"name": ..., ...}; see `complete`.
    """
    full = complete(settings)
    found = _kind(full["name"])(full)
    rows = np.arange(len(found.train.labels))
    if full.get("parts") is not None:
        rows = _rows_of_parts(found, full["parts"])
    held_out, rows = _hold_out(found.train.labels, rows, full)
    labels = _noisy(found.train.labels, found.superclass, full)
    rows = _fraction(found.train.labels, rows, full)
    rows = _long_tail(found.train.labels, rows, full)
    train = _chosen(found.train, labels, rows)
    unused = {part for part, _ in found.train_parts} - set(full.get("parts") or found.digests)
    digests = {part: digest for part, digest in found.digests.items() if part not in unused}
    content = json.dumps([VERSION, full, digests], sort_keys=True)
    return DataSet(
        name=full["name"],
        train=train,
        validation=_chosen(found.train, labels, held_out),
        test=_chosen(found.test, found.test.labels, np.arange(len(found.test.labels))),
        classes=found.classes,
        superclass=found.superclass,
        counts=np.bincount(train.labels, minlength=len(found.classes)),
        mean=found.mean,
        std=found.std,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        settings=full,
        complete=found.complete,
    )


@dataclass(frozen=True)
class _Found:
    """The data before the settings did anything to it."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    superclass: np.ndarray | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digests: Mapping[str, str]
    train_parts: Sequence[tuple[str, int]]
    complete: bool


def _kind(name: str) -> Callable[[Mapping[str, Any]], _Found]:
    if name == "sample":
        return _sample
    return _synthetic if name.startswith("synthetic/") else _cached


def _sample(full: Mapping[str, Any]) -> _Found:
    from topk.lab import sample

    found = sample.read()
    train, test = Split(*found.train), Split(*found.test)
    arrays = {"train": found.train[0], "test": found.test[0]}
    digests = {part: hashlib.sha256(inputs.tobytes()).hexdigest() for part, inputs in arrays.items()}
    parts = [("train", len(train.labels))]
    return _Found(
        train, test, tuple(found.about["classes"]), _superclass(found.about), (), (), digests, parts, complete=True
    )


def _synthetic(full: Mapping[str, Any]) -> _Found:
    kind = full["name"].removeprefix("synthetic/")
    shape = synthetic.Shape(*(full[key] for key in ("classes", "dimension", "modes", "difficulty", "seed")))
    train, test = (
        Split(*synthetic.make(kind, shape, full[key], part)) for part, key in (("train", "rows"), ("test", "test_rows"))
    )
    names = tuple(f"class {label}" for label in range(shape.classes))
    version = {"synthetic": str(synthetic.VERSION)}
    return _Found(train, test, names, None, (), (), version, [("train", len(train.labels))], True)


def _cached(full: Mapping[str, Any]) -> _Found:
    name = full.get("set", full["name"])
    for _ in range(5):
        entry = cache.read(name)
        if entry is None:
            raise CacheError(f"{name} is not in the cache {cache.folder()}: {_how_to_get(full['name'], name)}")
        try:
            return _found(entry, full)
        except FileNotFoundError as error:
            missing = error  # another process has just replaced the set: its new manifest is there by now
    raise CacheError(f"{missing.filename} is missing; the cache is damaged: import {name} again") from missing


def _how_to_get(kind: str, name: str) -> str:
    if kind == "cifar100":
        return "python -m topk.lab data download cifar100, or data import FOLDER"
    if kind == "features":
        return f"extract it with python -m topk.lab features, or data import FOLDER --name {name}"
    return f"python -m topk.lab data import FOLDER --name {name}"


def _found(entry: Entry, full: Mapping[str, Any]) -> _Found:
    about = entry.about
    expected = {"imagefolder": ("images", "files"), "features": ("features",)}.get(full["name"], ("images",))
    if about["kind"] not in expected:
        raise CacheError(f"{entry.name} in the cache holds {about['kind']}, not {' or '.join(expected)}")
    absent = [split for split in ("train", "test") if not about["parts"][split]]
    if absent:
        raise CacheError(
            f"{entry.name} in the cache has no {' and no '.join(absent)} split: import the missing parts with "
            f"python -m topk.lab data import FOLDER"
        )
    if not about["complete"]["train"]:
        there = [part["name"] for part in about["parts"]["train"]]
        if full.get("parts") is None or not set(full["parts"]) <= set(there):
            warnings.warn(f"{entry.name}: only {', '.join(there)} of the training split is in the cache", stacklevel=4)
    train, test = (_split(entry, split, full) for split in ("train", "test"))
    digests = {part["name"]: part["digest"] for split in about["parts"].values() for part in split}
    parts = [(part["name"], part["rows"]) for part in about["parts"]["train"]]
    return _Found(
        train=train,
        test=test,
        classes=tuple(about["classes"]),
        superclass=_superclass(about),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        digests=digests,
        train_parts=parts,
        complete=about["complete"]["train"],
    )


def _split(entry: Entry, split: str, full: Mapping[str, Any]) -> Split:
    inputs, labels = entry.array(f"{split}-inputs"), np.array(entry.array(f"{split}-labels"))
    if entry.about["kind"] == "files":
        return Split(ImageFiles(Path(entry.about["root"]), np.array(inputs), full["size"]), labels)
    return Split(inputs, labels)


def _superclass(about: Mapping[str, Any]) -> np.ndarray | None:
    if about["superclasses"] is None:
        return None
    number = {name: label for label, group in enumerate(about["superclasses"].values()) for name in group}
    return np.array([number[name] for name in about["classes"]], dtype=np.int64)


def _rows_of_parts(found: _Found, parts: Sequence[str]) -> np.ndarray:
    starts, start = {}, 0
    for name, rows in found.train_parts:
        starts[name] = np.arange(start, start + rows)
        start += rows
    missing = [part for part in parts if part not in starts]
    if missing:
        raise CacheError(f"data.parts asks for {', '.join(missing)}; the cache holds {', '.join(starts)}: import it")
    return np.concatenate([starts[part] for part in parts])


def _places(labels: np.ndarray, rows: np.ndarray, seed: int, name: str, total: int) -> np.ndarray:
    """For each of `rows` its place in a random order of its class, which only depends on seed, name and the rows."""
    priority = raw(stream(seed, name), total)[rows]
    own = labels[rows]
    order = np.lexsort((priority, own))
    ends = np.cumsum(np.bincount(own, minlength=1))
    places = np.empty(len(rows), dtype=np.int64)
    places[order] = np.arange(len(rows)) - np.concatenate([[0], ends])[own[order]]
    return places


def _hold_out(labels: np.ndarray, rows: np.ndarray, full: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the validation split, and those that are left."""
    wanted = full["validation"]
    counts = np.bincount(labels[rows])
    sizes = np.full(len(counts), wanted) if isinstance(wanted, int) else np.rint(wanted * counts).astype(np.int64)
    if wanted and (sizes >= counts)[counts > 0].any():
        raise ValueError(f"data.validation must leave rows to train on, got {wanted!r} of {counts.min()} in a class")
    out = _places(labels, rows, full["seed"], "validation", len(labels)) < sizes[labels[rows]]
    return rows[out], rows[~out]


def _noisy(labels: np.ndarray, superclass: np.ndarray | None, full: Mapping[str, Any]) -> np.ndarray:
    """All rows' labels with noise; a row's fate does not depend on which rows are used."""
    if not full["noise"]:
        return labels
    if superclass is None:
        raise ValueError(f"data.noise is noise within superclasses, and {full['name']} has none")
    members = [np.flatnonzero(superclass == group) for group in range(int(superclass.max()) + 1)]
    sizes = np.array([len(group) for group in members])
    table = np.zeros((len(members), sizes.max()), dtype=np.int64)
    for group, classes in enumerate(members):
        table[group, : len(classes)] = classes
    own = superclass[labels]
    drawn = raw(stream(full["seed"], "noise/label"), len(labels)) % sizes[own].astype(np.uint64)
    redrawn = uniform(np.random.PCG64(stream(full["seed"], "noise/whether")), len(labels)) < full["noise"]
    return np.where(redrawn, table[own, drawn.astype(np.int64)], labels)


def _fraction(labels: np.ndarray, rows: np.ndarray, full: Mapping[str, Any]) -> np.ndarray:
    if full["fraction"] == 1:
        return rows
    sizes = np.maximum(1, np.rint(full["fraction"] * np.bincount(labels[rows])))
    return _first_of_each_class(labels, rows, sizes, full["seed"], "fraction")


def _long_tail(labels: np.ndarray, rows: np.ndarray, full: Mapping[str, Any]) -> np.ndarray:
    if full["imbalance"] == 1:
        return rows
    counts = np.bincount(labels[rows])
    profile = counts.max() * full["imbalance"] ** (-np.arange(len(counts)) / (len(counts) - 1))
    sizes = np.maximum(1, np.floor(profile + 1e-9))
    return _first_of_each_class(labels, rows, sizes, full["seed"], "imbalance")


def _first_of_each_class(labels: np.ndarray, rows: np.ndarray, sizes: np.ndarray, seed: int, name: str) -> np.ndarray:
    kept: np.ndarray = rows[_places(labels, rows, seed, name, len(labels)) < sizes[labels[rows]]]
    return kept


def _chosen(split: Split, labels: np.ndarray, rows: np.ndarray) -> Split:
    """Those rows, in ascending order; the inputs are not copied where all are meant."""
    inputs = split.inputs
    whole = len(rows) == len(split.labels)
    if isinstance(inputs, ImageFiles):
        return Split(ImageFiles(inputs.folder, inputs.paths[rows], inputs.size), labels[rows])
    if not whole:
        inputs = inputs[rows]
    if inputs.dtype.kind == "f" and inputs.dtype != np.float32:
        inputs = inputs.astype(np.float32)
    return Split(inputs, labels[rows])


def add_arguments(subparsers: Any) -> None:
    """Adds the command `data` to `python -m topk.lab`."""
    from topk.lab import data_command

    data_command.add_arguments(subparsers)
