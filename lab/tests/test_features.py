"""Features and activations: content-keyed, resumable, and what is trained on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from topk_lab import data, features, train
from topk_lab.data import Parts, Split

NETWORK = "mobilenet_v2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    torch.save(torchvision.models.mobilenet_v2(weights=None).features.state_dict(), path)
    return str(path)


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> Parts:
    draw = np.random.default_rng(0)
    sizes = {"train-0": 12, "train-1": 12, "test": 8}
    parts = {
        name: Split(draw.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8), np.arange(rows) % 4)
        for name, rows in sizes.items()
    }
    found = Parts(parts, tuple("abcd"), {"x": ["a", "b"], "y": ["c", "d"]})
    monkeypatch.setattr(data, "images", lambda name: found)
    return found


def test_features_are_what_enters_the_last_layer(weights: str, images: Parts) -> None:
    name = features.extract("cifar100", weights=weights, size=40, progress=False)
    assert name == f"cifar100-mobilenet_v2-40px-{features.digest(features.state_of(NETWORK, weights))[:12]}"
    found = data.load({"name": "features", "set": name})
    assert found.train.inputs.shape == (24, 1280)
    assert found.superclass is not None
    net = features.loaded(NETWORK, features.state_of(NETWORK, weights)).eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    pixels = torch.from_numpy(images.parts["test"].inputs).permute(0, 3, 1, 2) / 255
    scaled = torch.nn.functional.interpolate((pixels - mean) / std, (40, 40), mode="bilinear", antialias=True)
    with torch.inference_mode():
        expected = net.features(scaled).mean((2, 3))  # type: ignore[operator]
    np.testing.assert_allclose(found.test.inputs, expected.numpy(), atol=2e-4)
    assert found.about["weights"] == features.digest(features.state_of(NETWORK, weights))


def test_an_interrupted_extraction_goes_on_with_the_next_part(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = features._activations, list[int]()

    def counted(net: object, split: Split, *rest: object, **more: object) -> object:
        parts.append(len(split))
        if len(parts) == 2:
            raise KeyboardInterrupt
        return whole(net, split, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(features, "_activations", counted)
    with pytest.raises(KeyboardInterrupt):
        features.extract("cifar100", weights=weights, size=32, progress=False)
    name = features.extract("cifar100", weights=weights, size=32, progress=False)
    assert parts == [12, 12, 12, 8]
    features.extract("cifar100", weights=weights, size=32, progress=False)
    assert len(parts) == 4
    path = data.feature_folder(name) / "about.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "origin": "another"}))
    with pytest.raises(ValueError, match="another set under this name"):
        features.extract("cifar100", weights=weights, size=32, progress=False)


def test_components_are_uncorrelated_ordered_and_fitted_on_training_rows(weights: str) -> None:
    name = features.extract("cifar100", weights=weights, size=32, components=5, progress=False)
    found = data.load({"name": "features", "set": name})
    covariance = np.cov(found.train.inputs.T, bias=True)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    assert (np.diff(np.diag(covariance)) <= 0).all()
    assert np.square(found.train.inputs).mean() == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="components must be at most"):
        features.fitted(np.zeros((9, 4)), 5)


def test_the_last_blocks_start_from_the_network_they_were_cut_from(weights: str) -> None:
    name = features.extract("cifar100", weights=weights, size=32, cut=16, progress=False)
    found = data.load({"name": "features", "set": name})
    assert found.train.inputs.dtype == np.float16
    assert found.train.inputs.shape[:2] == (24, 160)
    config = {
        "data": {"name": "features", "set": name},
        "model": {"name": "last_blocks"},
        "loss": {"name": "smooth", "k": 1},
        "training": {"epochs": 2, "batch": 8, "learning_rate": 0.01},
    }
    row = train.train(config, progress=False)
    assert row["parameters"] > 1_000_000
    assert row["pretrained"] == found.about["weights"]


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        features.loaded(NETWORK, {"features.0.0.weight": torch.zeros(32, 3, 3, 3)})
    with pytest.raises(ValueError, match="must be a file or one of"):
        features.state_of(NETWORK, str(tmp_path / "nowhere.pt"))
