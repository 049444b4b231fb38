import itertools
import math
import pickle

import numpy as np
import pytest

from formulations import BlockProblem, Limit, Limits, Termination, objective, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.branch_and_bound import tree as tree_module
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, NotPositiveDefiniteError
from formulations.incumbents import greedy, swap_search
from formulations.relaxations import lower_bound
from tests.formulations.blocks import KINDS, block, closed, slack

PROGRAMS = ("selection", "joint")
SWITCHES = ("fixing", "reduction", "diagonal_split", "swaps")


def assert_optimal(problem, solution, optimum):
    assert closed(problem, solution)
    assert solution.objective == pytest.approx(optimum, rel=2e-6, abs=slack(problem))
    assert solution.bound <= optimum + slack(problem)
    assert not verify(problem, solution).wrong


def agreement(kinds, sizes, seeds):
    for kind, n, seed in itertools.product(kinds, sizes, seeds):
        for n_prune in range(n + 1):
            problem = block(kind, n, n_prune, seed)
            for program in PROGRAMS:
                optimum = enumerate_optimum(problem, program).objective
                assert_optimal(problem, branch_and_bound(problem, program), optimum)


def test_agrees_with_enumeration():
    agreement(KINDS, (7, 10), (0,))


@pytest.mark.slow
def test_agrees_with_enumeration_on_many_blocks():
    agreement(KINDS, (1, 2, 3, 9, 13, 16), range(6))
    agreement(KINDS, (18,), range(2))


@pytest.mark.parametrize("program", PROGRAMS)
def test_switches_change_the_effort_not_the_answer(program):
    problem = block("gradient", 14, 7, seed=3)
    optimum = enumerate_optimum(problem, program).objective
    for switch in SWITCHES:
        assert_optimal(problem, branch_and_bound(problem, program, **{switch: False}), optimum)
    plain = branch_and_bound(problem, program, search="depth", **dict.fromkeys(SWITCHES, False))
    assert_optimal(problem, plain, optimum)
    assert plain.stats.nodes > branch_and_bound(problem, program).stats.nodes


@pytest.mark.parametrize("program", PROGRAMS)
def test_larger_blocks_agree_across_searches(program):
    problem = block("random", 30, 18, seed=5)
    best = branch_and_bound(problem, program)
    depth = branch_and_bound(problem, program, search="depth", limits=Limits(seed=9))
    assert best.proved
    assert depth.proved
    assert best.objective == pytest.approx(depth.objective, rel=2e-6)
    assert best.objective <= swap_search(problem, program).objective * (1 + 2e-6)


@pytest.mark.parametrize("program", PROGRAMS)
def test_node_limit_leaves_a_valid_bound(program):
    problem = block("random", 30, 15, seed=2)
    optimum = branch_and_bound(problem, program).objective
    for nodes in (0, 1, 5):
        stopped = branch_and_bound(problem, program, limits=Limits(node_limit=nodes), swaps=False)
        assert stopped.stats.nodes <= nodes
        assert stopped.bound <= optimum + slack(problem)
        assert stopped.objective >= optimum - slack(problem)
        if not stopped.proved:
            assert stopped.limit is Limit.NODE


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_loose_gap_never_overstates_the_bound(program):
    for seed in range(12):
        problem = block("random", 12, 6, seed=seed)
        optimum = enumerate_optimum(problem, program).objective
        solution = branch_and_bound(problem, program, limits=Limits(rel_gap=0.3), swaps=False)
        assert solution.proved
        assert solution.bound <= optimum + slack(problem)
        assert solution.objective - optimum <= 0.3 * abs(solution.objective)
        assert solution.gap <= solution.rel_gap == 0.3


@pytest.mark.parametrize("program", PROGRAMS)
def test_time_limit_zero_returns_the_warm_start(program):
    problem = block("random", 20, 9, seed=2)
    start = greedy(problem, program)
    stopped = branch_and_bound(problem, program, limits=Limits(time_limit=0.0), incumbent=start)
    assert stopped.limit is Limit.TIME
    assert stopped.bound is None
    assert np.array_equal(stopped.keep, start.keep)


@pytest.mark.parametrize("program", PROGRAMS)
def test_short_time_limit_is_respected_and_honest(program):
    problem = block("wide", 150, 90, seed=1)
    branch_and_bound(block("wide", 20, 10, seed=1), program)
    stopped = branch_and_bound(problem, program, limits=Limits(time_limit=0.3))
    assert stopped.stats.seconds < 5.0
    assert stopped.bound is None or stopped.bound <= stopped.objective
    assert stopped.proved or stopped.limit is Limit.TIME


