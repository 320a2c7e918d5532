"""The whole book as one PDF, and the cheat sheet as one sheet of paper, printed by the browser from the built pages.

    python -m book.pipeline.printing [--chromium PATH] [--to FOLDER]

The pages' articles are put one after the other, in the order of the contents, into one document, so that references
between chapters become links inside the PDF and headings its outline. Solutions and the answers of quizzes are printed
unfolded; folded code and data stay in the notebooks. Interactive figures show what they start with, no sliders.
The book is printed twice: where its articles begin is known only then, and the contents name it.
"""

from __future__ import annotations

import argparse
import html
import posixpath
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag

from book.pipeline.browser import find_chromium, opened, served
from book.pipeline.imprint import pages_address
from book.pipeline.layout import HTML, PDF, ROOT, SHEET, BookError, config, version

_STYLE = Path(__file__).with_name("printing.css").read_text()
_NAME = "print.html"
_MARGIN = {"top": "18mm", "bottom": "20mm", "left": "17mm", "right": "17mm"}
_SHEET = "book/cheatsheet.html"
_FOOTER = (
    '<div style="width:100%;font:8px sans-serif;color:#555;padding:0 17mm;display:flex;justify-content:space-between">'
    '<span>{title}</span><span class="pageNumber"></span></div>'
)


def contents() -> dict[str, list[str]]:
    """caption -> its pages below the site's root, as the table of contents has them."""
    table = yaml.safe_load((ROOT / "_toc.yml").read_text())
    parts = {part["caption"]: [f"{entry['file']}.html" for entry in part["chapters"]] for part in table["parts"]}
    return {"": [f"{table['root']}.html"], **parts}


def document(site: Path, parts: dict[str, list[str]], numbers: dict[str, int] | None = None) -> str:
    """All articles as one page; what they refer to is found from the site's root. `numbers`: where each begins."""
    names = [name for pages in parts.values() for name in pages]
    missing = [name for name in names if not (site / name).is_file()]
    if missing:
        raise BookError(f"not built yet: {', '.join(missing)}")
    soups = {name: BeautifulSoup((site / name).read_text(), "html.parser") for name in names}
    articles = [_article(name, soup, set(names)) for name, soup in soups.items()]
    return _page("\n".join((_front(parts, soups, numbers or {}), *articles)), _head(names[0], soups[names[0]]))


def sheet(site: Path, name: str = _SHEET) -> str:
    """The article of one page, in the columns of a sheet of paper."""
    soup = BeautifulSoup((site / name).read_text(), "html.parser")
    return _page(f'<div class="sheet">{_article(name, soup, {name})}</div>', _head(name, soup))


