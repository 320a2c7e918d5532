"""Opens the built pages in a real browser and says what a reader would stumble over.

    python -m book.pipeline.browser [--chromium PATH] [--shots FOLDER] [--jobs N] [PAGE ...]

Every page, wide and as narrow as a phone, light and dark: no console error, every formula typeset, no sideways scroll,
pictures described and sized, links inside the book lead somewhere, chapters carry a launch button for an existing
notebook, text and the writing in figures have contrast (WCAG AA), folded parts, sliders and quizzes work from the
keyboard, and the search finds what is in the book.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from book.pipeline.layout import COLAB, HTML, ROOT, address, config

SIZES = {"wide": (1280, 900), "phone": (390, 844)}
THEMES = ("light", "dark")
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # the pages bring all they need
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", OFFLINE]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CONTRAST = 4.5
"""What WCAG AA asks of text."""
ENOUGH = 8
"""Things of a kind that are operated on a page; each costs a layout of it."""

_FACTS = Path(__file__).with_name("browser.js").read_text()
_KEYBOARD = Path(__file__).with_name("keyboard.js").read_text()
_ALL_PICTURES = """Promise.all([...document.images].map((image) => {
    image.loading = "eager"; return image.decode().catch(() => 0); }))"""
_WORDS = {
    "untypeset": "formula not typeset",
    "errors": "formula with an error",
    "swollen": "formula with letters larger than the text",
    "raw": "raw markup",
    "undescribed": "picture without a description",
    "unsized": "picture without width and height",
    "contrast": "little contrast",
}


@dataclass
class Seen:
    """A page: what is wrong with it and what other pages may refer to."""

    name: str
    complaints: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: list[str] = field(default_factory=list)
    launch: list[str] = field(default_factory=list)


def find_chromium() -> str | None:
    """The path of a Chromium on this machine: the system's, else the one Playwright downloaded."""
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address under which a folder is served while the block runs."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@contextmanager
def opened(chromium: str) -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


def pages_of(html: Path, chosen: list[str]) -> list[str]:
    """The pages, but for the front door, which only leads on."""
    found = [page.relative_to(html) for page in html.rglob("*.html")]
    names = [str(page) for page in found if not page.parts[0].startswith("_") and page.name != "index.html"]
    return sorted(name for name in names if not chosen or any(part in name for part in chosen))


def check(
    html: Path, chromium: str, *, shots: Path | None = None, chosen: list[str] | None = None, jobs: int = 1
) -> list[str]:
    """Complaints, page by page."""
    names = pages_of(html, chosen or [])
    with served(html) as root:
        look = functools.partial(_look_at_some, root, chromium, shots)
        with ProcessPoolExecutor(max(1, min(jobs, len(names))), mp_context=get_context("spawn")) as pool:
            seen = [page for part in pool.map(look, [names[start::jobs] for start in range(jobs)]) for page in part]
        complaints = [line for page in sorted(seen, key=lambda page: page.name) for line in page.complaints]
        complaints += _links({page.name: page for page in seen}, html, root)
        if (html / "search.html").exists():
            with opened(chromium) as browser:
                complaints += _search(browser, root)
    return complaints


def _look_at_some(root: str, chromium: str, shots: Path | None, names: list[str]) -> list[Seen]:
    with opened(chromium) as browser:
        found = []
        for name in names:
            found.append(look(browser, root, name, shots))
            print(f"  {name}: {len(found[-1].complaints) or 'no'} complaint(s)", flush=True)
        return found


