"""Augmentation of whole batches where the data lives: crop with padding, flip, cutout, then normalisation (chapter 14).

Images come in as they are stored, uint8 (rows, height, width, channels), and leave as normalised float32
(rows, channels, height, width). Everything is a handful of tensor operations on the images' own device, so neither
worker processes nor a copy from the host are needed.

What is random is drawn apart from what is computed: `Augment.draw` makes one small row of integers an image, on the
CPU, from a `torch.Generator`; `augmented` applies them. The same draws give the same images on every device, and
whoever splits a batch over several processes splits its draws along with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

TOP, LEFT, FLIP, HOLE_Y, HOLE_X = range(5)
"""The columns of the draws: the crop's corner in the padded image, whether to flip, the hole's centre."""


@dataclass(frozen=True)
class Augment:
    """What is done to a training image.

    Args:
        padding: black pixels added on every side before a crop of the original size is cut out at a random place.
        flip: whether half of the images are mirrored left to right.
        cutout: side of a square hole filled with the mean colour, its centre anywhere in the image; 0 for none.
    """

    padding: int = 4
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("padding", "cutout"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip must be True or False, got {self.flip!r}")

    def draw(self, rows: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The random numbers of `rows` images: (rows, 5) int16 on the CPU, columns as named in this module."""
        ends = torch.tensor([2 * self.padding + 1, 2 * self.padding + 1, 1 + self.flip, height, width])
        # One call, reduced modulo each column's end: 2^31 is so much larger that the bias is below 1e-6.
        return (torch.randint(2**31 - 1, (rows, 5), generator=generator) % ends).to(torch.int16)


def augmented(images: Tensor, draws: Tensor, augment: Augment) -> Tensor:
    """Crops and flips: uint8 (rows, height, width, channels) to uint8 (rows, channels, height, width)."""
    rows, height, width, _ = images.shape
    chosen = draws.to(images.device, torch.int64)
    side = augment.padding
    if side:
        padded = pad(images, (0, 0, side, side, side, side))
        # Every possible crop as a view; one indexing operation copies each row's own.
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)
        planes = windows[torch.arange(rows, device=images.device), chosen[:, TOP], chosen[:, LEFT]]
    else:
        planes = images.permute(0, 3, 1, 2)
    if augment.flip:
        planes = torch.where(chosen[:, FLIP, None, None, None] == 1, planes.flip(-1), planes)
    return planes


def normalised(planes: Tensor, mean: Sequence[float], std: Sequence[float], *, channels_last: bool = False) -> Tensor:
    """(planes / 255 - mean) / std as float32, for uint8 (rows, channels, height, width); mean and std a channel."""
    channels = planes.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std must have {channels} values, one a channel, got {mean!r} and {std!r}")
    spread = torch.tensor(std, dtype=torch.float64)
    scale = (1 / (255 * spread)).to(planes.device, torch.float32)[:, None, None]
    shift = (-torch.tensor(mean, dtype=torch.float64) / spread).to(planes.device, torch.float32)[:, None, None]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return planes.to(torch.float32, memory_format=layout).mul_(scale).add_(shift)


def cut_out(values: Tensor, draws: Tensor, side: int) -> Tensor:
    """Sets a square hole to 0, the mean colour of normalised images, in place; holes may overlap the border."""
    chosen = draws.to(values.device, torch.int64)
    inside = []
    for size, column in zip(values.shape[-2:], (HOLE_Y, HOLE_X), strict=True):
        start = chosen[:, column, None] - side // 2
        places = torch.arange(size, device=values.device)
        inside.append((places >= start) & (places < start + side))
    hole = inside[0][:, :, None] & inside[1][:, None, :]
    return values.masked_fill_(hole[:, None], 0.0)


def augment_batch(
    images: Tensor,
    draws: Tensor,
    augment: Augment,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channels_last: bool = False,
) -> Tensor:
    """Everything at once: stored uint8 images in, normalised float32 (rows, channels, height, width) out.

    Args:
        images: uint8 (rows, height, width, channels), on any device.
        draws: what `Augment.draw` gave for these rows.
        augment: what to do.
        mean: the channels' means, on the scale 0 to 1.
        std: the channels' standard deviations, on the same scale.
        channels_last: whether the result's memory is laid out in that format.
    """
    values = normalised(augmented(images, draws, augment), mean, std, channels_last=channels_last)
    return cut_out(values, draws, augment.cutout) if augment.cutout else values
