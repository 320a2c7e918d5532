"""Several right classes per row (chapter "From k to sets"): albums of three photographs of different classes.

A row is the mean of the frozen features of three images; right are their three classes. In training either all three
are named, or one of them, drawn once for each album (positive and unlabelled). Tests ask for all three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import topk
from topk_lab.data import Array, Split

RIGHT = 3
ALBUMS = {"training": 20_000, "validation": 5_000, "test": 10_000}
RATES = (0.01, 0.03, 0.1)
_HELD_OUT = 5  # one image in so many is for the validation albums


def _shares(named: Tensor) -> Tensor:
    return named / named.sum(1, keepdim=True)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one logistic per class": lambda x, named: F.binary_cross_entropy_with_logits(x, named, reduction="sum") / len(x),
    "cross-entropy": lambda x, named: F.cross_entropy(x, _shares(named)),
    "subset": topk.subset_loss,
    "smooth, k = 3": lambda x, named: topk.smooth_topk_loss(x, _shares(named), RIGHT),
}
"""Of scores and of zeros and ones that say which classes are named."""


def albums(split: Split, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs (count, features), and the right classes as zeros and ones (count, classes)."""
    luck = torch.Generator().manual_seed(seed)
    labels, inputs = torch.from_numpy(split.labels), torch.from_numpy(split.inputs[:])
    first = torch.searchsorted(labels.sort().values, torch.arange(int(labels.max()) + 1))
    sizes = torch.bincount(labels)
    classes = torch.rand(count, len(sizes), generator=luck).topk(RIGHT, dim=1).indices
    place = (torch.rand(count, RIGHT, generator=luck) * sizes[classes]).long()
    rows = labels.argsort(stable=True)[first[classes] + place]
    return inputs[rows].mean(1), torch.zeros(count, len(sizes)).scatter_(1, classes, 1.0)


def one_of(right: Tensor, seed: int) -> Tensor:
    """One right class of each row, as zeros and ones."""
    luck = torch.Generator().manual_seed(seed)
    drawn = torch.rand(right.shape, generator=luck).masked_fill(right == 0, -1).argmax(1, keepdim=True)
    return torch.zeros_like(right).scatter_(1, drawn, 1.0)


def trained(
    loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, named: Tensor, rate: float, seed: int
) -> nn.Module:
    """A linear head: five epochs of AdamW, one cycle, batches of 500."""
    torch.manual_seed(seed)
    head, batches = nn.Linear(inputs.shape[1], named.shape[1]), -(-len(inputs) // 500)
    optimiser = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=5 * batches)
    for _ in range(5):
        for batch in torch.randperm(len(inputs)).split(500):
            value = loss(head(inputs[batch]), named[batch])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
    return head


@torch.no_grad()
def measured(head: nn.Module, inputs: Tensor, right: Tensor) -> dict[str, float]:
    """Share of the right classes among the first 3 and 5, and share of albums with all three among the first 5."""
    first = head(inputs).topk(5, dim=1).indices
    hits = right.gather(1, first)
    shares = {f"among {k}": hits[:, :k].sum(1).mean().item() / RIGHT for k in (RIGHT, 5)}
    return shares | {"all among 5": (hits.sum(1) == RIGHT).double().mean().item()}


def parts(train: Split, test: Split, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Training, validation and test albums; no two of them share an image."""
    held = (torch.arange(len(train)) % _HELD_OUT == 0).numpy()
    splits = {"training": _chosen(train, ~held), "validation": _chosen(train, held), "test": test}
    return {name: albums(split, ALBUMS[name], seed) for name, split in splits.items()}


def _chosen(split: Split, rows: Array) -> Split:
    return Split(split.inputs[rows], split.labels[rows])


def comparison(train: Split, test: Split, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a loss, a number of named classes and a seed; learning rates are chosen on other albums, of seed 1000."""
    rows = []
    for named_of_each in (RIGHT, 1):
        for name, loss in LOSSES.items():
            found = parts(train, test, 1000)
            inputs, named = _as_named(found["training"], named_of_each, 1000)
            reached = {r: measured(trained(loss, inputs, named, r, 1000), *found["validation"]) for r in RATES}
            rate = max(RATES, key=lambda each: reached[each]["among 3"])
            for seed in seeds:
                found = parts(train, test, seed)
                inputs, named = _as_named(found["training"], named_of_each, seed)
                about = {"loss": name, "named": named_of_each, "seed": seed, "rate": rate}
                rows.append(about | measured(trained(loss, inputs, named, rate, seed), *found["test"]))
    return rows


def _as_named(part: tuple[Tensor, Tensor], count: int, seed: int) -> tuple[Tensor, Tensor]:
    inputs, right = part
    return inputs, right if count == RIGHT else one_of(right, seed)
