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
from scipy.special import ndtr


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
    centres, spread = _centres(shape)
    mode = (uniform(bits, len(labels)) * shape.modes).astype(np.int64)
    points: np.ndarray = centres[labels, mode] + spread * normal(bits, mode.size * shape.dimension).reshape(
        -1, shape.dimension
    )
    return points


def _centres(shape: Shape) -> tuple[np.ndarray, float]:
    """The Gaussians' centres (classes, modes, dimension) and their common deviation."""
    count = shape.classes * shape.modes
    centres = uniform(np.random.PCG64(stream(shape.seed, "mixtures/centres")), count * shape.dimension) * 2 - 1
    spread = (0.05 + 0.45 * shape.difficulty) * count ** (-1 / shape.dimension) * 2
    return centres.reshape(shape.classes, shape.modes, shape.dimension), spread


def _segments(shape: Shape, labels: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    slots, spread = _slots(shape)
    turn = (uniform(bits, len(labels)) * len(slots)).astype(np.int64)
    ends = spread * normal(bits, len(labels))
    points: np.ndarray = (slots[turn, labels] + uniform(bits, len(labels)) + ends) / slots.size * 4 - 2
    return points[:, None]


def _slots(shape: Shape) -> tuple[np.ndarray, float]:
    """Which interval of the line a class has in every turn (turns, classes), and how noisy the intervals' ends are."""
    per_class = 1 + round((shape.modes - 1) * min(1.0, 2 * shape.difficulty))
    bits_of = [np.random.PCG64(stream(shape.seed, f"segments/{turn}")) for turn in range(per_class)]
    rounds = [
        np.argsort(np.asarray(each.random_raw(shape.classes), dtype=np.uint64), kind="stable") for each in bits_of
    ]
    place = np.stack(rounds).argsort(axis=1)
    return place + shape.classes * np.arange(per_class)[:, None], 0.25 * max(0.0, 2 * shape.difficulty - 1)


def _rings(shape: Shape, labels: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    moved = uniform(bits, len(labels)) < 0.5 * shape.difficulty
    ring = (labels - moved) % shape.classes
    radius = (ring + 0.5 + 0.1 * normal(bits, len(labels))) / shape.classes * 2
    angle = 2 * np.pi * uniform(bits, len(labels))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _spirals(shape: Shape, labels: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    along = np.sqrt(uniform(bits, len(labels)))
    turns, spread = _spiral(shape)
    angle = 2 * np.pi * (labels / shape.classes + turns * along)
    points = 2 * np.stack([along * np.cos(angle), along * np.sin(angle)], axis=1)
    return points + spread * normal(bits, 2 * len(labels)).reshape(-1, 2)


def _spiral(shape: Shape) -> tuple[float, float]:
    """How often an arm goes round, and its noise."""
    return 0.25 + 1.25 * shape.difficulty, 0.02 + 0.1 * shape.difficulty


KINDS: dict[str, tuple[int, Callable[[Shape, np.ndarray, np.random.PCG64], np.ndarray]]] = {
    "mixtures": (1, _mixtures),
    "segments": (1, _segments),
    "rings": (2, _rings),
    "spirals": (2, _spirals),
}
"""For each kind how many dimensions it needs, and what makes its points."""


# --- what is the best that can be done ---


def posterior(kind: str, shape: Shape, points: np.ndarray) -> np.ndarray:
    """The probability of every class given an input (rows, classes), for sets without further dimensions."""
    if shape.dimension != max(KINDS[kind][0], shape.dimension if kind == "mixtures" else 0):
        raise ValueError(f"posterior needs {KINDS[kind][0]} dimension(s) for {kind}, got {shape.dimension}")
    density = {"mixtures": _mixtures_at, "segments": _segments_at, "rings": _rings_at, "spirals": _spirals_at}[kind]
    likelihood = density(shape, np.asarray(points, dtype=np.float64))
    total = likelihood.sum(1, keepdims=True)
    found: np.ndarray = np.divide(likelihood, total, out=np.full_like(likelihood, 1 / shape.classes), where=total > 0)
    return found


def _mixtures_at(shape: Shape, points: np.ndarray) -> np.ndarray:
    centres, spread = _centres(shape)
    apart = ((points[:, None, None] - centres) ** 2).sum(-1) / (2 * spread**2)
    density: np.ndarray = np.exp(apart.min((1, 2), keepdims=True) - apart).sum(2)
    return density


def _segments_at(shape: Shape, points: np.ndarray) -> np.ndarray:
    slots, spread = _slots(shape)
    place = (points[:, :1, None] + 2) / 4 * slots.size - slots.T  # (rows, classes, turns)
    if spread:
        density: np.ndarray = (ndtr(place / spread) - ndtr((place - 1) / spread)).sum(2)
        return density
    inside: np.ndarray = ((place >= 0) & (place < 1)).sum(2).astype(np.float64)
    return inside


def _rings_at(shape: Shape, points: np.ndarray) -> np.ndarray:
    radius, spread = np.linalg.norm(points, axis=1)[:, None], 0.2 / shape.classes
    ring = np.arange(shape.classes)
    apart = ((radius - (ring + 0.5) / shape.classes * 2) / spread) ** 2 / 2
    near, moved = np.exp(apart.min(1, keepdims=True) - apart), 0.5 * shape.difficulty
    density: np.ndarray = (1 - moved) * near + moved * near[:, (ring - 1) % shape.classes]
    return density


def _spirals_at(shape: Shape, points: np.ndarray, steps: int = 1000) -> np.ndarray:
    along = np.sqrt((np.arange(steps) + 0.5) / steps)
    turns, spread = _spiral(shape)
    found = []
    for label in range(shape.classes):
        angle = 2 * np.pi * (label / shape.classes + turns * along)
        arm = 2 * np.stack([along * np.cos(angle), along * np.sin(angle)], axis=1)
        apart = (points**2).sum(1)[:, None] + (arm**2).sum(1) - 2 * points @ arm.T
        found.append(np.exp(-apart / (2 * spread**2)).mean(1))
    return np.stack(found, axis=1)


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
