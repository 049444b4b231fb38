"""One block on a worker: what is sent, how it is solved there, and what comes back when it fails."""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cbs_opt.execution.array_store import ArrayCache, PackedProblem
from cbs_opt.solving import solve
from cbs_opt.system.threads import limit_numba, limit_process, limit_thread
from formulations.errors import CbsError
from formulations.incumbents import IncumbentPool
from formulations.problem import BlockProblem, FloatArray
from formulations.solution import BlockSolution, Limit, Limits, SolveStats, Termination

BlockMethod = str | Callable[..., BlockSolution]
"""The name of a method, or ``method(problem, program, *, limits, incumbent, **options)``."""

ARRAYS = ArrayCache()
"""The arrays of this process when it is a worker: it has to outlive the call that brought them."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is the same for all blocks of one call; `home` is the process that made the call."""

    method: BlockMethod
    program: str
    limits: Limits
    options: Mapping[str, Any]
    home: tuple[str, int]

    @property
    def label(self) -> str:
        """The name of the method, for solutions."""
        return self.method if isinstance(self.method, str) else getattr(self.method, "__name__", "callable")

    def apply(self, problem: BlockProblem, seed: int, incumbent: BlockSolution | None) -> BlockSolution:
        """Run the method on one block."""
        limits = replace(self.limits, seed=seed)
        if not isinstance(self.method, str):
            return self.method(problem, self.program, limits=limits, incumbent=incumbent, **self.options)
        return solve(
            problem,
            self.method,
            program=self.program,
            incumbent=incumbent,
            time_limit=limits.time_limit,
            rel_gap=limits.rel_gap,
            node_limit=limits.node_limit,
            iteration_limit=limits.iteration_limit,
            threads=limits.threads,
            seed=seed,
            **self.options,
        )


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """One block as it is sent: `attached` holds large arrays that the worker asked for, by digest."""

    problem: PackedProblem | BlockProblem
    seed: int
    incumbent: BlockSolution | None
    attached: Mapping[str, FloatArray]


def this_process() -> tuple[str, int]:
    """Machine and number of this process."""
    return socket.gethostname(), os.getpid()


def solve_parcel(recipe: Recipe, parcel: Parcel) -> BlockSolution | None:
    """Solve one block, whatever becomes of it; None asks for the block again with its arrays."""
    problem = parcel.problem
    if isinstance(problem, PackedProblem):
        unpacked = problem.unpack(ARRAYS, parcel.attached)
        if unpacked is None:
            return None
        problem = unpacked
    if this_process() != recipe.home:
        limit_process(recipe.limits.threads)
        limit_numba(recipe.limits.threads)
    elif threading.current_thread() is not threading.main_thread():
        limit_thread(recipe.limits.threads)
    else:
        limit_numba(recipe.limits.threads)
    began = time.perf_counter()
    try:
        solution = recipe.apply(problem, parcel.seed, parcel.incumbent)
        if isinstance(solution, BlockSolution):
            return solution
        why = f"{recipe.label} returned a {type(solution).__name__}, not a BlockSolution"
    except KeyboardInterrupt:
        return unsolved(recipe, problem, parcel.incumbent, "interrupted", limit=Limit.INTERRUPTED)
    except CbsError as error:
        why = f"{type(error).__name__}: {error}"
    except Exception as error:
        # One block's failure, foreseen or not, is its result; the traceback says where it was.
        why = "".join(traceback.format_exception(error)).strip()
    return unsolved(recipe, problem, parcel.incumbent, why, seconds=time.perf_counter() - began)


def unsolved(
    recipe: Recipe,
    problem: BlockProblem,
    incumbent: BlockSolution | None,
    message: str,
    *,
    limit: Limit | None = None,
    seconds: float = 0.0,
) -> BlockSolution:
    """A solution that says why there is none: an error, or an interrupt; with the warm start if it fits."""
    stats = SolveStats(seconds=seconds, message=message)
    termination = Termination.ERROR if limit is None else Termination.NO_SOLUTION
    try:
        pool = IncumbentPool(problem, recipe.program, incumbent)
        if pool.keep is not None:
            # After an interrupt the warm start is an answer; after an error the error is the news.
            termination = Termination.ERROR if limit is None else Termination.FEASIBLE
            warm = pool.solution(method=recipe.label, limit=limit, stats=stats)
            return replace(warm, termination=termination)
    except CbsError as error:
        stats = replace(stats, message=f"{message}; the warm start does not fit: {error}")
    return BlockSolution(
        keep=None,
        weights=None,
        objective=None,
        termination=termination,
        limit=limit,
        program=recipe.program,
        method=recipe.label,
        stats=stats,
    )
