"""Checks of arguments at the border: the value as a plain Python one, or an error that says what to do.

NumPy scalars are numbers like any other; booleans are none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

from formulations.errors import ArgumentError


def whole_number(argument: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int if it is a whole number >= `least`, else raise `ArgumentError`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ArgumentError(argument, f"{value!r}", f"pass a whole number >= {least}")
    return int(value)


def finite_number(
    argument: str, value: Any, *, least: float = 0.0, most: float = math.inf, above: bool = False
) -> float:
    """Return `value` as a float if it is finite and in range, else raise `ArgumentError`.

    Parameters
    ----------
    argument : str
        What the message calls it.
    value : object
    least, most : float
        Allowed range, both ends included.
    above : bool, default False
        Leave `least` itself out.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or value > most or (above and value == least):
        wanted = f"{'>' if above else '>='} {least:g}" + (f" and <= {most:g}" if most < math.inf else "")
        raise ArgumentError(argument, f"{value!r}", f"pass a finite number {wanted}")
    return float(value)


def seconds(argument: str, value: Any) -> float | None:
    """Return a time limit as a float, or None; raise `ArgumentError` for anything else."""
    return None if value is None else finite_number(argument, value)


def flag(argument: str, value: Any) -> bool:
    """Return `value` if it is True or False, else raise `ArgumentError`."""
    if not isinstance(value, bool):
        raise ArgumentError(argument, f"{value!r}", "pass True or False")
    return value


def one_of(argument: str, value: Any, choices: Iterable[str]) -> str:
    """Return `value` if it is among `choices`, else raise `ArgumentError`."""
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        raise ArgumentError(argument, f"{value!r}", f"choose among {', '.join(names)}")
    return value


def names(argument: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Return one string or several as a tuple, else raise `ArgumentError`."""
    entries = (value,) if isinstance(value, str) else value
    if not isinstance(entries, Sequence) or not all(isinstance(entry, str) for entry in entries):
        raise ArgumentError(argument, f"{value!r}", "pass a string, or a sequence of strings")
    return tuple(entries)


@contextmanager
def within(record: str, *fields: str, **renamed: str) -> Iterator[None]:
    """Let errors about an argument name the field of a record that it came from.

    Parameters
    ----------
    record : str
        What the names of the fields begin with.
    *fields : str
        Arguments that are called as the fields are.
    **renamed : str
        The field of every other argument.
    """
    try:
        yield
    except ArgumentError as error:
        field = renamed.get(error.argument, error.argument if error.argument in fields else None)
        if field is None:
            raise
        raise type(error)(f"{record}.{field}", error.found, error.remedy) from error
