"""Batches of a split, in an order and with an augmentation that only depend on the seed (chapter 14).

`Batches` holds the split on the device and needs no worker processes; `topk.lab.streaming` decodes image files in
worker processes, for data that does not fit. Both are iterated the same way, one epoch at a time:

    for inputs, labels in batches: ...

and both can be stopped anywhere: `state_dict()` says which epoch, which batch of it, and the generator's state when
that epoch began; after `load_state_dict` the next iteration goes on with the very next batch.

Several processes (`rank` of `ranks`) see together exactly the batches that one process with the `ranks` times larger
batch sees, row by row and pixel by pixel: order and augmentation are drawn for the large batch, and each rank takes
its stretch of it. In an incomplete last batch the stretches may differ by one row; `share` says by what a rank must
multiply its mean loss so that averaging over ranks gives the mean over all rows.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from topk.lab.augment import Augment, augment_batch, normalised

if TYPE_CHECKING:
    from topk.lab.data import Split


class Epochs(ABC):
    """What both kinds share: the order of an epoch, the place in it, the stretches of the ranks."""

    def __init__(
        self, rows: int, batch: int, *, shuffle: bool, seed: int, drop_last: bool, rank: int, ranks: int
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be at least 0 and below ranks, got rank {rank} of {ranks}")
        self.rows, self.batch, self.shuffle, self.drop_last = rows, batch, shuffle, drop_last
        self.rank, self.ranks = rank, ranks
        self.epoch, self.position = 0, 0
        self.share = 1.0
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_state = self._generator.get_state()

    def __len__(self) -> int:
        """Batches an epoch."""
        whole = self.batch * self.ranks
        return self.rows // whole if self.drop_last else math.ceil(self.rows / whole)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands; holds a tensor and two integers, so that weights_only loading accepts it."""
        return {"epoch": self.epoch, "position": self.position, "generator": self._epoch_state.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken: the next iteration gives what is left of that epoch."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._epoch_state = state["generator"].clone().cpu()
        if not 0 <= self.position <= len(self):
            raise ValueError(f"state's position must be 0 to {len(self)}, got {self.position}: other data or batch?")

    def stretch(self, position: int) -> tuple[int, int]:
        """First row and end, in the order of the epoch, of this rank's part of a batch; sets `share`."""
        start = position * self.batch * self.ranks
        count = min(self.batch * self.ranks, self.rows - start)
        first, end = (start + count * rank // self.ranks for rank in (self.rank, self.rank + 1))
        self.share = self.ranks * (end - first) / count
        return first, end

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the epoch; the place moves on before a batch is handed out."""
        self._generator.set_state(self._epoch_state)
        order = torch.randperm(self.rows, generator=self._generator) if self.shuffle else torch.arange(self.rows)
        for inputs, labels in self._epoch(order):
            self.position += 1
            yield inputs, labels
        self.epoch, self.position = self.epoch + 1, 0
        self._epoch_state = self._generator.get_state()

    @abstractmethod
    def _epoch(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from `position` on; everything random of the epoch is drawn before the first one."""


class Batches(Epochs):
    """Batches of a split that lies on the device: uint8 images, augmented and normalised, or rows of features.

    Args:
        split: what to go through. On the CPU its arrays are used in place, memory-mapped ones too.
        batch: rows a batch and rank.
        mean: the channels' means; empty for features, which are handed out as they are.
        std: the channels' standard deviations.
        device: where the split is kept and the batches are made.
        shuffle: a new random order each epoch; otherwise the stored order.
        augment: what is done to images; None for nothing but normalisation.
        seed: of order and augmentation.
        drop_last: leave out an incomplete last batch.
        channels_last: memory format of images.
        rank: this process.
        ranks: number of processes.
    """

    def __init__(
        self,
        split: Split,
        batch: int,
        *,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        drop_last: bool = False,
        channels_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(
            len(split.labels), batch, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank, ranks=ranks
        )
        if not isinstance(split.inputs, np.ndarray):
            raise TypeError("split must hold arrays; images in files go through topk.lab.streaming")
        self.device = torch.device(device)
        self.inputs = as_tensor(split.inputs).to(self.device)
        self.labels = as_tensor(split.labels).to(self.device)
        self.images = self.inputs.dim() == 4
        if augment is not None and not self.images:
            raise ValueError("augment is for images, got a split of features")
        self.mean, self.std, self.augment, self.channels_last = tuple(mean), tuple(std), augment, channels_last

    def _epoch(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        draws = None
        if self.augment is not None:
            height, width = self.inputs.shape[1:3]
            draws = self.augment.draw(self.rows, height, width, self._generator).to(self.device)
        order = order.to(self.device)
        for position in range(self.position, len(self)):
            first, end = self.stretch(position)
            chosen = order[first:end]
            rows = self.inputs.index_select(0, chosen) if self.shuffle else self.inputs[first:end]
            yield self._prepared(rows, None if draws is None else draws[first:end]), self.labels[chosen]

    def _prepared(self, rows: Tensor, draws: Tensor | None) -> Tensor:
        if not self.images:
            return rows
        if self.augment is None or draws is None:
            return normalised(rows.permute(0, 3, 1, 2), self.mean, self.std, channels_last=self.channels_last)
        return augment_batch(rows, draws, self.augment, self.mean, self.std, channels_last=self.channels_last)


def as_tensor(array: np.ndarray) -> Tensor:
    """The array as a CPU tensor without a copy; nobody writes into it, so a read-only map is fine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))
