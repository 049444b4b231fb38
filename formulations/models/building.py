"""What lets a time limit end the building of a model: pauses at which it is looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PERIOD = 512
"""Items, such as rows of a model, between two looks (some milliseconds)."""


class BuildingStopped(Exception):
    """The time limit passed while a model was built; its text names a step that cannot be divided, if any."""


def undivided(what: str, work: Callable[[], Result], stopped: Callable[[], bool]) -> Result:
    """Return what `work` does, asking before and after; one that ends too late is named as `what`."""
    if stopped():
        raise BuildingStopped
    began = time.perf_counter()
    result = work()
    if stopped():
        seconds = time.perf_counter() - began
        raise BuildingStopped(f"{what} took {seconds:.2f} s, within which the time limit is not looked at")
    return result


def asking(items: Iterable[Item], stopped: Callable[[], bool], *, period: int = PERIOD) -> Iterator[Item]:
    """Yield `items`; raise `BuildingStopped` once `stopped` says so, asked every `period` of them."""
    for number, item in enumerate(items):
        if number % period == 0 and stopped():
            raise BuildingStopped
        yield item


def fill(
    constraint: Any,
    keys: Iterable[Item],
    rule: Callable[[Item], Any],
    stopped: Callable[[], bool],
    *,
    period: int = PERIOD,
) -> None:
    """Add ``rule(key)`` for every key to a Pyomo constraint that has no rule, asking as `asking` does.

    Pyomo logs whatever leaves a rule of its own as an error of the model.
    """
    for key in asking(keys, stopped, period=period):
        constraint.add(key, rule(key))
