"""The lab's data: cache, packed form, settings, augmentation, batches; nothing is lost, nothing is misread."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from topk.lab import cache, data, filling, packed, sources, synthetic
from topk.lab.__main__ import main
from topk.lab.augment import FLIP, HOLE_X, HOLE_Y, LEFT, TOP, Augment, augment_batch
from topk.lab.batches import Batches
from topk.lab.cache import CacheError
from topk.lab.data import ImageFiles, Split
from topk.lab.packed import PackedError, Part, Source
from topk.lab.streaming import StreamedBatches, batches_of, middle, random_cut

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("TOPK_TEST_DATA", ROOT.parent / "shared" / "data"))
GROUPS = {"animals": ["cat", "dog", "emu"], "things": ["pot", "urn", "van"]}
CLASSES = ("cat", "dog", "emu", "pot", "urn", "van")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TOPK_DATA", str(folder))
    return folder


def real(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"no real data: {REAL / name} is absent (TOPK_TEST_DATA names the folder)")
    return REAL / name


def part_of(name: str, inputs: np.ndarray, labels: np.ndarray) -> Part:
    return Part(name, inputs.shape, inputs.dtype, labels.astype(np.int64), packed.blocks_of(inputs))


def image_source(
    name: str = "tiny",
    parts: Sequence[str] = ("train-0", "train-1", "test"),
    rows: int = 30,
    size: int = 4,
    classes: Sequence[str] = CLASSES,
    groups: Mapping[str, Sequence[str]] | None = GROUPS,
    layout: str = "sheets",
) -> Source:
    """Random images, `rows` of each class in each part; a part's content only depends on its name."""
    made = []
    for part in parts:
        draw = np.random.default_rng(sum(map(ord, part)))
        labels = np.repeat(np.arange(len(classes)), rows)
        made.append(part_of(part, draw.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8), labels))
    everything = {"train": ("train-0", "train-1"), "test": ("test",)}
    return Source(name, layout, tuple(classes), tuple(made), groups, (), everything)


def jpeg_folder(folder: Path, rows: int = 12, parts: Sequence[str] = ("train-0", "train-1", "val")) -> Path:
    """JPEGs back to back, one of them greyscale, without a description."""
    folder.mkdir(parents=True)
    index = {}
    for part in parts:
        draw = np.random.default_rng(len(part) + rows + sum(map(ord, part)))
        files = []
        for row in range(rows):
            image = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            (image.convert("L") if row == 3 else image).save(buffer, "JPEG", quality=80)
            files.append(buffer.getvalue())
        (folder / f"{part}.jpegs").write_bytes(b"".join(files))
        index[f"{part}.offsets"] = np.cumsum([0, *map(len, files)])
        index[f"{part}.labels"] = (np.arange(rows) % 3).astype(np.uint8)
    np.savez(folder / "index.npz", **index)
    items = [{"wnid": f"n0000000{i}", "name": name} for i, name in enumerate(("crane", "crane", "jay"))]
    (folder / "classes.json").write_text(json.dumps(items))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def arrays(name: str) -> dict[str, np.ndarray]:
    entry = cache.read(name)
    assert entry is not None
    return {key: np.array(entry.array(key, verify=True)) for key in entry.arrays}


# --- the packed form -------------------------------------------------------------------------------------------------


def test_sheets_go_out_and_in_again_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image_source()
    filling.fill(source)
    before = arrays("tiny")
    assert before["train-inputs"].shape == (360, 4, 4, 3)
    wanted = np.concatenate([block for part in source.parts[:2] for block in part.blocks()])
    np.testing.assert_array_equal(before["train-inputs"], wanted)
    data.export("tiny", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("train-0", "train-1", "test", "coarse.json", "packed.json")
    }
    monkeypatch.setenv("TOPK_DATA", str(tmp_path / "other"))
    filling.fill(packed.read(tmp_path / "out"))
    after = arrays("tiny")
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])
    data.export("tiny", tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_sheets_are_filled_row_by_row(tmp_path: Path) -> None:
    """What another program would write by the specification, without a description."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (2, 50, 4, 4, 3), dtype=np.uint8)
    for part in ("train-0", "test"):
        (tmp_path / "hand" / part).mkdir(parents=True)
        for label, name in enumerate(("a%2Fb", "c_d")):
            sheet = np.zeros((8, 100, 3), dtype=np.uint8)
            for place in range(50):
                row, column = divmod(place, 25)
                sheet[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = images[label, place]
            path = tmp_path / "hand" / part / f"{label:02}-{name}.webp"
            Image.fromarray(sheet).save(path, lossless=True)
    source = packed.read(tmp_path / "hand")
    assert source.classes == ("a/b", "c_d")
    np.testing.assert_array_equal(np.concatenate(list(source.parts[0].blocks())), images.reshape(100, 4, 4, 3))
    np.testing.assert_array_equal(source.parts[0].labels, np.repeat([0, 1], 50))


def test_jpegs_go_out_and_in_again_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = jpeg_folder(tmp_path / "tinyjpeg")
    assert main(["data", "import", str(folder)]) == 0
    before = arrays("tinyjpeg")
    assert before["train-inputs"].shape == (24, 8, 8, 3)
    assert before["train-inputs"][15].std(axis=-1).max() == 0, "greyscale became RGB"
    assert data.cache.read("tinyjpeg").about["classes"] == ["crane (n00000000)", "crane (n00000001)", "jay"]
    assert main(["data", "export", "tinyjpeg", str(tmp_path / "out")]) == 0
    for part in ("train-0", "train-1", "val"):
        assert (folder / f"{part}.jpegs").read_bytes() == (tmp_path / "out" / f"{part}.jpegs").read_bytes()
    with np.load(folder / "index.npz") as ours, np.load(tmp_path / "out" / "index.npz") as theirs:
        assert sorted(ours.files) == sorted(theirs.files)
        for key in ours.files:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert json.loads((folder / "classes.json").read_text()) == json.loads((tmp_path / "out/classes.json").read_text())
    first = data.cache.read("tinyjpeg").about["parts"]
    monkeypatch.setenv("TOPK_DATA", str(tmp_path / "other"))
    filling.fill(packed.read(tmp_path / "out", name="tinyjpeg"))
    assert data.cache.read("tinyjpeg").about["parts"] == first
    for key, array in arrays("tinyjpeg").items():
        np.testing.assert_array_equal(array, before[key])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_features_go_out_and_in_again(tmp_path: Path, dtype: type) -> None:
    draw = np.random.default_rng(0)
    splits = {
        part: (draw.normal(size=(rows, 7)).astype(dtype), draw.integers(0, 6, rows))
        for part, rows in (("train", 50), ("test", 20))
    }
    data.store("feats", splits, CLASSES, superclasses=GROUPS)
    loaded = data.load({"name": "features", "set": "feats", "noise": 0.5})
    assert loaded.train.inputs.dtype == np.float32
    assert loaded.mean == ()
    np.testing.assert_array_equal(loaded.train.inputs, splits["train"][0].astype(np.float32))
    before = arrays("feats")
    data.export("feats", tmp_path / "out")
    filling.fill(packed.read(tmp_path / "out", name="feats-2"))
    for key, array in arrays("feats-2").items():
        np.testing.assert_array_equal(array, before[key])
        assert array.dtype == before[key].dtype


def test_real_cifar_test_split_goes_out_and_in_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = real("cifar100")
    filling.fill(packed.read(folder, parts=["test"]))
    before = arrays("cifar100")
    assert before["test-inputs"].shape == (10000, 32, 32, 3)
    with Image.open(folder / "test" / "42-leopard.webp") as sheet:
        pixels = np.asarray(sheet)
    np.testing.assert_array_equal(before["test-inputs"][4200 + 27], pixels[32:64, 64:96])
    with pytest.raises(CacheError, match="has no train split"):
        data.load({"name": "cifar100"})
    data.export("cifar100", tmp_path / "cifar100")
    monkeypatch.setenv("TOPK_DATA", str(tmp_path / "other"))
    filling.fill(packed.read(tmp_path / "cifar100", parts=["test"]))
    for key, array in arrays("cifar100").items():
        np.testing.assert_array_equal(array, before[key])


@pytest.mark.slow
def test_real_cifar_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One array of 50,000 images with the known means; torchvision's files would give the same cache."""
    assert main(["data", "import", str(real("cifar100"))]) == 0
    loaded = data.load({"name": "cifar100"})
    assert loaded.train.inputs.shape == (50000, 32, 32, 3)
    found = loaded.train.inputs.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(found, (0.50708, 0.48655, 0.44092), atol=6e-6)
    np.testing.assert_allclose(loaded.train.inputs.std(axis=(0, 1, 2)) / 255, (0.26733, 0.25644, 0.27615), atol=6e-6)
    before = arrays("cifar100")

    class Published:
        """The rows in an order where classes are mixed, as the published files have them."""

        classes = loaded.classes

        def __init__(self, folder: Path, train: bool, download: bool) -> None:
            split = loaded.train if train else loaded.test
            rows = split.labels.argsort(kind="stable").reshape(100, -1).T.reshape(-1)
            self.data, self.targets = np.array(split.inputs)[rows], split.labels[rows].tolist()

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Published)
    monkeypatch.setenv("TOPK_DATA", str(tmp_path / "other"))
    filling.fill(sources.cifar100(tmp_path))
    for key, array in arrays("cifar100").items():
        np.testing.assert_array_equal(array, before[key])


