"""From what a solver says to what we claim.

Objectives are re-evaluated by `formulations.loss`, a bound is lowered by the solver's tolerances, the
warm start is never lost, and nothing is called optimal unless the gap between our objective and the
lowered bound says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from formulations.incumbents import checked_incumbent, greedy
from formulations.loss import objective, solved_weights
from formulations.problem import BlockProblem, BoolArray
from formulations.solution import (
    BlockSolution,
    Certificate,
    Limit,
    Limits,
    SolveStats,
    Termination,
    TracePoint,
)

INCONSISTENCY = 1e-6
"""A bound above the objective of a known set by more than this, relative, is numerical trouble."""
CONSTANT_ERROR = 1e-13
"""Rounding of a bound, relative to the largest term that cancels in it."""


def known_set(
    problem: BlockProblem, program: str, method: str, limits: Limits, incumbent: BlockSolution | None
) -> BlockSolution:
    """Return the set to start from: the incumbent's, re-evaluated, or the greedy one.

    With a time limit of 0 and no incumbent the smallest magnitudes are pruned.

    Raises
    ------
    ArgumentError
        If the incumbent has no set or keeps the wrong number of weights.
    """
    if incumbent is None:
        incumbent = greedy(problem, program, limits=limits)
    return _solution(problem, program, method, checked_incumbent(problem, incumbent))


def _solution(
    problem: BlockProblem, program: str, method: str, keep: BoolArray, **fields: Any
) -> BlockSolution:
    return BlockSolution(
        keep=keep,
        weights=solved_weights(problem, keep, program),
        objective=objective(problem, keep, program),
        program=program,
        method=method,
        **fields,
    )


def only_set(problem: BlockProblem, known: BlockSolution, began: float) -> BlockSolution:
    """Return the proved answer where only one set has the right size (``n_prune`` 0 or n)."""
    assert known.keep is not None
    return _solution(
        problem,
        known.program,
        known.method,
        known.keep,
        bound=known.objective,
        termination=Termination.OPTIMAL,
        rel_gap=0.0,
        stats=SolveStats(seconds=time.perf_counter() - began, message="only one set has this size"),
    )


def trivial_bound(problem: BlockProblem) -> float | None:
    """Return 0 where the gradient vanishes (the loss model is then never negative), else None."""
    return None if np.any(problem.gradient_or_zero) else 0.0


def conclude(
    problem: BlockProblem,
    known: BlockSolution,
    limits: Limits,
    began: float,
    *,
    candidates: Iterable[BoolArray] = (),
    bound: float | None = None,
    slack: float = 0.0,
    finished: bool = False,
    limit: Limit | None = None,
    failure: str = "",
    stats: Mapping[str, Any] | None = None,
    trace: tuple[TracePoint, ...] = (),
    certificate: Certificate | None = None,
) -> BlockSolution:
    """Return the best of the known set and `candidates` with the status that the facts allow.

    Parameters
    ----------
    problem : BlockProblem
    known : BlockSolution
        Warm start; its program and method name the answer's.
    limits : Limits
    began : float
        ``time.perf_counter()`` at the start.
    candidates : iterable of (n,) bool arrays
        Kept sets of the right size.
    bound : float, optional
        Proved bound in units of the problem, tolerances already taken off.
    slack : float
        Size of the solver's tolerances: one that finished may miss the requested gap by a few times it.
    finished : bool
        The solver claims optimality.
    limit : Limit, optional
    failure : str
        Message of a backend that failed.
    certificate : Certificate, optional
        Evidence for a root bound.
    """
    best = known
    for keep in candidates:
        found = _solution(problem, known.program, known.method, keep)
        if found.objective < best.objective:  # type: ignore[operator]
            best = found
    value = best.objective
    assert value is not None
    if bound is not None and bound > value + INCONSISTENCY * abs(value) + slack:
        failure = f"bound {bound!r} exceeds the objective {value!r} of a known set: numerical trouble"
    trivial = trivial_bound(problem)
    proved = [b for b in (None if failure else bound, trivial) if b is not None]
    lower = min(max(proved), value) if proved else None
    termination, gap = _status(value, lower, limits, finished, slack, failure)
    if termination is not Termination.FEASIBLE:
        limit = None
    elif limit is None and finished:
        limit = Limit.GAP
    details = dict(stats or {})
    if failure:
        details["message"] = failure
    seconds = time.perf_counter() - began
    point = TracePoint(seconds=seconds, nodes=details.get("nodes", 0), objective=value, bound=lower)
    return BlockSolution(
        keep=best.keep,
        weights=best.weights,
        objective=value,
        bound=lower,
        termination=termination,
        limit=limit,
        program=known.program,
        method=known.method,
        rel_gap=gap,
        certificate=certificate,
        stats=SolveStats(seconds=seconds, **details),
        trace=(*trace, point),
    )


def _status(
    value: float, bound: float | None, limits: Limits, finished: bool, slack: float, failure: str
) -> tuple[Termination, float | None]:
    """Return termination, and the gap to which it is meant when it is a proof."""
    scale = max(abs(value), 1e-12)
    if failure:
        return Termination.ERROR, None
    if bound is None:
        return Termination.FEASIBLE, None
    gap = (value - bound) / scale
    if gap <= limits.rel_gap:
        return Termination.OPTIMAL, limits.rel_gap
    # The solver is done, and what is left is its own tolerance: proved, to the gap stated.
    if finished and gap <= limits.rel_gap + 4.0 * slack / scale + CONSTANT_ERROR:
        return Termination.OPTIMAL, gap
    return Termination.FEASIBLE, None
