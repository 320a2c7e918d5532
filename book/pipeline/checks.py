"""What is wrong with a notebook: errors, warnings, missing outputs, and halves of a pair that differ."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
from jupytext.compare import NotebookDifference, compare_notebooks
from nbformat import NotebookNode

from book.pipeline.chapters import code_cells, plain, read
from book.pipeline.layout import COLAB, NOTEBOOKS, chapter_number, twins

_IMAGES = ("image/png", "image/svg+xml", "image/jpeg")


def place(name: str, notebook: NotebookNode, cell: NotebookNode) -> str:
    """How a message names a cell: by its number and its first line."""
    lines = cell.source.strip().split("\n")
    return f"{name}, cell {notebook.cells.index(cell) + 1} ({lines[0][:60]})"


def broken_cells(name: str, notebook: NotebookNode) -> list[str]:
    """Cells that failed, warned, did not run, or show nothing although their last line is there to show something."""
    complaints = []
    for count, cell in enumerate(code_cells(notebook), 1):
        where = place(name, notebook, cell)
        if cell.execution_count != count:
            complaints.append(f"{where}: execution count {cell.execution_count}, expected {count}")
        complaints += [f"{where}: {problem}" for problem in _output_problems(cell)]
        if not cell.outputs and _shows_something(cell.source):
            complaints.append(f"{where}: no output")
    return complaints


def _output_problems(cell: NotebookNode) -> list[str]:
    problems = []
    for output in cell.outputs:
        if output.output_type == "error":
            problems.append(f"{output.ename}: {output.evalue}")
        elif output.output_type == "stream":
            if output.name == "stderr":
                problems.append(f"a warning: {output.text.strip()[:300]}")
            elif not output.text.strip():
                problems.append("an empty output")
        elif not any(str(value).strip() for value in output.data.values()):
            problems.append("an empty output")
        elif any(kind in output.data for kind in _IMAGES) and not _alternative_text(output):
            problems.append("a picture without alternative text (use topk_lab.figures)")
    return problems


def _alternative_text(output: NotebookNode) -> str:
    return next((output.metadata.get(kind, {}).get("alt", "") for kind in _IMAGES if kind in output.data), "")


def _shows_something(source: str) -> bool:
    """Whether the cell ends in an expression rather than a definition, an assignment or an assertion."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return True
    return bool(body) and isinstance(body[-1], ast.Expr)


def unpaired() -> list[str]:
    """Twins without a notebook and notebooks without a twin."""
    texts, notebooks = {path.stem for path in twins()}, {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    return [f"notebooks/{name}.ipynb is missing: run `make notebooks`" for name in sorted(texts - notebooks)] + [
        f"notebooks/{name}.md, its text twin, is missing" for name in sorted(notebooks - texts)
    ]


def out_of_step(twin: Path, notebook: NotebookNode | None = None) -> list[str]:
    """Differences between the halves of a pair and Colab's notebook, and what is wrong with the outputs."""
    name = f"notebooks/{twin.stem}.ipynb"
    notebook = notebook or nbformat.read(twin.with_suffix(".ipynb"), as_version=4)
    complaints = []
    try:
        compare_notebooks(notebook, read(twin), fmt="md:myst")
    except NotebookDifference as difference:
        complaints.append(f"{name} differs from its twin, run `make notebooks`: {difference}")
    published = COLAB / f"{twin.stem}.ipynb"
    if not published.exists() or nbformat.read(published, as_version=4) != plain(notebook, chapter_number(twin)):
        complaints.append(f"colab/{name} is not what {name} says: run `make address`")
    return complaints + broken_cells(name, notebook)


def problems() -> list[str]:
    """Everything wrong with the committed notebooks."""
    complaints = unpaired()
    for twin in twins():
        if twin.with_suffix(".ipynb").exists():
            complaints += out_of_step(twin)
    return complaints
