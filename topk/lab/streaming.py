"""Batches of images that stay in their files, decoded by worker processes: for full-size trees (chapters 14 and 18).

`StreamedBatches` is iterated, stopped and continued like `topk.lab.batches.Batches`. Every random number is drawn
by the main process, so neither the number of workers nor their timing changes a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from topk.lab.augment import Augment, augment_batch, normalised
from topk.lab.batches import Batches, Epochs, as_tensor
from topk.lab.data import ImageFiles
from topk.lab.provenance import cores
from topk.lab.sources import open_image
from topk.lab.streams import uniform

if TYPE_CHECKING:
    from topk.lab.data import Split

SMALLEST_AREA = 0.08
RATIOS = (3 / 4, 4 / 3)
MARGIN = 256 / 224
"""Images that are not augmented are scaled so that the cut-out middle is this much smaller than their shorter side."""

_TRIES = 10


class StreamedBatches(Epochs):
    """Batches of image files, cut and scaled in worker processes, normalised on the device.

    With `augment` an image is cut at a random place, its area from 8 % to all of it and its sides' ratio 3/4 to 4/3,
    and scaled to the wanted size (`padding` plays no part); flip and hole follow on the device. Without, its middle is
    taken.

    Args:
        split: a split whose inputs are `ImageFiles`.
        batch: rows a batch and rank.
        mean: the channels' means.
        std: the channels' standard deviations.
        device: where the batches go.
        shuffle: a new random order each epoch.
        augment: what is done to images, see above; None for nothing random.
        seed: of order and augmentation.
        drop_last: leave out an incomplete last batch.
        channels_last: memory format of the images.
        rank: this process.
        ranks: number of processes.
        workers: processes that decode; 0 decodes in this one, None takes as many as there are cores.
    """

    def __init__(
        self,
        split: Split,
        batch: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        drop_last: bool = False,
        channels_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
        workers: int | None = None,
    ) -> None:
        super().__init__(
            len(split.labels), batch, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank, ranks=ranks
        )
        if not isinstance(split.inputs, ImageFiles):
            raise TypeError("split must have ImageFiles as inputs; arrays go through Batches")
        self.device = torch.device(device)
        self.labels = as_tensor(split.labels)
        self.size = split.inputs.size
        self.mean, self.std, self.channels_last = tuple(mean), tuple(std), channels_last
        self.augment = None if augment is None else replace(augment, padding=0)
        self._wanted = _Wanted()
        count = cores() if workers is None else workers
        self._loader = DataLoader(
            _Decoded(split.inputs),
            batch_sampler=self._wanted,
            generator=torch.Generator(),  # its own, so that nobody else's random numbers depend on loading
            num_workers=count,
            pin_memory=self.device.type == "cuda",
            persistent_workers=count > 0,
        )

    def _epoch(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        draws = cuts = None
        if self.augment is not None:
            draws = self.augment.draw(self.rows, self.size, self.size, self._generator)
            cuts = torch.randint(2**62, (self.rows,), generator=self._generator)
        places = range(self.position, len(self))
        self._wanted.batches = [
            (order[slice(*span)], cuts[slice(*span)] if cuts is not None else None)
            for span in map(self.stretch, places)
        ]
        for position, pixels in zip(places, self._loader, strict=True):
            first, end = self.stretch(position)
            images = pixels.to(self.device, non_blocking=True)
            labels = self.labels[order[first:end]].to(self.device, non_blocking=True)
            if self.augment is None or draws is None:
                planes = images.permute(0, 3, 1, 2)
                yield normalised(planes, self.mean, self.std, channels_last=self.channels_last), labels
            else:
                yield (
                    augment_batch(
                        images, draws[first:end], self.augment, self.mean, self.std, channels_last=self.channels_last
                    ),
                    labels,
                )


def batches_of(split: Split, batch: int, *, workers: int | None = None, **settings: Any) -> Batches | StreamedBatches:
    """`StreamedBatches` for image files, `Batches` for arrays; the keywords are theirs."""
    if isinstance(split.inputs, ImageFiles):
        return StreamedBatches(split, batch, workers=workers, **settings)
    return Batches(split, batch, **settings)


class _Wanted:
    """The batches of the epoch under way, as the loader's sampler: (row, seed of its cut or None) an image."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor | None]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int | None]]]:
        for rows, cuts in self.batches:
            yield list(zip(rows.tolist(), [None] * len(rows) if cuts is None else cuts.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.batches)


class _Decoded(Dataset[Tensor]):
    """An image for a row and the seed of its cut: uint8 (size, size, 3)."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __getitem__(self, wanted: tuple[int, int | None]) -> Tensor:
        row, seed = wanted
        image = open_image(self.files.folder, self.files.paths[row].decode())
        box = middle(image.size) if seed is None else random_cut(image.size, np.random.PCG64(seed))
        size = self.files.size
        return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=box)))

    def __len__(self) -> int:
        return len(self.files)


def middle(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box of the middle square of an image of this width and height."""
    side = min(size) / MARGIN
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    return left, top, left + side, top + side


def random_cut(size: tuple[int, int], bits: np.random.PCG64) -> tuple[float, float, float, float]:
    """A box of random area, ratio and place within an image; the middle if ten tries do not fit."""
    width, height = size
    for _ in range(_TRIES):
        area, ratio, across, down = uniform(bits, 4).tolist()
        pixels = width * height * (SMALLEST_AREA + (1 - SMALLEST_AREA) * area)
        shape = math.exp(math.log(RATIOS[0]) + ratio * math.log(RATIOS[1] / RATIOS[0]))
        wide, high = math.sqrt(pixels * shape), math.sqrt(pixels / shape)
        if wide <= width and high <= height:
            left, top = across * (width - wide), down * (height - high)
            return left, top, left + wide, top + high
    return middle(size)
