"""One JSON file a run, named by the hash of its full configuration.

A record `<key>.json`, schema 1:

    schema      1
    key         the first 20 hex digits of the SHA-256 of the configuration's canonical JSON
    config      the completed configuration: {data, model, loss, training, seed}, every default written out;
                or, for a notebook, {notebook, parameters}
    result      epochs           list of {metric: number}, one an epoch, may be empty
                final            {metric: number}
                seconds          wall time of the run
                data_fingerprint what the data was, or null
                parameters       how many numbers the model trains, or null
                more keys are kept as they are
    probe       {loss, gradient} of the run's loss on fixed scores (topk.lab.probe), or null where the run names no loss
    provenance  commit, date (UTC), hardware, versions, threads, profile
    others      only after a merge: [{result: {final, seconds}, provenance}] of further runs of this configuration

Numbers that are not finite are null. A metric may be a mapping (groups) or a list. A file is complete or absent: it is
written beside its name, flushed to the disk and renamed. A record of another schema is migrated or refused.

`<key>.failed.json` (schema, key, config, error, log, provenance) tells of a run that failed; it is no record.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topk.lab.claims import Claims

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
# The schema a record has -> a function that returns it in the next one.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

Record = dict[str, Any]
Config = Mapping[str, Any]

_NAME = re.compile(r"[0-9a-f]{20}\.json")
_LARGEST = 100_000  # values in one configuration or result: more is a mistake, or a file made to fill the memory
_PROVENANCE = ("commit", "date", "hardware", "versions", "threads", "profile")


def plain(value: Any, name: str = "value") -> Any:
    """`value` as JSON knows it: text keys, lists, whole floats as integers, null for what is not finite.

    Two configurations are the same when their plain forms are equal: 1 and 1.0 are, and so are {5: 1} and {"5": 1}.
    """
    return _plain(value, name, [0])


def _plain(value: Any, name: str, seen: list[int]) -> Any:
    seen[0] += 1
    if seen[0] > _LARGEST:
        raise ValueError(f"{name} holds more than {_LARGEST} values")
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        value = value.tolist()
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        result = {str(key): _plain(item, f"{name}.{key}", seen) for key, item in value.items()}
        if len(result) < len(value):
            raise ValueError(f"{name} has two keys that read the same: {sorted(map(str, value))}")
        return result
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{number}]", seen) for number, item in enumerate(value)]
    raise TypeError(f"{name} must be made of numbers, text, lists and mappings, got {value!r}")


def complete(config: Config) -> Record:
    """The full configuration in plain form; unknown keys are refused by name."""
    if "notebook" not in config:
        from topk.lab import training

        return dict(plain(training.complete(config), "config"))
    unknown = set(config) - {"notebook", "parameters"}
    if unknown:
        raise ValueError(f"a notebook's configuration has notebook and parameters, got also {sorted(unknown)}")
    return dict(plain({"parameters": {}, **config}, "config"))


def key(config: Config) -> str:
    """The hash of the completed configuration."""
    return key_of_completed(complete(config))


def key_of_completed(config: Config) -> str:
    """The hash of a configuration that is complete."""
    text = json.dumps(plain(config, "config"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def build(config: Config, result: Mapping[str, Any], profile: str | None = None, commit: str | None = None) -> Record:
    """The record of a run that ended here and now; `config` is complete."""
    from topk.lab.probe import probe
    from topk.lab.provenance import provenance

    record = {
        "schema": SCHEMA,
        "key": key_of_completed(config),
        "config": plain(config, "config"),
        "result": plain(result, "result"),
        "probe": plain(probe(config), "probe"),
        "provenance": plain(provenance(profile, commit), "provenance"),
    }
    return validate(record)


def write(folder: Path | str, config: Config, result: Mapping[str, Any], profile: str | None = None) -> Path:
    """Builds and saves the record of a run that ended here and now."""
    return save(folder, build(complete(config), result, profile))


def save(folder: Path | str, record: Record) -> Path:
    """Writes a record; one that is there already stays, since it is of the same configuration."""
    path = Path(folder) / f"{validate(record)['key']}.json"
    write_json(path, record, replace=False)
    return path


def write_json(path: Path, content: Mapping[str, Any], replace: bool = True) -> None:
    """Writes a JSON file that is complete or absent, whatever happens meanwhile, and is on the disk afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(content[name], sort_keys=True, allow_nan=False)}" for name in content]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if replace or not _linked(temporary, path):
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    with contextlib.suppress(OSError), _opened(path.parent) as folder:
        os.fsync(folder)


