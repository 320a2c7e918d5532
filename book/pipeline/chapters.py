"""A chapter's notebook, in MyST as the pair holds it and in plain markdown for Colab.

Jupytext keeps the two halves of a pair equal, `notebooks/NN_name.md` and `notebooks/NN_name.ipynb`: either may be
edited, in JupyterLab or elsewhere. Colab would show MyST's directives and roles raw, so its notebook, in `colab/`, says
the same without them: theorems become bold paragraphs, folded solutions and the answers of a quiz become `<details>`,
references become the numbers that the site prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode

from book.pipeline import quiz, times
from book.pipeline.layout import COLAB, ROOT, BookError, address, chapter_number, twins, version

SETUP = """\
# On Colab: install the book's two packages at its version. Elsewhere: nothing.
import sys

if "google.colab" in sys.modules:
    import subprocess

    book = "git+{address}@v{version}"
    packages = [f"topk-losses @ {{book}}", f"topk-lab @ {{book}}#subdirectory=lab"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *packages], check=True)"""

ADMONITIONS = {"note": "Note", "tip": "Tip", "important": "Important", "warning": "Warning", "seealso": "See also"}
_OPEN = re.compile(r"^(:{3,})\{([\w:-]+)\}[ ]*(.*)$")
_EQUATION = re.compile(r"^\$\$[ ]*\n(.*?)\n\$\$(?:[ ]*\(([\w:-]+)\))?[ ]*$", re.MULTILINE | re.DOTALL)
_ROLE = re.compile(r"\{(eq|prf:ref|cite:p|cite:t)\}`([^`]+)`")
_OTHER_ROLE = re.compile(r"\{[a-z][\w:.-]*\}`[^`]+`")


def setup_source() -> str:
    """The set-up cell, one text for all notebooks."""
    return SETUP.format(address=address(), version=version())


def read(twin: Path) -> NotebookNode:
    """The twin as a notebook; its cells are named by their place."""
    notebook: NotebookNode = jupytext.read(twin)
    notebook.nbformat_minor = 5
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"
    return notebook


def refresh(twin: Path) -> bool:
    """Writes what is generated in a twin, the set-up cell and how long it runs; says whether something changed."""
    notebook = read(twin)
    _place_time(notebook, times.sentence(twin.stem))
    notebook.cells[1].source = setup_source()
    text = jupytext.writes(notebook, fmt="md:myst", config=load_jupytext_config(str(twin)))
    changed = bool(text != twin.read_text())
    if changed:
        twin.write_text(text)
    return changed


def _place_time(notebook: NotebookNode, sentence: str) -> None:
    """The sentence as a paragraph of its own, after the one that says how long reading takes, or after the title."""
    texts = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    place = next((cell for cell in texts if "**Time**" in cell.source), texts[0])
    for cell in texts:
        cell.source = "\n\n".join(text for text in cell.source.split("\n\n") if not text.startswith("**Runs in**"))
    paragraphs = place.source.split("\n\n")
    at = next((number for number, text in enumerate(paragraphs) if "**Time**" in text), 0)
    place.source = "\n\n".join((*paragraphs[: at + 1], sentence, *paragraphs[at + 1 :]))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that run, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook: NotebookNode) -> Iterator[str]:
    """The text of the cells that do not run."""
    return (cell.source for cell in notebook.cells if cell.cell_type == "markdown")


# --- numbers ---------------------------------------------------------------------------------------------------------


@dataclass
class Numbers:
    """What the site prints for a label, equations "10.3", theorems ("Theorem", "10.1"); formulas; a label's twin."""

    equations: dict[str, str] = field(default_factory=dict)
    formulas: dict[str, str] = field(default_factory=dict)
    theorems: dict[str, tuple[str, str]] = field(default_factory=dict)
    twins: dict[str, Path] = field(default_factory=dict)


@cache
def numbers() -> Numbers:
    """Counted over all twins as Sphinx counts: by chapter, and for theorems by kind."""
    found = Numbers()
    for twin in twins():
        chapter, equations, kinds = chapter_number(twin), 0, dict[str, int]()
        for text in markdown(read(twin)):
            for formula, label in _EQUATION.findall(text):
                if not label:
                    raise BookError(f"{twin.name}: a displayed equation has no label")
                equations += 1
                _place(found, label, twin)
                found.equations[label], found.formulas[label] = f"{chapter}.{equations}", formula
            for name, label in _proof_labels(text):
                kinds[name] = kinds.get(name, 0) + 1
                _place(found, label, twin)
                found.theorems[label] = (name.capitalize(), f"{chapter}.{kinds[name]}")
    return found


def _place(found: Numbers, label: str, twin: Path) -> None:
    if label in found.twins:
        raise BookError(f"{twin.name}: the label {label} is used twice")
    found.twins[label] = twin


