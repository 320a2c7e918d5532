"""The imprint and the workflows: one address, one release, a citation that validates, targets that exist."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

pytest.importorskip("jupytext")
from book.pipeline import chapters, imprint, layout, links, picture, times

ROOT = layout.ROOT
GENERATED = {"CITATION.cff", "codemeta.json", ".zenodo.json", "pyproject.toml", "lab/pyproject.toml", "README.md"}
BY_HAND = "_config.yml"
OTHER = "https://github.com/someone-else/another-book"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _text_files(root: Path) -> dict[str, str]:
    """The project's files by their path, but for what is built, environments and records of runs."""
    left_out = {"_build", "build", "dist", "results", "__pycache__", ".git"}
    found = {}
    for path in root.rglob("*"):
        part = path.relative_to(root)
        if left_out & set(part.parts) or part.parts[0].startswith(".venv") or "_cache" in part.parts[0]:
            continue
        if part.parts[0].endswith(".egg-info"):
            continue
        if path.is_file() and path.suffix not in {".png", ".xz", ".npz", ".pyc"} and ".hypothesis" not in part.parts:
            try:
                found[str(part)] = path.read_text()
            except UnicodeDecodeError:
                continue
    return found


def _schema(name: str) -> Any:
    vendor = resources.files("check_jsonschema").joinpath("builtin_schemas", "vendor")
    return json.loads(vendor.joinpath(f"{name}.json").read_text())


# --- the address -----------------------------------------------------------------------------------------------------


def test_generated_places_are_up_to_date() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in imprint.generated().items() if path.read_text() != text]
    assert stale == [], "run `make address`"


def test_nothing_else_holds_the_address() -> None:
    """In words too: owner/name, and the address of the published pages."""
    owner, name = layout.address().split("/")[-2:]
    names = (layout.address(), f"{owner}/{name}", imprint.pages_address())
    for path, text in _text_files(ROOT).items():
        if path in GENERATED | {BY_HAND}:
            continue
        if path.endswith(".ipynb"):
            text = "".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        if path.startswith(("notebooks/", "colab/")):
            text = text.replace(chapters.setup_source(), "")
        assert not any(word in text for word in names), f"{path} names the repository"


@pytest.mark.slow  # writes every chapter anew
def test_another_address_reaches_every_place(tmp_path: Path) -> None:
    """Changed in `_config.yml` alone, then `make address`: the old one is gone from the whole project."""
    copy = tmp_path / "copy"
    for name in (
        "_config.yml",
        "pyproject.toml",
        "README.md",
        "CITATION.cff",
        "codemeta.json",
        ".zenodo.json",
        "paper.md",
        "topk",
        "lab",
        "book",
        "bench",
    ):
        source = ROOT / name
        if source.is_dir():
            records = ["results"] if name == "book" else []
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", *records))
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(source, copy / name)
    (copy / "notebooks").mkdir()
    for path in layout.twins():  # the references between chapters need all texts
        shutil.copy(path, copy / "notebooks")
    first = layout.twins()[0].with_suffix(".ipynb")
    shutil.copy(first, copy / "notebooks")
    config = copy / BY_HAND
    config.write_text(config.read_text().replace(layout.address(), OTHER))
    command = [sys.executable, "-m", "book.pipeline", "address"]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    old, new = layout.address().split("/")[-2:], OTHER.split("/")[-2:]
    texts = _text_files(copy)
    holders = {path for path, text in texts.items() if "/".join(old) in text or f"{old[0]}.github.io" in text}
    assert holders == set()
    notebooks = {f"notebooks/{first.name}", f"colab/notebooks/{first.name}"}
    holders = {path for path, text in texts.items() if "/".join(new) in text}
    assert holders == GENERATED | {BY_HAND} | notebooks | {f"notebooks/{twin.name}" for twin in layout.twins()}
    before = _text_files(copy)
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    assert _text_files(copy) == before


def test_only_an_address_with_pages_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("https://github.com/one", "https://example.org/a/b", "github.com/a/b"):
        monkeypatch.setattr(imprint, "address", lambda wrong=wrong: wrong)
        with pytest.raises(layout.BookError, match=re.escape(wrong)):
            imprint.pages_address()


# --- one release -----------------------------------------------------------------------------------------------------


