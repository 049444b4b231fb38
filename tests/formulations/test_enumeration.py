import math

import numpy as np
import pytest

from formulations import BlockProblem, Limit, Limits, Termination, verify
from formulations.enumeration import enumerate_optimum
from formulations.errors import NotPositiveDefiniteError, UnsupportedProblemError
from formulations.incumbents import swap_search
from tests.formulations.blocks import KINDS, block, brute_force, closed, slack

PROGRAMS = ("selection", "joint")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_plain_brute_force(kind, program):
    for n_prune in range(9):
        problem = block(kind, 8, n_prune, seed=n_prune)
        solution = enumerate_optimum(problem, program)
        expected = brute_force(problem, program)
        assert solution.objective == pytest.approx(expected, abs=slack(problem))
        assert closed(problem, solution)
        assert solution.bound <= solution.objective
        assert not verify(problem, solution).wrong


@pytest.mark.parametrize("program", PROGRAMS)
def test_sizes_zero_one_and_empty(program):
    for n in (0, 1):
        for n_prune in range(n + 1):
            problem = BlockProblem(weights=np.ones(n), rows=np.ones((2, n)), damping=0.5, n_prune=n_prune)
            solution = enumerate_optimum(problem, program)
            assert solution.proved
            assert int((~solution.keep).sum()) == n_prune


def test_an_even_share_of_twenty_two_weights_takes_seconds():
    problem = block("random", 22, 11, seed=3)
    for program in PROGRAMS:
        solution = enumerate_optimum(problem, program)
        assert solution.stats.nodes == math.comb(22, 11)
        assert solution.stats.seconds < 60.0
        assert solution.objective <= swap_search(problem, program).objective + slack(problem)


def test_refuses_what_it_cannot_finish():
    problem = block("random", 60, 30, seed=0)
    with pytest.raises(UnsupportedProblemError, match="branch_and_bound"):
        enumerate_optimum(problem, "joint")


def test_joint_needs_a_definite_hessian():
    problem = BlockProblem(weights=np.ones(4), rows=np.ones((2, 4)), n_prune=2)
    with pytest.raises(NotPositiveDefiniteError):
        enumerate_optimum(problem, "joint")
    assert enumerate_optimum(problem, "selection").proved


@pytest.mark.parametrize("program", PROGRAMS)
def test_time_limit_zero_returns_the_warm_start_unproved(program):
    problem = block("random", 12, 6, seed=1)
    start = swap_search(problem, program)
    solution = enumerate_optimum(problem, program, limits=Limits(time_limit=0.0), incumbent=start)
    assert solution.termination is Termination.FEASIBLE
    assert solution.limit is Limit.TIME
    assert solution.bound is None
    assert solution.objective <= start.objective
