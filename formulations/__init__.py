"""One block, one program: data, evaluator, relaxations, exact methods and solvers (no torch)."""

from formulations.errors import ArgumentError, CbsError
from formulations.loss import Verification, joint_loss, objective, selection_loss, step_loss, update, verify
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
