"""The project's own promises: one list of dependencies, a README that runs, a light import."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXTRAS_FOR_EVERYONE = ("triton", "book", "test", "peers")
OURS = {"topk-losses", "topk-lab"}


def _pyproject(folder: str = ".") -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]


def _wanted() -> set[str]:
    """What `make` installs beside the two distributions of this repository."""
    project = _pyproject()
    extras = (item for extra in EXTRAS_FOR_EVERYONE for item in project["optional-dependencies"][extra])
    return {*project["dependencies"], *extras, *_pyproject("lab")["dependencies"]} - OURS


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def test_environment_equals_pyproject() -> None:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [item["pip"] for item in listed if isinstance(item, dict)]
    assert pip[:2] == ["-e .", "-e lab"]
    assert set(pip[2:]) == _wanted()
    assert f"python{_pyproject()['requires-python']}" in listed


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower() for line in lines if "==" in line}
    names = {re.split(r"[\[<>=!; ]", item, maxsplit=1)[0].lower() for item in _wanted()}
    assert names <= pins, f"constraints.txt lacks {sorted(names - pins)}"


def test_the_two_commands_start_a_line_of_the_readme() -> None:
    lines = README.splitlines()
    assert "make book" in lines
    assert "make test" in lines


def test_import_is_light() -> None:
    """`import topk` brings in neither triton nor the lab."""
    code = "import sys, topk; print([m for m in sys.modules if m.startswith(('triton', 'topk_lab', 'topk.kernels.'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stdout


def test_report_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m topk`."""
    runpy.run_module("topk", run_name="__main__")
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert re.search(r"triton\s+(no: torch sees no CUDA device|cuda:0)", printed)


def test_readme_snippets_run() -> None:
    """Every Python block of the README after the first, which the wheels' test runs."""
    blocks = _blocks("python")
    assert len(blocks) >= 2
    for block in blocks[1:]:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


ARROWS = {
    "topk": (),
    "lab/topk_lab": ("topk",),
    "bench": ("topk", "topk_lab"),  # the lab's timer, so that book and benchmark have one clock
    "book/pipeline": ("topk", "topk_lab", "bench"),
}
"""Which of this repository's packages a folder may import beside itself."""


@pytest.mark.parametrize(("folder", "allowed"), ARROWS.items())
def test_imports_point_one_way(folder: str, allowed: tuple[str, ...]) -> None:
    ours = {"topk", "topk_lab", "bench", "book", "tests", "notebooks"}
    own = {"lab/topk_lab": "topk_lab", "book/pipeline": "book"}.get(folder, folder)
    for path in (ROOT / folder).rglob("*.py"):
        found = re.findall(r"^\s*(?:from|import) ([a-z_]+)[. ]", path.read_text(), flags=re.M)
        assert set(found) & ours <= {own, *allowed}, path


def test_losses_know_nothing_of_what_is_built_on_them() -> None:
    for path in (ROOT / "topk" / "losses").glob("*.py"):
        assert not re.search(r"topk\.(operators|linear|shards|kernels|svm)", "\n".join(_imports(path))), path


def _imports(path: Path) -> list[str]:
    return re.findall(r"^\s*(?:from|import) .*", path.read_text(), flags=re.M)
