"""Runs notebooks with papermill, each alone in an empty folder, and remembers what ran.

The cache's key covers what an output can depend on: the code of the notebook, every file of `topk/`, and the versions
of Python and of the packages. Editing prose runs nothing again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from book.pipeline import times
from book.pipeline.chapters import code_cells, read
from book.pipeline.checks import broken_cells
from book.pipeline.layout import EXECUTED, ROOT, SCRATCH, BookError

PACKAGES = ("torch", "triton", "numpy", "scipy", "matplotlib", "pandas", "ipykernel", "papermill", "jupyter-book")


CELL_SECONDS = {"smoke": 300, "laptop": 1200}
"""A cell that takes longer has hung."""


def versions() -> dict[str, str]:
    """Versions of what a notebook's outputs depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def surroundings() -> bytes:
    """A digest of both packages' files, the records and the versions: outputs and API pages depend on them."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    folders = (ROOT / "topk", ROOT / "lab" / "topk_lab", ROOT / "book" / "results")
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.digest()


def key(notebook: NotebookNode, profile: str) -> str:
    """Equal keys, equal outputs."""
    code = json.dumps([cell.source for cell in code_cells(notebook)])
    return hashlib.sha256(surroundings() + f"{profile}\0{code}".encode()).hexdigest()[:16]


def run_all(chosen: Iterable[Path], profile: str, jobs: int, *, fresh: bool = False) -> dict[str, NotebookNode]:
    """Executed notebooks by stem; those the cache holds run only if `fresh`. Raises BookError naming failed cells."""
    results: dict[str, NotebookNode] = {}
    todo: dict[str, Path] = {}
    for twin in chosen:
        cached = EXECUTED / f"{twin.stem}.{profile}.{key(read(twin), profile)}.ipynb"
        if cached.exists() and not fresh:
            results[twin.stem] = nbformat.read(cached, as_version=4)
        else:
            todo[twin.stem] = cached
    jobs = max(1, min(jobs, len(todo)))
    length = times.expected(todo, profile, jobs)
    print(f"notebooks: {len(results)} unchanged, {len(todo)} to run under the {profile} profile{length}", flush=True)
    complaints: list[str] = []
    with _alone(), ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_run_one, stem, profile, jobs): stem for stem in todo}
        for done, future in enumerate(as_completed(running), 1):
            stem = running[future]
            executed, failures = future.result()
            seconds = executed.metadata["run"]["seconds"]
            print(f"  [{done}/{len(todo)}] {stem}: {'FAILED' if failures else 'done'} in {seconds:.1f} s", flush=True)
            complaints += failures
            if not failures:
                _store(executed, todo[stem])
                results[stem] = executed
    if complaints:
        raise BookError("\n".join(complaints))
    return results


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One run at a time: two would take each other's files."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with (SCRATCH / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BookError("notebooks are being run here by another process: wait for it or stop it") from None
        yield


def _store(executed: NotebookNode, path: Path) -> None:
    EXECUTED.mkdir(parents=True, exist_ok=True)
    stem, profile = path.name.split(".")[:2]
    for old in EXECUTED.glob(f"{stem}.{profile}.*"):
        old.unlink()
    partial = path.with_suffix(".part")
    nbformat.write(executed, partial)
    partial.replace(path)


def _run_one(stem: str, profile: str, jobs: int) -> tuple[NotebookNode, list[str]]:
    """In a worker process: the executed notebook, without the cell that papermill adds, and what went wrong."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    # papermill reads the environment at import
    from papermill.exceptions import PapermillExecutionError
    from papermill.execute import execute_notebook

    folder = SCRATCH / stem
    shutil.rmtree(folder, ignore_errors=True)
    empty = folder / "empty"
    empty.mkdir(parents=True)
    source = read(ROOT / "notebooks" / f"{stem}.md")
    nbformat.write(source, folder / "in.ipynb")
    print(f"  {stem} ...", flush=True)
    log = os.open(folder / "kernel.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)  # what kernels say about themselves is no part of the progress
    start = time.perf_counter()
    failures = []
    try:
        execute_notebook(
            str(folder / "in.ipynb"),
            str(folder / "out.ipynb"),
            parameters={"profile": profile},
            cwd=str(empty),
            progress_bar=False,
            kernel_name="python3",
            execution_timeout=CELL_SECONDS.get(profile),
        )
    except PapermillExecutionError:
        pass  # the error is an output of its cell, which broken_cells names
    except Exception as error:  # the kernel died or never came up
        failures.append(f"notebooks/{stem}.md: {type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    ran = folder / ("out.ipynb" if (folder / "out.ipynb").exists() else "in.ipynb")
    executed = _without_papermill(nbformat.read(ran, as_version=4), source)
    executed.metadata["run"] = {
        "profile": profile,
        "seconds": round(seconds, 1),
        "machine": times.this_machine()[1],
        "versions": versions(),
    }
    return executed, failures + _first_failures(stem, executed)


def _first_failures(stem: str, executed: NotebookNode) -> list[str]:
    """After a failed cell nothing runs: that cell is the message, not the silence of the others."""
    complaints = broken_cells(f"notebooks/{stem}.md", executed)
    if not any(output.output_type == "error" for cell in code_cells(executed) for output in cell.outputs):
        return complaints
    return [line for line in complaints if "execution count" not in line and "no output" not in line]


def _without_papermill(executed: NotebookNode, source: NotebookNode) -> NotebookNode:
    """Drops the injected cell and what papermill noted, so that inputs equal the twin's and counts run from 1."""
    cells = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    cells = [cell for cell in cells if not {"papermill-error-cell-tag"} & set(cell.metadata.get("tags", []))]
    count = 0
    for cell, original in zip(cells, source.cells, strict=True):
        cell.metadata, cell.source, cell["id"] = original.metadata, original.source, original["id"]
        if cell.cell_type == "code" and cell.execution_count is not None:
            count += 1
            cell.execution_count = count
            cell.outputs = _joined(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    executed.cells, executed.metadata = cells, nbformat.from_dict(source.metadata)
    return executed


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Printed text in one piece: how the kernel cuts it depends on the moment."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined
