"""Exceptions: every one names the argument, what was found and what to do about it."""

from __future__ import annotations


class CbsError(Exception):
    """Base of every exception raised on purpose by `cbs_opt` and `formulations`."""


class ArgumentError(CbsError, ValueError):
    """An argument is unusable.

    Parameters
    ----------
    argument : str
        Name of the argument, as the caller wrote it.
    found : str
        What was found there.
    remedy : str
        What to do about it.
    """

    def __init__(self, argument: str, found: str, remedy: str) -> None:
        super().__init__(f"{argument}: {found}; {remedy}")
        self.argument = argument
        self.found = found
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str, str]]:
        return type(self), (self.argument, self.found, self.remedy)


class ShapeError(ArgumentError):
    """An array has the wrong number of dimensions or does not fit another."""


class NonFiniteError(ArgumentError):
    """An array holds NaN or infinity."""


class NotPositiveDefiniteError(ArgumentError):
    """The Hessian is not symmetric, not positive semidefinite, or singular where it may not be."""


class UnknownMethodError(ArgumentError):
    """No method of that name is registered."""


class UnknownOptionError(ArgumentError):
    """A method or solver does not know an option."""


class UnsupportedProblemError(ArgumentError):
    """A method or solver cannot take this program, size or formulation."""


class SolverUnavailableError(ArgumentError):
    """An optional solver is not installed, or its licence does not allow the call."""


class InstanceFormatError(ArgumentError):
    """A file is not an instance, a solution or a mask of ours, or is damaged."""
