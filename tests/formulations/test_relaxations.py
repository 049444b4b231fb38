import dataclasses
import math

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, minimize

from formulations import BlockProblem, Limits, Termination, objective, verify
from formulations.dense_forms import joint_form, selection_form
from formulations.enumeration import enumerate_optimum
from formulations.incumbents import swap_search
from formulations.relaxations import CappedSimplexCertificate, PerspectiveCertificate, lower_bound
from formulations.relaxations.capped_simplex import relax_selection
from formulations.relaxations.capped_simplex_kernels import project_capped_simplex
from formulations.relaxations.diagonal_split import barrier_step, interior_split
from formulations.relaxations.perspective import relax_joint
from formulations.relaxations.split_relaxation import joint_split, selection_shift
from formulations.relaxations.support_norm import prox_support_norm
from tests.formulations.blocks import KINDS, block, slack

PROGRAMS = ("selection", "joint")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_lie_below_the_optimum(kind, program):
    for n_prune in range(11):
        problem = block(kind, 10, n_prune, seed=n_prune)
        optimum = enumerate_optimum(problem, program).objective
        plain = lower_bound(problem, program, diagonal_split=False)
        better = lower_bound(problem, program, diagonal_split=True)
        for solution in (plain, better):
            assert solution.bound <= optimum + slack(problem)
            assert solution.objective >= optimum - slack(problem)
            check = verify(problem, solution)
            assert check.ok
            assert check.bound_checked or n_prune in (0, 10)
        assert better.bound >= plain.bound - 1e-6 * abs(optimum) - slack(problem)


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_point_gives_a_valid_bound(program):
    rng = np.random.default_rng(0)
    for seed in range(20):
        problem = block("gradient", 9, 4, seed)
        optimum = enumerate_optimum(problem, program).objective
        if program == "joint":
            certificate = PerspectiveCertificate(
                point=problem.weights * rng.uniform(0.0, 1.2, 9),
                split=problem.damping * rng.uniform(0.1, 1.0, 9),
            )
        else:
            certificate = CappedSimplexCertificate(
                point=rng.uniform(-0.2, 1.2, 9),
                shift=problem.damping * problem.weights**2 * rng.uniform(-1.0, 1.0, 9),
            )
        assert certificate.lower_bound(problem) <= optimum + slack(problem)


def test_invalid_certificates_prove_nothing():
    problem = block("random", 8, 4, seed=0)
    joint = lower_bound(problem, "joint", relaxation="perspective").certificate
    too_large = dataclasses.replace(joint, split=joint.split * 10.0)
    assert too_large.lower_bound(problem) == -math.inf
    assert dataclasses.replace(joint, split=-joint.split).lower_bound(problem) == -math.inf
    assert joint.lower_bound(block("random", 7, 4, seed=0)) == -math.inf
    selection = lower_bound(problem, "selection").certificate
    shifted = dataclasses.replace(selection, shift=selection.shift + 10.0 * problem.weights**2)
    assert shifted.lower_bound(problem) == -math.inf


def test_zero_weight_with_positive_shift_is_refused():
    problem = BlockProblem(weights=[0.0, 1.0, 2.0], rows=np.eye(3), damping=1.0, n_prune=1)
    certificate = CappedSimplexCertificate(point=np.full(3, 1 / 3), shift=np.array([0.5, 0.0, 0.0]))
    assert certificate.lower_bound(problem) == -math.inf
    fine = CappedSimplexCertificate(point=np.full(3, 1 / 3), shift=np.zeros(3))
    assert math.isfinite(fine.lower_bound(problem))


def test_large_damping_makes_the_bound_tight():
    problem = block("random", 20, 10, seed=1)
    easy = dataclasses.replace(problem, damping=1e6)
    for program in PROGRAMS:
        start = swap_search(easy, program)
        solution = lower_bound(easy, program, incumbent=start)
        assert solution.objective <= start.objective
        assert solution.gap < 1e-3


