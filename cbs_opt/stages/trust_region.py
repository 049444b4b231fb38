"""How far a quadratic model is trusted: damping after Levenberg and Marquardt, by the training loss."""

from __future__ import annotations

from collections.abc import Sequence

FACTOR = 3.0
"""Between neighbours of the grid."""


class DampingSearch:
    """The grid of dampings of the next step, which follows the winners.

    Parameters
    ----------
    first : sequence of float
        The grid of the first step.
    centre : float, optional
        Go on around this value instead.

    Notes
    -----
    After a step was accepted the grid is the winner, a third and three times that; after one was
    refused it starts at the largest value tried. Levenberg (1944), Marquardt (1963), with the ratio
    test replaced by the comparison of actual losses.
    """

    def __init__(self, first: Sequence[float], centre: float | None = None) -> None:
        self._first = tuple(first)
        self.centre = centre

    def grid(self) -> tuple[float, ...]:
        """Dampings to try, in increasing order."""
        if self.centre is None:
            return tuple(sorted(self._first))
        return (self.centre / FACTOR, self.centre, self.centre * FACTOR)

    def accepted(self, damping: float) -> None:
        """`damping` won."""
        self.centre = damping

    def refused(self) -> None:
        """Nothing improved: trust the model less."""
        self.centre = max(self.grid()) * (FACTOR if self.centre is not None else 1.0)
