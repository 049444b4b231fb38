"""`solve_blocks`: many blocks over any executor, with the same results whatever the executor is."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from cbs_opt.errors import ExecutorError
from cbs_opt.execution.array_store import ArrayStore, PackedProblem
from cbs_opt.execution.jobs import BlockMethod, Parcel, Recipe, solve_parcel, this_process, unsolved
from cbs_opt.execution.workers import Pool, Workers
from cbs_opt.preparation import prepare
from cbs_opt.select.methods import find_method
from cbs_opt.system.threads import thread_limit
from formulations.errors import ArgumentError
from formulations.problem import BlockProblem, FloatArray, check_program
from formulations.solution import BlockSolution, Limit, Limits

OnSolution = Callable[[int, BlockSolution], object]
QUIET = 600.0
"""Seconds without a block that came back after which the log says so: a cluster may have lost its workers."""

log = logging.getLogger(__name__)


def solve_blocks(
    problems: Iterable[BlockProblem],
    method: BlockMethod = "swap_search",
    *,
    program: str,
    executor: Workers | Executor | Callable[[], Executor] | int | None = None,
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
    executor : Executor, int, callable or Workers, optional
        See `Workers`, which also has retries, the number of blocks in flight and the folder for
        shared arrays. By default one block after the other in this process.
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
        In the order of `problems`. A block on which the method raised, or whose workers were lost
        too often, has `Termination.ERROR`, the reason in ``stats.message``, and its warm start if it
        had one; the others go on. Ctrl-C ends the call: blocks without an answer come back with
        `Limit.INTERRUPTED` and their warm start; what a generator had not given yet is left out.

    Raises
    ------
    UnknownMethodError, UnknownOptionError, UnsupportedProblemError, ArgumentError
        If the call is wrong for every block; nothing is run then.
    ExecutorError
        If `executor` is no executor, or takes no blocks.

    Notes
    -----
    An array of 1 MiB or more is written once to a file named by its content, which workers map into
    memory; blocks that share a Hessian or rows (the same array object) share the file, and the copies
    of one machine's workers are one in memory. A worker that does not see the file asks for the
    array, gets it with the block and keeps it.

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
    recipe = Recipe(
        method=method, program=check_program(program), limits=limits, options=options, home=this_process()
    )
    workers = executor if isinstance(executor, Workers) else Workers(executor=executor)
    warm = repeat(None) if incumbents is None else incumbents
    seed_of = functools.partial(block_seed, seed)
    return Dispatch(recipe, problems, warm, seed_of, workers, on_solution).run()


def block_seed(seed: int, index: int) -> int:
    """The seed of block `index` in a call with `seed`: 31 bits, which every solver takes."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0] >> np.uint32(1))


@dataclass(kw_only=True, eq=False)
class Job:
    """One block until it has an answer; `losses` counts the workers that were lost with it."""

    index: int
    problem: BlockProblem
    incumbent: BlockSolution | None
    payload: PackedProblem | BlockProblem
    attached: dict[str, FloatArray] = field(default_factory=dict)
    losses: int = 0


