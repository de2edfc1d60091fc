"""Values from YAML against the annotations of what they are given to: wrong ones are refused before anything starts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["fit", "hints"]

_SCALARS = (int, float, bool, str, NoneType)
_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text", NoneType: "null",
    Mapping: "a section of key: value", dict: "a section of key: value", Sequence: "a list", list: "a list",
    tuple: "a list",
}  # fmt: skip


def hints(call: Callable) -> dict[str, Any]:
    """Argument -> annotation of a constructor; Any where it has none, or one imported for type checkers only."""
    try:
        found = get_type_hints(call.__init__ if inspect.isclass(call) else call)
    except NameError:
        found = {}
    return {name: found.get(name, Any) for name in inspect.signature(call).parameters}


def fit(path: str, value: Any, wanted: Any) -> Any:
    """``value`` as the annotation ``wanted`` has it: a whole float as an int, sequences as lists, the rest as it is.

    An annotation that no YAML value is an instance of (a protocol, say) takes all but null: the constructor judges.
    ValueError says what ``path`` was given and what it takes.
    """
    origin, inner = _split(wanted)
    if origin in (Union, UnionType):
        for option in inner:
            try:
                return fit(path, value, option)
            except ValueError:
                continue
    elif origin in (Any, object) or origin not in _WORDS and value is not None:
        return value
    elif origin in (Mapping, dict) and isinstance(value, Mapping):
        return {key: fit(f"{path}.{key}", entry, inner[1] if inner else Any) for key, entry in value.items()}
    elif origin in (Sequence, list, tuple) and isinstance(value, list | tuple):
        kinds = inner if _fixed(origin, inner) else [inner[0] if inner else Any] * len(value)
        if len(kinds) == len(value):
            pairs = zip(value, kinds, strict=True)
            return [fit(f"{path}[{index}]", entry, kind) for index, (entry, kind) in enumerate(pairs)]
    elif origin in _SCALARS and _is(value, origin):
        return int(value) if origin is int and isinstance(value, float) else value
    raise ValueError(f"{path} must be {_words(wanted)}, got {value!r}")


def _split(wanted: Any) -> tuple[Any, tuple]:
    return get_origin(wanted) or wanted, get_args(wanted)


def _fixed(origin: Any, inner: tuple) -> bool:
    """A tuple of so many entries, not ``tuple[int, ...]``."""
    return origin is tuple and bool(inner) and inner[-1] is not ...


def _is(value: Any, kind: type) -> bool:
    """bool is an int to Python, and a float may be whole, infinite or no number: not to somebody who writes YAML."""
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return kind is float or value == int(value)
    return isinstance(value, kind)


def _words(wanted: Any) -> str:
    """An annotation in plain words."""
    origin, inner = _split(wanted)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, inner)))
    if _fixed(origin, inner):
        return f"[{', '.join(map(_words, inner))}]"
    each = f", of {_words(inner[0])} each" if origin in (Sequence, list, tuple) and inner else ""
    return f"{_WORDS.get(origin, getattr(origin, '__name__', origin))}{each}"
