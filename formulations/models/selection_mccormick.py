"""Selection as a mixed-integer linear program: every product gets a variable.

    min  sum_{i<j} A_ij p_ij + sum_i (A_ii / 2 - c_i) y_i
    s.t. p_ij >= y_i + y_j - 1            where A_ij > 0
         p_ij <= y_i,  p_ij <= y_j        where A_ij < 0
         sum_i y_i = k,  y in {0, 1}^n,  0 <= p <= 1

Valid: on binary points the side of McCormick's envelope that the objective presses on gives
``p_ij = y_i y_j``; the other side is never active and is left out.
Source: McCormick (1976); Glover and Woolsey (1974).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyomo.environ as pyo

from formulations.models import algebra
from formulations.models.building import asking
from formulations.models.scaling import scale_block
from formulations.problem import BlockProblem
from formulations.solution import never


def build(problem: BlockProblem, *, stopped: Callable[[], bool] = never) -> pyo.ConcreteModel:
    """Return the Pyomo model; O(n^2) variables and constraints."""
    block = scale_block(problem)
    costs = block.pair_costs
    model: Any = pyo.ConcreteModel(name="selection_mccormick")
    algebra.add_pruned_set(model, block)
    places = zip(*np.nonzero(np.triu(costs, 1)), strict=True)
    pairs = [(int(i), int(j)) for i, j in asking(places, stopped)]
    repelled = [pair for pair in pairs if costs[pair] > 0.0]
    attracted = [pair for pair in pairs if costs[pair] < 0.0]
    # A costly pair has to be counted, a helpful one to be allowed.
    algebra.add_pairs(model, pairs, counted=repelled, limited=attracted, stopped=stopped)
    algebra.add_pair_loss(model, block, pairs, stopped)
    return model
