"""Records as values that JSON has, and back."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints


def plain(value: Any) -> Any:
    """Return `value` in types that JSON has.

    Numbers that are not finite become strings, a function its name, anything unknown its text.
    """
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item())
    return getattr(value, "__qualname__", None) or str(value)


def rebuilt(cls: Any, body: Any) -> Any:
    """Return the dataclass whose `plain` values are `body`, each brought to its annotated type.

    Raises `TypeError`, `ValueError` or `AttributeError` if `body` has a field too many or too few, or a
    value of another type.
    """
    hints = _hints(cls)
    unknown = set(body) - set(hints)
    if unknown:
        raise ValueError(f"unknown field {min(unknown)} of {cls.__name__}")
    return cls(**{name: _converted(hints[name], value) for name, value in body.items()})


_hints = cache(get_type_hints)


def _converted(hint: Any, value: Any) -> Any:
    options = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if types.NoneType not in options:
            raise ValueError("null where a value is needed")
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return rebuilt(option, value)
        if getattr(option, "__origin__", None) is tuple:
            return tuple(_converted(option.__args__[0], entry) for entry in value)
    if float in options:
        return float(value)
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{value!r} where an integer is needed")
    return value
