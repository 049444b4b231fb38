"""Blocks over executors, timed: two workers against one, Dask and Ray against loky, a thousand foretold.

    python -m experiments.benchmarks.block_farm scaling      64 blocks of n = 512 on 1 and 2 processes
    python -m experiments.benchmarks.block_farm engines      1-second blocks on loky, Dask and Ray
    python -m experiments.benchmarks.block_farm forecast     1 to 1 000 workers, from measured times

Starting processes is left out: every executor first solves a few blocks. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
from cbs_opt.execution.array_store import SHARED_FROM
from cbs_opt.execution.workers import Processes

from cbs_opt import solve_blocks
from experiments.benchmarks.digits_blocks import synthetic_block
from experiments.benchmarks.farm_simulation import Costs, simulate
from experiments.benchmarks.paced import paced
from formulations import BlockProblem, BlockSolution

METHOD = "lower_bound"
WORKER_COUNTS = (1, 2, 10, 100, 1000)
BLOCKS_PER_WORKER = 20


def blocks(count: int, n: int) -> list[BlockProblem]:
    """Correlated blocks of n weights, half of them to be removed."""
    return [synthetic_block(n, 0.05, n // 2, samples=2 * n, seed=seed) for seed in range(count)]


def timed(
    problems: Sequence[BlockProblem], executor: Executor, **arguments: Any
) -> tuple[float, list[BlockSolution]]:
    """Seconds for all blocks on an executor whose workers run already, and the solutions."""
    solve_blocks(problems[:8], executor=executor, program="joint", **arguments)
    began = time.perf_counter()
    solutions = solve_blocks(problems, executor=executor, program="joint", **arguments)
    return time.perf_counter() - began, solutions


def scaling(count: int, n: int) -> Iterator[str]:
    """Two processes against one on the same blocks; the mark is 1.7 times."""
    problems = blocks(count, n)
    found = {}
    for workers in (1, 2):
        with Processes(workers) as executor:
            found[workers] = timed(problems, executor, method=METHOD)
        yield f"{workers} workers: {found[workers][0]:8.2f} s for {count} blocks of n = {n} by {METHOD}"
    pairs = zip(found[1][1], found[2][1], strict=True)
    same = all(one.bound == two.bound and np.array_equal(one.keep, two.keep) for one, two in pairs)
    ratio = found[1][0] / found[2][0]
    yield f"2 over 1: {ratio:.2f} times (mark 1.7); results {'equal' if same else 'DIFFER'}"


@contextmanager
def loky_executor(workers: int) -> Iterator[Executor]:
    """Processes of joblib's loky."""
    with Processes(workers) as executor:
        yield executor


@contextmanager
def dask_executor(workers: int) -> Iterator[Executor]:
    """A local Dask cluster of single-threaded processes."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client.get_executor()


@contextmanager
def ray_executor(workers: int) -> Iterator[Executor]:
    """A local Ray cluster."""
    import ray
    from cbs_opt.execution.ray import RayExecutor

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        yield RayExecutor()
    finally:
        ray.shutdown()


ENGINES: dict[str, Callable[[int], Any]] = {
    "loky": loky_executor,
    "dask": dask_executor,
    "ray": ray_executor,
}


def engines(count: int, n: int, seconds: float, workers: int) -> Iterator[str]:
    """The same blocks of fixed length on every engine; the mark is 15 % over loky."""
    problems = blocks(count, n)
    taken: dict[str, float] = {}
    for name, started in ENGINES.items():
        with started(workers) as executor:
            taken[name], _ = timed(problems, executor, method=paced, seconds=seconds)
        yield (
            f"{name:5} {taken[name]:8.2f} s for {count} blocks of {seconds:g} s on {workers} workers: "
            f"{taken[name] / taken['loky']:.3f} of loky (mark 1.15)"
        )


class Echo(Executor):
    """Pickles what it is given, as a pool does, and answers at once: what is left is the sender's work."""

    def __init__(self, answer: BlockSolution) -> None:
        self._answer = bytes(ForkingPickler.dumps(answer))
        self.bytes = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.bytes += len(ForkingPickler.dumps((fn, args, kwargs)))
        future: Future[Any] = Future()
        future.set_result(ForkingPickler.loads(self._answer))
        return future


def forecast(n: int, gigabits: float, sample: int) -> Iterator[str]:
    """Simulate up to 1 000 workers on block times and sending costs measured here."""
    problems = blocks(sample, n)
    solutions = solve_blocks(problems, METHOD, program="joint")
    times = [solution.stats.seconds for solution in solutions]
    echo = Echo(solutions[0])
    began = time.perf_counter()
    solve_blocks(problems, METHOD, program="joint", executor=echo)
    spent = (time.perf_counter() - began) / sample
    size = echo.bytes / sample + sum(array_bytes(problem) for problem in problems) / sample
    yield (
        f"measured on {sample} blocks of n = {n}: solve {np.mean(times):.3f} s (longest {max(times):.3f} s), "
        f"sender {1e3 * spent:.2f} ms, {size / 2**20:.2f} MiB a block; link {gigabits:g} Gbit/s"
    )
    costs = Costs(send=spent, receive=0.0, transfer=8 * size / (gigabits * 1e9))
    generator = np.random.default_rng(0)
    for workers in WORKER_COUNTS:
        durations = generator.choice(times, size=BLOCKS_PER_WORKER * workers)
        found = simulate(durations.tolist(), workers, costs)
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found.busy.items())
        yield (
            f"{workers:5d} workers, {found.blocks:6d} blocks: {found.speedup:7.1f} times one; "
            f"busy: {shares}; bottleneck: {found.bottleneck}"
        )
    limit = min(1.0 / spent, 1.0 / costs.transfer) * float(np.mean(times))
    yield f"sender and link keep {limit:.0f} workers busy with such blocks"


def array_bytes(problem: BlockProblem) -> int:
    """Bytes of the arrays of a block that travel beside its parcel, as files."""
    arrays = (problem.rows, problem.hessian)
    return sum(array.nbytes for array in arrays if array is not None and array.nbytes >= SHARED_FROM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was measured, line by line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("scaling", "engines", "forecast"))
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2, help="of every engine")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block, for engines")
    parser.add_argument("--gigabits", type=float, default=10.0, help="of the link, for the forecast")
    given = parser.parse_args(arguments)
    if given.what == "scaling":
        lines = scaling(given.blocks, given.n)
    elif given.what == "engines":
        lines = engines(given.blocks, given.n, given.seconds, given.workers)
    else:
        lines = forecast(given.n, given.gigabits, given.blocks)
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
