import numpy as np
import pytest

from formulations import BlockProblem, Limit, Limits, objective, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.dense_forms import joint_form, selection_form
from formulations.errors import ArgumentError, ShapeError
from formulations.incumbents import greedy, joint_tableau, swap_search
from formulations.swap_kernels import sweep
from tests.formulations.blocks import KINDS, block, slack

PROGRAMS = ("selection", "joint")


def neighbours(keep):
    for i in np.flatnonzero(keep):
        for j in np.flatnonzero(~keep):
            other = keep.copy()
            other[i], other[j] = False, True
            yield other


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_swap_improves_the_result(kind, program):
    for n_prune in (0, 1, 5, 11, 12):
        problem = block(kind, 12, n_prune, seed=n_prune)
        solution = swap_search(problem, program)
        assert verify(problem, solution).ok
        assert solution.bound is None
        best = min((objective(problem, k, program) for k in neighbours(solution.keep)), default=np.inf)
        assert solution.objective <= best + slack(problem)


@pytest.mark.parametrize("program", PROGRAMS)
def test_swaps_never_worsen_the_warm_start(program):
    problem = block("gradient", 30, 20, seed=5)
    start = greedy(problem, program)
    improved = swap_search(problem, program, incumbent=start)
    assert improved.objective <= start.objective
    again = swap_search(problem, program, incumbent=improved, restarts=5, limits=Limits(seed=2))
    assert again.objective <= improved.objective


def test_greedy_removes_the_cheapest_single_weight():
    problem = block("random", 15, 1, seed=0)
    for program in PROGRAMS:
        values = [objective(problem, ~np.eye(15, dtype=bool)[i], program) for i in range(15)]
        assert greedy(problem, program).objective == pytest.approx(min(values), rel=1e-9)


def test_forms_reproduce_the_objective():
    problem = block("gradient", 14, 6, seed=8)
    keep = np.random.default_rng(0).permutation(np.arange(14) >= 6)
    joint = joint_form(problem)
    kept = joint.linear[keep]
    value = joint.constant - 0.5 * kept @ np.linalg.solve(joint.matrix[np.ix_(keep, keep)], kept)
    assert joint.scale * value == pytest.approx(objective(problem, keep, "joint"), rel=1e-10)
    selection = selection_form(problem)
    y = (~keep).astype(float)
    value = 0.5 * y @ selection.matrix @ y + selection.linear @ y
    assert selection.scale * value == pytest.approx(objective(problem, keep, "selection"), rel=1e-12)


def test_sweeping_in_and_out_keeps_the_tableau():
    form = joint_form(block("gradient", 10, 4, seed=2))
    keep = np.arange(10) % 3 == 0
    table, state = joint_tableau(form.matrix, form.linear, keep)
    swept, swept_state = table.copy(), state.copy()
    sweep(swept, swept_state, 4, 1.0)
    keep[4] = True
    expected, expected_state = joint_tableau(form.matrix, form.linear, keep)
    np.testing.assert_allclose(swept, expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(swept_state, expected_state, rtol=1e-8, atol=1e-10)
    sweep(swept, swept_state, 4, -1.0)
    np.testing.assert_allclose(swept, table, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(swept_state, state, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", [greedy, swap_search])
def test_limits_and_bad_warm_starts(method):
    problem = block("random", 12, 5, seed=1)
    stopped = method(problem, "joint", limits=Limits(time_limit=0.0))
    assert stopped.limit is Limit.TIME
    assert int((~stopped.keep).sum()) == 5
    other = greedy(block("random", 12, 6, seed=1), "joint")
    with pytest.raises(ArgumentError, match="incumbent"):
        method(problem, "joint", incumbent=other)
    with pytest.raises(ShapeError):
        method(problem, "joint", incumbent=greedy(block("random", 9, 5, seed=1), "joint"))


def test_swap_limit_is_reported():
    rng = np.random.default_rng(0)
    problem = BlockProblem(
        weights=rng.normal(size=60), rows=rng.normal(size=(40, 60)), damping=0.01, n_prune=40
    )
    worst = greedy(problem, "selection")
    stopped = swap_search(problem, "joint", incumbent=worst, limits=Limits(iteration_limit=1))
    assert stopped.limit is Limit.ITERATION
    assert stopped.stats.iterations == 1
    assert stopped.objective < objective(problem, worst.keep, "joint")


def test_same_seed_same_set():
    problem = block("random", 40, 25, seed=4)
    first = swap_search(problem, "joint", restarts=4, limits=Limits(seed=7))
    second = swap_search(problem, "joint", restarts=4, limits=Limits(seed=7))
    assert np.array_equal(first.keep, second.keep)


@pytest.mark.parametrize("program", ["selection", "joint"])
def test_swaps_that_go_round_in_a_circle_end(program):
    """Two columns cancel, and what a swap gains is rounding: the search went on for ever."""
    problem = BlockProblem(
        weights=np.array([1e10, 1e10]),
        rows=np.array([[-2436.55139020558, 2436.55139020558], [-1481.9961116693294, 1481.9961116693294]]),
        damping=2.5601687358458025e-05,
        n_prune=1,
    )
    assert swap_search(problem, program).stats.iterations < 100
    assert branch_and_bound(problem, program).keep.sum() == 1
