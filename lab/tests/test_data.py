"""Data sets: what a given folder, the sample and the words hold, and what the settings change."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from topk_lab import data

SIDE, CLASSES = 8, 6


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with cifar100 as contact sheets and imagenet64 as JPEGs back to back, both tiny."""
    draw = np.random.default_rng(0)
    names = [f"class{label}" for label in range(CLASSES)]
    for part in ("train-0", "train-1", "test"):
        folder = tmp_path / "given" / "cifar100" / part
        folder.mkdir(parents=True)
        for label, name in enumerate(names):
            sheet = draw.integers(0, 256, (SIDE, 25 * SIDE, 3), dtype=np.uint8)
            Image.fromarray(sheet).save(folder / f"{label:02}-{name}.webp", lossless=True)
    coarse = {"first": names[::2], "second": names[1::2]}
    (tmp_path / "given" / "cifar100" / "coarse.json").write_text(json.dumps(coarse))
    folder = tmp_path / "given" / "imagenet64"
    folder.mkdir()
    index = {}
    for part, rows in (("train-0", 12), ("val", 6)):
        files = []
        for row in range(rows):
            buffer = io.BytesIO()
            Image.fromarray(np.full((64, 64), 20 * row, dtype=np.uint8)).save(buffer, "JPEG")  # greyscale
            files.append(buffer.getvalue())
        (folder / f"{part}.jpegs").write_bytes(b"".join(files))
        index |= {f"{part}.offsets": np.cumsum([0, *map(len, files)]), f"{part}.labels": np.arange(rows) % 3}
    np.savez(folder / "index.npz", **index)
    (folder / "classes.json").write_text(json.dumps([{"wnid": f"n{x}", "name": x} for x in "abc"]))
    monkeypatch.setenv("TOPK_DATA", str(tmp_path / "given"))
    return tmp_path / "given"


def test_contact_sheets_are_read_row_by_row_and_part_after_part(given: Path) -> None:
    found = data.load({"name": "cifar100"})
    assert found.train.inputs.shape == (2 * 25 * CLASSES, SIDE, SIDE, 3)
    assert found.train.labels.tolist() == 2 * [label for label in range(CLASSES) for _ in range(25)]
    with Image.open(given / "cifar100" / "train-1" / "01-class1.webp") as image:
        sheet = np.asarray(image)
    row = 25 * CLASSES + 25 + 7  # the eighth image of class 1 in the second part
    np.testing.assert_array_equal(found.train.inputs[row], sheet[:, 7 * SIDE : 8 * SIDE])
    assert found.superclass is not None
    assert found.superclass.tolist() == [0, 1] * 3


def test_jpegs_are_decoded_and_grey_ones_become_rgb(given: Path) -> None:
    found = data.load({"name": "imagenet64"})
    assert found.train.inputs.shape == (12, 64, 64, 3)
    assert abs(int(found.train.inputs[5].mean()) - 100) <= 1
    assert found.test.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_tree_of_images_is_scaled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "imagenet64" / part / name).mkdir(parents=True)
            Image.new("RGB", (100, 80), (200, 0, 0)).save(tmp_path / "imagenet64" / part / name / "1.png")
    monkeypatch.setenv("TOPK_DATA", str(tmp_path))
    found = data.load({"name": "imagenet64"})
    assert found.classes == ("cat", "dog")
    assert found.train.inputs.shape == (2, 64, 64, 3)
    assert found.train.inputs[0, 3, 3].tolist() == [200, 0, 0]
    assert len(list((tmp_path / "cache" / "images").glob("*.npy"))) == 2
    (tmp_path / "imagenet64" / "val" / "bird").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "imagenet64" / "val" / "bird" / "1.png")
    data.images.cache_clear()
    with pytest.raises(ValueError, match="must have the folders of train"):
        data.load({"name": "imagenet64"})


