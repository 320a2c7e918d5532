"""`python -m book.pipeline COMMAND`: what the Makefile's book targets run."""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import re
import shutil
import sys
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path

import nbformat

from book.pipeline import checks, evidence, execute, front, imprint, picture, site, times
from book.pipeline.chapters import commit, refresh, with_outputs
from book.pipeline.layout import HTML, PDF, PROFILES, RELEASE, ROOT, SHEET, BookError, twins, version


def build(profile: str, jobs: int) -> None:
    """Runs what changed and builds the site; tracked files stay as they are."""
    start = time.perf_counter()
    outputs = execute.run_all(twins(), profile, jobs)
    print(f"notebooks ready after {time.perf_counter() - start:.0f} s; building the pages", flush=True)
    page = site.build(outputs)
    print(f"built in {time.perf_counter() - start:.0f} s; {site.describe(page)}")


def build_site() -> None:
    """The site from the committed outputs; nothing runs."""
    check()
    print(site.describe(site.build(site.committed())))


def notebooks(names: list[str], profile: str, jobs: int) -> None:
    """Writes the committed notebooks again: inputs from the twins, outputs from a run under `profile`."""
    chosen = [twin for twin in twins() if not names or any(twin.name.startswith(name) for name in names)]
    for stem, executed in execute.run_all(chosen, profile, jobs).items():
        twin = next(twin for twin in chosen if twin.stem == stem)
        notebook = with_outputs(twin, executed)
        if not twin.with_suffix(".ipynb").exists() or checks.out_of_step(twin) or _differs(twin, notebook):
            commit(twin, notebook)
            print(f"wrote notebooks/{stem}.ipynb")


def _differs(twin: Path, notebook: nbformat.NotebookNode) -> bool:
    """Whether the outputs, or with what and where they were made, are not those of the committed notebook."""
    old = nbformat.read(twin.with_suffix(".ipynb"), as_version=4)
    return bool(old.cells != notebook.cells or _where(old) != _where(notebook))


def _where(notebook: nbformat.NotebookNode) -> dict[str, object]:
    return {name: value for name, value in notebook.metadata.get("run", {}).items() if name != "seconds"}


def check() -> None:
    """Twins and committed notebooks in step, nothing broken or empty."""
    complaints = checks.problems()
    if complaints:
        raise BookError("\n".join(complaints))
    print(f"{len(twins())} notebooks agree with their twins")


def address() -> None:
    """Writes address, release and times wherever they are generated; the committed notebooks keep their outputs."""
    for drawn in (picture.PICTURE, front.PICTURE, evidence.PICTURE):
        if drawn.write():
            print(f"drew {drawn.path.relative_to(ROOT)}")
    for path in imprint.write():
        print(f"wrote {path.relative_to(ROOT)}")
    for twin in twins():
        path = twin.with_suffix(".ipynb")
        if refresh(twin):
            print(f"wrote {twin.relative_to(ROOT)}")
        if path.exists():
            commit(twin, with_outputs(twin, nbformat.read(path, as_version=4)))


def release(tag: str) -> None:
    """Packs the built pages and the two PDFs for the release `tag`; refuses what does not belong together."""
    expected = f"v{version()}"
    if tag != expected:
        raise BookError(f"the tag must be {expected} (topk/version.py), got {tag!r}")
    heading = re.search(r"^## (\S+)", (ROOT / "book" / "changelog.md").read_text(), re.MULTILINE)
    if heading is None or f"v{heading[1]}" != tag:
        raise BookError(f"book/changelog.md must begin with {version()}, it begins with {heading and heading[1]}")
    if imprint.write():
        raise BookError("generated places were out of date and have been written: commit them and tag again")
    shutil.rmtree(RELEASE, ignore_errors=True)
    RELEASE.mkdir(parents=True)
    shutil.make_archive(str(RELEASE / f"topk-book-{version()}-html"), "zip", HTML)
    for path in (PDF, SHEET):
        shutil.copy(path, RELEASE / f"{path.stem}-{version()}.pdf")
    for path in sorted(RELEASE.iterdir()):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")


def measure(names: list[str], profiles: list[str]) -> None:
    """Runs notebooks one after the other and writes how long each took, here and into the texts that say so."""
    chosen = [twin for twin in twins() if not names or any(twin.name.startswith(name) for name in names)]
    for profile in profiles:
        executed = execute.run_all(chosen, profile, jobs=1, fresh=True)
        times.note(profile, {stem: notebook.metadata["run"]["seconds"] for stem, notebook in executed.items()})
    address()


def serve(port: int) -> None:
    """Serves the built site and opens a browser on it."""
    if not (HTML / "index.html").exists():
        raise BookError("there is no site yet: run `make book`")
    address = f"http://127.0.0.1:{port}/index.html"
    print(f"serving {address}, Ctrl-C ends it", flush=True)
    webbrowser.open(address)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(HTML))
    try:
        http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()
    except KeyboardInterrupt:
        print()


def main() -> int:
    """Parses the command line; a BookError is the author's to mend and is printed without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m book.pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, profile in (("build", build, "smoke"), ("notebooks", notebooks, "laptop")):
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--profile", choices=PROFILES, default=profile)
        command.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="notebooks at a time")
        if name == "notebooks":
            command.add_argument("names", nargs="*", help="beginnings of file names, such as 06; none: all")
    command = commands.add_parser("times", help=measure.__doc__)
    command.add_argument("--profiles", nargs="+", choices=PROFILES, default=["smoke", "laptop"])
    command.add_argument("names", nargs="*", help="beginnings of file names, such as 06; none: all")
    for name, action in (("site", build_site), ("check", check), ("address", address)):
        commands.add_parser(name, help=action.__doc__)
    commands.add_parser("release", help=release.__doc__).add_argument("tag")
    commands.add_parser("serve", help=serve.__doc__).add_argument("--port", type=int, default=8000)
    arguments = vars(parser.parse_args())
    functions: dict[str, Callable[..., None]] = {
        "build": build,
        "notebooks": notebooks,
        "site": build_site,
        "check": check,
    }
    functions |= {"address": address, "serve": serve, "times": measure, "release": release}
    try:
        functions[arguments.pop("command")](**arguments)
    except BookError as error:
        print(
            f"\n{error}\n\nthe book is not in order: {len(str(error).splitlines())} complaint(s) above", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
