"""The cache: plain .npy files in one folder a data set, and a manifest that says what they hold (chapter 14).

    $TOPK_DATA/<set>/cache.json                     the manifest: what is in, with every file's shape and SHA-256
    $TOPK_DATA/<set>/<split>-<field>-<digest>.npy   one array each, memory-mapped by whoever reads it
    $TOPK_DATA/<set>/.lock                          held by the one process that fills the set

Without `TOPK_DATA` the folder is `topk` in the user's cache folder. Files carry a part of their checksum in their
names, so that new ones never overwrite old ones: a filling writes its arrays beside what is there, then replaces the
manifest in one atomic step, then removes what no manifest names any more. Whatever goes wrong before that step (a
wrong checksum, a full disk, a killed process) leaves the old set as it was. Readers take no lock.

The manifest carries a version; another version is refused, never guessed at.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

VERSION = 1
FORMAT = "topk cache"
MANIFEST = "cache.json"
VERIFIED_ON_READING = 2**30
"""Arrays up to this many bytes are checked against their SHA-256 when a process first reads them; larger ones by size
and header alone (`verify` checks everything)."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_ARRAY_FILE = re.compile(r"[a-z]+-[a-z]+-[0-9a-f]{12}\.npy")
_TEMPORARY = ".unfinished-"
_BLOCK = 2**24
_verified: set[tuple[str, int, int]] = set()


class CacheError(ValueError):
    """The cache cannot be read or filled; the message says why and what to do."""


@dataclass(frozen=True)
class Stored:
    """One array of a set: its file, what is in it, and the SHA-256 of its elements in C order."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A set in the cache: its arrays by key (`train-inputs` and the like) and what else is known about it."""

    name: str
    folder: Path
    arrays: Mapping[str, Stored]
    about: Mapping[str, Any]

    def array(self, key: str, *, verify: bool | None = None) -> np.ndarray:
        """The array, memory-mapped and read-only, checked against the manifest.

        Args:
            key: one of `arrays`.
            verify: whether to compare the checksum; None: once a process, up to `VERIFIED_ON_READING` bytes.
        """
        return _open(self.folder / self.arrays[key].file, self.arrays[key], verify)

    def verify(self) -> None:
        """Reads every array and compares its checksum."""
        for key in self.arrays:
            self.array(key, verify=True)


def folder() -> Path:
    """`$TOPK_DATA`, or `topk` in the user's cache folder."""
    chosen = os.environ.get("TOPK_DATA")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "topk"


