"""Selection with its shifted quadratic form written as a sum of squares.

    min  1/2 sum_a v_a^2 + sum_i (u_i / 2 - c_i) y_i
    s.t. v = L y,  sum_i y_i = k,  y in {0, 1}^n,      L^T L = A - diag(u)

Valid as `selection_shifted_qp` is; ``L`` has as many rows as the Hessian model has rank, so the
quadratic part is sparse and separable. ``v_a`` lies between the sums of the k smallest and of the k
largest entries of row a, or of what the support can prune. Source: the form measured best for open
solvers; separability as in Hijazi, Bonami and Ouorou (2014).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.building import undivided
from formulations.models.scaling import ScaledBlock, diagonal_split, low_rank_factor, scale_block
from formulations.problem import BlockProblem, FloatArray
from formulations.solution import never
from formulations.support import Count


def build(problem: BlockProblem, *, stopped: Callable[[], bool] = never) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n r) terms for rank r, O(n^3) for the factor."""
    block = scale_block(problem)
    split = undivided("the split of H", partial(diagonal_split, block), stopped)
    shift = split * block.weights**2
    rows = undivided("a factor of H", partial(low_rank_factor, problem, block, split), stopped)
    rows = rows * block.weights
    lower, upper = _ranges(rows, block)
    model: Any = pyo.ConcreteModel(name="selection_low_rank")
    algebra.add_pruned_set(model, block)
    algebra.add_factor(
        model,
        rows,
        model.pruned,
        lower=lower,
        upper=upper,
        stopped=stopped,
    )
    # The loss increase on binary points.
    model.loss_increase = pyo.Objective(
        expr=algebra.half_squares(model.image) + algebra.linear(0.5 * shift - block.gains, model.pruned)
    )
    return model


def _ranges(rows: FloatArray, block: ScaledBlock) -> tuple[FloatArray, FloatArray]:
    """Return the least and the largest sum of each row over the weights that a set prunes."""
    if isinstance(block.support, Count):
        k, ordered = block.n_prune, np.sort(rows, axis=1)
        return ordered[:, :k].sum(axis=1), ordered[:, block.n - k :].sum(axis=1)
    largest = block.support.largest_pruned_sum
    return np.array([-largest(-row) for row in rows]), np.array([largest(row) for row in rows])
