"""The chosen set of one block, and what chooses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from formulations.solution import Limit


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The pruned set of one block and how it was found.

    Attributes
    ----------
    pruned : (n,) bool tensor
        True where the weight goes.
    initial_value : float or None
        Selection objective that a search started from.
    iterations : int
        Swaps of a search.
    locally_optimal : bool or None
        Whether a search ended at a proved 1-swap optimum; None for methods that do not search.
    seconds : float
    bound : float or None
        Proved lower bound on the objective of the program.
    status : str
        How the method ended.
    limit : Limit or None
        What stopped it early.
    """

    pruned: Tensor
    initial_value: float | None = None
    iterations: int = 0
    locally_optimal: bool | None = None
    seconds: float = 0.0
    bound: float | None = None
    status: str = ""
    limit: Limit | None = None


Selector = Callable[..., list[Choice]]
"""``selector(blocks, counts, *, limits, **options)``: one choice a block, in order.

One that takes a block at a time may take a `ChoiceLedger` as `ledger`: it leaves out the blocks that are
known there, and adds the others as they are done.
"""
