"""Settings as they come from a YAML file or a record: every key known, every default filled in, every type right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def completed(section: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` overridden by `given`; keys without a default are refused by name.

    A default that is a number, a bool or a string also says which type a value must have; whole numbers given for a
    float become floats, so that 1 and 1.0 are the same configuration.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{section} must be a mapping, got {given!r}")
    for key in given:
        check_name(f"a key of {section}", key, defaults)
    return {key: _typed(f"{section}.{key}", default, given.get(key, default)) for key, default in defaults.items()}


def check_name(what: str, name: object, known: Iterable[str]) -> str:
    """`name`, which must be one of `known`; the error names the likeliest candidates."""
    names = list(known)
    if isinstance(name, str) and name in names:
        return name
    close = difflib.get_close_matches(str(name), names, n=3)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"expected one of {listed}"
    raise ValueError(f"{what} is unknown: {name!r}; {hint}")


def _typed(name: str, default: Any, value: Any) -> Any:
    if isinstance(default, bool | str):
        expected: type = type(default)
    elif isinstance(default, int | float):
        expected = type(default)
        if isinstance(value, int) and not isinstance(value, bool):
            value = expected(value)
    else:
        return value
    if type(value) is not expected:
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) and expected is float else ""
        raise TypeError(f"{name} must be of type {expected.__name__}, got {value!r}{hint}")
    return value
