"""What a farm of many workers would do, from times measured on a few: one sender, one link, W workers.

python -m tests.stress.farm_simulation     1 to 1 000 workers, from measured times
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cbs_opt import solve_blocks
from experiments.benchmarks.block_farm import METHOD, blocks, timed
from experiments.benchmarks.paced import paced

BUSY = 0.9
"""Utilisation from which a part of the farm counts as the bottleneck."""
WORKER_COUNTS = (1, 2, 10, 100, 1000)
BLOCKS_PER_WORKER = 20


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


def forecast(n: int, gigabits: float, sample: int, workers: int) -> Iterator[str]:
    """Simulate up to 1 000 workers on block times and sending costs measured here."""
    problems = blocks(sample, n)
    times = [s.stats.seconds for s in solve_blocks(problems, METHOD, program="joint")]
    # Blocks without work: what is left is the sender's.
    spent = timed(problems, workers, method=paced, seconds=0.0)[0] / sample
    arrays = (array for problem in problems for array in (problem.rows, problem.hessian))
    size = sum(array.nbytes for array in arrays if array is not None) / sample
    yield (
        f"measured on {sample} blocks of n = {n}: solve {np.mean(times):.3f} s (longest {max(times):.3f} s), "
        f"sender {1e3 * spent:.2f} ms, {size / 2**20:.2f} MiB a block; link {gigabits:g} Gbit/s"
    )
    costs = Costs(send=spent, receive=0.0, transfer=8 * size / (gigabits * 1e9))
    generator = np.random.default_rng(0)
    for count in WORKER_COUNTS:
        durations = generator.choice(times, size=BLOCKS_PER_WORKER * count)
        result = simulate(durations.tolist(), count, costs)
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result.busy.items())
        yield (
            f"{count:5d} workers, {result.blocks:6d} blocks: {result.speedup:7.1f} times one; "
            f"busy: {shares}; bottleneck: {result.bottleneck}"
        )
    limit = min(1.0 / spent, 1.0 / costs.transfer) * float(np.mean(times))
    yield f"sender and link keep {limit:.0f} workers busy with such blocks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the forecast, line by line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2, help="processes that are measured")
    parser.add_argument("--gigabits", type=float, default=10.0, help="of the link")
    options = parser.parse_args(arguments)
    for line in forecast(options.n, options.gigabits, options.blocks, options.workers):
        sys.stdout.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
