"""Expressions and constraints that several models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyomo.environ as pyo
from pyomo.core.expr import LinearExpression

from formulations.models.building import asking, fill
from formulations.models.scaling import ScaledBlock
from formulations.problem import FloatArray, IntArray
from formulations.solution import never

Pairs = Sequence[tuple[int, int]]
"""Pairs of weights, the lower index first."""


def linear(coefficients: FloatArray, variables: Any) -> Any:
    """``sum_i coefficients_i variables_i`` over the nonzero coefficients."""
    index = np.flatnonzero(coefficients)
    if index.size == 0:
        return 0.0
    return LinearExpression(
        linear_coefs=[float(coefficients[i]) for i in index], linear_vars=[variables[int(i)] for i in index]
    )


def quadratic(matrix: FloatArray, variables: Any, stopped: Callable[[], bool] = never) -> Any:
    """``1/2 sum_ij matrix_ij variables_i variables_j`` for a symmetric matrix."""
    rows, columns = np.nonzero(np.triu(matrix))
    return pyo.quicksum(
        float(matrix[i, j] * (0.5 if i == j else 1.0)) * variables[int(i)] * variables[int(j)]
        for i, j in asking(zip(rows, columns, strict=True), stopped)
    )


def half_squares(variables: Any) -> Any:
    """``1/2 sum_a variables_a^2``."""
    return pyo.quicksum(0.5 * variables[a] ** 2 for a in variables)


def add_pruned_set(model: Any, block: ScaledBlock) -> None:
    """Declare ``pruned`` (binary, 1 = pruned) with its cardinality, and the objective's scale."""
    model.objective_scale = pyo.Param(initialize=block.objective_scale)
    model.weights = pyo.RangeSet(0, block.n - 1)
    model.pruned = pyo.Var(model.weights, domain=pyo.Binary)
    # Exactly k weights are pruned, or what the support says instead.
    _add_support(model, block, model.pruned, kept=False)


def add_pairs(
    model: Any, pairs: Pairs, *, counted: Pairs, limited: Pairs, stopped: Callable[[], bool] = never
) -> None:
    """Declare ``both`` in [0, 1], the product of ``pruned`` over a pair, by McCormick's envelope.

    Pairs that are `counted` are at least the product, those that are `limited` at most.
    """
    model.pairs = pyo.Set(initialize=pairs, dimen=2)
    model.both = pyo.Var(model.pairs, bounds=(0.0, 1.0))
    both, pruned = model.both, model.pruned
    # A pair is counted as soon as both its weights are pruned ...
    model.count_pair = pyo.Constraint(counted)
    fill(model.count_pair, counted, lambda p: both[p] >= pruned[p[0]] + pruned[p[1]] - 1.0, stopped)
    # ... and only if its first weight is pruned ...
    model.first = pyo.Constraint(limited)
    fill(model.first, limited, lambda p: both[p] <= pruned[p[0]], stopped)
    # ... and its second one too.
    model.second = pyo.Constraint(limited)
    fill(model.second, limited, lambda p: both[p] <= pruned[p[1]], stopped)


def add_pair_loss(model: Any, block: ScaledBlock, pairs: Pairs, stopped: Callable[[], bool] = never) -> None:
    """Declare the loss increase of the selection program with products replaced by the pair variables."""
    costs = block.pair_costs
    model.loss_increase = pyo.Objective(
        expr=pyo.quicksum(float(costs[pair]) * model.both[pair] for pair in asking(pairs, stopped))
        + linear(0.5 * np.diagonal(costs) - block.gains, model.pruned)
    )


def add_kept_set(model: Any, block: ScaledBlock) -> None:
    """Declare ``kept`` (binary, 1 = kept) with its cardinality, and the objective's scale."""
    model.objective_scale = pyo.Param(initialize=block.objective_scale)
    model.weights = pyo.RangeSet(0, block.n - 1)
    model.kept = pyo.Var(model.weights, domain=pyo.Binary)
    # Exactly n - k weights are kept, or what the support says instead.
    _add_support(model, block, model.kept, kept=True)


def _add_support(model: Any, block: ScaledBlock, binaries: Any, *, kept: bool) -> None:
    """Declare the rows of the support on the binaries: one, or one for each cell, and ties within groups."""
    model.support = block.support
    rows = block.support.equations(block.n, kept)
    bodies = [_row(index, value, binaries) == right for index, value, right in rows]
    if len(bodies) == 1:
        model.count = pyo.Constraint(expr=bodies[0])
    else:
        model.count = pyo.Constraint(range(len(bodies)), rule=lambda _, row: bodies[row])


def _row(index: IntArray, value: FloatArray, variables: Any) -> Any:
    """Return a linear expression from some of the variables."""
    return LinearExpression(linear_coefs=value.tolist(), linear_vars=[variables[i] for i in index.tolist()])


def add_new_weights(model: Any, lower: FloatArray, upper: FloatArray) -> None:
    """Declare ``new_weight`` and tie it to ``kept`` by the box ``[lower, upper]``."""
    model.new_weight = pyo.Var(
        model.weights, bounds=lambda _, i: (min(float(lower[i]), 0.0), max(float(upper[i]), 0.0))
    )
    # A pruned weight is 0; a kept one is below the upper end of its box.
    model.below = pyo.Constraint(
        model.weights, rule=lambda m, i: m.new_weight[i] <= float(upper[i]) * m.kept[i]
    )
    # A pruned weight is 0; a kept one is above the lower end of its box.
    model.above = pyo.Constraint(
        model.weights, rule=lambda m, i: m.new_weight[i] >= float(lower[i]) * m.kept[i]
    )


def add_factor(
    model: Any,
    rows: FloatArray,
    variables: Any,
    lower: FloatArray,
    upper: FloatArray,
    stopped: Callable[[], bool],
) -> None:
    """Declare ``image`` with ``image_a = sum_i rows_ai variables_i`` and its bounds."""
    model.factors = pyo.RangeSet(0, rows.shape[0] - 1)
    model.image = pyo.Var(model.factors, bounds=lambda _, a: (float(lower[a]), float(upper[a])))
    # image = L y: the quadratic form is then a sum of squares in few variables.
    model.product = pyo.Constraint(model.factors)
    fill(
        model.product,
        model.factors,
        lambda a: linear(rows[a], variables) - model.image[a] == 0.0,
        stopped,
        period=1,
    )
