"""OR-tools CP-SAT: selection, with every product a Boolean and costs scaled to integers.

CP-SAT takes whole coefficients only, so each cost is multiplied by ``2^bits / max |cost|`` and
rounded. The error is accounted for: with ``e_j = rounded_j / scale - cost_j``, a set's true objective
is at least its scaled one less ``sum e_j`` over the terms that are on, and at most k weights and
k (k - 1) / 2 pairs are on. The k largest positive ``e_j`` of weights and the k (k - 1) / 2 largest of
pairs are therefore taken off the bound. Option ``bits``, 8 to 40 (default 30), is their resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from formulations.errors import ArgumentError
from formulations.models import INTEGER, REPEATABLE
from formulations.models.standard_form import StandardForm
from formulations.problem import FloatArray
from formulations.solution import Limit
from formulations.solvers.base import FIXED_INTERRUPT, LEFT_ALONE, RawResult, Solver, Task, probe_package
from formulations.watched import run_watched

MODELS = frozenset({"selection_mccormick", "selection_rlt"})
DEFAULT_BITS = 30


def _run(task: Task) -> RawResult:
    from ortools.sat.python import cp_model

    form = task.form
    options = dict(task.options)
    largest = float(np.abs(form.linear).max(initial=0.0))
    scale = 2.0 ** int(options.pop("bits", DEFAULT_BITS)) / (largest if largest > 0.0 else 1.0)
    costs = np.rint(scale * form.linear)
    model = cp_model.CpModel()
    # Every column is a Boolean: products of binaries are binary.
    columns = [model.new_bool_var(name) for name in form.column_names]
    _add_rows(model, task, columns)
    model.minimize(sum(int(c) * x for c, x in zip(costs, columns, strict=True) if c != 0.0))
    for j, value in zip(form.decision, task.start_values, strict=True):
        model.add_hint(columns[int(j)], bool(value))
    solver = cp_model.CpSolver()
    try:
        _configure(solver, task, options)
    except (TypeError, ValueError) as refusal:
        return RawResult(failure=f"CP-SAT refuses an option: {refusal}")
    ended = run_watched(lambda: solver.solve(model), solver.stop_search)
    if ended.value is None:
        return LEFT_ALONE
    status = ended.value
    feasible = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    if not feasible and status != cp_model.UNKNOWN:
        return RawResult(failure=f"CP-SAT stopped with {solver.status_name(status)}")
    has_bound = feasible or math.isfinite(solver.best_objective_bound)
    error = _rounding_error(form, costs / scale)
    return RawResult(
        finished=status == cp_model.OPTIMAL,
        point=np.array([float(solver.value(x)) for x in columns]) if feasible else None,
        bound=solver.best_objective_bound / scale + form.constant if has_bound else None,
        bound_error=error,
        limit=None if status == cp_model.OPTIMAL else _limit(ended.interrupted),
        nodes=int(solver.num_branches),
        message=f"CP-SAT: {solver.status_name(status)}",
        extra={"scaling_error": error * form.objective_scale},
    )


def _limit(interrupted: bool) -> Limit:
    """Return what ended the search: CP-SAT does not say."""
    return Limit.INTERRUPTED if interrupted else Limit.TIME


def _add_rows(model: Any, task: Task, columns: list[Any]) -> None:
    form, matrix = task.form, task.form.matrix
    for r in task.asking(range(matrix.shape[0])):
        part = slice(matrix.indptr[r], matrix.indptr[r + 1])
        expression = sum(
            round(v) * columns[int(j)] for j, v in zip(matrix.indices[part], matrix.data[part], strict=True)
        )
        if form.row_lower[r] > -np.inf:
            model.add(expression >= math.ceil(form.row_lower[r]))
        if form.row_upper[r] < np.inf:
            model.add(expression <= math.floor(form.row_upper[r]))


def _configure(solver: Any, task: Task, options: dict[str, Any]) -> None:
    parameters = solver.parameters
    parameters.catch_sigint_signal = False
    if task.seconds_left is not None:
        parameters.max_time_in_seconds = task.seconds_left
    parameters.relative_gap_limit = task.solver_gap
    parameters.num_workers = task.limits.threads
    parameters.random_seed = task.limits.seed % (2**31 - 1)
    for name, value in options.items():
        setattr(parameters, name, value)


def _rounding_error(form: StandardForm, rounded: FloatArray) -> float:
    """Return the most by which rounded costs can exceed the true ones at a set of the right size."""
    excess = np.maximum(rounded - form.linear, 0.0)
    n_prune = form.support.most_pruned(form.decision.size)
    single = np.sort(excess[form.decision])[::-1][:n_prune]
    pairs = np.sort(np.delete(excess, form.decision))[::-1][: n_prune * (n_prune - 1) // 2]
    return float(single.sum() + pairs.sum())


def _check_bits(options: Mapping[str, Any]) -> None:
    bits = options.get("bits", DEFAULT_BITS)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 8 <= bits <= 40:
        raise ArgumentError("bits", f"{bits!r}", "choose 8 to 40")


def _option_names() -> list[str]:
    from ortools.sat import sat_parameters_pb2

    return [*(f.name for f in sat_parameters_pb2.SatParameters.DESCRIPTOR.fields), "bits"]


SOLVER = Solver(
    name="cp_sat",
    capabilities=frozenset({INTEGER, REPEATABLE}),
    probe=lambda: probe_package("ortools"),
    run=_run,
    default_models={"selection": "selection_mccormick"},
    check_values=_check_bits,
    option_names=_option_names,
    reserved={
        "max_time_in_seconds": "Limits.time_limit",
        "relative_gap_limit": "Limits.rel_gap",
        "num_workers": "Limits.threads",
        "num_search_workers": "Limits.threads",
        "random_seed": "Limits.seed",
        "catch_sigint_signal": FIXED_INTERRUPT,
    },
    ignores=("node_limit",),
    models=MODELS,
)
