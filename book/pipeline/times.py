"""How long notebooks run: measured by `make times`, said at the top of every notebook and in the README.

`book/times.yml` holds seconds by kind of machine (cpu, gpu), profile and notebook, as the last `make times` on such a
machine found them.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from book.pipeline.layout import PROFILES, ROOT

RECORD = ROOT / "book" / "times.yml"
KINDS = {"cpu": "a CPU", "gpu": "a GPU"}
_HEAD = "# Seconds, written by `make times` on a machine of each kind; do not edit.\n"


def record() -> dict[str, dict[str, Any]]:
    """kind of machine -> its name and, by profile, the seconds of each notebook."""
    return dict(yaml.safe_load(RECORD.read_text()) or {}) if RECORD.exists() else {}


def note(profile: str, seconds: dict[str, float]) -> None:
    """Enters what ran on this machine; another machine of the same kind starts its entry anew."""
    found = record()
    kind, name = this_machine()
    if found.get(kind, {}).get("machine") != name:
        found[kind] = {"machine": name}
    found[kind][profile] = dict(sorted({**found[kind].get(profile, {}), **seconds}.items()))
    RECORD.write_text(_HEAD + yaml.safe_dump(found, sort_keys=True))


def this_machine() -> tuple[str, str]:
    """Its kind and its name."""
    import torch

    if torch.cuda.is_available():
        return "gpu", torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return "cpu", f"{_processor()}, {cores} core{'s' * (cores > 1)}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.*)", information.read_text()) if information.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def sentence(stem: str) -> str:
    """What a notebook says about itself."""
    parts = [part for kind in KINDS if (part := _on_a(kind, stem))]
    return f"**Runs in** {'; '.join(parts) or 'a time that nobody has measured'}. The cell `profile` chooses the size."


def _on_a(kind: str, stem: str) -> str:
    found = record().get(kind, {})
    known = [(profile, found[profile][stem]) for profile in PROFILES if stem in found.get(profile, {})]
    if not known:
        return ""
    said = ", ".join(f"{in_words(seconds)} (`{profile}`)" for profile, seconds in known)
    return f"{said} on {KINDS[kind]} ({found['machine']})"


def in_words(seconds: float) -> str:
    """Rounded up, because another machine will differ by more."""
    if seconds <= 90:
        return f"{max(5, -(-int(seconds + 0.999) // 5) * 5)} s"
    return f"{-(-int(seconds) // 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def expected(stems: Collection[str], profile: str, jobs: int) -> str:
    """How long these notebooks may take together, "" where one of them was never timed on such a machine."""
    known = record().get(this_machine()[0], {}).get(profile, {})
    if not stems or not set(stems) <= set(known):
        return ""
    return f": about {in_words(sum(known[stem] for stem in stems) / jobs)}, {jobs} at a time"


def summary() -> str:
    """What the README says about `make book`."""
    found = record().get("cpu", {})
    smoke = found.get("smoke", {})
    if not smoke:
        return "Not timed yet: `make times` does it.\n"
    return (
        f"Measured on one {found['machine']}: the {len(smoke)} chapters run in {in_words(sum(smoke.values()))} one\n"
        f"after the other, the slowest in {in_words(max(smoke.values()))}; the pages take a minute or two more.\n"
    )