def look(browser: Any, root: str, name: str, shots: Path | None = None, sizes: Iterable[str] = tuple(SIZES)) -> Seen:
    """One page in these sizes and every theme."""
    seen = Seen(name)
    for size in sizes:
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
        context.add_init_script("localStorage.setItem('mode','light');localStorage.setItem('theme','light');")
        page = context.new_page()
        _listen(page, f"{name} ({size})", seen.complaints)
        page.goto(f"{root}/{name}", wait_until="load")
        page.evaluate(_ALL_PICTURES)
        if page.evaluate("!!document.querySelector('.math')"):
            seen.complaints += _typeset(page, f"{name} ({size})")
        for theme in THEMES:
            where = f"{name} ({size}, {theme})"
            _set_theme(page, theme)
            facts = page.evaluate(_FACTS)
            seen.complaints += _page_complaints(where, facts)
            if shots is not None:
                shots.mkdir(parents=True, exist_ok=True)
                stem = name.removesuffix(".html").replace("/", "-")
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=shots / f"{stem}-{size}-{theme}.png", full_page=True)
            if size == "wide":
                seen.links, seen.anchors, seen.launch = facts["links"], facts["anchors"], facts["launch"]
                seen.complaints += _figures(page, where)
        if size == "wide":
            seen.complaints += _keyboard(page, name)
        context.close()
    return seen


def _set_theme(page: Any, theme: str) -> None:
    """What the theme button does, without its animation."""
    page.emulate_media(color_scheme=theme)
    page.evaluate(f"Object.assign(document.documentElement.dataset, {{theme: '{theme}', mode: '{theme}'}})")
    page.add_style_tag(content="* { transition: none !important; animation: none !important; }")


