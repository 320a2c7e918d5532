"""The two wheels, built and installed in a new environment: what they hold; README and notebooks need no more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("jupytext")
from book.pipeline import layout

ROOT = layout.ROOT
SOURCES = ("topk", "lab", "book/results", "pyproject.toml", "README.md", "LICENSE")
CHAPTERS = [layout.COLAB / f"{twin.stem}.ipynb" for twin in layout.twins()]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Distribution -> its wheel, built from a copy, so that no earlier build lends it files."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in SOURCES:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    done = subprocess.run([*command, "./source", "./source/lab"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def python(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheels; other packages are borrowed from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.rglob("site-packages"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps"]
    subprocess.run([*pip, "--target", site, *wheels.values()], check=True)
    # A plain line in a .pth file adds the folder without reading the .pth files in it: the editable install stays out.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def run(python: Path, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """From a folder that holds nothing of the project; PATH decides which python a kernel is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_wheels_hold_all_modules_and_types(wheels: dict[str, Path]) -> None:
    assert set(wheels) == {"topk-losses", "topk-lab"}
    for name, folder in (("topk-losses", ROOT / "topk"), ("topk-lab", ROOT / "lab" / "topk_lab")):
        with zipfile.ZipFile(wheels[name]) as wheel:
            held = set(wheel.namelist())
        wanted = {str(path.relative_to(folder.parent)) for path in folder.rglob("*.py")}
        assert wanted | {f"{folder.name}/py.typed"} <= held
        assert {path.split("/")[0] for path in held if ".dist-info/" not in path} == {folder.name}


def test_the_module_is_small(wheels: dict[str, Path]) -> None:
    """What people install into their own training, in megabytes."""
    assert wheels["topk-losses"].stat().st_size <= 0.3e6


def test_wheels_have_one_release(wheels: dict[str, Path]) -> None:
    assert {path.name.split("-")[1] for path in wheels.values()} == {layout.version()}


def test_readme_example_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    example = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.S | re.M)[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    where = "import topk, topk_lab; print(topk.__file__, topk_lab.__file__)"
    done = run(python, "-c", f"{example}\n{where}\n", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(python.parents[1])) == 2, f"the checkout was imported instead: {done.stdout}"
    rows = re.findall(r"^(\w+)\s+top-1 ([\d.]+)%\s+top-5 ([\d.]+)%", done.stdout, flags=re.M)
    assert len(rows) == 3, done.stdout
    assert all(float(top5) > float(top1) > 5 for _, top1, top5 in rows)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_notebook_runs_alone(notebook: Path, python: Path, tmp_path: Path) -> None:
    """Colab's notebook, copied into an empty folder, with nothing but the two wheels."""
    shutil.copy(notebook, tmp_path / "alone.ipynb")
    papermill = ("-m", "papermill", "alone.ipynb", "out.ipynb", "-p", "profile", "smoke", "-k", "python3")
    done = run(python, *papermill, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
