"""What can be wrong with a study or its folder, and how a run can end."""

from __future__ import annotations

from formulations.errors import ArgumentError, CbsError
from formulations.solution import Termination

UNAVAILABLE = "unavailable"
"""The solver is not installed, or its licence does not allow the call."""
REFUSED = "refused"
"""The method does not take this block, or an option; nothing was solved."""
INVALID = "invalid"
"""The answer contradicts itself: wrong count, wrong objective, bound above it."""
OUT_OF_MEMORY = "out_of_memory"
"""An allocation failed, or the process grew past the limit and was killed."""
TIMED_OUT = "timed_out"
"""The time limit was ignored; the process was killed after the grace."""
CRASHED = "crashed"
"""The process ended by itself, by a signal or an exit."""

FAILURES = {UNAVAILABLE, REFUSED, INVALID, OUT_OF_MEMORY, TIMED_OUT, CRASHED, Termination.ERROR.value}
"""Endings without an answer that could be used; the others are those of `formulations.Termination`."""


class StudyFolderError(ArgumentError):
    """The folder of results is in use, damaged, or belongs to another study."""


class ChangedInputsError(ArgumentError):
    """Runs that have results would now be other runs."""


class WorkerStartError(CbsError):
    """A worker process ended before it could take a run: nothing in the study could be done."""
