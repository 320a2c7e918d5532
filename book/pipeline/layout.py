"""Where things are, and the few facts every part of the pipeline needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
COLAB = ROOT / "colab" / "notebooks"
BUILD = ROOT / "_build"
HTML = BUILD / "html"
STAGE = BUILD / "stage"
EXECUTED = BUILD / "executed"
SCRATCH = BUILD / "scratch"
PDF = BUILD / "topk-book.pdf"
SHEET = BUILD / "topk-cheatsheet.pdf"
RELEASE = BUILD / "release"

PROFILES = ("smoke", "laptop", "full")


class BookError(Exception):
    """Something the author has to mend; the message names the place."""


def twins() -> list[Path]:
    """The text twins, notebooks/NN_name.md, by chapter number."""
    return sorted(path for path in NOTEBOOKS.glob("*.md") if re.match(r"\d\d_", path.name))


def chapter_number(path: Path) -> int:
    """The chapter's number is that of its file: 10_poisson_binomial.md is chapter 10, whatever is written so far."""
    return int(path.name[:2])


def config() -> dict[str, Any]:
    """`_config.yml`; the repository's address lives there and nowhere else by hand."""
    return dict(yaml.safe_load((ROOT / "_config.yml").read_text()))


def address() -> str:
    """The repository's address."""
    return str(config()["repository"]["url"]).rstrip("/")


def version() -> str:
    """The release that book and module share."""
    match = re.search(r'__version__ = "([^"]+)"', (ROOT / "topk" / "version.py").read_text())
    if match is None:
        raise BookError("topk/version.py holds no __version__")
    return match[1]
