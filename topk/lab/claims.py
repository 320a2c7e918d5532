"""Who works on what: claims as files, so that sweeps on one folder, on one machine or many, never run the same thing.

The claim on NAME is the file `.claims/NAME.<generation>` with the highest generation. Creating a file that must not
exist is atomic, so each generation has one creator. The holder touches its file now and then. A claim whose holder is
dead (same machine, no such process) or silent for too long is stale: the next generation may be created. A holder that
was only asleep sees the higher generation and knows that it lost the claim.

Ages are measured by the file system's own clock, so machines may disagree about the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import tempfile
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

SILENCE = 300.0  # seconds without a sign of life after which a holder elsewhere counts as gone
FOLDER = ".claims"


class Claims:
    """The claims on one folder; those taken through this object belong to this process."""

    def __init__(self, folder: Path | str, silence: float = SILENCE) -> None:
        self.folder = Path(folder) / FOLDER
        self.silence = silence
        self._held: dict[str, tuple[Path, str]] = {}

    def take(self, name: str) -> bool:
        """Tries to claim a name; False while somebody else holds it."""
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"a claim's name is made of letters and digits, got {name!r}")
        if name in self._held:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        last, path = self._last(name)
        seen = _content(path)
        if path is not None and self._owner(path) is not None:
            return False
        mine = self.folder / f"{name}.{last + 1}"
        content = json.dumps({**_ourselves(), "token": uuid.uuid4().hex})
        if not self._created(mine, content):
            return False
        # Between the look and the creation others may have come and gone: only what this claim follows may be there.
        if self._last(name)[0] != last + 1 or _content(path) != seen:
            mine.unlink(missing_ok=True)
            return False
        for earlier in self._all(name):
            if earlier != mine:
                earlier.unlink(missing_ok=True)
        self._held[name] = mine, content
        return True

    def release(self, name: str) -> None:
        """Gives a claim back."""
        path, content = self._held.pop(name)
        if _content(path) == content:
            path.unlink(missing_ok=True)

    def release_all(self) -> None:
        """Gives back every claim of this object."""
        for name in list(self._held):
            self.release(name)

    def holder(self, name: str) -> str | None:
        """Who holds a name, in words; None where nobody alive does."""
        _, path = self._last(name)
        return None if path is None else self._owner(path)

    def beat(self) -> list[str]:
        """A sign of life for every claim held; returns the names that were lost meanwhile."""
        lost = []
        for name, (path, content) in list(self._held.items()):
            if _content(path) == content:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                    continue
            lost.append(name)
            del self._held[name]
        return lost

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Holds a short claim for the length of a block, or refuses."""
        if not self.take(name):
            raise ValueError(f"{self.folder.parent}: {name} is being done by {self.holder(name) or 'somebody else'}")
        try:
            yield
        finally:
            self.release(name)

    def _all(self, name: str) -> list[Path]:
        found = [path for path in self.folder.glob(f"{name}.*") if path.suffix[1:].isdigit()]
        return sorted(found, key=lambda path: int(path.suffix[1:]))

    def _last(self, name: str) -> tuple[int, Path | None]:
        found = self._all(name)
        return (int(found[-1].suffix[1:]), found[-1]) if found else (-1, None)

    def _created(self, path: Path, content: str) -> bool:
        """Creates a claim with its content in one step: a link to a finished file."""
        handle, temporary = tempfile.mkstemp(prefix="new-", dir=self.folder)
        with os.fdopen(handle, "w") as file:
            file.write(content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # no links on this file system
            try:
                with path.open("x") as file:
                    file.write(content)
            except FileExistsError:
                return False
        finally:
            os.unlink(temporary)
        return True

    def _owner(self, path: Path) -> str | None:
        """The living holder of a claim, in words."""
        content = _content(path)
        try:
            age = self._now() - path.stat().st_mtime
            owner = json.loads(content or "{}")
        except FileNotFoundError:
            return None
        except ValueError:  # damaged: its age decides
            owner = {}
        if age > self.silence or _is_dead(owner):
            return None
        return f"process {owner.get('process', '?')} on {owner.get('host', '?')}"

    def _now(self) -> float:
        with tempfile.NamedTemporaryFile(prefix="now-", dir=self.folder) as file:
            return os.stat(file.name).st_mtime


def _content(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text()
    except FileNotFoundError:
        return None


def _ourselves() -> dict[str, Any]:
    return {"host": platform.node(), "machine": _machine(), "process": os.getpid(), "started": _started(os.getpid())}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and no longer does; elsewhere nobody can tell."""
    process = owner.get("process")
    if owner.get("machine") != _machine() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _started(process) != owner.get("started")  # the number was given to another process


@cache
def _machine() -> str:
    """One boot of one machine, and within it one space of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{platform.node()} {uuid.getnode()}"


def _started(process: int) -> str | None:
    """When a process started, by the kernel's count; None for one that has ended, or where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
