"""Blocks over joblib's workers, timed: two workers against one, Dask and Ray against loky.

    python -m experiments.benchmarks.block_farm scaling      64 blocks of n = 512 on 1 and 2 processes
    python -m experiments.benchmarks.block_farm engines      1-second blocks on loky, Dask and Ray

Starting processes is left out: every backend first solves a few blocks. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import joblib
import numpy as np

from cbs_opt import solve_blocks
from experiments.benchmarks.digits_blocks import synthetic_block
from experiments.benchmarks.paced import paced
from formulations import BlockProblem, BlockSolution

METHOD = "lower_bound"


def blocks(count: int, n: int) -> list[BlockProblem]:
    """Correlated blocks of n weights, half of them to be removed."""
    return [synthetic_block(n, 0.05, n // 2, samples=2 * n, seed=seed) for seed in range(count)]


def timed(
    problems: Sequence[BlockProblem], workers: int, **arguments: Any
) -> tuple[float, list[BlockSolution]]:
    """Seconds for all blocks on workers that run already, and the solutions."""
    solve_blocks(problems[:8], workers=workers, program="joint", **arguments)
    began = time.perf_counter()
    solutions = solve_blocks(problems, workers=workers, program="joint", **arguments)
    return time.perf_counter() - began, solutions


def scaling(count: int, n: int) -> Iterator[str]:
    """Two processes against one on the same blocks; the mark is 1.7 times."""
    problems = blocks(count, n)
    results = {}
    for workers in (1, 2):
        results[workers] = timed(problems, workers, method=METHOD)
        yield f"{workers} workers: {results[workers][0]:8.2f} s for {count} blocks of n = {n} by {METHOD}"
    pairs = zip(results[1][1], results[2][1], strict=True)
    same = all(one.bound == two.bound and np.array_equal(one.keep, two.keep) for one, two in pairs)
    ratio = results[1][0] / results[2][0]
    yield f"2 over 1: {ratio:.2f} times (mark 1.7); results {'equal' if same else 'DIFFER'}"


@contextmanager
def on_loky(workers: int) -> Iterator[None]:
    """Use processes of this machine."""
    with joblib.parallel_config(backend="loky"):
        yield


@contextmanager
def on_dask(workers: int) -> Iterator[None]:
    """Use a local Dask cluster of single-threaded processes."""
    from distributed import Client, LocalCluster

    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": None, "memory_limit": 0}
    with (
        LocalCluster(n_workers=workers, **options) as cluster,
        Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        yield


@contextmanager
def on_ray(workers: int) -> Iterator[None]:
    """Use a local Ray cluster."""
    import ray
    from ray.util.joblib import register_ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    register_ray()
    try:
        with joblib.parallel_config(backend="ray"):
            yield
    finally:
        ray.shutdown()


ENGINES: dict[str, Callable[[int], Any]] = {"loky": on_loky, "dask": on_dask, "ray": on_ray}


def engines(count: int, n: int, seconds: float, workers: int) -> Iterator[str]:
    """Yield the same blocks of fixed length on every engine; the mark is 15 % over loky."""
    problems = blocks(count, n)
    duration: dict[str, float] = {}
    for name, started in ENGINES.items():
        with started(workers):
            duration[name], _ = timed(problems, workers, method=paced, seconds=seconds)
        yield (
            f"{name:5} {duration[name]:8.2f} s for {count} blocks of {seconds:g} s on {workers} workers: "
            f"{duration[name] / duration['loky']:.3f} of loky (mark 1.15)"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was measured, line by line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("scaling", "engines"))
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2, help="of every engine")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block, for engines")
    options = parser.parse_args(arguments)
    if options.what == "scaling":
        lines = scaling(options.blocks, options.n)
    else:
        lines = engines(options.blocks, options.n, options.seconds, options.workers)
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
