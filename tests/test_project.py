"""The project's own promises: one list of dependencies, a README that runs, a wheel that works alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXTRAS_FOR_EVERYONE = ("triton", "lab", "book", "test", "peers")


def _pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def test_environment_equals_pyproject() -> None:
    project = _pyproject()
    expected = set(project["dependencies"])
    for extra in EXTRAS_FOR_EVERYONE:
        expected |= set(project["optional-dependencies"][extra])
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [item["pip"] for item in listed if isinstance(item, dict)]
    assert set(pip) - {"-e ."} == expected
    assert f"python{project['requires-python']}" in listed


def test_constraints_pin_every_dependency() -> None:
    project = _pyproject()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower() for line in lines if "==" in line}
    wanted = [*project["dependencies"]]
    for extra in EXTRAS_FOR_EVERYONE:
        wanted += project["optional-dependencies"][extra]
    names = {re.split(r"[\[<>=!; ]", item, maxsplit=1)[0].lower() for item in wanted}
    assert names <= pins, f"constraints.txt lacks {sorted(names - pins)}"


def test_the_two_commands_start_a_line_of_the_readme() -> None:
    lines = README.splitlines()
    assert "make book" in lines
    assert "make test" in lines


def test_import_is_light() -> None:
    """`import topk` brings in neither triton nor the lab."""
    code = "import sys, topk; print([m for m in sys.modules if m.startswith(('triton', 'topk.lab', 'topk.kernels.'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stdout


def test_report_names_versions_and_backends() -> None:
    done = subprocess.run([sys.executable, "-m", "topk"], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout
    assert re.search(r"triton\s+(no: torch sees no CUDA device|cuda:0)", done.stdout)


def test_readme_snippets_run() -> None:
    """Every Python block of the README after the first, which the wheel's test runs."""
    blocks = _blocks("python")
    assert len(blocks) >= 2
    for block in blocks[1:]:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.fixture(scope="module")
def wheel_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the built wheel; third-party packages are borrowed from this one through a .pth."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, cwd=folder
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _run_alone(python: Path, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)


def test_readme_example_runs_from_the_wheel(wheel_environment: Path, tmp_path: Path) -> None:
    done = _run_alone(wheel_environment, "import topk; print(topk.__file__)", tmp_path)
    assert str(wheel_environment.parent.parent) in done.stdout, "the checkout was imported instead of the wheel"
    example = _blocks("python")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    done = _run_alone(wheel_environment, example, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+)\s+top-1 ([\d.]+)%\s+top-5 ([\d.]+)%", done.stdout, flags=re.M)
    assert len(rows) == 3, done.stdout
    assert all(float(top5) > float(top1) > 5 for _, top1, top5 in rows)


def test_wheel_holds_types_and_every_room(wheel_environment: Path, tmp_path: Path) -> None:
    code = (
        "import topk, pathlib; folder = pathlib.Path(topk.__file__).parent; "
        "print(sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.suffix != '.pyc'))"
    )
    listed = _run_alone(wheel_environment, code, tmp_path).stdout
    assert "'py.typed'" in listed
    for path in (ROOT / "topk").rglob("*.py"):
        assert f"'{path.relative_to(ROOT / 'topk')}'" in listed
