"""Data sets by their settings (chapter 14): CIFAR-100, 64 x 64 ImageNet, frozen features, words.

`load(settings)` gives arrays, class names, counts and a fingerprint. What the settings change is done in this order,
and each step draws from a stream of its own, so that none depends on whether another was asked for:

1. **Validation.** `validation` rows of each class (an integer) or a share of each class (below 1) leave the training
   split, whatever comes later. Of the words it is a share of the verses.
2. **Noise.** With probability `noise` a label is drawn anew, uniformly from its group, *the true one included*. Groups
   are the superclasses (`noise_layout: superclass`, what Berrada et al. 2018 describe) or blocks of five consecutive
   labels (`block`, what their published program does). Training and validation carry the noise, the test never does;
   `Split.clean` keeps the true labels.
3. **Fraction.** Of each class that part is kept. A smaller fraction is a subset of a larger one.
4. **Imbalance.** With n rows in the largest class and C classes, class c keeps floor(n * imbalance^(-c / (C - 1)))
   rows, the exponential profile of Cao et al. (2019).

Steps 3 and 4 choose by the true label, so that class sizes are exact before noise moves labels about.

Where data come from: `$TOPK_DATA/<name>` if that folder is there, in one of the layouts of `_given`; else CIFAR-100 is
downloaded. What is downloaded or computed stays in `$TOPK_CACHE`, by default in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from topk_lab.records import save_array

with warnings.catch_warnings():  # in a notebook without widgets its progress bar would complain, on every page
    warnings.simplefilter("ignore")

Array = np.ndarray[Any, np.dtype[Any]]

VERSION = 1
"""Part of every fingerprint: a change of what `load` makes of the same settings needs another."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MOMENTS = {  # of the training images' channels, on the scale 0 to 1
    "cifar100": ((0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
    "imagenet64": ((0.47966, 0.4478, 0.39727), (0.27652, 0.26903, 0.28167)),
}
_BLOCK = 5  # consecutive labels


# --- settings ---


class Strict(BaseModel):
    """Settings: every name known, every type right, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Common(Strict):
    validation: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    noise_layout: Literal["superclass", "block"] = "superclass"
    imbalance: Annotated[float, Field(ge=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0


class Known(_Common):
    """CIFAR-100, ImageNet classes at 64 x 64 pixels, or the sample that comes with the package: 64 principal components
    of the frozen features of 80 CIFAR-100 images a class.
    """

    name: Literal["cifar100", "imagenet64", "sample"]


class Features(_Common):
    """What `topk_lab.features` extracted, by the name it is stored under."""

    name: Literal["features"]
    set: str


class Words(_Common):
    """Next words of the King James Version: `context` tokens before, one of the `vocabulary` commonest comes next."""

    name: Literal["words"]
    vocabulary: Annotated[int, Field(ge=2)] = 3000
    context: Annotated[int, Field(ge=1)] = 3
    rows: int | None = 400_000  # of the training split, from its beginning; None: all
    test_rows: int | None = None  # likewise, for runs that are judged by their validation rows


Data = Annotated[Known | Features | Words, Field(discriminator="name")]


# --- what is loaded ---


@dataclass(frozen=True)
class Split:
    """Inputs are uint8 images (rows, height, width, channels), features (rows, ...) or token numbers (rows, context);
    labels int64; `clean` the true ones where `labels` carry noise.
    """

    inputs: Array
    labels: Array
    clean: Array | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """`counts`: training rows of each class, as labelled; `mean` and `std` of the channels, empty but for images."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    superclass: Array | None  # (classes,)
    counts: Array
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """A data set before its settings did anything to it: the training parts in order, then `test` or `val`."""

    parts: Mapping[str, Split]
    classes: tuple[str, ...]
    superclasses: Mapping[str, list[str]] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)  # the origin of features, the vocabulary of words
    verse: Array | None = None  # of every training row of the words

    @cached_property
    def digests(self) -> dict[str, str]:
        """Every part's `digest`."""
        return {name: digest(split) for name, split in self.parts.items()}


def cache() -> Path:
    """Where what is downloaded or computed is kept."""
    import pooch  # here, since it asks for a notebook's widgets, which a page without downloads does without

    return Path(os.environ.get("TOPK_CACHE") or pooch.os_cache("topk")).expanduser()


