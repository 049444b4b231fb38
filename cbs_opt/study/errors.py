"""What can be wrong with a study or its folder."""

from __future__ import annotations

from formulations.errors import ArgumentError, CbsError


class StudyFolderError(ArgumentError):
    """The folder of results is in use, damaged, or belongs to another study."""


class ChangedInputsError(ArgumentError):
    """Runs that have results would now be other runs."""


class WorkerStartError(CbsError):
    """A worker process ended before it could take a run: nothing in the study could be done."""
