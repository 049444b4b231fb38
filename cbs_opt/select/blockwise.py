"""Which weights go by a method of `formulations`, on one block after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.choice import NO_LEDGER, Choice, Ledger, Selector, one_by_one
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.solution import BlockSolution, Limits
from formulations.support import Support

DENSE_BLOCK = 4_096
"""Largest block that is handed to a dense method."""


def by_solver(solver: Callable[..., BlockSolution], name: str, program: str) -> Selector:
    """Return the selector that solves every block on its own with a dense method of `formulations`."""

    def select(
        blocks: Sequence[FisherBlock],
        counts: Sequence[int | Support],
        *,
        limits: Limits,
        warm: Sequence[Tensor] | None = None,
        ledger: Ledger = NO_LEDGER,
        **options: Any,
    ) -> list[Choice]:
        def solve(block: FisherBlock, number: int) -> Choice:
            require_dense(block, name, program)
            solution = solver(block.to_problem(counts[number]), program, limits=limits, **options)
            return Choice.of_solution(block, checked_solution(block, solution, name))

        return one_by_one(blocks, ledger, solve)

    return select


def require_dense(block: FisherBlock, name: str, program: str) -> None:
    """Raise `UnsupportedProblemError` if a block is too large for a dense method."""
    if block.n > DENSE_BLOCK:
        found = f"block {block.name!r} of {block.n} weights for {name} on program {program!r}"
        remedy = f'cut blocks of at most {DENSE_BLOCK}: partition="row" or a block size'
        raise UnsupportedProblemError("partition", found, remedy)


def checked_solution(block: FisherBlock, solution: BlockSolution, name: str) -> BlockSolution:
    """Return a solution that has a set, else raise `ArgumentError` with the reason."""
    if solution.keep is None:
        found = f"{name} on block {block.name!r}: {solution.termination.value}"
        remedy = f"raise its limits or use another method ({solution.stats.message})"
        raise ArgumentError("method", found, remedy)
    return solution
