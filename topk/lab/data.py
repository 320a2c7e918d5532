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

    python -m topk.lab data import PATH [--parts train-0 test] [--name NAME] [--size 64 | --stream]
    python -m topk.lab data download cifar100
    python -m topk.lab data export NAME FOLDER [--parts ...]
    python -m topk.lab data list [--verify]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topk.lab import cache, packed, sources, synthetic
from topk.lab.cache import CacheError, Entry
from topk.lab.known import KNOWN, Known
from topk.lab.packed import PackedError, Part, Source, in_order, split_of
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
    found = _synthetic(full) if full["name"].startswith("synthetic/") else _cached(full)
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
    splits = [_split(entry, split, full) for split in ("train", "test")]
    digests = {part["name"]: part["digest"] for split in about["parts"].values() for part in split}
    parts = [(part["name"], part["rows"]) for part in about["parts"]["train"]]
    return _Found(
        *splits,
        tuple(about["classes"]),
        _superclass(about),
        tuple(about["mean"]),
        tuple(about["std"]),
        digests,
        parts,
        about["complete"]["train"],
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
    return rows[_places(labels, rows, full["seed"], "fraction", len(labels)) < sizes[labels[rows]]]


def _long_tail(labels: np.ndarray, rows: np.ndarray, full: Mapping[str, Any]) -> np.ndarray:
    if full["imbalance"] == 1:
        return rows
    counts = np.bincount(labels[rows])
    profile = counts.max() * full["imbalance"] ** (-np.arange(len(counts)) / (len(counts) - 1))
    sizes = np.maximum(1, np.floor(profile + 1e-9))
    return rows[_places(labels, rows, full["seed"], "imbalance", len(labels)) < sizes[labels[rows]]]


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


# --- filling the cache -----------------------------------------------------------------------------------------------


def fill(
    source: Source, *, replace: bool = False, root: Path | None = None, say: Callable[[str], None] = print
) -> Entry:
    """Puts the parts of `source` into the cache, beside the parts that are there already.

    Everything is checked on the way (digests and channel means of known sets, sizes, labels); on any error the cache
    is as it was.

    Args:
        source: what `topk.lab.packed.read` or `topk.lab.sources` gave.
        replace: forget what the cache has of this set.
        root: the folder that holds the images, for sets whose paths are stored.
        say: hears what is going on.
    """
    cache.check_name(source.name)
    kind = _kind_of(source.parts)
    facts = _facts(source, kind)
    with cache.filling(source.name, say=say) as filler:
        old = None if replace else cache.read(source.name)
        stored = _stored_parts(old) if old else {}
        if old is not None:
            _check_same_set(old, source, kind)
            new = [part for part in source.parts if part.name not in stored or not _same(part, stored[part.name], old)]
            if not new:
                say(f"{source.name}: {', '.join(part.name for part in source.parts)} already in the cache")
                return old
        parts = {**stored, **{part.name: part for part in source.parts}}
        about = _about(source, kind, facts, old)
        about["root"] = str(root.resolve()) if root is not None else None
        for split in ("train", "test"):
            names = [name for name in in_order(list(parts)) if split_of(name) == split]
            about["parts"][split] = []
            if names:
                say(f"{source.name}: writing {split} ({', '.join(names)})")
                _write_split(filler, split, [parts[name] for name in names], about, facts)
            expected = about["all_parts"].get(split) or names
            about["complete"][split] = bool(names) and set(expected) <= set(names)
        if facts is not None:
            _check_means(source.name, about, facts)
        return filler.commit(about)


def _kind_of(parts: Sequence[Part]) -> str:
    shapes = {(part.shape[1:], part.dtype.str) for part in parts}
    if len(shapes) != 1:
        raise PackedError(f"all parts of a set must have rows of one shape and type, got {sorted(map(str, shapes))}")
    ((shape, dtype),) = shapes
    if len(shape) == 3 and dtype == "|u1" and shape[2] == 3:
        return "images"
    if len(shape) == 1 and dtype in ("<f4", "<f2"):
        return "features"
    if len(shape) == 0 and dtype.startswith("|S"):
        return "files"
    raise PackedError(
        f"rows must be uint8 images (height, width, 3), or features of type float32 or float16, got {dtype} {shape}"
    )


def _facts(source: Source, kind: str) -> Known | None:
    facts = KNOWN.get(source.name)
    if facts is None:
        return None
    if facts.classes_digest is not None and _digest_of_text(source.classes) != facts.classes_digest:
        return None  # another choice of classes under the same name
    if kind != "images" or (source.name == "cifar100" and source.superclasses is None):
        raise PackedError(f"{source.name} must have images and superclasses; use another --name for another set")
    return facts


def _digest_of_text(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _about(source: Source, kind: str, facts: Known | None, old: Entry | None) -> dict[str, Any]:
    groups = source.superclasses
    everything = source.all_parts or (facts.parts if facts else {}) or (old.about["all_parts"] if old else {})
    return {
        "kind": kind,
        "layout": source.layout,
        "classes": list(source.classes),
        "codes": list(source.codes),
        "superclasses": None if groups is None else {name: list(group) for name, group in groups.items()},
        "all_parts": {split: list(parts) for split, parts in everything.items()},
        "parts": {},
        "complete": {},
        "mean": [],
        "std": [],
    }


def _check_same_set(old: Entry, source: Source, kind: str) -> None:
    """Parts are only put beside parts of the same set."""
    first = old.arrays[next(key for key in old.arrays if key.endswith("-inputs"))]
    shape = source.parts[0].shape[1:]
    same = old.about["classes"] == list(source.classes) and old.about["kind"] == kind and first.shape[1:] == shape
    if not same:
        raise CacheError(
            f"the cache holds another set under the name {source.name} ({old.about['kind']} {first.shape[1:]}, "
            f"{len(old.about['classes'])} classes; this one: {kind} {shape}, {len(source.classes)} classes): give this "
            f"one another --name, or use --replace"
        )


def _same(new: Part, stored: Part, old: Entry) -> bool:
    digests = {item["name"]: item["digest"] for parts in old.about["parts"].values() for item in parts}
    if new.shape != stored.shape or new.dtype != stored.dtype or not np.array_equal(new.labels, stored.labels):
        return False
    return digests[new.name] == (new.digest or _Digest(new).through())


class _Digest:
    """The digest of a part whose rows are the reference: of its labels, and of its rows as they pass."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._hash = hashlib.sha256(part.labels.astype("<i8").tobytes())
        self._hash.update(f"{part.dtype.str}{part.shape}".encode())

    def blocks(self) -> Iterator[np.ndarray]:
        for block in self.part.blocks():
            self._hash.update(np.ascontiguousarray(block).data)
            yield block

    def through(self) -> str:
        for _ in self.blocks():
            pass
        return self.value()

    def value(self) -> str:
        return self.part.digest or self._hash.hexdigest()


def _write_split(
    filler: cache.Filling, split: str, parts: Sequence[Part], about: dict[str, Any], facts: Known | None
) -> None:
    digests = [_Digest(part) for part in parts]
    levels = np.zeros((3, 256), dtype=np.int64)

    def blocks() -> Iterator[np.ndarray]:
        for digest in digests:
            for block in digest.blocks():
                if about["kind"] == "images" and split == "train":
                    for channel in range(3):
                        levels[channel] += np.bincount(block[..., channel].reshape(-1), minlength=256)
                yield block.astype(dtype, copy=False)

    rows = sum(len(part.labels) for part in parts)
    dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)  # paths may differ in length
    filler.write(f"{split}-inputs", (rows, *parts[0].shape[1:]), dtype, blocks())
    for digest in digests:
        name, value = digest.part.name, digest.value()
        if facts is not None and facts.digests.get(name, value) != value:
            raise CacheError(
                f"{filler.name}: {name} has the digest {value}, expected {facts.digests[name]}: wrong data"
            )
        about["parts"][split].append({"name": name, "rows": len(digest.part.labels), "digest": value})
    _write_whole(filler, f"{split}-labels", np.concatenate([part.labels for part in parts]))
    encoded = [part.encoded for part in parts if part.encoded is not None]
    if len(encoded) == len(parts):
        starts = np.cumsum([0] + [len(content) for content, _ in encoded])
        pieces = [offsets[:-1] + start for (_, offsets), start in zip(encoded, starts, strict=False)]
        _write_whole(filler, f"{split}-offsets", np.concatenate([*pieces, starts[-1:]]))
        size = (int(starts[-1]),)
        filler.write(f"{split}-jpegs", size, np.dtype(np.uint8), (content for content, _ in encoded))
    if levels.any():
        about["mean"], about["std"] = _moments(levels)


def _write_whole(filler: cache.Filling, key: str, array: np.ndarray) -> None:
    filler.write(key, array.shape, array.dtype, [array])


def _moments(levels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel from exact counts of its 256 values, on the scale 0 to 1."""
    values, total = np.arange(256), levels.sum(axis=1)
    mean = levels @ values / total
    variance = (levels * (values - mean[:, None]) ** 2).sum(axis=1) / total
    return [round(float(x) / 255, 5) for x in mean], [round(max(float(x), 1e-6) ** 0.5 / 255, 5) for x in variance]


def _check_means(name: str, about: dict[str, Any], facts: Known) -> None:
    """With the training split complete its means must be the known ones; before that the known ones are used."""
    if about["complete"]["train"] and facts.mean:
        for what, found, known in (("means", about["mean"], facts.mean), ("deviations", about["std"], facts.std)):
            if np.abs(np.subtract(found, known)).max() > facts.tolerance:
                raise CacheError(f"{name}: the channels' {what} are {found}, expected {list(known)}: wrong data")
    if facts.mean:
        about["mean"], about["std"] = list(facts.mean), list(facts.std)


def _stored_parts(entry: Entry) -> dict[str, Part]:
    """The parts in the cache, as sources of themselves."""
    return {
        item["name"]: _stored_part(entry, split, index)
        for split, items in entry.about["parts"].items()
        for index, item in enumerate(items)
    }


def _stored_part(entry: Entry, split: str, index: int) -> Part:
    items = entry.about["parts"][split]
    start = sum(item["rows"] for item in items[:index])
    end = start + items[index]["rows"]
    inputs, labels = entry.array(f"{split}-inputs"), entry.array(f"{split}-labels")

    def blocks() -> Iterator[np.ndarray]:
        return cache.blocks_of(inputs[start:end])

    encoded = None
    if f"{split}-jpegs" in entry.arrays:
        offsets = np.array(entry.array(f"{split}-offsets")[start : end + 1])
        encoded = entry.array(f"{split}-jpegs")[offsets[0] : offsets[-1]], offsets - offsets[0]
    shape = (end - start, *inputs.shape[1:])
    digest = items[index]["digest"] if encoded else None
    return Part(items[index]["name"], shape, inputs.dtype, np.array(labels[start:end]), blocks, encoded, digest)


def store(
    name: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    classes: Sequence[str],
    *,
    superclasses: Mapping[str, Sequence[str]] | None = None,
    replace: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Entry:
    """Puts arrays into the cache, features for one, where `load({"name": "features", "set": name})` finds them.

    Args:
        name: the set's name.
        splits: for "train" and "test" (or for parts, "train-0" and so on) inputs, float32 or float16 (rows, features)
            or uint8 images, and integer labels.
        classes: the classes' names.
        superclasses: the classes of each superclass.
        replace: forget what was stored under this name; otherwise parts are put beside those that are there.
        say: hears what is going on.
    """
    parts = []
    for part, (inputs, labels) in splits.items():
        split_of(part)
        labels = packed.checked_labels(f"{name}, {part}", labels, len(classes))
        if len(inputs) != len(labels):
            raise ValueError(f"{name}, {part}: {len(inputs)} inputs but {len(labels)} labels")
        parts.append(Part(part, inputs.shape, inputs.dtype, labels, packed.blocks_of(inputs)))
    return fill(Source(name, "arrays", tuple(classes), tuple(parts), superclasses), replace=replace, say=say)


def export(name: str, folder: Path, parts: Sequence[str] | None = None) -> None:
    """Writes a set of the cache as a packed folder (`topk.lab.packed`): in the layout in which it came.

    Args:
        name: the set.
        folder: where to; must be new or empty.
        parts: the parts wanted; None for all.
    """
    entry = cache.read(name)
    if entry is None:
        raise CacheError(f"{name} is not in the cache {cache.folder()}; it has {', '.join(cache.names()) or 'nothing'}")
    about = entry.about
    if about["kind"] == "files":
        raise CacheError(f"{name} is a list of image files in {about['root']}: copy that folder instead")
    stored = _stored_parts(entry)
    wanted = in_order(list(stored if parts is None else dict.fromkeys(parts)))
    missing = [part for part in wanted if part not in stored]
    if missing:
        raise CacheError(f"{name} has no parts {', '.join(missing)} in the cache; it has {', '.join(stored)}")
    source = Source(
        name,
        about["layout"],
        tuple(about["classes"]),
        tuple(stored[part] for part in wanted),
        about["superclasses"],
        tuple(about["codes"]),
        {split: tuple(names) for split, names in about["all_parts"].items()},
    )
    packed.write(source, folder)


# --- the command -----------------------------------------------------------------------------------------------------


def add_arguments(subparsers: Any) -> None:
    """Adds the command `data` to `python -m topk.lab`."""
    parser = subparsers.add_parser("data", help="fill, list, import and export the packed cache")
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    fetch = commands.add_parser("import", help="from a packed folder, torchvision's files or a tree of images")
    fetch.add_argument("path", type=Path, help="the folder of one data set")
    fetch.add_argument("--parts", nargs="+", metavar="PART", help="only these, such as train-0 and test")
    fetch.add_argument("--name", help="the set's name in the cache, if not the folder's")
    fetch.add_argument("--replace", action="store_true", help="forget what the cache has under this name")
    how = fetch.add_mutually_exclusive_group()
    how.add_argument("--size", type=int, default=64, help="trees: side of the stored images (default: 64)")
    how.add_argument("--stream", action="store_true", help="trees: store paths and leave the images where they are")
    fetch.set_defaults(run=_import)
    download = commands.add_parser("download", help="from the public source, through torchvision")
    download.add_argument("name", choices=["cifar100"])
    download.set_defaults(run=_download)
    carry = commands.add_parser("export", help="as a packed folder, to carry to another machine")
    carry.add_argument("name")
    carry.add_argument("path", type=Path, help="a new or empty folder")
    carry.add_argument("--parts", nargs="+", metavar="PART")
    carry.set_defaults(run=_export)
    show = commands.add_parser("list", help="what is in the cache")
    show.add_argument("--verify", action="store_true", help="read everything and compare checksums")
    show.set_defaults(run=_list)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _import(chosen: argparse.Namespace) -> int:
    source, root = _source(chosen)
    entry = fill(source, replace=chosen.replace, root=root, say=_say)
    print(_line(entry))
    return 0


def _source(chosen: argparse.Namespace) -> tuple[Source, Path | None]:
    """What kind of folder it is, and what is in it."""
    path: Path = chosen.path
    if not path.is_dir():
        raise PackedError(f"{path} is no folder")
    name = cache.check_name(chosen.name) if chosen.name else None
    for part in chosen.parts or ():
        split_of(part)
    if packed.looks_packed(path):
        return packed.read(path, name=name, parts=chosen.parts), None
    if (path / "cifar-100-python").is_dir():
        return sources.cifar100(path, parts=chosen.parts), None
    if (path / "train").is_dir():
        if chosen.parts:
            raise ValueError("--parts is for packed data sets; a tree of images is taken whole")
        root = path if chosen.stream else None
        return sources.tree(path, name or path.resolve().name.lower(), None if chosen.stream else chosen.size), root
    inside = sorted(item.name for item in path.iterdir() if item.is_dir() and packed.looks_packed(item))
    hint = f"; there are data sets in it: {', '.join(inside)}" if inside else ""
    raise PackedError(f"{path} must be the folder of one data set (packed, torchvision's, or a tree of images){hint}")


def _download(chosen: argparse.Namespace) -> int:
    cache.folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache.folder()) as folder:
        entry = fill(sources.cifar100(Path(folder), download=True), say=_say)
    print(_line(entry))
    return 0


def _export(chosen: argparse.Namespace) -> int:
    export(chosen.name, chosen.path, chosen.parts)
    print(f"{chosen.name} written to {chosen.path}")
    return 0


def _list(chosen: argparse.Namespace) -> int:
    print(f"{cache.folder()}")
    for name in cache.names():
        entry = cache.read(name)
        if entry is not None:
            if chosen.verify:
                entry.verify()
            print(_line(entry) + (", checksums right" if chosen.verify else ""))
    return 0


def _line(entry: Entry) -> str:
    texts = []
    for split, parts in entry.about["parts"].items():
        missing = sorted(set(entry.about["all_parts"].get(split, ())) - {part["name"] for part in parts})
        rows = f"{split} {sum(part['rows'] for part in parts)} rows"
        texts.append(f"{rows}, lacking {', '.join(missing)}" if missing else rows)
    size = sum(np.prod(item.shape) * np.dtype(item.dtype).itemsize for item in entry.arrays.values())
    kind, classes = entry.about["kind"], len(entry.about["classes"])
    return f"{entry.name}: {kind}, {classes} classes, {'; '.join(texts)}; {size / 1e6:.0f} MB"