def load(settings: Mapping[str, Any] | _Common) -> DataSet:
    """The data set that the settings describe; the same settings give the same arrays everywhere."""
    full = TypeAdapter[Any](Data).validate_python(settings)
    found = parts_of(full)
    training = [split for name, split in found.parts.items() if name.startswith("train")]
    whole = Split(*(np.concatenate(arrays) for arrays in zip(*((x.inputs, x.labels) for x in training), strict=True)))
    (test,) = (split for name, split in found.parts.items() if not name.startswith("train"))
    number = {name: label for label, group in enumerate((found.superclasses or {}).values()) for name in group}
    superclass = np.array([number[name] for name in found.classes]) if number else None
    out, rows = _hold_out(whole.labels, found.verse, full)
    labels = _noisy(whole.labels, superclass, len(found.classes), full)
    rows = _kept(whole.labels, rows, full)
    train, validation = _chosen(whole, labels, rows), _chosen(whole, labels, out)
    counts = np.bincount(train.labels, minlength=len(found.classes))
    same = {name: getattr(found, name) for name in ("classes", "mean", "std", "about")}
    print_of_all = fingerprint(full.model_dump(), found)
    return DataSet(train, validation, test, superclass=superclass, counts=counts, fingerprint=print_of_all, **same)


def fingerprint(settings: dict[str, Any], found: Parts) -> str:
    """Identifies settings and content."""
    return hashlib.sha256(json.dumps([VERSION, settings, found.digests], sort_keys=True).encode()).hexdigest()


def digest(split: Split) -> str:
    """The SHA-256 of labels, type, shape and elements."""
    found = hashlib.sha256(split.labels.astype("<i8").tobytes())
    found.update(f"{split.inputs.dtype.str}{split.inputs.shape}".encode())
    found.update(np.ascontiguousarray(split.inputs).data)
    return found.hexdigest()


def parts_of(settings: Known | Features | Words) -> Parts:
    """What the settings' name stands for, before validation, noise, fraction and imbalance."""
    if isinstance(settings, Features):
        return feature_set(settings.set)
    if isinstance(settings, Words):
        return _words(settings.vocabulary, settings.context, settings.rows, settings.test_rows)
    return _sample() if settings.name == "sample" else images(settings.name)


# --- images ---


@lru_cache(maxsize=1)
def images(name: str) -> Parts:
    """CIFAR-100 or 64 x 64 ImageNet, from the folder given or, CIFAR-100, downloaded."""
    given = Path(os.environ["TOPK_DATA"]).expanduser() / name if os.environ.get("TOPK_DATA") else None
    found = _given(given, name) if given is not None and given.is_dir() else None
    if found is None and name == "cifar100":
        found = _torchvision_cifar100(cache(), download=True)
    if found is None:
        raise FileNotFoundError(
            f"{name} is not in $TOPK_DATA ({given or 'not set'}): set it to the folder that holds {name}/, with "
            f"train/<class>/ and val/<class>/ in it"
        )
    mean, std = _MOMENTS[name]
    return replace(found, mean=mean, std=std)


def _given(folder: Path, name: str) -> Parts | None:
    """A folder of contact sheets, of JPEGs back to back, torchvision's own, or a tree of image files."""
    if list(folder.glob("*/*.webp")):
        return _sheets(folder)
    if (folder / "index.npz").is_file():
        return _jpegs(folder)
    if (folder / "cifar-100-python").is_dir():
        return _torchvision_cifar100(folder, download=False)
    return _small_tree(folder, 64) if (folder / "train").is_dir() and name == "imagenet64" else None


def _sheets(folder: Path) -> Parts:
    """`<part>/<label>-<class>.webp`: one lossless sheet a class, square images, 25 in a row."""

    def cut(path: Path) -> Array:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        side = pixels.shape[1] // 25
        cells = pixels.reshape(-1, side, 25, side, 3).swapaxes(1, 2)
        return cells.reshape(-1, side, side, 3)

    parts, classes = {}, tuple[str, ...]()
    for part in sorted(item for item in folder.iterdir() if any(item.glob("*.webp"))):
        paths = sorted(part.glob("*.webp"), key=lambda path: int(path.stem.split("-")[0]))
        classes = tuple(path.stem.partition("-")[2] for path in paths)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            blocks = list(pool.map(cut, paths))
        parts[part.name] = Split(np.concatenate(blocks), np.repeat(np.arange(len(paths)), [len(x) for x in blocks]))
    coarse = folder / "coarse.json"
    parts = {name: parts[name] for name in sorted(parts, key=lambda name: (not name.startswith("train"), name))}
    return Parts(parts, classes, json.loads(coarse.read_text()) if coarse.is_file() else None)