def _linked(temporary: str, path: Path) -> bool:
    """Gives the file its name unless the name is taken; False where the file system has no links and it is free."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return True
    except OSError:
        return path.exists()
    return True


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def read(path: Path) -> Record:
    """One record, migrated to today's schema and validated; the error names the file."""
    try:
        record = json.loads(path.read_text())
        if path.stem != (record.get("key") if isinstance(record, dict) else None):
            raise ValueError(
                f"key must be the file's name, got {record.get('key') if isinstance(record, dict) else record!r}"
            )
        return validate(migrated(record))
    except ValueError as error:
        raise ValueError(f"{path} is no record: {error}") from None


def migrated(record: Record) -> Record:
    """The record in today's schema; refuses what a newer version wrote."""
    found = record.get("schema")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"schema must be a number of 1 to {SCHEMA}, got {found!r}")
    if found > SCHEMA:
        raise ValueError(f"schema {found} was written by a newer version; this one knows {SCHEMA}")
    for version in range(found, SCHEMA):
        if version not in MIGRATIONS:
            raise ValueError(f"schema {found} is no longer read")
        record = {**MIGRATIONS[version](record), "schema": version + 1}
    return record


def validate(record: Any) -> Record:
    """The record, if it follows the schema; otherwise ValueError names the place, the value and what it must be."""
    _check_keys("the record", record, ("schema", "key", "config", "result", "probe", "provenance"), ("others",))
    _check("schema", record["schema"], record["schema"] == SCHEMA, f"{SCHEMA}")
    _check("config", record["config"], isinstance(record["config"], dict), "a mapping")
    expected = key_of_completed(record["config"])
    _check("key", record["key"], record["key"] == expected, f"the configuration's hash {expected}")
    _check_result(record["result"])
    _check_provenance("provenance", record["provenance"])
    if record["probe"] is not None:
        _check_keys("probe", record["probe"], ("loss", "gradient"))
        _check("probe.loss", record["probe"]["loss"], _is_number(record["probe"]["loss"]), "a number")
        gradient = record["probe"]["gradient"]
        is_list = isinstance(gradient, list) and all(_is_number(item) for item in gradient)
        _check("probe.gradient", gradient, is_list, "a list of numbers")
    _check("others", record.get("others", []), isinstance(record.get("others", []), list), "a list")
    for number, other in enumerate(record.get("others", [])):
        _check_keys(f"others[{number}]", other, ("result", "provenance"))
        _check_keys(f"others[{number}].result", other["result"], ("final", "seconds"))
        _check_provenance(f"others[{number}].provenance", other["provenance"])
    return dict(record)


def _check_result(result: Any) -> None:
    names = ("epochs", "final", "seconds", "data_fingerprint", "parameters")
    _check_keys("result", result, names, optional=None)
    epochs, seconds = result["epochs"], result["seconds"]
    is_list = isinstance(epochs, list) and all(isinstance(item, dict) for item in epochs)
    _check("result.epochs", epochs, is_list, "a list of mappings")
    _check("result.final", result["final"], isinstance(result["final"], dict), "a mapping")
    for place, metrics in [("final", result["final"]), *((f"epochs[{i}]", item) for i, item in enumerate(epochs))]:
        for name, value in metrics.items():
            _check(f"result.{place}.{name}", value, _is_metric(value), "numbers, text or null")
    _check("result.seconds", seconds, _is_number(seconds) and seconds >= 0, "a number, at least 0")
    text = result["data_fingerprint"]
    is_hex = text is None or (isinstance(text, str) and re.fullmatch(r"[0-9a-f]+", text) is not None)
    _check("result.data_fingerprint", text, is_hex, "hex digits or null")
    count = result["parameters"]
    _check("result.parameters", count, count is None or (type(count) is int and count >= 0), "a count or null")


def _check_provenance(name: str, value: Any) -> None:
    _check_keys(name, value, _PROVENANCE)
    for part in ("commit", "profile"):
        _check(f"{name}.{part}", value[part], value[part] is None or isinstance(value[part], str), "text or null")
    _check(f"{name}.date", value["date"], isinstance(value["date"], str), "a date")
    for part in ("hardware", "versions"):
        _check(f"{name}.{part}", value[part], isinstance(value[part], dict), "a mapping")
    _check(f"{name}.threads", value["threads"], type(value["threads"]) is int, "a count")


