"""The pages nobody writes: API reference, equations with their functions and tests, status."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from nbformat import NotebookNode

from book.pipeline.chapters import numbers
from book.pipeline.layout import ROOT, chapter_number, twins

EQUATIONS = ROOT / "book" / "equations.yml"


def generated(notebooks: dict[str, NotebookNode]) -> dict[str, str]:
    """File name below book/ -> text."""
    return {"api.md": api(), "equations.md": equations(notebooks), "status.md": status(notebooks)}


# --- API -------------------------------------------------------------------------------------------------------------


def api() -> str:
    """Every public name, from its docstring."""
    import topk

    functions = [name for name in topk.__all__ if inspect.isfunction(getattr(topk, name))]
    classes = [name for name in topk.__all__ if inspect.isclass(getattr(topk, name))]
    parts = ["# API reference", "Generated from the docstrings of the module."]
    parts += ["## Functions", *(_auto("function", f"topk.{name}") for name in functions)]
    if classes:
        parts += ["## Modules", *(_auto("class", f"topk.{name}", "show-inheritance") for name in classes)]
    for name in ("topk.operators", "topk.metrics", "topk.svm"):
        if importlib.util.find_spec(name) is not None:
            parts += [f"## {name}", _auto("module", name, "members")]
    inside = sorted(info.name for info in pkgutil.iter_modules([str(ROOT / "topk" / "losses")]))
    parts += ["## Inside", "One file a loss, for readers of the code:"]
    parts += [f"- `topk.losses.{name}`: {_first_line(f'topk.losses.{name}')}" for name in inside]
    return "\n\n".join(parts) + "\n"


def _auto(kind: str, name: str, *options: str) -> str:
    lines = [f".. auto{kind}:: {name}", *(f"   :{option}:" for option in options)]
    return "\n".join(("```{eval-rst}", *lines, "```"))


def _first_line(name: str) -> str:
    return (inspect.getdoc(importlib.import_module(name)) or "").split("\n")[0]


# --- equations -------------------------------------------------------------------------------------------------------


def _equations_file() -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    sheet, table = yaml.safe_load_all(EQUATIONS.read_text())
    return sheet, table


def equation_table() -> dict[str, dict[str, Any]]:
    """label -> what it states, the function that implements it, the test that checks it."""
    return _equations_file()[1]


def formula_groups() -> list[dict[str, Any]]:
    """The groups of the sheet of formulas: title, part, about, and formulas, label -> what the formula says."""
    return _equations_file()[0]


def gaps() -> list[str]:
    """What the table lacks, and what in it or on the sheet of formulas leads nowhere."""
    table, known = equation_table(), numbers().twins
    complaints = [
        f"{label} ({known[label].name}) is not in book/equations.yml" for label in known if label not in table
    ]
    complaints += [f"{label} in {EQUATIONS.name} is no label of a chapter" for label in table if label not in known]
    shown = [label for group in formula_groups() for label in group["formulas"]]
    complaints += [f"{label} on the sheet is no equation" for label in shown if label not in numbers().equations]
    complaints += [f"{label} is on the sheet twice" for label in set(shown) if shown.count(label) > 1]
    for label, entry in table.items():
        if entry.get("function") is not None and _resolve(entry["function"]) is None:
            complaints.append(f"{label}: there is no function {entry['function']}")
        if not _test_exists(str(entry.get("test", ""))):
            complaints.append(f"{label}: there is no test {entry.get('test')}")
    return complaints


def _resolve(name: str) -> object | None:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


def _test_exists(test: str) -> bool:
    """`tests/test_x.py::test_name`, or `notebooks/10_x.md` for what a chapter's own assertion checks."""
    path, _, function = test.partition("::")
    if not test or not (ROOT / path).is_file():
        return False
    text = (ROOT / path).read_text()
    return f"def {function}(" in text if function else "assert " in text


def equations(notebooks: dict[str, NotebookNode]) -> str:
    """The page: the sheet of formulas by loss, operator and bound, then, folded, all statements by chapter."""
    table, known = equation_table(), numbers().twins
    without = sum(not table.get(label, {}).get("function") for label in known)
    own = sum(table.get(label, {}).get("test") == f"notebooks/{twin.name}" for label, twin in known.items())
    parts = [
        "# Formulas, their code and tests",
        "The formulas that one looks up, by loss, operator and bound. The number beside a formula leads to its place "
        "in a chapter, where it is explained. Below each heading stand the letters of that group; those that all "
        "groups share are on the page [Notation](notation.md). Steps of proofs are left out here. They are in the "
        "[list of all statements](#all-statements-with-code-and-test) at the end.",
        *_sheet(table),
        "## All statements, with code and test",
        f"Which code computes a formula, and what checks it? Here are all {len(known)} numbered equations and "
        "theorems, chapter by chapter. Below each statement stand",
        "- *code*: the function that computes it. "
        f"{without} have none: steps of proofs, bounds, and statements about losses, data or machines that nothing "
        "has to compute;\n"
        f"- *test*: the test that checks it. Where none is named, in {own} cases, the chapter's own assertions do.",
        "A copy of the repository runs any of them with `python -m pytest` and the name that stands here. A test of "
        "the book fails when a label is missing on this page or leads nowhere.",
    ]
    titles = {chapter_number(twin): _title(notebooks[twin.stem]) for twin in twins()}
    for chapter, labels in itertools.groupby(_in_order(), lambda label: chapter_number(known[label])):
        rows = "\n".join(_equation_rows(labels, table))
        parts.append(f"::::{{dropdown}} {chapter}. {titles[chapter]}\n{rows}\n::::")
    return "\n\n".join(parts) + "\n"


