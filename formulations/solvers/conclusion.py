"""From what a solver says to what we claim.

Objectives are re-evaluated by `formulations.loss`, a bound is lowered by the solver's tolerances, the
warm start is never lost, and nothing is called optimal unless the gap between our objective and the
lowered bound says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from formulations.incumbents import checked_incumbent, greedy
from formulations.loss import solved_weights, step_loss, trivial_bound
from formulations.problem import BlockProblem, BoolArray
from formulations.relaxations.only_set import only_set_certificate
from formulations.solution import (
    BlockSolution,
    Certificate,
    Limit,
    Limits,
    SolveStats,
    Termination,
    TracePoint,
    stated_support,
    status_of,
)

INCONSISTENCY = 1e-6
"""A bound above the objective of a known set by more than this, relative, is numerical trouble."""
CONSTANT_ERROR = 1e-13
"""Rounding of a bound, relative to the largest term that cancels in it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a solver has to say at its end.

    Attributes
    ----------
    candidates : iterable of (n,) bool arrays
        Kept sets of the right size.
    bound : float, optional
        Proved bound in units of the problem, tolerances already taken off.
    slack : float
        Size of the solver's tolerances: a bound may exceed the objective by as much.
    finished : bool
        The solver claims optimality; a gap that its tolerances leave is stated as `Limit.GAP`.
    limit : Limit, optional
        What stopped it.
    failure : str
        Message of a backend that failed.
    stats : mapping
        Fields of `SolveStats`, and the message.
    trace : tuple of TracePoint
        Its progress before the end.
    certificate : Certificate, optional
        Evidence for a root bound.
    """

    candidates: Iterable[BoolArray] = ()
    bound: float | None = None
    slack: float = 0.0
    finished: bool = False
    limit: Limit | None = None
    failure: str = ""
    stats: Mapping[str, Any] = field(default_factory=dict)
    trace: tuple[TracePoint, ...] = ()
    certificate: Certificate | None = None


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
    if program == "joint":
        problem.require_definite()
    if incumbent is None:
        incumbent = greedy(problem, program, limits=limits)
    return _solution(problem, program, method, checked_incumbent(problem, incumbent))


def _solution(
    problem: BlockProblem, program: str, method: str, keep: BoolArray, **fields: Any
) -> BlockSolution:
    weights = solved_weights(problem, keep, program)
    return BlockSolution(
        keep=keep,
        weights=weights,
        objective=step_loss(problem, weights - problem.weights),
        program=program,
        method=method,
        support=stated_support(problem),
        **fields,
    )


def only_set(problem: BlockProblem, known: BlockSolution, limits: Limits, began: float) -> BlockSolution:
    """Return the answer where only one set has the right size (``n_prune`` 0 or n), with its certificate."""
    assert known.keep is not None
    certificate = only_set_certificate(problem, known.program)
    bound = certificate.lower_bound(problem)
    return conclude(
        problem,
        known,
        limits,
        began,
        Outcome(
            bound=bound if np.isfinite(bound) else None,
            finished=True,
            stats={"message": "only one set has this size"},
            certificate=certificate,
        ),
    )


def conclude(
    problem: BlockProblem, known: BlockSolution, limits: Limits, began: float, outcome: Outcome
) -> BlockSolution:
    """Return the best of the known set and those of a solver with the status that the facts allow.

    Parameters
    ----------
    problem : BlockProblem
    known : BlockSolution
        Warm start; its program and method name the answer's.
    limits : Limits
    began : float
        ``time.perf_counter()`` at the start.
    outcome : Outcome
    """
    best, bound, limit, failure = known, outcome.bound, outcome.limit, outcome.failure
    for keep in outcome.candidates:
        found = _solution(problem, known.program, known.method, keep)
        if found.objective < best.objective:  # type: ignore[operator]
            best = found
    value = best.objective
    assert value is not None
    if bound is not None and bound > value + INCONSISTENCY * abs(value) + outcome.slack:
        failure = f"bound {bound!r} exceeds the objective {value!r} of a known set: numerical trouble"
    trivial = trivial_bound(problem)
    proved = [b for b in (None if failure else bound, trivial) if b is not None]
    lower = min(max(proved), value) if proved else None
    termination = Termination.ERROR if failure else status_of(value, lower, limits.rel_gap)
    if termination is not Termination.FEASIBLE:
        limit = None
    elif limit is None and outcome.finished:
        limit = Limit.GAP
    details = dict(outcome.stats)
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
        support=known.support,
        rel_gap=limits.rel_gap if termination is Termination.OPTIMAL else None,
        certificate=outcome.certificate,
        stats=SolveStats(seconds=seconds, **details),
        trace=(*outcome.trace, point),
    )
