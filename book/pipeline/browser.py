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

_FACTS = """() => {
  const text = (node) => (node.textContent || "").trim().slice(0, 60);
  const visible = (node) => node.getClientRects().length > 0;
  const article = document.querySelector(".bd-article, article") || document.body;
  const raw = [];
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node.parentElement.closest("code, pre, script, style, mjx-container, svg")) continue;
    if (/\\$\\$|\\\\(frac|mathbb|sum|tau)\\b|\\{(eq|cite:p|prf:ref)\\}/.test(node.textContent)) raw.push(text(node));
  }
  return {
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    untypeset: [...document.querySelectorAll(".math")].filter((n) => visible(n) && !n.querySelector("mjx-container")).map(text),
    errors: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(text),
    raw: raw,
    undescribed: [...article.querySelectorAll("img")].filter((n) => !n.alt || /\\.(png|svg)$/.test(n.alt)).map((n) => n.src.slice(-60)),
    knobs: [...article.querySelectorAll(".topk-knobs")].map((n) => n.querySelectorAll("input[type=range]").length),
    launch: [...document.querySelectorAll("a[href*='colab.research.google.com']")].map((n) => n.href),
    links: [...document.querySelectorAll("a[href]")].map((n) => n.href),
    anchors: [...document.querySelectorAll("[id]")].map((n) => n.id),
  };
}"""

_CONTRAST = """() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = (c) => { const f = c.slice(0, 3).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
    return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const behind = (n) => { for (; n; n = n.parentElement) { const c = parse(getComputedStyle(n).backgroundColor);
    if (c.length && (c.length < 4 || c[3] > 0.5)) return c; } return [255, 255, 255]; };
  const found = [];
  for (const n of document.querySelectorAll(".bd-article p, .bd-article li, .bd-article td, .bd-article th, .bd-article h1, .bd-article h2, .bd-article summary, .bd-article a:not(.headerlink)")) {
    if (!n.getClientRects().length || !(n.textContent || "").trim()) continue;
    const a = light(parse(getComputedStyle(n).color)), b = light(behind(n));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(ratio.toFixed(1) + ": " + n.textContent.trim().slice(0, 40));
  }
  return found.slice(0, 3);
}"""


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
                    page.on("console", lambda m, w=where: m.type == "error" and complaints.append(f"{w}: {m.text}"))
                    page.on("pageerror", lambda error, w=where: complaints.append(f"{w}: {error}"))
                    page.on("requestfailed", lambda r, w=where: complaints.append(f"{w}: did not load {r.url}"))
                    page.on("response", lambda r, w=where: r.status >= 400 and complaints.append(f"{w}: {r.status} {r.url}"))
                    page.goto(f"{root}/{name}", wait_until="load")
                    page.wait_for_timeout(300)
                    if page.evaluate("!!document.querySelector('.math')"):
                        complaints += _typeset(page, where)
                    found = page.evaluate(_FACTS)
                    complaints += _page_complaints(where, found)
                    complaints += [f"{where}: contrast {line}" for line in page.evaluate(_CONTRAST)]
                    facts[name] = found
                    if shots is not None:
                        shots.mkdir(parents=True, exist_ok=True)
                        page.screenshot(path=shots / f"{Path(name).stem}-{size}-{theme}.png", full_page=True)
                    page.close()
                context.close()
        complaints += _search(browser, root)
        browser.close()
    server.shutdown()
    return complaints + _links(facts, root)


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
