"""Turns the JSON files under book/results/CHAPTER/ into book/results/CHAPTER.parquet and proves it value by value.

    python lab/convert_records.py [--prove]

Every file is read back from the written table and compared with what it said, leaf by leaf. `--prove` only compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from topk_lab import records

ROOT = Path(__file__).resolve().parents[1]
RESULTS, SHIPPED = ROOT / "book" / "results", ROOT / "topk" / "lab" / "shipped"
RENAMED = {"weights": "pretrained"}
OF_RESULT = ("seconds", "data_fingerprint", "parameters", "weights", "precision", "processes", "code")
OF_PROVENANCE = ("commit", "date", "profile", "threads")


def converted(record: dict[str, Any], sweep: str | None) -> records.Row:
    result = {RENAMED.get(name, name): value for name, value in record["result"].items()}
    row = records.row(record["config"], result, record["probe"], record["provenance"], sweep=sweep)
    assert row["key"] == record["key"] and "others" not in record
    return {**row, "schema": record["schema"]}


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    """The JSON file that the row was."""
    config = json.loads(row["config"])
    if "notebook" in config:
        final = json.loads(row["result"])
    else:
        settings = (
            "data.",
            "model.",
            "loss.",
            "training.",
            "validation.",
            "train.",
            "probe.",
            "hardware.",
            "versions.",
        )
        other = {"key", "sweep", "schema", "config", "seed", "epochs", *OF_PROVENANCE}
        other |= {RENAMED.get(name, name) for name in OF_RESULT}
        final = {name: value for name, value in row.items() if not name.startswith(settings) and name not in other}
        inner = within(row, "validation")
        final |= {"validation": inner} if inner else {}
    result = {name: row.get(RENAMED.get(name, name)) for name in OF_RESULT}
    if "notebook" in config:  # its file has no keys for what only training has
        result = {name: result[name] for name in ("seconds", "data_fingerprint", "parameters", "code")}
    else:
        del result["code"]
    return {
        "schema": row["schema"],
        "key": row["key"],
        "config": config,
        "result": {"final": final, "epochs": json.loads(row["epochs"]), **result},
        "probe": within(row, "probe") or None,
        "provenance": {
            **{name: row[name] for name in OF_PROVENANCE},
            "hardware": {"gpu": None, **within(row, "hardware")},
            "versions": within(row, "versions"),
        },
    }


def within(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) + 1 :]: value for name, value in row.items() if name.startswith(f"{prefix}.")}


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """{place: value} of everything in a JSON value; empty lists and mappings count as leaves."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [leaf for name, item in items for leaf in leaves(item, f"{place}/{name}").items()]
    return dict(inner) if inner else {place: value}


def same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def prove(chapter: str, files: dict[str, Any]) -> int:
    """Compares every leaf of every file with the table; returns how many there are."""
    frame, count = records.load(chapter, place=RESULTS), 0
    assert len(frame) == len(files) and set(frame["key"]) == set(files)
    for row in records.rows_of(frame):
        row = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
        then, now = leaves(files[row["key"]]), leaves(as_json(row))
        assert then.keys() == now.keys(), (row["key"], sorted(then.keys() ^ now.keys())[:5])
        wrong = [place for place in then if not same(then[place], now[place])]
        assert not wrong, (row["key"], wrong[:5])
        flat = {name: value for name, value in leaves(files[row["key"]]["config"]).items()}
        for place, value in flat.items() if "seed" in row else ():
            column = ".".join(place.strip("/").split("/")[:2])
            shown = row.get(column)
            assert (
                same(json.loads(shown), files[row["key"]]["config"]["loss"]["k"])
                if column == "loss.k"
                else same(shown, value)
            ), (row["key"], place)
        count += len(then)
    return count


def main() -> None:
    total, runs = 0, 0
    for place in sorted(item for item in RESULTS.iterdir() if item.is_dir()):
        files = {path.stem: json.loads(path.read_text()) for path in sorted(place.glob("*.json"))}
        asked = json.loads((SHIPPED / f"{place.name}.json").read_text())
        shipped = pd.read_csv(SHIPPED / f"{place.name}.csv.xz", usecols=["sweep", "key"])
        sweep = dict(zip(shipped["key"], shipped["sweep"], strict=True))
        if "--prove" not in sys.argv:
            rows = [converted(record, sweep.get(key)) for key, record in files.items()]
            records.write(place.name, rows, asked, RESULTS)
        assert records.sweeps(place.name, RESULTS) == asked
        count = prove(place.name, files)
        size = (RESULTS / f"{place.name}.parquet").stat().st_size
        print(f"{place.name}: {len(files)} records, {count:,} values, all in the table; {size / 1e3:.0f} kB")
        total, runs = total + count, runs + len(files)
    print(f"{runs} records, {total:,} values, every one the same")


if __name__ == "__main__":
    main()