def _jpegs(folder: Path) -> Parts:
    """`<part>.jpegs` with offsets and labels in index.npz, names in classes.json."""
    index = np.load(folder / "index.npz", allow_pickle=False)
    names = [item["name"] for item in json.loads((folder / "classes.json").read_text())]
    parts = {}
    for path in sorted(folder.glob("*.jpegs"), key=lambda path: (not path.stem.startswith("train"), path.stem)):
        content, offsets = path.read_bytes(), index[f"{path.stem}.offsets"]

        def decoded(row: int, content: bytes = content, offsets: Array = offsets) -> Array:
            with Image.open(io.BytesIO(content[offsets[row] : offsets[row + 1]])) as image:
                return np.asarray(image.convert("RGB"))

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            rows = np.stack(list(pool.map(decoded, range(len(offsets) - 1), chunksize=256)))
        parts[path.stem] = Split(rows, index[f"{path.stem}.labels"].astype(np.int64))
    return Parts(parts, tuple(names))


def _torchvision_cifar100(folder: Path, *, download: bool) -> Parts:
    """Rows ordered by class and, within a class, as published; 250 training images of each class in either half."""
    import pooch
    from torchvision.datasets import CIFAR100

    if download and not (folder / CIFAR100.base_folder).is_dir():
        pooch.retrieve(
            CIFAR100.url,
            f"md5:{CIFAR100.tgz_md5}",
            path=folder,
            progressbar=True,
            processor=pooch.Untar(extract_dir="."),
        )
    train, test = (CIFAR100(folder, train=train) for train in (True, False))  # checks the files' MD5
    rows = np.argsort(train.targets, kind="stable").reshape(100, 2, 250)
    labels = np.asarray(train.targets)
    order = np.argsort(test.targets, kind="stable")
    parts = {
        **{f"train-{half}": Split(train.data[rows[:, half].ravel()], labels[rows[:, half].ravel()]) for half in (0, 1)},
        "test": Split(test.data[order], np.asarray(test.targets)[order]),
    }
    return Parts(parts, tuple(train.classes), _sample().superclasses)


def _small_tree(folder: Path, size: int) -> Parts:
    """A tree train/<class>/, val/<class>/ of images whose middle squares, scaled to `size`, are kept as one array."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    square = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    trees = {part: ImageFolder(folder / part, square) for part in ("train", "val")}
    if trees["train"].classes != trees["val"].classes:
        raise ValueError(
            f"{folder}/val must have the folders of train, one a class, got {trees['val'].classes[:3]}, ..."
        )
    parts = {}
    for part, files in trees.items():
        key = hashlib.sha256("".join(f"{path}\n" for path, _ in files.samples).encode()).hexdigest()[:16]
        path = cache() / "images" / f"{folder.name}-{part}-{size}px-{key}.npy"
        if not path.is_file():
            rows = [pixels for pixels, _ in DataLoader(files, 256, num_workers=min(8, os.cpu_count() or 1))]
            save_array(path, torch.cat(rows).permute(0, 2, 3, 1).contiguous().numpy())
        parts[part] = Split(np.load(path, mmap_mode="r"), np.array(files.targets))
    return Parts(parts, tuple(trees["train"].classes))


# --- features, the sample, words ---


def feature_folder(name: str) -> Path:
    """Where a set of features lies: about.json, and <part>.inputs.npy and <part>.labels.npy for each part."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"a set's name must be letters, digits, '.', '_' and '-', got {name!r}")
    return cache() / "features" / name


@lru_cache(maxsize=2)
def feature_set(name: str) -> Parts:
    """A set of features in the cache."""
    folder = feature_folder(name)
    if not (folder / "about.json").is_file():
        raise FileNotFoundError(f"no features {name!r} in {folder.parent}: run python -m topk_lab features")
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    parts = {
        part: Split(np.load(folder / f"{part}.inputs.npy", mmap_mode="r"), np.load(folder / f"{part}.labels.npy"))
        for part in about["parts"]
    }
    return Parts(parts, tuple(about["classes"]), about["superclasses"], about=about["origin"] | {"folder": folder})