def _check_keys(name: str, value: Any, needed: Iterable[str], optional: Iterable[str] | None = ()) -> None:
    _check(name, value, isinstance(value, dict), "a mapping")
    missing = sorted(set(needed) - set(value))
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    unknown = [] if optional is None else sorted(set(value) - set(needed) - set(optional))
    if unknown:
        raise ValueError(f"{name} has unknown keys: {', '.join(unknown)}")


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_metric(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_metric(item) for item in value.values())
    if isinstance(value, list):
        return all(_is_metric(item) for item in value)
    return value is None or isinstance(value, bool | str) or _is_number(value)


def paths(folder: Path | str) -> list[Path]:
    """The files of a folder that are named like records, sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of records")
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def keys_of_today(folder: Path | str) -> set[str]:
    """The keys under which today's code would look for the records of a folder.

    A record whose configuration lacks a setting that was added since is found under the key with that setting's
    default; one that today's code refuses is not found. A damaged record is an error: nothing is run over it.
    """
    found = set()
    for path in paths(folder) if Path(folder).is_dir() else []:
        config = read(path)["config"]
        with contextlib.suppress(ValueError, TypeError):
            found.add(key(config))
    return found


def load(folder: Path | str, epochs: bool = False) -> pd.DataFrame:
    """A tidy table: one row a run, or one row a run and epoch.

    Columns: key, label (the loss and its keywords), seed; every setting as `data.noise`, `loss.k`, ...; every metric by
    its own name (`groups.few.top5` for nested ones, `metric.<name>` where the name is taken); run_seconds, parameters,
    data_fingerprint, commit, date, profile. Records of a merge's `others` are not in it: one configuration counts once.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for path in paths(folder):
        record = read(path)
        about = _about(record)
        if not epochs:
            rows.append(_with_metrics(about, record["result"]["final"]))
        for number, metrics in enumerate(record["result"]["epochs"] if epochs else []):
            rows.append(_with_metrics({**about, "epoch": number + 1}, {**metrics, "epoch": number + 1}))
    return pd.DataFrame(rows)


def _about(record: Record) -> dict[str, Any]:
    config, result, source = record["config"], record["result"], record["provenance"]
    return {
        "key": record["key"],
        "label": label(config),
        "seed": config.get("seed", config.get("parameters", {}).get("seed")),
        **{name: value for name, value in flat(config).items() if name != "seed"},
        "run_seconds": result["seconds"],
        **{name: result[name] for name in ("parameters", "data_fingerprint")},
        **{name: source[name] for name in ("commit", "date", "profile")},
    }


