"""Comparator networks as plain lists: the wiring behind the differentiable loss (book, chapter 8).

A network is a list of layers, a layer a list of comparators (a, b): whatever the values, the smaller leaves on wire a
and the larger on wire b. The largest of m values ends on wire m - 1, the r-th largest on wire m - r. Comparators of one
layer touch different wires.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

Layer = list[tuple[int, int]]


def odd_even(wires: int) -> list[Layer]:
    """Odd-even transposition: neighbours only, `wires` layers, (0, 1), (2, 3), ... first."""
    return [[(a, a + 1) for a in range(layer % 2, wires - 1, 2)] for layer in range(wires)]


def bitonic(wires: int) -> list[Layer]:
    """Batcher's bitonic sorter, every comparator pointing up; for any number of wires.

    Built for the next power of two. The surplus wires lie below all others and would hold minus infinity: no
    comparator ever moves that, so theirs are left out and the rest still sorts.
    """
    size = 1 << (wires - 1).bit_length()
    layers: list[Layer] = []
    block = 2
    while block <= size:
        starts = range(0, size, block)
        layers.append([(start + i, start + block - 1 - i) for start in starts for i in range(block // 2)])
        half = block // 4
        while half:
            layers.append([(start + i, start + i + half) for start in range(0, size, 2 * half) for i in range(half)])
            half //= 2
        block *= 2
    surplus = size - wires
    return [[(a - surplus, b - surplus) for a, b in layer if a >= surplus] for layer in layers]


def splitter_selection(wires: int, ranks: int) -> list[Layer]:
    """Splitter cascades (Petersen et al. 2022): sorts the `ranks` largest into place, leaves the others anywhere.

    Every wire has a number of values known to be larger than its own, at first 0. A cascade over the wires that share a
    number below `ranks` is a knock-out tournament: the j-th of them learns of 2^popcount(j) - 1 larger values. Repeated
    until every number below `ranks` belongs to one wire. Wires count from the top here.
    """
    larger = [0] * wires
    layers: list[Layer] = []
    while True:
        groups = [[wire for wire in range(wires) if larger[wire] == known] for known in range(ranks)]
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            return _packed([(wires - 1 - b, wires - 1 - a) for layer in layers for a, b in layer])
        for group in groups:
            layers += _cascade(group)
            for j, wire in enumerate(group):
                larger[wire] += 2 ** j.bit_count() - 1


def _cascade(group: list[int]) -> list[Layer]:
    """Each layer compares members whose places differ in one bit, the highest bit first."""
    size = len(group)
    gaps = [1 << bit for bit in reversed(range((size - 1).bit_length()))]
    return [[(group[j], group[j + gap]) for j in range(size - gap) if not j & gap] for gap in gaps]


def pruned(layers: Iterable[Layer], outputs: Iterable[int]) -> list[Layer]:
    """Only the comparators from which one of the wires `outputs` can still be reached; empty layers disappear."""
    reached = set(outputs)
    kept: list[Layer] = []
    for layer in reversed(list(layers)):
        useful = [(a, b) for a, b in layer if a in reached or b in reached]
        reached.update(wire for pair in useful for wire in pair)
        kept.append(useful)
    return [layer for layer in reversed(kept) if layer]


def _packed(comparators: Iterable[tuple[int, int]]) -> list[Layer]:
    """The same comparators in as few layers as possible: each as early as its two wires allow."""
    layers: list[Layer] = []
    free: dict[int, int] = {}
    for a, b in comparators:
        layer = max(free.get(a, 0), free.get(b, 0))
        free[a] = free[b] = layer + 1
        if layer == len(layers):
            layers.append([])
        layers[layer].append((a, b))
    return [sorted(layer) for layer in layers]


@lru_cache(maxsize=64)
def _network(method: str, wires: int, ranks: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    if method == "odd_even":
        layers = odd_even(wires)
    elif method == "bitonic":
        layers = bitonic(wires)
    else:
        layers = splitter_selection(wires, ranks)
    return tuple(tuple(layer) for layer in pruned(layers, range(wires - ranks, wires)))


def network(method: str, wires: int, ranks: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The comparators of `method` that can reach the `ranks` largest places, layer by layer."""
    return _network(method, wires, ranks)


network._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile runs it, and does not trace it
