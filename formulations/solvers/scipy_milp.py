"""SciPy's ``milp`` (its own build of HiGHS): mixed-integer linear models, no warm start."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from formulations.models import INTEGER, REPEATABLE
from formulations.solution import Limit
from formulations.solvers.base import LEFT_ALONE, RawResult, Solver, Task, probe_package
from formulations.watched import run_watched

SCIPY_DUAL_TOLERANCE = 1e-7
"""HiGHS's default, which SciPy gives no way to tighten."""


def _run(task: Task) -> RawResult:
    from scipy.optimize import Bounds, LinearConstraint, milp

    form = task.form
    options: dict[str, Any] = {"mip_rel_gap": task.solver_gap, **task.options}
    if task.seconds_left is not None:
        options["time_limit"] = task.seconds_left
    if task.limits.node_limit is not None:
        options["node_limit"] = task.limits.node_limit
    solve = partial(
        milp,
        form.linear,
        integrality=form.integer.astype(np.int64),
        bounds=Bounds(form.lower, form.upper),
        constraints=LinearConstraint(form.matrix, form.row_lower, form.row_upper),
        options=options,  # type: ignore[arg-type]
    )
    # SciPy has no way to stop it.
    result = run_watched(solve, lambda: None).value
    if result is None:
        return LEFT_ALONE
    if result.status not in (0, 1):
        return RawResult(failure=f"SciPy milp stopped with status {result.status}: {result.message}")
    bound = getattr(result, "mip_dual_bound", None)
    return RawResult(
        finished=result.status == 0,
        point=None if result.x is None else np.asarray(result.x),
        bound=None if bound is None or not np.isfinite(bound) else float(bound) + form.constant,
        bound_error=SCIPY_DUAL_TOLERANCE * form.total_width,
        limit=_limit(task, str(result.message)) if result.status == 1 else None,
        nodes=int(getattr(result, "mip_node_count", None) or 0),
        message=f"SciPy: {result.message}",
    )


def _limit(task: Task, message: str) -> Limit:
    timed_out = "time" in message.lower() or task.limits.node_limit is None
    return Limit.TIME if timed_out else Limit.NODE


SOLVER = Solver(
    name="scipy_milp",
    capabilities=frozenset({INTEGER, REPEATABLE}),
    probe=lambda: probe_package("scipy"),
    run=_run,
    default_models={"selection": "selection_mccormick"},
    option_names=lambda: ("disp", "presolve"),
    reserved={},
    ignores=("threads", "seed"),
)
