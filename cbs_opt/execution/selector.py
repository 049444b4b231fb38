"""Which weights go, each block solved wherever a worker is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cbs_opt.execution.blocks import run_blocks
from cbs_opt.execution.jobs import BlockCall
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.runs.choices import ChoiceLedger
from cbs_opt.select.choice import Choice, Selector
from cbs_opt.select.selectors import checked_solution, choice_of_solution, require_dense
from formulations.solution import BlockSolution, Limit, Limits


def by_workers(
    solver: Callable[..., BlockSolution], name: str, program: str, workers: int | None
) -> Selector:
    """Return `cbs_opt.select.selectors.by_solver` over joblib's workers: the same sets, block by block."""

    def select(
        blocks: Sequence[FisherBlock],
        counts: Sequence[int],
        *,
        limits: Limits,
        ledger: ChoiceLedger | None = None,
        **options: Any,
    ) -> list[Choice]:
        choices = [None if ledger is None else ledger.known(number) for number in range(len(blocks))]
        unsolved = [number for number, choice in enumerate(choices) if choice is None]
        for number in unsolved:
            require_dense(blocks[number], name, program)

        def done(position: int, solution: BlockSolution) -> None:
            number = unsolved[position]
            if ledger is not None and solution.keep is not None and solution.limit is not Limit.INTERRUPTED:
                ledger.add(number, choice_of_solution(blocks[number], solution))

        call = BlockCall(method=solver, program=program, limits=limits, options=options)
        # One block at a time becomes a problem in float64, as workers take it.
        pairs = ((blocks[number].to_problem(counts[number]), None) for number in unsolved)
        solutions, waiting = run_blocks(
            call, pairs, seed_of=lambda index: limits.seed, workers=workers, on_solution=done
        )
        if waiting is not None:
            raise KeyboardInterrupt
        for position, number in enumerate(unsolved):
            block = blocks[number]
            choices[number] = choice_of_solution(block, checked_solution(block, solutions[position], name))
        return [choice for choice in choices if choice is not None]

    return select
