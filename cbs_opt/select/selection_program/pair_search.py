"""Every swap that improves a large selection program, without forming all pairs.

Pruned weights are taken in order of their cost, a chunk at a time. Bounds exclude most of their
partners (`pair_scan`); the change of the pairs that are left is computed exactly, one by one where
a weight has few of them and as a table over all kept weights where it has many. Only the best pairs
are remembered, so that memory does not depend on how many there are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.select.selection_program.pair_scan import PairScan, Projection, columns_at_once, pair_scan
from cbs_opt.select.selection_program.program import SelectionProgram
from cbs_opt.select.selection_program.tuning import TUNING, SwapTuning


class SwapChanges:
    """Exact changes of the objective by swaps at one pruned set, in float64.

    Parameters
    ----------
    program : SelectionProgram
        With rows.
    image : (m,) float64 tensor
        ``z = R (w * y)``.
    half_diagonal, linear : (n,) float64 tensors
    """

    def __init__(
        self, program: SelectionProgram, image: Tensor, half_diagonal: Tensor, linear: Tensor
    ) -> None:
        self.program, self.image = program, image
        self.half_diagonal, self.linear = half_diagonal, linear

    def leaving(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return columns of pruned weights, (m, p), and ``p_i``, (p,)."""
        columns = self.program.columns(index)
        damped = self.program.damping * self.program.weights[index].double().square()
        slope = columns.T @ self.image + damped - self.linear[index]
        return columns, self.half_diagonal[index] - slope

    def entering(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return columns of kept weights, (m, p), and ``q_j``, (p,)."""
        columns = self.program.columns(index)
        return columns, self.half_diagonal[index] + columns.T @ self.image - self.linear[index]

    def of(self, out: Tensor, into: Tensor) -> Tensor:
        """Return change by each swap ``(out, into)``, (c,); O(m c)."""
        left, p = self.leaving(out)
        right, q = self.entering(into)
        return p + q - (left * right).sum(dim=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """What a sweep over all pairs found.

    Attributes
    ----------
    out, into : (c,) int64 tensors
        Pruned and kept weights to exchange, best pair first.
    change : (c,) float64 tensor
    complete : bool
        Every pair was examined or excluded by proof; without an improving pair the set is then
        1-swap optimal.
    crowded : bool
        Pairs within reach were too many to list for some weight; no improving one was passed over
        unless better ones are returned.
    resume : int
        Where the next sweep should start.
    """

    out: Tensor
    into: Tensor
    change: Tensor
    complete: bool
    crowded: bool
    resume: int


def improving_pairs(
    changes: SwapChanges,
    projection: Projection,
    cost: Tensor,
    pruned: Tensor,
    *,
    improving: float,
    reach: float,
    start: int = 0,
    deadline: float | None = None,
    tuning: SwapTuning = TUNING,
) -> Pairs:
    """Return pairs (out of P, into P) that improve, and pairs within reach that do not quite.

    Parameters
    ----------
    changes : SwapChanges
        At the set `pruned`.
    projection : Projection
        From `project`.
    cost : (n,) float64 tensor
        ``p_i`` for pruned and ``q_j`` for kept weights, or less.
    pruned : (n,) bool tensor
        With at least one weight on either side.
    improving : float
        Pairs whose change is below it are looked for until ``tuning.enough`` are found.
    reach : float
        At least `improving`; pairs below it that come up on the way are returned as well.
    start : int, default 0
        Pruned weights, by rank of their cost, that are left for the end of the sweep.
    deadline : float, optional
        Reading of `time.monotonic`; looked at between chunks and tables.
    tuning : SwapTuning

    Returns
    -------
    Pairs

    Notes
    -----
    O(n_prune n_keep COARSE) for the bounds, O(m) for each pair that they leave. Memory: O(n), of
    which 4 DIRECTIONS bytes for each kept weight, and less than 128 MiB beyond.
    """
    inside, outside = pruned.nonzero().squeeze(1), (~pruned).nonzero().squeeze(1)
    start %= inside.numel()
    order = inside[cost[inside].argsort()].roll(-start)
    scan = pair_scan(projection, cost, outside, tuning)
    sweep = _Sweep(changes, scan, outside, improving, reach, deadline, tuning)
    done = 0
    while done < order.numel() and not sweep.over():
        done += sweep.examine(order[done : done + tuning.scan_rows])
    out, into, change = sweep.best()
    return Pairs(
        out=out,
        into=into,
        change=change,
        complete=done == order.numel(),
        crowded=sweep.crowded,
        resume=(start + done) % order.numel(),
    )


class _Sweep:
    """One pass over the pruned weights at a fixed set, and the best pairs so far."""

    def __init__(
        self,
        changes: SwapChanges,
        scan: PairScan,
        outside: Tensor,
        improving: float,
        reach: float,
        deadline: float | None,
        tuning: SwapTuning,
    ) -> None:
        self.changes, self.scan, self.outside = changes, scan, outside
        self.improving, self.reach, self.deadline, self.tuning = improving, reach, deadline, tuning
        self.step = columns_at_once(changes.program, tuning.cells)
        self.crowded = False
        self.number = 0
        self.pairs = outside.new_empty((0, 2))
        self.change = changes.linear.new_empty(0)

    def over(self) -> bool:
        """Return whether enough improving pairs are in hand, or the time is up."""
        return self.number >= self.tuning.enough or self._late()

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def examine(self, rows: Tensor) -> int:
        """Examine all pairs of pruned weights `rows`; how many of them were finished, from the first."""
        row, into, crowded = self.scan(rows, self.reach)
        if crowded.numel() > 0:
            # Near misses are welcome, not needed: of these weights only improving pairs are listed.
            self.crowded = True
            again, partner, still = self.scan(rows[crowded], self.improving)
            row, into = torch.cat([row, crowded[again]]), torch.cat([into, partner])
            order = row.argsort(stable=True)
            row, into, crowded = row[order], into[order], crowded[still]
        first_crowded = int(crowded[0]) if crowded.numel() > 0 else rows.numel()
        for start in range(0, row.numel(), self.step):
            if self.over():
                return min(int(row[start]), first_crowded)
            part = slice(start, start + self.step)
            out = rows[row[part]]
            self._remember(out, into[part], self.changes.of(out, into[part]))
        for start in range(0, crowded.numel(), self.tuning.table_rows):
            batch = rows[crowded[start : start + self.tuning.table_rows]]
            if self.over() or not self._examine_table(batch):
                return int(crowded[start])
        return rows.numel()

    def _examine_table(self, out: Tensor) -> bool:
        """Examine `out` against all kept weights; False if the time did not suffice."""
        best_of = self.tuning.partners
        for some in torch.split(out, self.step):
            left, p = self.changes.leaving(some)
            values = p.new_full((some.numel(), best_of), torch.inf)
            partners = some.new_zeros((some.numel(), best_of))
            for into in torch.split(self.outside, min(self.step, self.tuning.table_columns)):
                if self._late():
                    return False
                right, q = self.changes.entering(into)
                table = torch.addmm(p[:, None] + q[None, :], left.T, right, alpha=-1.0)
                hit = (table.amin(dim=1) < self.reach).nonzero().squeeze(1)
                best = table[hit].topk(min(best_of, into.numel()), dim=1, largest=False)
                both = torch.cat([values[hit], best.values], dim=1)
                names = torch.cat([partners[hit], into[best.indices]], dim=1)
                values[hit], place = both.topk(best_of, dim=1, largest=False)
                partners[hit] = names.gather(1, place)
            self._remember(some.repeat_interleave(best_of), partners.flatten(), values.flatten())
        return True

    def _remember(self, out: Tensor, into: Tensor, change: Tensor) -> None:
        self.number += int((change < self.improving).sum())
        within = change < self.reach
        self.pairs = torch.cat([self.pairs, torch.stack([out[within], into[within]], dim=1)])
        self.change = torch.cat([self.change, change[within]])
        if self.change.numel() > 2 * self.tuning.most_pairs:
            self._forget()

    def _forget(self) -> None:
        """Drop all but the best pairs, and sort them."""
        order = self.change.argsort(stable=True)[: self.tuning.most_pairs]
        self.pairs, self.change = self.pairs[order], self.change[order]

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best pairs, best first: ``out``, ``into`` and their changes."""
        self._forget()
        return self.pairs[:, 0], self.pairs[:, 1], self.change
