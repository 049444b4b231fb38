"""Exchanges of kept and pruned weights in the joint program of a large block.

*Batches*: the weights that cost least are exchanged for those that gain most, as many at once as still lower
the true objective after the update; scores are those of single moves, so this is fast and proves nothing.
Blocks with a channel term are searched by batches alone. By rows follow *pairs*: the exact change of all
swaps that can improve (`pairs`), again tried together and halved; when none is left, a 1-swap optimum.
*Restarts* leave it again: descents from random sets within the core of weights whose fate is open (`Core`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from cbs_opt.select.choice import NO_JOURNAL, SearchJournal, SearchResult, warm_start
from cbs_opt.select.joint_program.channel_program import ChannelProgram, ChannelSet
from cbs_opt.select.joint_program.inside import improving_pairs_inside, paired_inside
from cbs_opt.select.joint_program.pairs import ImprovingPairs, Scores, improving_pairs
from cbs_opt.select.joint_program.program import JointProgram, Kept, KeptSet, Program
from formulations.errors import UnsupportedProblemError
from formulations.incumbents import swap_search
from formulations.problem import BlockProblem
from formulations.solution import Limit, Limits, TracePoint

TOLERANCE = 1e-9
"""Relative improvement that counts, by rows."""
ROUNDING = 1e-13
"""No change below this share of the terms that cancel in the objective can be told from rounding."""
TINY = 1e-300
CORE = 512
"""Weights in a core."""
LARGEST_BATCH = 8_192
LARGEST_SHARE = 0.1
"""Of the kept weights that the first batch beside a channel term may exchange."""
CHANNEL_TOLERANCE = 1e-3
"""Relative fall of the objective in one round below which exchanges beside a channel term end."""
MOVED_SHARE = 0.25
"""Changed columns, in shares of m, up to which leverages are moved and not computed anew."""


def joint_search(
    program: JointProgram | ChannelProgram,
    start: Tensor,
    *,
    tolerance: float | None = None,
    max_swaps: int | None = None,
    restarts: int = 0,
    deadline: float | None = None,
    seed: int = 0,
    journal: SearchJournal = NO_JOURNAL,
) -> SearchResult:
    """Improve a kept set of the joint program until no swap helps, or no batch beside a channel term.

    It begins with the weights kept in `start` (n,); a swap counts if it lowers the objective by more than
    ``tolerance * |objective|``, `TOLERANCE` by default. Beside a channel term a round of exchanges that
    brings no more than that is the last one, `CHANNEL_TOLERANCE` by default. Restarts are descents of the
    core from randomly changed sets by `seed`, each time the search has come to a 1-swap optimum; it ends when
    they bring nothing. They are of no use beside a channel term. Where the program has a support, of which
    `start` is a set, swaps are within its cells, and restarts are refused by name. The deadline, a reading of
    `time.monotonic`, is looked at between products with the rows.
    The journal has the state before each exchange, and a search goes on from the one that it has: `start` and
    `seed` are then those of the search that kept it.

    The result is never worse than the start; after Ctrl-C it is what was found until then, with
    `Limit.INTERRUPTED`. O(m^2 n) for the leverages whenever many weights changed, O(m^2 b + m^3) to try b
    swaps. Memory beyond the rows: O(m^2 + n) and some columns of the rows.
    """
    if program.support is not None and restarts:
        found = f"{restarts} with a support of {program.support}: a core has no cells"
        raise UnsupportedProblemError("restarts", found, "pass 0")
    arguments = (start, tolerance, max_swaps, deadline, journal)
    if isinstance(program, ChannelProgram):
        return ChannelSearch(program, *arguments).result(restarts, seed)
    return RowSearch(program, *arguments).result(restarts, seed)


class Search(ABC, Generic[Kept]):
    """State of one search: the kept set, and what has been spent."""

    grows: ClassVar[bool] = True
    """Whether a batch may become larger than the one before."""

    def __init__(
        self,
        program: Program[Kept],
        start: Tensor,
        tolerance: float | None,
        max_swaps: int | None,
        deadline: float | None,
        journal: SearchJournal,
    ) -> None:
        self.began = time.monotonic()
        self.support = program.support
        self.program, self.tolerance, self.least_yield = program, *self.tolerances(tolerance)
        self.max_swaps, self.deadline, self.journal = max_swaps, deadline, journal
        self.limit: Limit | None = None
        self.locally_optimal = int(start.sum()) in (0, program.n)
        self.trace: list[TracePoint] = []
        state = journal.recall()
        self.kept = program.restored(state) if state else program.at(start)
        self.initial: float = state.get("initial", self.kept.value)
        self.swaps: int = state.get("swaps", 0)
        self.cap: int | None = state.get("cap")
        self.restore(state)

    @staticmethod
    def tolerances(asked: float | None) -> tuple[float, float]:
        """Return the relative falls of the objective that count in a trial, and at which batches go on."""
        return TOLERANCE if asked is None else asked, 0.0

    def result(self, restarts: int, seed: int) -> SearchResult:
        """Run to the end or to an interrupt."""
        try:
            with self.journal.progress.phase("exchanges", unit="swap", done=self.swaps) as self._advance:
                self.run(restarts, seed)
        except KeyboardInterrupt:
            self.limit = Limit.INTERRUPTED
        return SearchResult(
            keep=self.kept.keep,
            value=self.kept.value,
            initial_value=self.initial,
            swaps=self.swaps,
            locally_optimal=self.locally_optimal,
            limit=self.limit,
            seconds=time.monotonic() - self.began,
            trace=tuple(self.trace),
        )

    @abstractmethod
    def run(self, restarts: int, seed: int) -> None:
        """Search until nothing helps or a limit is reached."""

    def state(self) -> dict[str, Any]:
        """Return all that the search needs to go on from here to the same bits; see `restore`."""
        numbers = {"initial": self.initial, "swaps": self.swaps, "cap": self.cap}
        return {**numbers, **self.program.state(self.kept)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` has beyond the kept set and its numbers; nothing, of an empty one."""

    @abstractmethod
    def _singles(self, most: int) -> tuple[Tensor, Tensor]:
        """Return kept weights of least cost with pruned ones of most gain, while the gain is the larger."""

    def _renewed(self) -> bool:
        """Return whether scores of an earlier set led here, and are now those of the present one."""
        return False

    @property
    def threshold(self) -> float:
        """The change of the objective that counts."""
        cancelled = abs(self.kept.value) + 2.0 * self.program.offset
        return max(self.tolerance * abs(self.kept.value), ROUNDING * cancelled, TINY)

    def _exchange_batches(self, largest: int) -> None:
        """Swap by the scores of single moves while the objective falls."""
        self.cap = largest if self.cap is None else self.cap
        while not self._stopped():
            self.journal.keep(self.state())
            before = self.kept.value
            made = self._try(*self._singles(self.cap))
            if made and before - self.kept.value > self.least_yield * abs(before):
                self.cap = 2 * made if self.grows else min(self.cap, 2 * made)
            elif self._renewed():
                self.cap = largest
            else:
                self._stopped()
                return

    def _try(self, leaving: Tensor, entering: Tensor) -> int:
        """Make as many of the swaps at once as lower the objective, halving; how many were made."""
        size = len(leaving)
        if self.max_swaps is not None:
            size = min(size, self.max_swaps - self.swaps)
        while size > 0 and not self._stopped():
            trial = self.program.exchanged(self.kept, leaving[:size], entering[:size])
            if trial.value < self.kept.value - self.threshold:
                self._accept(trial, size)
                return size
            size //= 2
        return 0

    def _accept(self, trial: Kept, swaps: int) -> None:
        self.kept = trial
        self.swaps += swaps
        spent = time.monotonic() - self.began
        self.trace.append(TracePoint(seconds=spent, nodes=0, objective=trial.value, bound=None))
        self._advance(swaps)

    def _stopped(self) -> bool:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.limit = Limit.TIME
        elif self.max_swaps is not None and self.swaps >= self.max_swaps:
            self.limit = Limit.ITERATION
        return self.limit is not None


