"""`solve_blocks`: many blocks over joblib's workers, with the same results however many there are."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, repeat
from typing import Any

import numpy as np
from joblib import Parallel, delayed, effective_n_jobs
from torch import Tensor

from cbs_opt.errors import ExecutorError
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.blockwise import checked_solution, require_dense
from cbs_opt.select.choice import NO_LEDGER, Choice, Ledger, Selector
from cbs_opt.select.methods import find_method
from cbs_opt.select.preparation import prepare
from cbs_opt.solving import solve
from cbs_opt.system.checks import whole_number
from cbs_opt.system.threads import limit_numba, limit_thread, thread_limit
from formulations.errors import ArgumentError, CbsError
from formulations.incumbents import IncumbentPool
from formulations.problem import BlockProblem, check_program
from formulations.solution import BlockSolution, Limit, Limits, SolveStats, Termination, stated_support
from formulations.support import Support

BlockMethod = str | Callable[..., BlockSolution]
"""The name of a method, or ``method(problem, program, *, limits, incumbent, **options)``."""
OnSolution = Callable[[int, BlockSolution], object]
Pair = tuple[BlockProblem, BlockSolution | None]
"""A block and its warm start."""
ROUND = 8
"""Blocks a worker that are handed out at a time where joblib's backend has no generators."""

log = logging.getLogger(__name__)


def solve_blocks(
    problems: Iterable[BlockProblem],
    method: BlockMethod = "swap_search",
    *,
    program: str,
    workers: int | None = None,
    incumbents: Iterable[BlockSolution | None] | None = None,
    time_limit: float | None = None,
    rel_gap: float = 1e-6,
    node_limit: int | None = None,
    iteration_limit: int | None = None,
    threads: int = 1,
    seed: int = 0,
    on_solution: OnSolution | None = None,
    **options: Any,
) -> list[BlockSolution]:
    """Solve one program on many blocks, on as many workers as there are.

    Parameters
    ----------
    problems : iterable of BlockProblem
        A generator is read as workers become free, so blocks need not fit in memory together.
    method : str or callable, default "swap_search"
        As in `solve`, or a function ``method(problem, program, *, limits, incumbent, **options)``
        that workers can import.
    program : {"selection", "joint"}
    workers : int, optional
        Processes. As for `joblib.Parallel`, ``joblib.parallel_config(backend="dask")`` (or "ray", or
        "threading") sends the blocks elsewhere, and tells the number of workers where none is given;
        by default one block after the other in this process.
    incumbents : iterable of BlockSolution or None, optional
        Warm starts, one a block.
    time_limit, rel_gap, node_limit, iteration_limit
        Of each block, see `solve`.
    threads : int, default 1
        Threads that each worker may use.
    seed : int, default 0
        Block ``i`` is solved with ``block_seed(seed, i)``, so results depend neither on the number of
        workers nor on the order in which they finish. A time limit can make them depend on speed.
    on_solution : callable, optional
        Called as ``on_solution(index, solution)`` in this thread whenever a block is done.
    **options
        Of the method.

    Returns
    -------
    list of BlockSolution
        In the order of `problems`. A block on which the method raised has `Termination.ERROR`, the reason
        in ``stats.message``, and its warm start if it had one; the others go on. Ctrl-C ends the call:
        blocks without an answer come back with `Limit.INTERRUPTED` and their warm start; what a generator
        had not yielded yet is left out.

    Raises
    ------
    UnknownMethodError, UnknownOptionError, UnsupportedProblemError, ArgumentError
        If the call is wrong for every block; nothing is run then.
    ExecutorError
        If the workers are lost, as by a block for which there is too little memory.

    Notes
    -----
    joblib writes arrays of 1 MiB or more to files that the workers of one machine map into memory, and
    removes them at the end; arrays that blocks share are written once.
    ``joblib.parallel_config(max_nbytes=None)`` sends them with the blocks instead.

    Examples
    --------
    >>> import numpy as np
    >>> rows = [np.random.default_rng(i).normal(size=(20, 12)) for i in range(3)]
    >>> blocks = [BlockProblem(weights=np.ones(12), n_prune=6, rows=r, damping=0.1) for r in rows]
    >>> [s.proved for s in solve_blocks(blocks, "branch_and_bound", program="joint")]
    [True, True, True]
    """
    if isinstance(method, str):
        find_method(method, program).check_options(options, program)
        prepare(method, program)
    elif not callable(method):
        raise ArgumentError("method", f"{method!r}", "pass the name of a method, or a function")
    limits = Limits(
        time_limit=time_limit,
        rel_gap=rel_gap,
        node_limit=node_limit,
        iteration_limit=iteration_limit,
        threads=threads,
        seed=seed,
    )
    call = _BlockCall(method=method, program=check_program(program), limits=limits, options=options)
    solutions, waiting = _run_blocks(
        call,
        _pairs(problems, incumbents),
        seed_of=lambda index: block_seed(seed, index),
        workers=None if workers is None else whole_number("workers", workers),
        on_solution=on_solution,
    )
    if waiting is not None and isinstance(problems, Sequence):
        # All of them are known, not only those that were handed out.
        warm = incumbents if isinstance(incumbents, Sequence) else repeat(None)
        waiting |= {
            index: pair
            for index, pair in enumerate(zip(problems, warm, strict=False))
            if index not in solutions
        }
    for index, (problem, incumbent) in (waiting or {}).items():
        solutions[index] = _unsolved(call, problem, incumbent, "interrupted", limit=Limit.INTERRUPTED)
    return [solutions[index] for index in sorted(solutions)]


