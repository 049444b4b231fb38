"""What lets a time limit end the building of a model: pauses at which it is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

PERIOD = 512
"""Items, such as rows of a model, between two looks (some milliseconds)."""


class BuildingStopped(Exception):
    """The time limit passed while a model was built."""


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
