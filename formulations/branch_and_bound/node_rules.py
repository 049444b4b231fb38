"""What the kernels of both programs are told about a node: one record, and the constants they share."""

from __future__ import annotations

from typing import NamedTuple

import numba

from formulations.cells import cell_range, n_cells
from formulations.compiled import compiled
from formulations.problem import IntArray
from formulations.support import Size

REDUCED_AGAIN = 0.08
"""Share of a node's open indices that must be fixed before the block is reduced once more."""
WORTH_A_ROUND = 0.1
"""Share of a node's gap that a step on the split has to gain to be followed by another."""


class NodeRules(NamedTuple):
    """How to bound one node.

    Attributes
    ----------
    fixing : bool
        Fix weights by the bound.
    positive_split : bool
        Whether the diagonal split must be positive: in the joint program.
    split_rounds : int
        Most barrier steps on the split.
    patience : int
        Steps that may gain little, before one that does ends them.
    barrier_share : float
        Barrier weight times order, as a share of the node's gap.
    steps : int
        Most steps of the relaxation.
    tolerance : float
        Share of the gap that the relaxation has to gain to go on.
    """

    fixing: bool
    positive_split: bool
    split_rounds: int
    patience: int
    barrier_share: float
    steps: int
    tolerance: float


RULES = numba.typeof(NodeRules(True, True, 0, 0, 0.0, 0, 0.0))  # type: ignore[no-untyped-call]
"""Their type in a kernel."""


@compiled
def settle(size: Size, free: IntArray, status: IntArray, chosen: int, other: int) -> tuple[bool, int, bool]:
    """Decide the free indices of each cell that has one way left.

    `size` is how many of them are to be chosen; `chosen` and `other` are the two values of `status`.

    Returns
    -------
    possible : bool
        False if a cell has too few free indices, or more chosen than it may.
    open_cells : int
        Cells in which something is left to decide.
    moved : bool
        Whether an index was decided.
    """
    open_cells = 0
    moved = False
    for cell in range(n_cells(size)):
        first, stop, count = cell_range(size, cell, free.size)
        if count < 0 or stop - first < count:
            return False, 0, moved
        if count == 0 or stop - first == count:
            for q in range(first, stop):
                status[free[q]] = chosen if stop - first == count else other
                moved = True
        else:
            open_cells += 1
    return True, open_cells, moved
