"""Every swap that improves a large selection program, without forming all pairs.

With ``B_i = R_i w_i`` the change of a swap is ``p_i + q_j - B_i.B_j``. For any orthonormal U,

    B_i.B_j <= (U^T B_i).(U^T B_j) + |B_i - U U^T B_i| |B_j - U U^T B_j|        (Cauchy-Schwarz)

so a pair whose right-hand side leaves the change above the threshold is discarded with proof. U
spans the leading directions of a sample of columns: gradient rows have a fast-decaying spectrum,
and a few dozen directions leave a vanishing share of the pairs to be computed exactly.

Pruned weights are taken in order of their cost, a chunk at a time. The pairs that the bounds leave are
computed one by one where a weight has few of them, and as a table over all kept weights where it has many.
Only the best are remembered, so that memory does not depend on how many there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbs_opt.select.selection_program.program import TUNING, SelectionProgram, SwapTuning
from formulations.compiled import INDICES, MATRIX, REAL, VECTOR, compiled, entry, kept_on_disk

Reals: TypeAlias = NDArray[np.float64]
Singles: TypeAlias = NDArray[np.float32]

COARSE = 16
"""Directions tested first; the rest only for pairs that pass."""
DIRECTIONS = 64
"""Directions in all."""
SAMPLE = 4_096
"""Columns that U is fitted to. Any U gives valid bounds; a good one gives tight bounds."""
POWER_ITERATIONS = 2
"""Subspace iterations towards the leading directions."""
SLACK = 1e-5
"""Rounding allowance of the float32 bound, relative to ``|B_i| |B_j|``."""
GROUP = 32
"""Kept weights that are tested together first."""
GROUPS_A_STRIP = 16
"""Groups of similar norm that are told apart by cost."""
TABLE = 1 << 22
"""Entries of a table of bounds on devices without the compiled kernel."""


def columns_at_once(program: SelectionProgram, cells: int) -> int:
    """Return how many columns of `program` make up `cells` entries."""
    return max(1, cells // max(1, program.hessian.data.shape[0]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Coordinates of every column: norms (n,), (n, d) leading ones in float32, (n, 2) remainders.

    ``remainder[:, 0]`` is what is left outside the first `COARSE` directions, ``[:, 1]`` outside all of them.
    """

    norm: Tensor
    coordinates: Tensor
    remainder: Tensor


def project(program: SelectionProgram, squares: Tensor, seed: int, tuning: SwapTuning = TUNING) -> Projection:
    """Project the columns of a program with rows on their leading directions; O(m n d).

    `squares` (n,) are the squared norms of the columns in float64.
    """
    step = columns_at_once(program, tuning.cells)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(program.n, generator=generator)[: min(SAMPLE, 2 * step)].to(squares.device)
    basis = _leading_directions(program.columns(sample), generator)
    coordinates: list[Tensor] = []
    remainders: list[Tensor] = []
    for index in torch.split(torch.arange(program.n, device=squares.device), step):
        # In float64: the remainder is what is left of a difference, and must not come out too small.
        part = program.columns(index).T @ basis
        coarse = part[:, :COARSE].square().sum(dim=1)
        fine = coarse + part[:, COARSE:].square().sum(dim=1)
        remainders.append(torch.stack([squares[index] - coarse, squares[index] - fine], dim=1))
        coordinates.append(part.float())
    remainder = torch.cat(remainders).clamp_min(0.0).sqrt()
    return Projection(norm=squares.sqrt(), coordinates=torch.cat(coordinates), remainder=remainder)


def _leading_directions(columns: Tensor, generator: torch.Generator) -> Tensor:
    """Return orthonormal leading left singular vectors, (m, d), most energy first, by subspace iteration."""
    width = min(DIRECTIONS, *columns.shape)
    probe = torch.randn(columns.shape[1], width, generator=generator, dtype=torch.float64)
    span = columns @ probe.to(columns)
    for _ in range(POWER_ITERATIONS):
        span = columns @ (columns.T @ torch.linalg.qr(span).Q)
    basis = torch.linalg.qr(span).Q
    rotation = torch.linalg.svd(basis.T @ columns, full_matrices=False).U
    directions: Tensor = torch.linalg.qr(basis @ rotation).Q
    return directions


PairScan: TypeAlias = Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]
"""Looks for partners of pruned weights among the kept ones: ``(rows, threshold) -> (row, into, crowded)``.

Pairs ``(rows[row], into)`` may change the objective by less than the threshold; `row` ascends. `crowded` are
positions in `rows` of weights with more such partners than `SwapTuning.gathered`, none of which is listed.
"""


