"""Cuts stay below the program everywhere; the search proves what brute force finds."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from formulations import Limit, Limits, Termination, objective, verify
from formulations.cut_planes import JointCuts, SelectionCuts
from formulations.errors import ArgumentError, NotPositiveDefiniteError
from formulations.incumbents import greedy
from formulations.models.scaling import diagonal_split, scale_block
from formulations.outer_approximation import outer_approximation
from formulations.problem import BlockProblem
from formulations.relaxations.bounds import lower_bound
from tests.formulations.blocks import KINDS, block, brute_force, slack


def source_of(problem, program, optimised=False):
    """Cuts of a block in the plain split or in that of the root certificate, and the loss unit."""
    scaled = scale_block(problem)
    split = diagonal_split(scaled)
    certificate = lower_bound(problem, program).certificate if optimised else None
    if certificate is not None and program == "joint":
        split = certificate.split * scaled.weight_scale**2 / scaled.objective_scale
    if certificate is not None and program == "selection":
        return SelectionCuts(scaled, certificate.shift / scaled.objective_scale), scaled.objective_scale
    if program == "joint":
        return JointCuts(scaled, split), scaled.objective_scale
    return SelectionCuts(scaled, split * scaled.weights**2), scaled.objective_scale


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
    timed = outer_approximation(problem, program, limits=Limits(time_limit=1.5), incumbent=warm)
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
