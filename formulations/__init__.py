"""One block, one program: data, evaluator, relaxations, exact methods and solvers (no torch).

A name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formulations.errors import ArgumentError, CbsError
    from formulations.loss import (
        Verification,
        joint_loss,
        objective,
        selection_loss,
        step_loss,
        update,
        verify,
    )
    from formulations.problem import BlockProblem
    from formulations.solution import (
        BlockSolution,
        Certificate,
        Limit,
        Limits,
        SolveStats,
        Termination,
        TracePoint,
    )

_HOME = {
    "ArgumentError": "errors",
    "BlockProblem": "problem",
    "BlockSolution": "solution",
    "CbsError": "errors",
    "Certificate": "solution",
    "Limit": "solution",
    "Limits": "solution",
    "SolveStats": "solution",
    "Termination": "solution",
    "TracePoint": "solution",
    "Verification": "loss",
    "joint_loss": "loss",
    "objective": "loss",
    "selection_loss": "loss",
    "step_loss": "loss",
    "update": "loss",
    "verify": "loss",
}

__all__ = [
    "ArgumentError",
    "BlockProblem",
    "BlockSolution",
    "CbsError",
    "Certificate",
    "Limit",
    "Limits",
    "SolveStats",
    "Termination",
    "TracePoint",
    "Verification",
    "joint_loss",
    "objective",
    "selection_loss",
    "step_loss",
    "update",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"formulations.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
