"""A run that is a notebook: papermill executes it with the run's parameters, and the notebook gives its result back.

Somewhere the notebook calls `give(result)` with a mapping like that of `topk.lab.training.train`; what it leaves out is
filled in. The result travels in the executed notebook as an output of a type of its own, so no path is agreed on.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MIME = "application/vnd.topk.result+json"


def give(result: Mapping[str, Any]) -> None:
    """Called in the notebook: what its run's record will hold. The last call counts.

    Args:
        result: ``final`` {metric: number} and, where they make sense, ``epochs``, ``data_fingerprint``, ``parameters``.
    """
    from IPython.display import display

    from topk.lab.records import plain

    final = ", ".join(f"{name} {value:.4g}" for name, value in result["final"].items() if isinstance(value, float))
    display({MIME: plain(result, "result"), "text/plain": f"result: {final}"}, raw=True)  # type: ignore[no-untyped-call]


def parameters_of(notebook: Path) -> set[str]:
    """The names in the notebook's cell tagged `parameters`."""
    from papermill import inspect_notebook

    return set(inspect_notebook(str(notebook)))


def run_notebook(notebook: Path, parameters: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Executes a notebook in a folder (a temporary one when None) and returns what it gave.

    The executed copy, `executed.ipynb`, shows how far a run came that failed.
    """
    import papermill

    with tempfile.TemporaryDirectory() as temporary:
        place = (folder or Path(temporary)).resolve()
        began = time.monotonic()
        executed = papermill.execute_notebook(
            str(notebook),
            str(place / "executed.ipynb"),
            parameters=dict(parameters),
            cwd=str(place),
            progress_bar=False,
            log_output=True,
        )
        seconds = time.monotonic() - began
    found = [
        output["data"][MIME]
        for cell in executed.cells
        for output in cell.get("outputs", ())
        if MIME in output.get("data", {})
    ]
    if not found:
        raise ValueError(f"{notebook.name} gave no result: it must call topk.lab.notebook_runs.give(result)")
    code = "\0".join(cell.source for cell in executed.cells if cell.cell_type == "code")
    usual: dict[str, Any] = {"epochs": [], "final": {}, "data_fingerprint": None, "parameters": None}
    return {**usual, "seconds": seconds, **found[-1], "code": hashlib.sha256(code.encode()).hexdigest()[:20]}