def _proof_labels(text: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(r"^:{3,}\{prf:(\w+)\}[^\n]*\n:label: ([\w-]+)", text, re.MULTILINE):
        if match[1] != "proof":
            yield match[1], match[2]


# --- plain markdown --------------------------------------------------------------------------------------------------


def plain(notebook: NotebookNode, chapter: int) -> NotebookNode:
    """The same notebook, paired with nothing, in markdown that GitHub, Jupyter and Colab show as it is meant."""
    result: NotebookNode = nbformat.from_dict(notebook)
    result.metadata.pop("jupytext", None)
    sections = 0
    for cell in result.cells:
        if cell.cell_type != "markdown":
            continue
        lines = []
        for line in cell.source.split("\n"):
            if line.startswith("# "):
                line = f"# {chapter}. {line[2:]}"
            elif line.startswith("## "):
                sections += 1
                line = f"## {chapter}.{sections} {line[3:]}"
            lines.append(line)
        cell.source = plain_text("\n".join(lines), chapter)
    return result


def plain_text(text: str, chapter: int) -> str:
    """MyST to plain markdown, for the part of MyST that the book allows itself."""
    text = re.sub(r"^\([\w:-]+\)=\n", "", text, flags=re.MULTILINE)
    text = "\n".join(_directives(text.split("\n"), chapter))
    text = _EQUATION.sub(_plain_equation, text)
    text = _ROLE.sub(_plain_role, text)
    text = text.replace("](../", "](../../")  # Colab's notebooks lie one folder deeper
    if (left := _OTHER_ROLE.search(text)) is not None:
        raise BookError(f"chapter {chapter}: {left[0]} has no plain form; use a markdown link")
    return text.strip("\n")


def _directives(lines: list[str], chapter: int) -> Iterator[str]:
    position = 0
    while position < len(lines):
        match = _OPEN.match(lines[position])
        if match is None:
            yield lines[position]
            position += 1
            continue
        fence, name, title = match.groups()
        try:
            end = lines.index(fence, position + 1)
        except ValueError:
            raise BookError(f"chapter {chapter}: {lines[position]} is never closed") from None
        yield from _plain_directive(name, title.strip(), lines[position + 1 : end], chapter)
        position = end + 1


def _plain_directive(name: str, title: str, body: list[str], chapter: int) -> Iterator[str]:
    options: dict[str, str] = {}
    while body and (option := re.match(r"^:([\w-]+):\s*(.*)$", body[0])) is not None:
        options[option[1]] = option[2]
        body = body[1:]
    body = list(_directives("\n".join(body).strip("\n").split("\n"), chapter))
    if name == "dropdown":
        yield from ("<details>", f"<summary>{title}</summary>", "", *body, "", "</details>")
    elif name == "quiz":
        try:
            yield from quiz.plain(body)
        except ValueError as error:
            raise BookError(f"chapter {chapter}: {error}") from None
    elif name == "prf:proof":
        yield from ("*Proof.*", "", *body, "", "∎")
    elif name.startswith("prf:"):
        kind, number = numbers().theorems[options["label"]]
        yield from (f"**{kind} {number}{f' ({title})' if title else ''}.**", "", *body)
    elif name in ADMONITIONS or name == "admonition":
        heading = title if name == "admonition" else ADMONITIONS[name]
        yield from (f"> **{heading}**", ">", *(f"> {line}".rstrip() for line in body))
    else:
        raise BookError(f"chapter {chapter}: the directive {name} has no plain form (see book/pipeline/chapters.py)")


def _plain_equation(match: re.Match[str]) -> str:
    body, label = match.groups()
    return f"$$\n{body}\n\\tag{{{numbers().equations[label]}}}\n$$"


def _plain_role(match: re.Match[str]) -> str:
    role, argument = match.groups()
    if role == "eq":
        return f"({_known(numbers().equations, argument)})"
    if role == "prf:ref":
        return " ".join(_known(numbers().theorems, argument))
    names = [_citation(key.strip(), textual=role == "cite:t") for key in argument.split(",")]
    return "; ".join(names) if role == "cite:t" else f"({'; '.join(names)})"


def _known(table: dict[str, Any], label: str) -> Any:
    if label not in table:
        raise BookError(f"the reference to {label} leads nowhere")
    return table[label]


@cache
def bibliography() -> dict[str, Any]:
    """The entries of book/references.bib."""
    from pybtex.database import parse_file

    return dict(parse_file(str(ROOT / "book" / "references.bib")).entries)


def _citation(key: str, textual: bool) -> str:
    entry = _known(bibliography(), key)
    who, year, fields = _who(entry), years(bibliography())[key], entry.fields
    link = f"https://doi.org/{fields['doi']}" if "doi" in fields else fields.get("url", "")
    text = f"{who} ({year})" if textual else f"{who}, {year}"
    return f"[{text}]({link})" if link else text


def _who(entry: Any) -> str:
    names = [" ".join(person.prelast_names + person.last_names) for person in entry.persons.get("author", [])]
    return names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."


def years(entries: Mapping[str, Any]) -> dict[str, str]:
    """The year of each entry; those that would be cited alike have a letter behind it, in the order of their keys."""
    alike: dict[tuple[str, str], list[str]] = {}
    for key in sorted(entries):
        alike.setdefault((_who(entries[key]), entries[key].fields["year"][:4]), []).append(key)
    return {
        key: year + ("abcdefgh"[place] if len(keys) > 1 else "")
        for (_, year), keys in alike.items()
        for place, key in enumerate(keys)
    }


# --- outputs ---------------------------------------------------------------------------------------------------------


def with_outputs(twin: Path, executed: NotebookNode) -> NotebookNode:
    """What the twin says, with the outputs of a notebook whose code is the same."""
    combined: NotebookNode = combine_inputs_with_outputs(read(twin), executed, fmt="md:myst")
    return combined


def commit(twin: Path, notebook: NotebookNode) -> None:
    """Writes the twin's other half, and Colab's notebook."""
    nbformat.write(notebook, twin.with_suffix(".ipynb"))
    COLAB.mkdir(parents=True, exist_ok=True)
    nbformat.write(plain(notebook, chapter_number(twin)), COLAB / f"{twin.stem}.ipynb")
