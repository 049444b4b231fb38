"""Which weights go, block by block: every method of the package on a list of Fisher blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.on_demand import OnDemand
from cbs_opt.select.choice import Choice, Selector
from cbs_opt.select.randomized_magnitude import randomized_magnitude
from cbs_opt.select.saliency import SALIENCIES, lowest
from cbs_opt.select.selection_program.program import SelectionProgram
from cbs_opt.select.selection_program.swap_search import SwapResult, swap_search_batch
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.solution import BlockSolution, Limit, Limits

if TYPE_CHECKING:
    from cbs_opt.runs.choices import ChoiceLedger

STARTS = (*SALIENCIES, "randomized_magnitude")


def without_channels(blocks: Sequence[FisherBlock]) -> Sequence[FisherBlock]:
    """The blocks without their layer-input terms, on demand if they are made on demand."""
    bare = OnDemand(lambda number: replace(blocks[number], channels=None), len(blocks))
    return bare if isinstance(blocks, OnDemand) else list(bare)


def by_saliency(name: str) -> Selector:
    """The selector that removes the weights of lowest saliency `name`."""
    score = SALIENCIES[name]

    def select(blocks: Sequence[FisherBlock], counts: Sequence[int], *, limits: Limits) -> list[Choice]:
        choices = []
        for block, count in zip(blocks, counts, strict=True):
            began = time.perf_counter()
            pruned = lowest(score(block), count)
            choices.append(Choice(pruned=pruned, seconds=time.perf_counter() - began))
        return choices

    select.__name__ = f"select_by_{name}"
    return select


def by_randomized_magnitude(
    blocks: Sequence[FisherBlock], counts: Sequence[int], *, limits: Limits, spread: float = 0.1
) -> list[Choice]:
    """Randomised magnitude pruning in every block; `spread` as in `randomized_magnitude`."""
    return [
        Choice(pruned=start_set("randomized_magnitude", block, counts[number], limits.seed + number, spread))
        for number, block in enumerate(blocks)
    ]


def by_swap_search(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int],
    *,
    limits: Limits,
    start: str | Sequence[str] = "magnitude",
    spread: float = 0.1,
    max_swaps: int | None = None,
    tolerance: float | None = None,
    warm: Sequence[Tensor] | None = None,
) -> list[Choice]:
    """Swap search on the selection program of every block.

    Parameters
    ----------
    blocks : sequence of FisherBlock
    counts : sequence of int
        Weights to remove in each block.
    limits : Limits
        `time_limit` for all blocks and starts together.
    start : str or sequence of str, default "magnitude"
        Sets to start from: a saliency or "randomized_magnitude". Of several, the one that ends
        lowest in each block is kept.
    spread : float, default 0.1
        Of "randomized_magnitude" starts.
    max_swaps : int, optional
        Swaps in each block from each start; by default as many as it takes to a 1-swap optimum.
    tolerance : float, optional
        Of `swap_search`.
    warm : sequence of (n,) bool tensors, optional
        A pruned set for each block to start from, instead of `start`.

    Returns
    -------
    list of Choice
    """
    names = [start] if isinstance(start, str) else list(start)
    if not names or any(name not in STARTS for name in names):
        raise ArgumentError("start", f"{start!r}", f"choose among {', '.join(STARTS)}")
    programs: Sequence[SelectionProgram] = OnDemand(
        lambda number: SelectionProgram.of(blocks[number]), len(blocks)
    )
    if not isinstance(blocks, OnDemand):
        programs = list(programs)
    deadline = None if limits.time_limit is None else time.monotonic() + limits.time_limit
    best: list[SwapResult] | None = None
    for name in names if warm is None else ["warm"]:
        starts = warm or [
            start_set(name, block, counts[number], limits.seed + number, spread)
            for number, block in enumerate(blocks)
        ]
        found = swap_search_batch(
            programs,
            starts,
            tolerance=tolerance,
            max_swaps=limits.iteration_limit if max_swaps is None else max_swaps,
            deadline=deadline,
            seed=limits.seed,
        )
        if best is None:
            best = found
        else:
            best = [min(pair, key=lambda result: result.value) for pair in zip(best, found, strict=True)]
    return [_choice(result) for result in best or []]


DENSE_BLOCK = 4_096
"""Largest block that is handed to a dense method."""


def by_solver(solver: Callable[..., BlockSolution], name: str, program: str) -> Selector:
    """The selector that solves every block on its own with a dense method of `formulations`."""

    def select(
        blocks: Sequence[FisherBlock],
        counts: Sequence[int],
        *,
        limits: Limits,
        ledger: ChoiceLedger | None = None,
        **options: Any,
    ) -> list[Choice]:
        choices = []
        # Nothing but the loop holds a block: `zip` within `enumerate` would keep the one before.
        for number, block in enumerate(blocks):
            choice = None if ledger is None else ledger.known(number)
            if choice is None:
                require_dense(block, name, program)
                solution = solver(block.to_problem(counts[number]), program, limits=limits, **options)
                choice = choice_of_solution(block, checked_solution(block, solution, name))
                if choice.limit is Limit.INTERRUPTED:
                    raise KeyboardInterrupt
                if ledger is not None:
                    ledger.add(number, choice)
            choices.append(choice)
        return choices

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


def choice_of_solution(block: FisherBlock, solution: BlockSolution) -> Choice:
    """What a dense method found on a block, as a choice."""
    keep = torch.tensor(solution.keep, device=block.weights.device)
    limit = "" if solution.limit is None else f", {solution.limit.value} limit"
    return Choice(
        pruned=~keep,
        iterations=solution.stats.iterations,
        seconds=solution.stats.seconds,
        bound=solution.bound,
        status=f"{solution.termination.value}{limit}",
        limit=solution.limit,
    )


def start_set(name: str, block: FisherBlock, count: int, seed: int, spread: float) -> Tensor:
    """The pruned set of a start of `STARTS`."""
    if name == "randomized_magnitude":
        return randomized_magnitude(block.weights, count, spread=spread, seed=seed)
    return lowest(SALIENCIES[name](block), count)


def _choice(result: SwapResult) -> Choice:
    return Choice(
        pruned=result.pruned,
        initial_value=result.initial_value,
        iterations=result.swaps,
        locally_optimal=result.locally_optimal,
        seconds=result.seconds,
        status=ending(result.locally_optimal, result.limit),
        limit=result.limit,
    )


def ending(locally_optimal: bool, limit: Limit | None) -> str:
    """How a search ended, in a few words."""
    if locally_optimal:
        return "1-swap optimal"
    if limit is None:
        return "start kept: nothing better beyond rounding"
    return f"stopped: {limit.value} limit"
