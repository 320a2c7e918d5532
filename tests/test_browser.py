"""The browser's checks find what they are there for: small pages, each with one flaw, beside one that is in order."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jupytext")
pytest.importorskip("playwright")
pytest.importorskip("PIL")
import small_site
from PIL import Image, ImageChops, ImageDraw, ImageStat

from book.pipeline import browser, layout, printing, speed
from topk_lab import data
from topk_lab.study import suggestions

CHROMIUM = browser.find_chromium()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

PAGE = """<!doctype html><html lang="en" data-theme="light"><head><title>A page</title>
<link rel="icon" href="data:,"><style>
body {{ background: #fff; color: #111; }} html[data-theme=dark] body {{ background: #111; color: #eee; }}
summary:focus-visible, input:focus-visible {{ outline: 2px solid blue; }} {style}
</style></head><body><article class="bd-article"><h1 id="top">A page</h1><p>Text.</p>{body}</article></body></html>"""

GOOD = (
    "<details><summary>Solution</summary><p>Because.</p></details>"
    '<div class="topk-knobs"><input type="range" aria-label="tau" min="0" max="3" value="1"></div>'
    '<p><a href="good.html#top" style="color: inherit">A link</a></p>'
)
FLAWS = {
    "wide": ('<div style="width: 2000px">wide</div>', "scrolls sideways by"),
    "raw": ("<p>See $$x$$.</p>", "raw markup"),
    "placeholder": ("<p>@PAPERS@</p>", "raw markup"),
    "undescribed": ('<img src="figure.png" width="60" height="60">', "picture without a description"),
    "unsized": ('<img src="figure.png" alt="A line">', "picture without width and height"),
    "lost": ('<img src="lost.png" alt="Lost" width="9" height="9">', "404"),
    "elsewhere": ('<script src="https://example.org/x.js"></script>', "did not load https://example.org/x.js"),
    "error": ("<script>undefinedFunction()</script>", "undefinedFunction is not defined"),
    "faint": ('<p style="color: #aaa">faint</p>', "little contrast"),
    "half": ('<p style="opacity: 0.4">faint</p>', "little contrast"),
    "faint-on-dark": ('<p style="color: #333">dark on dark</p>', "(wide, dark): little contrast"),
    "formula": (
        '<span class="math">\\(x\\)</span><script>window.MathJax = {startup: {promise: 1}}</script>',
        "not typeset",
    ),
    "swollen": (
        '<p><mjx-container>x<mjx-c style="font-size: 200%">k</mjx-c></mjx-container></p>',
        "formula with letters larger than the text",
    ),
    "dead": ('<a href="nowhere.html" style="color: inherit">x</a>', "dead link nowhere.html"),
    "anchor": ('<a href="good.html#nothing" style="color: inherit">x</a>', "no anchor good.html#nothing"),
    "no-sliders": ('<div class="topk-knobs">...</div>', "an interactive figure without its sliders"),
    "no-choice": ('<div class="topk-quiz">...</div>', "a quiz without anything to choose"),
    "silent": (
        '<div class="topk-quiz"><fieldset><input type="radio" aria-label="A"><p role="status"></p></fieldset></div>',
        "does not answer to the keyboard",
    ),
    "nameless": ('<div class="topk-knobs"><input type="range"></div>', "has no name for a screen reader"),
    "unreachable": (
        '<details><summary tabindex="-1" onfocus="this.blur()">Solution</summary>x</details>',
        "cannot be reached",
    ),
    "stuck": (
        '<details><summary onclick="event.preventDefault()">Solution</summary>x</details>',
        "does not answer to the keyboard",
    ),
    "unseen": (
        '<details><summary style="outline: none">Solution</summary>x</details>',
        "does not show that it has the focus",
    ),
}


def figure(ink: int, paper: int = 255) -> bytes:
    """A picture with lettering of this grey along its left edge."""
    image, buffer = Image.new("L", (240, 160), paper), io.BytesIO()
    draw = ImageDraw.Draw(image)
    for place in range(10, 150, 12):
        draw.text((4, place), "0.25", fill=ink)
    draw.line([(40, 140), (220, 20)], fill=0)
    image.save(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "figure.png").write_bytes(figure(ink=0))
    (folder / "good.html").write_text(PAGE.format(style="", body=GOOD))
    for name, (body, _) in FLAWS.items():
        (folder / f"{name}.html").write_text(PAGE.format(style="", body=body))
    return folder


@pytest.fixture(scope="module")
def opened_browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with browser.opened(CHROMIUM) as found:
        yield found


@needs_chromium
def test_the_keyboard_suggests_what_python_does(
    tmp_path: Path, opened_browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, **_: shown.append(bundle))
    suggestions.show(["the king of", "in the"])
    (tmp_path / "keyboard.html").write_text(PAGE.format(style="", body=shown[0]["text/html"]))
    models, names = suggestions.read()[0], data.load({"name": "words", "vocabulary": 3000, "rows": 1}).classes
    page = opened_browser.new_page(viewport={"width": 390, "height": 800})
    page.goto((tmp_path / "keyboard.html").as_uri())
    cases = [
        ("And the LORD ", "and the lord", ""),
        ("in the be", "in the", "be"),
        ("a, xyzzy ", "a, xyzzy", ""),
        ("",) * 3,
    ]
    for typed, words, begun in cases:
        page.fill(".topk-keyboard input", typed)
        found = page.locator(".suggestions button").all_inner_texts()
        expected = [suggestions.suggested(model, words, names, begun) for model in models.values()]
        assert [found[:3], found[3:]] == expected, typed
    page.fill(".topk-keyboard input", "the ki")
    page.locator(".suggestions button").first.click()
    (first,) = (suggestions.suggested(model, "the", names, "ki")[0] for model in list(models.values())[:1])
    assert page.input_value(".topk-keyboard input") == f"the {first} "
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


@needs_chromium
def test_a_page_in_order_has_no_complaint(pages: Path) -> None:
    assert browser.check(pages, str(CHROMIUM), chosen=["good"]) == []


@pytest.mark.parametrize("name", FLAWS)
def test_a_flaw_is_found(name: str, pages: Path, opened_browser: Any) -> None:
    with browser.served(pages) as root:
        seen = browser.look(opened_browser, root, f"{name}.html", sizes=["phone"] if name == "wide" else ["wide"])
        good = browser.Seen("good.html", anchors=["top"])
        complaints = seen.complaints + browser._links({seen.name: seen, good.name: good}, pages, root)
    assert any(FLAWS[name][1] in line for line in complaints), complaints


def test_faint_lettering_in_a_figure_is_found(tmp_path: Path, opened_browser: Any) -> None:
    assert browser.ink_contrast(figure(ink=0)) > 15
    assert browser.ink_contrast(figure(ink=190)) < browser.CONTRAST
    assert browser.ink_contrast(figure(ink=255, paper=0)) > 15
    (tmp_path / "figure.png").write_bytes(figure(ink=190))
    body = '<div class="cell_output"><img src="figure.png" alt="A line" width="240" height="160"></div>'
    (tmp_path / "page.html").write_text(PAGE.format(style="", body=body))
    with browser.served(tmp_path) as root:
        complaints = browser.look(opened_browser, root, "page.html", sizes=["wide"]).complaints
    assert [line.split(": ", 1)[1][:35] for line in complaints] == ["the writing in figure 1 has a contr"] * 2


def test_screenshots_are_kept(pages: Path, tmp_path: Path, opened_browser: Any) -> None:
    with browser.served(pages) as root:
        browser.look(opened_browser, root, "good.html", tmp_path)
    sizes = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            sizes[path.stem] = image.size[0]
    assert sizes == {
        f"good-{size}-{theme}": browser.SIZES[size][0] for size in browser.SIZES for theme in browser.THEMES
    }


def test_a_launch_button_names_this_repository_and_a_notebook() -> None:
    twin = next(twin for twin in layout.twins() if twin.with_suffix(".ipynb").exists())
    start = "https://colab.research.google.com/github"
    here = "/".join(layout.address().split("/")[-2:])
    good = browser.Seen("notebooks/x.html", launch=[f"{start}/{here}/blob/main/colab/notebooks/{twin.stem}.ipynb"])
    assert browser._launch(good) == []
    for wrong in ("colab/notebooks/99_none.ipynb", f"notebooks/{twin.stem}.ipynb", "README.md"):
        assert browser._launch(browser.Seen("notebooks/x.html", launch=[f"{start}/{here}/blob/main/{wrong}"])) != []
    other = f"{start}/other/book/blob/main/colab/notebooks/{twin.stem}.ipynb"
    assert browser._launch(browser.Seen("notebooks/x.html", launch=[other])) != []
    assert browser._launch(browser.Seen("notebooks/x.html")) != []


def test_formulas_are_typeset_without_a_network(tmp_path: Path, opened_browser: Any) -> None:
    """With the book's own extension and settings; `\\boldsymbol` and `\\cancel` are loaded on demand."""
    own = layout.config()["sphinx"]["config"]
    settings = {name: own[name] for name in ("mathjax_path", "mathjax3_config")}
    settings["myst_enable_extensions"] = ["dollarmath"]
    (tmp_path / "page.md").write_text(
        "# A page\n\n$$\\boldsymbol{x} + \\cancel{\\mathbb{E}} = \\mathcal{L}$$\n\n"
        "Some (of $k$), 95 % of `5 %`.\n\nEither *a*, or $b$, or *c*. A (top-$j$-th) one.\n"
    )
    out = small_site.built(tmp_path, "page", extensions=["myst_nb", "formulas"], **settings)
    with browser.served(out) as root:
        page = opened_browser.new_page()
        failures: list[str] = []
        page.on("requestfailed", lambda request: failures.append(request.url))
        page.goto(f"{root}/page.html")
        assert browser._typeset(page, "page") == []
        assert failures == []
        assert page.evaluate("document.querySelectorAll('mjx-container mjx-math').length") == 4
        assert page.evaluate("document.querySelectorAll('mjx-merror').length") == 0
        page.close()
    words = (out / "page.html").read_text()
    assert '<span class="topk-word"><span class="math notranslate nohighlight">\\(k\\)</span>),</span>' in words
    assert "Either a, or \\(b\\), or c." in re.sub("<[^>]*>", "", words), "the second of two equal texts"
    assert (
        'A <span class="topk-word">(top-<span class="math notranslate nohighlight">\\(j\\)</span>-th)</span>' in words
    )
    assert " 95\N{NO-BREAK SPACE}% of" in words
    assert '<span class="pre">5</span> <span class="pre">%</span>' in words, "code stays as it is"
    assert sum(path.stat().st_size for path in (out / "_static" / "mathjax").rglob("*") if path.is_file()) < 4e6


def test_without_a_browser_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(browser, "find_chromium", lambda: None)
    monkeypatch.setattr("sys.argv", ["browser"])
    assert browser.main() == 0
    assert capsys.readouterr().out.startswith("SKIPPED: no browser found")


# --- speed -----------------------------------------------------------------------------------------------------------


def test_slow_and_jumping_pages_are_measured(
    tmp_path: Path, opened_browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_SETTLED", 1000)
    jump = "<script>setTimeout(() => document.querySelector('h1').style.marginTop = '300px', 500)</script>"
    (tmp_path / "still.html").write_text(PAGE.format(style="", body="<p>Text.</p>" * 40))
    (tmp_path / "jumps.html").write_text(PAGE.format(style="", body="<p>Text.</p>" * 40 + jump))
    still = speed.measure(opened_browser, tmp_path, "still.html", loads=1)
    jumps = speed.measure(opened_browser, tmp_path, "jumps.html", loads=1)
    assert still["shift"] == 0 < 0.1 < jumps["shift"]
    assert still["paint"] > 0.15, "one round trip takes longer than that"


# --- pictures and print ----------------------------------------------------------------------------------------------


def test_pictures_become_smaller_and_keep_their_words() -> None:
    import nbformat

    from book.pipeline import pictures

    noisy = Image.effect_noise((300, 200), 40).convert("RGB")
    buffer = io.BytesIO()
    noisy.save(buffer, format="png")
    text = base64.b64encode(buffer.getvalue()).decode()
    output = nbformat.v4.new_output(
        "display_data", {"image/png": text, "text/html": f'<img src="data:image/png;base64,{text}" alt="noise">'}
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=[output])])
    pictures.lighten(notebook)
    data = notebook.cells[0].outputs[0].data
    assert len(data["image/png"]) < 0.7 * len(text)
    assert data["text/html"] == f'<img src="data:image/png;base64,{data["image/png"]}" alt="noise">'
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as image:
        assert image.size == (300, 200)
        changed = ImageChops.difference(image.convert("L"), noisy.convert("L"))
    assert ImageStat.Stat(changed).mean[0] < 3


def test_thin_lines_keep_the_colours_of_their_losses() -> None:
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex

    from book.pipeline import pictures
    from topk_lab import figures

    colours = sorted({look["color"] for look in figures.LOSSES.values()})
    plot, axis = plt.subplots(figsize=(4, 3))
    axis.imshow(np.linspace(0, 1, 64)[None], "viridis", extent=(0, 1, 0, 1), aspect="auto")  # many other colours
    for place, colour in enumerate(colours, 1):
        axis.axvline(place / (len(colours) + 1), color=colour, linewidth=1.5)
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=144)
    plt.close(plot)
    with Image.open(io.BytesIO(pictures.smaller(buffer.getvalue()))) as image:
        assert image.mode == "P"
        kept = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in image.convert("RGB").getcolors()}
    assert {to_hex(colour) for colour in colours} <= kept


