"""Records: one Parquet table a chapter, one row a run (chapter 14).

    runs = load("14_cifar100", sweep="14_cifar100.mlp")     # a pandas frame
    runs.groupby("loss.k")["top5"].mean()

A row holds, by column:

    key, sweep, schema          the hash of its configuration; which sweeps asked for it: words, of which `load` makes
                                a row each; 1 for rows that were JSON files
    config                      the whole configuration as JSON, which is what `key` hashes
    data.* model.* loss.*       every setting again in a column of its own; `loss.k` and what else may be a mapping or a
      training.* seed           list is JSON text: `5` or `{"1": 0.5, "5": 0.5}`, see `k_of`
    top1 ... candidates_99 ...  what was measured on the test split; `curve` lists the accuracies of 1, 2, ... guesses
    validation.*                the same on the validation split; `validation_clean.*` on true labels where it has noise
    train.loss train.top1 ...   of the last epoch's batches, as they were trained on
    ranks                       uint8 a test image: how many classes score above the right one, 255 and above as 255
    epochs                      JSON: every epoch's numbers
    seconds parameters pretrained data_fingerprint precision failure
    probe.loss probe.gradient   its loss on fixed scores (`topk_lab.losses`)
    contender candidate         which of the sweep's contenders, which candidate of its tuning
    notebook notebook_parameters   the chapter that ran it, and its papermill parameters as JSON
    result                      of a chapter that is its own experiment: what it gave, as JSON
    commit date profile threads hardware.* versions.*

A finished run that is not yet gathered is a JSON file of its row in a scratch folder (`topk_lab.sweep`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = 2
_ABOUT = b"topk_lab"  # the table's own key in the file's metadata
_SECTIONS = ("data", "model", "loss", "training")

Row = dict[str, Any]


def folder() -> Path:
    """Where the tables are: `$TOPK_RESULTS`, else book/results of the checkout, else those in the installed package."""
    here = Path(__file__).resolve().parent
    checkout = here.parents[1] / "book" / "results"
    return Path(os.environ.get("TOPK_RESULTS") or (checkout if checkout.is_dir() else here / "results"))


def chapters() -> list[str]:
    """The chapters that have a table."""
    return sorted(path.stem for path in folder().glob("*.parquet"))


def load(chapter: str, sweep: str | None = None, where: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """A chapter's runs; empty where it has no table yet.

    Args:
        chapter: such as "14_cifar100".
        sweep: only the runs of this sweep.
        where: {column: value} that the runs must have; a list means any of its values.
    """
    frame = _table(chapter)
    if "sweep" in frame:
        frame = frame.assign(sweep=frame["sweep"].str.split(" ")).explode("sweep", ignore_index=True)
    for column, value in {**({} if sweep is None else {"sweep": sweep}), **(where or {})}.items():
        frame = frame[frame[column].isin(value if isinstance(value, list) else [value])]
    return frame.dropna(axis="columns", how="all").reset_index(drop=True) if where or sweep else frame


def rows(chapter: str) -> list[Row]:
    """The chapter's rows as they are stored, one a run."""
    return rows_of(_table(chapter))


def _table(chapter: str) -> pd.DataFrame:
    path = folder() / f"{chapter}.parquet"
    return pq.read_table(path).to_pandas() if path.exists() else pd.DataFrame(columns=["key", "sweep", "config"])


def sweeps(chapter: str) -> list[dict[str, Any]]:
    """What the chapter's table says of its sweeps: `sweep`, `runs` asked for, `recorded` ones, `command`."""
    path = folder() / f"{chapter}.parquet"
    metadata = (pq.read_schema(path).metadata or {}) if path.exists() else {}
    found: list[dict[str, Any]] = json.loads(metadata.get(_ABOUT, b"[]"))
    return found


