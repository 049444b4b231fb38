"""Exact methods on large blocks: no worse than the search that they could have had, with the same bound."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from cbs_opt.select import exact
from cbs_opt.select.joint_program.selectors import DENSE_JOINT
from cbs_opt.select.methods import find_method
from cbs_opt.solving import solve
from formulations import branch_and_bound as branching
from formulations import outer_approximation as outer
from formulations.problem import PROGRAMS, SPLIT_LARGEST, BlockProblem
from formulations.relaxations import lower_bound
from formulations.solution import BlockSolution, Limit, Limits

ENGINES = {
    "branch_and_bound": branching.branch_and_bound,
    "outer_approximation": outer.outer_approximation,
}
NO_TREE = Limits(node_limit=0, iteration_limit=0)


def gaussian(n: int, n_keep: int, seed: int, *, rows: int = 40, dense: bool = False) -> BlockProblem:
    generator = np.random.default_rng(seed)
    drawn = generator.normal(size=(rows, n)) / np.sqrt(rows)
    weights, gradient = generator.normal(size=n), 0.05 * generator.normal(size=n)
    data = {"hessian": drawn.T @ drawn} if dense else {"rows": drawn}
    return BlockProblem(weights=weights, n_prune=n - n_keep, gradient=gradient, damping=0.1, **data)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("method", ENGINES)
@pytest.mark.parametrize("n_keep", [12, 300])
def test_no_worse_than_the_search_from_either_start(method: str, program: str, n_keep: int) -> None:
    problem = gaussian(SPLIT_LARGEST + 20, n_keep, seed=n_keep)
    relaxed = lower_bound(problem, program)
    found = solve(problem, method, program=program, node_limit=0, iteration_limit=0)
    assert found.bound is not None
    assert relaxed.bound is not None
    # The same relaxation from another start, to rounding.
    assert found.bound >= relaxed.bound - 1e-9 * abs(relaxed.bound)
    for start in (None, relaxed):
        searched = solve(problem, "swap_search", program=program, incumbent=start)
        assert found.objective <= searched.objective  # type: ignore[operator]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("method", ENGINES)
def test_a_heuristic_has_both_starts_and_none_makes_the_solution_worse(method: str, program: str) -> None:
    problem = gaussian(SPLIT_LARGEST + 20, 40, seed=1)
    known = solve(problem, "swap_search", program=program)
    engine = partial(ENGINES[method], problem, program, limits=NO_TREE, incumbent=known)
    starts: list[BlockSolution | None] = []

    def heuristic(*_: object, limits: Limits, incumbent: BlockSolution | None) -> BlockSolution | None:
        assert limits.iteration_limit is None
        starts.append(incumbent)
        return None if len(starts) == 1 else incumbent

    alone, helped = engine(), engine(heuristic=heuristic)
    assert starts[0] is known
    assert len(starts) == 2
    assert starts[1] is not None
    assert starts[1].objective <= lower_bound(problem, program).objective  # type: ignore[operator]
    for solution in (alone, helped):
        assert solution.objective <= known.objective
    assert helped.bound == alone.bound


@pytest.mark.parametrize("method", ENGINES)
def test_ctrl_c_within_a_heuristic_ends_the_method_with_its_set(method: str) -> None:
    problem = gaussian(SPLIT_LARGEST + 20, 40, seed=2)
    best = solve(problem, "swap_search", program="joint")
    calls = []

    def interrupted(*_: object, **__: object) -> BlockSolution:
        calls.append(None)
        return replace(best, limit=Limit.INTERRUPTED)

    found = ENGINES[method](problem, "joint", heuristic=interrupted)
    assert len(calls) == 1
    assert found.limit is Limit.INTERRUPTED
    if method == "branch_and_bound":
        assert found.objective == best.objective
        assert found.bound == lower_bound(problem, "joint").bound


@pytest.mark.parametrize(
    ("dense", "rows", "seconds", "searched"),
    [(True, 20, 0.01, False), (False, DENSE_JOINT + 20, 0.01, False), (False, 20, 0.01, True)],
)
def test_no_decomposition_is_begun_that_the_time_limit_has_no_room_for(
    dense: bool, rows: int, seconds: float, searched: bool
) -> None:
    problem = gaussian(DENSE_JOINT + 10, 30, seed=3, rows=rows, dense=dense)
    found = exact.swapped(problem, "joint", limits=Limits(time_limit=seconds), incumbent=None)
    assert (found is not None) == searched
    assert exact.swapped(problem, "selection", limits=Limits(time_limit=seconds), incumbent=None) is not None


@pytest.mark.parametrize("method", ENGINES)
def test_the_heuristic_is_no_option(method: str) -> None:
    found = find_method(method, "joint")
    assert "heuristic" not in found.options
    assert found.options == {} or set(found.options) == {
        "search",
        "fixing",
        "reduction",
        "diagonal_split",
        "swaps",
    }
