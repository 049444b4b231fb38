"""SCIP through PySCIPOpt (extra ``scip``): every model of the package."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from formulations.milp import DUAL_TOLERANCE
from formulations.models import INDICATOR, INTEGER, QUADRATIC_CONSTRAINT, QUADRATIC_OBJECTIVE, REPEATABLE
from formulations.models.standard_form import Terms
from formulations.solution import Limit
from formulations.solvers.base import (
    FIXED,
    FIXED_INTERRUPT,
    LEFT_ALONE,
    RawResult,
    Solver,
    Task,
    dual_error,
    probe_package,
)
from formulations.watched import run_watched

DEFAULT_MODELS = {"selection": "selection_low_rank", "joint": "joint_low_rank_perspective"}
"""The fastest measured."""


def _run(task: Task) -> RawResult:
    import pyscipopt

    scip = pyscipopt.Model(task.form.name)
    scip.hideOutput()
    columns = _translate(pyscipopt, scip, task)
    _suggest(scip, task, columns)
    try:
        _configure(scip, task)
        ended = run_watched(partial(_optimize, scip), scip.interruptSolve)
    except Exception as error:
        # PySCIPOpt turns every return code of SCIP into a bare Exception.
        return RawResult(failure=f"SCIP failed: {type(error).__name__}: {error}")
    return LEFT_ALONE if ended.value is None else _report(scip, task, columns)


def _optimize(scip: Any) -> bool:
    """Solve without the interpreter's lock; whether it came to an end, which is always."""
    scip.optimizeNogil()
    return True


def _translate(pyscipopt: Any, scip: Any, task: Task) -> list[Any]:
    form = task.form
    columns = [
        scip.addVar(name=name, vtype="B" if whole else "C", lb=float(low), ub=float(high))
        for low, high, whole, name in zip(
            form.lower, form.upper, form.integer, form.column_names, strict=True
        )
    ]
    matrix = form.matrix
    for r in task.asking(range(matrix.shape[0])):
        part = slice(matrix.indptr[r], matrix.indptr[r + 1])
        expression = _linear(pyscipopt, matrix.indices[part], matrix.data[part], columns)
        _add_row(scip, expression, form.row_lower[r], form.row_upper[r], form.row_names[r])
    for row in form.quadratic_rows:
        expression = _products(pyscipopt, row.terms, columns)
        expression += _linear(pyscipopt, row.index, row.value, columns)
        _add_row(scip, expression, row.lower, row.upper, row.name)
    for indicator in form.indicators:
        row = indicator.row
        expression = _linear(pyscipopt, row.index, row.value, columns)
        scip.addConsIndicator(expression <= row.upper, columns[indicator.binary])
        scip.addConsIndicator(-expression <= -row.lower, columns[indicator.binary])
    index = np.flatnonzero(form.linear)
    objective = _linear(pyscipopt, index, form.linear[index], columns) + form.constant
    if len(form.terms):
        # SCIP's objective is linear: the quadratic part becomes the epigraph of a new variable.
        epigraph = scip.addVar(name="quadratic_part", lb=None, ub=None)
        scip.addCons(_products(pyscipopt, form.terms, columns) <= epigraph, name="epigraph")
        objective += epigraph
    scip.setObjective(objective, "minimize")
    return columns


def _linear(pyscipopt: Any, index: Any, value: Any, columns: list[Any]) -> Any:
    return pyscipopt.quicksum(float(v) * columns[int(j)] for j, v in zip(index, value, strict=True))


def _products(pyscipopt: Any, terms: Terms, columns: list[Any]) -> Any:
    return pyscipopt.quicksum(
        float(v) * columns[int(i)] * columns[int(j)]
        for i, j, v in zip(terms.first, terms.second, terms.value, strict=True)
    )


def _add_row(scip: Any, expression: Any, lower: float, upper: float, name: str) -> None:
    if lower == upper:
        scip.addCons(expression == float(upper), name=name)
        return
    if upper < np.inf:
        scip.addCons(expression <= float(upper), name=name)
    if lower > -np.inf:
        scip.addCons(expression >= float(lower), name=f"{name}_lower" if upper < np.inf else name)


def _suggest(scip: Any, task: Task, columns: list[Any]) -> None:
    """Give SCIP the warm start's binaries; it completes the continuous part itself."""
    partial = scip.createPartialSol()
    for j, value in zip(task.form.decision, task.start_values, strict=True):
        scip.setSolVal(partial, columns[int(j)], float(value))
    scip.addSol(partial)


def _configure(scip: Any, task: Task) -> None:
    limits = task.limits
    settings: dict[str, Any] = {
        "limits/gap": task.solver_gap,
        "randomization/randomseedshift": limits.seed % (2**31 - 1),
        "parallel/maxnthreads": limits.threads,
        "lp/threads": min(limits.threads, 64),
        "numerics/feastol": task.feasibility_tolerance,
        "numerics/dualfeastol": DUAL_TOLERANCE,
        "misc/catchctrlc": False,
        **task.options,
    }
    if task.seconds_left is not None:
        settings["limits/time"] = task.seconds_left
    if limits.node_limit is not None:
        settings["limits/totalnodes"] = limits.node_limit
    for name, value in settings.items():
        scip.setParam(name, value)


def _report(scip: Any, task: Task, columns: list[Any]) -> RawResult:
    status = str(scip.getStatus())
    finished = status in ("optimal", "gaplimit")
    if not finished and status not in _LIMITS:
        return RawResult(failure=f"SCIP stopped with status {status!r}")
    point = None
    if scip.getNSols() > 0:
        best = scip.getBestSol()
        point = np.array([scip.getSolVal(best, column) for column in columns])
    bound = float(scip.getDualbound())
    return RawResult(
        finished=finished,
        point=point,
        bound=None if abs(bound) >= scip.infinity() else bound,
        bound_error=dual_error(task.form),
        shortfall=task.shortfall,
        limit=_LIMITS.get(status),
        nodes=int(scip.getNTotalNodes()),
        iterations=int(scip.getNLPIterations()),
        message=f"SCIP: {status}",
    )


_LIMITS = {
    "timelimit": Limit.TIME,
    "nodelimit": Limit.NODE,
    "totalnodelimit": Limit.NODE,
    "stallnodelimit": Limit.NODE,
    "memlimit": Limit.ITERATION,
    "sollimit": Limit.ITERATION,
    "bestsollimit": Limit.ITERATION,
    "restartlimit": Limit.ITERATION,
    "userinterrupt": Limit.INTERRUPTED,
}


def _option_names() -> list[str]:
    import pyscipopt

    return list(pyscipopt.Model().getParams())


SOLVER = Solver(
    name="scip",
    capabilities=frozenset({INTEGER, QUADRATIC_OBJECTIVE, QUADRATIC_CONSTRAINT, INDICATOR, REPEATABLE}),
    probe=lambda: probe_package("PySCIPOpt", extra="scip"),
    run=_run,
    default_models=DEFAULT_MODELS,
    option_names=_option_names,
    reserved={
        "limits/time": "Limits.time_limit",
        "limits/gap": "Limits.rel_gap",
        "limits/totalnodes": "Limits.node_limit",
        "randomization/randomseedshift": "Limits.seed",
        "parallel/maxnthreads": "Limits.threads",
        "lp/threads": "Limits.threads",
        "numerics/dualfeastol": FIXED,
        "numerics/feastol": FIXED,
        "misc/catchctrlc": FIXED_INTERRUPT,
    },
)
