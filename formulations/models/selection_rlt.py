"""Selection as a mixed-integer linear program, tightened by reformulation-linearisation.

    min  sum_{i<j} A_ij p_ij + sum_i (A_ii / 2 - c_i) y_i
    s.t. sum_{j != i} p_ij = (k - 1) y_i                      for every i
         p_ij >= y_i + y_j - 1,  p_ij <= y_i,  p_ij <= y_j    for every pair
         sum_i y_i = k,  y in {0, 1}^n,  0 <= p <= 1

The new equalities are the cardinality constraint multiplied by ``y_i``. Valid: with
``p_ij = y_i y_j`` each of them holds at every binary point. Much stronger than McCormick's envelope
alone, at n^2 more rows. Source: Adams and Sherali (1986).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.building import asking, fill
from formulations.models.scaling import scale_block
from formulations.problem import BlockProblem
from formulations.solution import never


def build(problem: BlockProblem, *, stopped: Callable[[], bool] = never) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n^2) variables, O(n^2) constraints."""
    block = scale_block(problem)
    costs = block.pair_costs
    model: Any = pyo.ConcreteModel(name="selection_rlt")
    algebra.add_pruned_set(model, block)
    pairs = list(combinations(range(block.n), 2))
    model.pairs = pyo.Set(initialize=pairs, dimen=2)
    model.both = pyo.Var(model.pairs, bounds=(0.0, 1.0))
    both, pruned = model.both, model.pruned
    # A pair is counted as soon as both its weights are pruned ...
    model.count_pair = pyo.Constraint(pairs)
    fill(model.count_pair, pairs, lambda p: both[p] >= pruned[p[0]] + pruned[p[1]] - 1.0, stopped)
    # ... and only if its first weight is pruned ...
    model.first = pyo.Constraint(pairs)
    fill(model.first, pairs, lambda p: both[p] <= pruned[p[0]], stopped)
    # ... and its second one too.
    model.second = pyo.Constraint(pairs)
    fill(model.second, pairs, lambda p: both[p] <= pruned[p[1]], stopped)
    # A pruned weight forms pairs with exactly k - 1 others, a kept one with none.
    model.degree = pyo.Constraint(
        model.weights,
        rule=lambda m, i: (
            pyo.quicksum(m.both[min(i, j), max(i, j)] for j in range(block.n) if j != i)
            == (block.n_prune - 1) * m.pruned[i]
        ),
    )
    # Loss increase with products replaced by the pair variables.
    model.loss_increase = pyo.Objective(
        expr=pyo.quicksum(float(costs[pair]) * model.both[pair] for pair in asking(pairs, stopped))
        + algebra.linear(0.5 * np.diagonal(costs) - block.gains, model.pruned)
    )
    return model
