"""The linear relaxations against the same programs written down anew."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog

from formulations import BlockProblem
from formulations.errors import UnsupportedProblemError
from formulations.relaxations import lower_bound
from formulations.relaxations.linear import _LinearProgram
from tests.formulations.blocks import block


def least(problem: BlockProblem, relaxation: str) -> float:
    """Optimum of McCormick's relaxation of all products of pairs, with the degrees for "rlt"."""
    n, k = problem.n, problem.n_prune
    costs = problem.dense_hessian() * np.outer(problem.weights, problem.weights)
    pairs = list(itertools.combinations(range(n), 2))
    objective = [*(0.5 * np.diagonal(costs) - problem.gradient_or_zero * problem.weights)]
    objective += [costs[i, j] for i, j in pairs]
    upper, limit = [], []
    degrees = np.zeros((n, n + len(pairs)))
    degrees[:, :n] = -(k - 1.0) * np.eye(n)
    for place, (i, j) in enumerate(pairs, start=n):
        degrees[[i, j], place] = 1.0
        for signs, right in (((1, 1, -1), 1.0), ((-1, 0, 1), 0.0), ((0, -1, 1), 0.0)):
            row = np.zeros(n + len(pairs))
            row[[i, j, place]] = signs
            upper.append(row)
            limit.append(right)
    count = np.concatenate((np.ones(n), np.zeros(len(pairs))))
    equal = np.vstack((count[None], degrees)) if relaxation == "rlt" else count[None]
    right = np.zeros(len(equal))
    right[0] = k
    found = linprog(objective, upper, limit, equal, right, bounds=(0.0, 1.0))
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("relaxation", ["mccormick", "rlt"])
@pytest.mark.parametrize("kind", ["random", "gradient", "wide"])
def test_a_certificate_proves_the_optimum_of_its_relaxation(kind, relaxation):
    for n_prune in (2, 4, 5):
        problem = block(kind, 6, n_prune, seed=n_prune)
        bound = lower_bound(problem, "selection", relaxation=relaxation).certificate.lower_bound(problem)
        wanted = least(problem, relaxation)
        unit = float(np.abs(problem.dense_hessian() * np.outer(problem.weights, problem.weights)).max())
        assert bound <= wanted + 1e-9 * unit
        assert bound >= wanted - 1e-6 * unit


@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_only_rows_that_the_sign_of_a_cost_can_make_active_are_written(kind):
    problem = block(kind, 6, 3, seed=1)
    assert (problem.weights == 0.0).any() == (kind == "zeros")
    costs = problem.dense_hessian() * np.outer(problem.weights, problem.weights)
    products = costs[np.triu_indices(6, 1)]
    plain, full = (_LinearProgram.of(problem, name) for name in ("mccormick", "rlt"))
    assert plain.n_rows == 1 + int((products > 0.0).sum()) + 2 * int((products < 0.0).sum())
    assert full.n_rows == 1 + 3 * 15 + 6
    for program in (plain, full):
        model = program.model()
        assert program.n == 6
        assert model.matrix.shape == (program.n_rows, 6 + 15)
        assert not model.integer.any()
        # Every set with its own products obeys all rows.
        for pruned in itertools.combinations(range(6), 3):
            y = np.isin(np.arange(6), pruned).astype(float)
            point = np.concatenate((y, (y[:, None] * y)[np.triu_indices(6, 1)]))
            rows = model.matrix @ point
            assert (rows >= model.row_lower - 1e-12).all()
            assert (rows <= model.row_upper + 1e-12).all()
            value = 0.5 * y @ costs @ y - (problem.gradient_or_zero * problem.weights) @ y
            assert program.unit * float(model.cost @ point) == pytest.approx(value, rel=1e-9, abs=0.0)


def test_without_multipliers_the_bound_is_that_of_the_signs_of_the_costs():
    """No multiplier: every pair costs what it costs below 0, and the cheapest weights are pruned."""
    problem = replace(block("gradient", 6, 3, seed=1), name="")
    program = _LinearProgram.of(problem, "rlt")
    certificate = program.certificate(np.zeros(program.n_rows), problem)
    costs = problem.dense_hessian() * np.outer(problem.weights, problem.weights)
    single = np.sort(0.5 * np.diagonal(costs) - problem.gradient_or_zero * problem.weights)
    wanted = float(np.minimum(np.triu(costs, 1), 0.0).sum() + single[:3].sum())
    assert certificate.lower_bound(problem) == pytest.approx(wanted, rel=1e-9, abs=0.0)
    # The sign of a multiplier of an inequality that the solver got wrong is no proof: it is set to 0.
    wrong = program.certificate(np.concatenate((np.zeros(1), -np.ones(45), np.zeros(6))), problem)
    assert wrong.lower_bound(problem) == certificate.lower_bound(problem)


def test_the_largest_block_is_still_relaxed_and_the_next_one_refused(monkeypatch):
    monkeypatch.setattr("formulations.relaxations.linear.LINEAR_LARGEST", 6)
    assert lower_bound(block("random", 6, 3, seed=1), "selection", relaxation="rlt").bound is not None
    with pytest.raises(UnsupportedProblemError, match="7 weights"):
        lower_bound(block("random", 7, 3, seed=1), "selection", relaxation="rlt")


@pytest.mark.parametrize("relaxation", ["mccormick", "rlt"])
def test_where_nothing_costs_anything_the_bound_is_zero(relaxation):
    problem = BlockProblem(weights=np.zeros(5), rows=np.eye(5), damping=0.5, n_prune=2)
    program = _LinearProgram.of(problem, relaxation)
    assert program.unit == 1.0
    solution = lower_bound(problem, "selection", relaxation=relaxation)
    assert -1e-12 <= solution.bound <= solution.objective == 0.0
