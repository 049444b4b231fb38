"""What lets a time limit end the building of a model: pauses at which it is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, TypeVar

Item = TypeVar("Item")

PERIOD = 512
"""Items, such as rows of a model, between two looks (some milliseconds)."""


class BuildingStopped(BaseException):
    """The time limit passed while a model was built.

    Like an interrupt it is no `Exception`: Pyomo logs those that leave a rule as errors of the model.
    """


def asking(items: Iterable[Item], stopped: Callable[[], bool]) -> Iterator[Item]:
    """Yield `items`; raise `BuildingStopped` once `stopped` says so."""
    for number, item in enumerate(items):
        if number % PERIOD == 0 and stopped():
            raise BuildingStopped
        yield item


def timely(
    rule: Callable[..., Any], stopped: Callable[[], bool], *, period: int = PERIOD
) -> Callable[..., Any]:
    """Return a Pyomo rule that raises `BuildingStopped` once `stopped` says so, asked each `period` calls."""
    calls = count()

    def asked(*arguments: Any) -> Any:
        if next(calls) % period == 0 and stopped():
            raise BuildingStopped
        return rule(*arguments)

    return asked