@lru_cache(maxsize=1)
def _sample() -> Parts:
    file = resources.files("topk_lab").joinpath("sample.npz")
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    about = json.loads(str(arrays["about"]))
    parts = {
        part: Split(
            (arrays[f"{part}_levels"] * arrays["scale"]).astype(np.float32), arrays[f"{part}_labels"].astype(int)
        )
        for part in ("train", "test")
    }
    return Parts(parts, tuple(about["classes"]), about["superclasses"], about=about["origin"])


def verses() -> list[list[str]]:
    """The King James Version, a list of lower-cased words and marks a verse."""
    packed = resources.files("topk_lab").joinpath("kjv.txt.xz").read_bytes()
    lines = lzma.decompress(packed).decode().splitlines()
    return [tokens(line) for line in lines]


def tokens(text: str) -> list[str]:
    """Its words and marks, lower-cased."""
    return re.findall(r"[a-z']+|[^\sa-z']", text.lower())


@lru_cache(maxsize=2)
def _words(vocabulary: int, context: int, rows: int | None, test_rows: int | None) -> Parts:
    """Every tenth verse is the test. Token numbers: words 0 to vocabulary - 1, then any other word, then no word."""
    text = verses()
    training = [verse for number, verse in enumerate(text) if number % 10]
    counts = Counter(token for verse in training for token in verse)
    names = sorted(counts, key=lambda token: (-counts[token], token))[:vocabulary]
    number = {name: place for place, name in enumerate(names)}

    def split(chosen: list[list[str]], most: int | None) -> tuple[Split, Array]:
        inputs, labels, verse_of = [], [], []
        for place, verse in enumerate(chosen):
            tokens = [vocabulary + 1] * context + [number.get(token, vocabulary) for token in verse]
            for end in range(context, len(tokens)):
                if tokens[end] < vocabulary:
                    inputs.append(tokens[end - context : end])
                    labels.append(tokens[end])
                    verse_of.append(place)
        kept = slice(0, most)
        return Split(np.array(inputs[kept]), np.array(labels[kept])), np.array(verse_of[kept])

    train, verse = split(training, rows)
    test, _ = split(text[::10], test_rows)
    return Parts({"train": train, "test": test}, tuple(names), about={"vocabulary": vocabulary}, verse=verse)


# --- what the settings change ---