class Dispatch:
    """The blocks of one call on their way to the workers and back.

    Parameters
    ----------
    recipe : Recipe
    problems : iterable of BlockProblem
    incumbents : iterable of BlockSolution or None
        As many as there are problems.
    seed_of : callable
        From the index of a block to its seed.
    workers : Workers
    on_solution : callable, optional
    """

    def __init__(
        self,
        recipe: Recipe,
        problems: Iterable[BlockProblem],
        incumbents: Iterable[BlockSolution | None],
        seed_of: Callable[[int], int],
        workers: Workers,
        on_solution: OnSolution | None = None,
    ) -> None:
        self._recipe = recipe
        self._problems = problems
        self._unread = enumerate(iter(problems))
        self._warm = incumbents
        self._incumbents = iter(incumbents)
        self._seed_of = seed_of
        self._on_solution = on_solution
        self._retries = workers.retries
        self._pool = Pool(workers, recipe.limits.threads)
        self._store = None if self._pool.in_process else _store(workers)
        self._window = workers.window or (1 if self._pool.inline else 2 * self._pool.size)
        self._open: dict[int, Job] = {}
        self._flying: dict[Future[Any], Job] = {}
        self._lost: deque[Job] = deque()
        self._suspects: deque[Job] = deque()
        self._alone: Job | None = None
        self._arrived: SimpleQueue[Future[Any]] = SimpleQueue()
        self._done: dict[int, BlockSolution] = {}

    def run(self) -> list[BlockSolution]:
        """Solve every block; solutions in the order of the problems."""
        finished = False
        try:
            with thread_limit(self._recipe.limits.threads) if self._pool.in_process else nullcontext():
                while self._fill():
                    self._receive(self._arrival())
            finished = True
        except KeyboardInterrupt:
            self._interrupt()
        finally:
            for future in list(self._flying):
                future.cancel()
            self._pool.close(kill=not finished)
            if self._store is not None:
                self._store.close()
        return [self._done[index] for index in sorted(self._done)]

    def _arrival(self) -> Future[Any]:
        """The next block that comes back; a long wait is logged, since some executors wait for ever."""
        while True:
            try:
                return self._arrived.get(timeout=QUIET)
            except Empty:
                out = sorted(job.index for job in self._flying.values())
                log.warning(
                    "no block came back for %g s; %d are out, first block %d: has the executor workers?",
                    QUIET,
                    len(out),
                    out[0],
                )

    def _fill(self) -> bool:
        """Hand out blocks until the window is full; whether any is in flight."""
        while len(self._flying) < self._window:
            job = self._next()
            if job is None:
                break
            self._launch(job)
        return bool(self._flying)

    def _next(self) -> Job | None:
        if self._alone is not None:
            return None
        if self._lost:
            return self._lost.popleft()
        if self._suspects:
            if not self._flying:
                self._alone = self._suspects.popleft()
            return self._alone
        return self._read()

    def _read(self) -> Job | None:
        try:
            index, problem = next(self._unread)
        except StopIteration:
            return None
        try:
            incumbent = next(self._incumbents)
        except StopIteration:
            remedy = "pass one a block; None where there is none"
            raise ArgumentError("incumbents", f"{index} for more blocks", remedy) from None
        _check_entry("problems", index, problem, BlockProblem)
        if incumbent is not None:
            _check_entry("incumbents", index, incumbent, BlockSolution)
        payload = problem if self._store is None else self._store.pack(problem)
        self._open[index] = Job(index=index, problem=problem, incumbent=incumbent, payload=payload)
        return self._open[index]

    def _launch(self, job: Job) -> None:
        parcel = Parcel(
            problem=job.payload,
            seed=self._seed_of(job.index),
            incumbent=job.incumbent,
            attached=job.attached,
        )
        future = self._pool.submit(solve_parcel, self._recipe, parcel)
        self._flying[future] = job
        future.add_done_callback(self._arrived.put)

    def _receive(self, future: Future[Any]) -> None:
        job = self._flying.pop(future)
        if self._alone is job:
            self._alone = None
        # A worker catches what the method raises, so an exception here is the loss of the worker.
        error = CancelledError("cancelled") if future.cancelled() else future.exception()
        if error is not None:
            self._lose(job, error)
            return
        solution: BlockSolution | None = future.result()
        if solution is None:
            assert self._store is not None
            assert isinstance(job.payload, PackedProblem)
            job.attached = self._store.arrays(job.payload)
            self._lost.append(job)
            return
        self._finish(job, solution)
        if self._pool.inline and solution.limit is Limit.INTERRUPTED:
            raise KeyboardInterrupt

    def _lose(self, job: Job, error: BaseException) -> None:
        job.losses += 1
        reason = f"{type(error).__name__}: {error}"
        log.warning("block %d: worker lost (%s)", job.index, reason)
        if job.losses > self._retries:
            message = f"its worker was lost {job.losses} times, the last time with {reason}"
            self._finish(job, unsolved(self._recipe, job.problem, job.incumbent, message))
        elif job.losses == self._retries:
            self._suspects.append(job)
        else:
            self._lost.append(job)

    def _finish(self, job: Job, solution: BlockSolution) -> None:
        self._done[job.index] = solution
        del self._open[job.index]
        if self._store is not None and isinstance(job.payload, PackedProblem):
            self._store.release(job.payload)
        if self._on_solution is not None:
            self._on_solution(job.index, solution)

    def _interrupt(self) -> None:
        """Give every block that is known and has no answer one that says so."""
        log.warning("interrupted with %d blocks solved", len(self._done))
        known = {index: (job.problem, job.incumbent) for index, job in self._open.items()}
        if isinstance(self._problems, Sequence):
            warm = self._warm if isinstance(self._warm, Sequence) else repeat(None)
            pairs = zip(self._problems, warm, strict=False)
            known |= {index: pair for index, pair in enumerate(pairs) if index not in self._done}
        for index, (problem, incumbent) in known.items():
            self._done[index] = unsolved(
                self._recipe, problem, incumbent, "interrupted", limit=Limit.INTERRUPTED
            )


def _check_entry(argument: str, index: int, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        found = f"entry {index} is a {type(value).__name__}"
        raise ArgumentError(argument, found, f"pass objects of type {kind.__name__}")


def _store(workers: Workers) -> ArrayStore:
    try:
        return ArrayStore(workers.shared_folder)
    except OSError as error:
        found = f"{workers.shared_folder} cannot be written ({error})"
        raise ExecutorError("shared_folder", found, "pass a folder that exists and can be written") from error
