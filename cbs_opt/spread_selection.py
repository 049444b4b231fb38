"""Which weights go, each block solved wherever a worker is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

from cbs_opt.block_executor import Dispatch
from cbs_opt.block_jobs import Recipe, this_process
from cbs_opt.blocks import FisherBlock
from cbs_opt.selection import Choice, Selector, checked_solution, choice_of_solution, require_dense
from cbs_opt.workers import Workers
from formulations.solution import BlockSolution, Limit, Limits


def by_workers(solver: Callable[..., BlockSolution], name: str, program: str, workers: Workers) -> Selector:
    """`cbs_opt.selection.by_solver` over an executor: the same sets, block by block."""

    def select(
        blocks: Sequence[FisherBlock], counts: Sequence[int], *, limits: Limits, **options: Any
    ) -> list[Choice]:
        for block in blocks:
            require_dense(block, name, program)
        recipe = Recipe(method=solver, program=program, limits=limits, options=options, home=this_process())
        # One block at a time becomes a problem in float64, as workers take it.
        problems = (block.to_problem(count) for block, count in zip(blocks, counts, strict=True))
        solutions = Dispatch(recipe, problems, repeat(None), lambda index: limits.seed, workers).run()
        unread = len(solutions) < len(blocks)
        if unread or any(found.keep is None and found.limit is Limit.INTERRUPTED for found in solutions):
            raise KeyboardInterrupt
        return [
            choice_of_solution(block, checked_solution(block, solution, name))
            for block, solution in zip(blocks, solutions, strict=True)
        ]

    return select
