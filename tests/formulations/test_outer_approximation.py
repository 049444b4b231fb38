"""Cuts stay below the program everywhere; the search proves what brute force finds."""

from __future__ import annotations

import importlib
import itertools
import time
from fractions import Fraction

import numpy as np
import pytest

from formulations import Limit, Limits, Termination, objective, verify
from formulations.cut_planes import cut_sources
from formulations.errors import ArgumentError, NotPositiveDefiniteError
from formulations.incumbents import greedy
from formulations.milp import MilpResult, run_milp
from formulations.models.scaling import scale_block
from formulations.outer_approximation import outer_approximation
from formulations.problem import BlockProblem
from formulations.relaxations.bounds import lower_bound
from tests.formulations.blocks import KINDS, block, brute_force, slack
from tests.stress.exact import ExactBlock


def source_of(problem, program, optimised=False):
    """Cuts of a block in the plain split or in that of the root certificate, and the loss unit."""
    scaled = scale_block(problem)
    root = lower_bound(problem, program).certificate if optimised else None
    return cut_sources(problem, scaled, program, root)[-1], scaled.objective_scale


@pytest.mark.parametrize("program", ["selection", "joint"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimised", [False, True])
def test_cuts_are_valid_at_every_set_and_tight_at_their_own(kind, program, optimised):
    problem = block(kind, 7, 3, seed=2)
    source, scale = source_of(problem, program, optimised)
    sets = [np.isin(np.arange(7), chosen) for chosen in itertools.combinations(range(7), source.count)]
    values = [objective(problem, ones if source.one_means_kept else ~ones, program) / scale for ones in sets]
    bound = min(values) - 0.1 * abs(min(values))
    tolerance = slack(problem) / scale + 1e-9 * np.abs(values).max()
    generator = np.random.default_rng(0)
    fractional = generator.dirichlet(np.ones(7), size=3) * source.count
    for point in [*(s.astype(float) for s in sets), *np.clip(fractional, 0.0, 1.0)]:
        for proved in (-np.inf, bound):
            cut = source.cut(point, proved)
            below = [cut.constant + cut.slopes @ ones for ones in sets]
            assert np.all(np.array(below) <= np.array(values) + tolerance)
    for ones, value in zip(sets, values, strict=True):
        cut = source.cut(ones.astype(float), -np.inf)
        assert cut.constant + cut.slopes @ ones == pytest.approx(value, abs=10 * tolerance, rel=1e-6)


@pytest.mark.parametrize("program", ["selection", "joint"])
@pytest.mark.parametrize("kind", KINDS)
def test_proves_what_brute_force_finds(kind, program):
    for n, n_prune, seed in ((9, 1, 0), (8, 4, 1), (9, 6, 2), (7, 6, 3)):
        problem = block(kind, n, n_prune, seed)
        optimum = brute_force(problem, program)
        solution = outer_approximation(problem, program, limits=Limits(rel_gap=1e-5, time_limit=60))
        assert solution.termination is Termination.OPTIMAL
        assert solution.objective <= optimum + 1e-5 * abs(optimum) + slack(problem)
        assert solution.bound <= optimum + slack(problem)
        assert solution.gap <= solution.rel_gap + 1e-15
        assert not verify(problem, solution).wrong


@pytest.mark.parametrize("program", ["selection", "joint"])
@pytest.mark.parametrize("n_prune", [0, 6])
def test_single_set_is_proved(program, n_prune):
    solution = outer_approximation(block("gradient", 6, n_prune, seed=1), program)
    assert solution.proved
    assert solution.bound <= solution.objective
    assert solution.gap < 1e-9


@pytest.mark.parametrize("program", ["selection", "joint"])
def test_limits_end_with_an_honest_status(program):
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(40, 40)) / np.sqrt(40)
    problem = BlockProblem(weights=generator.normal(size=40), rows=rows, damping=0.02, n_prune=20)
    warm = greedy(problem, program)
    at_once = outer_approximation(problem, program, limits=Limits(time_limit=0.0), incumbent=warm)
    assert at_once.limit is Limit.TIME
    np.testing.assert_array_equal(at_once.keep, warm.keep)
    began = time.perf_counter()
    timed = outer_approximation(problem, program, limits=Limits(time_limit=0.5), incumbent=warm)
    assert time.perf_counter() - began < 10.0
    assert timed.limit is Limit.TIME
    for name, limit in (("iteration_limit", Limit.ITERATION), ("node_limit", Limit.NODE)):
        limited = outer_approximation(problem, program, limits=Limits(time_limit=30.0, **{name: 1}))
        assert limited.limit is limit
        assert limited.termination is Termination.FEASIBLE
    for solution in (at_once, timed, limited):
        assert solution.objective <= warm.objective or solution is limited
        assert not verify(problem, solution).wrong
    bounds = [point.bound for point in timed.trace]
    assert bounds == sorted(bounds)
    assert timed.bound <= timed.objective


def test_larger_blocks_of_both_programs_are_closed():
    for program in ("selection", "joint"):
        problem = block("real", 20, 14, seed=1)
        solution = outer_approximation(problem, program, limits=Limits(rel_gap=1e-2, time_limit=60))
        assert solution.proved
        assert solution.certificate is not None
        assert solution.certificate.lower_bound(problem) <= solution.objective + slack(problem)


def test_seed_repeats_the_run():
    problem = block("real", 12, 6, seed=3)
    one, other = (
        outer_approximation(problem, "joint", limits=Limits(seed=5, rel_gap=1e-4)) for _ in range(2)
    )
    assert one.stats.nodes == other.stats.nodes
    assert one.bound == other.bound


def test_bad_input_is_refused():
    problem = block("random", 6, 3, seed=1)
    with pytest.raises(ArgumentError, match="program"):
        outer_approximation(problem, "both")
    with pytest.raises(ArgumentError, match="incumbent"):
        outer_approximation(problem, "joint", incumbent=greedy(block("random", 6, 2, seed=1), "joint"))
    with pytest.raises(NotPositiveDefiniteError):
        outer_approximation(BlockProblem(weights=np.ones(4), rows=np.ones((1, 4)), n_prune=2), "joint")


def test_zero_weights_make_a_zero_optimum():
    problem = BlockProblem(
        weights=np.array([0.0, 0.0, 1.0, 2.0]), rows=np.diag([1.0, 2.0, 3.0, 4.0]), damping=0.1, n_prune=2
    )
    for program in ("selection", "joint"):
        solution = outer_approximation(problem, program)
        assert solution.proved
        assert abs(solution.objective) < 1e-12


def test_planes_are_lowered_by_what_cancels_in_them():
    """The terms of a plane are 1e14 times the optimum here: the bound was .1 % above it."""
    problem = BlockProblem(
        weights=[0.26907458805666856, 0.12251281226211107, 0.4784805609579916, -1.4220086548878539],
        rows=[[-0.7144842738631297, 1.3572861187103389, 0.548812626435183, 1.7402575077212068]],
        damping=1.0524379906041188e-12,
        n_prune=2,
    )
    exact = ExactBlock(problem)
    solution = outer_approximation(problem, "joint", limits=Limits(iteration_limit=20))
    assert solution.bound <= exact.optimum("joint")
    scaled = scale_block(problem)
    sets = list(itertools.combinations(range(4), 2))
    sources = cut_sources(problem, scaled, "joint", lower_bound(problem, "joint").certificate)
    assert len(sources) == 2
    for source, kept in itertools.product(sources, sets):
        cut = source.cut(np.isin(np.arange(4), kept).astype(float), -np.inf)
        for others in sets:
            value = Fraction(cut.constant) + sum(Fraction(cut.slopes[i]) for i in others)
            assert value * Fraction(scaled.objective_scale) <= exact.joint_value(others)


def test_a_master_that_cannot_be_solved_is_no_error():
    """The optimum is 1e-16 of the terms of the planes: HiGHS calls the linear master infeasible."""
    problem = BlockProblem(
        weights=[-455714.24926685885, 35108483226.165871, -21964.767, 137383040.1, 59.548264956],
        rows=[
            [66049.26459828096, -10921.701776471682, -80114.66935430616, -54341.53, 65227.42678],
            [33809.11093938071, -38542.5042165517, 27625.41245641726, -35614.633, -225738.14682],
        ],
        damping=435065391.5348831,
        n_prune=1,
    )
    for program in ("selection", "joint"):
        solution = outer_approximation(problem, program)
        assert solution.termination is not Termination.ERROR
        assert solution.proved or solution.limit is Limit.GAP
        assert not verify(problem, solution).wrong


def test_without_a_proved_split_the_set_and_the_trivial_bound_stand():
    rows = np.random.default_rng(3).normal(size=(3, 6))
    gram = rows.T @ rows
    problem = BlockProblem(weights=np.ones(6), hessian=0.5 * (gram + gram.T), damping=3e-13, n_prune=3)
    scaled = scale_block(problem)
    assert not cut_sources(problem, scaled, "joint", None)
    solution = outer_approximation(problem, "joint")
    assert solution.termination is Termination.FEASIBLE
    assert not verify(problem, solution).wrong


@pytest.mark.parametrize("program", ["selection", "joint"])
@pytest.mark.parametrize("integer", [False, True])
def test_an_interrupted_master_of_either_kind_is_the_last(program, integer, monkeypatch):
    solved = []

    def interrupted(milp, controls):
        solved.append(bool(milp.integer.any()))
        if solved[-1] is integer:
            return MilpResult(status="Interrupted by user", interrupted=True)
        return run_milp(milp, controls)

    monkeypatch.setattr(importlib.import_module("formulations.outer_approximation"), "run_milp", interrupted)
    problem = block("random", 11, 5, 2)
    solution = outer_approximation(problem, program)
    assert solved.index(integer) == len(solved) - 1
    assert solution.limit is Limit.INTERRUPTED
    assert solution.bound <= brute_force(problem, program) + slack(problem)


def test_an_interrupt_at_the_root_returns_the_known_set(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        importlib.import_module("formulations.outer_approximation"), "root_bounds", interrupted
    )
    problem = block("random", 12, 6, 2)
    solution = outer_approximation(problem, "joint")
    assert solution.limit is Limit.INTERRUPTED
    assert verify(problem, solution).feasible
