"""Pairs of weights whose swap no bound excludes.

With ``B_i = R_i w_i`` the change of a swap is ``p_i + q_j - B_i.B_j``. For any orthonormal U,

    B_i.B_j <= (U^T B_i).(U^T B_j) + |B_i - U U^T B_i| |B_j - U U^T B_j|        (Cauchy-Schwarz)

so a pair whose right-hand side leaves the change above the threshold is discarded with proof. U
spans the leading directions of a sample of columns: gradient rows have a fast-decaying spectrum,
and a few dozen directions leave a vanishing share of the pairs to be computed exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbs_opt.select.selection_program.program import SelectionProgram
from cbs_opt.select.selection_program.tuning import TUNING, SwapTuning
from formulations.compiled import INDICES, MATRIX, REAL, VECTOR, compiled, entry, kept_on_disk

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

    ``remainder[:, 0]`` is what is left outside the first `COARSE` directions, ``[:, 1]`` outside
    all of them.
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


class PairScan(Protocol):
    """Looks for partners among the kept weights."""

    def __call__(self, rows: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return pairs ``(rows[row], into)`` that may change the objective by less than `threshold`.

        Returns ``row`` in ascending order, ``into``, and `crowded`: positions in `rows` of weights
        with more such partners than `SwapTuning.gathered`, none of which is listed.
        """
        ...


def pair_scan(projection: Projection, cost: Tensor, outside: Tensor, tuning: SwapTuning = TUNING) -> PairScan:
    """Return the scan of the device over partners `outside`, at costs ``p_i``, ``q_j`` or less, (n,)."""
    scan = CompiledScan if tuning.compiled and cost.device.type == "cpu" else TorchScan
    return scan(projection, cost, outside, tuning.gathered)


class CompiledScan:
    """`PairScan` on the CPU: groups of partners, then a few directions, then all of them.

    Worst case O(n_keep DIRECTIONS) a weight; with a decaying spectrum most pairs fall to one
    comparison.
    """

    def __init__(
        self, projection: Projection, cost: Tensor, outside: Tensor, gathered: int = TUNING.gathered
    ) -> None:
        self.projection, self.cost, self.gathered = projection, cost, gathered
        self.outside = outside[_grouped(projection.norm[outside], cost[outside])]
        self.right = self._arrays(self.outside)
        starts = np.arange(0, outside.numel(), GROUP)
        self.cheapest = np.minimum.reduceat(self.right[0], starts)
        self.longest = np.maximum.reduceat(self.right[1], starts)

    def _arrays(self, index: Tensor) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        return (
            self.cost[index].numpy(),
            self.projection.norm[index].numpy(),
            self.projection.remainder[index].numpy(),
            self.projection.coordinates[index].numpy(),
        )

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


class TorchScan:
    """`PairScan` on any device: tables of the bound, `TABLE` entries at a time."""

    def __init__(
        self, projection: Projection, cost: Tensor, outside: Tensor, gathered: int = TUNING.gathered
    ) -> None:
        self.projection, self.cost, self.outside = projection, cost, outside
        self.gathered = gathered
        self.wide = torch.cat([projection.coordinates, projection.remainder[:, 1:].float()], dim=1)

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


@entry(
    VECTOR,
    VECTOR,
    MATRIX,
    numba.float32[:, ::1],
    VECTOR,
    VECTOR,
    MATRIX,
    numba.float32[:, ::1],
    VECTOR,
    VECTOR,
    REAL,
    numba.int32[:, ::1],
    INDICES,
)
@kept_on_disk
@numba.njit(parallel=True, fastmath={"reassoc", "contract"})
def _scan_rows(
    p: NDArray[np.float64],
    p_norm: NDArray[np.float64],
    p_rest: NDArray[np.float64],
    p_coordinates: NDArray[np.float32],
    q: NDArray[np.float64],
    q_norm: NDArray[np.float64],
    q_rest: NDArray[np.float64],
    q_coordinates: NDArray[np.float32],
    cheapest: NDArray[np.float64],
    longest: NDArray[np.float64],
    threshold: float,
    chosen: NDArray[np.int32],
    count: NDArray[np.int64],
) -> None:
    for i in numba.prange(p.shape[0]):
        count[i] = _scan_row(
            p[i],
            p_norm[i],
            p_rest[i],
            p_coordinates[i],
            q,
            q_norm,
            q_rest,
            q_coordinates,
            cheapest,
            longest,
            threshold,
            chosen[i],
        )


@compiled
def _scan_row(
    p: float,
    p_norm: float,
    p_rest: NDArray[np.float64],
    p_coordinates: NDArray[np.float32],
    q: NDArray[np.float64],
    q_norm: NDArray[np.float64],
    q_rest: NDArray[np.float64],
    q_coordinates: NDArray[np.float32],
    cheapest: NDArray[np.float64],
    longest: NDArray[np.float64],
    threshold: float,
    chosen: NDArray[np.int32],
) -> int:
    """Return partners of one pruned weight that no bound excludes; returns their number, or one too many."""
    listed = 0
    width = q_coordinates.shape[1]
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
                partial += p_coordinates[d] * q_coordinates[j, d]
            if p + q[j] - partial - p_rest[0] * q_rest[j, 0] - slack >= threshold:
                continue
            for d in range(coarse, width):
                partial += p_coordinates[d] * q_coordinates[j, d]
            if p + q[j] - partial - p_rest[1] * q_rest[j, 1] - slack >= threshold:
                continue
            if listed == chosen.shape[0]:
                return listed + 1
            chosen[listed] = j
            listed += 1
    return listed
