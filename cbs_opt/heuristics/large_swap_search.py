"""Swap search on one block too large for its Gram matrix: pools of weights, and pairs by proof."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from cbs_opt.heuristics.dense_swaps import swap_dense
from cbs_opt.heuristics.pair_search import Projection, improving_pairs, project
from cbs_opt.heuristics.selection_program import SelectionProgram
from formulations.solution import Limit

POOL = 2_048
"""Weights in a pool."""
NEARLY = 5e-6
"""Pairs that miss an improvement by less than this share of the objective are collected at first."""
POOL_YIELD = 100.0
"""Pools go on while one lowers the objective by this many thresholds; then pairs are searched."""
MOST_PAIRS = 65_536
"""Pairs collected in one search over all pairs, to begin with."""
PARTNERS = 16
"""Pairs collected for one pruned weight, to begin with."""
MAX_SWAPS = 2**31 - 1
ROUNDING = 1e-15
"""No change below this share of the terms that cancel in it can be told from rounding."""
TINY = 1e-300
COST_SLACK = 2e-6
"""Rounding allowance of ``B_i.z`` in single precision, relative to ``|B_i| |z|``."""


def relative_tolerance(program: SelectionProgram, tolerance: float | None) -> float:
    """The relative improvement that counts: as given, else by the precision of the data."""
    if tolerance is not None:
        return tolerance
    return 1e-10 if program.data.dtype == torch.float64 else 1e-7


class LargeSwapSearch:
    """State of one search: the set, its image, and what has been spent."""

    def __init__(
        self,
        program: SelectionProgram,
        start: Tensor,
        tolerance: float | None,
        max_swaps: int | None,
        deadline: float | None,
        seed: int,
    ) -> None:
        self.program = program
        self.pruned = start.clone()
        self.tolerance = relative_tolerance(program, tolerance)
        self.budget = MAX_SWAPS if max_swaps is None else max_swaps
        self.deadline = deadline
        self.seed = seed
        self.linear = program.linear()
        self.half_diagonal = 0.5 * program.diagonal()
        self.image = program.image(self.pruned.double())
        self.value = program.value(self.image, self.pruned.double())
        self.noise = TINY
        self.reach = 0.0
        self.most_pairs, self.partners = MOST_PAIRS, PARTNERS
        self.swaps = 0
        self.locally_optimal = int(start.sum()) in (0, program.n)
        self.limit: Limit | None = None

    def run(self) -> None:
        """Search until no swap helps or a limit is reached."""
        self._check_time()
        if self.limit is None and self.budget == 0:
            self.limit = Limit.ITERATION
        if self.limit is not None:
            return
        if self.program.rows is None:
            self._improve_whole()
            return
        self._improve_by_pools()
        self.reach = NEARLY * abs(self.value)
        projection: Projection | None = None
        while self.limit is None:
            projection = projection or project(self.program, self.seed)
            if not self._improve_by_pairs(projection):
                break
            self._improve_by_pools()

    def exact_value(self) -> float:
        """The objective from a fresh image, free of what the updates have accumulated."""
        return self.program.objective(self.pruned)

    def _threshold(self) -> float:
        # The terms of a change are at most A_ii, |c_i| and, by Cauchy-Schwarz, |v_i| as here.
        largest = 2.0 * float(self.half_diagonal.max())
        curvature = 2.0 * max(0.0, self.value + float(self.linear @ self.pruned.double()))
        terms = largest + float(self.linear.abs().max()) + math.sqrt(largest * curvature)
        return max(self.tolerance * abs(self.value), ROUNDING * terms, self.noise)

    def _costs(self) -> Tensor:
        """``p_i`` of pruned and ``q_j`` of kept weights, (n,)."""
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
            cost = self._costs()
            before = self.value
            self._improve_within(self._cheapest(cost), precise=False)
            if before - self.value <= POOL_YIELD * self._threshold():
                return
            self._check_time()

    def _cheapest(self, cost: Tensor) -> Tensor:
        picks = []
        for side in (self.pruned, ~self.pruned):
            masked = torch.where(side, cost, torch.inf)
            picks.append(masked.topk(min(POOL // 2, int(side.sum())), largest=False).indices)
        return torch.cat(picks)

    def _improve_by_pairs(self, projection: Projection) -> bool:
        """Swap within pools of paired weights; False once no pair is left, or a limit is reached.

        Pairs that just fail to improve alone often do once their neighbours have moved, so the
        search reaches a little beyond the threshold.
        """
        reach = max(self.reach, -self._threshold())
        out, into, change, complete = improving_pairs(
            self._change,
            projection,
            self._costs() - self._cost_error(projection),
            self.pruned,
            reach,
            self.most_pairs,
            self.partners,
        )
        if complete and not bool((change < -self._threshold()).any()):
            self.locally_optimal = True
            return False
        at_first = self.swaps
        for start in range(0, out.numel(), POOL // 2):
            before = self.swaps
            part = slice(start, start + POOL // 2)
            pool = torch.unique(torch.cat([out[part], into[part]]))
            self._improve_within(pool)
            self._check_time()
            if self.limit is not None:
                return False
            if self.swaps == before:
                break
        if self.swaps == at_first and bool((change < -self._threshold()).any()):
            self.noise = 2.0 * -float(change[0])  # tried, and nothing came of it but rounding
        self._adapt_reach(reach, out.numel(), complete)
        return True

    def _cost_error(self, projection: Projection) -> Tensor | float:
        """What `_costs` may be too high by where the product with the rows is not in float64."""
        if self.program.data.dtype == torch.float64:
            return 0.0
        return COST_SLACK * float(self.image.norm()) * projection.norm

    def _adapt_reach(self, reach: float, found: int, complete: bool) -> None:
        """Ask for fewer pairs after an incomplete search, for more after a meagre one."""
        if complete:
            self.reach = 4.0 * reach if reach > 0.0 and found < 2 * POOL else reach
        elif reach > 0.0:
            self.reach = reach / 4.0 if reach > self._threshold() else -torch.inf
        else:
            self.most_pairs *= 8
            self.partners *= 8

    def _change(self, out: Tensor, into: Tensor) -> Tensor:
        """Change of the objective for each swap ``(out, into)``, (c,), in float64."""
        left, right = self.program.columns(out), self.program.columns(into)
        y = self.pruned.double()
        slope_out = self.program.product_at(out, self.image, y) - self.linear[out]
        slope_into = self.program.product_at(into, self.image, y) - self.linear[into]
        own = self.half_diagonal[out] + self.half_diagonal[into]
        return own - slope_out + slope_into - (left * right).sum(dim=0)

    def _improve_within(self, pool: Tensor, *, precise: bool = True) -> None:
        """Best-improvement swaps among `pool`, then bring the image up to date."""
        program = self.program
        before = self.pruned[pool]
        after = before.clone()
        counts = swap_dense(
            program.gram(pool, precise=precise)[None],
            program.product_at(pool, self.image, self.pruned.double())[None],
            self.linear[pool][None],
            after[None],
            torch.tensor([self._threshold()], dtype=torch.float64, device=pool.device),
            torch.tensor([self.budget - self.swaps], device=pool.device),
        )
        if not bool(counts.locally_optimal):
            self.limit = Limit.ITERATION
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
            self.swaps += int(counts.swaps)

    def _check_time(self) -> None:
        if self.limit is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.limit = Limit.TIME