def test_what_is_nowhere_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="imagenet64 is not in"):
        data.load({"name": "imagenet64"})
    with pytest.raises(FileNotFoundError, match="topk_lab features"):
        data.load({"name": "features", "set": "nothing"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cifar10"}, "cifar10"),
        ({"name": "sample", "nois": 0.4}, "nois"),
        ({"name": "sample", "noise": 1.4}, "noise"),
        ({"name": "sample", "validation": 1.5}, "validation"),
        ({"name": "sample", "noise_layout": "random"}, "noise_layout"),
    ],
)
def test_unknown_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        data.load(settings)


# --- what the settings change ---


def test_validation_leaves_first_and_a_smaller_share_is_a_subset() -> None:
    whole = data.load({"name": "sample"})
    part = data.load({"name": "sample", "validation": 7})
    assert len(part.validation) == 700
    assert len(part.train) + 700 == len(whole.train)
    half, tenth = (data.load({"name": "sample", "validation": 7, "fraction": x}) for x in (0.5, 0.1))
    rows = {row.tobytes() for row in half.train.inputs}
    assert all(row.tobytes() in rows for row in tenth.train.inputs)
    np.testing.assert_array_equal(half.validation.inputs, part.validation.inputs)
    np.testing.assert_array_equal(half.counts, np.full(100, round(0.5 * 53)))


@pytest.mark.parametrize(("layout", "expected"), [("superclass", 0.8), ("block", 0.8)])
def test_noise_stays_within_its_group_and_leaves_the_test_clean(layout: str, expected: float) -> None:
    noisy = data.load({"name": "sample", "noise": 1.0, "noise_layout": layout, "validation": 5})
    clean = data.load({"name": "sample", "validation": 5})
    group = noisy.superclass if layout == "superclass" else np.arange(100) // 5
    assert group is not None
    for split, right in ((noisy.train, clean.train.labels), (noisy.validation, clean.validation.labels)):
        np.testing.assert_array_equal(split.clean, right)
        np.testing.assert_array_equal(group[split.labels], group[right])
    wrong = float((noisy.train.labels != clean.train.labels).mean())
    assert abs(wrong - expected) < 0.02
    np.testing.assert_array_equal(noisy.test.labels, clean.test.labels)
    assert clean.train.clean is None
    other = np.arange(100) // 5 if layout == "superclass" else noisy.superclass
    assert other is not None
    assert (other[noisy.train.labels] != other[clean.train.labels]).any()


def test_noise_needs_groups(given: Path) -> None:
    with pytest.raises(ValueError, match="noise_layout: block"):
        data.load({"name": "imagenet64", "noise": 0.2})
    assert data.load({"name": "imagenet64", "noise": 1.0, "noise_layout": "block"}).train.clean is not None


def test_a_long_tail_has_its_exponential_profile() -> None:
    found = data.load({"name": "sample", "imbalance": 20})
    expected = np.floor(60 * 20.0 ** (-np.arange(100) / 99) + 1e-9)
    np.testing.assert_array_equal(found.counts, expected)


def test_the_fingerprint_tells_settings_and_content_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    one, same = data.load({"name": "sample"}), data.load({"name": "sample", "noise": 0})
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != data.load({"name": "sample", "seed": 1}).fingerprint
    found = data.parts_of(data.Known(name="sample"))
    other = data.Parts(
        {**found.parts, "test": data.Split(found.parts["test"].inputs + 1, found.parts["test"].labels)}, ()
    )
    assert data.fingerprint({}, found) != data.fingerprint({}, other)