def _page(body: str, head: str) -> str:
    return (
        f'<!doctype html><html lang="en" data-theme="light" data-mode="light"><head><meta charset="utf-8">'
        f"<title>{html.escape(str(config()['title']))}</title>{head}"
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def _head(name: str, soup: BeautifulSoup) -> str:
    """Style sheets and the typesetter of formulas, without the scripts of the site's menus."""
    kept = []
    for tag in soup.head.find_all(["link", "script"]):  # type: ignore[union-attr]
        if tag.name == "link" and "stylesheet" not in _attribute(tag, "rel").split():
            continue
        if tag.name == "script" and "mathjax" not in str(tag).lower():
            continue
        for place in ("href", "src"):
            if tag.get(place):
                tag[place] = _from_root(name, _attribute(tag, place))
        kept.append(str(tag))
    return "".join(kept)


def _from_root(name: str, target: str) -> str:
    if urlsplit(target).scheme or target.startswith(("/", "data:")):
        return target
    return "/" + posixpath.normpath(posixpath.join(posixpath.dirname(name), target.split("?")[0]))


def _anchor(name: str, fragment: str = "") -> str:
    """An id that is the page's own in the common document."""
    return f"{name.removesuffix('.html').replace('/', '-')}--{fragment}"


def _attribute(tag: Tag, name: str) -> str:
    """An attribute as text; the empty one where there is none, as with lists of values joined by blanks."""
    value = tag.get(name, "")
    return value if isinstance(value, str) else " ".join(value or [])


def _article(name: str, soup: BeautifulSoup, names: set[str]) -> str:
    article = soup.select_one("article.bd-article") or soup.body
    assert article is not None
    for tag in article.select("a.headerlink, script[src]"):
        tag.decompose()
    for tag in article.find_all(True):
        if tag.get("id"):
            tag["id"] = _anchor(name, _attribute(tag, "id"))
        if tag.name == "img" and tag.get("src"):
            tag["src"] = _from_root(name, _attribute(tag, "src"))
            tag.attrs.pop("loading", None)
        if tag.name == "a" and tag.get("href"):
            tag["href"] = _target(name, _attribute(tag, "href"), names)
        if tag.name == "details" and ("sd-dropdown" in _attribute(tag, "class") or tag.find_parent(class_="topk-quiz")):
            tag["open"] = ""
    return f'<article class="bd-article bd-content" id="{_anchor(name)}">{article.decode_contents()}</article>'


def _target(name: str, target: str, names: set[str]) -> str:
    """Inside the document where it can be, else on the published site."""
    parts = urlsplit(target)
    if parts.scheme:
        return target
    page = posixpath.normpath(posixpath.join(posixpath.dirname(name), parts.path)) if parts.path else name
    if page in names:
        return "#" + _anchor(page, unquote(parts.fragment))
    return f"{pages_address()}{page}" + (f"#{parts.fragment}" if parts.fragment else "")


def _front(parts: dict[str, list[str]], soups: dict[str, BeautifulSoup], numbers: dict[str, int]) -> str:
    """Title page and contents."""
    facts = config()
    listed = ""
    for caption, names in parts.items():
        items = "".join(
            f'<li><a href="#{_anchor(name)}">{_title(soups[name])}<span>{numbers.get(name, 0) or ""}</span></a></li>'
            for name in names
        )
        listed += f"<p>{html.escape(caption)}</p><ul>{items}</ul>"
    return (
        f'<section class="front"><p class="title">{html.escape(str(facts["title"]))}</p>'
        f"<p>{html.escape(str(facts['author']))}</p><p>Version {version()}</p>"
        f'<p><a href="{pages_address()}">{pages_address()}</a></p>'
        f'<div class="licence">{facts["html"]["extra_footer"]}</div></section>'
        f'<nav class="all-pages"><h1>Contents</h1>{listed}</nav>'
    )


def _title(soup: BeautifulSoup) -> str:
    heading = soup.select_one("article h1") or soup.h1
    return html.escape(heading.get_text().removesuffix("#").strip()) if heading is not None else ""


def write(site: Path, parts: dict[str, list[str]], browser: Any, target: Path) -> None:
    """Prints the book to `target`. Raises BookError if a formula or a picture would be missing."""
    footer = _FOOTER.format(title=html.escape(str(config()["title"])))
    paper = {"margin": _MARGIN, "display_header_footer": True, "outline": True}
    paper |= {"header_template": "<span></span>", "footer_template": footer}
    _print(site, document(site, parts), browser, target, **paper)
    numbers = _page_numbers(target, [name for names in parts.values() for name in names])
    _print(site, document(site, parts, numbers), browser, target, **paper)


def _page_numbers(book: Path, names: list[str]) -> dict[str, int]:
    """name -> the page its article begins on, from the outline of the printed book: one first heading an article."""
    from pypdfium2 import PdfDocument

    with PdfDocument(book) as printed:
        firsts = [entry.get_dest().get_index() + 1 for entry in printed.get_toc() if entry.level == 0]
    if len(firsts) != 1 + len(names):
        raise BookError(f"the outline has {len(firsts)} first headings, expected the contents and {len(names)} pages")
    return dict(zip(names, firsts[1:], strict=True))


def write_sheet(site: Path, browser: Any, target: Path, name: str = _SHEET) -> None:
    """Prints the cheat sheet to `target`. Raises BookError if it takes more than one page."""
    _print(site, sheet(site, name), browser, target, margin=dict.fromkeys(_MARGIN, "8mm"), landscape=True)
    if (count := len(re.findall(rb"/Type\s*/Page\b", target.read_bytes()))) != 1:
        raise BookError(f"{name} takes {count} pages of paper, it has to fit on one")


def _print(site: Path, text: str, browser: Any, target: Path, **paper: Any) -> None:
    with served(site) as root:
        page = browser.new_page()
        page.route(f"**/{_NAME}", lambda route: route.fulfill(body=text, content_type="text/html"))
        page.goto(f"{root}/{_NAME}", wait_until="load", timeout=300_000)
        page.emulate_media(media="print", color_scheme="light")
        complaints = _typeset(page)
        if complaints:
            raise BookError("\n".join(complaints))
        target.parent.mkdir(parents=True, exist_ok=True)
        page.pdf(path=target, format="A4", print_background=True, tagged=True, **paper)
        page.close()


def _typeset(page: Any) -> list[str]:
    """Waits for formulas and pictures; says which are not there."""
    page.set_default_timeout(600_000)
    if page.evaluate("!!document.querySelector('.math')"):
        try:
            page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise", timeout=120_000)
        except Exception:
            return ["MathJax did not load"]
        page.evaluate("MathJax.startup.promise.then(() => 1)")
        page.evaluate(_FIT)
    page.evaluate("Promise.all([...document.images].map((image) => image.decode().catch(() => 0)))")
    return list(page.evaluate(_MISSING))


# Paper does not scroll: what is wider than the column becomes smaller.
_FIT = """document.querySelectorAll("mjx-container[display=true]").forEach((box) => {
  const formula = box.querySelector("mjx-math"), room = box.parentElement.clientWidth - 60;
  if (formula && formula.scrollWidth > room) box.style.fontSize = Math.max(50, 100 * room / formula.scrollWidth) + "%";
})"""
_MISSING = """[
  ...[...document.querySelectorAll(".math")].filter((n) => !n.querySelector("mjx-container"))
    .map((n) => "formula not typeset: " + n.textContent.slice(0, 60)),
  ...[...document.querySelectorAll("mjx-merror")].map((n) => "formula with an error: " + n.textContent.slice(0, 60)),
  ...[...document.images].filter((n) => !n.naturalWidth).map((n) => "picture missing: " + n.src.slice(-60)),
]"""


def main() -> int:
    """Prints both; 1 if something would be missing or did not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", help="path of the browser; default: the one on this machine")
    parser.add_argument("--to", type=Path, default=PDF.parent, help="folder, default: %(default)s")
    arguments = parser.parse_args()
    chromium = arguments.chromium or find_chromium()
    if chromium is None:
        print("no browser found to print with: install chromium, or pass CHROMIUM=PATH", file=sys.stderr)
        return 1
    book, one_page = (arguments.to / path.name for path in (PDF, SHEET))
    try:
        with opened(chromium) as browser:
            write_sheet(HTML, browser, one_page)
            write(HTML, contents(), browser, book)
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    for path in (one_page, book):
        print(f"{path.resolve().as_uri()}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