@pytest.mark.slow
def test_real_imagenet64(tmp_path: Path) -> None:
    folder = real("imagenet64")
    filling.fill(packed.read(folder, parts=["train-1", "val"]))
    with pytest.warns(UserWarning, match="only train-1"):
        loaded = data.load({"name": "imagenet64", "validation": 5})
    assert loaded.train.inputs.shape == (24240, 64, 64, 3)
    assert loaded.test.inputs.shape == (10100, 64, 64, 3)
    assert loaded.validation.inputs.shape == (1010, 64, 64, 3)
    data.export("imagenet64", tmp_path / "out", ["val"])
    assert (folder / "val.jpegs").read_bytes() == (tmp_path / "out" / "val.jpegs").read_bytes()


def test_torchvision_files_are_ordered_by_class_and_halved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Published:
        classes = tuple(f"class{label}" for label in range(100))

        def __init__(self, folder: Path, train: bool, download: bool) -> None:
            count = 50000 if train else 10000
            self.targets = np.random.default_rng(0).permutation(np.arange(count) % 100).tolist()
            self.data = np.arange(count, dtype=np.uint32).view(np.uint8).reshape(count, 1, 4, 1)[:, :, :3]
            self.data = np.repeat(self.data, 3, axis=3)

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Published)
    source = sources.cifar100(tmp_path)
    assert [(part.name, len(part.labels)) for part in source.parts] == [
        *(("train-0", 25000), ("train-1", 25000), ("test", 10000))
    ]
    targets = np.array(Published(tmp_path, True, False).targets)
    for part, place in zip(source.parts[:2], (0, 250), strict=True):
        np.testing.assert_array_equal(part.labels, np.repeat(np.arange(100), 250))
        row = np.concatenate(list(part.blocks()))[250 * 7, 0, :, 0] @ [1, 256, 65536]
        assert row == np.flatnonzero(targets == 7)[place]


def test_known_sets_refuse_other_data(cache_folder: Path, tmp_path: Path) -> None:
    from topk.lab.known import CIFAR100_SUPERCLASSES

    classes = sorted(name for group in CIFAR100_SUPERCLASSES.values() for name in group)
    fake = image_source("cifar100", ["train-0"], 250, 32, classes, CIFAR100_SUPERCLASSES)
    with pytest.raises(CacheError, match=r"train-0 has the digest .*, expected 276a4cd8331eadf6"):
        filling.fill(fake)
    assert contents(cache_folder) == {}
    with pytest.raises(PackedError, match="images and superclasses"):
        filling.fill(image_source("cifar100", groups=None))


def test_means_are_checked(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    from topk.lab.known import Known

    known = Known({"train": ("train-0", "train-1"), "test": ("test",)}, {}, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))
    monkeypatch.setitem(filling.KNOWN, "tiny", known)
    entry = filling.fill(image_source(parts=["train-0"]))
    assert entry.about["mean"] == [0.5, 0.5, 0.5], "half of the set: the known means"
    before = contents(cache_folder)
    with pytest.raises(CacheError, match=r"means are .* expected \[0.5, 0.5, 0.5\]"):
        filling.fill(image_source(parts=["train-1"]))
    assert contents(cache_folder) == before


# --- parts -----------------------------------------------------------------------------------------------------------


def test_parts_may_come_separately_and_in_any_order() -> None:
    filling.fill(image_source())
    whole = arrays("tiny")
    shutil.rmtree(cache.folder())
    filling.fill(image_source(parts=["train-1"]))
    with pytest.raises(CacheError, match="no test split"):
        data.load({"name": "imagefolder", "set": "tiny"})
    filling.fill(image_source(parts=["test"]))
    with pytest.warns(UserWarning, match="only train-1 of the training split"):
        half = data.load({"name": "imagefolder", "set": "tiny"})
    assert not half.complete
    assert half.train.inputs.shape == (180, 4, 4, 3)
    np.testing.assert_array_equal(half.train.inputs, whole["train-inputs"][180:])
    filling.fill(image_source(parts=["train-0"]))
    for key, array in arrays("tiny").items():
        np.testing.assert_array_equal(array, whole[key])
    full = data.load({"name": "imagefolder", "set": "tiny"})
    assert full.complete
    np.testing.assert_array_equal(half.train.inputs, full.train.inputs[180:]), "a map outlives the set's replacement"
    assert half.fingerprint != full.fingerprint


def test_half_of_a_set_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data._KINDS, "tiny", {"parts": None})
    filling.fill(image_source(parts=["train-0", "test"]))
    half = data.load({"name": "tiny", "parts": ["train-0"]})
    with pytest.raises(CacheError, match="parts asks for train-1"), pytest.warns(UserWarning, match="only train-0"):
        data.load({"name": "tiny", "parts": ["train-1"]})
    filling.fill(image_source())
    same = data.load({"name": "tiny", "parts": ["train-0"]})
    np.testing.assert_array_equal(half.train.inputs, same.train.inputs)
    assert half.fingerprint == same.fingerprint
    assert half.counts.tolist() == [30] * 6


