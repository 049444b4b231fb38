"""Which weights go, each block solved wherever a worker is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

from torch import Tensor

from cbs_opt.execution.blocks import Dispatch
from cbs_opt.execution.jobs import Recipe, this_process
from cbs_opt.execution.workers import Workers
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.blockwise import checked_solution, require_dense
from cbs_opt.select.choice import NO_LEDGER, Choice, Ledger, Selector
from formulations.solution import BlockSolution, Limit, Limits


def by_workers(solver: Callable[..., BlockSolution], name: str, program: str, workers: Workers) -> Selector:
    """`cbs_opt.select.blockwise.by_solver` over an executor: the same sets, block by block."""

    def select(
        blocks: Sequence[FisherBlock],
        counts: Sequence[int],
        *,
        limits: Limits,
        warm: Sequence[Tensor] | None = None,
        ledger: Ledger = NO_LEDGER,
        **options: Any,
    ) -> list[Choice]:
        choices = [ledger.choice(number) for number in range(len(blocks))]
        open_blocks = [number for number, choice in enumerate(choices) if choice is None]
        for number in open_blocks:
            require_dense(blocks[number], name, program)

        def done(position: int, solution: BlockSolution) -> None:
            number = open_blocks[position]
            if solution.keep is not None and solution.limit is not Limit.INTERRUPTED:
                ledger.add(number, Choice.of_solution(blocks[number], solution))

        recipe = Recipe(method=solver, program=program, limits=limits, options=options, home=this_process())
        # One block at a time becomes a problem in float64, as workers take it.
        problems = (blocks[number].to_problem(counts[number]) for number in open_blocks)
        solutions = Dispatch(recipe, problems, repeat(None), lambda index: limits.seed, workers, done).run()
        unread = len(solutions) < len(open_blocks)
        if unread or any(found.limit is Limit.INTERRUPTED for found in solutions):
            raise KeyboardInterrupt
        for number, solution in zip(open_blocks, solutions, strict=True):
            block = blocks[number]
            choices[number] = Choice.of_solution(block, checked_solution(block, solution, name))
        return [choice for choice in choices if choice is not None]

    return select
