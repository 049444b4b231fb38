"""Swap search on the selection program, from small dense blocks to whole networks.

Small blocks are searched at once on their Gram matrix. A large block alternates between two moves
until neither finds anything: best-improvement swaps within a pool of the most promising weights
(their Gram matrix is small, and one product with the rows brings ``v = A y`` up to date for all),
and a search over all pairs that discards most of them with proof (`pair_search`). When the second
comes back empty the set is a proved 1-swap optimum of the whole block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbs_opt.hessian.on_demand import chosen
from cbs_opt.hessian.products import double_chunks
from cbs_opt.select.choice import NO_JOURNAL, SearchJournal, SearchResult
from cbs_opt.select.selection_program import pair_search
from cbs_opt.select.selection_program.dense import swap_dense
from cbs_opt.select.selection_program.program import TUNING, SelectionProgram, SwapTuning
from formulations.solution import Limit

NEARLY = 5e-6
"""Pairs that miss an improvement by less than this share of the objective are collected at first."""
POOL_YIELD = 100.0
"""Pools go on while one lowers the objective by this many thresholds; then pairs are searched."""
FRESH_SHARE = 1e-6
"""The image is computed anew at the end where its square has shrunk below this share."""
MAX_SWAPS = 2**31 - 1
ROUNDING = 1e-15
"""No change below this share of the terms that cancel in it can be told from rounding."""
TINY = 1e-300
STATE = (
    *("pruned", "image", "value", "initial", "initial_square", "noise", "reach"),
    *("resume", "swaps", "moved", "pooling", "paired"),
)
"""What changes while a large block is searched, or is that of its start."""
COST_SLACK = 2e-6
"""Rounding allowance of ``B_i.z`` in single precision, relative to ``|B_i| |z|``."""


def relative_tolerance(program: SelectionProgram, tolerance: float | None) -> float:
    """Return the relative improvement that counts: as given, else by the precision of the data."""
    if tolerance is not None:
        return tolerance
    return 1e-10 if program.precision == torch.float64 else 1e-7


def swap_search(program: SelectionProgram, start: Tensor, **options: Any) -> SearchResult:
    """Return `swap_search_batch` of one block, with its options."""
    return swap_search_batch([program], [start], **options)[0]


def swap_search_batch(
    programs: Sequence[SelectionProgram],
    starts: Sequence[Tensor],
    *,
    tolerance: float | None = None,
    max_swaps: int | None = None,
    deadline: float | None = None,
    seed: int = 0,
    tuning: SwapTuning = TUNING,
    journal_of: Callable[[int], SearchJournal] = lambda number: NO_JOURNAL,
) -> list[SearchResult]:
    """Improve kept sets by best-improvement swaps until none helps, equal small blocks side by side.

    The starts are the weights kept, (n,) bool each. A swap counts if it lowers the objective by more than
    ``tolerance * |objective|``, by default 1e-10 for float64 rows and 1e-7 for lower precision. A large block
    looks at the deadline, a reading of `time.monotonic`, every second or so; small blocks are searched to the
    end once begun. The seed is that of the column sample that the pair search fits its directions to.
    `journal_of` the number of a large block has its state, and a search goes on from the one that it has.

    The results are never worse than the starts; the seconds of a batch are spread evenly.
    Memory beyond the rows: O(n), and less than 256 MiB for pools and pairs. Source of the move: Yu et al.
    (ICML 2022), section 4.
    """
    options = _Options(tolerance, MAX_SWAPS if max_swaps is None else max_swaps, deadline, seed, tuning)
    results: dict[int, SearchResult] = {}
    groups: dict[tuple[int, torch.device], list[int]] = {}
    for number, (n, device) in enumerate([(program.n, program.weights.device) for program in programs]):
        if n <= tuning.dense_limit:
            groups.setdefault((n, device), []).append(number)
        else:
            search = _LargeSearch(programs[number], starts[number], options, journal_of(number))
            results[number] = search.result()
    for (n, _), members in groups.items():
        size = max(1, tuning.batch_bytes // (8 * max(1, n) ** 2))
        for first in range(0, len(members), size):
            batch = members[first : first + size]
            ends = _search_dense(chosen(programs, batch), [starts[i] for i in batch], options)
            results.update(zip(batch, ends, strict=True))
    return [results[number] for number in range(len(programs))]


class _Options(NamedTuple):
    """Those of `swap_search_batch`."""

    tolerance: float | None
    max_swaps: int
    deadline: float | None
    seed: int
    tuning: SwapTuning

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def _search_dense(
    programs: Sequence[SelectionProgram], starts: Sequence[Tensor], options: _Options
) -> list[SearchResult]:
    """Search blocks of one size at once, each on its Gram matrix; one block's rows are in use at a time."""
    began = time.monotonic()
    n, device = programs[0].n, programs[0].weights.device
    everything = torch.arange(n, device=device)
    gram = torch.empty(len(programs), n, n, dtype=torch.float64, device=device)
    for matrix, program in zip(gram, programs, strict=True):
        matrix.copy_(program.gram(everything))
    linear = torch.stack([program.linear() for program in programs])
    pruned = ~torch.stack(list(starts))
    product = torch.einsum("bij,bj->bi", gram, pruned.double())
    relative = torch.tensor([relative_tolerance(program, options.tolerance) for program in programs])
    expired = options.expired
    most = 0 if expired else options.max_swaps
    budget = torch.full((len(programs),), most, dtype=torch.int64, device=device)
    terms = torch.diagonal(gram, dim1=1, dim2=2).amax(1) + linear.abs().amax(1)
    swaps = torch.zeros_like(budget)
    while True:
        # The threshold follows the objective down, so a pass that moves nothing ends it.
        value = 0.5 * (product * pruned).sum(1) - (linear * pruned).sum(1)
        rounding = ROUNDING * (terms + product.abs().amax(1)) + TINY
        threshold = torch.maximum(relative.to(value) * value.abs(), rounding)
        counts = swap_dense(
            gram, product, linear, pruned, threshold, budget - swaps, compiled=options.tuning.compiled
        )
        swaps += counts.swaps
        if not bool((counts.locally_optimal & (counts.swaps > 0)).any()):
            break
    share = (time.monotonic() - began) / len(programs)
    limit = Limit.TIME if expired else Limit.ITERATION
    results = []
    for b, program in enumerate(programs):
        settled = bool(counts.locally_optimal[b])
        result = SearchResult(
            initial_value=program.objective(starts[b]),
            keep=~pruned[b],
            value=program.objective(~pruned[b]),
            swaps=int(swaps[b]),
            locally_optimal=settled,
            limit=None if settled else limit,
            seconds=share,
        )
        results.append(_never_worse(starts[b], result))
    return results


