"""Splits in clusters of weights: valid, never weaker than a diagonal one, and proved by who checks them."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from formulations import BlockProblem, Count, NofM, verify
from formulations import instances as inst
from formulations.enumeration import enumerate_optimum
from formulations.errors import UnsupportedProblemError
from formulations.relaxations import Fixing, lower_bound, lower_bounds
from formulations.relaxations.cluster_split import relax_in_clusters, takes_clusters
from formulations.relaxations.clusters import (
    Clusters,
    choose_clusters,
    envelope_slopes,
    held_by_count,
    matched_pairs,
    support_rows,
)
from formulations.solution import Limit, Limits, never
from tests.formulations.blocks import KINDS, block, slack

IN_CLUSTERS = "cluster_perspective"


def correlated(n: int, share: float, seed: int) -> BlockProblem:
    """A block of full rank whose second moments are far from diagonal."""
    rng = np.random.default_rng([seed, n])
    inputs = rng.normal(size=(4 * n, n // 3)) @ rng.normal(size=(n // 3, n)) + 0.8 * rng.normal(
        size=(4 * n, n)
    )
    hessian = inputs.T @ inputs / (4 * n)
    return BlockProblem(weights=rng.normal(size=n), hessian=hessian, damping=0.01, n_prune=round(share * n))


def found_on(problem: BlockProblem):
    best = enumerate_optimum(problem, "joint")
    plain = lower_bound(problem, "joint", incumbent=best, relaxation="perspective").certificate
    found = relax_in_clusters(problem, plain, best.objective, never)
    assert found is not None
    return best, plain, found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_between_the_diagonal_split_and_the_optimum(kind):
    for seed in range(6):
        n = 6 + seed
        problem = block(kind, n, 1 + (3 * seed) % (n - 1), seed)
        if not takes_clusters(problem):
            with pytest.raises(UnsupportedProblemError, match="as many rows"):
                lower_bound(problem, "joint", relaxation=IN_CLUSTERS)
            continue
        best = enumerate_optimum(problem, "joint")
        plain = lower_bound(problem, "joint", incumbent=best, relaxation="perspective")
        found = lower_bound(problem, "joint", incumbent=best, relaxation=IN_CLUSTERS)
        assert plain.bound <= found.bound <= best.objective
        assert verify(problem, found).ok


@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_clusters_close_much_of_what_a_diagonal_split_leaves(share):
    """Also by the default, on a number of weights that fills no cluster, and for rows together."""
    problem = correlated(13, share, seed=1)
    best = enumerate_optimum(problem, "joint")
    plain = lower_bound(problem, "joint", incumbent=best, relaxation="perspective")
    found = lower_bound(problem, "joint", incumbent=best)
    (together,) = lower_bounds([problem], incumbents=[best])
    assert found.certificate.kind == together.certificate.kind == IN_CLUSTERS
    for bound in (found.bound, together.bound):
        assert plain.bound < bound <= best.objective
        assert best.objective - bound < 0.7 * (best.objective - plain.bound)


def test_every_point_and_partition_proves_a_bound():
    problem = correlated(12, 0.5, seed=2)
    best, plain, found = found_on(problem)
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = dataclasses.replace(found, point=found.point + rng.normal(size=12))
        assert moved.lower_bound(problem) <= best.objective
    shuffled = rng.permutation(12).reshape(3, 4)
    diagonal = plain.split[shuffled][:, :, None] * np.eye(4)
    same = dataclasses.replace(found, point=plain.point, order=shuffled, blocks=diagonal)
    assert same.lower_bound(problem) == pytest.approx(plain.lower_bound(problem), rel=1e-9)


def test_what_is_no_split_proves_nothing():
    problem = correlated(12, 0.5, seed=3)
    _, plain, found = found_on(problem)
    blocks, order = found.blocks, found.order
    skewed = blocks.copy()
    skewed[0, 0, 1] *= 1.5
    twice = order.copy()
    twice[order == 3] = 5
    nothing = np.zeros(12, dtype=bool)
    changes = [
        {"blocks": 1.3 * blocks},
        {"blocks": skewed},
        {"blocks": blocks - 2.0 * np.linalg.eigvalsh(blocks).max() * np.eye(blocks.shape[1])},
        {"blocks": blocks[:1]},
        {"order": twice},
        {"order": np.where(order == 3, 12, order)},
        {"order": np.where(order == 3, -1, order)},
        {"order": order[:1]},
        {"point": found.point[:4]},
        {"basis": dataclasses.replace(plain, fixing=Fixing(keep=nothing, prune=~nothing, cutoff=1e300))},
    ]
    for change in changes:
        assert dataclasses.replace(found, **change).lower_bound(problem) == -np.inf
    pattern = dataclasses.replace(problem, n_prune=None, support=NofM(2, 4))
    assert found.lower_bound(pattern) == -np.inf
    with pytest.raises(UnsupportedProblemError, match="2:4"):
        lower_bound(pattern, "joint", relaxation=IN_CLUSTERS)
    with pytest.raises(UnsupportedProblemError, match="selection"):
        lower_bound(problem, "selection", relaxation=IN_CLUSTERS)
    fewer = dataclasses.replace(problem, n_prune=None, support=Count(3))
    assert found.lower_bound(fewer) <= enumerate_optimum(fewer, "joint").objective


def test_fixings_hold_for_the_optimum_and_forged_ones_are_found_out():
    fixed = 0
    for seed in (0, 1, 2, 3, 5):
        problem = dataclasses.replace(correlated(12, 0.5, seed), damping=0.3)
        best, _, found = found_on(problem)
        fixing = found.fixed_below(problem, best.objective * (1.0 + 1e-9))
        assert best.keep[fixing.keep].all()
        assert not best.keep[fixing.prune].any()
        assert dataclasses.replace(found, fixing=fixing).proves_fixing(problem)
        forged = Fixing(keep=~best.keep, prune=best.keep, cutoff=fixing.cutoff)
        assert not dataclasses.replace(found, fixing=forged).proves_fixing(problem)
        fixed += fixing.count
        rests = dataclasses.replace(found, basis=dataclasses.replace(found, fixing=fixing))
        assert (
            found.lower_bound(problem) - 1e-12 <= rests.lower_bound(problem) <= best.objective * (1.0 + 1e-9)
        )
        again = rests.fixed_below(problem, fixing.cutoff)
        assert (again.keep >= fixing.keep).all()
        assert (again.prune >= fixing.prune).all()
        assert best.keep[again.keep].all()
        assert not best.keep[again.prune].any()
        assert rests.fixed_below(problem, 2.0 * fixing.cutoff) is None
        whole = lower_bound(problem, "joint", incumbent=best, fix=True)
        assert whole.bound <= best.objective
        assert verify(problem, whole).ok
    assert fixed > 0


def test_a_split_in_clusters_goes_through_a_file(tmp_path):
    problem = correlated(11, 0.6, seed=4)
    found = lower_bound(problem, "joint", relaxation=IN_CLUSTERS, fix=True)
    inst.write_solution(tmp_path / "bound.npz", problem, found)
    back = inst.read_solution(tmp_path / "bound.npz", problem)
    assert back.certificate.kind == IN_CLUSTERS
    assert back.certificate.lower_bound(problem) == found.bound
    np.testing.assert_array_equal(back.certificate.order, found.certificate.order)
    assert verify(problem, back).ok


def test_units_do_not_matter():
    problem = correlated(14, 0.5, seed=5)
    scaled = dataclasses.replace(
        problem, weights=8.0 * problem.weights, hessian=problem.hessian / 4.0, damping=problem.damping / 4.0
    )
    one, other = (lower_bound(block, "joint", relaxation=IN_CLUSTERS).bound for block in (problem, scaled))
    assert other == pytest.approx(16.0 * one, rel=1e-9)


def test_rows_of_a_layer_have_bounds_below_their_optima():
    first = correlated(12, 0.5, seed=6)
    rng = np.random.default_rng(0)
    problems = [
        dataclasses.replace(first, weights=rng.normal(size=12), n_prune=count) for count in (3, 5, 7, 9, 10)
    ]
    best = [enumerate_optimum(problem, "joint") for problem in problems]
    for problem, known, found in zip(problems, best, lower_bounds(problems, incumbents=best), strict=True):
        assert found.bound <= known.objective
        assert verify(problem, found).ok


def test_no_time_leaves_the_diagonal_split():
    problem = correlated(16, 0.5, seed=7)
    found = lower_bound(problem, "joint", limits=Limits(time_limit=0.0))
    assert found.limit is Limit.TIME
    assert found.certificate.kind == "perspective"
    assert verify(problem, found).ok
    plain = lower_bound(problem, "joint", relaxation="perspective")
    assert relax_in_clusters(problem, plain.certificate, plain.objective, lambda *_: True) is None


def test_a_singular_rest_and_a_diagonal_hessian_are_no_trouble():
    """Two weights with the same inputs, damped next to nothing; and nothing to choose clusters by."""
    twins = correlated(8, 0.5, seed=8)
    hessian = twins.hessian.copy()
    hessian[1], hessian[:, 1] = hessian[0], hessian[:, 0]
    hessian[1, 1] = hessian[0, 0]
    flat = BlockProblem(weights=np.arange(1.0, 10.0), hessian=np.eye(9), damping=0.1, n_prune=4)
    for problem in (dataclasses.replace(twins, hessian=hessian, damping=1e-9), flat):
        best = enumerate_optimum(problem, "joint").objective
        found = lower_bound(problem, "joint", relaxation=IN_CLUSTERS)
        assert found.bound <= best + slack(problem)
        assert verify(problem, found).ok


def test_pairs_are_those_of_taking_the_best_again_and_again():
    rng = np.random.default_rng(0)
    for count in (2, 8, 14):
        gains = rng.random((count, count))
        gains = gains + gains.T
        left, right = matched_pairs(gains)
        assert sorted([*left, *right]) == list(range(count))
        single, taken = set(range(count)), set()
        while single:
            pair = max(itertools.combinations(sorted(single), 2), key=lambda pair: gains[pair])
            taken.add(pair)
            single -= set(pair)
        assert {tuple(sorted(pair)) for pair in zip(left, right, strict=True)} == taken
    assert sorted(np.concatenate(matched_pairs(np.zeros((6, 6))))) == list(range(6))


def test_clusters_hold_what_belongs_together():
    """Weights in groups of four that have nothing to do with each other are such clusters."""
    rng = np.random.default_rng(1)
    matrix = np.eye(20)
    groups = rng.permutation(20).reshape(5, 4)
    for group in groups:
        matrix[np.ix_(group, group)] = 0.4 + 0.6 * np.eye(4)
    clusters = choose_clusters(matrix, np.full(20, 0.5), 4, multiple=2)
    assert clusters.is_partition
    assert clusters.order.shape == (6, 4)
    whole = {frozenset(row) for row in clusters.order.tolist() if -1 not in row}
    assert whole == {frozenset(group) for group in groups.tolist()}
    values = rng.normal(size=20)
    np.testing.assert_array_equal(clusters.scattered(clusters.gathered(values)), values)
    assert not Clusters(clusters.order[:, :3], 20).is_partition


def test_the_best_price_holds_no_less_than_any_share_of_counts():
    rng = np.random.default_rng(2)
    for n_keep in range(1, 12):
        best = np.sort(rng.random((4, 4)), axis=1)
        best[:, 0] = 0.0
        held, price = held_by_count(best, n_keep)
        ways = itertools.product(range(4), repeat=4)
        most = max(best[range(4), list(way)].sum() for way in ways if sum(way) <= n_keep)
        assert held >= most - 1e-12
        for other in (0.0, 0.5 * price, price, 2.0 * price + 0.1):
            paid = (best - other * np.arange(4)).max(axis=1).sum() + other * n_keep
            assert held <= paid + 1e-12
            if other == price:
                assert held == pytest.approx(paid)
        slopes = envelope_slopes(best)
        assert bool((np.diff(slopes, axis=1) <= 1e-12).all())
    assert support_rows(3).sum(axis=1).tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
