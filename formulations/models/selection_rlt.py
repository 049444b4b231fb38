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

import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.scaling import scale_block
from formulations.problem import BlockProblem
from formulations.solution import never


def build(problem: BlockProblem, *, stopped: Callable[[], bool] = never) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n^2) variables, O(n^2) constraints."""
    block = scale_block(problem)
    model: Any = pyo.ConcreteModel(name="selection_rlt")
    algebra.add_pruned_set(model, block)
    pairs = list(combinations(range(block.n), 2))
    algebra.add_pairs(model, pairs, counted=pairs, limited=pairs, stopped=stopped)
    # A pruned weight forms pairs with exactly k - 1 others, a kept one with none; so for every row of the
    # support, of which the weight itself is none.
    rows = block.support.equations(block.n, kept=False)

    def degree(m: Any, i: int, row: int = 0) -> Any:
        index, value, right = rows[row]
        terms = dict(zip(index.tolist(), value.tolist(), strict=True))
        own = terms.pop(i, 0.0)
        pairs_of = pyo.quicksum(c * m.both[min(i, j), max(i, j)] for j, c in terms.items())
        return pairs_of == (right - own) * m.pruned[i]

    if len(rows) == 1:
        model.degree = pyo.Constraint(model.weights, rule=degree)
    else:
        model.degree = pyo.Constraint(model.weights, range(len(rows)), rule=degree)
    algebra.add_pair_loss(model, block, pairs, stopped)
    return model
