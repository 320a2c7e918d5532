"""Filling the cache from a source and writing it out again, with every check on the way (chapter 14)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topk.lab import cache, packed
from topk.lab.cache import CacheError, Entry
from topk.lab.known import KNOWN, Known
from topk.lab.packed import PackedError, Part, Source, in_order, split_of

__all__ = ["export", "fill", "store"]

# ImageNet's, which everybody uses for images that are never seen all at once.
_USUAL_MEAN, _USUAL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fill(
    source: Source,
    *,
    replace: bool = False,
    root: Path | None = None,
    origin: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Entry:
    """Puts the parts of `source` into the cache, beside the parts that are there already.

    Everything is checked on the way (digests and channel means of known sets, sizes, labels); on any error the cache
    is as it was.

    Args:
        source: what `topk.lab.packed.read` or `topk.lab.sources` gave.
        replace: forget what the cache has of this set.
        root: the folder that holds the images, for sets whose paths are stored.
        origin: what the set was made from, kept in the manifest as it is.
        say: hears what is going on.
    """
    cache.check_name(source.name)
    kind = _kind_of(source.parts)
    facts = _facts(source, kind)
    with cache.filling(source.name, say=say) as filler:
        old = None if replace else cache.read(source.name)
        stored = _stored_parts(old) if old else {}
        if old is not None:
            _check_same_set(old, source, kind)
            new = [part for part in source.parts if part.name not in stored or not _same(part, stored[part.name], old)]
            if not new:
                say(f"{source.name}: {', '.join(part.name for part in source.parts)} already in the cache")
                return old
        parts = {**stored, **{part.name: part for part in source.parts}}
        about = _about(source, kind, facts, old)
        about["root"] = str(root.resolve()) if root is not None else None
        about["origin"] = dict(origin) if origin is not None else None
        for split in ("train", "test"):
            names = [name for name in in_order(list(parts)) if split_of(name) == split]
            about["parts"][split] = []
            if names:
                say(f"{source.name}: writing {split} ({', '.join(names)})")
                _write_split(filler, split, [parts[name] for name in names], about, facts)
            expected = about["all_parts"].get(split) or names
            about["complete"][split] = bool(names) and set(expected) <= set(names)
        if facts is not None:
            _check_means(source.name, about, facts)
        return filler.commit(about)


def _kind_of(parts: Sequence[Part]) -> str:
    shapes = {(part.shape[1:], part.dtype.str) for part in parts}
    if len(shapes) != 1:
        raise PackedError(f"all parts of a set must have rows of one shape and type, got {sorted(map(str, shapes))}")
    ((shape, dtype),) = shapes
    if len(shape) == 3 and dtype == "|u1" and shape[2] == 3:
        return "images"
    if len(shape) == 1 and dtype in ("<f4", "<f2"):
        return "features"
    if len(shape) == 0 and dtype.startswith("|S"):
        return "files"
    raise PackedError(
        f"rows must be uint8 images (height, width, 3), or features of type float32 or float16, got {dtype} {shape}"
    )


def _facts(source: Source, kind: str) -> Known | None:
    facts = KNOWN.get(source.name)
    if facts is None:
        return None
    if facts.classes_digest is not None and _digest_of_text(source.classes) != facts.classes_digest:
        return None  # another choice of classes under the same name
    if kind != "images" or (source.name == "cifar100" and source.superclasses is None):
        raise PackedError(f"{source.name} must have images and superclasses; use another --name for another set")
    return facts


def _digest_of_text(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _about(source: Source, kind: str, facts: Known | None, old: Entry | None) -> dict[str, Any]:
    groups = source.superclasses
    everything = (facts.parts if facts else {}) or source.all_parts or (old.about["all_parts"] if old else {})
    return {
        "kind": kind,
        "layout": source.layout,
        "classes": list(source.classes),
        "codes": list(source.codes),
        "superclasses": None if groups is None else {name: list(group) for name, group in groups.items()},
        "all_parts": {split: list(parts) for split, parts in everything.items()},
        "parts": {},
        "complete": {},
        "mean": list(_USUAL_MEAN) if kind == "files" else [],
        "std": list(_USUAL_STD) if kind == "files" else [],
    }


def _check_same_set(old: Entry, source: Source, kind: str) -> None:
    """Parts are only put beside parts of the same set."""
    first = old.arrays[next(key for key in old.arrays if key.endswith("-inputs"))]
    shape = source.parts[0].shape[1:]
    same = old.about["classes"] == list(source.classes) and old.about["kind"] == kind and first.shape[1:] == shape
    if not same:
        raise CacheError(
            f"the cache holds another set under the name {source.name} ({old.about['kind']} {first.shape[1:]}, "
            f"{len(old.about['classes'])} classes; this one: {kind} {shape}, {len(source.classes)} classes): give this "
            f"one another --name, or use --replace"
        )


def _same(new: Part, stored: Part, old: Entry) -> bool:
    digests = {item["name"]: item["digest"] for parts in old.about["parts"].values() for item in parts}
    if new.shape != stored.shape or new.dtype != stored.dtype or not np.array_equal(new.labels, stored.labels):
        return False
    return bool(digests[new.name] == (new.digest or _Digest(new).through()))


class _Digest:
    """The digest of a part whose rows are the reference: of its labels, and of its rows as they pass."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._hash = hashlib.sha256(part.labels.astype("<i8").tobytes())
        self._hash.update(f"{part.dtype.str}{part.shape}".encode())

    def blocks(self) -> Iterator[np.ndarray]:
        for block in self.part.blocks():
            self._hash.update(np.ascontiguousarray(block).data)
            yield block

    def through(self) -> str:
        for _ in self.blocks():
            pass
        return self.value()

    def value(self) -> str:
        return self.part.digest or self._hash.hexdigest()