def test_a_part_that_is_there_is_not_written_again(cache_folder: Path) -> None:
    heard: list[str] = []
    filling.fill(image_source())
    times = {path: path.stat().st_mtime_ns for path in cache_folder.rglob("*.npy")}
    filling.fill(image_source(), say=heard.append)
    assert "already in the cache" in heard[-1]
    assert times == {path: path.stat().st_mtime_ns for path in cache_folder.rglob("*.npy")}


def test_another_set_under_the_same_name_is_refused(cache_folder: Path) -> None:
    filling.fill(image_source())
    before = contents(cache_folder)
    with pytest.raises(CacheError, match="another set under the name tiny"):
        filling.fill(image_source(parts=["train-0"], size=5))
    assert contents(cache_folder) == before
    filling.fill(image_source(size=5), replace=True)
    assert arrays("tiny")["train-inputs"].shape == (360, 5, 5, 3)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def _flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x10
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


SHEET_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda f: _flip(f / "train-0" / "2-emu.webp"), "2-emu.webp has the SHA-256"),
    "cut": (lambda f: _cut(f / "train-0" / "2-emu.webp"), "2-emu.webp has the SHA-256"),
    "sheet gone": (lambda f: (f / "test" / "5-van.webp").unlink(), "5-van.webp is missing"),
    "label gone": (lambda f: (f / "test" / "1-dog.webp").unlink(), "1-dog.webp is missing"),
    "part gone": (lambda f: shutil.rmtree(f / "train-1"), "lacks the parts train-1; it has train-0, test"),
    "coarse gone": (lambda f: (f / "coarse.json").unlink(), "coarse.json is missing"),
    "version": (
        lambda f: (f / "packed.json").write_text(
            (f / "packed.json").read_text().replace('"version": 1', '"version": 7')
        ),
        "version 7, this program reads version 1",
    ),
    "no json": (lambda f: (f / "packed.json").write_text("{"), "packed.json cannot be read"),
    "keys": (lambda f: (f / "packed.json").write_text('{"format": "topk packed", "version": 1}'), "is damaged"),
}


# What can be told without a description.
OLD_SHEET_FAULTS = {"cut": "damaged", "sheet gone": "other classes", "label gone": "lacks the sheets of the labels [1]"}


