"""A notebook copied alone into an empty folder runs with nothing but the installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("jupytext")
from book.pipeline import layout

TWINS = layout.twins()


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the built wheel; other packages come from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = ("topk", "pyproject.toml", "README.md", "LICENSE")
    for name in names:
        path = layout.ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(path, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], capture_output=True, text=True
    )
    if build.returncode and "setuptools" in build.stderr:
        build = subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, source], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    site = next((folder / "env").rglob("site-packages"))
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *folder.glob("*.whl")], check=True)
    # A plain line in a .pth file adds the folder without reading the .pth files in it: the editable install stays out.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS, ids=[twin.stem for twin in TWINS])
def test_notebook_runs_alone(twin: Path, fresh_python: Path, tmp_path: Path) -> None:
    shutil.copy(twin.with_suffix(".ipynb"), tmp_path / "alone.ipynb")
    # From the folder and with the interpreter of the new environment; PATH decides which python the kernel is.
    env = {
        **os.environ,
        "PATH": f"{fresh_python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": "",
        "OMP_NUM_THREADS": "1",
    }
    where = subprocess.run(
        [fresh_python, "-c", "import topk; print(topk.__file__)"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert str(fresh_python.parents[1]) in where.stdout, where.stderr
    run = subprocess.run(
        [fresh_python, "-m", "papermill", "alone.ipynb", "out.ipynb", "-p", "profile", "smoke", "-k", "python3"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
