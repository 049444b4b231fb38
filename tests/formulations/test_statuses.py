"""Proved means that the gap asked for was met, also where rounding lets no method meet it."""

from __future__ import annotations

import numpy as np
import pytest

from formulations import BlockProblem, Limit, Limits, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.enumeration import enumerate_optimum
from formulations.outer_approximation import outer_approximation
from formulations.relaxations import lower_bound


def polynomial_design(seed: int = 0) -> BlockProblem:
    """A regression on ten correlated columns, their squares and products: 65 columns, two to be kept."""
    rng = np.random.default_rng(seed)
    base = 0.05 * (rng.normal(size=(442, 10)) + rng.normal(size=(442, 1)))
    base[:, 1] = np.where(base[:, 1] > 0.0, 0.05, -0.045)
    first, second = np.triu_indices(10)
    design = np.hstack([base, base[:, first] * base[:, second]])
    design = (design - design.mean(axis=0)) / design.std(axis=0) / np.sqrt(442.0)
    target = design[:, :5].sum(axis=1) + 0.02 * rng.normal(size=442)
    gram = design.T @ design
    weights = np.linalg.solve(gram + 1e-8 * np.eye(65), design.T @ target)
    return BlockProblem(weights=weights, rows=design, damping=1e-8, n_prune=63)


@pytest.mark.parametrize("rel_gap", [1e-6, 1e-2])
@pytest.mark.parametrize("method", [branch_and_bound, enumerate_optimum, lower_bound, outer_approximation])
def test_proved_means_the_gap_asked_for_where_the_design_is_nearly_singular(method, rel_gap):
    """Squares of a column with two values repeat it: rounding leaves a gap that no search can close."""
    problem = polynomial_design()
    scaled = problem.dense_hessian() / problem.hessian_diagonal()[0]
    assert np.linalg.cond(scaled) > 1e8
    solution = method(problem, "joint", limits=Limits(rel_gap=rel_gap, time_limit=10.0, iteration_limit=3))
    assert solution.proved == (solution.gap <= rel_gap)
    assert not verify(problem, solution).wrong
    if method in (branch_and_bound, enumerate_optimum) and rel_gap == 1e-6:
        assert solution.limit is Limit.GAP
        assert 1e-6 < solution.gap < 0.5
