"""The command: `python -m topk_lab sweep|gather|check|reproduce|data|features`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from topk_lab import data, features, losses, records, sweep


def main(arguments: list[str] | None = None) -> int:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="python -m topk_lab", description="The experiments of the book.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    part = commands.add_parser("sweep", help="run what a sweep file asks for and has no record yet")
    part.add_argument("file", type=Path, help="CHAPTER.yml or CHAPTER.NAME.yml")
    part.add_argument("--profile", choices=sweep.PROFILES, default="full")
    part.add_argument("--engine", choices=("local", "ray"), default="local")
    part.add_argument("--jobs", type=int, help="runs at a time (one a core; on a GPU one)")
    part.add_argument("--dry-run", action="store_true", help="only tell what would run")
    part.set_defaults(run=_sweep)
    part = commands.add_parser("gather", help="fold finished runs into the chapter's table")
    part.add_argument("chapter")
    part.set_defaults(run=_gather)
    part = commands.add_parser("check", help="list records whose loss is computed otherwise today")
    part.add_argument("chapters", nargs="*")
    part.set_defaults(run=_check)
    part = commands.add_parser("reproduce", help="run one record again and compare")
    part.add_argument("chapter")
    part.add_argument("key", help="the first digits of the record's key")
    part.add_argument("--tolerance", type=float, help="for records with fewer than three seeds, made elsewhere")
    part.set_defaults(run=_reproduce)
    part = commands.add_parser("data", help="find, or download, a data set and tell what it holds")
    part.add_argument("name", choices=("cifar100", "imagenet64"))
    part.set_defaults(run=_data)
    part = commands.add_parser("features", help="extract frozen features or activations")
    part.add_argument("images", choices=("cifar100", "imagenet64"))
    part.add_argument("--network", default="mobilenet_v2", help="a torchvision classifier (mobilenet_v2)")
    part.add_argument("--weights", default="DEFAULT", help="a file, or the name of torchvision's (DEFAULT)")
    part.add_argument("--size", type=int, default=96, help="pixels a side that images are scaled to (96)")
    part.add_argument("--components", type=int, help="keep so many principal components")
    part.add_argument("--cut", type=int, help="keep the activations before this block, to train the rest")
    part.add_argument("--device")
    part.set_defaults(run=_features)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1


def _sweep(chosen: argparse.Namespace) -> int:
    found, chapter = sweep.read(chosen.file), chosen.file.name.split(".")[0]
    sized = {name: it.at(chosen.profile) for name, it in found.items()}
    for item in sweep.pending(sized, sweep.known(chapter)):
        print(f"{item['sweep']}: {item['runs']} runs, {item['recorded']} have a record")
    if not chosen.dry_run:
        how = {"profile": chosen.profile, "engine": chosen.engine, "jobs": chosen.jobs}
        frame = sweep.records_of(chapter, found, records="run", **how)
        print(f"{len(frame)} runs have their records; python -m topk_lab gather {chapter} puts new ones into the table")
    return 0


def _gather(chosen: argparse.Namespace) -> int:
    path, new = sweep.gather(chosen.chapter, sweep.files_of(chosen.chapter))
    print(f"{path}: {new} new records")
    return 0


def _check(chosen: argparse.Namespace) -> int:
    wrong = 0
    for chapter in chosen.chapters or records.chapters():
        frame = records.load(chapter)
        found = losses.stale(frame)
        wrong += len(found)
        print(f"{chapter}: {len(frame)} records, {len(found)} stale")
        print("".join(f"  {key}: {why}\n" for key, why in found.items()), end="")
    return 1 if wrong else 0


def _reproduce(chosen: argparse.Namespace) -> int:
    compared = sweep.reproduce(chosen.chapter, chosen.key, chosen.tolerance)
    print(compared.to_string(index=False))
    print(f"{compared['holds'].sum()} of {len(compared)} metrics reproduced")
    return 0 if compared["holds"].all() else 1


def _data(chosen: argparse.Namespace) -> int:
    found = data.images(chosen.name)
    parts = ", ".join(f"{name} {len(split):,}" for name, split in found.parts.items())
    print(f"{chosen.name}: {len(found.classes)} classes; {parts}")
    return 0


def _features(chosen: argparse.Namespace) -> int:
    name = features.extract(
        chosen.images, chosen.network, chosen.weights, size=chosen.size, components=chosen.components, cut=chosen.cut,
        device=chosen.device,
    )  # fmt: skip
    print(f"in the cache as {name}; in a configuration: data: {{name: features, set: {name}}}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
