"""Synthetic sets of the trade-off study: few input dimensions, classes of a shape that a limited model cannot follow.

Sawada, Kaneko and Sagi (2020) show that a model that is too weak for its data must choose between being right at the
first guess and being right within k guesses, and that the loss makes this choice. The sets here are ours, in that
spirit (chapter 3): whoever fits them with a linear model has to choose.

==============  ======================================================================================================
"mixtures"      each class a mixture of `modes` Gaussians with centres all over a box; overlap grows with difficulty
"segments"      intervals of a line belong to the classes in turn, each class to several; more of them, and noisier
                ends, with difficulty. A linear model can be right first on one interval a class
"rings"         ring r around the origin belongs to class r, but a part of its rows, growing with difficulty, to the
                next class: two guesses can be right where one cannot
"spirals"       interleaved spiral arms, with more turns and more noise as difficulty grows
==============  ======================================================================================================

Difficulty goes from 0 (separable) to 1. Inputs are float32; dimensions beyond those a shape needs hold noise, and a
random rotation hides which they are. The shape (centres, rotation) follows from the seed, the training and the test
rows from streams of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """What is asked for: classes, dimensions, Gaussians or intervals a class, difficulty in [0, 1], seed."""

    classes: int
    dimension: int
    modes: int
    difficulty: float
    seed: int


def make(kind: str, shape: Shape, rows: int, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (classes * rows, dimension) float32 and labels, ordered by class, `rows` of each.

    Args:
        kind: one of `KINDS`.
        shape: the distribution.
        rows: rows of each class.
        part: which independent sample of it, "train" or "test".
    """
    labels = np.repeat(np.arange(shape.classes, dtype=np.int64), rows)
    needed, points = KINDS[kind]
    if shape.dimension < needed:
        raise ValueError(f"dimension must be at least {needed} for {kind}, got {shape.dimension}")
    low = points(shape, labels, np.random.PCG64(stream(shape.seed, f"{kind}/{part}")))
    rest = shape.dimension - low.shape[1]
    noise = 0.3 * normal(np.random.PCG64(stream(shape.seed, f"{kind}/{part}/noise")), len(labels) * rest)
    inputs = np.concatenate([low, noise.reshape(len(labels), rest)], axis=1)
    return (inputs @ _rotation(shape, kind, rest)).astype(np.float32), labels


def _rotation(shape: Shape, kind: str, rest: int) -> np.ndarray:
    """A random rotation; none where there is nothing to hide."""
    if not rest:
        return np.eye(shape.dimension)
    entries = normal(np.random.PCG64(stream(shape.seed, f"{kind}/rotation")), shape.dimension**2)
    q, r = np.linalg.qr(entries.reshape(shape.dimension, shape.dimension))
    rotation: np.ndarray = q * np.sign(np.diag(r))
    return rotation


def _mixtures(shape: Shape, labels: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    count = shape.classes * shape.modes
    centres = uniform(np.random.PCG64(stream(shape.seed, "mixtures/centres")), count * shape.dimension) * 2 - 1
    centres = centres.reshape(shape.classes, shape.modes, shape.dimension)
    mode = (uniform(bits, len(labels)) * shape.modes).astype(np.int64)
    spread = (0.05 + 0.45 * shape.difficulty) * count ** (-1 / shape.dimension) * 2
    points: np.ndarray = centres[labels, mode] + spread * normal(bits, mode.size * shape.dimension).reshape(
        -1, shape.dimension
    )
    return points


def _segments(shape: Shape, labels: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    per_class = 1 + round((shape.modes - 1) * min(1.0, 2 * shape.difficulty))
    bits_of = [np.random.PCG64(stream(shape.seed, f"segments/{turn}")) for turn in range(per_class)]
    rounds = [
        np.argsort(np.asarray(each.random_raw(shape.classes), dtype=np.uint64), kind="stable") for each in bits_of
    ]
    place = np.stack(rounds).argsort(axis=1)  # in which slot of its round a class's interval lies
    turn = (uniform(bits, len(labels)) * per_class).astype(np.int64)
    slot = turn * shape.classes + place[turn, labels]
    ends = 0.25 * max(0.0, 2 * shape.difficulty - 1) * normal(bits, len(labels))
    points: np.ndarray = (slot + uniform(bits, len(labels)) + ends) / (shape.classes * per_class) * 4 - 2
    return points[:, None]


def _rings(shape: Shape, labels: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    moved = uniform(bits, len(labels)) < 0.5 * shape.difficulty
    ring = (labels - moved) % shape.classes
    radius = (ring + 0.5 + 0.1 * normal(bits, len(labels))) / shape.classes * 2
    angle = 2 * np.pi * uniform(bits, len(labels))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _spirals(shape: Shape, labels: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    along = np.sqrt(uniform(bits, len(labels)))
    turns = 0.25 + 1.25 * shape.difficulty
    angle = 2 * np.pi * (labels / shape.classes + turns * along)
    spread = 0.02 + 0.1 * shape.difficulty
    points = 2 * np.stack([along * np.cos(angle), along * np.sin(angle)], axis=1)
    return points + spread * normal(bits, 2 * len(labels)).reshape(-1, 2)


KINDS: dict[str, tuple[int, Callable[[Shape, np.ndarray, np.random.PCG64], np.ndarray]]] = {
    "mixtures": (1, _mixtures),
    "segments": (1, _segments),
    "rings": (2, _rings),
    "spirals": (2, _spirals),
}
"""For each kind how many dimensions it needs, and what makes its points."""


# --- random numbers ---
# They follow from a seed and a name alone. Only the raw bits of PCG64 are used: NumPy promises them, unlike its
# distributions, to stay the same for ever.


def stream(seed: int, name: str) -> np.random.SeedSequence:
    """The seed of the stream with this name."""
    return np.random.SeedSequence([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")])


def uniform(bits: np.random.PCG64, count: int) -> np.ndarray:
    """The stream's next `count` numbers as float64 in [0, 1)."""
    return (np.asarray(bits.random_raw(count), dtype=np.uint64) >> np.uint64(11)) * 2.0**-53


def normal(bits: np.random.PCG64, count: int) -> np.ndarray:
    """The stream's next numbers as standard normal ones (Box and Muller)."""
    half = (count + 1) // 2
    radius = np.sqrt(-2 * np.log1p(-uniform(bits, half)))
    angle = 2 * np.pi * uniform(bits, half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