class RowSearch(Search[KeptSet]):
    """The search by rows, with the leverages of the kept set."""

    FLAGS: ClassVar[tuple[str, ...]] = ("by_pairs", "anew", "restarted", "batch_is_old")
    """What a state says of where in `run` the search is."""
    program: JointProgram
    _by_pairs: bool
    _anew: bool
    _restarted: int
    _batch: Tensor | None
    _batch_is_old: bool
    _base: tuple[KeptSet, Tensor] | None

    def run(self, restarts: int, seed: int) -> None:
        """Exchange batches, then pairs, until no swap helps or a limit is reached; then from restarts."""
        if self.locally_optimal:
            return
        if not self._by_pairs:
            self._exchange_batches(LARGEST_BATCH)
            self._by_pairs, self._batch = True, None
        self._exchange_pairs()
        while restarts and self.limit is None and self._leave_optimum(restarts, seed + self._restarted):
            self._restarted += 1
            self._anew = False
            self._exchange_pairs()

    def state(self) -> dict[str, Any]:
        """Return also the leverages, which are moved from set to set, and the sets that they are of."""
        state = {**super().state(), **{name: getattr(self, f"_{name}") for name in self.FLAGS}}
        if self._batch is not None:
            state["batch"] = self._batch
        if self._base is not None:
            before, state["base"] = self._base
            state |= {f"base_{name}": value for name, value in self.program.state(before).items()}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        self._by_pairs = state.get("by_pairs", False)
        self._anew = state.get("anew", False)
        self._restarted = state.get("restarted", 0)
        self._batch = state.get("batch")
        self._batch_is_old = state.get("batch_is_old", False)
        self._base = None
        if "base" in state:
            before = {name: state[f"base_{name}"] for name in self.program.state(self.kept)}
            self._base = self.program.restored(before), state["base"]

    def _singles(self, most: int) -> tuple[Tensor, Tensor]:
        if self._batch is None:
            self._batch, self._batch_is_old = self._leverages(), False
        scores, keep = self._scores(self._batch), self.kept.keep
        if self.support is not None:
            return paired_inside(scores.costs, scores.gains, most, self.support)
        size = min(int(keep.sum()), int((~keep).sum()), most)
        costs, leaving = scores.costs.topk(size, largest=False)
        gains, entering = scores.gains.topk(size)
        better = int((gains > costs).sum())
        return leaving[:better], entering[:better]

    def _renewed(self) -> bool:
        if not self._batch_is_old:
            return False
        self._batch, self._batch_is_old = self._leverages(), False
        return True

    def _accept(self, trial: KeptSet, swaps: int) -> None:
        super()._accept(trial, swaps)
        self._batch_is_old = True

    def _exchange_pairs(self) -> None:
        """Swap by exact changes until a scan of all pairs, on figures computed anew, finds none."""
        while not self._stopped():
            self.journal.keep(self.state())
            pairs = self._scan()
            if len(pairs.leaving) and self._try(pairs.leaving, pairs.entering):
                self._anew = False
                continue
            if self._stopped():
                return
            if self._anew:
                # A swap that is left gains no more than rounding: nothing to prove, nothing to win.
                self.locally_optimal = pairs.complete and len(pairs.leaving) == 0
                return
            self.kept, self._base, self._anew = self.program.at(self.kept.keep), None, True

    def _leave_optimum(self, restarts: int, seed: int) -> bool:
        """Return whether descents of the core found a better set, which is then taken."""
        core = open_core(self.program, self.kept, self._scores(self._leverages(torch.float64)))
        left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        leaving, entering = restarted_core(core, restarts, Limits(time_limit=left, seed=seed))
        if self.max_swaps is not None and self.swaps + len(leaving) > self.max_swaps:
            self.limit = Limit.ITERATION
            return False
        trial = self.program.exchanged(self.kept, leaving, entering)
        if trial.value >= self.kept.value - self.threshold:
            return False
        self._accept(trial, len(leaving))
        self.locally_optimal = False
        return True

    def _scan(self) -> ImprovingPairs:
        scores = self._scores(self._leverages(torch.float64))
        arguments = (self.program, self.kept, scores, self.threshold, self.deadline)
        if self.support is not None:
            return improving_pairs_inside(*arguments, self.support)
        return improving_pairs(*arguments)

    def _scores(self, leverages: Tensor) -> Scores:
        return Scores.of(self.program, self.kept, self.program.levels(self.kept), leverages)

    def _leverages(self, precision: torch.dtype | None = None) -> Tensor:
        """Return leverages of the kept set, moved from those of an earlier set where few weights changed."""
        if self._base is not None:
            before, leverages = self._base
            changes = int((before.keep != self.kept.keep).sum())
            if changes == 0:
                return leverages
            if changes <= MOVED_SHARE * len(self.program.pull):
                return self.program.moved_leverages(leverages, before, self.kept)
        leverages = self.program.leverages(self.kept, precision or self.program.rows.dtype)
        self._base = self.kept, leverages
        return leverages


