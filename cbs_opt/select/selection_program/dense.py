"""Best-improvement swaps on dense selection programs, many blocks at once.

One step takes i out of the pruned set and j into it, the pair that lowers the objective most. With
``v = A y`` kept up to date a pair costs ``(-v_i + A_ii/2 + c_i) + (v_j + A_jj/2 - c_j) - A_ij``,
where ``c = g * w``; a step costs two columns of A. On the CPU a compiled kernel skips every pair
that the Cauchy-Schwarz inequality ``|A_ij| <= sqrt(A_ii A_jj)`` proves not to be the best, which
loses nothing; on other devices the whole table of pairs is formed with torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formulations.compiled import (
    CUBE,
    FLAG_ROWS,
    FLAGS,
    INDICES,
    INTEGER,
    MATRIX,
    REAL,
    VECTOR,
    compiled,
    entry,
    kept_on_disk,
)

Reals: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]
Indices: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SwapCounts:
    """Swaps made in each block, (B,), and whether each block ended at a 1-swap optimum, (B,)."""

    swaps: Tensor
    locally_optimal: Tensor


def swap_dense(
    gram: Tensor,
    product: Tensor,
    linear: Tensor,
    pruned: Tensor,
    tolerance: Tensor,
    budget: Tensor,
    *,
    compiled: bool = True,
) -> SwapCounts:
    """Run best-improvement swaps in place on a batch of dense blocks until none helps.

    For each of B blocks: `gram` (n, n) is ``A = diag(w) H diag(w)``, symmetric positive semidefinite;
    `product` (n,), updated in place, is ``v = A y`` plus what fixed weights outside the block contribute;
    `linear` (n,) is ``c = g * w``; `pruned` (n,), updated in place, is ``y``, whose sum never changes. A swap
    must lower the objective by more than `tolerance`, and there are at most `budget`. The compiled kernel is
    for the CPU. O(n) to O(n^2) a swap and block. The CPU kernel and the torch path make the same swaps, up to
    ties within rounding.
    """
    if not compiled or gram.device.type != "cpu":
        return _swap_torch(gram, product, linear, pruned, tolerance, budget)
    swaps = np.zeros(gram.shape[0], dtype=np.int64)
    settled = np.zeros(gram.shape[0], dtype=np.bool_)
    v = product.numpy().astype(np.float64)
    y = pruned.numpy().copy()
    a = gram.numpy().astype(np.float64, copy=False)
    c = linear.numpy().astype(np.float64)
    least = tolerance.numpy().astype(np.float64)
    most = budget.numpy()
    if len(a) == 1:  # spares the start of the threads
        swaps[0], settled[0] = _swap_one_block(a[0], v[0], c[0], y[0], float(least[0]), int(most[0]))
    else:
        _swap_blocks(a, v, c, y, least, most, swaps, settled)
    product.copy_(torch.from_numpy(v))
    pruned.copy_(torch.from_numpy(y))
    return SwapCounts(swaps=torch.from_numpy(swaps), locally_optimal=torch.from_numpy(settled))


@entry(CUBE, MATRIX, MATRIX, FLAG_ROWS, VECTOR, INDICES, INDICES, FLAGS)
@kept_on_disk
@numba.njit(parallel=True)
def _swap_blocks(
    gram: Reals,
    v: Reals,
    linear: Reals,
    y: Flags,
    tolerance: Reals,
    budget: Indices,
    swaps: Indices,
    settled: Flags,
) -> None:
    for b in numba.prange(gram.shape[0]):
        swaps[b], settled[b] = _swap_one_block(gram[b], v[b], linear[b], y[b], tolerance[b], budget[b])


@entry(MATRIX, VECTOR, VECTOR, FLAGS, REAL, INTEGER)
@compiled
def _swap_one_block(
    a: Reals, v: Reals, linear: Reals, y: Flags, tolerance: float, max_swaps: int
) -> tuple[int, bool]:
    n = v.shape[0]
    norm = np.empty(n)
    for i in range(n):
        norm[i] = np.sqrt(max(a[i, i], 0.0))
    cost = np.empty(n)
    leaving = np.empty(n, np.int64)
    entering = np.empty(n, np.int64)
    for swap in range(max_swaps):
        i, j = _best_pair(a, v, linear, y, norm, cost, leaving, entering, -tolerance)
        if i < 0:
            return swap, True
        y[i] = False
        y[j] = True
        row_i = a[i]
        row_j = a[j]
        for k in range(n):
            v[k] += row_j[k] - row_i[k]
    return max_swaps, False


@compiled
def _best_pair(
    a: Reals,
    v: Reals,
    linear: Reals,
    y: Flags,
    norm: Reals,
    cost: Reals,
    leaving: Indices,
    entering: Indices,
    threshold: float,
) -> tuple[int, int]:
    """Return the pair (out of P, into P) with the lowest change below `threshold`, or (-1, -1)."""
    n = v.shape[0]
    first_out, first_in = -1, -1
    norm_out, norm_in = 0.0, 0.0
    for k in range(n):
        if y[k]:
            cost[k] = -v[k] + 0.5 * a[k, k] + linear[k]
            norm_out = max(norm_out, norm[k])
            if first_out < 0 or cost[k] < cost[first_out]:
                first_out = k
        else:
            cost[k] = v[k] + 0.5 * a[k, k] - linear[k]
            norm_in = max(norm_in, norm[k])
            if first_in < 0 or cost[k] < cost[first_in]:
                first_in = k
    if first_out < 0 or first_in < 0:
        return -1, -1
    best, best_out, best_in = threshold, -1, -1
    # Scan the row and the column of the two cheapest first: a good pair prunes the rest.
    for k in range(n):
        out, into = (k, first_in) if y[k] else (first_out, k)
        change = cost[out] + cost[into] - a[out, into]
        if change < best:
            best, best_out, best_in = change, out, into
    cheapest_out, cheapest_in = cost[first_out], cost[first_in]
    n_out, n_in = 0, 0
    for k in range(n):
        # cost + cost' - norm * norm' >= best for every partner: k is in no better pair.
        if y[k]:
            if cost[k] + cheapest_in - norm[k] * norm_in < best:
                leaving[n_out] = k
                n_out += 1
        elif cost[k] + cheapest_out - norm[k] * norm_out < best:
            entering[n_in] = k
            n_in += 1
    for s in range(n_out):
        i = leaving[s]
        for t in range(n_in):
            j = entering[t]
            change = cost[i] + cost[j] - a[i, j]
            if change < best:
                best, best_out, best_in = change, i, j
    return best_out, best_in


def _swap_torch(
    gram: Tensor, product: Tensor, linear: Tensor, pruned: Tensor, tolerance: Tensor, budget: Tensor
) -> SwapCounts:
    blocks, n, _ = gram.shape
    swaps = torch.zeros(blocks, dtype=torch.int64, device=gram.device)
    settled = torch.zeros(blocks, dtype=torch.bool, device=gram.device)
    half_diagonal = 0.5 * torch.diagonal(gram, dim1=1, dim2=2)
    batch = torch.arange(blocks, device=gram.device)
    infinity = torch.tensor(torch.inf, dtype=gram.dtype, device=gram.device)
    while bool((open_blocks := ~settled & (swaps < budget)).any()):
        cost_out = torch.where(pruned, half_diagonal - product + linear, infinity)
        cost_in = torch.where(pruned, infinity, half_diagonal + product - linear)
        change = cost_out[:, :, None] + cost_in[:, None, :] - gram
        best, flat = change.reshape(blocks, -1).min(dim=1)
        improves = best < -tolerance
        settled |= open_blocks & ~improves
        moves = open_blocks & improves
        out = torch.div(flat, n, rounding_mode="floor")
        into = flat - out * n
        step = torch.where(moves[:, None], gram[batch, into] - gram[batch, out], 0.0)
        product += step
        pruned[batch[moves], out[moves]] = False
        pruned[batch[moves], into[moves]] = True
        swaps += moves
    return SwapCounts(swaps=swaps, locally_optimal=settled)
