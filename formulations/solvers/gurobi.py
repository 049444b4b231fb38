"""Gurobi through gurobipy (extra ``gurobi``): every model, within what the licence allows.

The package index ships gurobipy with a size-limited licence. The probe finds that out by optimising
an empty model one variable over the limit, so a block that is too large is refused before anything
is built, with the licence named as the reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from formulations.milp import DUAL_TOLERANCE
from formulations.models import (
    INDICATOR,
    INTEGER,
    QUADRATIC_CONSTRAINT,
    QUADRATIC_OBJECTIVE,
    REPEATABLE,
    ModelSize,
)
from formulations.models.standard_form import StandardForm, Terms
from formulations.solution import Limit
from formulations.solvers.base import (
    FIXED,
    Probe,
    RawResult,
    Solver,
    Task,
    dual_error,
    probe_package,
)

DEFAULT_MODELS = {"selection": "selection_shifted_qp", "joint": "joint_perspective"}
"""The fastest measured."""
RESTRICTED_LICENCE = ModelSize(variables=2000, linear_rows=2000, quadratic_rows=200, quadratic_variables=200)
"""What the licence bundled with the package allows; the last figure is as measured."""
SIZE_ERROR = 10010
"""Gurobi's error number for a model beyond the licence."""
BARRIER_TOLERANCE = 1e-10
"""Convergence asked of conic relaxations; at the default 1e-6 their bound lies above the optimum."""
CONE_ERROR = 1e-8
"""Error of a bound from conic relaxations solved to `BARRIER_TOLERANCE`, absolute and relative."""


def _probe() -> Probe:
    found = probe_package("gurobipy", extra="gurobi")
    if not found.available:
        return found
    import gurobipy

    try:
        with _environment(gurobipy) as env, gurobipy.Model(env=env) as model:
            model.addMVar(RESTRICTED_LICENCE.variables + 1)
            model.optimize()
    except gurobipy.GurobiError as error:
        if error.errno != SIZE_ERROR:
            return Probe(version=found.version, available=False, reason=f"licence: {error}")
        return Probe(
            version=found.version,
            reason="size-limited licence (2000 variables and linear rows, 200 variables with quadratics)",
            limits=RESTRICTED_LICENCE,
        )
    return found


def _environment(gurobipy: Any) -> Any:
    env = gurobipy.Env(empty=True)
    env.setParam("OutputFlag", 0)
    env.start()
    return env


def _run(task: Task) -> RawResult:
    import gurobipy

    try:
        with _environment(gurobipy) as env, gurobipy.Model(task.form.name, env=env) as model:
            columns = _translate(gurobipy, model, task.form)
            columns[task.form.decision].Start = task.start_values
            _configure(model, task)
            # In this thread, which owns the environment: Gurobi takes Ctrl-C itself.
            model.optimize()
            return _report(gurobipy, model, task, columns)
    except gurobipy.GurobiError as error:
        return RawResult(failure=f"Gurobi failed: {error} (error {error.errno})")
    except (TypeError, ValueError) as refusal:
        return RawResult(failure=f"Gurobi refuses an option: {refusal}")


def _translate(gurobipy: Any, model: Any, form: StandardForm) -> Any:
    kinds = np.where(form.integer, gurobipy.GRB.BINARY, gurobipy.GRB.CONTINUOUS)
    columns = model.addMVar(form.n_columns, lb=form.lower, ub=form.upper, vtype=kinds)
    below, above = form.row_upper < np.inf, form.row_lower > -np.inf
    equal = form.row_lower == form.row_upper
    for rows, sense, right in (
        (equal, "=", form.row_upper),
        (below & ~equal, "<", form.row_upper),
        (above & ~equal, ">", form.row_lower),
    ):
        if rows.any():
            model.addMConstr(form.matrix[rows], columns, sense, right[rows])
    single = columns.tolist()
    for row in form.quadratic_rows:
        expression = _products(gurobipy, row.terms, single) + gurobipy.LinExpr(
            row.value.tolist(), [single[j] for j in row.index]
        )
        if row.upper < np.inf:
            model.addQConstr(expression <= row.upper)
        if row.lower > -np.inf:
            model.addQConstr(expression >= row.lower)
    for indicator in form.indicators:
        row = indicator.row
        expression = gurobipy.LinExpr(row.value.tolist(), [single[j] for j in row.index])
        model.addGenConstrIndicator(single[indicator.binary], True, expression <= row.upper)
        model.addGenConstrIndicator(single[indicator.binary], True, expression >= row.lower)
    objective = gurobipy.LinExpr(form.linear.tolist(), single) + form.constant
    model.setObjective(objective + _products(gurobipy, form.terms, single) if len(form.terms) else objective)
    return columns


