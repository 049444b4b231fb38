"""Every swap that could improve a large selection program, without forming all pairs.

With ``B_i = R_i w_i`` the change of a swap is ``p_i + q_j - B_i.B_j``. For any orthonormal U,

    B_i.B_j <= (U^T B_i).(U^T B_j) + |B_i - U U^T B_i| |B_j - U U^T B_j|        (Cauchy-Schwarz)

so a pair whose right-hand side leaves the change above the threshold is discarded with proof. U
spans the leading directions of a sample of columns: gradient rows have a fast-decaying spectrum,
and a few dozen directions leave a vanishing share of the pairs to be computed exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbs_opt.heuristics.products import COLUMN_CHUNK, column_squares
from cbs_opt.heuristics.selection_program import SelectionProgram
from formulations.compiled import compiled

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
SCAN_ROWS = 8_192
"""Pruned weights scanned between two checks of how many candidates there are."""
EXACT_CHUNK = 2_048
"""Pairs whose change is computed exactly at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Coordinates of every column: norms (n,), (n, d) leading ones in float32, (n, 2) remainders.

    ``remainder[:, 0]`` is what is left outside the first `COARSE` directions, ``[:, 1]`` outside
    all of them.
    """

    norm: Tensor
    coordinates: Tensor
    remainder: Tensor


def project(program: SelectionProgram, seed: int) -> Projection:
    """Project the columns of a program with rows on their leading directions; O(m n d)."""
    rows = program.data
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(program.n, generator=generator)[:SAMPLE].to(rows.device)
    basis = _leading_directions(program.columns(sample), generator)
    squares = column_squares(rows) * program.weights.double() ** 2
    coordinates: list[Tensor] = []
    remainders: list[Tensor] = []
    for index in torch.split(torch.arange(program.n, device=rows.device), COLUMN_CHUNK):
        # In float64: the remainder is what is left of a difference, and must not come out too small.
        part = program.columns(index).T @ basis
        coarse = part[:, :COARSE].square().sum(dim=1)
        fine = coarse + part[:, COARSE:].square().sum(dim=1)
        remainders.append(torch.stack([squares[index] - coarse, squares[index] - fine], dim=1))
        coordinates.append(part.float())
    remainder = torch.cat(remainders).clamp_min(0.0).sqrt()
    return Projection(norm=squares.sqrt(), coordinates=torch.cat(coordinates), remainder=remainder)


def _leading_directions(columns: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal leading left singular vectors, (m, d), most energy first, by subspace iteration."""
    width = min(DIRECTIONS, *columns.shape)
    probe = torch.randn(columns.shape[1], width, generator=generator, dtype=torch.float64)
    span = columns @ probe.to(columns)
    for _ in range(POWER_ITERATIONS):
        span = columns @ (columns.T @ torch.linalg.qr(span).Q)
    basis = torch.linalg.qr(span).Q
    rotation = torch.linalg.svd(basis.T @ columns, full_matrices=False).U
    directions: Tensor = torch.linalg.qr(basis @ rotation).Q
    return directions


