"""Data sets as others publish them: torchvision's CIFAR-100, and trees of image files (chapter 14).

Each function gives a `topk.lab.packed.Source`, the same thing that a packed folder gives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from topk.lab.known import CIFAR100_SUPERCLASSES
from topk.lab.packed import LARGEST_SIDE, PackedError, Part, Source

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_CHUNK = 256
_TINY_LABELS = "val_annotations.txt"


def cifar100(folder: Path, *, download: bool = False, parts: Sequence[str] | None = None) -> Source:
    """torchvision's CIFAR-100 in `folder` (which holds `cifar-100-python`), its files checked by their MD5.

    Rows are ordered by class and, within a class, as published; the first 250 training images of each class make
    `train-0`, the others `train-1`, which is how the packed form has them.
    """
    from torchvision.datasets import CIFAR100  # type: ignore[import-untyped]

    try:
        train, test = (CIFAR100(folder, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:
        raise PackedError(f"CIFAR-100 could not be had from {folder}: {error}") from error
    halves = [(f"train-{half}", train.data, _of_each_class(train.targets, 250 * half, 250)) for half in (0, 1)]
    found = [
        _part_of_rows(name, images, np.asarray(labels, dtype=np.int64), rows)
        for (name, images, rows), labels in zip(
            [*halves, ("test", test.data, _of_each_class(test.targets, 0, 100))],
            [train.targets, train.targets, test.targets],
            strict=True,
        )
        if parts is None or name in parts
    ]
    return Source("cifar100", "sheets", tuple(train.classes), tuple(found), CIFAR100_SUPERCLASSES)


def _of_each_class(labels: Sequence[int], first: int, count: int) -> np.ndarray:
    """Rows ordered by class: of each class its `count` rows from `first` on."""
    order = np.argsort(np.asarray(labels), kind="stable")
    return order.reshape(max(labels) + 1, -1)[:, first : first + count].reshape(-1)


def _part_of_rows(name: str, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Part:
    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), _CHUNK):
            yield images[rows[start : start + _CHUNK]]

    return Part(name, (len(rows), *images.shape[1:]), images.dtype, labels[rows], blocks)


# --- trees of image files --------------------------------------------------------------------------------------------


def tree(folder: Path, name: str, size: int | None) -> Source:
    """A tree `train/<class>/...` with `val/<class>/...` or `test/<class>/...`, or Tiny-ImageNet's folder.

    Classes are the folders of `train` in alphabetical order; images within one are ordered by path. Links are not
    followed.

    Args:
        folder: the tree's root.
        name: the set's name.
        size: side in pixels of the square images to store (the shorter side is scaled to it, the middle is taken);
            None keeps the files where they are and stores their paths, for streaming.
    """
    if not (folder / "train").is_dir():
        raise PackedError(f"{folder} has no folder train: expected train/<class>/... and val/<class>/...")
    classes = tuple(sorted(item.name for item in os.scandir(folder / "train") if item.is_dir(follow_symlinks=False)))
    if not classes:
        raise PackedError(f"{folder / 'train'} has no folder for any class")
    held_out = [part for part in ("test", "val") if (folder / part / classes[0]).is_dir()]
    if (folder / "val" / _TINY_LABELS).is_file():
        held_out = ["val"]  # Tiny-ImageNet's test images have no labels
    if not held_out:
        raise PackedError(f"{folder} has neither val/{classes[0]} nor test/{classes[0]}")
    listed = {"train": _listed(folder, "train", classes), held_out[0]: _listed(folder, held_out[0], classes)}
    if size is None:
        longest = max(len(path.encode()) for files in listed.values() for path, _ in files)
        parts = tuple(_part_of_paths(part, files, longest) for part, files in listed.items())
    else:
        parts = tuple(_part_of_files(folder, part, files, size) for part, files in listed.items())
    return Source(name, "arrays", classes, parts, all_parts={"train": ("train",), "test": (held_out[0],)})


def _listed(folder: Path, part: str, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Paths within the folder, with '/', and labels."""
    labels = folder / part / _TINY_LABELS
    if part == "val" and labels.is_file():
        return _tiny_validation(folder, labels, classes)
    found = []
    for label, name in enumerate(classes):
        start = folder / part / name
        paths = [Path(top) / file for top, _, files in os.walk(start) for file in files]
        inside = sorted(path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in SUFFIXES)
        if not inside:
            raise PackedError(f"{start} has no images")
        found += [(path, label) for path in inside]
    return found


def _tiny_validation(folder: Path, labels: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """The file's names are looked up among the images that are there, and never used as paths."""
    there = set(os.listdir(folder / "val" / "images"))
    number = {name: label for label, name in enumerate(classes)}
    found = []
    for line in labels.read_text(encoding="utf-8").splitlines():
        name, wnid = [*line.split("\t"), ""][:2]
        if name not in there or wnid not in number:
            raise PackedError(f"{labels} names {name!r} of class {wnid!r}, which is not there")
        found.append((f"val/images/{name}", number[wnid]))
    return sorted(found, key=lambda item: (item[1], item[0]))


def _part_of_files(folder: Path, part: str, files: Sequence[tuple[str, int]], size: int) -> Part:
    load: Callable[[str], np.ndarray] = partial(small_image, folder, size=size)

    def blocks() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, len(files), _CHUNK):
                yield np.stack(list(pool.map(load, [path for path, _ in files[start : start + _CHUNK]])))

    labels = np.array([label for _, label in files], dtype=np.int64)
    return Part(part, (len(files), size, size, 3), np.dtype(np.uint8), labels, blocks)


def _part_of_paths(part: str, files: Sequence[tuple[str, int]], longest: int) -> Part:
    paths = np.array([path.encode() for path, _ in files], dtype=f"S{longest}")

    def blocks() -> Iterator[np.ndarray]:
        yield paths

    return Part(part, paths.shape, paths.dtype, np.array([label for _, label in files], dtype=np.int64), blocks)


def open_image(folder: Path, path: str) -> Image.Image:
    """An image of a tree as RGB; the path must stay within the folder."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or pure.suffix.lower() not in SUFFIXES:
        raise PackedError(f"{path!r} is no image within {folder}")
    try:
        with Image.open(folder.joinpath(*pure.parts), formats=_FORMATS) as image:
            if max(image.size) > 4 * LARGEST_SIDE:
                raise PackedError(f"{path} of {folder} is {image.size}: more than {4 * LARGEST_SIDE} pixels a side")
            return image.convert("RGB")
    except PackedError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PackedError(f"{path} of {folder} is missing or damaged: {error}") from error


def small_image(folder: Path, path: str, *, size: int) -> np.ndarray:
    """The middle of an image, its shorter side scaled to `size`: uint8 (size, size, 3)."""
    image = open_image(folder, path)
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)
