"""The networks of the experiments, by name (chapters 14, 18): heads on frozen features, ResNet-18, a net that learns
fast, the last blocks of a pretrained one, and a next-word model.

Images enter as (rows, channels, height, width), features as (rows, features), words as token numbers (rows, context);
scores leave as (rows, classes). LDAM and the imbalanced noised loss multiply cosines by their own scale: keep the
head's at 1 for them, and give it (say 30) for cross-entropy.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from topk_lab.data import Strict

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Linear(Strict):
    """One linear layer on the features."""

    name: Literal["linear"]


class Cosine(Strict):
    """Cosines between features and class weights, times `scale`."""

    name: Literal["cosine"]
    scale: Positive = 1.0


class WithHead(Strict):
    """A net whose scores are linear in its last features, or cosines times `scale`."""

    head: Literal["linear", "cosine"] = "linear"
    scale: Positive = 1.0


class Mlp(WithHead):
    """`layers` hidden layers of `hidden` rectified units."""

    name: Literal["mlp"]
    hidden: Count = 512
    layers: Count = 1
    dropout: Share = 0.0


class ResNet18(WithHead):
    """torchvision's, its first layer one 3 x 3 convolution without pooling, as is usual for small images."""

    name: Literal["resnet18"]


class Fast(WithHead):
    """A net that learns fast (`FastNet`), of three widths."""

    name: Literal["fast"]
    width: Literal["quarter", "half", "full"] = "quarter"


class LastBlocks(WithHead):
    """What comes after the cut of a set of cached activations (`topk_lab.features`), pretrained, and a new head."""

    name: Literal["last_blocks"]
    dropout: Share = 0.0


class NextWord(WithHead):
    """Embedded tokens, joined, then one layer of `hidden` units, then a score for every word."""

    name: Literal["next_word"]
    embedding: Count = 48
    hidden: Count = 16


Model = Annotated[Linear | Cosine | Mlp | ResNet18 | Fast | LastBlocks | NextWord, Field(discriminator="name")]
_WIDTHS = {"quarter": (24, 64, 96), "half": (48, 128, 192), "full": (64, 256, 256)}


def build(settings: Any, classes: int, inputs: Tensor, about: Any = None) -> nn.Module:
    """The model with freshly drawn weights, from torch's own generator.

    Args:
        settings: one of `Model`.
        classes: the number of scores.
        inputs: some rows of the training split as the model will see them, (rows, ...).
        about: the origin of a set of features, and the `vocabulary` of words.
    """
    match settings:
        case Linear() | Cosine():
            return nn.Sequential(nn.Flatten(), _head(inputs[0].numel(), classes, settings))
        case Mlp():
            return _perceptron(inputs[0].numel(), classes, settings)
        case ResNet18():
            return _resnet18(inputs.shape[1], classes, settings)
        case Fast():
            return FastNet(inputs, _WIDTHS[settings.width], lambda width: _head(width, classes, settings))
        case LastBlocks():
            return _last_blocks(classes, settings, about)
        case _:
            return NextWordNet(about["vocabulary"] + 2, inputs.shape[1], settings, classes)


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class LinearHead(nn.Linear):
    """A linear layer whose scores are float32 under autocast too: bfloat16 would tie scores that are merely near."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(rows, features) to (rows, classes)."""
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(inputs.float(), self.weight, self.bias)


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


def _head(features: int, classes: int, settings: Any) -> nn.Module:
    if "cosine" in (settings.name, getattr(settings, "head", None)):
        return CosineHead(features, classes, settings.scale)
    return LinearHead(features, classes)


def _perceptron(features: int, classes: int, settings: Mlp) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(settings.layers):
        layers += [nn.Linear(features, settings.hidden), nn.ReLU(inplace=True)]
        if settings.dropout:
            layers.append(nn.Dropout(settings.dropout))
        features = settings.hidden
    return nn.Sequential(*layers, _head(features, classes, settings))


def _resnet18(channels: int, classes: int, settings: ResNet18) -> nn.Module:
    from torchvision.models import resnet18

    net: nn.Module = resnet18(weights=None)
    net.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    net.fc = _head(512, classes, settings)
    return net


# --- a net that learns fast ---


class FastNet(nn.Module):
    """After the speed-run recipes for CIFAR-10 (Page 2018, Jordan 2024): the first filters whiten 2 x 2 patches, with
    both signs, and stay as they are; then three stages of two convolutions, each pooled early; the largest value of
    every channel goes to the head.
    """

    def __init__(self, inputs: Tensor, widths: tuple[int, ...], head: Any) -> None:
        super().__init__()
        filters = whitening(inputs)
        self.register_buffer("filters", torch.cat([filters, -filters]))
        self.shift = nn.Parameter(torch.zeros(2 * len(filters)))
        pairs = itertools.pairwise((2 * len(filters), *widths))
        self.stages = nn.Sequential(*(_stage(before, after) for before, after in pairs))
        self.head = head(widths[-1])

    filters: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (rows, channels, height, width) to scores."""
        planes = self.stages(F.gelu(F.conv2d(inputs, self.filters, self.shift)))
        scores: Tensor = self.head(planes.amax((2, 3)))
        return scores


def whitening(inputs: Tensor) -> Tensor:
    """Filters (channels * 4, channels, 2, 2) that make the 2 x 2 patches of the images uncorrelated, of variance 1."""
    channels = inputs.shape[1]
    patches = inputs.float().unfold(2, 2, 1).unfold(3, 2, 1)  # (rows, channels, h - 1, w - 1, 2, 2)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * 4)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    scaled: Tensor = vectors / torch.sqrt(values + 5e-4)  # tiny eigenvalues are noise: not blown up
    return scaled.T.reshape(-1, channels, 2, 2)


def _stage(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(after),
        nn.GELU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.GELU(),
    )


# --- the last blocks, and words ---


def _last_blocks(classes: int, settings: LastBlocks, about: Any) -> nn.Module:
    from topk_lab import features

    if not about or "cut" not in about:
        raise ValueError("model last_blocks needs a set of activations, one that was extracted with a cut")
    state = features.state_of(about["network"], str(about["folder"] / features.WEIGHTS))
    blocks: Any = features.loaded(about["network"], state).features
    rest = blocks[about["cut"] :]
    width = [layer for layer in rest.modules() if isinstance(layer, nn.Conv2d)][-1].out_channels
    dropout = [nn.Dropout(settings.dropout)] if settings.dropout else []
    return nn.Sequential(rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *dropout, _head(width, classes, settings))


class NextWordNet(nn.Module):
    """Bengio et al. (2003) without the direct connections."""

    def __init__(self, tokens: int, context: int, settings: NextWord, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, settings.embedding)
        self.hidden = nn.Linear(context * settings.embedding, settings.hidden)
        self.head = _head(settings.hidden, classes, settings)

    def forward(self, inputs: Tensor) -> Tensor:
        """Token numbers (rows, context) to scores."""
        scores: Tensor = self.head(torch.tanh(self.hidden(self.embedding(inputs).flatten(1))))
        return scores
