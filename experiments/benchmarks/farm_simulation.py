"""What a farm of many workers would do, from times measured on a few: one sender, one link, W workers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

BUSY = 0.9
"""Utilisation from which a part of the farm counts as the bottleneck."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one block costs besides its solve, in seconds.

    Attributes
    ----------
    send, receive : float
        Processor time of the process that hands out blocks, for the block and for its answer.
    transfer : float
        Time of the block on the link between that process and the workers.
    """

    send: float
    receive: float
    transfer: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A simulated run: its length and the utilisation of each part, as shares of it."""

    workers: int
    blocks: int
    seconds: float
    busy: dict[str, float]

    @property
    def speedup(self) -> float:
        """Over one worker that pays nothing for sending."""
        return self.busy["workers"] * self.workers

    @property
    def bottleneck(self) -> str:
        """The part that is busy nearly all the time; else the wait for the last blocks."""
        part = max(self.busy, key=lambda name: self.busy[name])
        return part if self.busy[part] >= BUSY else "start and end: too few blocks a worker"


def simulate(durations: Sequence[float], workers: int, costs: Costs) -> Forecast:
    """Run blocks through the farm as `cbs_opt.solve_blocks` does, twice as many in flight as workers.

    Parameters
    ----------
    durations : sequence of float
        Seconds that each block takes on a worker, in the order in which they are handed out.
    workers : int
    costs : Costs

    Returns
    -------
    Forecast

    Notes
    -----
    The sender takes answers and hands out blocks one after the other; blocks cross the link one
    after the other and wait at the worker that is free first. O(blocks log(workers)).
    """
    sender = link = 0.0
    free = [0.0] * workers
    flying: list[float] = []
    for duration in durations:
        if len(flying) == 2 * workers:
            sender = max(sender, heapq.heappop(flying)) + costs.receive
        sender += costs.send
        link = max(link, sender) + costs.transfer
        ended = max(link, heapq.heappop(free)) + duration
        heapq.heappush(free, ended)
        heapq.heappush(flying, ended)
    while flying:
        sender = max(sender, heapq.heappop(flying)) + costs.receive
    count = len(durations)
    shares = {
        "workers": sum(durations) / workers,
        "sender": count * (costs.send + costs.receive),
        "link": count * costs.transfer,
    }
    return Forecast(
        workers=workers,
        blocks=count,
        seconds=sender,
        busy={name: share / sender for name, share in shares.items()},
    )
