"""Opens the built pages in a real browser and says what a reader would stumble over.

    python -m book.pipeline.browser [--chromium PATH] [--shots FOLDER] [PAGE ...]

Every page, wide and as narrow as a phone, light and dark: no console error, every formula typeset, no sideways scroll,
pictures described, links inside the book lead somewhere, chapters carry a launch button for an existing notebook, text
has contrast, and the search finds what is in the book.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from book.pipeline.layout import HTML, ROOT

SIZES = {"wide": (1280, 900), "phone": (390, 844)}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

_FACTS = Path(__file__).with_name("browser.js").read_text()


def check(chromium: str, shots: Path | None, chosen: list[str]) -> list[str]:
    """Complaints, page by page."""
    from playwright.sync_api import sync_playwright

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    pages = [str(page.relative_to(HTML)) for folder in ("book", "notebooks") for page in (HTML / folder).glob("*.html")]
    pages = [page for page in sorted(pages) if not chosen or any(name in page for name in chosen)]
    complaints: list[str] = []
    facts: dict[str, dict[str, Any]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for size, (width, height) in SIZES.items():
            for theme in ("light", "dark"):
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
                context.add_init_script(
                    f"localStorage.setItem('mode','{theme}');localStorage.setItem('theme','{theme}');"
                )
                for name in pages:
                    where = f"{name} ({size}, {theme})"
                    page = context.new_page()
                    _listen(page, where, complaints)
                    page.goto(f"{root}/{name}", wait_until="load")
                    page.wait_for_timeout(300)
                    if page.evaluate("!!document.querySelector('.math')"):
                        complaints += _typeset(page, where)
                    facts[name] = page.evaluate(_FACTS)
                    complaints += _page_complaints(where, facts[name])
                    if shots is not None:
                        shots.mkdir(parents=True, exist_ok=True)
                        page.screenshot(path=shots / f"{Path(name).stem}-{size}-{theme}.png", full_page=True)
                    page.close()
                context.close()
        complaints += _search(browser, root)
        browser.close()
    server.shutdown()
    return complaints + _links(facts, root)


def _listen(page: Any, where: str, complaints: list[str]) -> None:
    """Writes down what the page logs as an error and what it cannot load."""

    def note(text: str) -> None:
        complaints.append(f"{where}: {text}")

    page.on("console", lambda message: note(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: note(str(error)))
    page.on("requestfailed", lambda request: note(f"did not load {request.url}"))
    page.on("response", lambda answer: note(f"{answer.status} {answer.url}") if answer.status >= 400 else None)


def _typeset(page: Any, where: str) -> list[str]:
    """Waits for MathJax; without a network it has to be a local copy (see `site.mathjax`)."""
    try:
        page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise", timeout=10000)
        page.evaluate("MathJax.startup.promise.then(() => 1)")
    except Exception:
        return [f"{where}: MathJax did not load; set MATHJAX to the folder of a local copy and build again"]
    return []


def _page_complaints(where: str, found: dict[str, Any]) -> list[str]:
    complaints = [f"{where}: scrolls sideways by {found['wide']} pixels"] if found["wide"] > 0 else []
    for kind, words in (
        ("untypeset", "formula not typeset"),
        ("errors", "formula with an error"),
        ("raw", "raw markup"),
        ("undescribed", "picture without a description"),
        ("contrast", "little contrast"),
    ):
        complaints += [f"{where}: {words}: {item}" for item in found[kind]]
    if any(count == 0 for count in found["knobs"]):
        complaints.append(f"{where}: an interactive figure without its sliders")
    return complaints


def _links(facts: dict[str, dict[str, Any]], root: str) -> list[str]:
    complaints = []
    for name, found in facts.items():
        if name.startswith("notebooks/"):
            paths = {re.sub(r".*/blob/[^/]+/", "", link) for link in found["launch"]}
            if not paths or not all((ROOT / path).exists() for path in paths):
                complaints.append(f"{name}: launch button leads to {sorted(paths)}")
        for link in found["links"]:
            if not link.startswith(root):
                continue
            address = urlparse(link)
            path = unquote(address.path.lstrip("/"))
            target = HTML / path
            if target.is_dir():
                target, path = target / "index.html", f"{path.rstrip('/')}/index.html".lstrip("/")
            if not target.exists():
                complaints.append(f"{name}: dead link {path}")
            elif address.fragment and path in facts and unquote(address.fragment) not in facts[path]["anchors"]:
                complaints.append(f"{name}: no anchor {path}#{address.fragment}")
    return complaints


def _search(browser: Any, root: str) -> list[str]:
    page = browser.new_page()
    page.goto(f"{root}/search.html?q=Poisson-binomial")
    try:
        page.wait_for_selector("ul.search li a", timeout=15000)
    except Exception:
        return ["search for Poisson-binomial finds nothing"]
    finally:
        page.close()
    return []


def main() -> int:
    """Prints complaints; 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome") or "chromium")
    parser.add_argument("--shots", type=Path, help="folder for screenshots of every page")
    parser.add_argument("pages", nargs="*", help="parts of page names; none: all")
    arguments = parser.parse_args()
    complaints = check(arguments.chromium, arguments.shots, arguments.pages)
    print("\n".join(complaints) or "every page is in order")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