def test_words_predict_the_next_one_from_those_before() -> None:
    found = data.load({"name": "words", "vocabulary": 50, "context": 2, "rows": 2000, "validation": 0.25})
    first = data.verses()[1]  # verse 0 is a test verse
    number = {name: place for place, name in enumerate(found.classes)}
    pairs = {(tuple(x), y) for x, y in zip(found.train.inputs.tolist(), found.train.labels.tolist(), strict=True)}
    pairs |= {
        (tuple(x), y) for x, y in zip(found.validation.inputs.tolist(), found.validation.labels.tolist(), strict=True)
    }
    assert ((51, 51), number[first[0]]) in pairs  # 51: no word before
    assert len(found.train) + len(found.validation) == 2000
    assert 300 < len(found.validation) < 700
    assert found.train.labels.max() < 50
    assert number["the"] < 3
    assert len(data.verses()) == 31103
    short = data.load({"name": "words", "vocabulary": 50, "context": 2, "rows": 2000, "test_rows": 30})
    assert np.array_equal(short.test.inputs, found.test.inputs[:30])
    assert len(found.test) > 30_000


# --- batches ---


def test_batches_shuffle_by_seed_and_epoch_and_go_on_anywhere() -> None:
    found = data.load({"name": "sample", "fraction": 0.1})
    batches = data.Batches(found.train, 100, found, torch.device("cpu"), shuffle=5)
    first, second = ([y.tolist() for _, y in batches.epoch(number)] for number in (0, 1))
    assert first != second
    assert [y.tolist() for _, y in batches.epoch(1, first=3)] == second[3:]
    assert len(first) == len(batches) == 6
    plain = data.Batches(found.train, 100, found, torch.device("cpu"))
    assert torch.cat([y for _, y in plain.epoch()]).tolist() == found.train.labels.tolist()


def test_images_are_normalised_moved_and_mirrored(given: Path) -> None:
    found = data.load({"name": "cifar100"})
    device = torch.device("cpu")
    (plain, _), *_ = data.Batches(found.train, 300, found, device).epoch()
    pixels = torch.from_numpy(found.train.inputs).permute(0, 3, 1, 2) / 255
    expected = (pixels - torch.tensor(found.mean)[:, None, None]) / torch.tensor(found.std)[:, None, None]
    torch.testing.assert_close(plain, expected)
    moved = data.augmented(plain, 2, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2), mode="reflect")
    for row in range(20):
        crops = [padded[row, :, i : i + SIDE, j : j + SIDE] for i in range(5) for j in range(5)]
        assert any(torch.equal(moved[row], x) or torch.equal(moved[row], x.flip(-1)) for x in crops)
    assert not torch.equal(moved, plain)
    again = data.Batches(found.train, 300, found, device, shuffle=1, crop=2, flip=True)
    one, two = (next(iter(again.epoch(3)))[0] for _ in range(2))
    assert torch.equal(one, two)


def test_torchvisions_cifar100_is_put_into_the_order_of_the_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows by class and, within a class, as published: 250 of each class in either half."""
    from torchvision.datasets import CIFAR100

    class Published:
        base_folder = CIFAR100.base_folder

        def __init__(self, folder: Path, train: bool) -> None:
            assert folder == tmp_path / "cifar100"
            rows = 500 if train else 100
            self.targets = np.random.default_rng(train).permutation(np.repeat(np.arange(100), rows)).tolist()
            self.data = np.arange(len(self.targets)).reshape(-1, 1, 1, 1)
            self.classes = [f"class{label}" for label in range(100)]

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Published)
    (tmp_path / "cifar100" / "cifar-100-python").mkdir(parents=True)
    monkeypatch.setenv("TOPK_DATA", str(tmp_path))
    found = data.images("cifar100")
    targets = np.array(Published(tmp_path / "cifar100", True).targets)
    assert found.parts["train-0"].labels.tolist() == np.repeat(np.arange(100), 250).tolist()
    rows = found.parts["train-1"].inputs.ravel()
    np.testing.assert_array_equal(targets[rows], found.parts["train-1"].labels)
    assert (np.diff(rows.reshape(100, 250)) > 0).all()
    assert rows[0] == np.flatnonzero(targets == 0)[250]
    assert len(found.parts["test"]) == 10_000
    assert found.superclasses is not None
    assert sum(map(len, found.superclasses.values())) == 100
