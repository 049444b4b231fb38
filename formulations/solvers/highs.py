"""HiGHS through highspy: mixed-integer linear models (it has no integer quadratic ones)."""

from __future__ import annotations

from collections.abc import Iterable

from formulations.milp import LIMITS, Milp, MilpControls, run_milp
from formulations.models import INTEGER, REPEATABLE
from formulations.models.standard_form import StandardForm
from formulations.solution import Limit
from formulations.solvers.base import FIXED, RawResult, Solver, Task, dual_error, probe_package


def _run(task: Task) -> RawResult:
    form = task.form
    result = run_milp(
        milp_of(form),
        MilpControls(
            seconds=task.seconds_left,
            rel_gap=task.solver_gap,
            node_limit=task.limits.node_limit,
            threads=task.limits.threads,
            seed=task.limits.seed,
            start=(form.decision, task.start_values),
            options=task.options,
        ),
    )
    failed = result.status not in LIMITS and result.status != "Optimal"
    return RawResult(
        finished=result.status == "Optimal",
        point=result.point,
        bound=None if result.bound is None else result.bound + form.constant,
        bound_error=dual_error(form),
        limit=Limit.INTERRUPTED if result.interrupted else LIMITS.get(result.status),
        failure=f"HiGHS stopped with status {result.status!r}" if failed else "",
        nodes=result.nodes,
        iterations=result.iterations,
        message=f"HiGHS: {result.status}",
    )


def milp_of(form: StandardForm) -> Milp:
    """Return the linear part of a standard form that has no other."""
    return Milp(
        cost=form.linear,
        lower=form.lower,
        upper=form.upper,
        integer=form.integer,
        matrix=form.matrix,
        row_lower=form.row_lower,
        row_upper=form.row_upper,
    )


def _option_names() -> Iterable[str]:
    import highspy

    options = highspy.HighsOptions()
    return [name for name in dir(options) if not name.startswith("_")]


SOLVER = Solver(
    name="highs",
    capabilities=frozenset({INTEGER, REPEATABLE}),
    probe=lambda: probe_package("highspy"),
    run=_run,
    default_models={"selection": "selection_mccormick"},
    option_names=_option_names,
    reserved={
        "time_limit": "Limits.time_limit",
        "mip_rel_gap": "Limits.rel_gap",
        "mip_max_nodes": "Limits.node_limit",
        "threads": "Limits.threads",
        "random_seed": "Limits.seed",
        "dual_feasibility_tolerance": FIXED,
        "mip_abs_gap": FIXED,
        "objective_bound": FIXED,
        "solve_relaxation": FIXED,
    },
)
