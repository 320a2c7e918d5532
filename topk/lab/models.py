"""The networks of the experiments, by name: small ones of our own, heads on frozen features, torchvision's and timm's.

Images enter as (rows, channels, height, width), features as (rows, features); scores leave as (rows, classes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from topk.lab.settings import check_name, completed

__all__ = [
    "CosineHead",
    "LinearHead",
    "SmallNet",
    "build",
    "complete",
    "load_body",
    "load_state",
    "parameters",
    "replace_head",
    "torchvision_state",
]

_IMAGE_HEAD = {"head": "linear", "scale": 1.0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "resnet18": {"stem": "cifar", **_IMAGE_HEAD},
    "small": {"width": 32, **_IMAGE_HEAD},
    "linear": {},
    "mlp": {"hidden": 512, "layers": 1, "dropout": 0.0, **_IMAGE_HEAD},
    "cosine": {"scale": 1.0},
    "torchvision/": {"weights": None, **_IMAGE_HEAD},
    "timm/": {"weights": None, **_IMAGE_HEAD},
}


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a model, defaults filled in; unknown names and keys are refused.

    ==================  ===========================================================================================
    "resnet18"          ResNet-18; stem="cifar" is one 3x3 convolution, "imagenet" the original 7x7 with pooling
    "small"             a residual net of seven convolutions for CPUs, about a sixth of ResNet-18's work; width=32
    "linear"            one linear layer on the features (or on the flattened image)
    "mlp"               `layers` hidden layers of `hidden` units, with `dropout`
    "cosine"            cosines between features and class weights, times `scale`
    "torchvision/name"  any classifier of torchvision; weights=None, the name of its published ones, or a local file
    "timm/name"         any classifier of timm; weights=None, "DEFAULT" or a local file
    ==================  ===========================================================================================

    All but "linear" and "cosine" take head="linear" or "cosine". LDAM and the imbalanced noised loss multiply the
    cosines by their own scale: keep the head's at 1 for them, and give it (say 30) for cross-entropy.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise ValueError(f"model must be a mapping with a name, got {settings!r}")
    name: str = settings["name"]
    family = name[: name.find("/") + 1] or name
    check_name("model.name", family, _DEFAULTS)
    full = completed("model", {"name": name, **_DEFAULTS[family]}, settings)
    check_name("model.head", full.get("head", "linear"), ("linear", "cosine"))
    if name == "resnet18":
        check_name("model.stem", full["stem"], ("cifar", "imagenet"))
    return full


def build(settings: Mapping[str, Any], classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """The model with freshly drawn weights, from torch's own generator.

    Args:
        settings: see `complete`.
        classes: the number of scores.
        input_shape: (height, width, channels) of an image, or (features,).
    """
    full = complete(settings)
    name = full["name"]
    features = 1
    for size in input_shape:
        features *= size
    if name == "linear":
        return nn.Sequential(nn.Flatten(), LinearHead(features, classes))
    if name == "cosine":
        return nn.Sequential(nn.Flatten(), CosineHead(features, classes, full["scale"]))
    if name == "mlp":
        return _perceptron(features, classes, full)
    if len(input_shape) != 3:
        raise ValueError(f"model {name!r} takes images (height, width, channels), got inputs of shape {input_shape}")
    if name == "small":
        return SmallNet(input_shape[2], full["width"], _head(8 * full["width"], classes, full))
    if name == "resnet18":
        return _resnet18(input_shape[2], classes, full)
    return _published(full, classes)


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class CosineHead(nn.Module):
    """Scores scale * cos(features, weight of the class)."""

    def __init__(self, features: int, classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.normal_(self.weight, std=features**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """(rows, features) to (rows, classes)."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.scale * F.linear(F.normalize(inputs.float()), F.normalize(self.weight))

    def extra_repr(self) -> str:
        """Sizes and scale."""
        return f"features={self.weight.shape[1]}, classes={self.weight.shape[0]}, scale={self.scale:g}"


class LinearHead(nn.Linear):
    """A linear layer whose scores are float32 under autocast too: bfloat16 would tie scores that are merely near."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(rows, features) to (rows, classes)."""
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(inputs.float(), self.weight, self.bias)