class ChannelSearch(Search[ChannelSet]):
    """The search beside a channel term: batches, and no proof."""

    program: ChannelProgram
    grows = False

    @staticmethod
    def tolerances(asked: float | None) -> tuple[float, float]:
        """Return `TOLERANCE`, and what was asked for."""
        return TOLERANCE, CHANNEL_TOLERANCE if asked is None else asked

    def run(self, restarts: int, seed: int) -> None:
        """Exchange batches until they yield little or a limit is reached."""
        if not self.locally_optimal:
            self._exchange_batches(max(1, round(LARGEST_SHARE * int(self.kept.keep.sum()))))

    def _singles(self, most: int) -> tuple[Tensor, Tensor]:
        inside, outside = self.kept.keep.nonzero().squeeze(1), (~self.kept.keep).nonzero().squeeze(1)
        if self.support is not None:
            everywhere = torch.full((self.program.n,), torch.inf, dtype=torch.float64, device=inside.device)
            costs, gains = everywhere.clone(), torch.full_like(everywhere, -1.0)
            costs[inside] = self.program.costs(self.kept)
            gains[outside] = self.program.gains(self.kept)
            return paired_inside(costs, gains, most, self.support)
        size = min(most, len(inside), len(outside))
        costs, leaving = self.program.costs(self.kept).topk(size, largest=False)
        gains, entering = self.program.gains(self.kept).topk(size)
        better = int((gains > costs).sum())
        return inside[leaving[:better]], outside[entering[:better]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Core:
    """The few weights `index` (c,) of a large block whose fate is open, the others eliminated exactly.

    `keep` (c,) are those kept now; `problem` is ``min 1/2 u.H u - l.u`` over u with as many non-zeros: the
    large program where the other weights stay kept or pruned.
    """

    index: Tensor
    keep: Tensor
    problem: BlockProblem


def open_core(program: JointProgram, kept: KeptSet, scores: Scores, size: int = CORE) -> Core:
    """Return the kept weights that cost least and the pruned ones that gain most, as a dense block.

    With K' the other kept weights, ``H = damping (I + R_C^T M_K'^-1 R_C)`` and ``l = damping h_C``, the
    Schur complement and its right-hand side. O(m^2 (c + m) + m n).
    """
    half = size // 2
    leaving = scores.costs.topk(min(half, int(kept.keep.sum())), largest=False).indices
    entering = scores.gains.topk(min(half, int((~kept.keep).sum()))).indices
    index = torch.cat([leaving, entering])
    rest = program.exchanged(kept, leaving, leaving[:0])
    columns = program.rows.index_select(1, index).double()
    hessian = program.damping * (columns.T @ torch.cholesky_solve(columns, rest.factor))
    linear = program.damping * program.levels(rest)[index]
    problem = BlockProblem(
        weights=torch.zeros(len(index), dtype=torch.float64).numpy(),
        n_prune=len(entering),
        hessian=(0.5 * (hessian + hessian.T)).cpu().numpy(),
        gradient=-linear.cpu().numpy(),
        damping=program.damping,
    )
    return Core(index=index, keep=kept.keep[index], problem=problem)


def restarted_core(core: Core, restarts: int, limits: Limits) -> tuple[Tensor, Tensor]:
    """Run descents of the core from randomly changed sets: which weights then leave and which enter."""
    solution = swap_search(
        core.problem, "joint", limits=limits, incumbent=warm_start(core.keep, "joint"), restarts=restarts
    )
    assert solution.keep is not None
    keep = torch.tensor(solution.keep, device=core.index.device)
    return core.index[core.keep & ~keep], core.index[~core.keep & keep]
