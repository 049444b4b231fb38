"""Which weights go under the selection program: swap search on every block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.on_demand import mapped
from cbs_opt.select.blockwise import require_dense
from cbs_opt.select.choice import (
    NO_LEDGER,
    Choice,
    Ledger,
    SearchJournal,
    SearchResult,
    ending,
    one_by_one,
    warm_start,
)
from cbs_opt.select.scores import STARTS, required_count, start_set, start_sets
from cbs_opt.select.selection_program.program import TUNING, SelectionProgram, SwapTuning
from cbs_opt.select.selection_program.swap_search import swap_search_batch
from formulations.errors import ArgumentError
from formulations.incumbents import swap_search
from formulations.solution import BlockSolution, Limits
from formulations.support import Support


def by_swap_search(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int | Support],
    *,
    limits: Limits,
    start: str | Sequence[str] = "magnitude",
    spread: float = 0.1,
    max_swaps: int | None = None,
    tolerance: float | None = None,
    warm: Sequence[Tensor] | None = None,
    ledger: Ledger = NO_LEDGER,
    tuning: SwapTuning = TUNING,
) -> list[Choice]:
    """Search by swaps on the selection program of every block.

    Blocks, counts, warm and ledger are as of `Selector`: blocks are searched all at once; of large ones the
    ledger keeps the states. The time limit is for all blocks and starts together. The options are those of
    `cbs_opt.recipe.select.SwapSearch`, the tolerance is that of `swap_search_batch`.
    Where counts are supports each block is searched on its own, by `formulations.incumbents.swap_search`.
    Raises `ArgumentError` if a start is unknown, `UnsupportedProblemError` if a block with a support is too
    large for a dense method.
    """
    names = [start] if isinstance(start, str) else list(start)
    if not names or any(name not in STARTS for name in names):
        raise ArgumentError("start", f"{start!r}", f"choose among {', '.join(STARTS)}")
    if any(isinstance(count, Support) for count in counts):

        def starts(block: FisherBlock, number: int) -> Iterator[Tensor]:
            for name in names:
                yield start_set(name, block, counts[number], limits.seed + number, spread)

        most = limits.iteration_limit if max_swaps is None else max_swaps
        return _inside(blocks, counts, replace(limits, iteration_limit=most), warm, ledger, starts)
    counts = [required_count(count, "swap_search") for count in counts]
    programs = mapped(SelectionProgram, blocks)
    deadline = None if limits.time_limit is None else time.monotonic() + limits.time_limit
    ends: list[list[SearchResult]] = []
    for name in names if warm is None else ["warm"]:
        results = swap_search_batch(
            programs,
            warm or start_sets(name, blocks, counts, limits.seed, spread),
            tolerance=tolerance,
            max_swaps=limits.iteration_limit if max_swaps is None else max_swaps,
            deadline=deadline,
            seed=limits.seed,
            tuning=tuning,
            journal_of=partial(_journal, ledger, name),
        )
        ends.append(results)
    return [min(results, key=lambda result: result.value).choice for results in zip(*ends, strict=True)]


def _inside(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int | Support],
    limits: Limits,
    warm: Sequence[Tensor] | None,
    ledger: Ledger,
    starts: Callable[[FisherBlock, int], Iterable[Tensor]],
) -> list[Choice]:
    """Return the lowest end of all starts in every block, by swaps that stay inside of its support."""
    ends = None if limits.time_limit is None else time.monotonic() + limits.time_limit

    def search(block: FisherBlock, number: int) -> Choice:
        require_dense(block, "swap_search within a support", "selection")
        problem, found = block.to_problem(counts[number]), list[BlockSolution]()
        for start in starts(block, number) if warm is None else [warm[number]]:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            share, first = replace(limits, time_limit=left), warm_start(start, "selection")
            found.append(swap_search(problem, "selection", limits=share, incumbent=first))
        best = min(found, key=lambda solution: solution.objective or 0.0)
        settled = best.limit is None
        choice = Choice.of_solution(block, best)
        return replace(choice, locally_optimal=settled, status=ending(settled, best.limit))

    return one_by_one(blocks, ledger, search)


def _journal(ledger: Ledger, name: str, number: int) -> SearchJournal:
    """Return where the search of a block from a start keeps its state, apart from those of other blocks."""
    return ledger.journal(number).named(f"swaps_{name}_{number:05d}")
