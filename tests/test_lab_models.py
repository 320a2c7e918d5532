"""The networks of the experiments, and features from frozen ones."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from topk.lab import cache, data, features, models, training
from topk.lab.__main__ import main
from topk.lab.filling import store

WEIGHTS = Path(os.environ.get("TOPK_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "weights"


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"name": "resnet18"}, (32, 32, 3)),
        ({"name": "resnet18", "stem": "imagenet", "head": "cosine"}, (64, 64, 3)),
        ({"name": "small", "width": 8}, (32, 32, 3)),
        ({"name": "small", "width": 8, "head": "cosine", "scale": 20.0}, (16, 16, 1)),
        ({"name": "linear"}, (40,)),
        ({"name": "linear"}, (4, 4, 3)),
        ({"name": "mlp", "hidden": 16, "layers": 2, "dropout": 0.1}, (40,)),
        ({"name": "mlp", "head": "cosine"}, (40,)),
        ({"name": "cosine", "scale": 3.0}, (40,)),
        ({"name": "torchvision/mobilenet_v3_small"}, (32, 32, 3)),
        ({"name": "torchvision/resnet18", "head": "cosine"}, (32, 32, 3)),
    ],
)
def test_models_give_scores_and_learn(settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert models.complete(models.complete(settings)) == models.complete(settings)
    model = models.build(settings, 7, shape)
    inputs = torch.rand(2, shape[2], *shape[:2]) if len(shape) == 3 else torch.rand(2, *shape)
    scores = model(inputs)
    assert scores.shape == (2, 7)
    F.cross_entropy(scores, torch.tensor([0, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert models.parameters(model) == sum(p.numel() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs).dtype == torch.float32  # 8 bits of scores would tie classes that are not tied


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_by_name() -> None:
    model = models.build({"name": "timm/resnet10t"}, 7, (32, 32, 3))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"timm's.*'resnet10tt'.*did you mean 'resnet10t'"):
        models.build({"name": "timm/resnet10tt"}, 7, (32, 32, 3))


def test_cosine_head_is_a_cosine() -> None:
    head = models.CosineHead(5, 3, 4.0)
    inputs = torch.randn(2, 5)
    expected = 4.0 * F.cosine_similarity(inputs[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(inputs), expected)
    torch.testing.assert_close(head(7 * inputs), expected)


def test_small_is_a_fraction_of_resnet18() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    work = {}
    for name in ("resnet18", "small"):
        with FlopCounterMode(display=False) as counter:
            models.build({"name": name}, 100, (32, 32, 3))(torch.rand(1, 3, 32, 32))
        work[name] = counter.get_total_flops()
    assert work["resnet18"] == pytest.approx(2 * 556e6, rel=0.01)  # the original with this stem
    assert work["small"] < work["resnet18"] / 5


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"name": "resnet19"}, (32, 32, 3), "model.name is unknown: 'resnet19'; did you mean 'resnet18'"),
        ({"name": "torchvision/resnet19"}, (32, 32, 3), "torchvision's.*did you mean 'resnet18'"),
        ({"name": "torchvision/fasterrcnn_resnet50_fpn"}, (32, 32, 3), "torchvision's is unknown"),
        ({"name": "mlp", "hiden": 3}, (4,), "'hiden'; did you mean 'hidden'"),
        ({"name": "small", "head": "cos"}, (4, 4, 3), "model.head is unknown: 'cos'"),
        ({"name": "small"}, (4,), "takes images"),
        ({"name": "torchvision/resnet18", "weights": "IMAGENET1K"}, (4, 4, 3), "weights of resnet18.*'IMAGENET1K'"),
        ({}, (4,), "model must be a mapping with a name"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(settings, 3, shape)


def test_weights_from_a_file(tmp_path: Path) -> None:
    import torchvision

    source = torchvision.models.resnet18(num_classes=11)
    path = tmp_path / "weights.pt"
    torch.save(source.state_dict(), path)
    model = models.build({"name": "torchvision/resnet18", "weights": str(path)}, 7, (32, 32, 3))
    torch.testing.assert_close(model.conv1.weight, source.conv1.weight)
    torch.save({"conv1.weight": source.conv1.weight, "conv9.weight": source.conv1.weight}, path)
    with pytest.raises(ValueError, match=r"weights do not fit ResNet: it lacks \['conv9.weight'\].*they lack \['bn1"):
        models.build({"name": "torchvision/resnet18", "weights": str(path)}, 7, (32, 32, 3))
    torch.save(source, path)  # a whole module would need code to be run
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        models.build({"name": "torchvision/resnet18", "weights": str(path)}, 7, (32, 32, 3))
    torch.save([source.conv1.weight], path)
    with pytest.raises(ValueError, match="must be a file with a state dict"):
        models.build({"name": "torchvision/resnet18", "weights": str(path)}, 7, (32, 32, 3))


# --- features --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of ten pictures in two training parts and a test part."""
    monkeypatch.setenv("TOPK_DATA", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    splits = {
        part: (draw.integers(0, 256, (rows, 20, 20, 3)).astype(np.uint8), np.arange(rows) % 3)
        for part, rows in (("train-0", 5), ("train-1", 3), ("test", 4))
    }
    store("pictures", splits, ["ant", "bee", "cat"], superclasses={"insect": ["ant", "bee"], "mammal": ["cat"]})


@pytest.mark.usefixtures("_pictures")
def test_features_are_extracted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mobile.pt"
    net = _network(path)
    settings: dict[str, Any] = {"size": 32, "batch": 3, "device": "cpu", "progress": False}
    name = features.extract("pictures", "mobilenet_v2", str(path), **settings)
    hashed = features.digest(torch.load(path, weights_only=True))
    assert name == f"pictures-mobilenet_v2-32px-{hashed[:12]}"
    entry = cache.read(name)
    assert entry is not None
    assert entry.about["origin"]["weights"] == hashed

    with pytest.warns(UserWarning, match="train") if not entry.about["complete"]["train"] else _nothing():
        found = data.load({"name": "features", "set": name})
    images = data.load({"name": "imagefolder", "set": "pictures"})
    assert found.train.inputs.shape == (8, 1280)
    assert found.classes == ("ant", "bee", "cat")
    assert found.superclass is not None
    assert found.superclass.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(found.test.labels, images.test.labels)
    planes = torch.tensor(images.test.inputs).permute(0, 3, 1, 2) / 255
    planes = (planes - torch.tensor(features.MEAN)[:, None, None]) / torch.tensor(features.STD)[:, None, None]
    planes = F.interpolate(planes, (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = net.features(planes).mean((2, 3))
    np.testing.assert_allclose(found.test.inputs, expected.numpy(), rtol=1e-3, atol=1e-5)

    config = {"data": {"name": "features", "set": name}, "model": {"name": "linear"}, "loss": {"name": "cross_entropy"}}
    result = training.train(config | {"training": {"epochs": 1, "batch": 4}}, device="cpu", progress=False)
    assert result["weights"] == hashed

    def never(*_: Any) -> None:
        raise AssertionError("extracted again")

    monkeypatch.setattr(features, "_features", never)
    assert features.extract("pictures", "mobilenet_v2", str(path), **settings) == name
    with pytest.raises(AssertionError, match="extracted again"):
        features.extract("pictures", "mobilenet_v2", str(path), **(settings | {"size": 40}))
    with pytest.raises(ValueError, match=f"another set under the name {name}"):
        features.extract("pictures", "mobilenet_v2", str(path), name=name, **(settings | {"size": 40}))


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def _network(path: Path) -> nn.Module:
    """MobileNetV2 with random weights; those of its features alone go into the file."""
    import torchvision

    net = torchvision.models.mobilenet_v2().eval()
    torch.save(net.features.state_dict(), path)
    return net


@pytest.mark.usefixtures("_pictures")
def test_interrupted_extraction_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mobile.pt"
    _network(path)
    whole, seen = features._features, []

    def until_the_test_split(net: nn.Module, split: Any, *rest: Any) -> Any:
        seen.append(len(split.labels))
        if seen == [5, 3, 4]:
            raise KeyboardInterrupt
        return whole(net, split, *rest)

    monkeypatch.setattr(features, "_features", until_the_test_split)
    settings: dict[str, Any] = {"size": 32, "device": "cpu", "progress": False, "name": "some"}
    with pytest.raises(KeyboardInterrupt):
        features.extract("pictures", "mobilenet_v2", str(path), **settings)
    features.extract("pictures", "mobilenet_v2", str(path), **settings)
    assert seen == [5, 3, 4, 4]
    assert data.load({"name": "features", "set": "some"}).train.inputs.shape == (8, 1280)


@pytest.mark.usefixtures("_pictures")
def test_features_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mobile.pt"
    _network(path)
    command = ["features", "pictures", "--weights", str(path), "--size", "32", "--device", "cpu", "--name", "mine"]
    assert main(command) == 0
    assert "data: {name: features, set: mine}" in capsys.readouterr().out
    assert main(["features", "nothing", "--weights", str(path)]) == 2
    assert "nothing is not in the cache" in capsys.readouterr().err
    assert main(["features", "pictures", "--weights", "ALL"]) == 2
    assert "weights of mobilenet_v2 (no file of that name) is unknown: 'ALL'" in capsys.readouterr().err


def test_real_weights_fit() -> None:
    path = WEIGHTS / "mobilenet_v2_features.pt"
    if not path.exists():
        pytest.skip(f"no pretrained weights at {path}")
    net = features.backbone("mobilenet_v2", models.load_state(path))
    with torch.no_grad():
        found = net(torch.zeros(1, 3, 64, 64))
    assert found.shape == (1, 1280)
    assert 0 < found.mean() < 6  # pooled outputs of a rectifier that ends at 6
