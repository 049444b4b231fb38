"""Joint selection and update with big-M constraints.

    min  1/2 u.H u - b.u + const      s.t.  l_i z_i <= u_i <= h_i z_i,  sum_i z_i = n - k,  z binary

``u`` are the new weights, ``b = H w - g`` and ``z_i = 1`` where weight i is kept. ``[l, h]`` is the
box around the level set of a known set's loss (`scaling.level_set` proves it), so no set at least as
good as the known one is cut off. Convex, with a weak relaxation.
Source: Bertsimas, King and Mazumder (2016); constants from the level set of the strongly convex
quadratic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.building import undivided
from formulations.models.scaling import level_set, scale_block
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution, never


def build(
    problem: BlockProblem, *, incumbent: BlockSolution | None = None, stopped: Callable[[], bool] = never
) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n^2) terms.

    Parameters
    ----------
    problem : BlockProblem
    incumbent : BlockSolution, optional
        The known set whose loss makes the constants valid; magnitude pruning without one.
    stopped : callable
        Asked between terms whether the time is over; `building.BuildingStopped` is raised then.
    """
    block = scale_block(problem)
    box = undivided("the box of the level set", partial(level_set, problem, block, incumbent), stopped)
    model: Any = pyo.ConcreteModel(name="joint_big_m")
    algebra.add_kept_set(model, block)
    algebra.add_new_weights(model, box.lower, box.upper)
    # Loss increase in terms of the new weights.
    model.loss_increase = pyo.Objective(
        expr=algebra.quadratic(block.hessian, model.new_weight, stopped)
        - algebra.linear(block.linear_term, model.new_weight)
        + block.constant
    )
    return model