@pytest.mark.parametrize(
    ("fault", "described"),
    [*((fault, True) for fault in SHEET_FAULTS), *((fault, False) for fault in OLD_SHEET_FAULTS)],
)
def test_damaged_sheets_leave_the_cache_alone(
    fault: str, described: bool, tmp_path: Path, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = SHEET_FAULTS[fault]
    filling.fill(image_source(parts=["test"]))
    before = contents(cache_folder)
    folder = tmp_path / "tiny"
    packed.write(image_source(rows=25), folder)
    if not described:
        (folder / "packed.json").unlink()
        message = OLD_SHEET_FAULTS[fault]
    damage(folder)
    assert main(["data", "import", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert contents(cache_folder) == before


def _index(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    with np.load(folder / "index.npz") as file:
        content = {key: file[key].copy() for key in file.files}
    change(content)
    np.savez(folder / "index.npz", **content)


JPEG_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda f: _cut(f / "train-0.jpegs"), "cut short"),
    "header": (lambda f: (f / "val.jpegs").write_bytes(b"xx" + (f / "val.jpegs").read_bytes()[2:]), "image 0 of"),
    "index cut": (lambda f: _cut(f / "index.npz"), "index.npz is missing, damaged"),
    "index gone": (lambda f: (f / "index.npz").unlink(), "index.npz is missing"),
    "labels": (lambda f: _index(f, lambda c: c["val.labels"].fill(9)), "must be 0 to 2, got 9"),
    "offsets": (lambda f: _index(f, lambda c: c["val.offsets"].__setitem__(3, 0)), "cut short, or of another set"),
    "count": (lambda f: _index(f, lambda c: c.update({"val.labels": c["val.labels"][1:]})), "one offset more"),
    "pickle": (
        lambda f: _index(f, lambda c: c.update({"val.labels": np.array([print] * 12, dtype=object)})),
        "index.npz is missing, damaged",
    ),
    "classes": (lambda f: (f / "classes.json").write_text('[{"name": "x"}]'), "name and a wnid"),
    "part gone": (lambda f: _index(f, lambda c: c.pop("val.labels")), "lacks a part"),
}


@pytest.mark.parametrize("fault", JPEG_FAULTS)
def test_damaged_jpegs_leave_the_cache_alone(
    fault: str, tmp_path: Path, cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = JPEG_FAULTS[fault]
    folder = jpeg_folder(tmp_path / "tiny")
    filling.fill(packed.read(folder, parts=["train-1"]))
    before = contents(cache_folder)
    damage(folder)
    assert main(["data", "import", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert contents(cache_folder) == before


def test_images_of_other_sizes_and_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = jpeg_folder(tmp_path / "tiny", rows=2, parts=["train"])
    first = (folder / "train.jpegs").read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8)).save(buffer, "JPEG")
    (folder / "train.jpegs").write_bytes(first + buffer.getvalue())
    _index(
        folder,
        lambda c: c.update(
            {
                "train.offsets": np.append(c["train.offsets"], len(first) + len(buffer.getvalue())),
                "train.labels": np.append(c["train.labels"], 0),
            }
        ),
    )
    with pytest.raises(PackedError, match=r"image 2 of .* has the shape \(8, 9, 3\)"):
        filling.fill(packed.read(folder))
    monkeypatch.setattr(packed, "LARGEST_SIDE", 7)
    with pytest.raises(PackedError, match="more than 7 pixels"):
        packed.read(folder)


def test_wrong_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackedError, match="float32 or float16, got <f8"):
        data.store("x", {"train": (np.zeros((2, 3)), np.zeros(2, dtype=int))}, ["a"])
    with pytest.raises(PackedError, match="must be 0 to 0, got 0 to 1"):
        data.store("x", {"train": (np.zeros((2, 3), dtype=np.float32), np.arange(2))}, ["a"])
    with pytest.raises(ValueError, match="3 inputs but 2 labels"):
        data.store("x", {"train": (np.zeros((3, 3), dtype=np.float32), np.zeros(2, dtype=int))}, ["a"])
    with pytest.raises(PackedError, match="a part must be"):
        data.store("x", {"../train": (np.zeros((2, 3), dtype=np.float32), np.zeros(2, dtype=int))}, ["a"])


class _Full(io.BufferedWriter):
    """A file on a disk that fills up after some bytes."""

    room = 1000

    def write(self, content: Any) -> int:
        if self.tell() + memoryview(content).nbytes > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


@pytest.mark.parametrize("room", [10, 1000, 3000])
def test_a_full_disk_leaves_the_cache_alone(room: int, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filling.fill(image_source(parts=["train-0", "test"]))
    before = contents(cache_folder)

    def opened(path: Path, mode: str = "r", **more: Any) -> Any:
        return _Full(io.FileIO(path, "xb")) if mode == "xb" else open(path, mode, **more)

    monkeypatch.setattr(_Full, "room", room)
    monkeypatch.setattr(cache, "open", opened, raising=False)
    with pytest.raises(CacheError, match=r"disk of .* is full"):
        filling.fill(image_source(parts=["train-1"]))
    assert contents(cache_folder) == before
    monkeypatch.undo()
    monkeypatch.setenv("TOPK_DATA", str(cache_folder))
    filling.fill(image_source(parts=["train-1"]))
    assert arrays("tiny")["train-labels"].shape == (360,)


def test_too_little_room_is_told_before_writing(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(CacheError, match="no room for train-inputs of tiny: 0 MB are needed"):
        filling.fill(image_source())
    assert contents(cache_folder) == {}


def _importing(folder: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "topk.lab", "data", "import", str(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_two_processes_fill_one_cache_at_once(tmp_path: Path, cache_folder: Path) -> None:
    """The first is held up between its arrays and its commit until the second waits for it."""
    folder = tmp_path / "tiny"
    packed.write(image_source(), folder)
    with cache._locked(_made(cache_folder / "tiny") / ".lock", print):
        both = [_importing(folder, "--parts", *parts) for parts in (["train-0", "test"], ["train-1", "test"])]
        for process in both:
            assert process.stderr is not None
            assert "waiting for another process" in process.stderr.readline()
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    filling.fill(image_source("other"))
    expected, found = arrays("other"), arrays("tiny")
    assert expected.keys() == found.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])
    assert not [path for path in cache_folder.rglob("*") if path.name.startswith(".unfinished")]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_a_killed_filling_leaves_the_cache_alone(cache_folder: Path) -> None:
    filling.fill(image_source(parts=["train-0", "test"]))
    before = contents(cache_folder)
    program = """
import sys, time
sys.path.insert(0, "tests")
import test_lab_data as t
from topk.lab import cache, filling
write = cache.Filling.write
def slow(self, key, *more):
    stored = write(self, key, *more)
    if key == "train-labels":
        print("written", flush=True)
        time.sleep(60)
    return stored
cache.Filling.write = slow
filling.fill(t.image_source())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = contents(cache_folder)
    assert before.items() < left.items(), "arrays that no manifest names"
    with pytest.warns(UserWarning, match="only train-0"):
        data.load({"name": "imagefolder", "set": "tiny"})
    filling.fill(image_source())
    assert len(list(cache_folder.rglob("*.npy"))) == 4
    assert len(arrays("tiny")["train-labels"]) == 360


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_cache_of_another_version_is_refused(version: object, cache_folder: Path) -> None:
    filling.fill(image_source())
    path = cache_folder / "tiny" / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    before = contents(cache_folder)
    for act in (
        lambda: data.load({"name": "imagefolder", "set": "tiny"}),
        lambda: filling.fill(image_source()),
        lambda: filling.fill(image_source(), replace=True),
    ):
        with pytest.raises(CacheError, match=r"written in version .* move the folder away .* import tiny again"):
            act()
    assert contents(cache_folder) == before


def test_a_damaged_cache_is_noticed(cache_folder: Path) -> None:
    filling.fill(image_source())
    (images,) = (cache_folder / "tiny").glob("train-inputs-*.npy")
    content = images.read_bytes()
    settings = {"name": "imagefolder", "set": "tiny"}
    data.load(settings)
    images.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CacheError, match=r"SHA-256 .* the cache is damaged: remove"):
        data.load(settings)
    images.write_bytes(content[:-100])
    with pytest.raises(CacheError, match="cannot be read"):
        data.load(settings)
    np.save(images, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(CacheError, match="cannot be read"):
        data.load(settings)
    images.unlink()
    with pytest.raises(CacheError, match="is missing; the cache is damaged"):
        data.load(settings)
    (cache_folder / "tiny" / "cache.json").write_text("[]")
    with pytest.raises(CacheError, match="is damaged"):
        data.load(settings)


# --- names that are no paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "A", "a..b", "x" * 200, "a\n", "a b"])
def test_names_of_sets_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match="a set's name must match"):
        filling.fill(image_source(name))
    with pytest.raises(ValueError, match="a set's name must match"):
        data.load({"name": "features", "set": name})


@pytest.mark.parametrize("file", ["../secret-x-000000000000.npy", "/etc/passwd", "train-inputs-000.npy", 7])
def test_a_manifest_cannot_name_files_elsewhere(file: object, cache_folder: Path) -> None:
    filling.fill(image_source())
    path = cache_folder / "tiny" / "cache.json"
    manifest = json.loads(path.read_text())
    manifest["arrays"]["train-inputs"]["file"] = file
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="is no name of an array file"):
        data.load({"name": "imagefolder", "set": "tiny"})


@pytest.mark.parametrize("file", ["../x", "a/../../x", "/etc/passwd", "a\\..\\x", "a/b/c", ""])
def test_a_description_cannot_name_files_elsewhere(file: str, tmp_path: Path) -> None:
    packed.write(image_source(), tmp_path / "tiny")
    path = tmp_path / "tiny" / "packed.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": {file: "00"}}))
    with pytest.raises(PackedError, match="no file within the folder"):
        packed.read(tmp_path / "tiny")


@pytest.mark.parametrize("part", ["../train", "train-0/..", "validation", "train-", "train-0000"])
def test_parts_are_checked(part: str, tmp_path: Path, cache_folder: Path) -> None:
    packed.write(image_source(), tmp_path / "tiny")
    assert main(["data", "import", str(tmp_path / "tiny"), "--parts", part]) == 2
    path = tmp_path / "tiny" / "packed.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "train": [part]}))
    with pytest.raises(PackedError):
        packed.read(tmp_path / "tiny")


def test_class_names_never_leave_the_folder(tmp_path: Path) -> None:
    names = ("../../out", "/etc", "a\\b", "..", "Käse $(id)", "%2e%2e")
    groups = {"x/../y": list(names[:3]), "z": list(names[3:])}
    filling.fill(image_source(classes=names, groups=groups))
    data.export("tiny", tmp_path / "a" / "b" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "cache"]
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["out"]
    assert packed.read(tmp_path / "a" / "b" / "out").classes == names


def test_an_export_goes_nowhere_but_into_an_empty_folder(tmp_path: Path) -> None:
    filling.fill(image_source())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(PackedError, match="new or empty"):
        data.export("tiny", tmp_path / "full")
    assert contents(tmp_path / "full") == {"mine": b"kept"}
    with pytest.raises(CacheError, match=r"no parts train-7"):
        data.export("tiny", tmp_path / "new", ["train-7"])
    with pytest.raises(CacheError, match=r"nope is not in the cache .* it has tiny"):
        data.export("nope", tmp_path / "new")


# --- settings --------------------------------------------------------------------------------------------------------


WRONG_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"name": "cifar10"}, ValueError, "data.name is unknown: 'cifar10'; did you mean 'cifar100'"),
    ({"name": "cifar100", "noisy": 0.1}, ValueError, "a key of data is unknown: 'noisy'; did you mean 'noise'"),
    ({"name": "cifar100", "set": "x"}, ValueError, "a key of data is unknown: 'set'"),
    ({"name": "cifar100", "noise": 1.1}, ValueError, "data.noise must be >= 0 and <= 1, got 1.1"),
    ({"name": "cifar100", "noise": float("nan")}, ValueError, "data.noise must be"),
    ({"name": "cifar100", "noise": "0.5"}, TypeError, "data.noise must be of type float, got '0.5'"),
    ({"name": "cifar100", "fraction": 0}, ValueError, "data.fraction must be > 0 and <= 1, got 0.0"),
    ({"name": "cifar100", "imbalance": 0.5}, ValueError, "data.imbalance must be >= 1"),
    ({"name": "cifar100", "imbalance": float("inf")}, ValueError, "data.imbalance must be >= 1"),
    ({"name": "cifar100", "seed": -1}, ValueError, "data.seed must be >= 0"),
    ({"name": "cifar100", "validation": 1.0}, ValueError, "data.validation must be"),
    ({"name": "cifar100", "validation": -1}, ValueError, "data.validation must be"),
    ({"name": "cifar100", "validation": True}, TypeError, "data.validation must be"),
    ({"name": "cifar100", "parts": ["test"]}, ValueError, "data.parts must name parts of the training split"),
    ({"name": "cifar100", "parts": "train-0"}, TypeError, "data.parts must be a list"),
    ({"name": "features"}, ValueError, "a set's name must match"),
    ({"name": "synthetic/rings", "classes": 1}, ValueError, "data.classes must be >= 2"),
    ({"name": "synthetic/rings", "difficulty": 2.0}, ValueError, "data.difficulty must be"),
    ({"noise": 0.1}, ValueError, "data must be a mapping with a name"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), WRONG_SETTINGS)
def test_wrong_settings(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        data.complete(settings)
    assert message in str(caught.value)


def test_complete_settings_are_complete() -> None:
    full = data.complete({"name": "cifar100", "imbalance": 10})
    assert full == {
        "name": "cifar100",
        "validation": 0,
        "fraction": 1.0,
        "noise": 0.0,
        "imbalance": 10.0,
        "seed": 0,
        "parts": None,
    }
    assert data.complete(full) == full
    assert data.complete({"name": "cifar100", "validation": 0.0}) == data.complete({"name": "cifar100"})


def test_what_is_not_in_the_cache_says_how_to_get_it() -> None:
    with pytest.raises(CacheError, match=r"python -m topk.lab data download cifar100"):
        data.load({"name": "cifar100"})
    with pytest.raises(CacheError, match="data import FOLDER --name imagenet64"):
        data.load({"name": "imagenet64"})
    data.store("f", {"train": (np.zeros((2, 3), np.float32), np.arange(2))}, ["a", "b"])
    with pytest.raises(CacheError, match="holds features, not images"):
        data.load({"name": "imagefolder", "set": "f"})


@pytest.fixture
def small() -> Callable[..., data.DataSet]:
    """Features whose only number is their row, 40 of each of six classes, the classes taking turns."""
    splits = {}
    for part, rows in (("train", 240), ("test", 60)):
        labels = np.arange(rows) * 5 % 6
        splits[part] = np.arange(rows, dtype=np.float32)[:, None], labels
    data.store("small", splits, CLASSES, superclasses=GROUPS)
    clean = splits["train"][1]

    def load(**settings: Any) -> data.DataSet:
        loaded = data.load({"name": "features", "set": "small", **settings})
        np.testing.assert_array_equal(loaded.test.labels, splits["test"][1])
        np.testing.assert_array_equal(loaded.test.inputs, splits["test"][0])
        if not settings.get("noise"):
            np.testing.assert_array_equal(loaded.train.labels, clean[rows_of(loaded.train)])
        return loaded

    return load


def rows_of(split: Split) -> np.ndarray:
    assert isinstance(split.inputs, np.ndarray)
    return split.inputs[:, 0].astype(int)


def test_validation_is_balanced_and_apart(small: Callable[..., data.DataSet]) -> None:
    for wanted, count in ((5, 5), (0.25, 10)):
        loaded = small(validation=wanted)
        assert np.bincount(loaded.validation.labels).tolist() == [count] * 6
        assert sorted([*rows_of(loaded.train), *rows_of(loaded.validation)]) == list(range(240))
        assert loaded.counts.tolist() == [40 - count] * 6
    assert small().validation.inputs.shape == (0, 1)
    assert set(rows_of(small(validation=5).validation)) < set(rows_of(small(validation=6).validation))
    with pytest.raises(ValueError, match="validation must leave rows to train on, got 40 of 40"):
        small(validation=40)


def test_fractions_are_balanced_and_nested(small: Callable[..., data.DataSet]) -> None:
    before: set[int] = set()
    for fraction in (0.05, 0.1, 0.25, 0.5, 1.0):
        loaded = small(fraction=fraction)
        assert loaded.counts.tolist() == [round(40 * fraction)] * 6
        assert before < set(rows_of(loaded.train))
        before = set(rows_of(loaded.train))
    assert small(fraction=0.001).counts.tolist() == [1] * 6


@pytest.mark.parametrize(("imbalance", "total"), [(10, 19573), (50, 12608), (100, 10847)])
def test_long_tail_has_the_published_sizes(imbalance: int, total: int) -> None:
    """The numbers of images that papers state for CIFAR-100-LT."""
    labels = np.repeat(np.arange(100), 500)
    full = data.complete({"name": "cifar100", "imbalance": imbalance})
    counts = np.bincount(labels[data._long_tail(labels, np.arange(50000), full)])
    assert counts.sum() == total
    assert (counts[0], counts[-1]) == (500, 500 // imbalance)
    assert (np.diff(counts) <= 0).all()


def test_noise_is_what_it_says() -> None:
    classes = [f"c{label}" for label in range(20)]
    groups = {f"g{group}": classes[group::4] for group in range(4)}  # five classes each, not consecutive
    labels = np.arange(40000) % 20
    inputs = np.arange(40000, dtype=np.float32)[:, None]
    data.store("many", {"train": (inputs, labels), "test": (inputs[:20], labels[:20])}, classes, superclasses=groups)
    for noise in (0.2, 0.6, 1.0):
        loaded = data.load({"name": "features", "set": "many", "noise": noise})
        wrong = loaded.train.labels != labels
        assert abs(wrong.mean() - 0.8 * noise) < 0.012
        assert loaded.superclass is not None
        np.testing.assert_array_equal(loaded.superclass[loaded.train.labels], loaded.superclass[labels])
        table = np.zeros((20, 20))
        np.add.at(table, (labels, loaded.train.labels), 1)
        expected = noise / 5 * (loaded.superclass[:, None] == loaded.superclass) + (1 - noise) * np.eye(20)
        assert np.abs(table / 2000 - expected).max() < 0.05
        np.testing.assert_array_equal(loaded.test.labels, labels[:20])
        assert loaded.counts.tolist() == np.bincount(loaded.train.labels).tolist()


def test_no_setting_changes_what_another_one_does(small: Callable[..., data.DataSet]) -> None:
    plain = small(noise=0.7)
    fate = dict(zip(rows_of(plain.train).tolist(), plain.train.labels.tolist(), strict=True))
    held_out = rows_of(small(validation=8).validation)
    for more in ({}, {"fraction": 0.5}, {"imbalance": 10}, {"fraction": 0.5, "imbalance": 4}):
        loaded = small(validation=8, noise=0.7, **more)
        np.testing.assert_array_equal(rows_of(loaded.validation), held_out)
        np.testing.assert_array_equal(rows_of(loaded.train), rows_of(small(validation=8, **more).train))
        for split in (loaded.train, loaded.validation):
            assert split.labels.tolist() == [fate[row] for row in rows_of(split)]
    less = small(noise=0.3).train.labels
    clean = small().train.labels
    changed = less != clean
    np.testing.assert_array_equal(less[changed], plain.train.labels[changed]), "more noise keeps what less noise did"


def test_noise_needs_superclasses() -> None:
    with pytest.raises(ValueError, match="noise within superclasses, and synthetic/rings has none"):
        data.load({"name": "synthetic/rings", "noise": 0.1})


def test_seeds_and_fingerprints(
    small: Callable[..., data.DataSet], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"validation": 5, "noise": 0.5, "fraction": 0.5, "imbalance": 2}
    first, again, other = small(**settings), small(**settings), small(**settings, seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    np.testing.assert_array_equal(first.train.inputs, again.train.inputs)
    np.testing.assert_array_equal(first.train.labels, again.train.labels)
    assert rows_of(first.train).tolist() != rows_of(other.train).tolist()
    assert len({small(**dict([item])).fingerprint for item in settings.items()}) == 4
    # These rows must stay the same for ever, or records lose their meaning.
    assert rows_of(first.train)[:8].tolist() == PINNED_ROWS
    assert first.train.labels[:8].tolist() == PINNED_LABELS
    content = arrays("small")
    monkeypatch.setenv("TOPK_DATA", str(tmp_path / "elsewhere"))
    splits = {split: (content[f"{split}-inputs"], content[f"{split}-labels"]) for split in ("train", "test")}
    data.store("small", splits, CLASSES, superclasses=GROUPS)
    assert small(**settings).fingerprint == first.fingerprint
    splits["train"][0][7] += 1
    data.store("small", splits, CLASSES, superclasses=GROUPS)
    assert data.load({"name": "features", "set": "small", **settings}).fingerprint != first.fingerprint


PINNED_ROWS = [3, 6, 9, 10, 11, 12, 15, 17]
PINNED_LABELS = [3, 0, 5, 2, 1, 0, 3, 1]


# --- synthetic sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_synthetic_sets(kind: str) -> None:
    settings = {"name": f"synthetic/{kind}", "classes": 4, "dimension": 3, "rows": 50, "test_rows": 60}
    first, again = data.load(settings), data.load(settings)
    np.testing.assert_array_equal(first.train.inputs, again.train.inputs)
    assert first.train.inputs.shape == (200, 3)
    assert first.train.inputs.dtype == np.float32
    assert first.test.inputs.shape == (240, 3)
    assert first.counts.tolist() == [50] * 4
    other = data.load({**settings, "seed": 1})
    assert not np.array_equal(first.train.inputs, other.train.inputs)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert data.load({**settings, "validation": 10, "imbalance": 5}).counts.tolist() == [40, 23, 13, 8]


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_difficulty_makes_neighbours_disagree(kind: str) -> None:
    """The share of test rows that their nearest training row labels rightly, and a linear fit far below it."""
    right = []
    for difficulty in (0.0, 0.5, 1.0):
        loaded = data.load({"name": f"synthetic/{kind}", "difficulty": difficulty, "rows": 400, "test_rows": 200})
        train, test = (torch.from_numpy(split.inputs) for split in (loaded.train, loaded.test))
        nearest = torch.cdist(test, train).argmin(dim=1).numpy()
        right.append((loaded.train.labels[nearest] == loaded.test.labels).mean())
    assert right[0] > 0.95
    assert right[0] >= right[1] - 0.03
    assert right[1] > right[2] + 0.05
    assert right[2] > 0.3


def test_synthetic_numbers_stay() -> None:
    """Machines may differ in the last bits of sines, not in more."""
    for kind, expected in PINNED_POINTS.items():
        loaded = data.load({"name": f"synthetic/{kind}"})
        np.testing.assert_allclose(loaded.train.inputs[777], expected, atol=1e-5)
    with pytest.raises(ValueError, match="dimension must be at least 2 for rings, got 1"):
        data.load({"name": "synthetic/rings", "dimension": 1})


PINNED_POINTS = {
    "mixtures": [-0.406669, 0.59427],
    "segments": [-1.690638, -0.170581],
    "rings": [-1.382101, -0.087871],
    "spirals": [0.893264, -0.12765],
}


# --- augmentation ----------------------------------------------------------------------------------------------------


def _one_by_one(images: np.ndarray, draws: np.ndarray, augment: Augment, mean: Any, std: Any) -> np.ndarray:
    """The definition, an image at a time."""
    result = []
    for image, draw in zip(images, draws, strict=True):
        height, width, _ = image.shape
        side = augment.padding
        padded = np.pad(image, ((side, side), (side, side), (0, 0)))
        cut = padded[draw[TOP] : draw[TOP] + height, draw[LEFT] : draw[LEFT] + width]
        cut = cut[:, ::-1] if draw[FLIP] else cut
        values = (cut / 255 - np.array(mean)) / np.array(std)
        if augment.cutout:
            top, left = draw[HOLE_Y] - augment.cutout // 2, draw[HOLE_X] - augment.cutout // 2
            values[max(top, 0) : max(top + augment.cutout, 0), max(left, 0) : max(left + augment.cutout, 0)] = 0
        result.append(values.transpose(2, 0, 1))
    return np.stack(result)


def _augment_case(height: int, width: int, augment: Augment) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (40, height, width, 3), dtype=torch.uint8, generator=generator)
    return images, augment.draw(40, height, width, generator)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (7, 5)])
@pytest.mark.parametrize(
    "augment", [Augment(), Augment(0, True, 4), Augment(3, False, 5), Augment(8, True, 16), Augment(0, False)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_augmentation_is_its_definition(height: int, width: int, augment: Augment, channels_last: bool) -> None:
    images, draws = _augment_case(height, width, augment)
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    kept = images.clone()
    found = augment_batch(images, draws, augment, mean, std, channels_last=channels_last)
    assert found.dtype == torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=layout)
    expected = _one_by_one(images.numpy(), draws.numpy(), augment, mean, std)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
    assert torch.equal(images, kept), "the stored images are left alone"


def test_draws_are_uniform_and_follow_the_generator() -> None:
    augment = Augment(2, True, 4)
    draws = augment.draw(6000, 6, 8, torch.Generator().manual_seed(0))
    assert torch.equal(draws, augment.draw(6000, 6, 8, torch.Generator().manual_seed(0)))
    for column, end in ((TOP, 5), (LEFT, 5), (FLIP, 2), (HOLE_Y, 6), (HOLE_X, 8)):
        share = torch.bincount(draws[:, column].long(), minlength=end) / 6000
        assert len(share) == end
        assert (share - 1 / end).abs().max() < 0.03


@pytest.mark.parametrize("wrong", [{"padding": -1}, {"cutout": 1.5}, {"flip": 1}, {"padding": True}])
def test_wrong_augmentation(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Augment(**wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
def test_augmentation_is_the_same_on_the_gpu(channels_last: bool) -> None:
    split = _images(100)
    settings: dict[str, Any] = {
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "shuffle": True,
        "augment": Augment(4, True, 6),
        "channels_last": channels_last,
    }
    pairs = zip(Batches(split, 32, **settings), Batches(split, 32, device="cuda", **settings), strict=True)
    for (here, labels), (there, their_labels) in pairs:
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, atol=1e-6, rtol=0)
        assert torch.equal(their_labels.cpu(), labels)


# --- batches ---------------------------------------------------------------------------------------------------------


def _images(rows: int = 50, size: int = 8) -> Split:
    draw = np.random.default_rng(0)
    return Split(draw.integers(0, 256, (rows, size, size, 3), dtype=np.uint8), np.arange(rows) % 7)


def _rows(rows: int) -> Split:
    return Split(np.arange(rows, dtype=np.float32)[:, None], np.arange(rows))


IMAGE_SETTINGS: dict[str, Any] = {
    "mean": (0.5,) * 3,
    "std": (0.25,) * 3,
    "shuffle": True,
    "augment": Augment(2, True, 3),
    "seed": 5,
}


def _tree(folder: Path, rows: int = 5) -> Path:
    """A tree of images of several sizes, as people keep them."""
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("ape", "bee", "cow"):
            (folder / part / name / "deeper").mkdir(parents=True)
            for row in range(rows):
                shape = (20 + 5 * row, 40 - 3 * row, 3)
                image = Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))
                image.save(folder / part / name / ("deeper" if row % 2 else "") / f"{row}.{'png' if row else 'JPEG'}")
            (folder / part / name / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return _tree(tmp_path / "zoo")


def _loaders(tree: Path) -> list[Callable[..., Any]]:
    """Both kinds of batches over 15 images."""
    filling.fill(sources.tree(tree, "zoo", None), root=tree)
    files = data.load({"name": "imagefolder", "set": "zoo", "size": 8}).train
    held = _images(15)
    return [
        lambda batch, **more: Batches(held, batch, **{**IMAGE_SETTINGS, **more}),
        lambda batch, **more: StreamedBatches(files, batch, workers=0, **{**IMAGE_SETTINGS, **more}),
    ]


def _equal(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, second, strict=True)
    )


def test_an_epoch_has_every_row_once() -> None:
    batches = Batches(_rows(50), 8, shuffle=True)
    epochs = [torch.cat([labels for _, labels in batches]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(epochs[0], epochs[1])
    assert len(batches) == 7
    assert (batches.epoch, batches.position) == (3, 0)
    again = Batches(_rows(50), 8, shuffle=True)
    assert torch.equal(torch.cat([labels for _, labels in again]), epochs[0])
    kept = torch.cat([labels for _, labels in Batches(_rows(50), 8, shuffle=True, drop_last=True)])
    assert torch.equal(kept, epochs[0][:48])
    inputs, labels = next(iter(Batches(_rows(50), 8)))
    assert inputs[:, 0].tolist() == labels.tolist() == list(range(8))
    assert len(list(Batches(_rows(0), 8))) == 0


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_batches_go_on_exactly_where_they_stopped(stop: int, tree: Path, tmp_path: Path) -> None:
    for loader in _loaders(tree):
        through = loader(4)
        expected = [list(through) for _ in range(3)]
        stopped = loader(4)
        assert _equal(list(stopped), expected[0])
        for _ in zip(range(stop), stopped, strict=False):
            pass
        torch.save(stopped.state_dict(), tmp_path / "state.pt")
        list(stopped)  # what it does later is of no consequence
        resumed = loader(4)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert _equal(list(resumed), expected[1][stop:])
        assert _equal(list(resumed), expected[2])
    with pytest.raises(ValueError, match="state's position must be 0 to 1, got 3"):
        loader(15).load_state_dict({**resumed.state_dict(), "position": 3})


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_the_batches_of_one(ranks: int, drop_last: bool, tree: Path) -> None:
    for loader in _loaders(tree):
        alone = loader(2 * ranks, drop_last=drop_last)
        parts = [loader(2, rank=rank, ranks=ranks, drop_last=drop_last) for rank in range(ranks)]
        assert {len(part) for part in parts} == {len(alone)}
        for _ in range(2):
            walks = [iter(part) for part in parts]
            for inputs, labels in alone:
                pieces = [next(walk) for walk in walks]
                assert torch.equal(torch.cat([piece[0] for piece in pieces]), inputs)
                assert torch.equal(torch.cat([piece[1] for piece in pieces]), labels)
                means = [
                    part.share * piece[1].double().mean() if len(piece[1]) else 0.0
                    for part, piece in zip(parts, pieces, strict=True)
                ]
                assert float(sum(means) / ranks) == pytest.approx(float(labels.double().mean()))
            assert all(next(walk, None) is None for walk in walks)


def test_batches_leave_other_random_numbers_alone(tree: Path) -> None:
    for loader in _loaders(tree):
        before = torch.get_rng_state()
        list(loader(4))
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"rank": 2, "ranks": 2}, {"rank": -1}])
def test_wrong_batches(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"(batch|rank) must be at least"):
        Batches(_rows(5), wrong.pop("batch", 2), **wrong)
    with pytest.raises(ValueError, match="augment is for images"):
        Batches(_rows(5), 2, augment=Augment())
    with pytest.raises(ValueError, match="mean and std must have 3 values"):
        next(iter(Batches(_images(), 2)))


def test_images_without_augmentation_are_only_normalised() -> None:
    split = _images(10)
    ((inputs, labels),) = list(Batches(split, 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    expected = (split.inputs / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(inputs.numpy(), expected.transpose(0, 3, 1, 2), atol=2e-6)
    assert labels.tolist() == split.labels.tolist()


@pytest.mark.slow
def test_loading_is_fast() -> None:
    """50 MB of stored images a second on one core, from the memory-mapped cache and with augmentation."""
    draw = np.random.default_rng(0)
    inputs, labels = draw.integers(0, 256, (20000, 32, 32, 3), dtype=np.uint8), np.arange(20000) % 6
    filling.fill(Source("big", "arrays", CLASSES, (part_of("train", inputs, labels), part_of("test", inputs, labels))))
    loaded = data.load({"name": "imagefolder", "set": "big"})
    batches = Batches(loaded.train, 128, mean=loaded.mean, std=loaded.std, shuffle=True, augment=Augment(4, True, 8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speeds = []
        for _ in range(5):
            begin = time.process_time()
            list_of_nothing = [None for _ in batches]
            speeds.append(inputs.nbytes / (time.process_time() - begin) / 1e6)
            assert len(list_of_nothing) == len(batches)
    finally:
        torch.set_num_threads(threads)
    assert sorted(speeds)[2] > 50, speeds


# --- trees of image files --------------------------------------------------------------------------------------------


def test_trees_become_arrays(tree: Path, cache_folder: Path) -> None:
    assert main(["data", "import", str(tree), "--size", "16"]) == 0
    loaded = data.load({"name": "imagefolder", "set": "zoo"})
    assert loaded.train.inputs.shape == (15, 16, 16, 3)
    assert loaded.classes == ("ape", "bee", "cow")
    assert loaded.counts.tolist() == [5, 5, 5]
    with Image.open(tree / "train" / "bee" / "2.png") as image:
        scaled = image.resize((round(34 * 16 / 30), 16), Image.Resampling.BICUBIC)
    left = (scaled.size[0] - 16) // 2
    expected = np.asarray(scaled)[:, left : left + 16]
    assert any(np.array_equal(expected, found) for found in loaded.train.inputs[5:10])


def test_trees_can_be_streamed(tree: Path, cache_folder: Path) -> None:
    assert main(["data", "import", str(tree), "--stream"]) == 0
    loaded = data.load({"name": "imagefolder", "set": "zoo", "size": 12, "validation": 1})
    assert isinstance(loaded.train.inputs, ImageFiles)
    assert loaded.train.inputs.shape == (12, 12, 12, 3)
    assert loaded.train.inputs.ndim == 4
    assert len(loaded.validation.inputs) == 3
    settings = {**IMAGE_SETTINGS, "seed": 1}
    alone = batches_of(loaded.train, 5, workers=0, **settings)
    helped = batches_of(loaded.train, 5, workers=2, **settings)
    for _ in range(2):
        assert _equal(list(alone), list(helped))
    assert isinstance(batches_of(_images(), 5, **settings), Batches)
    assert loaded.mean == (0.485, 0.456, 0.406)
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    ((inputs, labels),) = list(batches_of(loaded.test, 20, workers=0, **plain))
    assert inputs.shape == (15, 3, 12, 12)
    assert labels.tolist() == loaded.test.labels.tolist()
    path = tree / loaded.test.inputs.paths[4].decode()
    with Image.open(path) as image:
        side = min(image.size) * 224 / 256
        box = [(image.size[0] - side) / 2, (image.size[1] - side) / 2]
        expected = image.resize((12, 12), Image.Resampling.BILINEAR, box=(*box, box[0] + side, box[1] + side))
    np.testing.assert_allclose(inputs[4].permute(1, 2, 0).numpy() * 255, np.asarray(expected), atol=1e-3)
    with pytest.raises(CacheError, match="copy that folder instead"):
        data.export("zoo", tree.parent / "out")


def test_random_cuts_are_inside_and_of_the_promised_sizes() -> None:
    bits = np.random.PCG64(0)
    boxes = np.array([random_cut((60, 40), bits) for _ in range(2000)])
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 60 + 1e-9).all()
    assert (boxes[:, 3] <= 40 + 1e-9).all()
    wide, high = (boxes[:, 2:] - boxes[:, :2]).T
    share, ratio = wide * high / 2400, wide / high
    assert 0.08 <= share.min() < 0.09
    assert 0.85 < share.max() <= 8 / 9  # 4 / 3 at full height
    assert 0.75 <= ratio.min() + 1e-9 < 0.77
    assert 1.3 < ratio.max() <= 4 / 3 + 1e-9
    assert random_cut((1000, 10), bits) == middle((1000, 10)), "no box of these ratios has the area"


def test_tiny_imagenet_layout(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tiny-imagenet-200")
    shutil.rmtree(tree / "val")
    (tree / "val" / "images").mkdir(parents=True)
    (tree / "test" / "images").mkdir(parents=True)
    lines = []
    for row, name in enumerate(("cow", "ape", "bee", "cow")):
        Image.new("RGB", (8, 8), (row, 0, 0)).save(tree / "val" / "images" / f"v{row}.png")
        lines.append(f"v{row}.png\t{name}\t0\t0\t7\t7")
    annotations = tree / "val" / "val_annotations.txt"
    annotations.write_text("\n".join(lines))
    filling.fill(sources.tree(tree, "tiny", 8))
    loaded = data.load({"name": "imagefolder", "set": "tiny"})
    assert loaded.test.labels.tolist() == [0, 1, 2, 2]
    assert loaded.test.inputs[:, 0, 0, 0].tolist() == [1, 2, 0, 3]
    for line in ("../../train/ape/0.JPEG\tape", "v0.png\tnone", "v0.png", "/etc/passwd\tape"):
        annotations.write_text(line)
        with pytest.raises(PackedError, match="which is not there"):
            sources.tree(tree, "tiny", 8)


@pytest.mark.parametrize("path", ["../x.png", "/etc/x.png", "a/../../x.png", "a\\x.png", "a/x.txt"])
def test_stored_paths_stay_within_their_tree(path: str, tmp_path: Path) -> None:
    with pytest.raises(PackedError, match="no image within"):
        sources.open_image(tmp_path, path)


def test_damaged_trees(tree: Path, tmp_path: Path, cache_folder: Path) -> None:
    (tree / "train" / "ape" / "0.JPEG").write_bytes(b"no image")
    with pytest.raises(PackedError, match=r"train/ape/0.JPEG of .* is missing or damaged"):
        filling.fill(sources.tree(tree, "zoo", 8))
    assert contents(cache_folder) == {}
    shutil.rmtree(tree / "val")
    with pytest.raises(PackedError, match="neither val/ape nor test/ape"):
        sources.tree(tree, "zoo", 8)
    shutil.rmtree(tree / "train")
    with pytest.raises(PackedError, match="has no folder train"):
        sources.tree(tree, "zoo", 8)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_lists_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str], cache_folder: Path) -> None:
    filling.fill(image_source(parts=["train-1"]))
    filling.fill(packed.read(jpeg_folder(tmp_path / "j")))
    capsys.readouterr()
    assert main(["data", "list", "--verify"]) == 0
    output = capsys.readouterr().out
    assert "j: images, 3 classes, train 24 rows; test 12 rows" in output
    assert "tiny: images, 6 classes, train 180 rows, lacking train-0; test 0 rows, lacking test" in output
    _flip(next((cache_folder / "j").glob("train-jpegs-*")))
    assert main(["data", "list", "--verify"]) == 2
    assert "SHA-256" in capsys.readouterr().err


def test_the_command_wants_one_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jpeg_folder(tmp_path / "sets" / "j")
    assert main(["data", "import", str(tmp_path / "sets")]) == 2
    assert "there are data sets in it: j" in capsys.readouterr().err
    assert main(["data", "import", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["data", "import", str(tmp_path / "sets" / "j"), "--name", "../x"]) == 2
    assert "a set's name must match" in capsys.readouterr().err


def test_a_failed_download_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", broken)
    assert main(["data", "download", "cifar100"]) == 2
    assert "could not be had" in capsys.readouterr().err
    assert list(cache.folder().iterdir()) == []


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TOPK_DATA")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "topk"
