"""Small dense factorisations for numba kernels: they report failure instead of raising it."""

from __future__ import annotations

import numpy as np

from formulations.compiled import compiled
from formulations.problem import FloatArray


@compiled
def cholesky_factor(matrix: FloatArray, factor: FloatArray) -> bool:
    """Write the lower Cholesky factor of `matrix` into `factor`; False if a pivot is not positive.

    Only the lower triangle of `matrix` is read and only that of `factor` is written. O(n^3 / 3).
    """
    n = matrix.shape[0]
    for i in range(n):
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
