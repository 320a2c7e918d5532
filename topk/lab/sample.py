"""A small real sample that the package carries, so that every page can run on real data anywhere (chapter 14).

    python -m topk.lab ship sample cifar100-mobilenet_v2-96px-...-pca256

64 principal components of the frozen features of 80 CIFAR-100 images a class: 60 of the training images and 20 of the
test images, drawn once. Each component is kept as a whole number of -127 to 127 times a scale of its own. In a
configuration it is `data: {name: sample}`. It is for showing that code runs on real data, not for results: 20 test
images a class tell a difference of two points at best.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from topk.lab.cache import CacheError, Entry
from topk.lab.streams import permutation, stream

__all__ = ["Sample", "make", "read"]

FILE = "sample.npz"
TRAINING, TEST, COMPONENTS = 60, 20, 64
_LEVELS = 127

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Sample:
    """The arrays, and `about`: classes, superclasses, the features' origin and digests."""

    train: tuple[Array, Array]
    test: tuple[Array, Array]
    about: Mapping[str, Any]


@cache
def read() -> Sample:
    """The sample in this package."""
    with resources.files("topk.lab").joinpath(FILE).open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    parts = {
        part: (
            (arrays[f"{part}_levels"] * arrays["scale"]).astype(np.float32),
            arrays[f"{part}_labels"].astype(np.int64),
        )
        for part in ("train", "test")
    }
    return Sample(parts["train"], parts["test"], json.loads(str(arrays["about"])))


def make(components: str, path: Path) -> None:
    """Draws the sample from a set of components in the cache and writes it."""
    from topk.lab import cache as sets

    entry = sets.read(components)
    origin = entry.about.get("origin") or {} if entry is not None else {}
    if entry is None or origin.get("components", 0) < COMPONENTS:
        raise CacheError(f"components must name a set of {COMPONENTS} components or more, got {components!r}")
    drawn = {part: _drawn(entry, part, rows) for part, rows in (("train", TRAINING), ("test", TEST))}
    largest = np.max([np.abs(inputs).max(0) for inputs, _ in drawn.values()], 0)
    scale = (largest / _LEVELS).astype(np.float32)
    about = {
        "classes": list(entry.about["classes"]),
        "superclasses": entry.about["superclasses"],
        "set": components,
        "origin": origin,
    }
    arrays: dict[str, Any] = {"scale": scale, "about": np.array(json.dumps(about, sort_keys=True))}
    for part, (inputs, labels) in drawn.items():
        arrays[f"{part}_levels"] = np.rint(inputs / scale).astype(np.int8)
        arrays[f"{part}_labels"] = labels.astype(np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _drawn(entry: Entry, part: str, rows: int) -> tuple[Array, Array]:
    """So many rows of every class, in the order of the classes."""
    labels = np.array(entry.array(f"{part}-labels"))
    order = permutation(stream(0, f"sample/{part}"), len(labels))
    chosen = np.concatenate([order[labels[order] == label][:rows] for label in range(len(entry.about["classes"]))])
    return np.array(entry.array(f"{part}-inputs")[chosen][:, :COMPONENTS]), labels[chosen]
