"""One block, one program: data, evaluator, relaxations, exact methods and solvers (no torch)."""

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
from formulations.verification import Verdict, Verification, verify

__all__ = [
    "ArgumentError",
    "BlockProblem",
    "BlockSolution",
    "CbsError",
    "Certificate",
    "Limit",
    "Limits",
    "SolveStats",
    "Subject",
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
