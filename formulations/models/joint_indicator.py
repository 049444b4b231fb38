"""Joint selection and update as a disjunction: each weight is either kept or zero.

    min  1/2 u.H u - b.u + const
    s.t. (keep_i = true)  or  (keep_i = false and u_i = 0)   for every i,   sum_i keep_i = n - k

No big-M enters the logic; solvers with indicator constraints take it as it is and the box of
`scaling.level_set` serves only as variable bounds (it also lets Pyomo's ``gdp.bigm`` transform the
model for others). Valid as `joint_big_m` is.
Source: generalised disjunctive programming, Raman and Grossmann (1994).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyomo.environ as pyo
from pyomo.gdp import Disjunct, Disjunction

from formulations.models import algebra
from formulations.models.building import undivided
from formulations.models.scaling import level_set, scale_block
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution, never


def build(
    problem: BlockProblem, *, incumbent: BlockSolution | None = None, stopped: Callable[[], bool] = never
) -> pyo.ConcreteModel:
    """Return the Pyomo GDP model; O(n^2) terms. Parameters as for `joint_big_m.build`."""
    block = scale_block(problem)
    box = undivided("the box of the level set", partial(level_set, problem, block, incumbent), stopped)
    model: Any = pyo.ConcreteModel(name="joint_indicator")
    algebra.add_kept_set(model, block)
    model.new_weight = pyo.Var(
        model.weights, bounds=lambda _, i: (min(float(box.lower[i]), 0.0), max(float(box.upper[i]), 0.0))
    )
    model.keep = Disjunct(model.weights)
    model.prune = Disjunct(model.weights)
    # Pruned: the new weight is 0.
    for i in model.weights:
        model.prune[i].is_zero = pyo.Constraint(expr=model.new_weight[i] == 0.0)
    # Each weight is kept or pruned.
    model.choice = Disjunction(model.weights, rule=lambda m, i: [m.keep[i], m.prune[i]])
    # The binary of the cardinality constraint is the disjunct's own.
    model.same = pyo.Constraint(model.weights, rule=lambda m, i: m.kept[i] == m.keep[i].binary_indicator_var)
    # Loss increase in terms of the new weights.
    model.loss_increase = pyo.Objective(
        expr=algebra.quadratic(block.hessian, model.new_weight, stopped)
        - algebra.linear(block.linear_term, model.new_weight)
        + block.constant
    )
    return model
