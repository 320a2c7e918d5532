"""`python -m topk.lab data`: import, download, export and list what the cache holds.

python -m topk.lab data import PATH [--parts train-0 test] [--name NAME] [--size 64 | --stream]
python -m topk.lab data download cifar100
python -m topk.lab data export NAME FOLDER [--parts ...]
python -m topk.lab data list [--verify]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from topk.lab import cache, packed, sources
from topk.lab.cache import Entry
from topk.lab.filling import export, fill
from topk.lab.packed import PackedError, Source, split_of


def add_arguments(subparsers: Any) -> None:
    """Adds the command `data` to `python -m topk.lab`."""
    parser = subparsers.add_parser("data", help="fill, list, import and export the packed cache")
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    fetch = commands.add_parser("import", help="from a packed folder, torchvision's files or a tree of images")
    fetch.add_argument("path", type=Path, help="the folder of one data set")
    fetch.add_argument("--parts", nargs="+", metavar="PART", help="only these, such as train-0 and test")
    fetch.add_argument("--name", help="the set's name in the cache, if not the folder's")
    fetch.add_argument("--replace", action="store_true", help="forget what the cache has under this name")
    how = fetch.add_mutually_exclusive_group()
    how.add_argument("--size", type=int, default=64, help="trees: side of the stored images (default: 64)")
    how.add_argument("--stream", action="store_true", help="trees: store paths and leave the images where they are")
    fetch.set_defaults(run=_import)
    download = commands.add_parser("download", help="from the public source, through torchvision")
    download.add_argument("name", choices=["cifar100"])
    download.set_defaults(run=_download)
    carry = commands.add_parser("export", help="as a packed folder, to carry to another machine")
    carry.add_argument("name")
    carry.add_argument("path", type=Path, help="a new or empty folder")
    carry.add_argument("--parts", nargs="+", metavar="PART")
    carry.set_defaults(run=_export)
    show = commands.add_parser("list", help="what is in the cache")
    show.add_argument("--verify", action="store_true", help="read everything and compare checksums")
    show.set_defaults(run=_list)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _import(chosen: argparse.Namespace) -> int:
    source, root = _source(chosen)
    entry = fill(source, replace=chosen.replace, root=root, say=_say)
    print(_line(entry))
    return 0


def _source(chosen: argparse.Namespace) -> tuple[Source, Path | None]:
    """What kind of folder it is, and what is in it."""
    path: Path = chosen.path
    if not path.is_dir():
        raise PackedError(f"{path} is no folder")
    name = cache.check_name(chosen.name) if chosen.name else None
    for part in chosen.parts or ():
        split_of(part)
    if packed.looks_packed(path):
        return packed.read(path, name=name, parts=chosen.parts), None
    if (path / "cifar-100-python").is_dir():
        return sources.cifar100(path, parts=chosen.parts), None
    if (path / "train").is_dir():
        if chosen.parts:
            raise ValueError("--parts is for packed data sets; a tree of images is taken whole")
        root = path if chosen.stream else None
        return sources.tree(path, name or path.resolve().name.lower(), None if chosen.stream else chosen.size), root
    inside = sorted(item.name for item in path.iterdir() if item.is_dir() and packed.looks_packed(item))
    hint = f"; there are data sets in it: {', '.join(inside)}" if inside else ""
    raise PackedError(f"{path} must be the folder of one data set (packed, torchvision's, or a tree of images){hint}")


def _download(chosen: argparse.Namespace) -> int:
    cache.folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache.folder()) as folder:
        entry = fill(sources.cifar100(Path(folder), download=True), say=_say)
    print(_line(entry))
    return 0


def _export(chosen: argparse.Namespace) -> int:
    export(chosen.name, chosen.path, chosen.parts)
    print(f"{chosen.name} written to {chosen.path}")
    return 0


def _list(chosen: argparse.Namespace) -> int:
    print(f"{cache.folder()}")
    for name in cache.names():
        entry = cache.read(name)
        if entry is not None:
            if chosen.verify:
                entry.verify()
            print(_line(entry) + (", checksums right" if chosen.verify else ""))
    return 0


def _line(entry: Entry) -> str:
    texts = []
    for split, parts in entry.about["parts"].items():
        missing = sorted(set(entry.about["all_parts"].get(split, ())) - {part["name"] for part in parts})
        rows = f"{split} {sum(part['rows'] for part in parts)} rows"
        texts.append(f"{rows}, lacking {', '.join(missing)}" if missing else rows)
    size = sum(np.prod(item.shape) * np.dtype(item.dtype).itemsize for item in entry.arrays.values())
    kind, classes = entry.about["kind"], len(entry.about["classes"])
    return f"{entry.name}: {kind}, {classes} classes, {'; '.join(texts)}; {size / 1e6:.0f} MB"
