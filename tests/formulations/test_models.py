"""Every model states its program: at each set it is feasible and its objective is the loss."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from formulations import BlockProblem, BlockSolution, Limits, objective
from formulations.errors import NotPositiveDefiniteError, UnsupportedProblemError
from formulations.loss import joint_loss, update
from formulations.models import MODELS, model_spec
from formulations.models.scaling import diagonal_split, factor, level_set, scale_block
from formulations.models.translation import standard_form
from formulations.solvers.conclusion import known_set
from tests.formulations.blocks import KINDS, block, slack
from tests.oracles import model_point, worst_violation


def kept_sets(problem: BlockProblem) -> list[np.ndarray]:
    sets = []
    for pruned in itertools.combinations(range(problem.n), problem.n_prune):
        keep = np.ones(problem.n, dtype=np.bool_)
        keep[list(pruned)] = False
        sets.append(keep)
    return sets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_each_set_is_a_point_with_the_loss_as_objective(name, kind):
    problem = block(kind, 6, 3, seed=1)
    spec = MODELS[name]
    sets = kept_sets(problem)
    losses = [objective(problem, keep, spec.program) for keep in sets]
    form = standard_form(spec.build(problem))
    scale = form.objective_scale
    checked = 0
    known = min(losses) if spec.program == "joint" else np.inf
    for keep, loss in zip(sets, losses, strict=True):
        point = model_point(problem, form, keep)
        assert form.objective(point) * scale == pytest.approx(loss, abs=10 * slack(problem), rel=1e-7)
        np.testing.assert_array_equal(form.keep(point), keep)
        # A joint model may cut off sets worse than the known one, never the best.
        if spec.program == "selection" or loss <= known + slack(problem):
            assert worst_violation(form, point) < 1e-7 * max(1.0, np.abs(point).max() ** 2)
            checked += 1
    assert checked


@pytest.mark.parametrize("name", MODELS)
def test_a_set_of_the_wrong_size_is_infeasible(name):
    problem = block("random", 6, 3, seed=2)
    form = standard_form(MODELS[name].build(problem))
    keep = np.array([True] * 4 + [False] * 2)
    assert worst_violation(form, model_point(problem, form, keep)) > 0.5


@pytest.mark.parametrize("name", [n for n, s in MODELS.items() if s.program == "selection"])
def test_convex_selection_models_stay_below_the_loss_between_sets(name):
    """Relaxed values at the mean of two sets are at most the mean of their losses."""
    problem = block("gradient", 6, 2, seed=3)
    form = standard_form(MODELS[name].build(problem))
    points = [model_point(problem, form, keep) for keep in kept_sets(problem)]
    for one, other in itertools.pairwise(points):
        middle = 0.5 * (one + other)
        assert worst_violation(form, middle) < 1e-9
        assert form.objective(middle) <= 0.5 * (form.objective(one) + form.objective(other)) + 1e-9


@pytest.mark.parametrize("kind", ["random", "gradient", "real", "wide"])
@pytest.mark.parametrize("seed", range(3))
def test_level_set_holds_every_set_at_least_as_good_as_the_known_one(kind, seed):
    problem = block(kind, 7, 3, seed)
    sets = kept_sets(problem)
    order = np.argsort([joint_loss(problem, keep) for keep in sets])
    known = sets[order[len(order) // 2]]
    incumbent = known_set(problem, "joint", "test", Limits(), _as_solution(problem, known))
    block_ = scale_block(problem)
    box = level_set(problem, block_, incumbent)
    for index in order[: len(order) // 2 + 1]:
        u = update(problem, sets[index]) / block_.weight_scale
        assert np.all(u >= box.lower)
        assert np.all(u <= box.upper)
        step = u - box.centre
        assert step @ block_.hessian @ step <= box.radius**2 * (1 + 1e-9)


def _as_solution(problem: BlockProblem, keep: np.ndarray) -> BlockSolution:
    return BlockSolution(
        keep=keep, weights=update(problem, keep), objective=None, program="joint", method="test"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_diagonal_split_leaves_a_semidefinite_rest(kind):
    problem = block(kind, 12, 5, seed=4)
    scaled = scale_block(problem)
    split = diagonal_split(scaled)
    rest = scaled.hessian - np.diag(split)
    squares = scaled.weights**2
    assert np.all(split >= 0.0)
    assert squares @ split >= scaled.damping * squares.sum() * (1 - 1e-9)
    assert np.linalg.eigvalsh(rest)[0] >= -1e-12 * 12
    rows = factor(rest)
    np.testing.assert_allclose(rows.T @ rows, rest, atol=1e-11)


def test_scaling_gives_coefficients_of_order_one():
    problem = block("random", 20, 5, seed=5)
    tiny = BlockProblem(
        weights=problem.weights * 1e-4, rows=problem.rows * 1e-5, damping=problem.damping * 1e-10, n_prune=5
    )
    one, other = scale_block(problem), scale_block(tiny)
    np.testing.assert_allclose(one.hessian, other.hessian)
    np.testing.assert_allclose(one.weights, other.weights)
    assert np.diagonal(one.hessian).mean() == pytest.approx(1.0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_prune", [1, 4, 8])
def test_announced_size_is_never_exceeded(name, n_prune):
    problem = block("random", 9, n_prune, seed=6)
    form = standard_form(MODELS[name].build(problem))
    size = MODELS[name].size(problem)
    assert form.n_columns <= size.variables
    assert form.matrix.shape[0] + len(form.indicators) <= size.linear_rows
    assert len(form.quadratic_rows) <= size.quadratic_rows
    assert np.all(np.isfinite(form.lower))
    assert np.all(np.isfinite(form.upper))
    kind = MODELS[name].kind
    assert (kind == "MILP") == (not form.is_quadratic)
    assert (kind == "MISOCP") == bool(form.quadratic_rows)


def test_unknown_model_and_wrong_program_name_the_right_ones():
    with pytest.raises(UnsupportedProblemError, match="joint_perspective"):
        model_spec("nonsense")
    with pytest.raises(UnsupportedProblemError, match=r"poses the selection program.*joint_big_m"):
        model_spec("selection_qp", "joint")


@pytest.mark.parametrize("n_prune", [0, 5])
def test_a_single_set_needs_no_model(n_prune):
    with pytest.raises(UnsupportedProblemError, match="only one set"):
        MODELS["selection_qp"].build(block("random", 5, n_prune, seed=7))


@pytest.mark.parametrize("name", [n for n, s in MODELS.items() if s.program == "joint"])
def test_joint_models_refuse_a_singular_hessian(name):
    problem = BlockProblem(weights=np.ones(4), rows=np.ones((1, 4)), n_prune=2)
    with pytest.raises(NotPositiveDefiniteError):
        MODELS[name].build(problem)


def test_level_set_refuses_a_hessian_too_close_to_singular():
    problem = BlockProblem(weights=np.ones(2), rows=np.diag([1.0, 1e-7]), n_prune=1)
    with pytest.raises(NotPositiveDefiniteError, match="condition"):
        MODELS["joint_big_m"].build(problem)


def test_zero_block_is_posed_without_division_by_zero():
    problem = BlockProblem(weights=np.zeros(4), rows=np.zeros((2, 4)), n_prune=2)
    form = standard_form(MODELS["selection_mccormick"].build(problem))
    assert np.all(np.isfinite(form.linear))
    assert form.objective_scale == 1.0