def test_perspective_solves_the_relaxation():
    form_problem = block("gradient", 15, 8, seed=3)
    form = joint_form(form_problem)
    split = joint_split(form_problem, form)
    s = form_problem.n_keep
    bound, _, _, _ = relax_joint(form, s, split)

    def value(z):
        system = form.matrix - np.diag(split) + np.diag(split / z)
        u = np.linalg.solve(system, form.linear)
        return form.constant - 0.5 * form.linear @ u, -0.5 * split * u**2 / z**2

    found = minimize(
        value,
        np.full(15, s / 15),
        jac=True,
        bounds=[(1e-6, 1.0)] * 15,
        constraints=LinearConstraint(np.ones(15), -np.inf, s),
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert bound <= found.fun + 1e-9 * abs(found.fun)
    assert bound == pytest.approx(found.fun, rel=1e-4)


def test_capped_simplex_solves_the_relaxation():
    problem = block("gradient", 15, 8, seed=3)
    form = selection_form(problem)
    shift = selection_shift(problem, form)
    bound, _, _ = relax_selection(form, 8, shift)
    smooth = form.matrix - np.diag(shift)
    linear = form.linear + 0.5 * shift
    found = minimize(
        lambda y: (0.5 * y @ smooth @ y + linear @ y, smooth @ y + linear),
        np.full(15, 8 / 15),
        jac=True,
        bounds=[(0.0, 1.0)] * 15,
        constraints=LinearConstraint(np.ones(15), 8, 8),
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert bound <= found.fun + 1e-9 * abs(found.fun)
    assert bound == pytest.approx(found.fun, rel=1e-4)


def test_prox_of_the_support_norm_is_optimal():
    rng = np.random.default_rng(4)
    for trial in range(50):
        n = 12
        size = int(rng.integers(1, n))
        step = float(rng.uniform(0.1, 3.0))
        x = rng.normal(size=n) * (1.0 if trial % 2 else np.round(rng.normal(size=n)))
        order, image = np.empty(n, dtype=np.int64), np.empty(n)
        left, right = prox_support_norm(x, size, step, order, image)
        # x - image = step * v with v a subgradient: <v, image> = 2 f(image) and dual value equal.
        v = (x - image) / step
        top = np.sort(v**2)[n - size :].sum()
        assert 0 <= left <= size <= right <= n or left == right == n
        assert v @ image == pytest.approx(top, rel=1e-9, abs=1e-12)


def test_projection_onto_the_capped_simplex_is_optimal():
    rng = np.random.default_rng(5)
    for _ in range(30):
        point, metric = rng.normal(size=11) * 2, rng.uniform(0.1, 5.0, 11)
        count = int(rng.integers(1, 11))
        image = np.empty(11)
        project_capped_simplex(point, metric, count, image)
        assert image.sum() == pytest.approx(count, abs=1e-9)
        slope = metric * (image - point)
        inside = (image > 1e-9) & (image < 1 - 1e-9)
        if inside.any():
            level = slope[inside].mean()
            np.testing.assert_allclose(slope[inside], level, atol=1e-8)
            assert (slope[image <= 1e-9] >= level - 1e-8).all()
            assert (slope[image >= 1 - 1e-9] <= level + 1e-8).all()


@pytest.mark.parametrize("positive", [True, False])
def test_barrier_steps_climb_and_stay_feasible(positive):
    form = joint_form(block("random", 25, 10, seed=2))
    lowest = float(np.linalg.eigvalsh(form.matrix)[0])
    split = interior_split(form.matrix, np.full(25, 0.99 * lowest), positive)
    slopes = np.random.default_rng(1).uniform(0.1, 1.0, 25)
    before = slopes @ split
    for _ in range(30):
        barrier_step(form.matrix, split, slopes, 1e-3, positive)
        assert np.linalg.eigvalsh(form.matrix - np.diag(split))[0] > 0.0
        assert (split > 0.0).all() or not positive
    assert slopes @ split > before


@pytest.mark.parametrize("program", PROGRAMS)
def test_incumbent_and_bound_can_prove_optimality(program):
    problem = dataclasses.replace(block("random", 12, 1, seed=0), damping=1e9)
    best = enumerate_optimum(problem, program)
    solution = lower_bound(problem, program, incumbent=best)
    assert solution.objective <= best.objective
    assert solution.termination in (Termination.OPTIMAL, Termination.FEASIBLE)
    assert (solution.termination is Termination.OPTIMAL) == (solution.gap <= 1e-6)


@pytest.mark.parametrize("program", PROGRAMS)
def test_matrix_free_bound_agrees_with_the_dense_one(program, monkeypatch):
    problem = dataclasses.replace(block("wide", 60, 40, seed=2), damping=0.3)
    dense = lower_bound(problem, program, diagonal_split=False)
    monkeypatch.setattr("formulations.relaxations.bounds.DENSE_LARGEST", 0)
    free = lower_bound(problem, program, diagonal_split=False)
    assert free.bound == pytest.approx(dense.bound, rel=1e-3)
    assert free.bound <= dense.bound * (1.0 + 1e-4)
    assert verify(problem, free).ok
    early = lower_bound(problem, program, diagonal_split=False, limits=Limits(iteration_limit=3))
    assert early.bound <= dense.bound * (1.0 + 1e-4)
    assert verify(problem, early).bound_checked


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_large_block_is_bounded_without_forming_its_hessian(program, monkeypatch):
    rng = np.random.default_rng(3)
    problem = BlockProblem(
        weights=rng.normal(size=5000), rows=rng.normal(size=(50, 5000)) / 7.0, damping=0.1, n_prune=4000
    )
    monkeypatch.setattr(BlockProblem, "dense_hessian", lambda self: pytest.fail("formed H"))
    start = np.sort(np.argsort(np.abs(problem.weights))[4000:])
    solution = lower_bound(problem, program, limits=Limits(time_limit=20.0))
    keep = np.zeros(5000, dtype=bool)
    keep[start] = True
    assert solution.bound <= solution.objective
    assert solution.bound <= objective(problem, keep, program)
    assert solution.gap < 0.5
    assert verify(problem, solution).bound_checked


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_damping_that_is_next_to_nothing_costs_no_more_than_itself(program):
    """Of rank 6 in 30 weights: Newton points of 1e5 and more, whose values are noise, once hid good ones."""
    for seed in (0, 7, 8, 10):
        rng = np.random.default_rng(seed)
        rows, weights = rng.normal(size=(6, 30)), rng.normal(size=30)
        problem = BlockProblem(weights=weights, rows=rows, damping=1e-7, n_prune=10)
        bound = lower_bound(problem, program, diagonal_split=False).bound
        # With nothing but the damping the ten smallest weights cost this much; rows only add to it.
        least = 0.5e-7 * float(np.sort(weights**2)[:10].sum())
        assert bound >= (0.5 * least if program == "joint" else -1e-3)