def bits(seed: int, name: str, count: int) -> Array:
    """`count` raw 64-bit numbers of the stream with this name: the same for ever, whatever else was drawn."""
    stream = np.random.SeedSequence([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")])
    return np.asarray(np.random.PCG64(stream).random_raw(count), dtype=np.uint64)


def _places(labels: Array, rows: Array, seed: int, name: str) -> Array:
    """For each of `rows` its place in a random order of its class, which only depends on seed, name and the rows."""
    own = labels[rows]
    order = np.lexsort((bits(seed, name, len(labels))[rows], own))
    ends = np.cumsum(np.bincount(own, minlength=1))
    places = np.empty(len(rows), dtype=np.int64)
    places[order] = np.arange(len(rows)) - np.concatenate([[0], ends])[own[order]]
    return places


def _hold_out(labels: Array, verse: Array | None, settings: _Common) -> tuple[Array, Array]:
    """Rows of the validation split, and those that are left."""
    rows, wanted = np.arange(len(labels)), settings.validation
    if verse is not None:
        if isinstance(wanted, int) and wanted:
            raise ValueError(f"data.validation of words must be a share of the verses, got {wanted}")
        out = bits(settings.seed, "validation", int(verse.max()) + 1)[verse] < np.uint64(wanted * 2**64)
        return rows[out], rows[~out]
    counts = np.bincount(labels)
    sizes = np.full(len(counts), wanted) if isinstance(wanted, int) else np.rint(wanted * counts).astype(np.int64)
    if wanted and (sizes >= counts)[counts > 0].any():
        raise ValueError(f"data.validation must leave rows to train on, got {wanted!r} of {counts.min()} in a class")
    out = _places(labels, rows, settings.seed, "validation") < sizes[labels]
    return rows[out], rows[~out]


def _noisy(labels: Array, superclass: Array | None, classes: int, settings: _Common) -> Array:
    """All rows' labels with noise; a row's fate does not depend on which rows are used."""
    if not settings.noise:
        return labels
    group = np.arange(classes) // _BLOCK if settings.noise_layout == "block" else superclass
    if group is None:
        raise ValueError("data.noise is within superclasses, and this set has none; noise_layout: block needs none")
    sizes = np.bincount(group)
    table = np.zeros((len(sizes), sizes.max()), dtype=np.int64)
    for number in range(len(sizes)):
        table[number, : sizes[number]] = np.flatnonzero(group == number)
    own = group[labels]
    drawn = (bits(settings.seed, "noise/label", len(labels)) % sizes[own].astype(np.uint64)).astype(np.int64)
    uniform = (bits(settings.seed, "noise/whether", len(labels)) >> np.uint64(11)) * 2.0**-53
    return np.where(uniform < settings.noise, table[own, drawn], labels)


def _kept(labels: Array, rows: Array, settings: _Common) -> Array:
    """The rows that a fraction, then an imbalance leaves: the first of each class, in a random order of their own."""
    if settings.fraction < 1:
        sizes = np.maximum(1, np.rint(settings.fraction * np.bincount(labels[rows])))
        rows = rows[_places(labels, rows, settings.seed, "fraction") < sizes[labels[rows]]]
    if settings.imbalance > 1:
        counts = np.bincount(labels[rows])
        profile = counts.max() * settings.imbalance ** (-np.arange(len(counts)) / (len(counts) - 1))
        sizes = np.maximum(1, np.floor(profile + 1e-9))
        rows = rows[_places(labels, rows, settings.seed, "imbalance") < sizes[labels[rows]]]
    return rows


def _chosen(split: Split, labels: Array, rows: Array) -> Split:
    return Split(split.inputs[rows], labels[rows], split.labels[rows] if labels is not split.labels else None)


# --- batches ---


class Batches:
    """A split in batches, in an order that only depends on the seed and the number of the epoch.

    The arrays lie on the device as a whole; images are normalised there, and augmented where rows are shuffled.
    """

    def __init__(
        self,
        split: Split,
        batch: int,
        data: DataSet,
        device: torch.device,
        *,
        shuffle: int | None = None,  # the seed of the order; None: as stored
        crop: int = 0,  # pixels by which images are moved at most; the border is mirrored
        flip: bool = False,  # whether half of the images are mirrored
    ) -> None:
        self.split, self.batch, self.data, self.device = split, batch, data, device
        self.shuffle, self.crop, self.flip = shuffle, crop, flip
        whole = shuffle is not None and len(split) >= batch  # no incomplete last batch
        self.rows = len(split) // batch * batch if whole else len(split)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.inputs = torch.from_numpy(np.require(split.inputs, requirements="W")).to(device)  # a map is copied
        self.images = self.inputs.dtype == torch.uint8

    def __len__(self) -> int:
        return -(-self.rows // self.batch)

    def epoch(self, number: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from its batch `first` on."""
        order = torch.arange(len(self.split))
        if self.shuffle is not None:
            generator = torch.Generator().manual_seed(self.shuffle)
            for _ in range(number + 1):
                order = torch.randperm(len(self.split), generator=generator)
        order = order[first * self.batch : self.rows].to(self.device)
        for place, rows in enumerate(order.split(self.batch)):
            inputs = self.inputs.index_select(0, rows)
            if self.images:
                inputs = self._normalised(inputs.permute(0, 3, 1, 2))
                if self.shuffle is not None:
                    place_of_run = number * len(self) + first + place
                    draw = torch.Generator(self.device).manual_seed((self.shuffle + 7919 * (place_of_run + 1)) % 2**63)
                    inputs = augmented(inputs, self.crop, self.flip, draw)
            yield inputs.float() if inputs.is_floating_point() else inputs, self.labels[rows]

    def _normalised(self, pixels: Tensor) -> Tensor:
        """uint8 (rows, channels, height, width) to float32, channels last in memory."""
        mean, std = (torch.tensor(x, device=self.device)[:, None, None] for x in (self.data.mean, self.data.std))
        return pixels.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(mean).div_(std)


def augmented(images: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Every image (rows, channels, height, width) moved by up to `crop` pixels and mirrored or not, on its device."""
    rows, _, height, width = images.shape
    draw = torch.randint(2**31 - 1, (3, rows), generator=generator, device=images.device)
    if crop:
        padded = pad(images, (crop,) * 4, mode="reflect")
        windows = padded.unfold(2, height, 1).unfold(
            3, width, 1
        )  # views: (rows, channels, 2 crop + 1, 2 crop + 1, h, w)
        top, left = draw[:2] % (2 * crop + 1)
        images = windows[torch.arange(rows, device=images.device), :, top, left]
    if flip:
        images = torch.where((draw[2] % 2 == 1)[:, None, None, None], images.flip(-1), images)
    return images.contiguous(memory_format=torch.channels_last)
