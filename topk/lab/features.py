"""Features of images from a frozen, pretrained network: extracted once, then heads train on them in seconds (ch. 18).

    python -m topk.lab features imagenet64 --network mobilenet_v2 --weights FILE --size 128

The features are those that enter the network's last linear layer. They become a set of the cache, named after the
images, the network, the size and the first digits of the weights' hash, so that every record of a run on them tells
the weights: {"name": "features", "set": "imagenet64-mobilenet_v2-128px-..."}. The full hash is in the set's manifest.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from topk.arguments import check_count
from topk.lab import cache, models, sample
from topk.lab.cache import CacheError, Entry
from topk.lab.settings import check_name

if TYPE_CHECKING:
    from topk.lab.data import DataSet, Split

__all__ = ["add_arguments", "backbone", "digest", "extract", "pretrained"]

VERSION = 1
"""Part of every set's origin: a change of what is computed needs another."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, which torchvision's weights expect."""


def extract(
    images: str,
    network: str = "mobilenet_v2",
    weights: str = "DEFAULT",
    *,
    size: int = 128,
    name: str | None = None,
    batch: int = 64,
    device: str | None = None,
    progress: bool = True,
) -> str:
    """Extracts the features of a set of images, or finds them in the cache; returns the name they are stored under.

    Each part of the set is stored as soon as it is done, so an interrupted extraction goes on with the next part.

    Args:
        images: "cifar100", "imagenet64", or the name under which an image folder was imported.
        network: the name of a torchvision classifier.
        weights: a local file with its state dict (or with that of its `features` alone), or the name of torchvision's
            published weights, which are downloaded.
        size: the side in pixels to which images are scaled.
        name: what to store them under; None: made of all of the above.
        batch: images at a time.
        device: "cpu", "cuda", ...; None: a GPU if there is one.
        progress: whether to show a bar with the time left.
    """
    from topk.lab import data
    from topk.lab.filling import store

    check_count("size", size)
    state = models.torchvision_state(network, weights)
    known = images if images in ("cifar100", "imagenet64") else "imagefolder"
    found = data.load({"name": known} | ({"set": images, "size": size} if known == "imagefolder" else {}))
    origin: dict[str, Any] = {
        "images": found.fingerprint,
        "network": network,
        "weights": digest(state),
        "size": size,
        "version": VERSION,
    }
    name = name or f"{images}-{network}-{size}px-{origin['weights'][:12]}".lower()
    done = _parts_done(name, origin)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net = backbone(network, state).to(place).to(memory_format=torch.channels_last)
    for part, split in _parts(found, images).items():
        if part in done:
            continue
        rows = _features(net, split, size, batch, place, f"{name}, {part}" if progress else None)
        store(
            name, {part: (rows, split.labels)}, found.classes, superclasses=_superclasses(images), replace=not done,
            origin=origin,
        )  # fmt: skip
        done.add(part)
    return name


def backbone(network: str, state: Mapping[str, Tensor]) -> nn.Module:
    """A torchvision classifier with these weights that ends before its last linear layer; in evaluation mode."""
    import torchvision  # type: ignore[import-untyped]

    check_name("network", network, torchvision.models.list_models(module=torchvision.models))
    net: nn.Module = torchvision.models.get_model(network, weights=None)
    models.load_body(net, state)
    models.replace_head(net, lambda features: nn.Identity())
    return net.eval().requires_grad_(False)


def digest(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and elements, whatever file they came from."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def pretrained(config: Mapping[str, Any]) -> str | None:
    """The hash of the pretrained weights in a completed configuration: of its features or of its torchvision model."""
    settings, model = config["data"], config["model"]
    if settings["name"] == "features":
        entry = cache.read(settings["set"])
        origin = entry.about.get("origin") if entry is not None else None
        return origin["weights"] if origin else None
    if settings["name"] == "sample":
        return str(sample.read().about["origin"]["weights"])
    if model["name"].startswith("torchvision/") and model["weights"] is not None:
        return digest(models.torchvision_state(model["name"].partition("/")[2], model["weights"]))
    return None


def _parts_done(name: str, origin: Mapping[str, Any]) -> set[str]:
    entry = cache.read(name)
    if entry is None:
        return set()
    if entry.about.get("origin") != origin:
        raise CacheError(f"the cache holds another set under the name {name}: give this one another --name")
    return {part["name"] for parts in entry.about["parts"].values() for part in parts}


def _parts(found: DataSet, images: str) -> dict[str, Split]:
    """The parts in which the images are stored, so that what can be chosen of them can be chosen of their features."""
    parts: dict[str, Split] = {}
    for name, split in (("train", found.train), ("test", found.test)):
        start = 0
        for part in _entry(images).about["parts"][name]:
            end = start + part["rows"]
            parts[part["name"]] = replace(split, inputs=_rows(split, start, end), labels=split.labels[start:end])
            start = end
    return parts


def _rows(split: Split, start: int, end: int) -> Any:
    inputs = split.inputs
    return inputs[start:end] if isinstance(inputs, np.ndarray) else replace(inputs, paths=inputs.paths[start:end])


def _entry(images: str) -> Entry:
    entry = cache.read(images)
    if entry is None:
        raise CacheError(f"{images} is not in the cache {cache.folder()}")
    return entry


def _superclasses(images: str) -> Mapping[str, list[str]] | None:
    groups: Mapping[str, list[str]] | None = _entry(images).about["superclasses"]
    return groups


@torch.inference_mode()
def _features(
    net: nn.Module, split: Split, size: int, batch: int, device: torch.device, title: str | None
) -> np.ndarray[Any, np.dtype[np.float32]]:
    found: np.ndarray[Any, np.dtype[np.float32]] | None = None
    bar = tqdm(total=len(split.labels), desc=title, unit="image", disable=title is None)
    end = 0
    with bar:
        for planes in _scaled(split, size, batch, device):
            rows = net(planes).flatten(1).float().cpu().numpy()
            if found is None:
                found = np.empty((len(split.labels), rows.shape[1]), dtype=np.float32)
            found[end : end + len(rows)] = rows
            end += len(rows)
            bar.update(len(rows))
    if found is None:
        raise ValueError("images must have at least one row, got none")
    return found


def _scaled(split: Split, size: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    from topk.lab.streaming import batches_of

    for planes, _ in batches_of(split, batch, mean=MEAN, std=STD, device=device, channels_last=True):
        if planes.shape[-2:] != (size, size):
            planes = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
        yield planes.contiguous(memory_format=torch.channels_last)


# --- the command -----------------------------------------------------------------------------------------------------


def add_arguments(subparsers: Any) -> None:
    """Adds the command `features` to `python -m topk.lab`."""
    parser = subparsers.add_parser("features", help="extract frozen features", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "images", help="a set of images in the cache: cifar100, imagenet64, or an imported folder's name"
    )
    parser.add_argument("--network", default="mobilenet_v2", help="torchvision's name of it (mobilenet_v2)")
    parser.add_argument("--weights", default="DEFAULT", help="a local file, or the name of torchvision's (DEFAULT)")
    parser.add_argument("--size", type=int, default=128, help="pixels a side that images are scaled to (128)")
    parser.add_argument("--name", help="what to store the features under")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (64)")
    parser.add_argument("--device", help="cpu, cuda, ...; a GPU if there is one")
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> None:
    name = extract(
        arguments.images, arguments.network, arguments.weights, size=arguments.size, name=arguments.name,
        batch=arguments.batch, device=arguments.device,
    )  # fmt: skip
    print(f"in the cache as {name}; in a configuration: data: {{name: features, set: {name}}}")
