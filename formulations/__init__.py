"""One block, one program: data, evaluator, relaxations, exact methods and solvers (no torch).

A name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formulations.channels import ChannelTerm
    from formulations.errors import ArgumentError, CbsError
    from formulations.loss import joint_loss, objective, selection_loss, step_loss, update
    from formulations.problem import BlockProblem
    from formulations.solution import (
        BlockSolution,
        Certificate,
        Limit,
        Limits,
        SolveStats,
        Subject,
        Termination,
        TracePoint,
    )
    from formulations.support import Count, Groups, NofM, Support
    from formulations.verification import Verdict, Verification, verify

_HOME = {
    "ArgumentError": "errors",
    "BlockProblem": "problem",
    "BlockSolution": "solution",
    "CbsError": "errors",
    "Certificate": "solution",
    "ChannelTerm": "channels",
    "Count": "support",
    "Groups": "support",
    "Limit": "solution",
    "Limits": "solution",
    "NofM": "support",
    "SolveStats": "solution",
    "Subject": "solution",
    "Support": "support",
    "Termination": "solution",
    "TracePoint": "solution",
    "Verdict": "verification",
    "Verification": "verification",
    "joint_loss": "loss",
    "objective": "loss",
    "selection_loss": "loss",
    "step_loss": "loss",
    "update": "loss",
    "verify": "verification",
}

__all__ = [
    "ArgumentError",
    "BlockProblem",
    "BlockSolution",
    "CbsError",
    "Certificate",
    "ChannelTerm",
    "Count",
    "Groups",
    "Limit",
    "Limits",
    "NofM",
    "SolveStats",
    "Subject",
    "Support",
    "Termination",
    "TracePoint",
    "Verdict",
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
