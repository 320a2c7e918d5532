"""Small data sets for the tests of the lab, and the program that runs a training apart from the tests."""

from __future__ import annotations

import numpy as np

from topk.lab.data import DataSet, Split


def features(
    rows: int = 320, dimension: int = 12, classes: int = 10, held_out: int = 100, validation: int = 0, seed: int = 0
) -> DataSet:
    """Overlapping Gaussian clouds, the classes unequally frequent."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(classes, dimension))

    def split(count: int) -> Split:
        labels = np.minimum(draw.integers(classes, size=count), draw.integers(classes, size=count))
        inputs = centres[labels] + 1.1 * draw.normal(size=(count, dimension))
        return Split(inputs.astype(np.float32), labels.astype(np.int64))

    return _set(split(rows), split(validation), split(held_out), classes)


def images(rows: int = 96, size: int = 8, classes: int = 6, held_out: int = 40, seed: int = 0) -> DataSet:
    """Noise whose brightness tells the class."""
    draw = np.random.default_rng(seed)

    def split(count: int) -> Split:
        labels = draw.integers(classes, size=count)
        inputs = draw.integers(0, 120, size=(count, size, size, 3)) + 20 * labels[:, None, None, None]
        return Split(inputs.astype(np.uint8), labels.astype(np.int64))

    return _set(split(rows), split(0), split(held_out), classes)


def _set(train: Split, validation: Split, test: Split, classes: int) -> DataSet:
    channels = 3 if train.inputs.ndim == 4 else 0
    return DataSet(
        name="synthetic/rings",
        train=train,
        validation=validation,
        test=test,
        classes=tuple(f"class {label}" for label in range(classes)),
        superclass=None,
        counts=np.bincount(train.labels, minlength=classes),
        mean=(0.45,) * channels,
        std=(0.2,) * channels,
        fingerprint="ab" * 32,
        settings={},
    )