def test_a_field_keeps_its_tints_and_the_colour_of_a_small_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    from book.pipeline import pictures

    shades = np.linspace((0, 32, 76), (255, 234, 70), 288).astype(np.uint8)
    field = np.repeat(shades[None], 288, 0)
    field[200:] = np.linspace((70, 0, 84), (200, 255, 250), 288).astype(np.uint8)  # more shades than there is room for
    tints, mark = [(140, 191, 220), (140, 211, 192)], (213, 94, 0)
    field[:72, :144], field[:72, 144:], field[140:152, 140:152] = *tints, mark
    buffer = io.BytesIO()
    Image.fromarray(field).save(buffer, format="png")
    for heavy, side in ((0, 200), (10**6, 288)):
        monkeypatch.setattr(pictures, "_HEAVY", heavy)
        with Image.open(io.BytesIO(pictures.smaller(buffer.getvalue(), field=True))) as image:
            found = {colour for _, colour in image.convert("RGB").getcolors()}
            assert image.size == (side, side)
            assert {*tints, mark} <= found
            assert len(found) <= 48


def test_pictures_get_their_size(tmp_path: Path) -> None:
    from book.pipeline import pictures

    (tmp_path / "figure.png").write_bytes(figure(ink=0))
    page = tmp_path / "page.html"
    page.write_text('<img alt="a" src="figure.png"/><img alt="b" src="figure.png"/><img src="gone.png"/>')
    pictures.size(tmp_path)
    assert page.read_text() == (
        '<img width="167" height="111" alt="a" src="figure.png"/>'
        '<img width="167" height="111" loading="lazy" alt="b" src="figure.png"/><img src="gone.png"/>'
    )
    pictures.size(tmp_path)
    assert page.read_text().count("width=") == 2


