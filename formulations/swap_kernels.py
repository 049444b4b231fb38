"""Numba kernels of greedy elimination and 1-swap descent, on plain arrays."""

from __future__ import annotations

import numpy as np

from formulations.cells import cell_range, n_cells
from formulations.compiled import FLAGS, INTEGER, MATRIX, REAL, SIZE, VECTOR, compiled, entry
from formulations.problem import BoolArray, FloatArray
from formulations.support import Size

IMPROVEMENT = 1e-11
"""A swap counts when it gains more than this share of the terms it is the difference of."""
NO_CELLS = 1 << 62
"""A size that sets no limit of its own: all units are one cell."""


@compiled
def mark_full(size: Size, chosen: BoolArray, full: BoolArray) -> None:
    """Mark the units of each cell that has all its choices; one cell alone has its end in the steps made."""
    n = chosen.size
    if n_cells(size) == 1:
        return
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, n)
        for i in range(first, stop):
            count -= 1 if chosen[i] else 0
        for i in range(first, stop):
            full[i] = count <= 0


@entry(MATRIX, VECTOR, SIZE)
@compiled
def prune_selection(matrix: FloatArray, linear: FloatArray, n_prune: Size) -> BoolArray:
    """Pruned set of greedy selection: each step adds the index of least marginal cost."""
    n = linear.size
    steps = 0
    for cell in range(n_cells(n_prune)):
        steps += cell_range(n_prune, cell, n)[2]
    full = np.zeros(n, dtype=np.bool_)
    pruned = np.zeros(n, dtype=np.bool_)
    mark_full(n_prune, pruned, full)
    cost = linear.copy()
    for i in range(n):
        cost[i] += 0.5 * matrix[i, i]
    for _ in range(steps):
        best = -1
        for i in range(n):
            if not pruned[i] and not full[i] and (best < 0 or cost[i] < cost[best]):
                best = i
        pruned[best] = True
        mark_full(n_prune, pruned, full)
        for i in range(n):
            cost[i] += matrix[best, i]
    return pruned


@entry(MATRIX, VECTOR, FLAGS, INTEGER, SIZE)
@compiled
def prune_joint(
    inverse: FloatArray, minimiser: FloatArray, pruned: BoolArray, steps: int, n_prune: Size = NO_CELLS
) -> None:
    """So many steps of greedy OBS on ``M^-1`` and ``M^-1 l``; all arrays are changed in place.

    `n_prune` is how many may be pruned in all, or in each cell.
    """
    n = minimiser.size
    full = np.zeros(n, dtype=np.bool_)
    mark_full(n_prune, pruned, full)
    for _ in range(steps):
        best = -1
        lowest = np.inf
        for i in range(n):
            if not pruned[i] and not full[i]:
                saliency = minimiser[i] * minimiser[i] / inverse[i, i]
                if saliency < lowest or best < 0:
                    lowest = saliency
                    best = i
        pruned[best] = True
        mark_full(n_prune, pruned, full)
        pivot = inverse[best, best]
        step = minimiser[best] / pivot
        row = inverse[best].copy()
        for i in range(n):
            minimiser[i] -= row[i] * step
        for i in range(n):
            if not pruned[i]:
                factor = row[i] / pivot
                target = inverse[i]
                for j in range(n):
                    target[j] -= factor * row[j]


