"""From a text twin to its two notebooks: one in MyST for the site, one in plain markdown for GitHub and Colab.

The twin is the only text anyone edits. The site's notebook keeps its MyST. The committed one says the same without
directives and roles, which Colab would show raw: theorems become bold paragraphs, folded solutions become `<details>`,
references become the numbers that the site prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

from book.pipeline import times
from book.pipeline.layout import ROOT, BookError, address, chapter_number, twins, version

SETUP = """\
# On Colab: install topk from this book's repository at this book's version. Elsewhere: nothing.
import sys

if "google.colab" in sys.modules:
    import subprocess

    package = "topk-losses @ git+{address}@v{version}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", package], check=True)"""

ADMONITIONS = {"note": "Note", "tip": "Tip", "important": "Important", "warning": "Warning", "seealso": "See also"}
_OPEN = re.compile(r"^(:{3,})\{([\w:-]+)\}[ ]*(.*)$")
_EQUATION = re.compile(r"^\$\$[ ]*\n(.*?)\n\$\$(?:[ ]*\(([\w:-]+)\))?[ ]*$", re.MULTILINE | re.DOTALL)
_ROLE = re.compile(r"\{(eq|prf:ref|cite:p|cite:t)\}`([^`]+)`")
_OTHER_ROLE = re.compile(r"\{[a-z][\w:.-]*\}`[^`]+`")


def setup_source() -> str:
    """The set-up cell, one text for all notebooks."""
    return SETUP.format(address=address(), version=version())


def read(twin: Path) -> NotebookNode:
    """The twin as a notebook in MyST, with how long it runs in its opening text and the set-up cell after it."""
    notebook: NotebookNode = jupytext.read(twin)
    notebook.cells[0].source = _with_time(notebook.cells[0].source, times.sentence(twin.stem))
    setup = nbformat.v4.new_code_cell(setup_source(), metadata={"tags": ["setup", "remove-cell"]})
    notebook.cells.insert(1, setup)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"
        cell.source = cell.source.strip("\n")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
            "twin": twin.name,
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def _with_time(opening: str, sentence: str) -> str:
    """The sentence as a paragraph of its own, after the one that says how long reading takes, or after the title."""
    paragraphs = opening.split("\n\n")
    at = next((number for number, text in enumerate(paragraphs) if "**Time**" in text), 0)
    return "\n\n".join((*paragraphs[: at + 1], sentence, *paragraphs[at + 1 :]))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that run, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook: NotebookNode) -> Iterator[str]:
    """The text of the cells that do not run."""
    return (cell.source for cell in notebook.cells if cell.cell_type == "markdown")


# --- numbers ---------------------------------------------------------------------------------------------------------


@dataclass
class Numbers:
    """What the site prints for a label: equations "10.3", theorems ("Theorem", "10.1")."""

    equations: dict[str, str] = field(default_factory=dict)
    theorems: dict[str, tuple[str, str]] = field(default_factory=dict)


@cache
def numbers() -> Numbers:
    """Counted over all twins as Sphinx counts: by chapter, and for theorems by kind."""
    found = Numbers()
    for twin in twins():
        chapter, equations, kinds = chapter_number(twin), 0, dict[str, int]()
        for text in markdown(read(twin)):
            for _, label in _EQUATION.findall(text):
                if not label:
                    raise BookError(f"{twin.name}: a displayed equation has no label")
                equations += 1
                _enter(found.equations, label, f"{chapter}.{equations}", twin)
            for name, label in _proof_labels(text):
                kinds[name] = kinds.get(name, 0) + 1
                _enter(found.theorems, label, (name.capitalize(), f"{chapter}.{kinds[name]}"), twin)
    return found


def _enter(table: dict[str, Any], label: str, value: Any, twin: Path) -> None:
    if label in table:
        raise BookError(f"{twin.name}: the label {label} is used twice")
    table[label] = value


def _proof_labels(text: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(r"^:{3,}\{prf:(\w+)\}[^\n]*\n:label: ([\w-]+)", text, re.MULTILINE):
        if match[1] != "proof":
            yield match[1], match[2]


# --- plain markdown --------------------------------------------------------------------------------------------------


def plain(notebook: NotebookNode, chapter: int) -> NotebookNode:
    """The same notebook in markdown that GitHub, Jupyter and Colab show as it is meant."""
    result: NotebookNode = nbformat.from_dict(notebook)
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
    names = [" ".join(person.prelast_names + person.last_names) for person in entry.persons["author"]]
    who = names[0] if len(names) == 1 else f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} et al."
    fields = entry.fields
    link = f"https://doi.org/{fields['doi']}" if "doi" in fields else fields.get("url", "")
    year = fields["year"]
    text = f"{who} ({year})" if textual else f"{who}, {year}"
    return f"[{text}]({link})" if link else text


# --- outputs ---------------------------------------------------------------------------------------------------------


def with_outputs(notebook: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """A copy of `notebook` that carries the outputs of `executed`, whose code cells are the same."""
    result: NotebookNode = nbformat.from_dict(notebook)
    mine, theirs = code_cells(result), code_cells(executed)
    if [cell.source for cell in mine] != [cell.source for cell in theirs]:
        raise BookError("these outputs belong to other code")
    for cell, ran in zip(mine, theirs, strict=True):
        cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
    if "run" in executed.metadata:
        result.metadata["run"] = executed.metadata["run"]
    return result
