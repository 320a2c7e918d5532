"""Principal components of a set of features: fewer numbers a row, so that heads train in seconds (chapter 14).

    python -m topk.lab components cifar100-mobilenet_v2-96px-... --count 256

With m the mean and C the covariance of the *training* rows, and v_1, v_2, ... the eigenvectors of C by falling
eigenvalue, a row x becomes (v_j . (x - m)) / s for j = 1 .. count. One number s for all of them keeps the geometry of
the features: it makes the mean square of a training row's components 1. Test rows have no say in m, C or s. Of v_j
and -v_j the one whose largest entry is positive is taken.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from topk.arguments import check_count
from topk.lab import cache
from topk.lab.cache import CacheError, Entry

__all__ = ["add_arguments", "fitted", "reduce"]

VERSION = 1
"""Part of every set's origin: a change of what is computed needs another."""
_ROWS = 8192  # at a time

Array = np.ndarray[Any, np.dtype[Any]]


def reduce(features: str, count: int = 256, *, name: str | None = None) -> str:
    """Projects a set of features in the cache, or finds its projection there; returns the name it is stored under.

    Args:
        features: the set's name.
        count: how many components.
        name: what to store them under; None: the features' name with the count.
    """
    from topk.lab.filling import store

    entry = cache.read(features)
    if entry is None or entry.about["kind"] != "features":
        raise CacheError(f"features must name a set of features in the cache {cache.folder()}, got {features!r}")
    check_count("count", count)
    name = name or f"{features}-pca{count}"
    source = entry.about.get("origin") or {}
    origin = {
        "features": {part["name"]: part["digest"] for parts in entry.about["parts"].values() for part in parts},
        "weights": source.get("weights"),
        "components": count,
        "version": VERSION,
    }
    there = cache.read(name)
    if there is not None:
        if there.about.get("origin") != origin:
            raise CacheError(f"the cache holds another set under the name {name}: give this one another --name")
        return name
    mean, directions = fitted(entry.array("train-inputs"), count)
    splits = {}
    for part, inputs, labels in _parts(entry):
        splits[part] = (_projected(inputs, mean, directions), labels)
    store(name, splits, entry.about["classes"], superclasses=entry.about["superclasses"], origin=origin)
    return name


def fitted(inputs: Array, count: int) -> tuple[Array, Array]:
    """The mean and the scaled directions, (features, count), in float64."""
    if count > inputs.shape[1]:
        raise ValueError(f"count must be at most the {inputs.shape[1]} features, got {count}")
    mean: Array = np.asarray(inputs.mean(0, dtype=np.float64))
    covariance = np.zeros((inputs.shape[1],) * 2)
    for start in range(0, len(inputs), _ROWS):
        centred = inputs[start : start + _ROWS] - mean
        covariance += centred.T @ centred
    covariance /= len(inputs)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(count)])
    return mean, vectors * signs / np.sqrt(values.mean())


def _projected(inputs: Array, mean: Array, directions: Array) -> Array:
    blocks = [(inputs[start : start + _ROWS] - mean) @ directions for start in range(0, len(inputs), _ROWS)]
    return np.concatenate(blocks).astype(np.float32)


def _parts(entry: Entry) -> list[tuple[str, Array, Array]]:
    """The parts as they are stored, so that what can be chosen of the features can be chosen of their components."""
    found = []
    for split, parts in entry.about["parts"].items():
        inputs, labels = entry.array(f"{split}-inputs"), np.array(entry.array(f"{split}-labels"))
        start = 0
        for part in parts:
            end = start + part["rows"]
            found.append((part["name"], inputs[start:end], labels[start:end]))
            start = end
    return found


def add_arguments(subparsers: Any) -> None:
    """Adds the command `components` to `python -m topk.lab`."""
    parser = subparsers.add_parser("components", help="principal components of features", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("features", help="a set of features in the cache")
    parser.add_argument("--count", type=int, default=256, help="how many (256)")
    parser.add_argument("--name", help="what to store them under")
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> None:
    name = reduce(arguments.features, arguments.count, name=arguments.name)
    print(f"in the cache as {name}; in a configuration: data: {{name: features, set: {name}}}")