def check_name(name: object) -> str:
    """A set's name becomes a folder, so it may hold nothing but lower-case letters, digits, '.', '_' and '-'."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"a set's name must match {_NAME.pattern} without '..', got {name!r}")
    return name


def names() -> list[str]:
    """The sets in the cache."""
    root = folder()
    if not root.is_dir():
        return []
    return sorted(item.name for item in root.iterdir() if _NAME.fullmatch(item.name) and (item / MANIFEST).is_file())


# --- reading ---------------------------------------------------------------------------------------------------------


def read(name: str) -> Entry | None:
    """The set as its manifest describes it, or None if it is not in the cache."""
    place = folder() / check_name(name)
    try:
        text = (place / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"{place / MANIFEST} cannot be read: {error}") from error
    try:
        return _parsed(name, place, json.loads(text))
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{place / MANIFEST} is damaged ({error}); move {place} away and import {name} again"
        ) from error


def _parsed(name: str, place: Path, manifest: Mapping[str, Any]) -> Entry:
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT!r}")
    if manifest["version"] != VERSION:
        raise CacheError(
            f"{place} was written in version {manifest['version']} of the cache, this program reads version {VERSION}: "
            f"use the program that wrote it, or move the folder away (or set TOPK_DATA to another one) and import "
            f"{name} again"
        )
    arrays = {}
    for key, item in manifest["arrays"].items():
        if not isinstance(item["file"], str) or not _ARRAY_FILE.fullmatch(item["file"]):
            raise ValueError(f"{item['file']!r} is no name of an array file")
        arrays[key] = Stored(item["file"], tuple(int(size) for size in item["shape"]), item["dtype"], item["sha256"])
    return Entry(name, place, arrays, dict(manifest["about"]))


def _open(path: Path, stored: Stored, verify: bool | None) -> np.ndarray:
    again = f"the cache is damaged: remove {path.parent} and import the set again"
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        status = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise CacheError(f"{path} cannot be read ({error}); {again}") from error
    if array.shape != stored.shape or array.dtype.str != stored.dtype:
        raise CacheError(
            f"{path} holds {array.dtype.str} {array.shape}, the manifest says {stored.dtype} {stored.shape}; {again}"
        )
    mark = (str(path), status.st_mtime_ns, status.st_size)
    if verify or (verify is None and array.nbytes <= VERIFIED_ON_READING and mark not in _verified):
        digest = hashlib.sha256()
        for block in blocks_of(array):
            digest.update(block.data)
        if digest.hexdigest() != stored.sha256:
            raise CacheError(f"{path} has the SHA-256 {digest.hexdigest()}, the manifest says {stored.sha256}; {again}")
        _verified.add(mark)
    return array


def blocks_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array's rows, in order, some 16 MB at a time."""
    rows = max(1, _BLOCK // max(1, array.nbytes // max(1, len(array))))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows])


# --- filling ---------------------------------------------------------------------------------------------------------


class Filling:
    """One process's filling of one set, from `filling`: write arrays, then commit once."""

    def __init__(self, name: str, place: Path) -> None:
        self.name, self.place = name, place
        self.arrays: dict[str, Stored] = {}

    def write(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[np.ndarray]) -> Stored:
        """Writes an array given as blocks of rows; it becomes part of the set at the commit."""
        needed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        free = shutil.disk_usage(self.place).free
        if free < needed + 2**20:
            raise CacheError(
                f"no room for {key} of {self.name}: {needed / 1e6:.0f} MB are needed in {self.place}, "
                f"{free / 1e6:.0f} MB are free; free some or set TOPK_DATA to another disk. Nothing was changed"
            )
        digest, rows = hashlib.sha256(), 0
        with _temporary(self.place) as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                if block.shape[1:] != shape[1:] or block.dtype != dtype:
                    raise CacheError(f"{key} of {self.name}: rows of {dtype} {shape[1:]} expected, got {block.shape}")
                whole = np.ascontiguousarray(block)
                digest.update(whole.data)
                file.write(whole.data)
                rows += len(whole)
            if rows != shape[0]:
                raise CacheError(f"{key} of {self.name} must have {shape[0]} rows, got {rows}")
            stored = Stored(f"{key}-{digest.hexdigest()[:12]}.npy", shape, dtype.str, digest.hexdigest())
            _publish(file, self.place / stored.file)
        self.arrays[key] = stored
        return stored

    def commit(self, about: Mapping[str, Any]) -> Entry:
        """Makes the written arrays the set, in one atomic step, and removes the files of the old one."""
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "arrays": {key: asdict(stored) for key, stored in self.arrays.items()},
            "about": about,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        with _temporary(self.place) as file:
            file.write(text.encode())
            _publish(file, self.place / MANIFEST)
        _sweep(self.place, {stored.file for stored in self.arrays.values()})
        return _parsed(self.name, self.place, json.loads(text))


@contextlib.contextmanager
def filling(name: str, *, say: Callable[[str], None] = lambda _: None) -> Iterator[Filling]:
    """Holds the set's lock; `say` hears about a wait for another process.

    A set of another version is refused before anything is written. What is written without reaching the commit is
    removed.
    """
    place = folder() / check_name(name)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place / ".lock", say):
            old = read(name)
            kept = {stored.file for stored in old.arrays.values()} if old else set()
            _sweep(place, kept)
            filler = Filling(name, place)
            try:
                yield filler
            except BaseException:
                _sweep(place, _named_by_manifest(name, kept))
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"the disk of {place} is full; free some room or set TOPK_DATA to another disk. The set {name} is as "
                f"it was before"
            ) from error
        raise CacheError(f"{name} cannot be written to {place}: {error}") from error


def _named_by_manifest(name: str, otherwise: set[str]) -> set[str]:
    """What must stay after a failure, also one right after the manifest was replaced."""
    try:
        entry = read(name)
    except CacheError:
        return otherwise
    return {stored.file for stored in entry.arrays.values()} if entry else set()


@contextlib.contextmanager
def _temporary(place: Path) -> Iterator[IO[bytes]]:
    """A new file under a name that no reader looks at, gone unless it was published."""
    path = place / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with open(path, "xb") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _publish(file: IO[bytes], target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, target)


def _sweep(place: Path, kept: set[str]) -> None:
    """Removes array files that no manifest names, and what a killed process left unfinished."""
    for item in place.iterdir():
        if item.name.startswith(_TEMPORARY) or (_ARRAY_FILE.fullmatch(item.name) and item.name not in kept):
            with contextlib.suppress(OSError):  # Windows keeps files that somebody has mapped; a later sweep has them
                item.unlink()


@contextlib.contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file; the system lets go of it when the process ends, however it ends."""
    with open(path, "a+b") as file:
        told = False
        while not _try_lock(file):
            if not told:
                say(f"waiting for another process that fills {path.parent}")
                told = True
            time.sleep(0.1)
        yield


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