def _products(gurobipy: Any, terms: Terms, single: list[Any]) -> Any:
    expression = gurobipy.QuadExpr()
    expression.addTerms(
        terms.value.tolist(), [single[i] for i in terms.first], [single[j] for j in terms.second]
    )
    return expression


def _configure(model: Any, task: Task) -> None:
    limits = task.limits
    settings: dict[str, Any] = {
        "MIPGap": task.solver_gap,
        "MIPGapAbs": 0.0,
        "Threads": limits.threads,
        "Seed": limits.seed % 2_000_000_000,
        "OptimalityTol": DUAL_TOLERANCE,
        "FeasibilityTol": task.feasibility_tolerance,
        "BarQCPConvTol": BARRIER_TOLERANCE,
        **task.options,
    }
    if task.seconds_left is not None:
        settings["TimeLimit"] = task.seconds_left
    if limits.node_limit is not None:
        settings["NodeLimit"] = limits.node_limit
    for name, value in settings.items():
        model.setParam(name, value)


def _report(gurobipy: Any, model: Any, task: Task, columns: Any) -> RawResult:
    codes = gurobipy.GRB.Status
    named = {
        codes.TIME_LIMIT: Limit.TIME,
        codes.NODE_LIMIT: Limit.NODE,
        codes.ITERATION_LIMIT: Limit.ITERATION,
        codes.INTERRUPTED: Limit.INTERRUPTED,
        codes.SUBOPTIMAL: Limit.GAP,
    }
    status = model.Status
    if status != codes.OPTIMAL and status not in named:
        return RawResult(failure=f"Gurobi stopped with status {status}")
    bound = float(model.ObjBound)
    conic = cone_error(bound) if task.form.is_quadratic else 0.0
    return RawResult(
        finished=status == codes.OPTIMAL,
        point=np.asarray(columns.X) if model.SolCount > 0 else None,
        bound=bound if abs(bound) < gurobipy.GRB.INFINITY else None,
        bound_error=dual_error(task.form) + conic,
        shortfall=task.shortfall,
        limit=named.get(status),
        nodes=int(model.NodeCount),
        iterations=int(model.IterCount),
        message=f"Gurobi: {'optimal' if status == codes.OPTIMAL else named[status].value}",
    )


def cone_error(bound: float) -> float:
    """Return how far a conic relaxation may have lifted a bound, in the model's units."""
    return CONE_ERROR * max(abs(bound), 1.0)


def _option_names() -> list[str]:
    import gurobipy

    return [name for name in dir(gurobipy.GRB.Param) if not name.startswith("_")]


SOLVER = Solver(
    name="gurobi",
    capabilities=frozenset({INTEGER, QUADRATIC_OBJECTIVE, QUADRATIC_CONSTRAINT, INDICATOR, REPEATABLE}),
    probe=_probe,
    run=_run,
    default_models=DEFAULT_MODELS,
    option_names=_option_names,
    reserved={
        "TimeLimit": "Limits.time_limit",
        "MIPGap": "Limits.rel_gap",
        "NodeLimit": "Limits.node_limit",
        "Threads": "Limits.threads",
        "Seed": "Limits.seed",
        "OptimalityTol": FIXED,
        "MIPGapAbs": FIXED,
        "BarQCPConvTol": FIXED,
        "Cutoff": FIXED,
    },
)
