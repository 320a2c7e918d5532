"""The committed notebooks: in step with their text twins, with outputs, in order, with the frame of every chapter."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("jupytext")
from book.pipeline import chapters, checks, layout

TWINS = layout.twins()
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
    assert "begin(profile)" in text


@each_twin
def test_parameters_cell(twin: Path) -> None:
    notebook = chapters.read(twin)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in tagged] == ['profile = "smoke"']
    code = "\n".join(cell.source for cell in chapters.code_cells(notebook))
    assert all(f'"{profile}"' in code for profile in layout.PROFILES)


@each_twin
def test_committed_notebook_has_no_trace_of_the_machine(twin: Path) -> None:
    text = twin.with_suffix(".ipynb").read_text()
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    assert ":::" not in text


@pytest.mark.skipif(not TWINS, reason="no chapter yet")
def test_a_difference_is_found() -> None:
    twin = TWINS[0]
    good = nbformat.read(twin.with_suffix(".ipynb"), as_version=4)
    assert checks.out_of_step(twin, good) == []
    text = copy.deepcopy(good)
    text.cells[0].source += " More."
    assert "differs from its twin" in checks.out_of_step(twin, text)[0]
    empty = copy.deepcopy(good)
    shown = [cell for cell in chapters.code_cells(empty) if cell.outputs]
    shown[-1].outputs = []
    order = copy.deepcopy(good)
    chapters.code_cells(order)[1].execution_count = 7
    assert any("no output" in line for line in checks.out_of_step(twin, empty))
    assert any("execution count" in line for line in checks.out_of_step(twin, order))


def test_numbers_in_a_table_stay_on_one_line() -> None:
    from topk.lab import notebook

    assert notebook._cell("61.24 ± 0.11") == "61.24\u00a0±\u00a00.11"
    assert notebook._cell("3 of 4 runs") == "3 of 4 runs"
    assert notebook._cell("learning rate 0.1") == "learning rate 0.1"
    assert notebook._cell(0.12345) == "0.123"