@entry(MATRIX, VECTOR, FLAGS, INTEGER, SIZE)
@compiled
def swap_selection(
    matrix: FloatArray, linear: FloatArray, pruned: BoolArray, max_swaps: int, size: Size = NO_CELLS
) -> int:
    """Best-improvement swaps on the selection program; `pruned` is changed in place.

    Taking ``i`` out and ``j`` in changes the value by ``-v_i + A_ii/2 + v_j + A_jj/2 - A_ij`` with
    ``v = c + A y``. Both are of one cell of `size`. Returns the number of swaps made.
    """
    n = linear.size
    state = linear.copy()
    for i in range(n):
        if pruned[i]:
            for j in range(n):
                state[j] += matrix[i, j]
    gain_in = np.empty(n)
    scale = 0.0
    for i in range(n):
        scale = max(scale, abs(state[i]) + 0.5 * matrix[i, i])
    swaps = 0
    while swaps < max_swaps:
        for j in range(n):
            gain_in[j] = np.inf if pruned[j] else state[j] + 0.5 * matrix[j, j]
        best = -IMPROVEMENT * scale
        leave = enter = -1
        begin, end = 0, n
        for cell in range(n_cells(size)):
            first, stop, _ = cell_range(size, cell, n)
            for i in range(first, stop):
                if not pruned[i]:
                    continue
                out = 0.5 * matrix[i, i] - state[i]
                lowest = np.inf
                row = matrix[i]
                for j in range(first, stop):
                    lowest = min(lowest, gain_in[j] - row[j])
                if out + lowest < best:
                    best = out + lowest
                    leave = i
                    begin, end = first, stop
        if leave < 0:
            break
        lowest = np.inf
        for j in range(begin, end):
            if gain_in[j] - matrix[leave, j] < lowest:
                lowest = gain_in[j] - matrix[leave, j]
                enter = j
        pruned[leave] = False
        pruned[enter] = True
        for j in range(n):
            state[j] += matrix[enter, j] - matrix[leave, j]
        swaps += 1
    return swaps


@entry(MATRIX, VECTOR, INTEGER, REAL)
@compiled
def sweep(table: FloatArray, state: FloatArray, pivot_index: int, sign: float) -> None:
    """Sweep one index into the kept set (``sign = 1``) or out of it (``-1``), in place, O(n^2)."""
    n = state.size
    pivot = table[pivot_index, pivot_index]
    row = table[pivot_index].copy()
    moved = state[pivot_index] / pivot
    for i in range(n):
        factor = row[i] / pivot
        if i == pivot_index or factor == 0.0:
            continue
        target = table[i]
        for j in range(n):
            target[j] -= factor * row[j]
        target[pivot_index] = sign * factor
        state[i] -= row[i] * moved
    for j in range(n):
        table[pivot_index, j] = sign * row[j] / pivot
    table[pivot_index, pivot_index] = -1.0 / pivot
    state[pivot_index] = sign * moved


@entry(MATRIX, VECTOR, FLAGS, INTEGER, SIZE)
@compiled
def swap_joint(
    table: FloatArray, state: FloatArray, keep: BoolArray, max_swaps: int, size: Size = NO_CELLS
) -> int:
    """Best-improvement swaps on the joint program; all three arrays are changed in place.

    Dropping kept ``i`` costs ``u_i^2 / (2 C_ii)``, ``C = M_KK^-1``; entering ``j`` afterwards gains
    ``r'^2 / (2 S')`` with ``r' = r_j + T_ij u_i / C_ii`` and ``S' = S_jj + T_ij^2 / C_ii``. Both are of
    one cell of `size`. Returns the number of swaps made.
    """
    n = state.size
    swaps = 0
    residual = np.empty(n)
    schur = np.empty(n)
    while swaps < max_swaps:
        for j in range(n):
            # A kept j must not enter: no gain and no division by zero.
            residual[j] = 0.0 if keep[j] else state[j]
            schur[j] = np.inf if keep[j] else table[j, j]
        best = 0.0
        leave = enter = -1
        begin, end = 0, n
        for cell in range(n_cells(size)):
            first, stop, _ = cell_range(size, cell, n)
            for i in range(first, stop):
                if not keep[i]:
                    continue
                inverse = -table[i, i]
                step = state[i] / inverse
                cost = 0.5 * state[i] * step
                row = table[i]
                gain = 0.0
                for j in range(first, stop):
                    moved = residual[j] + row[j] * step
                    gain = max(gain, moved * moved / (schur[j] + row[j] * row[j] / inverse))
                change = cost - 0.5 * gain
                if change < -IMPROVEMENT * cost and change < best:
                    best = change
                    leave = i
                    begin, end = first, stop
        if leave < 0:
            break
        inverse = -table[leave, leave]
        step = state[leave] / inverse
        gain = -1.0
        for j in range(begin, end):
            if not keep[j]:
                moved = state[j] + table[leave, j] * step
                value = moved * moved / (table[j, j] + table[leave, j] ** 2 / inverse)
                if value > gain:
                    gain = value
                    enter = j
        sweep(table, state, enter, 1.0)
        sweep(table, state, leave, -1.0)
        keep[enter] = True
        keep[leave] = False
        swaps += 1
    return swaps