@dataclass(eq=False)
class _Scan:
    """What a scan knows: `cost` (n,) holds ``p_i`` and ``q_j`` or less, `outside` the partners."""

    projection: Projection
    cost: Tensor
    outside: Tensor
    gathered: int = TUNING.gathered


@dataclass(eq=False)
class CompiledScan(_Scan):
    """`PairScan` on the CPU: groups of partners, then a few directions, then all of them.

    Worst case O(n_keep DIRECTIONS) a weight; with a decaying spectrum most pairs fall to one comparison.
    """

    def __post_init__(self) -> None:
        self.outside = self.outside[_grouped(self.projection.norm[self.outside], self.cost[self.outside])]
        self.right = self._arrays(self.outside)
        starts = np.arange(0, self.outside.numel(), GROUP)
        self.cheapest = np.minimum.reduceat(self.right[0], starts)
        self.longest = np.maximum.reduceat(self.right[1], starts)

    def _arrays(self, index: Tensor) -> tuple[NDArray[Any], ...]:
        seen = self.projection
        return tuple(x[index].numpy() for x in (self.cost, seen.norm, seen.remainder, seen.coordinates))

    def __call__(self, rows: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        most = self.gathered
        chosen = np.empty((rows.numel(), most), dtype=np.int32)
        count = np.empty(rows.numel(), dtype=np.int64)
        _scan_rows(*self._arrays(rows), *self.right, self.cheapest, self.longest, threshold, chosen, count)
        counts = torch.from_numpy(count)
        listed = torch.arange(most)[None, :] < torch.where(counts > most, 0, counts)[:, None]
        row, place = listed.nonzero().unbind(1)
        return row, self.outside[torch.from_numpy(chosen)[row, place].long()], _above(counts, most)


def _above(counts: Tensor, most: int) -> Tensor:
    return (counts > most).nonzero().squeeze(1)


@dataclass(eq=False)
class TorchScan(_Scan):
    """`PairScan` on any device: tables of the bound, `TABLE` entries at a time."""

    def __post_init__(self) -> None:
        rest = self.projection.remainder[:, 1:].float()
        self.wide = torch.cat([self.projection.coordinates, rest], dim=1)

    def __call__(self, rows: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        norm = self.projection.norm
        step = min(rows.numel(), 1024)
        counts = torch.zeros_like(rows)
        pieces: list[Tensor] = []
        for start in range(0, rows.numel(), step):
            left = rows[start : start + step]
            for right in torch.split(self.outside, max(1, TABLE // step)):
                change = self.cost[left][:, None] + self.cost[right][None, :]
                change -= self.wide[left].double() @ self.wide[right].double().T
                change -= SLACK * norm[left][:, None] * norm[right][None, :]
                hits = change < threshold
                counts[start : start + step] += hits.sum(dim=1)
                # A weight already known to have too many partners lists no more of them.
                hits &= (counts[start : start + step] <= self.gathered)[:, None]
                place, partner = hits.nonzero().unbind(1)
                pieces.append(torch.stack([start + place, right[partner]], dim=1))
        pairs = torch.cat(pieces)
        pairs = pairs[counts[pairs[:, 0]] <= self.gathered]
        pairs = pairs[pairs[:, 0].argsort(stable=True)]
        return pairs[:, 0], pairs[:, 1], _above(counts, self.gathered)


def _grouped(norm: Tensor, cost: Tensor) -> Tensor:
    """Return order in which runs of `GROUP` weights have similar norms and similar costs."""
    by_norm = norm.argsort()
    strip = torch.empty_like(by_norm)
    strip[by_norm] = torch.arange(norm.numel()) // (GROUP * GROUPS_A_STRIP)
    return torch.from_numpy(np.lexsort((cost.numpy(), strip.numpy())))


COLUMNS = VECTOR, VECTOR, MATRIX, numba.float32[:, ::1]


@entry(*COLUMNS, *COLUMNS, VECTOR, VECTOR, REAL, numba.int32[:, ::1], INDICES)
@kept_on_disk
@numba.njit(parallel=True, fastmath={"reassoc", "contract"})
def _scan_rows(
    p: Reals,
    p_norm: Reals,
    p_rest: Reals,
    p_along: Singles,
    q: Reals,
    q_norm: Reals,
    q_rest: Reals,
    q_along: Singles,
    cheapest: Reals,
    longest: Reals,
    threshold: float,
    chosen: NDArray[np.int32],
    count: NDArray[np.int64],
) -> None:
    for i in numba.prange(p.shape[0]):
        own = p[i], p_norm[i], p_rest[i], p_along[i]
        count[i] = _scan_row(*own, q, q_norm, q_rest, q_along, cheapest, longest, threshold, chosen[i])


@compiled
def _scan_row(
    p: float,
    p_norm: float,
    p_rest: Reals,
    p_along: Singles,
    q: Reals,
    q_norm: Reals,
    q_rest: Reals,
    q_along: Singles,
    cheapest: Reals,
    longest: Reals,
    threshold: float,
    chosen: NDArray[np.int32],
) -> int:
    """List partners of one pruned weight that no bound excludes; return their number, or one too many."""
    listed = 0
    width = q_along.shape[1]
    coarse = min(COARSE, width)
    scaled = p_norm * (1.0 + SLACK)
    for group in range(cheapest.shape[0]):
        if p + cheapest[group] - scaled * longest[group] >= threshold:
            continue
        for j in range(group * GROUP, min((group + 1) * GROUP, q.shape[0])):
            if p + q[j] - scaled * q_norm[j] >= threshold:
                continue
            slack = SLACK * p_norm * q_norm[j]
            partial = np.float32(0.0)
            for d in range(coarse):
                partial += p_along[d] * q_along[j, d]
            if p + q[j] - partial - p_rest[0] * q_rest[j, 0] - slack >= threshold:
                continue
            for d in range(coarse, width):
                partial += p_along[d] * q_along[j, d]
            if p + q[j] - partial - p_rest[1] * q_rest[j, 1] - slack >= threshold:
                continue
            if listed == chosen.shape[0]:
                return listed + 1
            chosen[listed] = j
            listed += 1
    return listed


@dataclass(frozen=True, kw_only=True, eq=False)
class SwapChanges:
    """Exact changes of the objective by swaps at one set `pruned` (n,), in float64.

    `program` has rows; `image` (m,) is ``z = R (w * y)``.
    """

    program: SelectionProgram
    pruned: Tensor
    image: Tensor
    half_diagonal: Tensor
    linear: Tensor

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

    `out` and `into` (c,) are pruned and kept weights to exchange, the best pair first. If `complete`, every
    pair was examined or excluded by proof; without an improving pair the set is then 1-swap optimal. If
    `crowded`, pairs within reach were too many to list for some weight; no improving one was passed over
    unless better ones are returned. The next sweep should start at `resume`.
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
    *,
    improving: float,
    reach: float,
    start: int = 0,
    deadline: float | None = None,
    tuning: SwapTuning = TUNING,
) -> Pairs:
    """Return pairs (out of P, into P) that improve, and pairs within reach that do not quite.

    `changes` are at a set with at least one weight on either side; `cost` (n,) float64 is ``p_i`` for pruned
    and ``q_j`` for kept weights, or less. Pairs whose change is below `improving` are looked for until
    ``tuning.enough`` are found; those below `reach`, which is no less, that come up on the way are returned
    too. The first `start` pruned weights by rank of their cost are left for the end of the sweep. The
    deadline, a reading of `time.monotonic`, is looked at between chunks and tables.
    O(n_prune n_keep COARSE) for the bounds, O(m) for each pair that they leave. Memory: O(n), of which 4
    DIRECTIONS bytes for each kept weight, and less than 128 MiB beyond.
    """
    inside, outside = changes.pruned.nonzero().squeeze(1), (~changes.pruned).nonzero().squeeze(1)
    start %= inside.numel()
    order = inside[cost[inside].argsort()].roll(-start)
    scan = CompiledScan if tuning.compiled and cost.device.type == "cpu" else TorchScan
    partners = scan(projection, cost, outside, tuning.gathered)
    sweep = _Sweep(changes, partners, outside, improving, reach, deadline, tuning)
    done = 0
    while done < order.numel() and not sweep.over():
        done += sweep.examine(order[done : done + tuning.scan_rows])
    sweep.forget()
    return Pairs(
        out=sweep.pairs[:, 0],
        into=sweep.pairs[:, 1],
        change=sweep.change,
        complete=done == order.numel(),
        crowded=sweep.crowded,
        resume=(start + done) % order.numel(),
    )


@dataclass(eq=False)
class _Sweep:
    """One pass over the pruned weights at a fixed set, and the best pairs so far."""

    changes: SwapChanges
    scan: PairScan
    outside: Tensor
    improving: float
    reach: float
    deadline: float | None
    tuning: SwapTuning
    crowded: bool = False
    number: int = 0

    def __post_init__(self) -> None:
        self.step = columns_at_once(self.changes.program, self.tuning.cells)
        self.pairs = self.outside.new_empty((0, 2))
        self.change = self.changes.linear.new_empty(0)

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
            self.forget()

    def forget(self) -> None:
        """Drop all but the best pairs, and sort them."""
        order = self.change.argsort(stable=True)[: self.tuning.most_pairs]
        self.pairs, self.change = self.pairs[order], self.change[order]
