"""Methods for `solve_blocks` that misbehave on purpose, importable by worker processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numba
import numpy as np
from threadpoolctl import threadpool_info

from formulations import BlockProblem, BlockSolution, Limits
from formulations.incumbents import IncumbentPool, greedy
from formulations.solution import SolveStats


def drawn(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits,
    incumbent: BlockSolution | None,
    delay: float = 0.0,
) -> BlockSolution:
    """A random set by the seed of the block, after a wait that makes blocks finish out of order."""
    time.sleep(delay * (problem.n_prune % 3))
    keep = np.ones(problem.n, dtype=np.bool_)
    keep[np.random.default_rng(limits.seed).permutation(problem.n)[: problem.n_prune]] = False
    pool = IncumbentPool(problem, program)
    pool.offer(keep)
    return pool.solution(method="drawn", stats=SolveStats(message=f"{os.getpid()}-{threading.get_ident()}"))


def fatal(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits,
    incumbent: BlockSolution | None,
    folder: str,
    deaths: int,
) -> BlockSolution:
    """Kill the worker on a block whose name says "fatal", as often as `deaths`."""
    if problem.name == "fatal":
        for count in range(deaths):
            try:
                (Path(folder) / f"died-{count}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
    return greedy(problem, program, limits=limits)


def failing(problem: BlockProblem, program: str, *, limits: Limits, incumbent: BlockSolution | None) -> Any:
    """Raise, or return nonsense, on the blocks whose names say so."""
    if problem.name == "raises":
        raise ZeroDivisionError("no such luck")
    if problem.name == "nonsense":
        return 7
    if problem.name == "interrupted":
        raise KeyboardInterrupt
    return greedy(problem, program, limits=limits)


def thread_count(
    problem: BlockProblem, program: str, *, limits: Limits, incumbent: BlockSolution | None
) -> BlockSolution:
    """Report how many threads the libraries of the worker may use, the largest of them."""
    import torch

    most = max(
        [numba.get_num_threads(), torch.get_num_threads(), *(i["num_threads"] for i in threadpool_info())]
    )
    pool = IncumbentPool(problem, program)
    pool.offer_magnitude_if_empty()
    return pool.solution(method="thread_count", stats=SolveStats(message=str(most)))


def sleeping(
    problem: BlockProblem, program: str, *, limits: Limits, incumbent: BlockSolution | None, seconds: float
) -> BlockSolution:
    """Take a while, except on the block called "quick"."""
    time.sleep(0.0 if problem.name == "quick" else seconds)
    return greedy(problem, program, limits=limits)


def fingerprint(
    problem: BlockProblem, program: str, *, limits: Limits, incumbent: BlockSolution | None
) -> BlockSolution:
    """Report the SHA-256 of the data as they arrived."""
    pool = IncumbentPool(problem, program)
    pool.offer_magnitude_if_empty()
    return pool.solution(method="fingerprint", stats=SolveStats(message=problem.fingerprint()))
