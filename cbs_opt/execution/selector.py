"""Which weights go, each block solved wherever a worker is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

from cbs_opt.execution.blocks import Dispatch
from cbs_opt.execution.jobs import Recipe, this_process
from cbs_opt.execution.workers import Workers
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.runs.choices import ChoiceLedger
from cbs_opt.select.choice import Choice, Selector
from cbs_opt.select.selectors import checked_solution, choice_of_solution, require_dense
from formulations.solution import BlockSolution, Limit, Limits


def by_workers(solver: Callable[..., BlockSolution], name: str, program: str, workers: Workers) -> Selector:
    """`cbs_opt.select.selectors.by_solver` over an executor: the same sets, block by block."""

    def select(
        blocks: Sequence[FisherBlock],
        counts: Sequence[int],
        *,
        limits: Limits,
        ledger: ChoiceLedger | None = None,
        **options: Any,
    ) -> list[Choice]:
        known = [None if ledger is None else ledger.known(number) for number in range(len(blocks))]
        open_blocks = [number for number, choice in enumerate(known) if choice is None]
        for number in open_blocks:
            require_dense(blocks[number], name, program)

        def done(position: int, solution: BlockSolution) -> None:
            number = open_blocks[position]
            if ledger is not None and solution.keep is not None and solution.limit is not Limit.INTERRUPTED:
                ledger.add(number, choice_of_solution(blocks[number], solution))

        recipe = Recipe(method=solver, program=program, limits=limits, options=options, home=this_process())
        # One block at a time becomes a problem in float64, as workers take it.
        problems = (blocks[number].to_problem(counts[number]) for number in open_blocks)
        solutions = Dispatch(recipe, problems, repeat(None), lambda index: limits.seed, workers, done).run()
        unread = len(solutions) < len(open_blocks)
        if unread or any(found.limit is Limit.INTERRUPTED for found in solutions):
            raise KeyboardInterrupt
        for number, solution in zip(open_blocks, solutions, strict=True):
            block = blocks[number]
            known[number] = choice_of_solution(block, checked_solution(block, solution, name))
        return [choice for choice in known if choice is not None]

    return select
