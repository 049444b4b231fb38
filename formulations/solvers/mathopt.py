"""OR-tools MathOpt with GSCIP: quadratic objectives, quadratic constraints and indicators.

Part of the base install, and the route to SCIP without PySCIPOpt. This build is slow on dense
quadratics and quick on sums of squares: prefer the low-rank models. MathOpt reports a model that a
backend cannot take as an internal error or an attribute error while it translates the status; both
end as `Termination.ERROR` with the message. Options: ``presolve``, ``cuts``, ``heuristics``, ``scaling``,
each "off", "low", "medium", "high" or "very_high".

Ctrl-C leaves GSCIP to itself and returns the set known before it: the interrupter of OR-tools 9.15 fails in
GSCIP's event handler, and GSCIP's own handler may look at the signal half a minute later. Of a joint model
two runs with the same seed may differ in nodes and in the last digit of the bound; where that matters, use
``scip`` or ``branch_and_bound``.
"""

from __future__ import annotations

import datetime
from functools import partial
from typing import Any

import numpy as np

from formulations.milp import DUAL_TOLERANCE
from formulations.models import INDICATOR, INTEGER, QUADRATIC_CONSTRAINT, QUADRATIC_OBJECTIVE
from formulations.models.standard_form import Row
from formulations.solution import Limit
from formulations.solvers.base import LEFT_ALONE, RawResult, Solver, Task, dual_error, probe_package
from formulations.watched import run_watched

DEFAULT_MODELS = {"selection": "selection_low_rank", "joint": "joint_low_rank_perspective"}
"""The fastest measured."""
EMPHASES = ("presolve", "cuts", "heuristics", "scaling")


def _run(task: Task) -> RawResult:
    from ortools.math_opt.python import mathopt

    translated, columns = _translate(mathopt, task)
    try:
        parameters = _parameters(mathopt, task)
    except KeyError as refusal:
        return RawResult(failure=f"MathOpt has no emphasis {refusal}: use off, low, medium, high, very_high")
    hint = mathopt.SolutionHint(
        variable_values={
            columns[j]: float(v) for j, v in zip(task.form.decision, task.start_values, strict=True)
        }
    )
    solve = partial(
        mathopt.solve,
        translated,
        mathopt.SolverType.GSCIP,
        params=parameters,
        model_params=mathopt.ModelSolveParameters(solution_hints=[hint]),
    )
    try:
        ended = run_watched(solve, lambda: None, grace=0.0)
    except (AttributeError, ValueError, RuntimeError, mathopt.InternalMathOptError) as error:
        return RawResult(failure=f"MathOpt failed: {type(error).__name__}: {error}")
    return LEFT_ALONE if ended.value is None else _report(mathopt, task, ended.value, columns)


def _translate(mathopt: Any, task: Task) -> tuple[Any, list[Any]]:
    form = task.form
    model = mathopt.Model(name=form.name)
    columns = [
        model.add_variable(lb=float(low), ub=float(high), is_integer=bool(whole), name=name)
        for low, high, whole, name in zip(
            form.lower, form.upper, form.integer, form.column_names, strict=True
        )
    ]
    matrix = form.matrix
    for r in task.asking(range(matrix.shape[0])):
        part = slice(matrix.indptr[r], matrix.indptr[r + 1])
        model.add_linear_constraint(
            lb=float(form.row_lower[r]),
            ub=float(form.row_upper[r]),
            expr=_linear(mathopt, matrix.indices[part], matrix.data[part], columns),
        )
    for row in form.quadratic_rows:
        model.add_quadratic_constraint(
            lb=row.lower, ub=row.upper, expr=_row(mathopt, row, columns), name=row.name
        )
    for indicator in form.indicators:
        row = indicator.row
        # GSCIP takes one side at a time.
        for low, high in ((row.lower, np.inf), (-np.inf, row.upper)):
            model.add_indicator_constraint(
                indicator=columns[indicator.binary],
                activate_on_zero=False,
                implied_lb=low,
                implied_ub=high,
                implied_expr=_linear(mathopt, row.index, row.value, columns),
            )
    index = np.flatnonzero(form.linear)
    objective = _linear(mathopt, index, form.linear[index], columns) + form.constant
    products = _products(mathopt, form.terms, columns)
    model.minimize(objective + products if len(form.terms) else objective)
    return model, columns


def _linear(mathopt: Any, index: Any, value: Any, columns: list[Any]) -> Any:
    return mathopt.fast_sum(float(v) * columns[int(j)] for j, v in zip(index, value, strict=True))


def _products(mathopt: Any, terms: Any, columns: list[Any]) -> Any:
    return mathopt.fast_sum(
        float(v) * columns[int(i)] * columns[int(j)]
        for i, j, v in zip(terms.first, terms.second, terms.value, strict=True)
    )


def _row(mathopt: Any, row: Row, columns: list[Any]) -> Any:
    products = _products(mathopt, row.terms, columns)
    return products + _linear(mathopt, row.index, row.value, columns) if row.index.size else products


def _parameters(mathopt: Any, task: Task) -> Any:
    limits = task.limits
    parameters = mathopt.SolveParameters(
        relative_gap_tolerance=task.solver_gap,
        absolute_gap_tolerance=0.0,
        node_limit=limits.node_limit,
        threads=limits.threads,
        random_seed=limits.seed % (2**31 - 1),
    )
    if task.seconds_left is not None:
        parameters.time_limit = datetime.timedelta(seconds=task.seconds_left)
    parameters.gscip.bool_params["misc/catchctrlc"] = False
    parameters.gscip.real_params["numerics/dualfeastol"] = DUAL_TOLERANCE
    parameters.gscip.real_params["numerics/feastol"] = task.feasibility_tolerance
    for name, value in task.options.items():
        setattr(parameters, name, mathopt.Emphasis[str(value).upper()])
    return parameters


def _report(mathopt: Any, task: Task, result: Any, columns: list[Any]) -> RawResult:
    reasons = mathopt.TerminationReason
    reason = result.termination.reason
    usable = reason in (reasons.OPTIMAL, reasons.FEASIBLE, reasons.NO_SOLUTION_FOUND)
    detail = result.termination.detail
    if not usable:
        return RawResult(failure=f"GSCIP stopped with {reason.name.lower()}: {detail}")
    point = None
    if result.has_primal_feasible_solution():
        values = result.variable_values()
        point = np.array([values[column] for column in columns])
    bound = result.termination.objective_bounds.dual_bound
    named = result.termination.limit
    return RawResult(
        finished=reason == reasons.OPTIMAL,
        point=point,
        bound=float(bound) if np.isfinite(bound) else None,
        bound_error=dual_error(task.form),
        shortfall=task.shortfall,
        limit=None if named is None else _limit(mathopt, named),
        nodes=int(result.solve_stats.node_count),
        iterations=int(result.solve_stats.simplex_iterations),
        message=f"GSCIP: {reason.name.lower()}",
    )


def _limit(mathopt: Any, named: Any) -> Limit | None:
    return {
        mathopt.Limit.TIME: Limit.TIME,
        mathopt.Limit.NODE: Limit.NODE,
        mathopt.Limit.ITERATION: Limit.ITERATION,
        mathopt.Limit.INTERRUPTED: Limit.INTERRUPTED,
    }.get(named)


SOLVER = Solver(
    name="mathopt",
    capabilities=frozenset({INTEGER, QUADRATIC_OBJECTIVE, QUADRATIC_CONSTRAINT, INDICATOR}),
    probe=lambda: probe_package("ortools"),
    run=_run,
    default_models=DEFAULT_MODELS,
    option_names=lambda: EMPHASES,
    reserved={},
)
