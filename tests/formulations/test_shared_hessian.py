"""Bounds of many rows over one Hessian matrix: those that each has alone, whatever the others are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from formulations import BlockProblem, NofM, verify
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, NotPositiveDefiniteError
from formulations.relaxations import lower_bound, lower_bounds
from formulations.solution import Limit, Limits

N = 12


def rows(count: int = 8, seed: int = 0, damping: float = 0.05) -> list[BlockProblem]:
    """Rows of very different norms and counts, with a gradient here and there."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(40, 5)) @ rng.normal(size=(5, N)) + 0.7 * rng.normal(size=(40, N))
    hessian = inputs.T @ inputs / 40
    found = []
    for number in range(count):
        scale = 10.0 ** rng.uniform(-3.0, 3.0)
        gradient = 0.1 * scale * rng.normal(size=N) if number % 3 == 0 else None
        found.append(
            BlockProblem(
                weights=scale * rng.normal(size=N),
                hessian=hessian,
                damping=damping,
                n_prune=int(rng.integers(2, N - 1)),
                gradient=gradient,
            )
        )
    return found


def test_each_row_has_the_bound_of_its_own_diagonal_split_or_a_better_one() -> None:
    problems = rows()
    for problem, found in zip(problems, lower_bounds(problems), strict=True):
        best = enumerate_optimum(problem, "joint").objective
        alone = lower_bound(problem, "joint", relaxation="perspective").bound
        assert best is not None
        assert alone is not None
        assert found.bound is not None
        assert alone - 0.03 * abs(best) <= found.bound <= best
        assert verify(problem, found).ok


def test_inputs_of_very_different_sizes_cost_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in other units: what is proved does not depend on them."""
    monkeypatch.setattr("formulations.relaxations.one_hessian.WIDEST_SPREAD", 1e3)
    rng = np.random.default_rng(3)
    sizes = np.exp(2.0 * rng.normal(size=N))
    assert np.ptp(np.log10(sizes**2)) > 4.0
    for plain in rows(4, seed=4, damping=0.0):
        assert plain.hessian is not None
        problem = BlockProblem(
            weights=plain.weights / sizes,
            hessian=plain.hessian * np.outer(sizes, sizes),
            gradient=plain.gradient_or_zero * sizes,
            n_prune=plain.n_prune,
        )
        best = enumerate_optimum(plain, "joint").objective
        (found,), (scaled,) = lower_bounds([plain]), lower_bounds([problem])
        assert best is not None
        assert found.bound is not None
        assert scaled.bound is not None
        assert found.bound - 0.01 * abs(best) <= scaled.bound <= best + 1e-6 * abs(best)
        assert verify(problem, scaled).ok


@pytest.mark.parametrize("clusters", [N, 0])
def test_one_large_block_is_bounded_like_a_row(clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks above `SPLIT_LARGEST` have the bound of their own split too, in clusters and without."""
    problems = rows(5, seed=2)
    small = [lower_bound(problem, "joint", relaxation="perspective").bound for problem in problems]
    weak = [lower_bound(problem, "joint", diagonal_split=False).bound for problem in problems]
    monkeypatch.setattr("formulations.relaxations.bounds.SPLIT_LARGEST", N - 1)
    monkeypatch.setattr("formulations.relaxations.cluster_split.CLUSTERED_LARGEST", clusters)
    gained = 0
    for problem, dense, damped in zip(problems, small, weak, strict=True):
        best = enumerate_optimum(problem, "joint").objective
        found = lower_bound(problem, "joint")
        assert best is not None
        assert found.bound is not None
        assert dense is not None
        assert damped is not None
        assert dense - 0.03 * abs(best) <= found.bound <= best
        assert verify(problem, found).ok
        plain = lower_bound(problem, "joint", diagonal_split=False).bound
        assert plain == pytest.approx(damped, rel=1e-6)
        gained += found.bound > damped + 0.1 * abs(best)
    assert gained > 2
    over = lower_bound(problems[0], "joint", limits=Limits(time_limit=0.0))
    assert over.limit is Limit.TIME
    assert verify(problems[0], over).ok


def test_an_incumbent_is_never_lost_and_helps() -> None:
    problems = rows(4, seed=1)
    best = [enumerate_optimum(problem, "joint") for problem in problems]
    for known, found in zip(best, lower_bounds(problems, incumbents=best), strict=True):
        assert found.objective == known.objective
        assert found.bound is not None


def test_rows_of_other_kinds_are_bounded_too() -> None:
    problems = rows(3)
    plain = problems[1]
    odd = [
        replace(plain, n_prune=0),
        replace(plain, n_prune=N),
        replace(plain, n_prune=None, support=NofM(2, 4)),
        replace(plain, weights=np.zeros(N)),
    ]
    for problem, found in zip([*problems, *odd], lower_bounds([*problems, *odd]), strict=True):
        best = enumerate_optimum(problem, "joint").objective
        assert best is not None
        assert found.bound is not None
        assert best - 0.5 * abs(best) - 1e-12 <= found.bound <= best + 1e-12


def test_what_is_proved_when_the_time_is_over_is_valid() -> None:
    problems = rows(3)
    for problem, found in zip(problems, lower_bounds(problems, limits=Limits(time_limit=0.0)), strict=True):
        assert found.limit is Limit.TIME
        assert verify(problem, found).ok
        assert found.bound is None or found.bound <= enumerate_optimum(problem, "joint").objective


def test_blocks_that_share_no_hessian_are_refused() -> None:
    problems = rows(3)
    other = replace(problems[0], hessian=2.0 * problems[0].hessian)
    with pytest.raises(ArgumentError, match="block 3 has another Hessian"):
        lower_bounds([*problems, other])
    with pytest.raises(ArgumentError, match="block 1 has rows"):
        lower_bounds([problems[0], replace(problems[0], hessian=None, rows=np.eye(N))])
    with pytest.raises(ArgumentError, match="1 for 3"):
        lower_bounds(problems, incumbents=[lower_bound(problems[0], "joint")])
    singular = np.zeros((N, N))
    with pytest.raises(NotPositiveDefiniteError, match="damping"):
        lower_bounds([replace(problem, hessian=singular, damping=0.0) for problem in problems])
    assert lower_bounds([]) == []
