"""Features of images from a frozen, pretrained network: extracted once, then heads train on them in seconds (ch. 18).

    python -m topk_lab features cifar100 --weights FILE --size 96 --components 256

Three kinds of set, each named after what made it, so that every record of a run on it tells images, network, size and
weights (the first digits of their hash):

    cifar100-mobilenet_v2-96px-bd2900e0f611            what enters the network's last linear layer
    cifar100-mobilenet_v2-96px-bd2900e0f611-pca256     its 256 principal components
    cifar100-mobilenet_v2-96px-bd2900e0f611-cut14      activations before block 14, for training the rest

A set carries its origin in full (about.json); a name whose origin is another is refused. An interrupted extraction
goes on with the next part.

With m the mean and C the covariance of the *training* rows, and v_1, v_2, ... the eigenvectors of C by falling
eigenvalue, the components of a row x are (v_j . (x - m)) / s. One number s for all keeps the geometry: it makes the
mean square of a training row's components 1. Of v_j and -v_j the one whose largest entry is positive is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from topk_lab import data
from topk_lab.data import Array, Parts, Split
from topk_lab.records import save_array, write_whole

WEIGHTS = "weights.pt"
"""Beside activations, the weights of the network that made them: a run trains on from there."""
VERSION = 1
"""Part of every set's origin: a change of what is computed needs another."""
_ROWS = 8192  # at a time, for the components


def extract(
    images: str,
    network: str = "mobilenet_v2",
    weights: str = "DEFAULT",
    *,
    size: int = 96,
    components: int | None = None,
    cut: int | None = None,
    batch: int = 64,
    device: str | None = None,
    progress: bool = True,
) -> str:
    """Extracts what is not there yet; returns the name of the set, for {"name": "features", "set": ...}.

    Args:
        images: "cifar100" or "imagenet64".
        network: a torchvision classifier.
        weights: a file with its state dict (or with that of its `features` alone), or the name of published weights.
        size: the side in pixels to which images are scaled.
        components: how many principal components to keep; None: the features themselves.
        cut: stop before this block of the network's `features`; None: before its last linear layer.
        batch: images at a time.
        device: None: a GPU if there is one.
        progress: whether to show a bar with the time left.
    """
    if components is not None and cut is not None:
        raise ValueError(f"components are of pooled features: give components or cut, got {components} and {cut}")
    state, found = state_of(network, weights), data.images(images)
    print_of_weights = digest(state)
    name = f"{images}-{network}-{size}px-{print_of_weights[:12]}" + ("" if cut is None else f"-cut{cut}")
    origin = {
        "images": found.digests,
        "network": network,
        "weights": print_of_weights,
        "size": size,
        "version": VERSION,
    }
    origin |= {} if cut is None else {"cut": cut}
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net = backbone(network, state, cut).to(place).to(memory_format=torch.channels_last)

    def rows(part: str) -> Array:
        bar = f"{name}, {part}" if progress else None
        return _activations(net, found.parts[part], size, batch, place, bar, half=cut is not None)

    if cut is not None:
        write_whole(data.feature_folder(name) / WEIGHTS, lambda file: torch.save(state, file))
    _store(name, found, origin, rows)
    return name if components is None else reduce(name, components)


def reduce(name: str, count: int) -> str:
    """The principal components of a set, stored as a set of their own."""
    found = data.feature_set(name)
    weights = found.about["weights"]
    origin = {"features": found.digests, "weights": weights, "components": count, "version": VERSION}

    @cache
    def fit() -> tuple[Array, Array]:
        return fitted(np.concatenate([x.inputs for part, x in found.parts.items() if part.startswith("train")]), count)

    def rows(part: str) -> Array:
        (mean, directions), inputs = fit(), found.parts[part].inputs
        blocks = [(inputs[start : start + _ROWS] - mean) @ directions for start in range(0, len(inputs), _ROWS)]
        return np.concatenate(blocks).astype(np.float32)

    _store(f"{name}-pca{count}", found, origin, rows)
    return f"{name}-pca{count}"


