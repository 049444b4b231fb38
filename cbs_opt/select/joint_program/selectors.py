"""Which weights go under the joint program: small blocks by their Hessian, large ones by their rows."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.choice import (
    NO_LEDGER,
    Choice,
    Ledger,
    SearchJournal,
    ending,
    one_by_one,
    warm_start,
)
from cbs_opt.select.joint_program.channel_program import ChannelProgram, joint_program
from cbs_opt.select.joint_program.inside import in_cells, number_pruned
from cbs_opt.select.joint_program.program import JointProgram, Program
from cbs_opt.select.joint_program.search import joint_search
from cbs_opt.select.joint_program.starts import (
    DROPS,
    THRESHOLD_STEPS,
    greedy_obs_set,
    hard_threshold_set,
    relaxed_set,
)
from cbs_opt.select.saliency import magnitude, without_lowest
from cbs_opt.select.scores import STARTS, start_set
from formulations import incumbents
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.problem import BlockProblem
from formulations.solution import Limit, Limits
from formulations.support import Support

DENSE_JOINT = 1_024
"""Largest block whose Hessian is formed for a joint search."""
JOINT_STARTS = ("relaxation", "greedy_obs", "iterative_hard_threshold", *STARTS)


def by_joint_swap_search(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int | Support],
    *,
    limits: Limits,
    start: str | Sequence[str] | None = None,
    spread: float = 0.1,
    max_swaps: int | None = None,
    restarts: int = 0,
    drops: int = DROPS,
    tolerance: float | None = None,
    dense_limit: int = DENSE_JOINT,
    warm: Sequence[Tensor] | None = None,
    ledger: Ledger = NO_LEDGER,
) -> list[Choice]:
    """Search by swaps on the joint program of every block, to proved 1-swap optima.

    Blocks, counts, warm and ledger are as of `Selector`; from a warm start the result is never worse. The
    time limit is for all blocks together, shared by their size. The options are those of
    `cbs_opt.recipe.select.SwapSearch`; `restarts` are within the core of a large block. It starts by default
    from the rounded relaxation, and from greedy elimination in small blocks and beside a channel term.
    Raises `ArgumentError` if a start is unknown, `restarts` is negative or `drops` below 1;
    `NotPositiveDefiniteError` if the Hessian of a block is singular; `SearchInterruptedError` after Ctrl-C: a
    `KeyboardInterrupt` with what was found for the block at hand.

    Where a count is a support of n of every m weights, swaps are within its cells; blocks with groups are
    searched up to `dense_limit`. Blocks of up to `dense_limit` weights:
    `formulations.incumbents.swap_search`, O(n^3). Larger ones: `cbs_opt.select.joint_program.search`,
    O(m^2 n) whenever many weights have changed. A Hessian without rows, and more rows than weights, cost an
    eigendecomposition there. Larger ones with a layer-input term: the same from greedy OBS or a saliency, by
    batches of swaps without a proof and without restarts.
    """
    names = (start,) if isinstance(start, str) else tuple(start or ())
    if (start is not None and not names) or any(name not in JOINT_STARTS for name in names):
        raise ArgumentError("start", f"{start!r}", f"choose among {', '.join(JOINT_STARTS)}")
    _require_at_least(0, restarts=restarts)
    _require_at_least(1, drops=drops)

    def search(block: FisherBlock, number: int, deadline: float | None) -> Choice:
        engine = _DenseSearch if block.n <= dense_limit else _LargeSearch
        return engine(
            block=block,
            count=counts[number],
            deadline=deadline,
            starts=names,
            warm=None if warm is None else warm[number],
            spread=spread,
            max_swaps=limits.iteration_limit if max_swaps is None else max_swaps,
            restarts=restarts,
            drops=drops,
            tolerance=tolerance,
            seed=limits.seed + number,
            journal=ledger.journal(number),
        ).best()

    return _each(blocks, counts, limits, ledger, search)


def by_joint_greedy_obs(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int | Support],
    *,
    limits: Limits,
    drops: int = DROPS,
    dense_limit: int = DENSE_JOINT,
    warm: Sequence[Tensor] | None = None,
    ledger: Ledger = NO_LEDGER,
) -> list[Choice]:
    """Return the sets of greedy OBS: one weight at a time in small blocks, `drops` times in large ones.

    Parameters and errors as in `by_joint_swap_search`.
    """
    _require_at_least(1, drops=drops)

    def drop(block: FisherBlock, number: int, deadline: float | None) -> Choice:
        if block.n <= dense_limit:
            problem, left = block.to_problem(counts[number]), Limits(time_limit=_left(deadline))
            return Choice.of_solution(block, incumbents.greedy(problem, "joint", limits=left))
        program, journal = joint_program(block), ledger.journal(number).named("greedy_obs")
        if _late(deadline, program):
            # A single drop costs about as much again.
            keep = without_lowest(magnitude(block), counts[number])
        else:
            keep = greedy_obs_set(program, counts[number], drops=drops, deadline=deadline, journal=journal)
        return _finished(keep, deadline, program)

    return _each(blocks, counts, limits, ledger, drop)


def by_iterative_hard_threshold(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int | Support],
    *,
    limits: Limits,
    steps: int = THRESHOLD_STEPS,
    warm: Sequence[Tensor] | None = None,
    ledger: Ledger = NO_LEDGER,
) -> list[Choice]:
    """Return the sets of iterative hard thresholding on every block, after at most `steps` gradient steps.

    Parameters and errors as in `by_joint_swap_search`.
    """
    _require_at_least(0, steps=steps)

    def threshold(block: FisherBlock, number: int, deadline: float | None) -> Choice:
        program, journal = JointProgram(block), ledger.journal(number).named("iterative_hard_threshold")
        keep = hard_threshold_set(program, counts[number], steps=steps, deadline=deadline, journal=journal)
        return _finished(keep, deadline, program)

    return _each(blocks, counts, limits, ledger, threshold)


def _require_at_least(least: int, **option: int) -> None:
    for name, value in option.items():
        if value < least:
            raise ArgumentError(name, f"{value}", f"pass {least} or more")


def _each(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int | Support],
    limits: Limits,
    ledger: Ledger,
    method: Callable[[FisherBlock, int, float | None], Choice],
) -> list[Choice]:
    """Run `method` on every block without a choice, in a share of the time left in proportion to its size."""
    ends = None if limits.time_limit is None else time.monotonic() + limits.time_limit
    sizes = [block.n for block in blocks]

    def choose(block: FisherBlock, number: int) -> Choice:
        began = time.monotonic()
        share = block.n / max(1, sum(sizes[number:]))
        deadline = None if ends is None else began + max(0.0, ends - began) * share
        try:
            choice = method(block, number, deadline)
        except KeyboardInterrupt:
            keep = without_lowest(magnitude(block), counts[number])
            status = ending(False, Limit.INTERRUPTED)
            choice = Choice(keep=keep, status=status, limit=Limit.INTERRUPTED)
        return replace(choice, seconds=time.monotonic() - began)

    return one_by_one(blocks, ledger, choose)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Search(ABC):
    """One block that is searched from several starts, with the options of `by_joint_swap_search`."""

    block: FisherBlock
    count: int | Support
    deadline: float | None
    starts: tuple[str, ...]
    warm: Tensor | None
    spread: float
    max_swaps: int | None
    restarts: int
    drops: int
    tolerance: float | None
    seed: int
    journal: SearchJournal

    @cached_property
    def program(self) -> JointProgram | ChannelProgram:
        """The program that large blocks are searched by, and that the starts of all are made with."""
        return JointProgram(self.block)

    @property
    @abstractmethod
    def default_start(self) -> str | None:
        """The start where none is asked for, or None where the search has its own."""

    @abstractmethod
    def descend(self, name: str | None) -> tuple[float, Choice]:
        """Return the objective and the choice that the start of that name leads to, or the warm one."""

    def best(self) -> Choice:
        """Return the lowest end of all starts; an interrupt ends the walk over them."""
        names = self.starts or (self.default_start,)
        best: tuple[float, Choice] | None = None
        for name in names if self.warm is None else (None,):
            value, choice = self.descend(name)
            if best is None or value < best[0]:
                best = value, choice
            if choice.limit is Limit.INTERRUPTED:
                return replace(best[1], status=choice.status, limit=choice.limit)
        assert best is not None
        return best[1]

    def start(self, name: str) -> Tensor:
        """Return the kept set of a start of `JOINT_STARTS`; magnitude's where no time or choice is left."""
        block, count, left, program = self.block, self.count, _left(self.deadline), self.program
        options: dict[str, Any] = {"deadline": self.deadline, "journal": self.journal.named(name)}
        if isinstance(program, ChannelProgram) and name not in ("greedy_obs", *STARTS):
            found = f"{name!r} on {block.n} weights with a layer-input term"
            raise UnsupportedProblemError("start", found, f"use greedy_obs, or one of {', '.join(STARTS)}")
        if left == 0.0 or number_pruned(count, block.n) in (0, block.n):
            return without_lowest(magnitude(block), count)
        if name == "greedy_obs":
            return greedy_obs_set(program, count, drops=self.drops, **options)
        if isinstance(program, JointProgram) and name == "relaxation":
            return relaxed_set(program, count, time_limit=left)
        if isinstance(program, JointProgram) and name == "iterative_hard_threshold":
            return hard_threshold_set(program, count, **options)
        return start_set(name, block, count, self.seed, self.spread)


