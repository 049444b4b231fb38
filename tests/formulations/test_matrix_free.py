"""The relaxations on rows alone: same bounds as dense, bounded memory, limits kept."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc

import numpy as np
import pytest

from formulations import BlockProblem, Limit, Limits, verify
from formulations.relaxations import lower_bound
from formulations.relaxations.matrix_free import relax_joint_rows
from formulations.relaxations.shifted_inverse import ShiftedInverse, scaled_gram

PROGRAMS = ("selection", "joint")


def rows_block(m: int, n: int, n_prune: int, *, damping: float = 0.1, seed: int = 0) -> BlockProblem:
    """A correlated block whose rows are shared, not copied."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(m, n)) * rng.uniform(0.2, 1.0, n) / np.sqrt(m)
    rows += 0.3 * rng.normal(size=(m, 1)) / np.sqrt(m)
    rows.flags.writeable = False
    return BlockProblem(weights=rng.normal(size=n), rows=rows, damping=damping, n_prune=n_prune)


@pytest.fixture
def rows_only(monkeypatch):
    monkeypatch.setattr("formulations.relaxations.bounds.DENSE_LARGEST", 0)
    monkeypatch.setattr("formulations.relaxations.bounds.SPLIT_LARGEST", 0)
    monkeypatch.setattr("formulations.relaxations.cluster_split.CLUSTERED_LARGEST", 0)


@pytest.mark.parametrize("shape", [(30, 90), (200, 60)])
@pytest.mark.parametrize("shift", [0.3, 7.0])
def test_shifted_inverse_solves(shape, shift):
    rng = np.random.default_rng(1)
    rows, scale = rng.normal(size=shape), rng.uniform(0.1, 2.0, shape[1])
    gram = scaled_gram(rows, scale, lambda: False)
    assert gram.shape == (min(shape), min(shape))
    right = rng.normal(size=shape[1])
    solved = ShiftedInverse(rows, scale, gram).solve(right, shift)
    z = rows * scale
    np.testing.assert_allclose(z.T @ (z @ solved) + shift * solved, right, atol=1e-9)
    assert scaled_gram(rows, scale, lambda: True) is None


def test_gram_does_not_depend_on_the_panels(monkeypatch):
    rng = np.random.default_rng(2)
    for shape in ((20, 90), (90, 20)):
        rows, scale = rng.normal(size=shape), rng.uniform(0.1, 2.0, shape[1])
        whole = scaled_gram(rows, scale, lambda: False)
        monkeypatch.setattr("formulations.relaxations.shifted_inverse.PANEL_BYTES", 8 * 20 * 7)
        np.testing.assert_allclose(scaled_gram(rows, scale, lambda: False), whole, rtol=1e-12)
        monkeypatch.undo()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shape", [(40, 150), (400, 90)])
@pytest.mark.parametrize("largest", [8192, 0])
def test_bounds_on_rows_are_those_of_the_dense_relaxation(program, shape, largest, rows_only, monkeypatch):
    problem = rows_block(*shape, shape[1] // 2)
    monkeypatch.setattr("formulations.relaxations.bounds.DENSE_LARGEST", 2000)
    dense = lower_bound(problem, program, diagonal_split=False)
    monkeypatch.setattr("formulations.relaxations.bounds.DENSE_LARGEST", 0)
    monkeypatch.setattr("formulations.relaxations.matrix_free.GRAM_LARGEST", largest)
    free = lower_bound(problem, program)
    assert free.bound <= dense.bound * (1.0 + 1e-5)
    assert free.bound == pytest.approx(dense.bound, rel=2e-3)
    assert verify(problem, free).bound_checked


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_known_point_saves_steps(program, rows_only):
    problem = rows_block(60, 400, 300)
    cold = lower_bound(problem, program)
    warm = lower_bound(problem, program, incumbent=cold)
    assert 0 < warm.stats.iterations < cold.stats.iterations
    assert warm.bound >= cold.bound * (1.0 - 1e-9)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_good_enough_gap_ends_the_search(program, rows_only):
    problem = rows_block(60, 400, 300)
    best = dataclasses.replace(lower_bound(problem, program), certificate=None)
    loose = lower_bound(problem, program, incumbent=best, limits=Limits(rel_gap=0.5))
    close = lower_bound(problem, program, incumbent=best, limits=Limits(rel_gap=1e-6))
    assert loose.stats.iterations < close.stats.iterations
    assert loose.bound <= close.bound + 1e-9 * abs(close.bound)


@pytest.mark.parametrize("program", PROGRAMS)
def test_limits_give_a_valid_bound_and_are_named(program, rows_only):
    problem = rows_block(60, 400, 300)
    full = lower_bound(problem, program)
    for limits, limit in ((Limits(time_limit=0.0), Limit.TIME), (Limits(iteration_limit=2), Limit.ITERATION)):
        early = lower_bound(problem, program, limits=limits)
        assert early.limit is limit
        assert early.bound <= full.bound + 1e-9 * abs(full.bound)
        assert verify(problem, early).bound_checked


def test_the_time_limit_holds_while_the_gram_matrix_is_formed(monkeypatch):
    problem = rows_block(800, 20_000, 15_000)
    monkeypatch.setattr("formulations.relaxations.shifted_inverse.PANEL_BYTES", 2**20)
    calls = iter([0.0] + [0.2 * i for i in range(10_000)])
    monkeypatch.setattr("formulations.solution.time.perf_counter", lambda: next(calls))
    point, _ = relax_joint_rows(problem, Limits(time_limit=1.0), 0.0, np.inf)
    # Stopped in the first panels: no step was made from the point zero.
    assert not point.any()
    assert next(calls) < 5.0


@pytest.mark.parametrize("program", PROGRAMS)
def test_memory_stays_near_that_of_the_rows(program, monkeypatch):
    monkeypatch.setattr("formulations.relaxations.shifted_inverse.PANEL_BYTES", 2**20)
    problem = rows_block(100, 40_000, 30_000)
    lower_bound(rows_block(20, 3000, 2000), program)  # compiles the kernels
    tracemalloc.start()
    solution = lower_bound(problem, program, limits=Limits(iteration_limit=20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert solution.bound <= solution.objective
    kept = 1.0 - problem.n_prune / problem.n if program == "joint" else 0.0
    vectors, panel = 60 * 8 * problem.n, 2**21
    assert peak < (kept + 0.15) * problem.rows.nbytes + vectors + panel


def test_the_point_of_the_joint_relaxation_comes_with_its_residual():
    problem = rows_block(40, 300, 200)
    point, residual = relax_joint_rows(problem, Limits(), time.perf_counter(), np.inf)
    smooth = problem.hessian_product(point) - problem.damping * point
    np.testing.assert_allclose(residual, problem.linear_term() - smooth, atol=1e-9 * np.abs(residual).max())