def fitted(inputs: Array, count: int) -> tuple[Array, Array]:
    """The mean (features,) and the scaled directions (features, count), in float64."""
    if count > inputs.shape[1]:
        raise ValueError(f"components must be at most the {inputs.shape[1]} features, got {count}")
    mean: Array = np.asarray(inputs.mean(0, dtype=np.float64))
    covariance = np.zeros((inputs.shape[1],) * 2)
    for start in range(0, len(inputs), _ROWS):
        centred = inputs[start : start + _ROWS] - mean
        covariance += centred.T @ centred
    covariance /= len(inputs)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(count)])
    return mean, vectors * signs / np.sqrt(values.mean())


def _store(name: str, found: Parts, origin: Mapping[str, Any], rows: Callable[[str], Array]) -> None:
    """Writes the parts that are not there, then about.json, without which there is no set."""
    folder = data.feature_folder(name)
    about = {"origin": origin, "classes": found.classes, "superclasses": found.superclasses, "parts": list(found.parts)}
    text = json.dumps(about, sort_keys=True, indent=1)
    for stated in (folder / "about.json", folder / "started.json"):
        if stated.is_file() and stated.read_text(encoding="utf-8") != text:
            raise ValueError(f"{folder} holds another set under this name: move it away")
    write_whole(folder / "started.json", lambda file: file.write(text.encode()))
    for part, split in found.parts.items():
        if not (folder / f"{part}.inputs.npy").is_file():
            save_array(folder / f"{part}.labels.npy", split.labels)
            save_array(folder / f"{part}.inputs.npy", rows(part))
    write_whole(folder / "about.json", lambda file: file.write(text.encode()))


# --- the network ---


def state_of(network: str, weights: str) -> dict[str, Tensor]:
    """The weights of a torchvision model: a local file's, or the published ones of that name, downloaded once."""
    import torchvision

    if Path(weights).is_file():
        found: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
        return found
    published = torchvision.models.get_model_weights(network)
    if weights != "DEFAULT" and weights not in published.__members__:
        raise ValueError(f"weights must be a file or one of {', '.join(published.__members__)}, got {weights!r}")
    state: dict[str, Tensor] = published[weights].get_state_dict(progress=True, check_hash=True, weights_only=True)
    return state


def digest(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and elements, whatever file they came from."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def backbone(network: str, state: Mapping[str, Tensor], cut: int | None = None) -> nn.Module:
    """The network with these weights, in evaluation mode, up to its last linear layer or before block `cut`."""
    net: Any = loaded(network, state)
    if cut is not None:
        net = net.features[:cut]
    else:
        parent, _, last = _last_linear(net).rpartition(".")
        setattr(net.get_submodule(parent), last, nn.Identity())
    found: nn.Module = net.eval().requires_grad_(False)
    return found


def loaded(network: str, state: Mapping[str, Tensor]) -> nn.Module:
    """The network with these weights; its last linear layer keeps random ones where the state has none for it."""
    import torchvision

    net: nn.Module = torchvision.models.get_model(network, weights=None)
    if not any(name.startswith("features.") for name in state) and hasattr(net, "features"):
        state = {f"features.{name}": value for name, value in state.items()}
    missing, unknown = net.load_state_dict(dict(state), strict=False)
    missing = [x for x in missing if not x.startswith(_last_linear(net)) and not x.endswith("num_batches_tracked")]
    if missing or unknown:
        raise ValueError(f"weights do not fit {network}: missing {missing[:3]}, unknown {unknown[:3]}")
    return net


def _last_linear(net: nn.Module) -> str:
    return str([name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)][-1])


@torch.inference_mode()
def _activations(
    net: nn.Module, split: Split, size: int, batch: int, device: torch.device, title: str | None, *, half: bool
) -> Array:
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    scale, shift = (x.float().to(device)[:, None, None] for x in (1 / (255 * std), -mean / std))
    found = []
    for start in tqdm(range(0, len(split), batch), desc=title, unit="batch", disable=title is None):
        planes = torch.from_numpy(np.array(split.inputs[start : start + batch])).to(device).permute(0, 3, 1, 2)
        planes = planes.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)
        if planes.shape[-2:] != (size, size):
            planes = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
        rows = net(planes.contiguous(memory_format=torch.channels_last))
        found.append((rows.half() if half else rows.flatten(1).float()).cpu().contiguous().numpy())
    return np.concatenate(found)
