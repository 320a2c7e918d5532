"""A run's state on disk: written so that a kill at any moment leaves a whole file, read so that nothing is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["NAME", "VERSION", "read", "write", "write_log"]

VERSION = 1
NAME = "checkpoint.pt"


def write(folder: Path, state: Mapping[str, Any], run: str) -> None:
    """Replaces the folder's checkpoint in one step; `run` says which run it belongs to, see `read`."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{NAME}.{os.getpid()}"
    try:
        with new.open("wb") as file:
            torch.save({"version": VERSION, "run": run, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, folder / NAME)
    finally:
        new.unlink(missing_ok=True)


def read(folder: Path, run: str) -> dict[str, Any] | None:
    """The state that was last written, or None; a checkpoint of another run or version is refused."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version, owner = state.pop("version"), state.pop("run")
    except Exception as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error}); remove it to start this run anew") from error
    if version != VERSION:
        raise ValueError(f"checkpoint {path} has version {version!r}, expected {VERSION}; remove it to start anew")
    if owner != run:
        raise ValueError(
            f"checkpoint {path} belongs to a run with other settings or data; give this run its own folder"
        )
    return dict(state)


def write_log(folder: Path, epochs: Sequence[Mapping[str, Any]]) -> None:
    """log.jsonl, one line an epoch: written whole every time, so that it never holds an epoch twice."""
    new = folder / f".log.{os.getpid()}"
    new.write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs), encoding="utf-8")
    os.replace(new, folder / "log.jsonl")
