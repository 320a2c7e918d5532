"""Follows every link that leads out of the built book and out of the repository's own texts.

    python -m book.pipeline.links

A link is dead if it answers 404 or the like, or not at all after three attempts. Sites that turn programs away are
listed in `ALLOWED`, each with its reason; an entry that no link needs any more is a complaint too.
"""

from __future__ import annotations

import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

from book.pipeline.imprint import pages_address
from book.pipeline.layout import HTML, ROOT, address

ALLOWED = {
    "https://doi.org/": "publishers turn programs away (403); a DOI is checked by its form",
    "https://colab.research.google.com/": "answers every address; the notebook it names is checked by the browser test",
}
"""{the beginning of a link that passes although it does not answer a program: why}"""
TEXTS = ("README.md", "CONTRIBUTING.md")
ATTEMPTS = 3
SECONDS = 20.0
_HEADERS = {"User-Agent": "Mozilla/5.0 (link check of a book)", "Accept": "*/*"}


class _Links(HTMLParser):
    """The targets of a page's links, fragments left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href") or ""
        if tag == "a" and re.match(r"https?://", target):
            self.found.add(target.split("#")[0])


def collect(pages: Path, texts: Iterable[Path]) -> dict[str, str]:
    """link -> one place that has it."""
    found: dict[str, str] = {}
    for page in sorted(pages.rglob("*.html")):
        parser = _Links()
        parser.feed(page.read_text(errors="replace"))
        found |= {link: str(page.relative_to(pages)) for link in parser.found if link not in found}
    for text in texts:
        if text.exists():
            links = re.findall(r"https?://[^\s)>\"'`\]]+", text.read_text())
            found |= {link.split("#")[0].rstrip(".,"): text.name for link in links if link not in found}
    return found


def answer(link: str) -> str:
    """Empty if the link leads somewhere, else what came back."""
    said = ""
    for attempt in range(ATTEMPTS):
        for method in ("HEAD", "GET"):  # some servers know only the second
            try:
                request = urllib.request.Request(link, method=method, headers=_HEADERS)
                with urllib.request.urlopen(request, timeout=SECONDS):
                    return ""
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.reason}"
            except Exception as error:  # no host, no certificate, no answer
                said = f"{type(error).__name__}: {error}"
        if said[:3] in ("401", "403", "404", "410"):
            return said
        time.sleep(2.0**attempt if attempt + 1 < ATTEMPTS else 0)
    return said


def dead(
    links: dict[str, str], allowed: dict[str, str], ask: Callable[[str], str] = answer, workers: int = 8
) -> list[str]:
    """Complaints: links without an answer, and permissions nobody needs."""
    asked = [link for link in sorted(links) if not link.startswith(tuple(allowed))]
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(ask, asked))
    complaints = [f"{links[link]}: {link}: {said}" for link, said in zip(asked, answers, strict=True) if said]
    unused = [start for start in allowed if not any(link.startswith(start) for link in links)]
    return complaints + [f"ALLOWED: no link begins with {start}" for start in unused]


def main() -> int:
    """Prints the dead links; 1 if there are any."""
    found = collect(HTML, [ROOT / name for name in TEXTS])
    # A release not yet published names its own pages.
    found = {link: place for link, place in found.items() if not link.startswith((address(), pages_address()))}
    complaints = dead(found, ALLOWED)
    print("\n".join(complaints) or f"{len(found)} links lead somewhere")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