@pytest.mark.slow
def test_book_is_printed_with_links_and_outline(tmp_path: Path, opened_browser: Any) -> None:
    pdfium = pytest.importorskip("pypdfium2")
    (tmp_path / "a").mkdir()
    one = '<section id="s"><p>Read <a href="two.html#s">the other</a> and <a href="gone.html">this</a>.</p></section>'
    two = '<section id="s"><details class="sd-dropdown"><summary>Solution</summary><p>Unfolded.</p></details></section>'
    (tmp_path / "a" / "one.html").write_text(PAGE.format(style="", body=one))
    (tmp_path / "a" / "two.html").write_text(PAGE.format(style="", body=two))
    target = tmp_path / "book.pdf"
    parts = {"": ["a/one.html"], "Part": ["a/two.html"]}
    printing.write(tmp_path, parts, opened_browser, target)
    document = pdfium.PdfDocument(target)
    text = [document[page].get_textpage().get_text_range() for page in range(len(document))]
    assert len(text) == 4
    assert "Version" in text[0]
    assert re.search(r"A page\s*3\s*Part\s*A page\s*4", text[1])
    assert "Unfolded." in text[3]
    assert [entry.get_title() for entry in document.get_toc()] == ["Contents", "A page", "A page"]
    source = printing.document(tmp_path, parts)
    assert 'href="#a-two--s"' in source
    assert 'id="a-two--s"' in source
    assert "a/gone.html" in source
    with pytest.raises(layout.BookError, match=r"a/three\.html"):
        printing.document(tmp_path, {"": ["a/three.html"]})
    (tmp_path / "a" / "two.html").write_text(PAGE.format(style="", body='<img src="lost.png" alt="lost">'))
    with pytest.raises(layout.BookError, match=r"picture missing: .*lost\.png"):
        printing.write(tmp_path, parts, opened_browser, target)
