"""Exact methods of `formulations`, which take the sets of the swap searches on large blocks.

There the first bound of an exact method and a swap search by rows take tenths of a second, and the dense
matrices of the method's own descents longer than both.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from cbs_opt.select.joint_program.selectors import DENSE_JOINT
from cbs_opt.select.methods import find_method
from cbs_opt.select.one_block import select_one
from cbs_opt.select.preparation import prepare
from formulations import branch_and_bound as branching
from formulations import outer_approximation as outer
from formulations.problem import SPLIT_LARGEST, BlockProblem
from formulations.solution import BlockSolution, Limits

DECOMPOSITION = 4e-10
"""Seconds for each n^3 that an eigendecomposition may take, within which no search looks at the clock."""


@wraps(branching.branch_and_bound)
def branch_and_bound(problem: BlockProblem, program: str, **arguments: Any) -> BlockSolution:
    """Run `formulations.branch_and_bound` with `swapped` as its heuristic."""
    _prepare(problem, program)
    return branching.branch_and_bound(problem, program, heuristic=swapped, **arguments)


@wraps(outer.outer_approximation)
def outer_approximation(problem: BlockProblem, program: str, **arguments: Any) -> BlockSolution:
    """Run `formulations.outer_approximation` with `swapped` as its heuristic."""
    _prepare(problem, program)
    return outer.outer_approximation(problem, program, heuristic=swapped, **arguments)


def swapped(
    problem: BlockProblem, program: str, *, limits: Limits, incumbent: BlockSolution | None
) -> BlockSolution | None:
    """Return the solution of the swap search of `program`.

    None where it would begin with an eigendecomposition that the time limit has no room for, and for supports
    other than counts, which the search by rows of a single block does not take.
    """
    if problem.support is not None:
        return None
    if program == "joint" and limits.time_limit is not None and problem.n > DENSE_JOINT:
        by_rows = problem.rows is not None and len(problem.rows) <= problem.n and problem.damping > 0.0
        by_rows = by_rows and problem.channels is None
        if not by_rows and limits.time_limit < DECOMPOSITION * problem.n**3:
            return None
    select = find_method("swap_search", program).selector(program)
    return select_one(select, problem, program, method="swap_search", limits=limits, incumbent=incumbent)


def _prepare(problem: BlockProblem, program: str) -> None:
    """Have the kernels of the search ready before the clock of the method starts."""
    if problem.n > SPLIT_LARGEST:
        prepare("swap_search", program)