class SmallNet(nn.Module):
    """Seven convolutions, two of the stages residual; most work is done at a quarter of the resolution and below."""

    def __init__(self, channels: int, width: int, head: nn.Module) -> None:
        super().__init__()
        self.stem = _convolution(channels, width)
        self.stages = nn.Sequential(
            _convolution(width, 2 * width, stride=2),
            _Residual(2 * width),
            _convolution(2 * width, 4 * width, stride=2),
            _convolution(4 * width, 8 * width, stride=2),
            _Residual(8 * width),
        )
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """Images to scores."""
        scores: Tensor = self.head(self.stages(self.stem(inputs)).mean((2, 3)))
        return scores


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = inputs + self.body(inputs)
        return result


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _head(features: int, classes: int, full: Mapping[str, Any]) -> nn.Module:
    if full["head"] == "cosine":
        return CosineHead(features, classes, full["scale"])
    return LinearHead(features, classes)


def _perceptron(features: int, classes: int, full: Mapping[str, Any]) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(full["layers"]):
        layers += [nn.Linear(features, full["hidden"]), nn.ReLU(inplace=True)]
        if full["dropout"]:
            layers.append(nn.Dropout(full["dropout"]))
        features = full["hidden"]
    return nn.Sequential(*layers, _head(features, classes, full))


def _resnet18(channels: int, classes: int, full: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import resnet18  # type: ignore[import-untyped]

    net: nn.Module = resnet18(weights=None)
    if full["stem"] == "cifar" or channels != 3:
        size, stride, padding = (3, 1, 1) if full["stem"] == "cifar" else (7, 2, 3)
        net.conv1 = nn.Conv2d(channels, 64, size, stride, padding, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if full["stem"] == "cifar":
        net.maxpool = nn.Identity()
    net.fc = _head(512, classes, full)
    return net


# --- published architectures -----------------------------------------------------------------------------------------


def _published(full: Mapping[str, Any], classes: int) -> nn.Module:
    name: str = full["name"].partition("/")[2]
    net = (_torchvision if full["name"].startswith("torchvision/") else _timm)(name, full["weights"])
    replace_head(net, lambda features: _head(features, classes, full))
    return net


def _torchvision(name: str, weights: str | None) -> nn.Module:
    import torchvision  # type: ignore[import-untyped]

    check_name("model.name: torchvision's", name, torchvision.models.list_models(module=torchvision.models))
    net: nn.Module = torchvision.models.get_model(name, weights=None)
    if weights is not None:
        load_body(net, torchvision_state(name, weights))
    return net


def torchvision_state(name: str, weights: str) -> dict[str, Tensor]:
    """The weights of a torchvision model: a local file's, or the published ones of that name, downloaded once."""
    import torchvision

    if Path(weights).is_file():
        return load_state(Path(weights))
    published = torchvision.models.get_model_weights(name)
    check_name(f"weights of {name} (no file of that name)", weights, ["DEFAULT", *published.__members__])
    state: dict[str, Tensor] = published[weights].get_state_dict(progress=True, check_hash=True, weights_only=True)
    return state


def _timm(name: str, weights: str | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"model 'timm/{name}' needs the package timm: pip install timm") from error
    if not timm.is_model(name):
        check_name("model.name: timm's", name, timm.list_models())
    net: nn.Module = timm.create_model(name, pretrained=weights == "DEFAULT")
    if weights is not None and weights != "DEFAULT":
        load_body(net, load_state(Path(weights)))
    return net


def load_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, with nothing in it but tensors: code is never unpickled."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights must be a file with a state dict (names to tensors), got {path}")
    return dict(state)


def load_body(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads everything but the scores' layer; `state` may also be that of `net.features` alone."""
    head, _ = _last_linear(net)
    expected = {name for name in net.state_dict() if not name.startswith(f"{head}.")}
    body = {name: value for name, value in state.items() if not name.startswith(f"{head}.")}
    if hasattr(net, "features") and not any(name.startswith("features.") for name in body):
        body = {f"features.{name}": value for name, value in body.items()}
    missing = {name for name in expected - set(body) if not name.endswith("num_batches_tracked")}
    if missing or set(body) - expected:
        raise ValueError(
            f"weights do not fit {type(net).__name__}: it lacks {sorted(set(body) - expected)[:3]} of theirs, "
            f"they lack {sorted(missing)[:3]} of its {len(expected)} tensors"
        )
    net.load_state_dict(body, strict=False)


def replace_head(net: nn.Module, make: Callable[[int], nn.Module]) -> None:
    """Puts `make(features)` in the place of the last linear layer, the one that computes a classifier's scores."""
    name, layer = _last_linear(net)
    parent, _, place = name.rpartition(".")
    setattr(net.get_submodule(parent), place, make(layer.in_features))


def _last_linear(net: nn.Module) -> tuple[str, nn.Linear]:
    found = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError(f"model {type(net).__name__} has no linear layer whose scores another head could replace")
    return found[-1]