class _LargeSearch(_Search):
    """The search by rows, or by batches beside a channel term."""

    @cached_property
    def program(self) -> JointProgram | ChannelProgram:
        return joint_program(self.block, in_cells(self.count, self.block.n, "swap_search"))

    @property
    def default_start(self) -> str:
        return "greedy_obs" if isinstance(self.program, ChannelProgram) else "relaxation"

    def descend(self, name: str | None) -> tuple[float, Choice]:
        journal = self.journal.named(f"search_from_{name or 'warm'}")
        # A search that goes on needs no start.
        start = journal.recall().get("keep", self.warm)
        if start is None:
            start = self.start(name or self.default_start)
        result = joint_search(
            self.program,
            start,
            tolerance=self.tolerance,
            max_swaps=self.max_swaps,
            restarts=self.restarts,
            deadline=self.deadline,
            seed=self.seed,
            journal=journal,
        )
        choice = replace(result.choice, initial_value=None)
        if choice.limit is Limit.TIME:
            choice = replace(choice, status=choice.status + _late(self.deadline, self.program))
        if isinstance(self.program, ChannelProgram) and result.limit is None:
            choice = replace(choice, status="no batch of swaps improves")
        return result.value, choice


class _DenseSearch(_Search):
    """The search on the swept tableau."""

    default_start = None

    @cached_property
    def problem(self) -> BlockProblem:
        return self.block.to_problem(self.count)

    def descend(self, name: str | None) -> tuple[float, Choice]:
        start = self.warm if name is None else self.start(name)
        solution = incumbents.swap_search(
            self.problem,
            "joint",
            limits=Limits(time_limit=_left(self.deadline), iteration_limit=self.max_swaps, seed=self.seed),
            incumbent=None if start is None else warm_start(start, "joint"),
            restarts=self.restarts,
        )
        assert solution.objective is not None
        settled = solution.limit is None
        status = ending(settled, solution.limit)
        choice = Choice.of_solution(self.block, solution)
        return solution.objective, replace(choice, locally_optimal=settled, status=status)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _late(deadline: float | None, program: Program[Any]) -> str:
    """Return what to add to a status where the deadline passed while the program was made."""
    if deadline is None or program.made is None or program.made[1] < deadline:
        return ""
    began, ended = program.made
    return f"; an eigendecomposition took {ended - began:.2f} s, within which the time limit is not looked at"


def _finished(keep: Tensor, deadline: float | None, program: Program[Any]) -> Choice:
    """Return the choice of a method that hurries once its time is over."""
    if _left(deadline) == 0.0:
        status = f"{Limit.TIME.value} limit{_late(deadline, program)}"
        return Choice(keep=keep, status=status, limit=Limit.TIME)
    return Choice(keep=keep)
