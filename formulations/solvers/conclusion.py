"""From what a solver says to what we claim.

Objectives are re-evaluated by `formulations.loss`, a bound is lowered by the solver's tolerances, the
warm start is never lost, and nothing is called optimal unless the gap between our objective and the
lowered bound says so.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from formulations.incumbents import checked_incumbent, greedy
from formulations.loss import objective, solved_weights, trivial_bound
from formulations.models import model_spec
from formulations.models.standard_form import StandardForm
from formulations.models.translation import standard_form
from formulations.problem import BlockProblem, BoolArray, check_program
from formulations.relaxations.only_set import only_set_certificate
from formulations.solution import (
    BlockSolution,
    Certificate,
    Limit,
    Limits,
    SolveStats,
    Termination,
    TracePoint,
    status_of,
)
from formulations.solvers.base import (
    RawResult,
    Solver,
    Task,
    check_availability,
    check_capabilities,
    check_options,
    check_poses,
)

INCONSISTENCY = 1e-6
"""A bound above the objective of a known set by more than this, relative, is numerical trouble."""
CONSTANT_ERROR = 1e-13
"""Rounding of a bound, relative to the largest term that cancels in it."""


def solve_model(
    solver: Solver,
    problem: BlockProblem,
    program: str,
    *,
    model: str,
    limits: Limits,
    incumbent: BlockSolution | None,
    options: Mapping[str, Any],
) -> BlockSolution:
    """Solve one formulation with one solver; every check comes before the model is built.

    Raises
    ------
    UnsupportedProblemError
        If the model is not of this program, or the solver cannot take it (alternatives are named).
    SolverUnavailableError
        If the solver is absent, or the model exceeds what its licence allows.
    UnknownOptionError
        If a native option is unknown, or one that `limits` sets.
    NotPositiveDefiniteError
        If the program is joint and ``H`` is singular.
    """
    began = time.perf_counter()
    check_poses(solver, check_program(program))
    spec = model_spec(model, program)
    check_capabilities(solver, spec)
    check_availability(solver, spec, problem)
    check_options(solver, options)
    kind, _, backend = solver.name.partition(":")
    method = ":".join((kind, model, backend) if backend else (kind, model))
    known = known_set(problem, program, method, limits, incumbent)
    if problem.n_prune in (0, problem.n):
        return only_set(problem, known, limits, began)
    if limits.time_limit == 0.0:
        return conclude(problem, known, limits, began, limit=Limit.TIME)
    deadline = None if limits.time_limit is None else began + limits.time_limit
    assert known.keep is not None
    try:
        built = spec.build(problem, incumbent=known)
        form = standard_form(built)
        task = Task(
            model=built, form=form, limits=limits, deadline=deadline, options=options, start=known.keep
        )
        with _interrupt_handler_kept():
            raw = solver.run(task)
    except KeyboardInterrupt:
        # Before the backend runs, or one that has no answer to Ctrl-C: the known set is still one.
        return conclude(problem, known, limits, began, limit=Limit.INTERRUPTED)
    ignored = {
        name: getattr(limits, name)
        for name in solver.ignores
        if getattr(limits, name) != getattr(Limits(), name)
    }
    return conclude(
        problem,
        known,
        limits,
        began,
        candidates=[] if raw.point is None else [form.keep(raw.point)],
        bound=_lowered(raw, form),
        slack=(raw.bound_error + raw.shortfall) * form.objective_scale,
        finished=raw.finished,
        limit=raw.limit,
        failure=raw.failure,
        stats={
            "nodes": raw.nodes,
            "iterations": raw.iterations,
            "message": raw.message,
            "extra": {**raw.extra, **({"ignored_limits": ignored} if ignored else {})},
        },
    )


@contextmanager
def _interrupt_handler_kept() -> Iterator[None]:
    """Put Python's Ctrl-C handler back: OR-tools leaves the default one, which kills the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def _lowered(raw: RawResult, form: StandardForm) -> float | None:
    """The solver's bound in units of the problem, lowered by every error it may carry."""
    if raw.bound is None or not np.isfinite(raw.bound):
        return None
    rounding = CONSTANT_ERROR * max(abs(form.constant), abs(raw.bound), 1.0)
    return (raw.bound - raw.bound_error - rounding) * form.objective_scale


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
    return BlockSolution(
        keep=keep,
        weights=solved_weights(problem, keep, program),
        objective=objective(problem, keep, program),
        program=program,
        method=method,
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
        bound=bound if np.isfinite(bound) else None,
        finished=True,
        stats={"message": "only one set has this size"},
        certificate=certificate,
    )


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
        Size of the solver's tolerances: a bound may exceed the objective by as much.
    finished : bool
        The solver claims optimality; a gap that its tolerances leave is stated as `Limit.GAP`.
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
    termination = Termination.ERROR if failure else status_of(value, lower, limits.rel_gap)
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
        rel_gap=limits.rel_gap if termination is Termination.OPTIMAL else None,
        certificate=certificate,
        stats=SolveStats(seconds=seconds, **details),
        trace=(*trace, point),
    )
