"""The chosen set of one block, what chooses it, and where choices are put down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.system.progress import SILENT, Progress
from formulations.solution import BlockSolution, Limit, Limits, TracePoint
from formulations.support import Support


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The kept set of one block and how it was chosen.

    `keep` (n,) is True where the weight stays, `initial_value` the selection objective that a search started
    from, `iterations` its swaps. `locally_optimal` says whether a search ended at a proved 1-swap optimum;
    None for methods that do not search. `bound` is a proved lower bound on the objective of the program,
    `status` how the method ended, and `limit` what stopped it early.
    """

    keep: Tensor
    initial_value: float | None = None
    iterations: int = 0
    locally_optimal: bool | None = None
    seconds: float = 0.0
    bound: float | None = None
    status: str = ""
    limit: Limit | None = None

    @classmethod
    def of_solution(cls, block: FisherBlock, solution: BlockSolution) -> Choice:
        """Return what a method of `formulations` found on a block as a choice."""
        limit = "" if solution.limit is None else f", {solution.limit.value} limit"
        return cls(
            keep=torch.tensor(solution.keep, device=block.weights.device),
            iterations=solution.stats.iterations,
            seconds=solution.stats.seconds,
            bound=solution.bound,
            status=f"{solution.termination.value}{limit}",
            limit=solution.limit,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """What a search of one block found.

    `keep` has the size of the start, `value` and `initial_value` are the objective of the program after and
    before, in float64. `locally_optimal` is proved: no single swap lowers the objective by more than the
    tolerance, over all pairs; `limit` is what stopped the search before that. `trace` is the objective after
    every accepted move, of searches that follow it.
    """

    keep: Tensor
    value: float
    initial_value: float
    swaps: int
    locally_optimal: bool
    limit: Limit | None
    seconds: float
    trace: tuple[TracePoint, ...] = ()

    @property
    def choice(self) -> Choice:
        """The same as a choice."""
        return Choice(
            keep=self.keep,
            initial_value=self.initial_value,
            iterations=self.swaps,
            locally_optimal=self.locally_optimal,
            seconds=self.seconds,
            status=ending(self.locally_optimal, self.limit),
            limit=self.limit,
        )


def ending(locally_optimal: bool, limit: Limit | None) -> str:
    """Return how a search ended, in a few words."""
    if locally_optimal:
        return "1-swap optimal"
    if limit is None:
        return "start kept: nothing better beyond rounding"
    return f"stopped: {limit.value} limit"


def warm_start(keep: Tensor, program: str) -> BlockSolution:
    """Return a kept set as what `formulations` starts from."""
    return BlockSolution(
        keep=keep.cpu().numpy(), weights=None, objective=None, program=program, method="start"
    )


class SearchInterruptedError(KeyboardInterrupt):
    """Ctrl-C during a selection, with the choice for the block at which it came."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice


class SearchJournal:
    """What one search of a block has to keep so that a killed run goes on; this one forgets all.

    `progress` is told of the steps of the search.
    """

    def __init__(self, progress: Progress = SILENT) -> None:
        self.progress = progress

    def named(self, name: str) -> SearchJournal:
        """Return the journal of another search of the same block, `name` in words of letters."""
        return self

    def recall(self) -> dict[str, Any]:
        """Return the last state that was kept; empty if there is none."""
        return {}

    def keep(self, state: Mapping[str, Any]) -> None:
        """Keep a state in place of the one before, in time: float64 or bool tensors, numbers, booleans.

        It is all that the search needs to go on to the same bits.
        """


NO_JOURNAL = SearchJournal()


class Ledger:
    """The choices of blocks that are made already, and where further ones are added; this one forgets all.

    `progress` is told of the blocks that are done.
    """

    def __init__(self, progress: Progress = SILENT) -> None:
        self.progress = progress

    def journal(self, index: int) -> SearchJournal:
        """Return where the searches of a block keep their states; one block is searched at a time."""
        return SearchJournal(self.progress)

    def choice(self, index: int) -> Choice | None:
        """Return the choice of a block, or None if it is not made yet."""
        return None

    def add(self, index: int, choice: Choice) -> None:
        """Keep the choice of a block."""


NO_LEDGER = Ledger()


def one_by_one(
    blocks: Sequence[FisherBlock], ledger: Ledger, choose: Callable[[FisherBlock, int], Choice]
) -> list[Choice]:
    """Return the choices of all blocks in order: those of the ledger, and what `choose` makes of the others.

    Raises `SearchInterruptedError` at the first choice that an interrupt ended.
    """
    choices = []
    with ledger.progress.phase("blocks", len(blocks), unit="block") as advance:
        # Nothing but the loop holds a block: `zip` within `enumerate` would keep the one before.
        for number, block in enumerate(blocks):
            choice = ledger.choice(number)
            if choice is None:
                choice = choose(block, number)
                if choice.limit is Limit.INTERRUPTED:
                    raise SearchInterruptedError(choice)
                ledger.add(number, choice)
            choices.append(choice)
            advance(1)
    return choices


class Selector(Protocol):
    """What chooses the kept sets of blocks."""

    def __call__(
        self,
        blocks: Sequence[FisherBlock],
        counts: Sequence[int | Support],
        *,
        limits: Limits,
        warm: Sequence[Tensor] | None = None,
        ledger: Ledger = NO_LEDGER,
        **options: Any,
    ) -> list[Choice]:
        """Return one choice a block, in order.

        So many weights go in each block, or what a `formulations.support.Support` says may stay: a method
        that cannot keep to it refuses it by name before any work. The limits are for all blocks together, and
        the options are those of the method. A search starts from the kept set (n,) that `warm` has for each
        block. A selector that takes a block at a time leaves out the blocks that have a choice in the ledger,
        and adds the others as they are done.
        """
        ...
