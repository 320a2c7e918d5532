"""The notebooks on Colab: what the set-up cell does there, and one run with a stand-in for Colab's modules."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("jupytext")
from book.pipeline import chapters, layout, times
from topk import backend
from topk_lab import page

BOOK = f"git+{layout.address()}@v{layout.version()}"
PACKAGES = [f"topk-losses @ {BOOK}", f"topk-lab @ {BOOK}#subdirectory=lab"]


def test_setup_cell_installs_this_release_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--no-deps`: pip is given two packages and may touch no other, so Colab's torch stays."""
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(chapters.setup_source(), {})
    assert commands == [[sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES]]


def test_every_notebook_begins_with_the_same_setup_cell() -> None:
    for twin in layout.twins():
        code = chapters.code_cells(chapters.read(twin))
        assert code[0].source == chapters.setup_source()
        assert not any("pip install" in cell.source or "!pip" in cell.source for cell in code[1:]), twin.name


@pytest.fixture
def tesla_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device as Colab lends it for nothing; nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(backend, "_missing_triton", lambda: None)


@pytest.mark.parametrize("complaint", [None, "the hinge kernels give other results"])
def test_notebook_says_what_serves_an_old_gpu(
    complaint: str | None, tesla_t4: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "_self_check", lambda *_: complaint)
    page.begin("smoke")
    said = capsys.readouterr().out
    if complaint is None:
        assert said.endswith("| Tesla T4, losses by Triton kernels\n")
    else:
        assert said.endswith(f"| Tesla T4, losses in plain torch: on cuda:0, of capability 7.5, {complaint}\n")


def test_notebook_says_what_serves_a_new_gpu(
    tesla_t4: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    page.begin("smoke")
    assert capsys.readouterr().out.endswith("| H100, losses by Triton kernels\n")


# --- one run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def colab(tmp_path: Path) -> tuple[Path, Path, dict[str, str]]:
    """An interpreter like Colab's: packages are there but for ours, and `google.colab` is loaded in every kernel.

    The repository's address leads git to a local copy of the release. Returns the interpreter, its packages' folder and
    the environment's variables.
    """
    if shutil.which("git") is None:
        pytest.skip("Colab installs with git; this machine has none")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    site = next((tmp_path / "env").rglob("site-packages"))
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "topk_l" not in path.name and path.suffix != ".pth":
            (borrowed / path.name).symlink_to(path)
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").write_text("")
    start = tmp_path / "ipython" / "profile_default" / "startup"
    start.mkdir(parents=True)
    (start / "00.py").write_text("import google.colab\n")
    variables = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{tmp_path / 'env' / 'bin'}:{os.environ['PATH']}",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{_published(tmp_path).as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": layout.address(),
        "PIP_NO_BUILD_ISOLATION": "false",  # pip's way to say: build with the packages that are here
        "PIP_NO_INDEX": "1",
        "OMP_NUM_THREADS": "1",
    }
    return tmp_path / "env" / "bin" / "python", site, variables


def _published(folder: Path) -> Path:
    """A repository with what the wheels are built from, tagged as the release."""
    source = folder / "published"
    for name in ("topk", "lab", "book/results"):
        shutil.copytree(layout.ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(layout.ROOT / name, source / name)
    someone = "-c user.name=x -c user.email=x@x -c commit.gpgsign=false -c tag.gpgsign=false"
    for command in ("init --quiet", "add .", f"{someone} commit --quiet -m release", f"tag v{layout.version()}"):
        subprocess.run(["git", *shlex.split(command)], cwd=source, check=True)
    return source


def _quickest() -> Path:
    seconds = times.record()["cpu"]["smoke"]
    known = [twin for twin in layout.twins() if twin.stem in seconds and twin.with_suffix(".ipynb").exists()]
    return layout.COLAB / f"{min(known, key=lambda twin: float(seconds[twin.stem])).stem}.ipynb"


@pytest.mark.slow
def test_notebook_runs_on_a_stand_in_for_colab(colab: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    python, site, variables = colab
    alone = tmp_path / "content"
    alone.mkdir()
    shutil.copy(_quickest(), alone / "notebook.ipynb")
    before = {path.name for path in site.iterdir()}
    missing = subprocess.run([python, "-c", "import topk"], cwd=alone, env=variables, capture_output=True, text=True)
    assert "No module named 'topk'" in missing.stderr
    command = [python, "-m", "papermill", "notebook.ipynb", "out.ipynb", "-p", "profile", "smoke", "-k", "python3"]
    run = subprocess.run(command, cwd=alone, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    new = {path.name for path in site.iterdir()} - before
    ours = {f"{name}-{layout.version()}.dist-info" for name in ("topk_losses", "topk_lab")}
    assert new == {"topk", "topk_lab", *ours}, "something beside the book's packages was installed"
    code = "import topk, torch; print(topk.__file__, torch.__file__, sep='\\n')"
    where = subprocess.run([python, "-c", code], cwd=alone, env=variables, capture_output=True, text=True, check=True)
    mine, torchs = where.stdout.splitlines()
    assert mine.startswith(str(site))
    assert torchs.startswith(str(tmp_path / "borrowed")), "torch was replaced"
