"""Two searches of one block in turn, with nodes of two kinds; the one that closes more of its tree goes on.

Nodes of a diagonal split are cheap, those in clusters bound better, and which of them ends first differs by
orders of magnitude from block to block: rows of language models by the former, of convolutions by the latter.
What they close in a turn tells them apart, of what is still open: a first branch may close half of a tree,
whose other half is all the work. Each child counts for half of its parent, as in the tree weight of Kilby,
Slaney, Thiebaux & Walsh (Estimating search tree size, AAAI 2006). The slower one has a turn now and then, so
that turns that mislead cost a few of them. All is counted in nodes and their sizes: the result does not
depend on the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from formulations.branch_and_bound.tree import Search
from formulations.solution import Limit

TURN = 200.0
"""Work of a turn, in plain nodes as large as the root."""
REST = 4.0
"""Work of one search, in that of the other, from which it gives way whatever it has closed."""
LEAST_OPEN = 2.0**-50
"""Share of a tree that is taken to be open at least, as the sum of what is closed rounds."""


@dataclass
class Runner:
    """A search, and the share of what it has open that it closes in a turn, of late."""

    search: Search
    pace: float | None = None

    def run(self, turn: float) -> Limit | None:
        """Search for a turn, or until the tree is closed or a limit comes."""
        before = self.search.closed
        limit = self.search.run(self.search.work + turn)
        gain = (self.search.closed - before) / max(1.0 - before, LEAST_OPEN)
        self.pace = gain if self.pace is None else 0.5 * (self.pace + gain)
        return limit

    def gives_way_to(self, other: Runner) -> bool:
        """Whether the next turn is of the other one: as fast of late, or long without one."""
        assert self.pace is not None
        faster = other.pace is None or other.pace >= self.pace
        return faster or self.search.work > REST * other.search.work


def race(plain: Search, clustered: Callable[[], Search | None]) -> tuple[Search, Limit | None]:
    """Search in turns until one tree is closed or a limit comes.

    Parameters
    ----------
    plain : Search
        Of cheap nodes, at its root.
    clustered : callable
        Makes the other one, from the same root and for the same sets, once the first turn of `plain` is over;
        None if there is none.

    Returns
    -------
    search : Search
        The one that ended, or was on turn when the limit came; it knows what the other has proved.
    limit : Limit or None
    """
    assert plain.current is not None
    turn = TURN * float(plain.current.status.size) ** 3
    on_turn = plain
    ahead = Runner(plain)
    try:
        limit = ahead.run(turn)
        if limit is not None or plain.current is None or plain.met:
            return plain, limit
        other = clustered()
        if other is None:
            return plain, plain.run()
        behind, ahead = ahead, Runner(other)
        while True:
            ahead.search.learn(behind.search)
            on_turn = ahead.search
            limit = ahead.run(turn)
            if limit is not None or on_turn.current is None or on_turn.met:
                return on_turn, limit
            if ahead.gives_way_to(behind):
                behind, ahead = ahead, behind
    except KeyboardInterrupt:
        return on_turn, Limit.INTERRUPTED