def _write_split(
    filler: cache.Filling, split: str, parts: Sequence[Part], about: dict[str, Any], facts: Known | None
) -> None:
    digests = [_Digest(part) for part in parts]
    levels = np.zeros((3, 256), dtype=np.int64)

    def blocks() -> Iterator[np.ndarray]:
        for digest in digests:
            for block in digest.blocks():
                if about["kind"] == "images" and split == "train":
                    for channel in range(3):
                        levels[channel] += np.bincount(block[..., channel].reshape(-1), minlength=256)
                yield block

    rows = sum(len(part.labels) for part in parts)
    filler.write(f"{split}-inputs", (rows, *parts[0].shape[1:]), parts[0].dtype, blocks())
    for digest in digests:
        name, value = digest.part.name, digest.value()
        if facts is not None and facts.digests.get(name, value) != value:
            raise CacheError(
                f"{filler.name}: {name} has the digest {value}, expected {facts.digests[name]}: wrong data"
            )
        about["parts"][split].append({"name": name, "rows": len(digest.part.labels), "digest": value})
    _write_whole(filler, f"{split}-labels", np.concatenate([part.labels for part in parts]))
    encoded = [part.encoded for part in parts if part.encoded is not None]
    if len(encoded) == len(parts):
        starts = np.cumsum([0] + [len(content) for content, _ in encoded])
        pieces = [offsets[:-1] + start for (_, offsets), start in zip(encoded, starts, strict=False)]
        _write_whole(filler, f"{split}-offsets", np.concatenate([*pieces, starts[-1:]]))
        size = (int(starts[-1]),)
        filler.write(f"{split}-jpegs", size, np.dtype(np.uint8), (content for content, _ in encoded))
    if levels.any():
        about["mean"], about["std"] = _moments(levels)


def _write_whole(filler: cache.Filling, key: str, array: np.ndarray) -> None:
    filler.write(key, array.shape, array.dtype, [array])