def write(chapter: str, rows: Sequence[Row], about: Sequence[Mapping[str, Any]]) -> Path:
    """Replaces the chapter's table in one step; `about` is what `sweeps` will tell."""
    rows = sorted(rows, key=lambda row: (row.get("sweep") or "", row["key"]))
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
    table = table.replace_schema_metadata({_ABOUT: json.dumps(list(about), sort_keys=True)})
    path = folder() / f"{chapter}.parquet"
    write_whole(path, lambda file: pq.write_table(table, file, compression="zstd", compression_level=19))
    return path


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """A .npy file, complete or absent."""
    write_whole(path, lambda file: np.save(file, array))


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # a setting that is text in one run and a number in another
        return pa.array([None if value is None else text_of(value) for value in values])


def write_whole(path: Path, write_to: Callable[[BinaryIO], Any]) -> None:
    """Calls `write_to(file)`, flushes and renames: at any moment the file is complete or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write_to(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


# --- rows ---


def row(
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    probe: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
    **about: Any,
) -> Row:
    """One run as a row.

    Args:
        config: the whole configuration; of a chapter that is its own experiment {notebook, parameters}.
        result: `final` metrics, `epochs`, and single values (`seconds`, `parameters`, ...).
        probe: `topk_lab.losses.probe` of the run's loss.
        provenance: see `topk_lab.train.provenance`.
        about: further columns, such as sweep and notebook.
    """
    config, final, epochs = plain(config), result["final"], result["epochs"]
    found: Row = {"key": key_of(config), "schema": SCHEMA, "config": text_of(config), **about}
    if "notebook" in config:
        found |= {"notebook": config["notebook"], "notebook_parameters": text_of(config["parameters"])}
        found |= {"result": text_of(final)}
    else:
        for name, value in _joined({part: config[part] for part in _SECTIONS}).items():
            found[name] = text_of(value) if isinstance(value, list | dict) or name == "loss.k" else value
        found |= (
            {"seed": config["seed"]} | _joined(final) | _joined({"train": epochs[-1]["training"] if epochs else {}})
        )
    found |= {"epochs": text_of(epochs)} | {x: value for x, value in result.items() if x not in ("final", "epochs")}
    return found | _joined({"probe": probe or {}}) | _joined(provenance)


def _joined(values: Mapping[str, Any]) -> Row:
    """{name: value} and {name.part: value} for what is a mapping itself."""
    found: Row = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found |= {f"{name}.{part}": item for part, item in value.items()} if inner else {name: value}
    return found


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The frame's rows as mappings, without what is missing."""
    rows = frame.to_dict("records")
    return [
        {str(name): x for name, x in row.items() if not (x is None or (isinstance(x, float) and x != x))}
        for row in rows
    ]


def key_of(config: Mapping[str, Any]) -> str:
    """The hash of a whole configuration: 1 and 1.0 are the same, and so are {5: 1} and {"5": 1}."""
    text = json.dumps(plain(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def plain(value: Any) -> Any:
    """`value` as JSON knows it: text keys, lists, whole floats as integers, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return int(value) if value.is_integer() else value if np.isfinite(value) else None
    return value


def text_of(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(plain(value), sort_keys=True, allow_nan=False)


def k_of(text: str) -> int | dict[int, float]:
    """The `loss.k` of a row as the losses take it: `5` or `{"1": 0.5, "5": 0.5}`."""
    value = json.loads(text)
    return {int(k): float(weight) for k, weight in value.items()} if isinstance(value, dict) else int(value)


def ranks_of(frame: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The runs' ranks, (runs, test images)."""
    return np.stack([np.frombuffer(value, dtype=np.uint8) for value in frame["ranks"]])


def save(row: Row, path: Path) -> None:
    """One row as a JSON file, complete or absent."""
    ready = {**row, "ranks": base64.b64encode(row["ranks"]).decode()} if "ranks" in row else row
    write_whole(path, lambda file: file.write(json.dumps(ready, allow_nan=False).encode()))


def restore(path: Path) -> Row:
    """The row of `save`."""
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return {**found, "ranks": base64.b64decode(found["ranks"])} if "ranks" in found else found
