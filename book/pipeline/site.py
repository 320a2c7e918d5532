"""Stages the book under `_build/` and builds it strictly; no tracked file changes.

The stage holds the prose pages, the notebooks with their outputs, the generated pages and a `_config.yml` with what
only this machine knows.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode

from book.pipeline import front, imprint, pages, picture, pictures
from book.pipeline.chapters import plain, with_outputs
from book.pipeline.execute import surroundings
from book.pipeline.layout import BUILD, HTML, ROOT, STAGE, BookError, address, chapter_number, config, twins, version

_DOCTREES = BUILD / ".doctrees"
_CLEAN = BUILD / "clean"  # what the last build without complaints was made of
_FRONT = HTML / "book" / "preface.html"
_KEPT_SUFFIXES = {".md", ".bib", ".css", ".js", ".svg", ".png", ".py"}


def build(outputs: dict[str, NotebookNode]) -> Path:
    """The site from these outputs (by stem); returns the front page. Raises BookError with Sphinx's complaints.

    Always all pages or none: Sphinx warns only about pages it reads again, and every page shows the contents.
    """
    key = _stage(outputs)
    if _CLEAN.exists() and _CLEAN.read_text() == key and _FRONT.exists():
        print("pages: unchanged", flush=True)
        return _FRONT
    _CLEAN.unlink(missing_ok=True)
    for folder in (_DOCTREES, BUILD / "jupyter_execute", HTML):
        shutil.rmtree(folder, ignore_errors=True)
    complaints = _run_sphinx()
    if complaints:
        raise BookError("\n".join(complaints))
    pictures.size(HTML)
    _plain_downloads(outputs)
    _CLEAN.write_text(key)
    return _FRONT


def _run_sphinx() -> list[str]:
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(STAGE)]
    process = subprocess.Popen(
        [*command, "--path-output", str(ROOT), "-n", "-W", "--keep-going"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(_uncoloured(line.rstrip()))
        if re.match(r"(reading sources|writing output)\.\.\. \[|build (succeeded|finished)", lines[-1]):
            print(f"  {lines[-1][:100]}", flush=True)
    code = process.wait()
    (BUILD / "sphinx.log").write_text("\n".join(lines))
    complaints = [_in_words(line) for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)]
    return complaints or ([] if code == 0 else lines[-30:])


def _uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _in_words(line: str) -> str:
    """MyST-NB numbers lines as 10000 x cell + line: say which cell that is."""
    line = line.replace(f"{STAGE}/", "")

    def cell(match: re.Match[str]) -> str:
        number = int(match[2])
        return f"{match[1]}, cell {number // 10000}, line {number % 10000}"

    return re.sub(r"(notebooks/\w+\.ipynb):(\d{5,})", cell, line)


# --- the stage -------------------------------------------------------------------------------------------------------


def _stage(outputs: dict[str, NotebookNode]) -> str:
    """Writes the stage; returns a digest of all that the pages depend on."""
    wanted: dict[Path, bytes] = {Path("_toc.yml"): (ROOT / "_toc.yml").read_bytes()}
    wanted[Path("_config.yml")] = yaml.safe_dump(_staged_config(), sort_keys=False).encode()
    for path in (ROOT / "book").rglob("*"):
        part = path.relative_to(ROOT)
        if path.is_file() and path.suffix in _KEPT_SUFFIXES and "pipeline" not in part.parts:
            wanted[part] = _filled(path)
    notebooks = {}
    for twin in twins():
        notebook = notebooks[twin.stem] = with_outputs(twin, outputs[twin.stem])
        _dress(notebook)
        pictures.lighten(notebook)
        wanted[Path("notebooks") / f"{twin.stem}.ipynb"] = nbformat.writes(notebook).encode()
    for name, text in pages.generated(notebooks).items():
        wanted[Path("book") / name] = text.encode()
    for path in [path for path in STAGE.rglob("*") if path.is_file()]:
        if path.relative_to(STAGE) not in wanted:
            path.unlink()
    for part, content in wanted.items():
        path = STAGE / part
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    digest = hashlib.sha256(surroundings())
    for part in sorted(wanted):
        digest.update(f"{part}\0".encode() + wanted[part])
    return digest.hexdigest()


def _filled(path: Path) -> bytes:
    """A page, with address, release, BibTeX, measured costs and the front page's figure where it asks for them."""
    content = path.read_bytes()
    if path.suffix != ".md":
        return content
    parts = {"ADDRESS": address, "VERSION": version, "BOOK_ENTRY": imprint.book_entry, "PAPERS": imprint.paper_entries}
    parts |= {"FRONT": front.element, "CHAPTERS": imprint.chapter_entries}
    parts |= {f"COST_{family.upper()}": functools.partial(picture.cost, family) for family in picture.FAMILIES}
    for name, part in parts.items():
        if f"@{name}@".encode() in content:
            content = content.replace(f"@{name}@".encode(), part().encode())
    return content


def _staged_config() -> dict[str, object]:
    staged = config()
    staged["html"]["baseurl"] = imprint.pages_address()
    versions = f'<p>Version {version()}; <a href="{address()}/releases">all versions</a>, with pages and PDF.</p>'
    staged["html"]["extra_footer"] += versions
    return staged


def _dress(notebook: NotebookNode) -> None:
    """Tells MyST-NB what a page shows: the words of pictures, and no call above the code it prints."""
    for cell in notebook.cells:
        about: dict[str, Any] = {}
        for output in cell.get("outputs", []):
            picture = output.get("metadata", {}).get("image/png", {})
            if "alt" in picture:
                about["image"] = {"alt": picture["alt"], **({"classes": "field"} if picture.get("field") else {})}
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and not tags and _PRINTS_CODE.fullmatch(cell.source):
            cell.metadata["tags"] = ["remove-input"]
        if about:
            cell.metadata["mystnb"] = about


_PRINTS_CODE = re.compile(r"source\([^()]*\)\s*")


def _plain_downloads(outputs: dict[str, NotebookNode]) -> None:
    """The notebooks that pages offer for download are the plain ones."""
    for twin in twins():
        target = HTML / "_sources" / "notebooks" / f"{twin.stem}.ipynb"
        if target.exists():
            nbformat.write(plain(with_outputs(twin, outputs[twin.stem]), chapter_number(twin)), target)


def weights() -> dict[str, int]:
    """Bytes of every page, gzipped, with the pictures it shows; the theme's files and MathJax not counted."""
    found = {}
    for page in sorted(HTML.rglob("*.html")):
        text = page.read_text(errors="replace")
        total = len(gzip.compress(text.encode()))
        for source in set(re.findall(r'src="([^":]+\.(?:png|svg|jpe?g))"', text)):
            picture = (page.parent / source).resolve()
            total += picture.stat().st_size if picture.exists() else 0
        found[str(page.relative_to(HTML))] = total
    return found


def committed() -> dict[str, NotebookNode]:
    """The committed notebooks, by stem."""
    return {twin.stem: nbformat.read(twin.with_suffix(".ipynb"), as_version=4) for twin in twins()}


def describe(page: Path) -> str:
    """What is printed at the end."""
    heaviest = max(weights().items(), key=lambda item: item[1])
    return f"heaviest page: {heaviest[0]}, {heaviest[1] / 1000:.0f} kB gzipped\n\nfront page: {page.as_uri()}"
