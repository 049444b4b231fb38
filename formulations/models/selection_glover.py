"""Selection as a compact mixed-integer linear program: one variable a weight, not a pair.

    min  sum_i h_i + sum_i (A_ii / 2 - c_i) y_i
    s.t. h_i >= L_i y_i
         h_i >= sum_{j>i} A_ij y_j - U_i (1 - y_i)
         sum_i y_i = k,  y in {0, 1}^n

``h_i`` stands for ``y_i sum_{j>i} A_ij y_j``. Valid: ``L_i`` is the sum of the (at most) k - 1
smallest negative and ``U_i`` of the k largest positive ``A_ij, j > i``, hence bounds of that sum over
sets that prune at most k. Source: Glover (1975), with the cardinality used in the constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.building import fill
from formulations.models.scaling import scale_block
from formulations.problem import BlockProblem
from formulations.solution import never


def build(problem: BlockProblem, *, stopped: Callable[[], bool] = never) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n) variables and constraints with O(n^2) nonzeros."""
    block = scale_block(problem)
    costs = block.pair_costs
    k = block.support.most_pruned(block.n)
    later = np.triu(costs, 1)
    ordered = np.sort(later, axis=1)
    lowest = np.minimum(ordered[:, : max(k - 1, 0)], 0.0).sum(axis=1)
    highest = np.maximum(ordered[:, block.n - k :], 0.0).sum(axis=1)
    model: Any = pyo.ConcreteModel(name="selection_glover")
    algebra.add_pruned_set(model, block)
    model.share = pyo.Var(model.weights, bounds=lambda _, i: (float(lowest[i]), float(highest[i])))
    # A kept weight has no share below 0; a pruned one never less than its k - 1 best partners give.
    model.floor = pyo.Constraint(
        model.weights, rule=lambda m, i: m.share[i] >= float(lowest[i]) * m.pruned[i]
    )
    # A pruned weight pays for its pruned partners; for a kept one the constraint is slack.
    model.partners = pyo.Constraint(model.weights)
    fill(
        model.partners,
        model.weights,
        lambda i: (
            model.share[i]
            >= algebra.linear(later[i], model.pruned) - float(highest[i]) * (1.0 - model.pruned[i])
        ),
        stopped,
        period=1,
    )
    # Loss increase with each weight's products gathered in its share.
    model.loss_increase = pyo.Objective(
        expr=pyo.quicksum(model.share[i] for i in model.weights)
        + algebra.linear(0.5 * np.diagonal(costs) - block.gains, model.pruned)
    )
    return model
