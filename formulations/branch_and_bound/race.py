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


@dataclass
class Runner:
    """A search, and the share of what it has open that it closes in a turn, of late."""

    search: Search
    pace: float = 0.0

    def run(self, turn: float) -> Limit | None:
        """Search for a turn, or until the tree is closed or a limit comes."""
        before = 1.0 - self.search.closed
        limit = self.search.run(self.search.work + turn)
        self.pace = 0.5 * (self.pace + (before - (1.0 - self.search.closed)) / before)
        return limit


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
    limit = plain.run(turn)
    if limit is not None or plain.current is None or plain.met:
        return plain, limit
    try:
        other = clustered()
    except KeyboardInterrupt:
        return plain, Limit.INTERRUPTED
    if other is None:
        return plain, plain.run()
    behind, ahead = Runner(plain, plain.closed), Runner(other)
    while True:
        ahead.search.learn(behind.search)
        limit = ahead.run(turn)
        if limit is not None or ahead.search.current is None or ahead.search.met:
            return ahead.search, limit
        if ahead.pace <= behind.pace or ahead.search.work > REST * behind.search.work:
            behind, ahead = ahead, behind
