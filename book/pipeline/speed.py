"""How fast the heaviest page appears on a slow phone: largest contentful paint and layout shift.

    python -m book.pipeline.speed [--chromium PATH] [PAGE ...]

The processor is slowed down four times and the network is that of fast 3G as developer tools define it: 1.6 Mbit/s
down, 0.75 Mbit/s up, 150 ms for a round trip. Pages are served compressed, as GitHub Pages does.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import http.server
import os
import statistics
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from book.pipeline.browser import SIZES, find_chromium, opened
from book.pipeline.layout import HTML
from book.pipeline.site import weights

PAINT_SECONDS, SHIFT = 2.5, 0.1
_SLOWER = 4
_NETWORK = {"offline": False, "downloadThroughput": 1.6e6 / 8, "uploadThroughput": 0.75e6 / 8, "latency": 150}
_SETTLED = 4000  # milliseconds in which late fonts and formulas may still move something
_WATCH = """
window.seen = {paint: 0, shift: 0, what: "", moved: []};
new PerformanceObserver((list) => { for (const e of list.getEntries()) {
  seen.paint = e.startTime;
  seen.what = (e.element ? e.element.tagName + " " + (e.element.className || "") : e.url).slice(0, 60); } })
  .observe({type: "largest-contentful-paint", buffered: true});
new PerformanceObserver((list) => { for (const e of list.getEntries()) if (!e.hadRecentInput) {
  seen.shift += e.value;
  for (const s of e.sources || []) if (s.node)
    seen.moved.push((s.node.nodeName + " " + (s.node.className || "")).slice(0, 50)); } })
  .observe({type: "layout-shift", buffered: true});
"""


class _Compressed(http.server.SimpleHTTPRequestHandler):
    """Serves text with gzip."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.suffix not in {".html", ".css", ".js", ".svg"} or not path.is_file():
            return super().do_GET()
        content = _packed(path)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@functools.cache
def _packed(path: Path) -> bytes:
    return gzip.compress(path.read_bytes())


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Compressed, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def measure(browser: Any, html: Path, name: str, loads: int = 3) -> dict[str, Any]:
    """Medians over fresh loads: seconds to the largest paint, sum of shifts; and what they were."""
    found = []
    with _served(html) as root:
        for _ in range(loads):
            width, height = SIZES["phone"]
            context = browser.new_context(viewport={"width": width, "height": height})
            context.add_init_script(_WATCH)
            page = context.new_page()
            session = context.new_cdp_session(page)
            session.send("Network.enable")
            session.send("Network.emulateNetworkConditions", _NETWORK)
            session.send("Emulation.setCPUThrottlingRate", {"rate": _SLOWER})
            page.goto(f"{root}/{name}", wait_until="load", timeout=120_000)
            page.wait_for_timeout(_SETTLED)
            found.append(page.evaluate("window.seen"))
            context.close()
    return {
        "paint": statistics.median(one["paint"] for one in found) / 1000,
        "shift": statistics.median(one["shift"] for one in found),
        "what": found[-1]["what"],
        "moved": sorted({name for one in found for name in one["moved"]})[:6],
    }


def main() -> int:
    """Prints what it measured; 1 if a page is too slow or shifts too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", help="path of the browser; default: the one on this machine")
    parser.add_argument("pages", nargs="*", help="pages below _build/html; none: the heaviest one")
    arguments = parser.parse_args()
    chromium = arguments.chromium or find_chromium()
    if chromium is None:
        print("SKIPPED: no browser found, so no page was timed")
        return 0
    names = arguments.pages or [max(weights().items(), key=lambda item: item[1])[0]]
    failed = False
    print(f"load of this machine: {os.getloadavg()[0]:.1f} for {os.cpu_count()} processor(s)")
    for name in names:
        with opened(chromium) as browser:
            seen = measure(browser, HTML, name)
        print(
            f"{name}: largest paint after {seen['paint']:.2f} s ({seen['what']}), at most {PAINT_SECONDS} s; "
            f"shift {seen['shift']:.3f}, at most {SHIFT}{' of ' + ', '.join(seen['moved']) if seen['moved'] else ''}"
        )
        failed |= seen["paint"] > PAINT_SECONDS or seen["shift"] > SHIFT
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
