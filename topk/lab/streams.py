"""Random numbers that follow from a seed and a name alone, so that no draw depends on another having been made.

Only the raw bits of PCG64 are used: NumPy promises them, unlike its distributions, to stay the same for ever.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, name: str) -> np.random.SeedSequence:
    """The seed of the stream with this name."""
    return np.random.SeedSequence([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")])


def raw(seed: np.random.SeedSequence, count: int) -> np.ndarray:
    """`count` random 64-bit numbers."""
    return np.asarray(np.random.PCG64(seed).random_raw(count), dtype=np.uint64)


def uniform(bits: np.random.PCG64, count: int) -> np.ndarray:
    """The stream's next `count` numbers as float64 in [0, 1)."""
    return (np.asarray(bits.random_raw(count), dtype=np.uint64) >> np.uint64(11)) * 2.0**-53


def normal(bits: np.random.PCG64, count: int) -> np.ndarray:
    """The stream's next numbers as standard normal ones (Box and Muller)."""
    half = (count + 1) // 2
    radius = np.sqrt(-2 * np.log1p(-uniform(bits, half)))
    angle = 2 * np.pi * uniform(bits, half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def permutation(seed: np.random.SeedSequence, count: int) -> np.ndarray:
    """0 to count - 1 in random order."""
    return np.argsort(raw(seed, count), kind="stable")
