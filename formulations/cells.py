"""What kernels ask of a size: how many cells there are, where each lies, how many units it chooses.

A kernel that is given a number is compiled for one cell of all units, as if there were no cells; given
`formulations.support.Cells`, it is compiled a second time.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from formulations.compiled import compiled
from formulations.support import BoolArray, Cells, IntArray, Size


def n_cells(size: Size) -> int:
    """Return the number of cells."""
    return 1 if isinstance(size, int) else int(size.quota.size)


def cell_range(size: Size, cell: int, n: int) -> tuple[int, int, int]:
    """Return where a cell of `n` units begins and ends, and how many units it chooses."""
    if isinstance(size, int):
        return 0, n, size
    return int(size.start[cell]), int(size.start[cell + 1]), int(size.quota[cell])


def size_left(size: Size, chosen: BoolArray, free: IntArray) -> Size:
    """Return how many of the free units are to be chosen once some of all have been.

    Cells stay in their order, also those without a free unit; a quota comes out negative where more than it
    have been chosen.
    """
    if isinstance(size, int):
        return size - int(np.count_nonzero(chosen))
    return _cells_left(size, chosen, free)


@compiled
def _cells_left(size: Cells, chosen: BoolArray, free: IntArray) -> Cells:
    start = np.zeros(size.start.size, dtype=np.int64)
    quota = size.quota.copy()
    place = 0
    for cell in range(size.quota.size):
        for i in range(size.start[cell], size.start[cell + 1]):
            if chosen[i]:
                quota[cell] -= 1
        while place < free.size and free[place] < size.start[cell + 1]:
            place += 1
        start[cell + 1] = place
    return Cells(start, quota)


# numba compares the signatures of these to the letter: no annotations.


@overload(n_cells)
def _typed_n_cells(size):  # type: ignore[no-untyped-def]
    if isinstance(size, types.Integer):
        return lambda size: 1
    return lambda size: size.quota.size


@overload(cell_range)
def _typed_cell_range(size, cell, n):  # type: ignore[no-untyped-def]
    if isinstance(size, types.Integer):
        return lambda size, cell, n: (0, n, size)
    return lambda size, cell, n: (size.start[cell], size.start[cell + 1], size.quota[cell])


@overload(size_left)
def _typed_size_left(size, chosen, free):  # type: ignore[no-untyped-def]
    if isinstance(size, types.Integer):
        return lambda size, chosen, free: size - np.count_nonzero(chosen)
    return lambda size, chosen, free: _cells_left(size, chosen, free)