def _listen(page: Any, where: str, complaints: list[str]) -> None:
    """Writes down what the page logs as an error and what it cannot load."""

    def note(text: str) -> None:
        complaints.append(f"{where}: {text}")

    page.on("console", lambda message: note(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: note(str(error)))
    page.on("requestfailed", lambda request: note(f"did not load {request.url}"))
    page.on("response", lambda answer: note(f"{answer.status} {answer.url}") if answer.status >= 400 else None)


def _typeset(page: Any, where: str) -> list[str]:
    """Waits for MathJax, which lies beside the pages."""
    try:
        page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise", timeout=30000)
        page.evaluate("MathJax.startup.promise.then(() => 1)")
    except Exception:
        return [f"{where}: MathJax did not load"]
    return []


def _page_complaints(where: str, found: dict[str, Any]) -> list[str]:
    complaints = [f"{where}: scrolls sideways by {found['wide']} pixels"] if found["wide"] > 0 else []
    for kind, words in _WORDS.items():
        complaints += [f"{where}: {words}: {item}" for item in found[kind]]
    if any(count == 0 for count in found["knobs"]):
        complaints.append(f"{where}: an interactive figure without its sliders")
    if any(count == 0 for count in found["quizzes"]):
        complaints.append(f"{where}: a quiz without anything to choose")
    return complaints


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(page: Any, where: str) -> list[str]:
    """Pictures whose writing along the axes is too faint, as the browser shows them in this theme."""
    complaints = []
    for number, picture in enumerate(page.query_selector_all("article .cell_output img, article .bd-content img"), 1):
        if picture.is_visible():
            ratio = ink_contrast(picture.screenshot(timeout=120_000))
            if ratio < CONTRAST:
                complaints.append(f"{where}: the writing in figure {number} has a contrast of {ratio:.1f}")
    return complaints


def ink_contrast(png: bytes) -> float:
    """Contrast of the strongest ink in the outer strips left and below, where axes are labelled, with their paper."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        inside = image.crop((2, 2, image.width - 2, image.height - 2))  # the edge may show a row of the page
        pixels = np.asarray(inside.convert("RGB"))
    levels = np.arange(256) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    luminance = linear[pixels] @ np.array([0.2126, 0.7152, 0.0722])
    height, width = luminance.shape
    strips = np.concatenate((luminance[:, : width // 8].ravel(), luminance[-height // 6 :].ravel()))
    return max(_strongest(strips, _commonest(part)) for part in (strips, luminance))


def _commonest(luminance: Any) -> float:
    """The paper: a field of colour can be commoner in the whole picture, or in the strips."""
    import numpy as np

    return int(np.bincount((luminance * 10_000).round().astype(int).ravel()).argmax()) / 10_000


def _strongest(luminance: Any, paper: float) -> float:
    import numpy as np

    ratios = (np.maximum(luminance, paper) + 0.05) / (np.minimum(luminance, paper) + 0.05)
    return float(np.quantile(ratios, 0.998))


# --- keyboard --------------------------------------------------------------------------------------------------------


def _keyboard(page: Any, name: str) -> list[str]:
    """Folds open with Enter, sliders move with an arrow, a quiz tells about each answer, and the focus is seen."""
    complaints, tried = [], Counter[str]()
    page.keyboard.press("Tab")  # from now on the browser shows the focus
    for thing in page.evaluate(_KEYBOARD):
        tried[thing["kind"]] += 1
        where = f"{name}: {thing['kind'].lower()} {thing['name']!r}"
        for fact, words in (("reached", "cannot be reached"), ("seen", "does not show that it has the focus")):
            if not thing[fact]:
                complaints.append(f"{where} {words} from the keyboard")
        if not thing["name"]:
            complaints.append(f"{where} has no name for a screen reader")
        if thing["reached"] and tried[thing["kind"]] <= ENOUGH and not _operates(page, thing):
            complaints.append(f"{where} does not answer to the keyboard")
    return complaints


def _operates(page: Any, thing: dict[str, Any]) -> bool:
    node = f"document.querySelector('[data-thing=\"{thing['number']}\"]')"
    state, keys = {
        "SUMMARY": (f"{node}.parentElement.open", ["Enter"]),
        "RADIO": (
            f"{node}.checked && {node}.closest('.topk-quiz').querySelector('[role=status]').innerText != ''",
            ["Space"],
        ),
    }.get(thing["kind"], (f"{node}.value", ["ArrowRight", "ArrowLeft"]))
    before = page.evaluate(f"{node}.focus(), {state}")
    for key in keys:
        page.keyboard.press(key)
        if page.evaluate(state) != before:
            return True
    return False


# --- links and search ------------------------------------------------------------------------------------------------


def _links(seen: dict[str, Seen], html: Path, root: str) -> list[str]:
    complaints = []
    for name, page in seen.items():
        if name.startswith("notebooks/"):
            complaints += _launch(page)
        for link in sorted(set(page.links)):
            if not link.startswith(root):
                continue
            parts = urlparse(link)
            path = unquote(parts.path.lstrip("/"))
            target = html / path
            if target.is_dir():
                target, path = target / "index.html", f"{path.rstrip('/')}/index.html".lstrip("/")
            if not target.exists():
                complaints.append(f"{name}: dead link {path}")
            elif parts.fragment and path in seen and unquote(parts.fragment) not in seen[path].anchors:
                complaints.append(f"{name}: no anchor {path}#{parts.fragment}")
    return complaints


def _launch(page: Seen) -> list[str]:
    """The buttons open a notebook for Colab that exists in this repository."""
    start = f"github/{'/'.join(address().split('/')[-2:])}/blob/{config()['repository']['branch']}/"
    paths = {link.partition(start)[2] for link in page.launch}
    if paths and all((ROOT / path).is_file() and (ROOT / path).parent == COLAB for path in paths):
        return []
    return [f"{page.name}: launch button leads to {sorted(page.launch)}"]


def _search(browser: Any, root: str) -> list[str]:
    """The search finds a chapter by a word of it."""
    page = browser.new_page()
    page.goto(f"{root}/search.html?q=Poisson-binomial")
    try:
        page.wait_for_selector("ul.search li a[href*='poisson_binomial']", timeout=15000)
    except Exception:
        return ["search for Poisson-binomial does not find its chapter"]
    finally:
        page.close()
    return []


def main() -> int:
    """Prints complaints; 1 if there are any. Without a browser says so and lets the rest go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", help="path of the browser; default: the one on this machine")
    parser.add_argument("--shots", type=Path, help="folder for screenshots of every page")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="browsers at a time")
    parser.add_argument("pages", nargs="*", help="parts of page names; none: all")
    arguments = parser.parse_args()
    chromium = arguments.chromium or find_chromium()
    if chromium is None:
        print(f"SKIPPED: no browser found ({', '.join(NAMES)}), so no page was looked at")
        return 0
    if not pages_of(HTML, []):
        print("there are no pages yet: run `make site` or `make book`", file=sys.stderr)
        return 1
    complaints = check(HTML, chromium, shots=arguments.shots, chosen=arguments.pages, jobs=arguments.jobs)
    print("\n".join(complaints) or "every page is in order")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
