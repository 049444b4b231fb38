"""One block on a worker: how it is solved there, and what comes back when it fails."""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cbs_opt.solving import solve
from cbs_opt.system.threads import limit_numba, limit_thread
from formulations.errors import CbsError
from formulations.incumbents import IncumbentPool
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution, Limit, Limits, SolveStats, Termination

BlockMethod = str | Callable[..., BlockSolution]
"""The name of a method, or ``method(problem, program, *, limits, incumbent, **options)``."""


def this_process() -> tuple[str, int]:
    """Return the machine and the number of this process."""
    return socket.gethostname(), os.getpid()


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """What is the same for all blocks of one call; `home` is the process that made it."""

    method: BlockMethod
    program: str
    limits: Limits
    options: Mapping[str, Any]
    home: tuple[str, int] = field(default_factory=this_process)

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

    def limit_threads(self) -> None:
        """Hold this worker to the threads of the call; the main thread of the caller holds itself."""
        if this_process() != self.home or threading.current_thread() is not threading.main_thread():
            limit_thread(self.limits.threads)
        else:
            limit_numba(self.limits.threads)


def solve_block(
    call: BlockCall, index: int, problem: BlockProblem, seed: int, incumbent: BlockSolution | None
) -> tuple[int, BlockSolution]:
    """Solve one block, whatever becomes of it; return its index with its solution."""
    call.limit_threads()
    began = time.perf_counter()
    try:
        solution = call.apply(problem, seed, incumbent)
        if isinstance(solution, BlockSolution):
            return index, solution
        why = f"{call.label} returned a {type(solution).__name__}, not a BlockSolution"
    except KeyboardInterrupt:
        return index, unsolved(call, problem, incumbent, "interrupted", limit=Limit.INTERRUPTED)
    except CbsError as error:
        why = f"{type(error).__name__}: {error}"
    except Exception as error:
        # One block's failure, foreseen or not, is its result; the traceback says where it was.
        why = "".join(traceback.format_exception(error)).strip()
    return index, unsolved(call, problem, incumbent, why, seconds=time.perf_counter() - began)


def unsolved(
    call: BlockCall,
    problem: BlockProblem,
    incumbent: BlockSolution | None,
    message: str,
    *,
    limit: Limit | None = None,
    seconds: float = 0.0,
) -> BlockSolution:
    """Return a solution that says why there is none, with the warm start if that fits."""
    stats = SolveStats(seconds=seconds, message=message)
    termination = Termination.ERROR if limit is None else Termination.NO_SOLUTION
    try:
        pool = IncumbentPool(problem, call.program, incumbent)
        if pool.keep is not None:
            # After an interrupt the warm start is an answer; after an error the error is the news.
            termination = Termination.ERROR if limit is None else Termination.FEASIBLE
            warm = pool.solution(method=call.label, limit=limit, stats=stats)
            return replace(warm, termination=termination)
    except CbsError as error:
        stats = replace(stats, message=f"{message}; the warm start does not fit: {error}")
    return BlockSolution(
        keep=None,
        weights=None,
        objective=None,
        termination=termination,
        limit=limit,
        program=call.program,
        method=call.label,
        stats=stats,
    )
