"""Exact reduction of a partly decided form: pruned indices deleted, kept ones eliminated."""

from __future__ import annotations

import numpy as np

from formulations.compiled import INDICES, MATRIX, VECTOR, compiled, entry
from formulations.factorisation import cholesky_factor
from formulations.problem import FloatArray, IntArray

FREE = 0
KEPT = 1
PRUNED = -1


@entry(MATRIX, VECTOR, INDICES, INDICES)
@compiled
def reduce_joint(
    matrix: FloatArray, linear: FloatArray, kept: IntArray, free: IntArray
) -> tuple[bool, FloatArray, FloatArray, float]:
    """Schur complement of the kept indices on the free ones of the joint form.

    Minimising ``1/2 u.M u - l.u`` over the kept entries leaves the same kind of form in the free
    ones. Returns whether the kept block is definite, the reduced matrix and linear term, and the
    constant gained. O(|K|^3 / 3 + |K|^2 |F| + |K| |F|^2).
    """
    count, size = kept.size, free.size
    reduced = np.empty((size, size))
    reduced_linear = np.empty(size)
    for p in range(size):
        source = matrix[free[p]]
        reduced_linear[p] = linear[free[p]]
        for q in range(size):
            reduced[p, q] = source[free[q]]
    if count == 0:
        return True, reduced, reduced_linear, 0.0
    block = np.empty((count, count))
    carried = np.empty((count, size))
    moved = np.empty(count)
    for p in range(count):
        source = matrix[kept[p]]
        moved[p] = linear[kept[p]]
        for q in range(p + 1):
            block[p, q] = source[kept[q]]
        for q in range(size):
            carried[p, q] = source[free[q]]
    factor = np.empty((count, count))
    if not cholesky_factor(block, factor):
        return False, reduced, reduced_linear, 0.0
    for p in range(count):
        row = carried[p]
        for q in range(p):
            weight = factor[p, q]
            moved[p] -= weight * moved[q]
            other = carried[q]
            for i in range(size):
                row[i] -= weight * other[i]
        inverse = 1.0 / factor[p, p]
        moved[p] *= inverse
        for i in range(size):
            row[i] *= inverse
    reduced -= np.dot(carried.T, carried)
    reduced_linear -= np.dot(moved, carried)
    return True, reduced, reduced_linear, -0.5 * np.dot(moved, moved)


@entry(MATRIX, VECTOR, INDICES, INDICES)
@compiled
def reduce_selection(
    matrix: FloatArray, linear: FloatArray, pruned: IntArray, free: IntArray
) -> tuple[FloatArray, FloatArray, float]:
    """Return the selection form on the free indices once `pruned` are set to 1; the rest to 0."""
    size = free.size
    reduced = np.empty((size, size))
    reduced_linear = np.empty(size)
    constant = 0.0
    for p in range(size):
        source = matrix[free[p]]
        for q in range(size):
            reduced[p, q] = source[free[q]]
        total = linear[free[p]]
        for j in pruned:
            total += source[j]
        reduced_linear[p] = total
    for i in pruned:
        total = linear[i]
        for j in pruned:
            total += 0.5 * matrix[i, j]
        constant += total
    return reduced, reduced_linear, constant