@pytest.mark.parametrize("program", PROGRAMS)
def test_interrupt_returns_incumbent_and_bound(program, monkeypatch):
    problem = block("random", 30, 15, seed=2)
    optimum = branch_and_bound(problem, program).objective
    evaluated = []
    original = tree_module.Search._process

    def interrupted(self, node):
        if len(evaluated) == 3:
            raise KeyboardInterrupt
        evaluated.append(node.bound)
        original(self, node)

    monkeypatch.setattr(tree_module.Search, "_process", interrupted)
    stopped = branch_and_bound(problem, program, diagonal_split=False, swaps=False)
    assert len(evaluated) == 3
    assert stopped.limit is Limit.INTERRUPTED
    assert stopped.termination is Termination.FEASIBLE
    assert stopped.bound <= optimum <= stopped.objective + slack(problem)


def test_interrupt_before_the_form_exists(monkeypatch):
    def interrupted(problem, program):
        raise KeyboardInterrupt

    monkeypatch.setattr("formulations.branch_and_bound.driver.dense_form", interrupted)
    problem = block("random", 12, 6, seed=2)
    stopped = branch_and_bound(problem, "joint")
    assert stopped.limit is Limit.INTERRUPTED
    assert stopped.bound is None
    assert verify(problem, stopped).feasible


@pytest.mark.parametrize("program", PROGRAMS)
def test_trace_is_monotone_and_ends_at_the_result(program):
    problem = block("random", 24, 12, seed=7)
    solution = branch_and_bound(problem, program, swaps=False)
    seconds = [point.seconds for point in solution.trace]
    objectives = [point.objective for point in solution.trace]
    bounds = [-math.inf if point.bound is None else point.bound for point in solution.trace]
    assert seconds == sorted(seconds)
    assert objectives == sorted(objectives, reverse=True)
    assert bounds == sorted(bounds)
    assert objectives[-1] == solution.objective
    assert solution.trace[-1].nodes == solution.stats.nodes


@pytest.mark.parametrize("program", PROGRAMS)
def test_same_seed_same_search(program):
    problem = block("real", 30, 15, seed=7)
    first, second = (branch_and_bound(problem, program, limits=Limits(seed=4)) for _ in range(2))
    assert np.array_equal(first.keep, second.keep)
    assert first.stats.nodes == second.stats.nodes
    assert first.bound == second.bound


@pytest.mark.parametrize("program", PROGRAMS)
def test_certificate_survives_pickling_and_proves_the_root(program):
    problem = block("random", 30, 20, seed=1)
    solution = pickle.loads(pickle.dumps(branch_and_bound(problem, program)))  # noqa: S301
    root = solution.certificate.lower_bound(problem)
    assert root <= solution.objective
    assert math.isfinite(root)
    check = verify(problem, solution)
    assert not check.wrong
    assert check.bound == root


@pytest.mark.parametrize("program", PROGRAMS)
def test_scale_of_the_data_does_not_matter(program):
    problem = block("gradient", 16, 8, seed=6)
    scaled = BlockProblem(
        weights=problem.weights * 1e-3,
        rows=problem.rows * 1e-4,
        damping=problem.damping * 1e-8,
        gradient=problem.gradient * 1e-11,
        n_prune=8,
    )
    first, second = branch_and_bound(problem, program), branch_and_bound(scaled, program)
    assert second.proved
    assert second.objective == pytest.approx(first.objective * 1e-14, rel=1e-5)
    assert objective(problem, second.keep, program) == pytest.approx(first.objective, rel=1e-5)


def test_a_block_singular_to_rounding_gets_the_bound_of_its_relaxation_alone():
    rng = np.random.default_rng(0)
    problem = BlockProblem(weights=rng.normal(size=8), rows=np.ones((3, 8)), damping=3e-13, n_prune=4)
    solution = branch_and_bound(problem, "joint")
    assert lower_bound(problem, "joint").bound <= solution.bound <= 0.0
    assert solution.certificate.lower_bound(problem) <= 0.0
    assert solution.stats.nodes == 0
    assert solution.termination is Termination.FEASIBLE
    assert "singular" in solution.stats.message


def test_refuses_what_it_cannot_solve():
    problem = BlockProblem(weights=np.ones(6), rows=np.ones((2, 6)), n_prune=3)
    with pytest.raises(NotPositiveDefiniteError):
        branch_and_bound(problem, "joint")
    assert branch_and_bound(problem, "selection").proved
    with pytest.raises(ArgumentError, match="search"):
        branch_and_bound(block("random", 5, 2, 0), "joint", search="breadth")
    with pytest.raises(ArgumentError, match="program"):
        branch_and_bound(block("random", 5, 2, 0), "both")
