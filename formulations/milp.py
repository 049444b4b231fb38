"""Mixed-integer linear programs as arrays, and HiGHS to solve them.

Every solve gets a new object, because HiGHS counts time per object, and runs in a worker thread that
a watchdog can cancel: HiGHS does not check its own time limit everywhere. Nothing is read before the
model status has been looked at; after an error HiGHS reports 0 for objective and bound.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from formulations.problem import BoolArray, FloatArray, IntArray
from formulations.solution import Limit
from formulations.watched import Watched, run_watched

DUAL_TOLERANCE = 1e-9
"""Dual feasibility tolerance asked of every linear-programming solver."""
WATCHDOG_GRACE = 1.0
"""Seconds past the deadline at which the watchdog asks HiGHS to stop."""
INTERRUPT_GRACE = 2.0
"""Seconds after Ctrl-C until HiGHS is left to itself, and what it has found with it."""
LIMITS = {
    "Time limit reached": Limit.TIME,
    "Solution limit reached": Limit.NODE,
    "Iteration limit reached": Limit.ITERATION,
    "Interrupted by user": Limit.TIME,
}
"""Statuses that mean a limit; an interrupt comes from the watchdog unless `interrupted` says Ctrl-C."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Milp:
    """``min cost.x`` over ``row_lower <= matrix x <= row_upper``, ``lower <= x <= upper``, some x integer."""

    cost: FloatArray
    lower: FloatArray
    upper: FloatArray
    integer: BoolArray
    matrix: csr_matrix
    row_lower: FloatArray
    row_upper: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class MilpResult:
    """What HiGHS found: `status` is its model status by name; `point` and `bound` only if they exist."""

    status: str
    point: FloatArray | None = None
    bound: float | None = None
    row_duals: FloatArray | None = None
    """Of a linear program: what one unit on the right side of a row adds to the optimal value."""
    nodes: int = 0
    iterations: int = 0
    interrupted: bool = False


@dataclass(frozen=True, kw_only=True)
class MilpControls:
    """What may stop one run of HiGHS, its warm start and its native options."""

    seconds: float | None = None
    rel_gap: float = 1e-6
    node_limit: int | None = None
    threads: int = 1
    seed: int = 0
    start: tuple[IntArray, FloatArray] | None = None
    on_point: Callable[[FloatArray], None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def run_milp(milp: Milp, controls: MilpControls) -> MilpResult:
    """Solve `milp` (a linear program if nothing is integer) with a new HiGHS object.

    The bound is the dual bound that HiGHS proved, not yet lowered by its tolerances; for a linear
    program it is the optimal value.
    """
    import highspy

    try:
        highs = _configured(highspy, controls)
    except ValueError as refusal:
        return MilpResult(status=str(refusal))
    status = highs.passModel(_highs_model(highspy, milp))
    if status == highspy.HighsStatus.kError:
        return MilpResult(status="Model rejected")
    if controls.start is not None and milp.integer.any():
        index, values = controls.start
        highs.setSolution(index.size, index.astype(np.int32), np.asarray(values, dtype=np.float64))
    ended = _run_watched(highs, controls)
    if ended.value is None:
        return MilpResult(status="Interrupted by user", interrupted=True)
    interrupted = ended.interrupted
    model_status = highs.modelStatusToString(highs.getModelStatus())
    info = highs.getInfo()
    usable = model_status == "Optimal" or model_status in LIMITS
    has_point = usable and info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    bound = None
    if usable and milp.integer.any():
        bound = float(info.mip_dual_bound)
    elif model_status == "Optimal":
        bound = float(info.objective_function_value)
    row_duals = None
    if usable and not milp.integer.any() and highs.getSolution().dual_valid:
        row_duals = np.array(highs.getSolution().row_dual)
    return MilpResult(
        status=model_status,
        point=np.array(highs.getSolution().col_value) if has_point else None,
        bound=bound if bound is not None and np.isfinite(bound) else None,
        row_duals=row_duals,
        nodes=max(int(info.mip_node_count), 0),
        iterations=max(int(info.simplex_iteration_count), 0),
        interrupted=interrupted,
    )


def _configured(highspy: Any, controls: MilpControls) -> Any:
    highs = highspy.Highs()
    settings: dict[str, Any] = {
        "output_flag": False,
        "threads": controls.threads,
        "random_seed": controls.seed,
        "mip_rel_gap": controls.rel_gap,
        "mip_abs_gap": 0.0,
        "mip_feasibility_tolerance": 1e-7,
        "primal_feasibility_tolerance": 1e-8,
        "dual_feasibility_tolerance": DUAL_TOLERANCE,
        **controls.options,
    }
    if controls.seconds is not None:
        settings["time_limit"] = controls.seconds
    if controls.node_limit is not None:
        settings["mip_max_nodes"] = controls.node_limit
    for name, value in settings.items():
        if highs.setOptionValue(name, value) == highspy.HighsStatus.kError:
            raise ValueError(f"option {name} = {value!r} refused")
    return highs


def _highs_model(highspy: Any, milp: Milp) -> Any:
    lp = highspy.HighsLp()
    lp.num_col_ = milp.cost.size
    lp.num_row_ = milp.row_lower.size
    lp.col_cost_ = milp.cost
    lp.col_lower_ = milp.lower
    lp.col_upper_ = milp.upper
    lp.row_lower_ = milp.row_lower
    lp.row_upper_ = milp.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = milp.matrix.indptr.astype(np.int32)
    lp.a_matrix_.index_ = milp.matrix.indices.astype(np.int32)
    lp.a_matrix_.value_ = milp.matrix.data
    if milp.integer.any():
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(flag)] for flag in milp.integer]
    return lp


def _run_watched(highs: Any, controls: MilpControls) -> Watched[bool]:
    """Run HiGHS in a thread; cancel it past the deadline or on Ctrl-C."""
    cancel = threading.Event()

    def stop_if_asked(event: Any) -> None:
        if cancel.is_set():
            event.interrupt()

    highs.cbMipInterrupt += stop_if_asked
    highs.cbSimplexInterrupt += stop_if_asked
    if controls.on_point is not None:
        report = controls.on_point
        highs.cbMipSolution += lambda event: report(np.array(event.data_out.mip_solution))
    left = controls.seconds
    deadline = None if left is None else time.perf_counter() + left + WATCHDOG_GRACE

    def run() -> bool:
        highs.run()
        # The thread's own task scheduler would keep its thread count.
        highs.resetGlobalScheduler(False)
        return True

    return run_watched(run, cancel.set, deadline=deadline, grace=INTERRUPT_GRACE)
