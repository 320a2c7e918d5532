"""CONTRIBUTING.md: its worked example, applied to a copy of the project, fulfils the contract; its paths exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
_STEP = re.compile(
    r"^\*\*`([^`]+)`\*\*, (a new file|below)(?: `([^`]+)`)?:\n\n```python\n(.*?)^```",
    re.MULTILINE | re.DOTALL,
)


def _apply(copy: Path) -> list[str]:
    """Follows the example in a copy of the project; returns the files it touched."""
    touched = []
    for name, how, anchor, code in _STEP.findall(TEXT):
        path = copy / name
        touched.append(name)
        if how == "a new file":
            assert not path.exists(), f"{name} is there already"
            path.write_text(code)
            continue
        text, line = path.read_text(), f"{anchor}\n"
        assert text.count(line) == 1, f"{anchor!r} stands {text.count(line)} times in {name}"
        path.write_text(text.replace(line, line + code))
    return touched


IN_THE_COPY = """
import topk

def test_logistic_is_that_of_this_copy():
    assert topk.__file__.startswith({!r})
    assert topk.topk_logistic_loss
"""


@pytest.mark.parametrize(
    ("chosen", "least"), [("not compiles", 21), pytest.param("compiles", 1, marks=pytest.mark.slow)]
)
def test_worked_example_fulfils_the_contract(tmp_path: Path, chosen: str, least: int) -> None:
    for name in ("topk", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "shipped"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    touched = _apply(tmp_path)
    assert touched == ["topk/losses/logistic.py", "topk/__init__.py", "tests/contract.py", "tests/test_logistic.py"]
    (tmp_path / "tests" / "test_copy.py").write_text(IN_THE_COPY.format(str(tmp_path)))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    call += [f"tests/test_{name}.py" for name in ("contract", "logistic", "copy")]
    run = subprocess.run(
        [*call, "-k", f"logistic and {chosen}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    counted = re.search(r"(\d+) passed", run.stdout)
    assert counted is not None
    assert int(counted[1]) >= least, run.stdout[-500:]


def test_worked_example_is_clean(tmp_path: Path) -> None:
    """ruff finds nothing to say about the new files."""
    shutil.copytree(ROOT / "topk" / "losses", tmp_path / "topk" / "losses")
    shutil.copy(ROOT / "topk" / "__init__.py", tmp_path / "topk")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, how, _, code in _STEP.findall(TEXT):
        if how == "a new file":
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_text(code)
            for command in (["check"], ["format", "--check"]):
                done = subprocess.run(
                    [sys.executable, "-m", "ruff", *command, name], cwd=tmp_path, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stdout + done.stderr


def test_files_and_targets_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", TEXT)) <= targets
    before_example = TEXT[: TEXT.index("### A worked example")]
    for path in re.findall(r"`([\w./-]+\.(?:py|yml|bib|md))`", before_example):
        if "N" not in Path(path).stem.replace("README", ""):
            assert (ROOT / path).exists(), path
