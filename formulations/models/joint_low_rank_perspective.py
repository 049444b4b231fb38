"""Joint selection and update: perspective cones, and the rest of the quadratic as a sum of squares.

    min  1/2 sum_a v_a^2 - b.u + 1/2 sum_i D_i t_i + const
    s.t. v = L u,  u_i^2 <= t_i z_i,  l_i z_i <= u_i <= h_i z_i,  sum_i z_i = n - k,  z binary

with ``L^T L = H - diag(D)``. Valid as `joint_perspective` is. In the level set
``|L_a (u - centre)| <= radius`` because ``L^T L`` is at most ``H``: these are the bounds of ``v``.
Source: as `joint_perspective`; the factored form is the one measured best for open solvers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.building import undivided
from formulations.models.joint_perspective import add_cones
from formulations.models.scaling import diagonal_split, level_set, low_rank_factor, scale_block
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution, never


def build(
    problem: BlockProblem, *, incumbent: BlockSolution | None = None, stopped: Callable[[], bool] = never
) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n r) terms for rank r, n cones. Parameters as for `joint_big_m.build`."""
    block = scale_block(problem)
    box = undivided("the box of the level set", partial(level_set, problem, block, incumbent), stopped)
    split = undivided("the split of H", partial(diagonal_split, block), stopped)
    rows = undivided("a factor of H", partial(low_rank_factor, problem, block, split), stopped)
    middle = rows @ box.centre
    model: Any = pyo.ConcreteModel(name="joint_low_rank_perspective")
    algebra.add_kept_set(model, block)
    algebra.add_new_weights(model, box.lower, box.upper)
    add_cones(model, box.lower, box.upper)
    algebra.add_factor(
        model, rows, model.new_weight, lower=middle - box.radius, upper=middle + box.radius, stopped=stopped
    )
    # Loss increase with the separable part in its perspective and the rest as a sum of squares.
    model.loss_increase = pyo.Objective(
        expr=algebra.half_squares(model.image)
        - algebra.linear(block.linear_term, model.new_weight)
        + algebra.linear(0.5 * split, model.square)
        + block.constant
    )
    return model
