"""Small dense factorisations for numba kernels: they report failure instead of raising it."""

from __future__ import annotations

import numpy as np

from formulations.compiled import compiled
from formulations.problem import FloatArray

BLOCKED_FROM = 600
"""Order above which a factor is computed by blocks of `BLOCK` columns, with matrix products in between."""
BLOCK = 64
PANEL = 256
"""Rows of what is left that are brought up to date by one product."""


@compiled
def cholesky_factor(matrix: FloatArray, factor: FloatArray) -> bool:
    """Write the lower Cholesky factor of `matrix` into `factor`; False if a pivot is not positive.

    Only the lower triangle of `matrix` is read. Above the diagonal `factor` is left as it was up to the order
    `BLOCKED_FROM`; beyond it its entries there are of no meaning. O(n^3 / 3).
    """
    n = matrix.shape[0]
    if n <= BLOCKED_FROM:
        return factor_rows(matrix, factor)
    for i in range(n):
        for j in range(i + 1):
            factor[i, j] = matrix[i, j]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        block = factor[start:stop, start:stop].copy()
        if not factor_rows(block, block):
            return False
        factor[start:stop, start:stop] = block
        # The rows below, by forward substitution along the block.
        below = factor[stop:, start:stop].copy()
        for i in range(n - stop):
            row = below[i]
            for j in range(stop - start):
                total = row[j]
                for q in range(j):
                    total -= row[q] * block[j, q]
                row[j] = total / block[j, j]
        factor[stop:, start:stop] = below
        # What is left, in panels of rows up to the diagonal.
        for first in range(stop, n, PANEL):
            last = min(first + PANEL, n)
            factor[first:last, stop:last] -= np.dot(below[first - stop : last - stop], below[: last - stop].T)
    return True


@compiled
def factor_rows(matrix: FloatArray, factor: FloatArray) -> bool:
    """Write the lower Cholesky factor row by row; False if a pivot is not positive."""
    for i in range(matrix.shape[0]):
        row = factor[i]
        for j in range(i):
            other = factor[j]
            total = matrix[i, j]
            for q in range(j):
                total -= row[q] * other[q]
            row[j] = total / other[j]
        pivot = matrix[i, i]
        for q in range(i):
            pivot -= row[q] * row[q]
        if not pivot > 0.0:
            return False
        row[i] = np.sqrt(pivot)
    return True


@compiled
def solve_factored(factor: FloatArray, right: FloatArray) -> FloatArray:
    """Solve ``L L^T x = right``; O(n^2)."""
    n = right.size
    x = right.copy()
    for i in range(n):
        total = x[i]
        for q in range(i):
            total -= factor[i, q] * x[q]
        x[i] = total / factor[i, i]
    for i in range(n - 1, -1, -1):
        x[i] /= factor[i, i]
        moved = x[i]
        for q in range(i):
            x[q] -= factor[i, q] * moved
    return x


@compiled
def inverse_from_factor(factor: FloatArray) -> FloatArray:
    """``(L L^T)^-1``, symmetric; O(n^3)."""
    n = factor.shape[0]
    # Rows of `inner` are columns of L^-1, so that every inner loop runs along memory.
    inner = np.zeros((n, n))
    for j in range(n):
        column = inner[j]
        column[j] = 1.0 / factor[j, j]
        for i in range(j + 1, n):
            total = 0.0
            for q in range(j, i):
                total -= factor[i, q] * column[q]
            column[i] = total / factor[i, i]
    product: FloatArray = np.dot(inner, inner.T)
    return product