def block_seed(seed: int, index: int) -> int:
    """Return the seed of block `index` in a call with `seed`: 31 bits, which every solver takes."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0] >> np.uint32(1))


def by_workers(
    solver: Callable[..., BlockSolution], name: str, program: str, workers: int | None
) -> Selector:
    """Return `cbs_opt.select.blockwise.by_solver` over joblib's workers: the same sets, block by block."""

    def select(
        blocks: Sequence[FisherBlock],
        counts: Sequence[int | Support],
        *,
        limits: Limits,
        warm: Sequence[Tensor] | None = None,
        ledger: Ledger = NO_LEDGER,
        **options: Any,
    ) -> list[Choice]:
        choices = [ledger.choice(number) for number in range(len(blocks))]
        unsolved = [number for number, choice in enumerate(choices) if choice is None]
        for number in unsolved:
            require_dense(blocks[number], name, program)

        def done(position: int, solution: BlockSolution) -> None:
            number = unsolved[position]
            advance(1)
            if solution.keep is not None and solution.limit is not Limit.INTERRUPTED:
                ledger.add(number, Choice.of_solution(blocks[number], solution))

        call = _BlockCall(method=solver, program=program, limits=limits, options=options)
        # One block at a time becomes a problem in float64, as workers take it.
        pairs = ((blocks[number].to_problem(counts[number]), None) for number in unsolved)
        known = len(blocks) - len(unsolved)
        with ledger.progress.phase("blocks", len(blocks), unit="block", done=known) as advance:
            solutions, waiting = _run_blocks(
                call, pairs, seed_of=lambda index: limits.seed, workers=workers, on_solution=done
            )
        if waiting is not None:
            raise KeyboardInterrupt
        for position, number in enumerate(unsolved):
            block = blocks[number]
            choices[number] = Choice.of_solution(block, checked_solution(block, solutions[position], name))
        return [choice for choice in choices if choice is not None]

    return select


def _this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


@dataclass(frozen=True, kw_only=True)
class _BlockCall:
    """What is the same for all blocks of one call; `home` is the process that made it."""

    method: BlockMethod
    program: str
    limits: Limits
    options: Mapping[str, Any]
    home: tuple[str, int] = field(default_factory=_this_process)

    @property
    def label(self) -> str:
        return self.method if isinstance(self.method, str) else getattr(self.method, "__name__", "callable")

    def apply(self, problem: BlockProblem, seed: int, incumbent: BlockSolution | None) -> BlockSolution:
        limits = replace(self.limits, seed=seed)
        if not isinstance(self.method, str):
            return self.method(problem, self.program, limits=limits, incumbent=incumbent, **self.options)
        call = {"program": self.program, "incumbent": incumbent, **asdict(limits), **self.options}
        return solve(problem, self.method, **call)

    def limit_threads(self) -> None:
        """Hold this worker to the threads of the call; the main thread of the caller holds itself."""
        if _this_process() != self.home or threading.current_thread() is not threading.main_thread():
            limit_thread(self.limits.threads)
        else:
            limit_numba(self.limits.threads)


