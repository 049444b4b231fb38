"""Run what cannot be interrupted in a thread of its own, so that Ctrl-C and a deadline reach the caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Result = TypeVar("Result")

TICK = 0.2
"""Seconds between two looks at the deadline; the wait ends earlier when the work does."""
GRACE = 1.0
"""Seconds after Ctrl-C that a backend has to stop; then its thread is left to itself."""


@dataclass
class Watched(Generic[Result]):
    """How watched work ended.

    Attributes
    ----------
    value : object or None
        What it returned; None where it was left to itself.
    interrupted : bool
        Whether Ctrl-C came.
    """

    value: Result | None = None
    interrupted: bool = False
    error: BaseException | None = None


def run_watched(
    work: Callable[[], Result],
    stop: Callable[[], object],
    *,
    deadline: float | None = None,
    grace: float = GRACE,
) -> Watched[Result]:
    """Run `work` in a thread and wait for it; an error in it is raised here.

    Parameters
    ----------
    work : callable
        Must release the interpreter lock where it takes long.
    stop : callable
        Asks it to stop; called after Ctrl-C, and past the deadline.
    deadline : float, optional
        Reading of `time.perf_counter`.
    grace : float, default 1
        Seconds after Ctrl-C until it is left to itself.
    """
    ended = Watched[Result]()
    finished = threading.Event()

    def run() -> None:
        try:
            ended.value = work()
        except BaseException as error:
            ended.error = error
        finally:
            finished.set()

    threading.Thread(target=run, daemon=True, name="backend").start()
    given_up: float | None = None
    # Not Thread.join: interrupted by Ctrl-C, it takes a running thread for a finished one.
    while not finished.is_set():
        try:
            finished.wait(TICK)
            if deadline is not None and time.perf_counter() >= deadline:
                stop()
            if given_up is not None and time.perf_counter() >= given_up:
                return Watched(interrupted=True)
        except KeyboardInterrupt:
            ended.interrupted = True
            if given_up is None:
                given_up = time.perf_counter() + grace
            stop()
    if ended.error is not None:
        raise ended.error
    return ended
