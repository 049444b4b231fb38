"""Numba kernels of the s-support norm: its proximal map, and the sum of largest entries it is dual to.

Source: Argyriou, Foygel & Srebro (2012), Sparse prediction with the k-support norm.
"""

from __future__ import annotations

import numpy as np

from formulations.cells import cell_range, n_cells
from formulations.compiled import INDICES, INTEGER, REAL, SIZE, VECTOR, compiled, entry
from formulations.problem import FloatArray, IntArray
from formulations.support import Size


@entry(VECTOR, INTEGER, REAL, INDICES, VECTOR)
@compiled
def prox_support_norm(
    point: FloatArray, size: int, step: float, order: IntArray, image: FloatArray
) -> tuple[int, int]:
    """Proximal map of ``step / 2`` times the squared `size`-support norm, by one sort.

    `order` receives the indices by decreasing magnitude. Of them, the first ``left`` are kept whole
    (``z = 1``), those in ``[left, right)`` share the rest (``0 < z < 1``), the others are zero;
    ``(left, right)`` is returned. O(n log n).
    """
    n = point.size
    if size >= n:
        for i in range(n):
            image[i] = point[i] / (1.0 + step)
            order[i] = i
        return n, n
    magnitude = np.abs(point)
    ranked = np.argsort(-magnitude)
    for q in range(n):
        order[q] = ranked[q]
    if size <= 0:
        image[:] = 0.0
        return 0, 0
    # Moreau: prox(x) = x - step * v with v the prox of the conjugate, half the sum of the s
    # largest squares; v is pooled where shrinking the first s would break the order.
    shrink = 1.0 + 1.0 / step
    left, right = size, size
    level = 0.0
    last, following = magnitude[order[size - 1]], magnitude[order[size]]
    if last / shrink < following:
        left, right = size - 1, size + 1
        total, weight = last + following, shrink + 1.0
        level = total / weight
        moved = True
        while moved:
            moved = False
            while left > 0 and magnitude[order[left - 1]] / shrink < level:
                left -= 1
                total += magnitude[order[left]]
                weight += shrink
                level = total / weight
                moved = True
            while right < n and magnitude[order[right]] > level:
                total += magnitude[order[right]]
                weight += 1.0
                right += 1
                level = total / weight
                moved = True
    for q in range(n):
        i = order[q]
        if q < left:
            image[i] = point[i] / (1.0 + step)
        elif q < right:
            image[i] = magnitude[i] - level if point[i] >= 0.0 else level - magnitude[i]
        else:
            image[i] = 0.0
    return left, right


@compiled
def copy_into(target: FloatArray, source: FloatArray) -> None:
    """Copy `source` entry by entry; assigning to a slice would compile the text of an error too."""
    for i in range(source.size):
        target[i] = source[i]


@entry(VECTOR, INTEGER)
@compiled
def largest_sum(values: FloatArray, count: int) -> float:
    """Sum of the `count` largest of `values`, by quickselect; O(n) on average."""
    n = values.size
    if count >= n:
        return float(values.sum())
    work = values.copy()
    low, high = 0, n - 1
    while low < high:
        pivot = work[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while work[i] > pivot:
                i += 1
            while work[j] < pivot:
                j -= 1
            if i <= j:
                work[i], work[j] = work[j], work[i]
                i += 1
                j -= 1
        if count - 1 <= j:
            high = j
        elif count - 1 >= i:
            low = i
        else:
            break
    total = 0.0
    for q in range(count):
        total += work[q]
    return total


@entry(VECTOR, SIZE)
@compiled
def held_sum(values: FloatArray, size: Size) -> float:
    """Largest sum of `values` that so many of all, or so many in each cell, can have; O(n) on average."""
    total = 0.0
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, values.size)
        total += largest_sum(values[first:stop], count)
    return total


@entry(VECTOR, SIZE, REAL, INDICES, VECTOR)
@compiled
def shrink_support(point: FloatArray, size: Size, step: float, order: IntArray, image: FloatArray) -> None:
    """`prox_support_norm` in each cell; `order` is in places of the cell."""
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, point.size)
        prox_support_norm(point[first:stop], count, step, order[first:stop], image[first:stop])
