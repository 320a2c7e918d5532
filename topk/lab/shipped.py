"""What the package carries of the measured records, so that a chapter copied alone into a folder draws its figures.

    python -m topk.lab ship records [CHAPTER ...] [--results book/results] [--sweeps notebooks]
    python -m topk.lab ship sample COMPONENTS

For every chapter with sweep files beside it (`14_cifar100.yml`, `14_cifar100.tuning.yml`, ...) two files lie here:

    shipped/<chapter>.csv.xz   one row a record: what `topk.lab.records.load` tells, the training metrics of the last
                               epoch, the sweep's name, and the machine
    shipped/<chapter>.json     for each of its sweeps how many runs it asks for and how many have a record

Both are made from `book/results/<chapter>/` and the sweep files by the first command and by nothing else; a test
makes them again and compares. The second command draws the sample of real data (`topk.lab.sample`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from topk.lab import grid, records, sample, tuning
from topk.lab.settings import check_name

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "shipped"
LARGEST = 2_000_000
"""Bytes that sample and records may take together."""
_HERE = Path(__file__).parent
_LONGEST_CURVE = 100
_NOT_SHIPPED = ("data_fingerprint",)


def chapters() -> list[str]:
    """The chapters whose records are here."""
    return sorted(item.name.removesuffix(".json") for item in _files() if item.name.endswith(".json"))


def load(chapter: str) -> pd.DataFrame:
    """A chapter's records: one row a run, the columns of `topk.lab.records.load` and more (see this module)."""
    import pandas as pd

    _check(chapter)
    place = resources.files("topk.lab").joinpath(FOLDER, f"{chapter}.csv.xz")
    if not place.is_file():
        return pd.DataFrame(columns=["sweep", "key", "label", "seed", "loss.name"])
    with place.open("rb") as file:
        return pd.read_csv(file, compression="xz", low_memory=False)