def _sheet(table: dict[str, dict[str, str]]) -> Iterator[str]:
    """An index of the groups, then each with its letters and its formulas."""
    groups, index = formula_groups(), list[str]()
    for part, members in itertools.groupby(groups, lambda group: group["part"]):
        titles = [group["title"] for group in members]
        links = " · ".join(f"[{title}](#{re.sub(r'[^a-z-]', '', title.lower().replace(' ', '-'))})" for title in titles)
        index.append(f"- **{part}:** {links}")
    yield "\n".join(index)
    beside: dict[tuple[str, str], str] = {}  # what a formula states and who checks it -> the theorem around it
    for label in numbers().theorems:
        entry = table.get(label, {})
        beside[str(entry.get("states")), str(entry.get("test"))] = f" {{prf:ref}}`{label}`"
    for group in groups:
        yield f"## {group['title']}"
        yield str(group["about"]).strip()
        entries = []
        for label, says in group["formulas"].items():
            theorem = beside.get((str(table[label].get("states")), str(table[label].get("test"))), "")
            formula = _unpunctuated(numbers().formulas[label]).replace(r"\qquad", r"\quad").replace("\n", "\n  ")
            entries.append(f"{says} {{eq}}`{label}`{theorem}\n: $$\n  {formula}\n  $$")
        yield "::::{div} topk-formulas\n" + "\n\n".join(entries) + "\n::::"


def _unpunctuated(formula: str) -> str:
    """Without the comma or full stop of the sentence that it stands in."""
    return re.sub(r"\s*[.,](\}?)(\s*\\end\{\w+\})?\s*$", r"\1\2", formula)


def _in_order() -> list[str]:
    """All labels as a reader meets them, the chapters by their numbers."""
    known = numbers().twins
    texts = {twin: twin.read_text() for twin in twins()}

    def place(label: str) -> tuple[int, int]:
        found = re.search(rf"(^:label: {label}|\({label}\))$", texts[known[label]], re.MULTILINE)
        return chapter_number(known[label]), found.start() if found is not None else 0

    return sorted(known, key=place)


def _equation_rows(labels: Iterable[str], table: dict[str, dict[str, str]]) -> Iterator[str]:
    yield from (
        ":::{table}",
        ":class: topk-wide topk-equations",
        "",
        "| number | what it states, its code, its test |",
        "|---|---|",
    )
    alike: dict[tuple[str, str, str], list[str]] = {}  # a theorem and the formula in it are one row
    for label in labels:
        entry = table.get(label, {})
        role = "eq" if label in numbers().equations else "prf:ref"
        own = f"notebooks/{numbers().twins[label].name}"
        test = "" if entry.get("test") == own else str(entry.get("test"))
        row = str(entry.get("states")), str(entry.get("function") or ""), test
        alike.setdefault(row, []).append(f"{{{role}}}`{label}`")
    for (states, function, test), references in alike.items():
        code = "".join(
            f"<br><small>{kind} {_breakable(name)}</small>"
            for kind, name in (("code", function), ("test", test))
            if name
        )
        yield f"| {', '.join(references)} | {states}{code} |"
    yield ":::"


def _breakable(name: str) -> str:
    """A dotted name or a path as code that may be broken at its joints, so that a table needs no scrolling."""
    broken = re.sub(r"([./]|::|(?<!\.)_)", r"\1<wbr>", name).replace("_", "&#95;")
    return f'<code class="docutils literal">{broken}</code>'


# --- status ----------------------------------------------------------------------------------------------------------


def status(notebooks: dict[str, NotebookNode]) -> str:
    """With which versions, on which machine, under which profile and how long every notebook ran."""
    lines = ["| chapter | profile | seconds | torch | Python |", "|---|---|---|---|---|"]
    versions: dict[str, str] = {}
    machines: dict[str, list[str]] = {}
    for twin in twins():
        notebook = notebooks[twin.stem]
        run = notebook.metadata.get("run", {})
        versions = run.get("versions", versions)
        machines.setdefault(run.get("machine", "not noted"), []).append(str(chapter_number(twin)))
        title = f"[{chapter_number(twin)}. {_title(notebook)}](../notebooks/{twin.stem}.ipynb)"
        mine = run.get("versions", {})
        cells = (run.get("profile", "–"), run.get("seconds", "–"), mine.get("torch", "–"), mine.get("python", "–"))
        lines.append(f"| {title} | {' | '.join(str(cell) for cell in cells)} |")
    packages = "\n".join(f"- {name} {number}" for name, number in versions.items())
    hardware = "\n".join(
        f"- {machine}: {'all chapters' if len(machines) == 1 else 'chapters ' + ', '.join(its)}"
        for machine, its in machines.items()
    )
    return (
        "\n\n".join(
            (
                "# Status",
                "How each chapter's code last ran for this copy of the book. The profile `smoke` takes seconds, two "
                "minutes at most, and shows that everything works; `laptop` takes minutes; `full` is the size of the "
                "papers.",
                "\n".join(lines),
                "What the experiments and benchmarks were recorded on stands under each of their figures.",
                "## Hardware",
                hardware,
                "## Versions",
                packages,
            )
        )
        + "\n"
    )


def _title(notebook: NotebookNode) -> str:
    return str(notebook.cells[0].source).split("\n# ")[-1].split("\n")[0].removeprefix("# ")