def _with_metrics(about: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    row = dict(about)
    for name, value in flat(metrics).items():
        taken = name in about and name != "epoch"
        row[f"metric.{name}" if taken else name] = math.nan if value is None else value
    return row


def flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots; a loss's `{k: weight}` stays one value, as text."""
    result: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and (before + name).endswith("loss.k"):
            result[before + name] = "+".join(f"{weight}*{k}" for k, weight in item.items())
        elif isinstance(item, Mapping):
            result |= flat(item, f"{before}{name}.")
        else:
            result[before + name] = str(item) if isinstance(item, list) else item
    return result


def label(config: Config) -> str:
    """The loss with its keywords, such as `smooth k=5 tau=0.5`; a notebook's name otherwise."""
    loss = config.get("loss", config.get("parameters", {}).get("loss"))
    if isinstance(loss, str):
        return loss
    if not isinstance(loss, Mapping):
        return str(config.get("notebook", "?"))
    order = sorted(loss, key=lambda name: (name != "k", name))
    named = flat({"loss": {name: loss[name] for name in order if name != "name" and loss[name] is not None}})
    return " ".join([str(loss.get("name")), *(f"{name[5:]}={value}" for name, value in named.items())])


def check(folder: Path | str) -> dict[str, str]:
    """What is wrong, by file name: damaged, of another version, or stale (today's loss differs on the probe)."""
    from topk.lab.probe import why_stale

    wrong = {}
    for path in paths(folder):
        try:
            record = read(path)
            reason = why_stale(record)
            if reason is None and key(record["config"]) != record["key"]:
                reason = "settings were added since: today's code would give this configuration another key"
        except (ValueError, TypeError) as error:
            reason = str(error)
        if reason is not None:
            wrong[path.name] = reason
    return wrong


def merge(into: Path | str, other: Path | str) -> dict[str, int]:
    """Adds another folder's records to a folder; returns how many were added, combined and already there.

    Two runs of one configuration (two machines rarely give the same last digits) become one record: the older run's
    numbers count, the younger's final metrics and provenance are kept under `others`. So merging in either direction,
    or twice, gives the same records. Runs of one configuration whose data or whose loss differed are no repetition of
    each other: the merge refuses, names them all, and changes nothing. Failures and logs are not merged.
    """
    into, other = Path(into), Path(other)
    new, old = [read(path) for path in paths(other)], {}
    into.mkdir(parents=True, exist_ok=True)
    with Claims(into).held("merge"):
        old = {path.stem: read(path) for path in paths(into)}
        conflicts = [f"{r['key']}: {why}" for r in new if r["key"] in old and (why := _conflict(old[r["key"]], r))]
        if conflicts:
            raise ValueError("nothing was merged, these differ:\n  " + "\n  ".join(conflicts))
        counts = {"added": 0, "combined": 0, "already there": 0}
        for record in new:
            mine = old.get(record["key"], record)
            both = _combined(mine, record)
            change = "added" if record["key"] not in old else "already there" if both == mine else "combined"
            counts[change] += 1
            if change != "already there":
                write_json(into / f"{record['key']}.json", both)
    return counts


def _conflict(mine: Record, other: Record) -> str | None:
    from topk.lab.probe import difference

    if mine["config"] != other["config"]:
        return "the configurations differ"
    if mine["result"]["data_fingerprint"] != other["result"]["data_fingerprint"]:
        return "the data differed"
    return difference(mine["probe"], other["probe"])


def _combined(mine: Record, other: Record) -> Record:
    first, *_ = pair = sorted((mine, other), key=_age)
    repeats = [item for record in pair for item in [_repeat(record), *record.get("others", [])]]
    own = _repeat(first)
    unique = {json.dumps(item, sort_keys=True): item for item in repeats if item != own}
    record = {name: value for name, value in first.items() if name != "others"}
    return {**record, "others": [unique[text] for text in sorted(unique)]} if unique else record


def _age(record: Record) -> tuple[str, str]:
    return record["provenance"]["date"], json.dumps(_repeat(record), sort_keys=True)


def _repeat(record: Record) -> Record:
    result = record["result"]
    return {
        "result": {"final": result["final"], "seconds": result["seconds"]},
        "provenance": record["provenance"],
    }


def add_arguments(commands: Any) -> None:
    """The command `records`."""
    parser = commands.add_parser("records", help="check, show and merge records of runs")
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("check", help="list records that are damaged, of another version or stale")
    part.add_argument("folder", type=Path)
    part.set_defaults(run=_run_check)
    part = parts.add_parser("show", help="a table of a folder's records, or one of them whole")
    part.add_argument("folder", type=Path)
    part.add_argument("key", nargs="?", help="the first digits of a key")
    part.set_defaults(run=_run_show)
    part = parts.add_parser("merge", help="add the records of FOLDER B to those of folder A", description=merge.__doc__)
    part.add_argument("into", type=Path, metavar="A")
    part.add_argument("other", type=Path, metavar="B")
    part.set_defaults(run=_run_merge)


def _run_check(chosen: argparse.Namespace) -> int:
    wrong = check(chosen.folder)
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    print(f"{len(paths(chosen.folder)) - len(wrong)} records are sound, {len(wrong)} are not")
    return 1 if wrong else 0


def _run_show(chosen: argparse.Namespace) -> int:
    if chosen.key is not None:
        found = [path for path in paths(chosen.folder) if path.name.startswith(chosen.key)]
        for path in found:
            print(json.dumps(read(path), indent=1, sort_keys=True))
        if not found:
            raise ValueError(f"no record's key starts with {chosen.key!r}")
        return 0
    from topk.lab.summary import table

    print(table(load(chosen.folder)))
    return 0


def _run_merge(chosen: argparse.Namespace) -> int:
    counts = merge(chosen.into, chosen.other)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 0