def test_one_release_everywhere() -> None:
    import topk

    release = layout.version()
    assert topk.__version__ == release
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == release
    assert json.loads((ROOT / "codemeta.json").read_text())["version"] == release
    assert f'"git+{layout.address()}@v{release}"' in chapters.setup_source()
    first = re.search(r"^## (\S+)", (ROOT / "book" / "changelog.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == release, "the changelog's first entry is another release"
    assert "dynamic" in (ROOT / "pyproject.toml").read_text()
    assert f"@v{release}" in (ROOT / "README.md").read_text()


# --- citing ----------------------------------------------------------------------------------------------------------


def test_citation_is_valid() -> None:
    validator = jsonschema.Draft7Validator(_schema("citation-file-format"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert [error.message for error in validator.iter_errors(citation)] == []
    assert len(citation["references"]) == len(imprint.PAPERS)
    assert list(validator.iter_errors({**citation, "license": "no such licence"})) != []


def test_codemeta_is_complete() -> None:
    content = json.loads((ROOT / "codemeta.json").read_text())
    assert content["@context"].startswith("https://w3id.org/codemeta/")
    assert content["license"] == "https://spdx.org/licenses/BSD-3-Clause"
    assert "None" not in json.dumps(content)


def test_bibtex_of_the_book_and_of_the_papers_reads() -> None:
    from pybtex.database import parse_string

    entries = parse_string(f"{imprint.book_entry()}\n\n{imprint.paper_entries()}", "bibtex").entries
    assert set(entries) == {"topkbook", *imprint.PAPERS}
    for key in imprint.PAPERS:
        assert entries[key] == chapters.bibliography()[key]
    book = entries["topkbook"].fields
    assert (book["version"], book["url"]) == (layout.version(), imprint.pages_address())


def test_cite_page_is_filled() -> None:
    from book.pipeline import site

    text = site._filled(ROOT / "book" / "cite.md").decode()
    assert not re.search(r"@[A-Z_]+@", text)
    assert imprint.book_entry() in text
    assert all(f"{{{key}," in text for key in imprint.PAPERS)
    assert imprint.chapter_entries() in text


def test_every_chapter_has_an_entry() -> None:
    from pybtex.database import parse_string

    entries = parse_string(imprint.chapter_entries(), "bibtex").entries
    assert {entry.fields["chapter"] for entry in entries.values()} == {
        str(int(twin.name[:2])) for twin in layout.twins()
    }
    smooth = entries["topkbook-smooth"]
    assert smooth.fields["title"] == "Smooth top-k SVM"
    assert smooth.fields["url"] == f"{imprint.pages_address()}notebooks/06_smooth.html"


def test_zenodo_is_complete() -> None:
    content = json.loads((ROOT / ".zenodo.json").read_text())
    assert {"title", "upload_type", "description", "creators", "license", "version"} <= set(content)
    assert content["upload_type"] == "software"
    assert len(content["related_identifiers"]) == 2 + len(imprint.PAPERS)


def test_paper_has_the_form_the_journal_asks_for() -> None:
    """https://openjournals.readthedocs.io/en/jose/submitting.html: the header, and what a learning module reports."""
    _, header, text = (ROOT / "paper.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(header)
    assert {"title", "tags", "authors", "affiliations", "date", "bibliography"} <= set(fields)
    assert fields["authors"][0]["name"] == layout.config()["author"]
    assert {author["affiliation"] for author in fields["authors"]} <= {
        place["index"] for place in fields["affiliations"]
    }
    headings = re.findall(r"^# (.+)$", text, re.MULTILINE)
    assert headings == [
        "Summary", "Statement of need", "Learning objectives and audience", "Content", "Instructional design",
        "Experience of use", "Story of the project", "References",
    ]  # fmt: skip
    assert len(text.split()) <= 1000
    assert (ROOT / fields["bibliography"]).read_text() == imprint.paper_bibliography()


def test_both_licences_are_named_everywhere() -> None:
    assert "BSD 3-Clause" in (ROOT / "LICENSE").read_text()
    assert "Creative Commons Attribution 4.0 International" in (ROOT / "LICENSE-prose").read_text()
    footer = layout.config()["html"]["extra_footer"]
    for text in (footer, (ROOT / "README.md").read_text(), (ROOT / "book" / "cite.md").read_text()):
        assert "BSD 3-Clause" in text
        assert "Attribution 4.0" in text


# --- the README's picture and times ----------------------------------------------------------------------------------


def test_picture_is_drawn_from_the_record() -> None:
    assert picture.PICTURE.drawn_from() == picture.PICTURE.digest(), "run `make address`"
    pairs = picture.costs()
    assert {"smooth", "transition", "noised", "differentiable", "hinge"} <= set(pairs)
    slowest = max(pair["peer"] / pair["ours"] for pair in pairs.values() if "peer" in pair)
    assert f"to {slowest:.0f} times as long" in (ROOT / "README.md").read_text()


def test_every_notebook_says_how_long_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for twin in layout.twins():
        text = "\n\n".join(chapters.markdown(chapters.read(twin)))
        (sentence,) = (part for part in text.split("\n\n") if part.startswith("**Runs in**"))
        assert "on a CPU" in sentence
    found = {"cpu": {"machine": "a box", "smoke": {"x": 7.2}, "laptop": {"x": 400.0}}}
    monkeypatch.setattr(times, "record", lambda: found)
    assert times.sentence("x").startswith("**Runs in** 10 s (`smoke`), 7 min (`laptop`) on a CPU (a box). ")
    assert "nobody has measured" in times.sentence("y")


def test_a_build_says_beforehand_how_long_its_notebooks_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "this_machine", lambda: ("cpu", "another box"))
    monkeypatch.setattr(times, "record", lambda: {"cpu": {"machine": "a box", "smoke": {"x": 40.0, "y": 180.0}}})
    assert times.expected(["x", "y"], "smoke", 2) == ": about 2 min, 2 at a time"
    assert times.expected(["x"], "smoke", 1) == ": about 40 s, 1 at a time"
    assert times.expected(["x", "new"], "smoke", 2) == times.expected([], "smoke", 1) == ""


def test_times_belong_to_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "RECORD", tmp_path / "times.yml")
    monkeypatch.setattr(times, "this_machine", lambda: ("cpu", "old"))
    times.note("smoke", {"a": 1.0, "b": 2.0})
    times.note("smoke", {"b": 3.0})
    assert times.record() == {"cpu": {"machine": "old", "smoke": {"a": 1.0, "b": 3.0}}}
    monkeypatch.setattr(times, "this_machine", lambda: ("cpu", "new"))
    times.note("laptop", {"a": 9.0})
    assert times.record() == {"cpu": {"machine": "new", "laptop": {"a": 9.0}}}


# --- workflows -------------------------------------------------------------------------------------------------------


def _steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def test_workflows_cover_what_is_promised() -> None:
    assert [path.stem for path in WORKFLOWS] == ["newest", "release", "test"]
    newest = yaml.safe_load(WORKFLOWS[0].read_text())
    timers = [each["cron"] for each in newest[True]["schedule"]]  # YAML 1.1 reads `on` as true
    for job, other in (("links", timers[1]), ("newest", timers[0])):
        assert newest["jobs"][job]["if"] == f"github.event.schedule != '{other}'"


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_workflow_is_valid_and_runs_targets_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    text = {("on" if key is True else key): value for key, value in workflow.items()}  # YAML 1.1 reads `on` as true
    errors = jsonschema.Draft7Validator(_schema("github-workflows")).iter_errors(text)
    assert [error.message for error in errors] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in _steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step["uses"]
        for line in step.get("run", "").strip().splitlines():
            command = re.fullmatch(r"make ([a-z-]+)((?: [A-Z]+=\S+)*)", line.strip())
            assert command is not None, f"{line!r} is no plain make command"
            assert command[1] in targets, line
    assert workflow["permissions"] is not None


def test_release_refuses_another_tag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from book.pipeline import __main__ as commands

    with pytest.raises(layout.BookError, match="the tag must be v"):
        commands.release("v999.0")
    pages, book, sheet, target = (tmp_path / name for name in ("html", "book.pdf", "sheet.pdf", "release"))
    pages.mkdir()
    (pages / "index.html").write_text("a page")
    for path in (book, sheet):
        path.write_bytes(b"%PDF")
    for name, value in (("HTML", pages), ("PDF", book), ("SHEET", sheet), ("RELEASE", target), ("ROOT", ROOT)):
        monkeypatch.setattr(commands, name, value)
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "changelog.md").write_text(f"# Changelog\n\n## {layout.version()}\n")
    commands.release(f"v{layout.version()}")
    number = layout.version()
    assert {path.name for path in target.iterdir()} == {
        f"topk-book-{number}-html.zip", f"book-{number}.pdf", f"sheet-{number}.pdf"
    }  # fmt: skip
    (tmp_path / "book" / "changelog.md").write_text("# Changelog\n\n## 0.0.1\n")
    with pytest.raises(layout.BookError, match=r"begins with 0\.0\.1"):
        commands.release(f"v{layout.version()}")


# --- links that lead out ---------------------------------------------------------------------------------------------


class _Site(http.server.BaseHTTPRequestHandler):
    """/fine answers, /get answers only GET, /moved leads to /fine, /lost does not exist."""

    def do_HEAD(self) -> None:
        self._answer(405 if self.path == "/get" else 200 if self.path == "/fine" else 404)

    def do_GET(self) -> None:
        self._answer(200 if self.path in ("/get", "/fine") else 404)

    def _answer(self, code: int) -> None:
        moved = self.path == "/moved"
        self.send_response(302 if moved else code)
        if moved:
            self.send_header("Location", "/fine")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_dead_links_are_found(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    hrefs = "".join(f'<a href="{root}/{name}#part">x</a>' for name in ("fine", "get", "moved", "lost"))
    (tmp_path / "page.html").write_text(f'{hrefs}<a href="inside.html">y</a>')
    (tmp_path / "TEXT.md").write_text(f"See [here]({root}/gone).")
    found = links.collect(tmp_path, [tmp_path / "TEXT.md", tmp_path / "absent.md"])
    assert found[f"{root}/gone"] == "TEXT.md"
    complaints = links.dead(found, {})
    server.shutdown()
    assert [line.split(": ")[1] for line in complaints] == [f"{root}/gone", f"{root}/lost"]
    assert all("404" in line for line in complaints)
    assert links.dead(found, {root: "here only for a moment"}, ask=lambda _: "never asked") == []
    assert links.dead({}, {"https://nobody/": "why"}) == ["ALLOWED: no link begins with https://nobody/"]


def test_no_answer_is_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "ATTEMPTS", 1)
    assert "refused" in links.answer("http://127.0.0.1:9/")
