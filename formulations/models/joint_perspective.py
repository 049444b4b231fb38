"""Joint selection and update with the perspective reformulation (rotated second-order cones).

    min  1/2 u.Q u - b.u + 1/2 sum_i D_i t_i + const
    s.t. u_i^2 <= t_i z_i,  l_i z_i <= u_i <= h_i z_i,  sum_i z_i = n - k,  z binary

with ``H = Q + diag(D)``, ``D > 0`` and ``Q`` positive semidefinite. Valid: ``t_i = u_i^2`` where
``z_i = 1`` and ``u_i = t_i = 0`` where ``z_i = 0``; on fractional points ``u_i^2 / z_i`` is the convex
hull of the separable part, hence far tighter than big-M. The box is `joint_big_m`'s.
Source: Frangioni and Gentile (2006); Guenluek and Linderoth (2010).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.building import undivided
from formulations.models.scaling import diagonal_split, level_set, scale_block
from formulations.problem import BlockProblem, FloatArray
from formulations.solution import BlockSolution, never


def build(
    problem: BlockProblem, *, incumbent: BlockSolution | None = None, stopped: Callable[[], bool] = never
) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n^2) terms, n cones. Parameters as for `joint_big_m.build`."""
    block = scale_block(problem)
    box = undivided("the box of the level set", partial(level_set, problem, block, incumbent), stopped)
    split = undivided("the split of H", partial(diagonal_split, block), stopped)
    model: Any = pyo.ConcreteModel(name="joint_perspective")
    algebra.add_kept_set(model, block)
    algebra.add_new_weights(model, box.lower, box.upper)
    add_cones(model, box.lower, box.upper)
    # Loss increase with the separable part of the quadratic in its perspective.
    model.loss_increase = pyo.Objective(
        expr=algebra.quadratic(block.hessian - np.diag(split), model.new_weight, stopped)
        - algebra.linear(block.linear_term, model.new_weight)
        + algebra.linear(0.5 * split, model.square)
        + block.constant
    )
    return model


def add_cones(model: Any, lower: FloatArray, upper: FloatArray) -> None:
    """Declare ``square`` and the cones that tie it to ``new_weight`` and ``kept``."""
    largest = np.maximum(lower**2, upper**2)
    model.square = pyo.Var(model.weights, bounds=lambda _, i: (0.0, float(largest[i])))
    # square_i is at least u_i^2 / z_i, and 0 only with u_i.
    model.cone = pyo.Constraint(
        model.weights, rule=lambda m, i: m.new_weight[i] ** 2 - m.square[i] * m.kept[i] <= 0.0
    )