def _solve_block(
    call: _BlockCall, index: int, problem: BlockProblem, seed: int, incumbent: BlockSolution | None
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
        return index, _unsolved(call, problem, incumbent, "interrupted", limit=Limit.INTERRUPTED)
    except CbsError as error:
        why = f"{type(error).__name__}: {error}"
    except Exception as error:
        # One block's failure, foreseen or not, is its result; the traceback says where it was.
        why = "".join(traceback.format_exception(error)).strip()
    return index, _unsolved(call, problem, incumbent, why, seconds=time.perf_counter() - began)


def _unsolved(
    call: _BlockCall,
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
        support=stated_support(problem),
        stats=stats,
    )


def _run_blocks(
    call: _BlockCall,
    pairs: Iterable[Pair],
    *,
    seed_of: Callable[[int], int],
    workers: int | None,
    on_solution: OnSolution | None = None,
) -> tuple[dict[int, BlockSolution], dict[int, Pair] | None]:
    """Return the solutions by position; after Ctrl-C also the blocks that were handed out and have none."""
    solutions: dict[int, BlockSolution] = {}
    waiting: dict[int, Pair] = {}
    reading: list[Exception] = []

    def tasks() -> Iterator[Any]:
        try:
            for index, (problem, incumbent) in enumerate(pairs):
                waiting[index] = problem, incumbent
                yield delayed(_solve_block)(call, index, problem, seed_of(index), incumbent)
        except Exception as error:
            reading.append(error)
            raise

    answers = _answers(workers, tasks())
    try:
        with thread_limit(call.limits.threads):
            while (answer := _next_of(answers, reading)) is not None:
                index, solution = answer
                solutions[index] = solution
                del waiting[index]
                if on_solution is not None:
                    on_solution(index, solution)
                if solution.limit is Limit.INTERRUPTED:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        log.warning("interrupted with %d blocks solved", len(solutions))
        return solutions, waiting
    finally:
        with warnings.catch_warnings():
            # joblib says how many blocks are cancelled; the caller knows.
            warnings.filterwarnings("ignore", ".*tasks which were still being processed", UserWarning)
            answers.close()
    return solutions, None


def _answers(workers: int | None, tasks: Iterator[Any]) -> Generator[tuple[int, BlockSolution], None, None]:
    """Run tasks by joblib and yield what comes back, in any order."""
    # Batches would be sized by the clock, and read further ahead.
    options = {"n_jobs": workers, "batch_size": 1}
    try:
        parallel = Parallel(return_as="generator_unordered", **options)
    except ValueError:
        # Ray's backend answers with whole lists: some blocks a worker at a time.
        size = ROUND * effective_n_jobs(workers)
        with Parallel(**options) as parallel:
            while batch := list(islice(tasks, size)):
                yield from parallel(batch)
    else:
        yield from parallel(tasks)


def _next_of(
    answers: Iterator[tuple[int, BlockSolution]], reading: Sequence[Exception]
) -> tuple[int, BlockSolution] | None:
    """Return the next answer; an error is the caller's where the blocks were read, else the workers'."""
    try:
        return next(answers, None)
    except Exception as error:
        if reading:
            raise reading[0] from None
        remedy = "look at the workers' logs and their memory; a run with run_dir goes on where it was"
        raise ExecutorError("workers", f"lost ({type(error).__name__}: {error})", remedy) from error


def _pairs(
    problems: Iterable[BlockProblem], incumbents: Iterable[BlockSolution | None] | None
) -> Iterator[Pair]:
    """Yield every block with its warm start, both checked."""
    warm = iter(repeat(None) if incumbents is None else incumbents)
    for index, problem in enumerate(problems):
        try:
            incumbent = next(warm)
        except StopIteration:
            remedy = "pass one a block; None where there is none"
            raise ArgumentError("incumbents", f"{index} for more blocks", remedy) from None
        entries = ("problems", problem, BlockProblem), ("incumbents", incumbent, BlockSolution)
        for argument, value, kind in entries:
            if not isinstance(value, kind) and (value is not None or kind is BlockProblem):
                found = f"entry {index} is a {type(value).__name__}"
                raise ArgumentError(argument, found, f"pass objects of type {kind.__name__}")
        yield problem, incumbent
