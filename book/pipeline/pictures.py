"""Pictures of the pages: few bytes, and a size in the page, so that nothing jumps when one arrives."""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nbformat import NotebookNode
from PIL import Image
from PIL.PngImagePlugin import PngInfo

_DOTS_PER_CSS_PIXEL = 1.44  # figures are drawn with 144 dots an inch and shown with 100 pixels an inch
_INLINE = re.compile(r"(data:image/png;base64,)([A-Za-z0-9+/=\s]+)")
_IMAGE = re.compile(r"<img\b[^>]*>")


def smaller(png: bytes, *, field: bool = False) -> bytes:
    """The picture with a palette, if that is fewer bytes; what is written into it is kept.

    Drawings keep their colours, photographs get 256 of their own, fields of colour 48. A heavy field has a pixel for
    each that is shown, none for fine screens.
    """
    shrunk = field and len(png) > _HEAVY
    information, buffer = PngInfo(), io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        for key, value in image.info.items():
            if isinstance(key, str) and isinstance(value, str):
                information.add_text(key, value)
        plain = image.convert("RGB")
        if shrunk:
            width, height = (round(side / _DOTS_PER_CSS_PIXEL) for side in plain.size)
            # First what differs much, however rare: a mark in the field keeps its colour.
            plain = _of_its_own_colours(plain.resize((width, height)), 20, (70, 30))
            information.add_text(_SHRUNK, "yes")
        elif field:
            plain = _of_its_own_colours(plain, 48, (50, 12))
        else:
            plain = plain.quantize(256) if plain.getcolors(_FEW) is None else _of_its_own_colours(plain)
        plain.save(buffer, format="png", optimize=True, pnginfo=information)
    return min(png, buffer.getvalue(), key=len)


def _of_its_own_colours(
    picture: Image.Image, colours_kept: int = 48, distances: tuple[int, ...] = (24, 12)
) -> Image.Image:
    """With the most frequent colours that can be told apart, as they are, and every other as the nearest of these.

    The usual ways average rare colours: a thin line would not have that of its loss any more. `distances` are those of
    two colours that look alike (of 255 a channel), from the widest on, the smaller ones only if there is room.
    """
    pixels = np.asarray(picture).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    found, place, count = np.unique(pixels, return_inverse=True, return_counts=True)
    colours = np.stack((found >> 16, found >> 8 & 255, found & 255), 1)
    chosen: list[int] = []
    away = np.full(len(found), np.inf)
    for alike in distances:
        while len(chosen) < colours_kept and (apart := away > alike**2).any():
            chosen.append(int(np.where(apart, count, 0).argmax()))
            away = np.minimum(away, ((colours - colours[chosen[-1]]) ** 2).sum(1))
    palette = colours[chosen]
    nearest = ((colours[:, None] - palette) ** 2).sum(2).argmin(1)
    result = Image.fromarray(nearest[place].reshape(pixels.shape).astype(np.uint8), mode="P")
    result.putpalette(palette.astype(np.uint8).tobytes())
    return result


_FEW = 8192  # different colours of a drawing
_HEAVY = 75_000  # bytes of a field of colour, from which on it is shrunk
_SHRUNK = "one pixel for each that is shown"


@dataclass(frozen=True)
class Drawn:
    """A picture of the checkout, with the digest of what it was drawn from: a test can tell when it is stale.

    `draw` gives the figure and `sources` what it depends on besides the code of its module.
    """

    path: Path
    draw: Callable[[], Any]
    sources: Callable[[], bytes] = bytes

    def digest(self) -> str:
        """Changes with the sources and with the code."""
        code = Path(inspect.getfile(self.draw)).read_bytes()
        return hashlib.sha256(self.sources() + code).hexdigest()

    def drawn_from(self) -> str:
        """The digest that the picture carries; empty where there is none."""
        if not self.path.exists():
            return ""
        with Image.open(self.path) as image:
            return str(image.info.get("Source", ""))

    def write(self) -> bool:
        """Draws the picture again if it is stale; says whether it was."""
        digest = self.digest()
        if self.drawn_from() == digest:
            return False
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        from topk_lab import figures

        figures.use_style()
        figure, buffer = self.draw(), io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144, metadata={"Source": digest})
        plt.close(figure)
        self.path.write_bytes(smaller(buffer.getvalue()))
        return True


def lighten(notebook: NotebookNode) -> None:
    """Makes every picture among the outputs smaller, also those inside HTML."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                field = output.metadata.get("image/png", {}).get("field", False)
                data["image/png"] = _again(data["image/png"], field=field)
            if "text/html" in data:
                text = data["text/html"] if isinstance(data["text/html"], str) else "".join(data["text/html"])
                data["text/html"] = _INLINE.sub(lambda match: match[1] + _again(match[2]), text)


def _again(text: str, *, field: bool = False) -> str:
    png = base64.b64decode(text)
    return base64.b64encode(smaller(png, field=field)).decode()


def size(pages: Path) -> None:
    """Writes width and height of each picture into the pages; all but a page's first load when they come near."""
    for page in pages.rglob("*.html"):
        text = page.read_text()
        first = True

        def sized(match: re.Match[str], page: Path = page) -> str:
            nonlocal first
            source = re.search(r'\bsrc="([^":]+\.png)"', match[0])
            if source is None or re.search(r"\b(width|height)=", match[0]) or not (page.parent / source[1]).is_file():
                return match[0]
            with Image.open(page.parent / source[1]) as image:
                dots = 1.0 if _SHRUNK in image.info else _DOTS_PER_CSS_PIXEL
                width, height = (round(side / dots) for side in image.size)
            wait = "" if first else ' loading="lazy"'
            first = False
            return match[0].replace("<img", f'<img width="{width}" height="{height}"{wait}', 1)

        changed = _IMAGE.sub(sized, text)
        if changed != text:
            page.write_text(changed)
