"""Checks of arguments at the border: the value as a plain Python one, or an error that says what to do.

NumPy scalars are numbers like any other; booleans are none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

from formulations.errors import ArgumentError
from formulations.solution import LARGEST_SEED

RUN_SEEDS = LARGEST_SEED // 2
"""Seeds of a whole run: those of its passes and steps are above it."""


SHOWN = 80
"""Letters of a value that messages show at most."""


def shown(value: Any) -> str:
    """Return how a message writes a value: as Python does, its middle left out where that is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 4 :]}"


def whole_number(argument: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int if it is a whole number >= `least`, else raise `ArgumentError`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ArgumentError(argument, shown(value), f"pass a whole number >= {least}")
    return int(value)


def seed_number(argument: str, value: Any, below: int = LARGEST_SEED) -> int:
    """Return `value` as an int if it is a whole number >= 0 and `below` a limit, else raise `ArgumentError`.

    That of runs is `RUN_SEEDS`.
    """
    seed = whole_number(argument, value, least=0)
    if seed >= below:
        raise ArgumentError(argument, f"{seed}", f"pass a whole number below {below}")
    return seed


def finite_number(
    argument: str, value: Any, *, least: float = 0.0, most: float = math.inf, above: bool = False
) -> float:
    """Return `value` as a float if it is finite, >= `least` (or `above` it) and <= `most`, else raise."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or value > most or (above and value == least):
        wanted = f"{'>' if above else '>='} {least:g}" + (f" and <= {most:g}" if most < math.inf else "")
        raise ArgumentError(argument, shown(value), f"pass a finite number {wanted}")
    return float(value)


def flag(argument: str, value: Any) -> bool:
    """Return `value` if it is True or False, else raise `ArgumentError`."""
    if not isinstance(value, bool):
        raise ArgumentError(argument, shown(value), "pass True or False")
    return value


def one_of(argument: str, value: Any, choices: Iterable[str]) -> str:
    """Return `value` if it is among `choices`, else raise `ArgumentError`."""
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        raise ArgumentError(argument, shown(value), f"choose among {', '.join(names)}")
    return value


def names(argument: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Return one string or several as a tuple, else raise `ArgumentError`."""
    entries = (value,) if isinstance(value, str) else value
    if not isinstance(entries, Sequence) or not all(isinstance(entry, str) for entry in entries):
        raise ArgumentError(argument, shown(value), "pass a string, or a sequence of strings")
    return tuple(entries)


def path(argument: str, value: Any) -> str | os.PathLike[str] | None:
    """Return a path, or None; raise `ArgumentError` for anything else."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ArgumentError(argument, shown(value), "pass a path")
    return value


def plain_value(argument: str, value: Any) -> Any:
    """Return a value that a file of text can hold, as Python's own; refuse anything else."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain_value(argument, entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain_value(argument, entry) for entry in value]
    remedy = "pass a number, a string, or a list or mapping of them"
    raise ArgumentError(argument, shown(value), remedy)


def check_fields(record: Any, prefix: str, check: Callable[..., Any], *fields: str, **options: Any) -> None:
    """Replace fields of a frozen record by ``check(argument, value, **options)``, one of this module.

    `prefix` stands before the name of a field in messages. None stays where it is the default.
    """
    for name in fields:
        value = getattr(record, name)
        if value is not None or record.__dataclass_fields__[name].default is not None:
            object.__setattr__(record, name, check(f"{prefix}{name}", value, **options))


@contextmanager
def within(record: str, *fields: str, **renamed: str) -> Iterator[None]:
    """Let errors about an argument name the field of a record that it came from: ``record.field``.

    `fields` are arguments that are called as the fields are; `renamed` has the field of every other one.
    """
    try:
        yield
    except ArgumentError as error:
        field = renamed.get(error.argument, error.argument if error.argument in fields else None)
        if field is None:
            raise
        raise type(error)(f"{record}.{field}", error.found, error.remedy) from error
