"""Selection as a binary quadratic program.

    min  1/2 sum_ij A_ij y_i y_j - sum_i c_i y_i    s.t.  sum_i y_i = k,  y in {0, 1}^n

with ``A = diag(w) H diag(w)``, ``c_i = g_i w_i`` and ``y_i = 1`` where weight i is pruned.

Valid without conditions: it is the program itself. ``A`` is positive semidefinite, so the continuous
relaxation is convex, and weak. Source: Yu et al. (ICML 2022), CBS-S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.scaling import scale_block
from formulations.problem import BlockProblem
from formulations.solution import never


def build(problem: BlockProblem, *, stopped: Callable[[], bool] = never) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n^2) terms."""
    block = scale_block(problem)
    model: Any = pyo.ConcreteModel(name="selection_qp")
    algebra.add_pruned_set(model, block)
    pruned = model.pruned
    # Loss increase of removing the chosen weights while the others do not move.
    model.loss_increase = pyo.Objective(
        expr=algebra.quadratic(block.pair_costs, pruned, stopped) - algebra.linear(block.gains, pruned)
    )
    return model