def _moments(levels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel from exact counts of its 256 values, on the scale 0 to 1."""
    values, total = np.arange(256), levels.sum(axis=1)
    mean = levels @ values / total
    variance = (levels * (values - mean[:, None]) ** 2).sum(axis=1) / total
    return [round(float(x) / 255, 5) for x in mean], [round(max(float(x), 1e-6) ** 0.5 / 255, 5) for x in variance]


def _check_means(name: str, about: dict[str, Any], facts: Known) -> None:
    """With the training split complete its means must be the known ones; before that the known ones are used."""
    if about["complete"]["train"] and facts.mean:
        for what, found, known in (("means", about["mean"], facts.mean), ("deviations", about["std"], facts.std)):
            if np.abs(np.subtract(found, known)).max() > facts.tolerance:
                raise CacheError(f"{name}: the channels' {what} are {found}, expected {list(known)}: wrong data")
    if facts.mean:
        about["mean"], about["std"] = list(facts.mean), list(facts.std)


def _stored_parts(entry: Entry) -> dict[str, Part]:
    """The parts in the cache, as sources of themselves."""
    return {
        item["name"]: _stored_part(entry, split, index)
        for split, items in entry.about["parts"].items()
        for index, item in enumerate(items)
    }


def _stored_part(entry: Entry, split: str, index: int) -> Part:
    items = entry.about["parts"][split]
    start = sum(item["rows"] for item in items[:index])
    end = start + items[index]["rows"]
    inputs, labels = entry.array(f"{split}-inputs"), entry.array(f"{split}-labels")

    def blocks() -> Iterator[np.ndarray]:
        return cache.blocks_of(inputs[start:end])

    encoded = None
    if f"{split}-jpegs" in entry.arrays:
        offsets = np.array(entry.array(f"{split}-offsets")[start : end + 1])
        encoded = entry.array(f"{split}-jpegs")[offsets[0] : offsets[-1]], offsets - offsets[0]
    shape = (end - start, *inputs.shape[1:])
    digest = items[index]["digest"] if encoded else None
    return Part(items[index]["name"], shape, inputs.dtype, np.array(labels[start:end]), blocks, encoded, digest)


def store(
    name: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    classes: Sequence[str],
    *,
    superclasses: Mapping[str, Sequence[str]] | None = None,
    replace: bool = True,
    origin: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Entry:
    """Puts arrays into the cache, features for one, where `load({"name": "features", "set": name})` finds them.

    Args:
        name: the set's name.
        splits: for "train" and "test" (or for parts, "train-0" and so on) inputs, float32 or float16 (rows, features)
            or uint8 images, and integer labels.
        classes: the classes' names.
        superclasses: the classes of each superclass.
        replace: forget what was stored under this name; otherwise parts are put beside those that are there.
        origin: what the set was made from, kept in the manifest as it is.
        say: hears what is going on.
    """
    parts = []
    for part, (inputs, labels) in splits.items():
        split_of(part)
        labels = packed.checked_labels(f"{name}, {part}", labels, len(classes))
        if len(inputs) != len(labels):
            raise ValueError(f"{name}, {part}: {len(inputs)} inputs but {len(labels)} labels")
        parts.append(Part(part, inputs.shape, inputs.dtype, labels, packed.blocks_of(inputs)))
    source = Source(name, "arrays", tuple(classes), tuple(parts), superclasses)
    return fill(source, replace=replace, origin=origin, say=say)


def export(name: str, folder: Path, parts: Sequence[str] | None = None) -> None:
    """Writes a set of the cache as a packed folder (`topk.lab.packed`): in the layout in which it came.

    Args:
        name: the set.
        folder: where to; must be new or empty.
        parts: the parts wanted; None for all.
    """
    entry = cache.read(name)
    if entry is None:
        raise CacheError(f"{name} is not in the cache {cache.folder()}; it has {', '.join(cache.names()) or 'nothing'}")
    about = entry.about
    if about["kind"] == "files":
        raise CacheError(f"{name} is a list of image files in {about['root']}: copy that folder instead")
    stored = _stored_parts(entry)
    wanted = in_order(list(stored if parts is None else dict.fromkeys(parts)))
    missing = [part for part in wanted if part not in stored]
    if missing:
        raise CacheError(f"{name} has no parts {', '.join(missing)} in the cache; it has {', '.join(stored)}")
    source = Source(
        name,
        about["layout"],
        tuple(about["classes"]),
        tuple(stored[part] for part in wanted),
        about["superclasses"],
        tuple(about["codes"]),
        {split: tuple(names) for split, names in about["all_parts"].items()},
    )
    packed.write(source, folder)
