"""The committed notebooks: paired by jupytext, with outputs, in order, with the frame of every chapter."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

pytest.importorskip("jupytext")
from jupytext.cli import jupytext as jupytext_command

from book.pipeline import chapters, checks, layout

TWINS = layout.twins()
EXPERIMENTS = {path.stem for path in (layout.ROOT / "book" / "results").glob("*.parquet") if "13_" not in path.stem} | {
    "26_fair"
}
each_twin = pytest.mark.parametrize("twin", TWINS, ids=[twin.stem for twin in TWINS])


def test_every_twin_has_its_notebook() -> None:
    assert checks.unpaired() == []


@each_twin
def test_notebook_agrees_with_its_twin(twin: Path) -> None:
    assert checks.out_of_step(twin) == []


@each_twin
def test_frame_of_a_chapter(twin: Path) -> None:
    text = twin.read_text()
    for part in ("**After this chapter you can**", "**You need**", "**Time**", "## Exercises", "## Take away"):
        assert part in text, part
    assert "## Further reading" in text
    assert text.count("{admonition} Exercise") >= 3
    assert text.count("{dropdown} Solution") >= 3
    assert re.search(r"\bbegin\(\s*profile\b", text)


@each_twin
def test_parameters_cell(twin: Path) -> None:
    notebook = chapters.read(twin)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    expected = 'profile = "smoke"\nrecords = "committed"' if twin.stem in EXPERIMENTS else 'profile = "smoke"'
    assert [cell.source for cell in tagged] == [expected]
    code = "\n".join(cell.source for cell in chapters.code_cells(notebook))
    assert all(re.search(rf"\b{profile}\b", code) for profile in layout.PROFILES)


@each_twin
def test_cells_fit_on_the_page(twin: Path) -> None:
    for number, cell in enumerate(chapters.read(twin).cells):
        if cell.cell_type == "code" and "remove-cell" not in cell.metadata.get("tags", []):
            lines = cell.source.split("\n")
            assert len(lines) <= 15, (number, len(lines), lines[0])
            assert max(map(len, lines)) <= 88, (number, max(lines, key=len))


@each_twin
def test_committed_notebook_has_no_trace_of_the_machine(twin: Path) -> None:
    assert not re.search(r"/(home|root|work|tmp|Users)/", twin.with_suffix(".ipynb").read_text())
    assert ":::" not in (layout.COLAB / f"{twin.stem}.ipynb").read_text()


@pytest.mark.parametrize("saved_last", [".md", ".ipynb"])
def test_jupytext_finds_nothing_to_do(saved_last: str, tmp_path: Path) -> None:
    """Whichever half was saved last, as in JupyterLab; with the settings of the project and nothing else."""
    names = [path for twin in TWINS for path in (twin, twin.with_suffix(".ipynb"))]
    (tmp_path / "notebooks").mkdir()
    shutil.copy(layout.ROOT / "pyproject.toml", tmp_path)
    for path in names:
        copied = tmp_path / "notebooks" / path.name
        shutil.copy(path, copied)
        age = 0 if path.suffix == saved_last else 100
        os.utime(copied, (1e9 - age, 1e9 - age))
    assert jupytext_command(["--sync", "--quiet", *(str(tmp_path / "notebooks" / twin.name) for twin in TWINS)]) == 0
    for path in names:
        assert (tmp_path / "notebooks" / path.name).read_bytes() == path.read_bytes(), path.name


def test_either_half_may_be_edited(tmp_path: Path) -> None:
    """An edit of one half reaches the other, and the outputs stay."""
    text, notebook = (tmp_path / "notebooks" / f"{TWINS[0].stem}{suffix}" for suffix in (".md", ".ipynb"))
    text.parent.mkdir()
    for path in (layout.ROOT / "pyproject.toml", TWINS[0], TWINS[0].with_suffix(".ipynb")):
        shutil.copy(path, text.parent if path.parent == layout.NOTEBOOKS else tmp_path)
    before = chapters.code_cells(nbformat.read(notebook, as_version=4))
    text.write_text(text.read_text().replace("**You need**", "**You certainly need**"))
    os.utime(notebook, (1e9, 1e9))
    assert jupytext_command(["--sync", "--quiet", str(text)]) == 0
    edited = nbformat.read(notebook, as_version=4)
    (cell,) = (cell for cell in edited.cells if "**You certainly need**" in cell.source)
    assert [cell.outputs for cell in chapters.code_cells(edited)] == [cell.outputs for cell in before]
    cell.source = cell.source.replace("certainly", "surely")
    nbformat.write(edited, notebook)
    os.utime(text, (1e9, 1e9))
    assert jupytext_command(["--sync", "--quiet", str(notebook)]) == 0
    assert "**You surely need**" in text.read_text()


@pytest.mark.skipif(not TWINS, reason="no chapter yet")
def test_a_difference_is_found() -> None:
    twin = TWINS[0]
    good = nbformat.read(twin.with_suffix(".ipynb"), as_version=4)
    assert checks.out_of_step(twin, good) == []
    text = copy.deepcopy(good)
    text.cells[0].source += " More."
    assert "differs from its twin" in checks.out_of_step(twin, text)[0]
    assert "is not what notebooks/" in checks.out_of_step(twin, text)[1]
    empty = copy.deepcopy(good)
    shown = [cell for cell in chapters.code_cells(empty) if cell.outputs]
    shown[-1].outputs = []
    order = copy.deepcopy(good)
    chapters.code_cells(order)[1].execution_count = 7
    assert any("no output" in line for line in checks.out_of_step(twin, empty))
    assert any("execution count" in line for line in checks.out_of_step(twin, order))


def test_numbers_in_a_table_stay_on_one_line() -> None:
    from topk_lab import page

    assert page._cell("61.24 ± 0.11") == "61.24\u00a0±\u00a00.11"
    assert page._cell("3 of 4 runs") == "3 of 4 runs"
    assert page._cell("learning rate 0.1") == "learning rate 0.1"
    assert page._cell(0.12345) == "0.123"


@pytest.mark.parametrize("cores", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_chapter_that_was_killed_goes_on_and_does_nothing_twice(tmp_path: Path, cores: int) -> None:
    """`papermill CHAPTER OUT -p profile smoke -p records run`, killed between two of its runs, and again to its end.

    On one core the kernel itself does the runs, on two its workers do.
    """
    own = sorted(os.sched_getaffinity(0))[:cores]
    chapter, scratch = "16_little_data", tmp_path / "runs" / "16_little_data"
    notebook = layout.ROOT / "notebooks" / f"{chapter}.ipynb"
    call = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "-k", "python3"]
    call += ["-p", "profile", "smoke", "-p", "records", "run"]
    paths = os.pathsep.join(map(str, (layout.ROOT, layout.ROOT / "lab")))
    environment = os.environ | {"PYTHONPATH": paths, "TOPK_RUNS": str(scratch.parent), "OMP_NUM_THREADS": "1"}
    where: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stderr": subprocess.DEVNULL}
    where["preexec_fn"] = functools.partial(os.sched_setaffinity, 0, own)
    with subprocess.Popen(call, **where) as first:
        while len(list(scratch.glob("*.json"))) < 3:
            assert first.poll() is None
            time.sleep(0.05)
        for process in [first, *psutil.Process(first.pid).children(recursive=True)]:  # the kernel and its workers
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    before = {path: path.stat().st_mtime_ns for path in scratch.glob("*.json")}
    subprocess.run(call, **where, timeout=400, check=True)
    asked = 2 * 10 + 5 * 10 * 2  # candidates x contenders, then shares of the images x contenders x seeds
    assert 3 <= len(before) < asked == len(list(scratch.glob("*.json")))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(scratch.glob("work/*"))
    page = (tmp_path / "out.ipynb").read_text()
    assert f"All records of the grid: {asked} records" in page
    assert "Does not hold in this smaller run" in page
