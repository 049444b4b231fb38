"""How both relaxations are solved: climbs of Newton steps on active sets, and ADMM between them.

The state of a solve is a record of arrays that the kernels write in place, so that a solve can be cut into
calls and the clock looked at between them, without any effect on its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np

from formulations.compiled import compiled
from formulations.problem import FloatArray, IntArray
from formulations.solution import Stopped

PHASE, STEPS, STALLED, MISSES = 0, 1, 2, 3
"""Places in the counts of a state: phase, steps of ADMM, idle climbs and missed Newton steps in a row."""
BEST, PREVIOUS, BLUR = 0, 1, 2
"""Places in its figures: the best bound, the one at the end of the climb before, the rounding of the best."""
CLIMBING, SPLITTING, ENDED = 0, 1, 2
"""Phases: Newton steps, ADMM, the end."""
ONGOING, GIVEN_UP, OPTIMAL = 0, 1, 2
"""What becomes of a climb after a Newton step."""
NEWTON_PERIOD = 6
"""ADMM steps between two climbs."""
NEWTON_MISSES = 4
"""Newton steps in a row that may fail to lift the bound before a climb is given up."""
PATIENCE = 8
"""Climbs in a row that may bring next to nothing before the relaxation is left as it is."""
UNLIKE = 1e3
"""Two points whose rounding errors differ by more than this factor are compared by what they prove."""
OVER_RELAXATION = 1.7
"""Over-relaxation of ADMM, in (1, 2)."""
TO_THE_END = 1 << 40
"""More steps than any solve takes."""
WORK_A_LOOK = 1e9
"""Cubes of the order between two looks at the clock, one a step: some tenths of a second at most."""

SHARE_AHEAD = 0.5
"""Share of the longest step so far that has to fit: a solve ends as near to its limit as it can."""


class Ascent(Protocol):
    """What the states of both relaxations have in common."""

    @property
    def linear(self) -> FloatArray:
        """Linear term, (n,)."""
        ...

    @property
    def counts(self) -> IntArray:
        """`PHASE` and its neighbours, (4,)."""
        ...


State = TypeVar("State", bound=Ascent)


@compiled
def rises(figures: FloatArray, value: float, error: float) -> bool:
    """Whether a value lifts the best bound; where rounding errors are unlike, each value less its own.

    Where the active entries are more than the rank, a Newton point may be so large that its value is nothing
    but rounding.
    """
    best, blur = figures[BEST], figures[BLUR]
    if max(error, blur) > UNLIKE * min(error, blur):
        return bool(value - error > best - blur)
    return bool(value > best)


@compiled
def end_climb(
    figures: FloatArray, counts: IntArray, outcome: int, cutoff: float, tolerance: float, max_steps: int
) -> None:
    """Decide whether ADMM goes on after a climb; it has to gain the share `tolerance` of the open gap."""
    counts[MISSES] = 0
    best = figures[BEST]
    if counts[STEPS] > 0:
        scale = cutoff - best if cutoff < np.inf else abs(best)
        counts[STALLED] = counts[STALLED] + 1 if best - figures[PREVIOUS] < tolerance * scale else 0
    figures[PREVIOUS] = best
    over = outcome == OPTIMAL or counts[STALLED] >= PATIENCE or counts[STEPS] >= max_steps or best >= cutoff
    counts[PHASE] = ENDED if over else SPLITTING


@compiled
def end_step(figures: FloatArray, counts: IntArray, cutoff: float, max_steps: int) -> None:
    """Count a step of ADMM and decide what follows."""
    counts[STEPS] += 1
    if counts[STEPS] % NEWTON_PERIOD == 0 or counts[STEPS] == max_steps:
        counts[PHASE] = CLIMBING
    elif figures[BEST] >= cutoff:
        counts[PHASE] = ENDED


def ascend(
    state: State,
    advance: Callable[[State, FloatArray, int], None],
    invert: Callable[[State], FloatArray],
    stopped: Stopped,
) -> None:
    """Advance a state to its end, or until `stopped` says so between two calls of a kernel.

    What comes between two looks is a Newton step or an inverse at most, O(n^3). It is not begun where less
    than half of one that takes as long as the longest so far would fit.
    """
    n = state.linear.size
    work = max(1, int(WORK_A_LOOK / n**3))
    inverse = np.empty((0, 0))
    longest = 0.0
    while state.counts[PHASE] != ENDED and not stopped(SHARE_AHEAD * longest):
        began = time.perf_counter()
        if state.counts[PHASE] == SPLITTING and inverse.size == 0:
            # In the layout that `advance` is compiled for: LAPACK returns the other.
            inverse = np.ascontiguousarray(invert(state))
        else:
            advance(state, inverse, work)
        longest = max(longest, time.perf_counter() - began)
