"""How far a run is: shown as bars on a terminal, told to an object of one's own, or to nobody."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from formulations.errors import ArgumentError

Advance = Callable[[int], object]
"""Is called with the number of units that were done since the last call."""


Result = TypeVar("Result")


class Progress:
    """What is told how far a run is; this one keeps it to itself.

    Override `phase` to be told. What is raised from there ends the run as Ctrl-C does.
    """

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, unit: str, done: int = 0) -> Iterator[Advance]:
        """Begin a phase of `total` units, None if not known, of which `done` are; yield what counts on.

        Phases lie within each other, as the exchanges of a search within its blocks. One may end early.
        """
        yield ignored

    def collect(self, name: str, results: Iterable[Result], total: int | None, *, unit: str) -> list[Result]:
        """Return the results that an iterator computes, as a phase in which each is a unit."""
        collected = []
        with self.phase(name, total, unit=unit) as advance:
            for result in results:
                collected.append(result)
                advance(1)
        return collected


SILENT = Progress()


class Bars(Progress):
    """Bars by tqdm on standard error, each within the one of its phase; none for a single unit."""

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, unit: str, done: int = 0) -> Iterator[Advance]:
        from tqdm import tqdm

        if total == 1:
            yield ignored
            return
        # The outermost bars stay on the screen.
        with tqdm(total=total, initial=done, desc=name, unit=unit, leave=None) as bar:
            yield bar.update


def reporting(progress: Progress | bool) -> Progress:
    """Return what is told of a run: for True bars, if standard error is a terminal; for False nobody.

    Raises `ArgumentError` for anything else that is no `Progress`.
    """
    if isinstance(progress, Progress):
        return progress
    if not isinstance(progress, bool):
        remedy = "pass True, False, or an object of a subclass of Progress"
        raise ArgumentError("progress", f"{progress!r}", remedy)
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return Bars() if progress and terminal else SILENT


def ignored(count: int) -> None:
    """Take no note of what was done."""