def _never_worse(start: Tensor, result: SearchResult) -> SearchResult:
    """Return the start where the end is above it, by rounding only."""
    if not result.value > result.initial_value:
        return result
    return replace(result, keep=start.clone(), value=result.initial_value, swaps=0, locally_optimal=False)


class _LargeSearch:
    """State of one search on a block too large for its Gram matrix: pools of weights, and pairs by proof."""

    def __init__(
        self, program: SelectionProgram, keep: Tensor, options: _Options, journal: SearchJournal
    ) -> None:
        self.began = time.monotonic()
        self.program, self.options, self.tuning = program, options, options.tuning
        self.start, self.pruned = keep, ~keep
        self.tolerance = relative_tolerance(program, options.tolerance)
        self.linear = program.linear()
        self._read_data()
        self.initial_square = float(self.image.square().sum())
        self.value = self.initial = program.value(self.image, self.pruned.double())
        self.noise, self.reach = TINY, 0.0
        self.resume = self.swaps = self.moved = 0
        self.locally_optimal = int(keep.sum()) in (0, program.n)
        self.limit: Limit | None = None
        self.pooling, self.paired = True, False
        self.journal = journal
        for name, value in journal.recall().items():
            setattr(self, name, value)

    def _keep(self) -> None:
        """Put down all that changes on the way."""
        self.journal.keep({name: getattr(self, name) for name in STATE})

    def result(self) -> SearchResult:
        """Search until no swap helps or a limit is reached; never worse than the start."""
        if not self.locally_optimal:
            phase = self.journal.progress.phase("exchanges", unit="swap", done=self.swaps)
            with phase as self._advance:
                self._run()
        return _never_worse(
            self.start,
            SearchResult(
                keep=~self.pruned,
                value=self._exact_value(),
                initial_value=self.initial,
                swaps=self.swaps,
                locally_optimal=self.locally_optimal,
                limit=self.limit,
                seconds=time.monotonic() - self.began,
            ),
        )

    def _run(self) -> None:
        self._check_time()
        if self.limit is None and self.options.max_swaps == 0:
            self.limit = Limit.ITERATION
        if not self.program.hessian.by_rows:
            self._improve_whole()
            return
        projection: pair_search.Projection | None = None
        while True:
            if self.pooling:
                self._improve_by_pools()
            if not self.paired:
                self.reach = NEARLY * abs(self.value)
            if self.limit is not None:
                return
            self.pooling, self.paired = False, True
            self._keep()
            projection = projection or pair_search.project(
                self.program, self.squares, self.options.seed, self.tuning
            )
            if not self._improve_by_pairs(projection):
                return
            self.pooling = True

    def _exact_value(self) -> float:
        """Return the objective, from a fresh image where updates may have left more rounding.

        An update adds a column for each weight that moved, a fresh image one for each pruned weight.
        """
        square = float(self.image.square().sum())
        if self.moved <= int(self.pruned.sum()) and square >= FRESH_SHARE * self.initial_square:
            return self.value
        return self.program.objective(~self.pruned)

    def _read_data(self) -> None:
        """Take the image, the diagonal and squared norms of the columns, in one pass over the rows."""
        program = self.program
        x = program.weights.double() * self.pruned
        if not program.hessian.by_rows:
            self.image = program.image(self.pruned.double())
            self.half_diagonal = 0.5 * program.diagonal()
            return
        squares, image = torch.zeros_like(x), []
        for part in double_chunks(program.hessian.data):
            image.append(part @ x)
            squares += part.square().sum(dim=0)
        self.image = torch.cat(image) if image else x.new_zeros(0)
        self.squares = squares * program.weights.double().square()
        self.half_diagonal = 0.5 * (self.squares + program.damping * program.weights.double().square())

    def _threshold(self) -> float:
        # The terms of a change are at most A_ii, |c_i| and, by Cauchy-Schwarz, |v_i| as here.
        largest = 2.0 * float(self.half_diagonal.max())
        curvature = 2.0 * max(0.0, self.value + float(self.linear @ self.pruned.double()))
        terms = largest + float(self.linear.abs().max()) + math.sqrt(largest * curvature)
        return max(self.tolerance * abs(self.value), ROUNDING * terms, self.noise)

    def _costs(self) -> Tensor:
        """Return ``p_i`` of pruned and ``q_j`` of kept weights, (n,)."""
        slope = self.program.product(self.image, self.pruned.double()) - self.linear
        return self.half_diagonal + torch.where(self.pruned, -slope, slope)

    def _improve_whole(self) -> None:
        """Swap on the whole Gram matrix; again while the threshold follows the objective down."""
        everything = torch.arange(self.program.n, device=self.pruned.device)
        while self.limit is None:
            before = self.swaps
            self._improve_within(everything)
            if self.limit is None and self.swaps == before:
                self.locally_optimal = True
                return
            self._check_time()

    def _improve_by_pools(self) -> None:
        """Swap within pools of the cheapest weights until a pool yields nothing."""
        while self.limit is None:
            self._keep()
            before = self.value
            self._improve_within(self._cheapest(self._costs()), precise=False)
            if before - self.value <= POOL_YIELD * self._threshold():
                return
            self._check_time()

    def _cheapest(self, cost: Tensor) -> Tensor:
        picks = []
        for side in (self.pruned, ~self.pruned):
            masked = torch.where(side, cost, torch.inf)
            picks.append(masked.topk(min(self.tuning.pool // 2, int(side.sum())), largest=False).indices)
        return torch.cat(picks)

    def _improve_by_pairs(self, projection: pair_search.Projection) -> bool:
        """Swap within pools of paired weights; False once no pair is left, or a limit is reached.

        Pairs that just fail to improve alone often do once their neighbours have moved, so the
        search reaches a little beyond the threshold.
        """
        improving = -self._threshold()
        reach = max(self.reach, improving)
        pairs = pair_search.improving_pairs(
            pair_search.SwapChanges(
                program=self.program,
                pruned=self.pruned,
                image=self.image,
                half_diagonal=self.half_diagonal,
                linear=self.linear,
            ),
            projection,
            self._costs() - self._cost_error(projection),
            improving=improving,
            reach=reach,
            start=self.resume,
            deadline=self.options.deadline,
            tuning=self.tuning,
        )
        self.resume = pairs.resume
        improves = bool((pairs.change < improving).any())
        if pairs.complete and not improves:
            self.locally_optimal = True
            return False
        self._check_time()
        at_first = self.swaps
        for start in range(0, pairs.out.numel(), self.tuning.pool // 2):
            if self.limit is not None:
                return False
            before = self.swaps
            part = slice(start, start + self.tuning.pool // 2)
            self._improve_within(torch.unique(torch.cat([pairs.out[part], pairs.into[part]])))
            self._check_time()
            if self.swaps == before:
                break
        if self.limit is None and self.swaps == at_first and improves:
            self.noise = 2.0 * -float(pairs.change[0])  # tried, and nothing came of it but rounding
        self._adapt_reach(reach, pairs)
        return self.limit is None

    def _cost_error(self, projection: pair_search.Projection) -> Tensor | float:
        """Return what `_costs` may be too high by where the product with the rows is not in float64."""
        if self.program.precision == torch.float64:
            return 0.0
        return COST_SLACK * float(self.image.norm()) * projection.norm

    def _adapt_reach(self, reach: float, pairs: pair_search.Pairs) -> None:
        """Set the reach: less far after a crowded sweep, or one cut short; further after a meagre one."""
        if reach <= 0.0:
            return
        if pairs.complete and not pairs.crowded:
            self.reach = 4.0 * reach if pairs.out.numel() < 2 * self.tuning.pool else reach
        else:
            self.reach = reach / 4.0 if reach > self._threshold() else -torch.inf

    def _improve_within(self, pool: Tensor, *, precise: bool = True) -> None:
        """Make best-improvement swaps among `pool`, then bring the image up to date."""
        program = self.program
        before, after = self.pruned[pool], self.pruned[pool]
        swaps = self._swap_dense(pool, after, precise=precise)
        moved = (after != before).nonzero().squeeze(1)
        if moved.numel() == 0:
            return
        step = after[moved].double() - before[moved].double()
        image = self.image + program.columns(pool[moved]) @ step
        pruned = self.pruned.clone()
        pruned[pool] = after
        value = program.value(image, pruned.double())
        if value < self.value:  # rounding in the Gram matrix may promise what is not there
            self.image, self.pruned, self.value = image, pruned, value
            self.swaps += swaps
            self.moved += moved.numel()
            self._advance(swaps)

    def _swap_dense(self, pool: Tensor, pruned: Tensor, *, precise: bool) -> int:
        """Swap on the Gram matrix of `pool`, in place on its part of the set, to an optimum or a limit."""
        program = self.program
        gram = program.gram(pool, precise=precise)[None]
        product = program.product_at(pool, self.image, self.pruned.double())[None]
        threshold = torch.tensor([self._threshold()], dtype=torch.float64, device=pool.device)
        swaps = 0
        while True:
            left = self.options.max_swaps - self.swaps - swaps
            most = left if self.options.deadline is None else min(left, self.tuning.swaps_a_look)
            counts = swap_dense(
                gram,
                product,
                self.linear[pool][None],
                pruned[None],
                threshold,
                torch.tensor([most], device=pool.device),
                compiled=self.tuning.compiled,
            )
            swaps += int(counts.swaps)
            if bool(counts.locally_optimal):
                return swaps
            if most == left:
                self.limit = Limit.ITERATION
            self._check_time()
            if self.limit is not None:
                return swaps

    def _check_time(self) -> None:
        if self.limit is None and self.options.expired:
            self.limit = Limit.TIME