def improving_pairs(
    exact_change: Callable[[Tensor, Tensor], Tensor],
    projection: Projection,
    cost: Tensor,
    pruned: Tensor,
    threshold: float,
    most: int,
    partners: int,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Pairs (out of P, into P) whose change is below `threshold`, best first.

    Parameters
    ----------
    exact_change : callable
        The changes of the swaps ``(out, into)``, (c,), in float64.
    projection : Projection
        From `project`.
    cost : (n,) float64 tensor
        ``p_i`` for pruned and ``q_j`` for kept weights, or less.
    pruned : (n,) bool tensor
    threshold : float
        Pairs below it are wanted.
    most : int
        Stop once this many candidate pairs have been collected.
    partners : int
        Collect at most this many candidates for one pruned weight.

    Returns
    -------
    out, into : (c,) int64 tensors
    change : (c,) float64 tensor
    complete : bool
        True when every pair was examined or excluded by proof; with no pair returned the set is
        then 1-swap optimal.

    Notes
    -----
    Worst case O(n_prune n_keep COARSE); with a decaying spectrum most pairs fall to one comparison.
    """
    collect = _candidates_compiled if cost.device.type == "cpu" else _candidates_torch
    out, into, complete = collect(projection, cost, pruned, threshold, most, partners)
    pairs = zip(torch.split(out, EXACT_CHUNK), torch.split(into, EXACT_CHUNK), strict=True)
    change = torch.cat([exact_change(*pair) for pair in pairs])
    better = (change < threshold).nonzero().squeeze(1)
    order = better[change[better].argsort()]
    return out[order], into[order], change[order], complete


def _candidates_compiled(
    projection: Projection, cost: Tensor, pruned: Tensor, threshold: float, most: int, partners: int
) -> tuple[Tensor, Tensor, bool]:
    inside = pruned.nonzero().squeeze(1)
    outside = (~pruned).nonzero().squeeze(1)
    inside = inside[cost[inside].argsort()]
    outside = outside[_grouped(projection.norm[outside], cost[outside])]
    left, right = (
        (
            cost[index].numpy(),
            projection.norm[index].numpy(),
            projection.remainder[index].numpy(),
            projection.coordinates[index].numpy(),
        )
        for index in (inside, outside)
    )
    starts = np.arange(0, outside.numel(), GROUP)
    cheapest = np.minimum.reduceat(right[0], starts)
    longest = np.maximum.reduceat(right[1], starts)
    pairs = np.empty((most, 2), dtype=np.int64)
    found, complete = _scan_pairs(*left, *right, cheapest, longest, threshold, partners, pairs)
    chosen = torch.from_numpy(pairs[:found])
    return inside[chosen[:, 0]], outside[chosen[:, 1]], bool(complete)


def _grouped(norm: Tensor, cost: Tensor) -> Tensor:
    """Order in which runs of `GROUP` weights have similar norms and similar costs."""
    by_norm = norm.argsort()
    strip = torch.empty_like(by_norm)
    strip[by_norm] = torch.arange(norm.numel()) // (GROUP * GROUPS_A_STRIP)
    return torch.from_numpy(np.lexsort((cost.numpy(), strip.numpy())))


@numba.njit(cache=True, parallel=True, fastmath={"reassoc", "contract"})
def _scan_pairs(
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
    partners: int,
    pairs: NDArray[np.int64],
) -> tuple[int, bool]:
    """Collect the pairs that no bound excludes, for pruned weights in the order given."""
    n_in = p.shape[0]
    found = 0
    complete = True
    local = np.empty((SCAN_ROWS, partners), np.int64)
    count = np.empty(SCAN_ROWS, np.int64)
    for start in range(0, n_in, SCAN_ROWS):
        stop = min(start + SCAN_ROWS, n_in)
        for r in numba.prange(stop - start):
            i = start + r
            count[r] = _scan_row(
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
                local[r],
            )
        for r in range(stop - start):
            if count[r] > partners:
                complete = False
            for t in range(min(count[r], partners)):
                if found == pairs.shape[0]:
                    return found, False
                pairs[found, 0] = start + r
                pairs[found, 1] = local[r, t]
                found += 1
    return found, complete


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
    chosen: NDArray[np.int64],
) -> int:
    """Partners of one pruned weight that no bound excludes; returns their number."""
    found = 0
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
            if found < chosen.shape[0]:
                chosen[found] = j
            found += 1
    return found


def _candidates_torch(
    projection: Projection, cost: Tensor, pruned: Tensor, threshold: float, most: int, partners: int
) -> tuple[Tensor, Tensor, bool]:
    inside = pruned.nonzero().squeeze(1)
    outside = (~pruned).nonzero().squeeze(1)
    wide = torch.cat([projection.coordinates, projection.remainder[:, 1:]], dim=1).double()
    right = wide[outside]
    scaled = SLACK * projection.norm[outside]
    step = max(1, 2**26 // max(1, outside.numel()))
    pieces: list[Tensor] = []
    found = 0
    for start in range(0, inside.numel(), step):
        rows = inside[start : start + step]
        change = cost[rows][:, None] + cost[outside][None, :] - wide[rows] @ right.T
        change -= projection.norm[rows][:, None] * scaled[None, :]
        hits = (change < threshold).nonzero()
        pieces.append(torch.stack([rows[hits[:, 0]], outside[hits[:, 1]]], dim=1))
        found += hits.shape[0]
        if found >= most:
            pairs = torch.cat(pieces)[:most]
            return pairs[:, 0], pairs[:, 1], False
    pairs = torch.cat(pieces) if pieces else inside.new_zeros((0, 2))
    return pairs[:, 0], pairs[:, 1], True
