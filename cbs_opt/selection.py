"""Which weights go, block by block: every method of the package on a list of Fisher blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cbs_opt.blocks import FisherBlock
from cbs_opt.heuristics.randomized_magnitude import randomized_magnitude
from cbs_opt.heuristics.saliency import SALIENCIES, lowest
from cbs_opt.heuristics.selection_program import SelectionProgram
from cbs_opt.heuristics.swap_search import SwapResult, swap_search_batch
from cbs_opt.on_demand import OnDemand
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.solution import BlockSolution, Limit, Limits

if TYPE_CHECKING:
    from cbs_opt.choice_ledger import ChoiceLedger

STARTS = (*SALIENCIES, "randomized_magnitude")


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The pruned set of one block and how it was found.

    Attributes
    ----------
    pruned : (n,) bool tensor
        True where the weight goes.
    initial_value : float or None
        Selection objective that a search started from.
    iterations : int
        Swaps of a search.
    locally_optimal : bool or None
        Whether a search ended at a proved 1-swap optimum; None for methods that do not search.
    seconds : float
    bound : float or None
        Proved lower bound on the objective of the program.
    status : str
        How the method ended.
    limit : Limit or None
        What stopped it early.
    """

    pruned: Tensor
    initial_value: float | None = None
    iterations: int = 0
    locally_optimal: bool | None = None
    seconds: float = 0.0
    bound: float | None = None
    status: str = ""
    limit: Limit | None = None


def without_channels(blocks: Sequence[FisherBlock]) -> Sequence[FisherBlock]:
    """The blocks without their layer-input terms, on demand if they are made on demand."""
    bare = OnDemand(lambda number: replace(blocks[number], channels=None), len(blocks))
    return bare if isinstance(blocks, OnDemand) else list(bare)


Selector = Callable[..., list[Choice]]
"""``selector(blocks, counts, *, limits, **options)``: one choice a block, in order.

One that takes a block at a time may take a `ChoiceLedger` as `ledger`: it leaves out the blocks that are
known there, and adds the others as they are done.
"""


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