def expected(chapter: str) -> list[dict[str, Any]]:
    """A chapter's sweeps: `sweep`, `command`, `runs` asked for, `recorded` ones."""
    _check(chapter)
    text = resources.files("topk.lab").joinpath(FOLDER, f"{chapter}.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return found


def _files() -> list[Any]:
    folder = resources.files("topk.lab").joinpath(FOLDER)
    return list(folder.iterdir()) if folder.is_dir() else []


def _check(chapter: str) -> None:
    if chapter not in chapters():
        raise ValueError(f"chapter must be one of {', '.join(chapters()) or 'none yet'}, got {chapter!r}")


# --- packing ---------------------------------------------------------------------------------------------------------


def sweeps_of(folder: Path) -> dict[str, list[Path]]:
    """The sweep files of a folder by chapter: the part of the file's name before its first dot."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("[0-9]*.yml")):
        found.setdefault(path.name.split(".")[0], []).append(path)
    return found


def asked(path: Path) -> list[dict[str, Any]]:
    """What a sweep file asks for in its full size: its profile `gpu` where it has one, else `laptop`.

    A file that tunes and whose choices are not written yet also asks for the runs that will follow them.
    """
    profile = "gpu" if "gpu" in (yaml.safe_load(path.read_text(encoding="utf-8")).get("profiles") or {}) else "laptop"
    sweep, name = grid.read(path, profile), path.name.removesuffix(".yml")
    found = {
        "sweep": name,
        "command": f"python -m topk.lab sweep notebooks/{path.name} --profile {profile} "
        f"--results book/results/{name.split('.')[0]}" + (" --final" if sweep.final is not None else ""),
        "runs": list(sweep.configs),
    }
    if sweep.final is None or (path.with_name(path.name.replace(".tuning.", "."))).exists():
        return [found]
    later = tuning.count_of_final(sweep)
    runs = [f"after tuning, {number}" for number in range(later)]
    return [found, {**found, "sweep": name.removesuffix(".tuning"), "runs": runs}]


def progress(results: Path, sweeps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many runs each sweep asks for, and how many of them have a record."""
    there = {path.stem for path in records.paths(results)} if results.is_dir() else set()
    return [
        {**sweep, "runs": len(sweep["runs"]), "recorded": sum(key in there for key in sweep["runs"])}
        for sweep in sweeps
    ]


def table(results: Path, sweeps: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for every record that one of the sweeps asks for."""
    import pandas as pd

    if not results.is_dir() or not records.paths(results):
        return pd.DataFrame()
    frame = records.load(results).drop(columns=list(_NOT_SHIPPED))
    sweep_of = {key: sweep["sweep"] for sweep in sweeps for key in sweep["runs"]}
    frame.insert(0, "sweep", frame["key"].map(sweep_of))
    frame = frame[frame["sweep"].notna()]
    extra = pd.DataFrame([_more(records.read(results / f"{key}.json")) for key in frame["key"]], index=frame.index)
    frame = pd.concat([frame, extra], axis=1)
    for name in [name for name in frame if str(name).endswith("curve")]:
        frame[name] = frame[name].map(_short_curve)
    return frame.sort_values(["sweep", "key"]).reset_index(drop=True)


def _more(record: Mapping[str, Any]) -> dict[str, Any]:
    epochs, source = record["result"]["epochs"], record["provenance"]
    training = epochs[-1].get("training", {}) if epochs else {}
    return {
        **{f"training.{name}": training.get(name) for name in ("loss", "top1", "top5")},
        "processor": source["hardware"]["gpu"] or source["hardware"]["cpu"],
        "torch": source["versions"].get("torch"),
        "threads": source["threads"],
    }


def _short_curve(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    return " ".join(f"{float(value):.6g}" for value in json.loads(text)[:_LONGEST_CURVE])


def pack(results: Path, sweeps: Path, into: Path, only: Sequence[str] = ()) -> dict[str, int]:
    """Writes every chapter's two files, or those of some; returns how many records each has."""
    into.mkdir(parents=True, exist_ok=True)
    found, counts = sweeps_of(sweeps), dict[str, int]()
    for chapter in only or found:
        paths = found[check_name("chapter", chapter, found)]
        wanted = [sweep for path in paths for sweep in asked(path)]
        frame = table(results / chapter, wanted)
        counts[chapter] = len(frame)
        text = json.dumps(progress(results / chapter, wanted), indent=1, sort_keys=True) + "\n"
        (into / f"{chapter}.json").write_text(text, encoding="utf-8")
        if len(frame):
            frame.to_csv(into / f"{chapter}.csv.xz", index=False, float_format="%.7g", compression="xz")
    return counts


def add_arguments(commands: Any) -> None:
    """The command `ship`."""
    parser = commands.add_parser("ship", help="pack records and a sample of real data for the wheel")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("records", help="pack the records of every chapter with sweep files")
    part.add_argument("chapters", nargs="*", metavar="CHAPTER", help="only these, such as 14_cifar100")
    part.add_argument("--results", type=Path, default=Path("book/results"))
    part.add_argument("--sweeps", type=Path, default=Path("notebooks"))
    part.set_defaults(run=_ship_records)
    part = parts.add_parser("sample", help="draw the sample of real data from a set of components in the cache")
    part.add_argument("components")
    part.set_defaults(run=_ship_sample)


def _ship_records(chosen: argparse.Namespace) -> int:
    counts = pack(chosen.results, chosen.sweeps, _HERE / FOLDER, chosen.chapters)
    print(", ".join(f"{chapter}: {count} records" for chapter, count in counts.items()) or "no sweep files")
    return _report_size()


def _ship_sample(chosen: argparse.Namespace) -> int:
    sample.make(chosen.components, _HERE / sample.FILE)
    return _report_size()


def _report_size() -> int:
    size = size_of()
    print(f"{size / 1e6:.2f} MB in the wheel")
    return 0 if size <= LARGEST else 1


def size_of() -> int:
    """Bytes of the sample and the records that are here."""
    paths = [_HERE / sample.FILE, *(_HERE / FOLDER).glob("*")]
    return sum(path.stat().st_size for path in paths if path.is_file())
