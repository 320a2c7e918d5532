"""What a chapter needs beside the losses: its profile, numbers in prose, code read from the module, knobs to turn."""

from __future__ import annotations

import base64
import inspect
import json
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from IPython.display import Markdown, display

import topk
from topk import backend
from topk.lab import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROFILES = ("smoke", "laptop", "full")


def begin(profile: str) -> None:
    """Sets the figures' style and the seed, and prints under which profile and versions this page ran."""
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {PROFILES}, got {profile!r}")
    figures.use_style()
    torch.manual_seed(0)
    versions = f"topk {topk.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"profile {profile} | {versions} | {_device()}")


def _device() -> str:
    """Where the tensors will be, and on a GPU which of the two implementations serves the losses there."""
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} thread(s)"
    reason = backend.why_not_triton(torch.device("cuda", torch.cuda.current_device()))
    served = "losses by Triton kernels" if reason is None else f"losses in plain torch: {reason}"
    return f"{torch.cuda.get_device_name()}, {served}"


def say(text: str) -> None:
    """Prose with numbers in it: markdown, so that it reads as text wherever the notebook is opened."""
    display(Markdown(text))  # type: ignore[no-untyped-call]


_NUMERIC = re.compile(r"[-+(\d][^a-zA-Z|]{0,24}")


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of dictionaries with the same keys; numbers with three digits."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(_cell(row[name]) for name in names)} |" for row in rows]
    say("\n".join(lines))


def _cell(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if not isinstance(value, float):
        text = str(value)
        return text.replace(" ", "\u00a0") if _NUMERIC.fullmatch(text) else text  # "61.2 ± 0.1" stays on one line
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def source(*objects: Callable[..., Any]) -> None:
    """The code of these functions, read from the module that runs."""
    for item in objects:
        path = Path(inspect.getsourcefile(item) or "").parts
        where = "/".join(path[path.index("topk") :]) if "topk" in path else path[-1]
        _, line = inspect.getsourcelines(item)
        say(f"`{where}`, line {line}:\n\n```python\n{inspect.getsource(item).rstrip()}\n```")


def knobs(
    settings: Mapping[str, Sequence[float]],
    draw: Callable[..., list[dict[str, Any]]],
    *,
    start: Mapping[str, float],
    fallback: Figure,
    alt: str,
) -> None:
    """Panels of lines that follow sliders, with no kernel: every combination of settings is worked out here.

    Args:
        settings: for every slider, its name and values.
        draw: for one value of each (keywords by name with spaces as underscores), a list of panels: dictionaries with
            `title`, `x_label`, `y_label`, `x`, `lines` ({name: values}), `y_range` and, if points rather than lines
            are wanted, `points` True. Only the lines' values may depend on the settings.
        start: the values shown first.
        fallback: the figure shown where scripts do not run.
        alt: what there is to see, in words.
    """
    names = list(settings)
    frames = {}
    panels: list[dict[str, Any]] = []
    for place in product(*(range(len(values)) for values in settings.values())):
        chosen = {name.replace(" ", "_"): settings[name][at] for name, at in zip(names, place, strict=True)}
        panels = draw(**chosen)
        frames[",".join(map(str, place))] = [[_short(line) for line in panel["lines"].values()] for panel in panels]
    frame = {
        "knobs": [
            {"name": name, "values": list(settings[name]), "start": list(settings[name]).index(start[name])}
            for name in names
        ],
        "panels": [{**panel, "x": _short(panel["x"]), "lines": list(panel["lines"])} for panel in panels],
        "frames": frames,
    }
    picture = base64.b64encode(figures.png(fallback)).decode()
    script = resources.files("topk.lab").joinpath("knobs.js").read_text()
    data = json.dumps(frame, separators=(",", ":")).replace("</", "<\\/")
    page = (
        f'<div class="topk-knobs" role="group" aria-label="{alt}">'
        f'<img alt="{alt}" src="data:image/png;base64,{picture}">'
        f'<script type="application/json">{data}</script></div><script>{script}</script>'
    )
    display({"text/html": page, "text/plain": f"<interactive figure: {alt}>"}, raw=True)  # type: ignore[no-untyped-call]


def _short(values: Iterable[Any]) -> list[float]:
    """Four digits are more than a screen shows."""
    return [float(f"{float(value):.4g}") for value in values]
