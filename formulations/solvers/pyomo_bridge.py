"""Pyomo's own solver interfaces: the readable model goes to HiGHS, SCIP or Gurobi as it stands.

A model with disjunctions is first turned into big-M constraints by Pyomo's ``gdp.bigm``, whose
constants are the variable bounds, that is the level-set box. Pyomo raises at a time limit even with
an incumbent unless told otherwise; it is told otherwise, and nothing is read before the status.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from formulations.milp import DUAL_TOLERANCE
from formulations.models import INDICATOR, INTEGER, QUADRATIC_CONSTRAINT, QUADRATIC_OBJECTIVE, REPEATABLE
from formulations.models.standard_form import StandardForm
from formulations.models.translation import standard_form
from formulations.solution import Limit
from formulations.solvers import gurobi, highs, scip
from formulations.solvers.base import FIXED, Probe, RawResult, Solver, Task, dual_error

FACTORY = "pyomo.contrib.solver.common.factory"
PLUGINS = "pyomo.contrib.solver.plugins"
THREADS_REFUSED = (
    "Pyomo swaps the process's standard output while it solves, so it runs in the main thread only: "
    "use processes, solve_isolated or another bridge"
)


def _run_with(factory_name: str, native: Callable[[Task], dict[str, Any]]) -> Callable[[Task], RawResult]:
    def run(task: Task) -> RawResult:
        return _run(task, factory_name, native(task))

    return run


def _run(task: Task, factory_name: str, native: dict[str, Any]) -> RawResult:
    from pyomo.common.errors import PyomoException
    from pyomo.environ import TransformationFactory

    if threading.current_thread() is not threading.main_thread():
        return RawResult(failure=THREADS_REFUSED)
    form = task.form
    if form.indicators:
        TransformationFactory("gdp.bigm").apply_to(task.model)
        form = standard_form(task.model)
    backend = import_module(FACTORY).SolverFactory(factory_name)
    try:
        results = backend.solve(
            task.model,
            time_limit=task.seconds_left,
            rel_gap=task.solver_gap,
            abs_gap=0.0,
            threads=task.limits.threads,
            load_solutions=False,
            raise_exception_on_nonoptimal_result=False,
            solver_options={**native, **task.options},
        )
    except (PyomoException, ArithmeticError, RuntimeError, ValueError) as error:
        return RawResult(failure=f"Pyomo failed with {factory_name}: {type(error).__name__}: {error}")
    return _report(task, form, results)


def _report(task: Task, form: StandardForm, results: Any) -> RawResult:
    common = import_module("pyomo.contrib.solver.common.results")
    ended = common.TerminationCondition
    named = {
        ended.maxTimeLimit: Limit.TIME,
        ended.iterationLimit: Limit.NODE,
        ended.interrupted: Limit.INTERRUPTED,
        ended.objectiveLimit: Limit.GAP,
    }
    condition = results.termination_condition
    finished = condition == ended.convergenceCriteriaSatisfied
    if not finished and condition not in named:
        return RawResult(failure=f"Pyomo reports {condition.name}")
    has_point = results.solution_status in (common.SolutionStatus.optimal, common.SolutionStatus.feasible)
    bound = results.objective_bound
    quadratic = form.is_quadratic
    return RawResult(
        finished=finished,
        point=_point(task, results) if has_point else None,
        bound=None if bound is None or not np.isfinite(bound) else float(bound),
        bound_error=dual_error(form) + (gurobi.cone_error(float(bound or 0.0)) if quadratic else 0.0),
        shortfall=task.shortfall,
        limit=named.get(condition),
        message=f"Pyomo: {condition.name}",
    )


def _point(task: Task, results: Any) -> Any:
    """Return values of the decision binaries in their columns; the rest is not needed."""
    values = results.solution_loader.get_vars()
    model = task.model
    binaries = model.kept if task.form.one_means_kept else model.pruned
    point = np.zeros(task.form.n_columns)
    for j, i in zip(task.form.decision, model.weights, strict=True):
        point[j] = values[binaries[i]]
    return point


def _highs_options(task: Task) -> dict[str, Any]:
    options = {"random_seed": task.limits.seed, "dual_feasibility_tolerance": DUAL_TOLERANCE}
    return options | _node_limit(task, "mip_max_nodes")


def _scip_options(task: Task) -> dict[str, Any]:
    options = {
        "randomization/randomseedshift": task.limits.seed % (2**31 - 1),
        "numerics/feastol": task.feasibility_tolerance,
        "numerics/dualfeastol": DUAL_TOLERANCE,
        # Pyomo reads what SCIP prints from a pipe, by a thread that cannot run while PySCIPOpt solves: once
        # the pipe is full, SCIP would wait for ever.
        "display/verblevel": 0,
    }
    return options | _node_limit(task, "limits/totalnodes")


def _gurobi_options(task: Task) -> dict[str, Any]:
    options = {
        "Seed": task.limits.seed % 2_000_000_000,
        "OptimalityTol": DUAL_TOLERANCE,
        "FeasibilityTol": task.feasibility_tolerance,
        "BarQCPConvTol": gurobi.BARRIER_TOLERANCE,
    }
    return options | _node_limit(task, "NodeLimit")


def _node_limit(task: Task, name: str) -> dict[str, Any]:
    return {} if task.limits.node_limit is None else {name: task.limits.node_limit}


def _probe(factory_name: str, native: Solver) -> Probe:
    found = native.probe()
    if not found.available:
        return found
    try:
        # This registers the interfaces, as importing pyomo.environ does.
        import_module(PLUGINS).load()
        backend = import_module(FACTORY).SolverFactory(factory_name)
    except ModuleNotFoundError:
        backend = None
    if backend is None or not hasattr(backend, "config"):
        return Probe(
            available=False, reason=f"this Pyomo has no {factory_name} interface (pip install -U pyomo)"
        )
    return found


def _pyomo_solver(
    factory_name: str, native: Solver, options: Callable[[Task], dict[str, Any]], **fields: Any
) -> Solver:
    return Solver(
        name=f"pyomo:{native.name}",
        probe=lambda: _probe(factory_name, native),
        run=_run_with(factory_name, options),
        option_names=native.option_names,
        default_models=native.default_models,
        reserved={**native.reserved, "BarQCPConvTol": FIXED},
        **fields,
    )


_ALL = frozenset({INTEGER, QUADRATIC_OBJECTIVE, QUADRATIC_CONSTRAINT, INDICATOR, REPEATABLE})

SOLVERS = {
    "highs": _pyomo_solver(
        "highs", highs.SOLVER, _highs_options, capabilities=frozenset({INTEGER, REPEATABLE})
    ),
    "scip": _pyomo_solver("scip_direct", scip.SOLVER, _scip_options, capabilities=_ALL),
    "gurobi": _pyomo_solver("gurobi_direct_minlp", gurobi.SOLVER, _gurobi_options, capabilities=_ALL),
}
