"""Small trainings in the open (chapter 4): overlapping Gaussians, a network from scratch, several learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import topk

CLASSES, INPUTS, HIDDEN, TRAIN, HELD_OUT, EPOCHS, K = 100, 32, 128, 5000, 2000, 5, 5


class Trial(NamedTuple):
    """Top-5 accuracy on validation and on test rows, classes with a gradient per training row, the learning rate."""

    validation: float
    test: float
    moved: float
    rate: float


def trial(
    loss: Callable[[Tensor, Tensor], Tensor], rate: float, seed: int, linear: bool = False, epochs: int = EPOCHS
) -> Trial:
    """Trains on classes that are mixtures of four Gaussians each; gradient descent with momentum."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    centres = torch.randn(4 * CLASSES, INPUTS, generator=generator)
    mode = torch.randint(4 * CLASSES, (TRAIN + 2 * HELD_OUT,), generator=generator)
    label = mode % CLASSES
    features = centres[mode] + 1.3 * torch.randn(len(mode), INPUTS, generator=generator)
    network = _network(linear)
    optimiser = torch.optim.SGD(network.parameters(), rate, momentum=0.9)
    moved = rows = 0
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN, generator=generator).split(100):
            scores = network(features[batch])
            (field,) = torch.autograd.grad(loss(scores, label[batch]), scores, retain_graph=True)
            moved, rows = moved + int((field != 0).sum()), rows + len(batch)
            optimiser.zero_grad()
            scores.backward(field)
            optimiser.step()
    with torch.no_grad():
        scores = network(features[TRAIN:])
    hits = (topk.metrics.ranks(scores, label[TRAIN:]) <= K).double()
    return Trial(hits[:HELD_OUT].mean().item(), hits[HELD_OUT:].mean().item(), moved / rows, rate)


def _network(linear: bool) -> nn.Module:
    network = nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )
    if not linear:
        return network
    head = nn.Linear(INPUTS, CLASSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def tuned_trial(
    loss: Callable[[Tensor, Tensor], Tensor], rates: Sequence[float], seed: int, linear: bool = False
) -> Trial:
    """The trial with the rate that is best on the validation rows."""
    return max((trial(loss, rate, seed, linear) for rate in rates), key=lambda found: found.validation)
