"""What every page of the book uses: the profile it runs under, numbers in prose, tables, code read from the module."""

from __future__ import annotations

import ast
import inspect
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from IPython import get_ipython
from IPython.display import Markdown, display

import topk
from topk_lab import figures

PROFILES = ("smoke", "laptop", "full")
_PACKAGES = ("topk", "topk_lab")
_NUMERIC = re.compile(r"[-+(\d][^a-zA-Z|]{0,24}")


def begin(profile: str, **sizes: Any) -> Any:
    """Sets the figures' style and the seed, prints what the page runs on, and returns this profile's size.

    >>> seeds = begin(profile, smoke=1, laptop=5, full=20)
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {PROFILES}, got {profile!r}")
    figures.use_style()
    torch.manual_seed(0)
    versions = f"topk {topk.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"profile {profile} | {versions} | {_device()}")
    return sizes.get(profile)


def _device() -> str:
    """Where the tensors will be, and on a GPU which of the two implementations serves the losses there."""
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' * (threads != 1)}"
    from topk.backend import why_not_triton

    reason = why_not_triton(torch.device("cuda", torch.cuda.current_device()))
    served = "losses by Triton kernels" if reason is None else f"losses in plain torch: {reason}"
    return f"{torch.cuda.get_device_name()}, {served}"


def say(text: str) -> None:
    """Prose with numbers in it: markdown, so that it reads as text wherever the notebook is opened."""
    parts = _AS_IT_IS.split(text)
    parts[::2] = map(typeset, parts[::2])
    display(Markdown("".join(parts)))  # type: ignore[no-untyped-call]


_AS_IT_IS = re.compile(r"(```.*?```|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]*>)", re.DOTALL)  # code, formulas, addresses


def typeset(text: str) -> str:
    """Numbers as print has them: a minus sign for a hyphen, 2·10⁻⁷ for 2e-07.

    >>> typeset("top-5: -0.3, error 2e-07")
    'top-5: −0.3, error 2·10⁻⁷'
    """
    return figures.minus(_SCIENTIFIC.sub(_power, text))


def _power(found: re.Match[str]) -> str:
    digits, exponent = found[1], str(int(found[2]))
    if float(digits) == 0:
        return "0"
    power = f"10{exponent.translate(_RAISED)}"
    return power if float(digits) == 1 else f"{digits}·{power}"


_SCIENTIFIC = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)e([-+]\d{2,3})\b")  # no hash of a commit
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def tell_failed_assertions() -> None:
    """From the next cell on, an assertion that fails is told on the page and does not stop it.

    What a chapter asserts holds of its full records. A run in a smaller size makes others; the page still shows which
    of the assertions hold of them. Outside a notebook nothing changes.
    """
    shell = get_ipython()
    if shell is not None and not any(isinstance(known, _Telling) for known in shell.ast_transformers):
        shell.ast_transformers.append(_Telling())
        say("*A smaller run: what a cell asserts of the full records need not hold of these, and is told, not raised.*")


class _Telling(ast.NodeTransformer):
    """`assert x` becomes `if not x: say("...")`."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        text = f"*Does not hold in this smaller run: `{ast.unparse(node.test)}`.*"
        tell = ast.parse(f"__import__('{__name__}').page.say({text!r})").body
        told = ast.If(test=ast.UnaryOp(op=ast.Not(), operand=node.test), body=tell, orelse=[])
        return ast.fix_missing_locations(ast.copy_location(told, node))


def table(rows: Sequence[Mapping[str, Any]], missing: str = "pending") -> None:
    """A table of dictionaries; numbers with three digits, `missing` where a row lacks what another has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(_cell(row.get(name, missing)) for name in names)} |" for row in rows]
    say("\n".join(lines))


def _cell(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, float):
        text = str(value)
        return text.replace(" ", "\u00a0") if _NUMERIC.fullmatch(text) else text  # "61.2 ± 0.1" stays on one line
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def source(*objects: Callable[..., Any]) -> None:
    """The code of these functions, whole, read from the module that runs."""
    for item in map(inspect.unwrap, objects):
        path = Path(inspect.getsourcefile(item) or "").parts
        package = next((name for name in path if name in _PACKAGES), path[-1])
        where = "/".join(path[len(path) - 1 - path[::-1].index(package) :])
        _, line = inspect.getsourcelines(item)
        say(f"`{where}`, line {line}:\n\n```python\n{inspect.getsource(item).rstrip()}\n```")
