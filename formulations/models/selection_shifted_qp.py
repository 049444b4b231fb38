"""Selection as a binary quadratic program with its diagonal shifted into the linear term.

    min  1/2 sum_ij (A_ij - u_i [i = j]) y_i y_j + sum_i (u_i / 2 - c_i) y_i
    s.t. sum_i y_i = k,  y in {0, 1}^n

``y_i^2 = y_i`` makes the objective the same on binary points for any ``u``; on fractional ones it is
larger. Valid for every ``u``; convex while ``A - diag(u)`` is positive semidefinite, which
``u_i = D_i w_i^2`` with ``H - diag(D)`` positive semidefinite ensures.
Source: Hammer and Rubin (1970); Billionnet and Elloumi (2007), quadratic convex reformulation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.building import undivided
from formulations.models.scaling import diagonal_split, scale_block
from formulations.problem import BlockProblem
from formulations.solution import never


def build(problem: BlockProblem, *, stopped: Callable[[], bool] = never) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n^2) terms, O(n^3) for the shift."""
    block = scale_block(problem)
    shift = undivided("the split of H", partial(diagonal_split, block), stopped) * block.weights**2
    model: Any = pyo.ConcreteModel(name="selection_shifted_qp")
    algebra.add_pruned_set(model, block)
    pruned = model.pruned
    # The loss increase on binary points, with u_i y_i^2 written as u_i y_i.
    model.loss_increase = pyo.Objective(
        expr=algebra.quadratic(block.pair_costs - np.diag(shift), pruned, stopped)
        + algebra.linear(0.5 * shift - block.gains, pruned)
    )
    return model
