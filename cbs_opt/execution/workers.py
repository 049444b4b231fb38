"""Executors that blocks are handed to, and what to do when one of them breaks."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from joblib.externals import loky

from cbs_opt.errors import ExecutorError

UNKNOWN_SIZE = 64
"""Workers that an executor is taken to have which does not tell."""
PROCESS_POOLS = (ProcessPoolExecutor, loky.ProcessPoolExecutor)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where blocks are solved, for `solve_blocks` and `prune`.

    Parameters
    ----------
    executor : Executor, int or callable, optional
        Any `concurrent.futures.Executor`: a pool of processes or threads, loky's,
        ``dask.distributed.Client(...).get_executor()``, `cbs_opt.execution.ray.RayExecutor`, one of
        ``mpi4py.futures``. It is used and left open. A number starts that many processes for the
        call (loky). A callable makes an executor, which is shut down at the end, and a new one where
        it breaks. None solves one block after the other in this process.
    retries : int, default 2
        How often a block is handed out again after its worker was lost. The last time it runs with
        no other block in flight, so that a block that kills workers takes no other one with it.
    window : int, optional
        Blocks in flight at a time; by default twice the number of workers. A generator of blocks is
        read no further ahead than that.
    shared_folder : path, optional
        Where large arrays are written for the workers; see `cbs_opt.execution.array_store.ArrayStore`.

    Raises
    ------
    ExecutorError
        If `executor` is none of these.
    ArgumentError
        If a number is out of its range.
    """

    executor: Executor | Callable[[], Executor] | int | None = None
    retries: int = 2
    window: int | None = None
    shared_folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        given = self.executor
        count = isinstance(given, int) and not isinstance(given, bool) and given >= 1
        if not (given is None or count or isinstance(given, Executor) or callable(given)):
            remedy = "pass an Executor, a number of processes >= 1, or a callable that makes an Executor"
            raise ExecutorError("executor", f"{given!r}", remedy)
        for name, lowest in (("retries", 0), ("window", 1)):
            value = getattr(self, name)
            optional = name == "window" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise ExecutorError(name, f"{value!r}", f"pass a whole number >= {lowest}")


class Inline(Executor):
    """Runs what is submitted at once, in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Processes(Executor):
    """A number of processes that start with the first call, and again after they broke.

    As a context manager it ends them: at once if an exception leaves the context.
    """

    def __init__(self, count: int, threads: int = 1) -> None:
        self._max_workers = count
        self._threads = threads
        self._running: Executor | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._running is None:
            self._running = _processes(self._max_workers, self._threads)
        try:
            return self._running.submit(fn, *args, **kwargs)
        except BrokenExecutor:
            log.warning("a pool of %d processes broke and is replaced", self._max_workers)
            _end(self._running, kill=True)
            self._running = _processes(self._max_workers, self._threads)
            return self._running.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._running is not None:
            _end(self._running, kill=cancel_futures)
            self._running = None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.shutdown(cancel_futures=kind is not None)


def lasting(
    executor: Workers | Executor | Callable[[], Executor] | int | None,
) -> tuple[Workers | None, AbstractContextManager[object]]:
    """Workers for many calls, and the context after which what was started for them is gone."""
    if executor is None:
        return None, nullcontext()
    workers = executor if isinstance(executor, Workers) else Workers(executor=executor)
    if not isinstance(workers.executor, int):
        return workers, nullcontext()
    processes = Processes(workers.executor)
    return replace(workers, executor=processes), processes


class Pool:
    """The executor of one call, replaced where it breaks.

    Parameters
    ----------
    workers : Workers
    threads : int
        Threads of each worker that is started here.

    Attributes
    ----------
    in_process : bool
        Whether blocks are solved in this process, so that nothing need be shipped.
    size : int
        Number of workers, as far as the executor tells.
    """

    def __init__(self, workers: Workers, threads: int) -> None:
        self._make = _maker(workers.executor, threads)
        self._owned = not isinstance(workers.executor, Executor)
        self._threads = threads
        self._executor = workers.executor if isinstance(workers.executor, Executor) else self._make()
        if not isinstance(self._executor, Executor):
            found = f"a callable that made a {type(self._executor).__name__}"
            raise ExecutorError("executor", found, "let it make a concurrent.futures.Executor")
        self.in_process = isinstance(self._executor, Inline | ThreadPoolExecutor)
        self.size = 1 if isinstance(self._executor, Inline) else worker_count(self._executor)

    @property
    def inline(self) -> bool:
        """Whether a block is solved by the very call that submits it."""
        return isinstance(self._executor, Inline)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Hand out one call; a broken executor is replaced first.

        Raises
        ------
        ExecutorError
            If the executor was shut down or refuses calls for another reason.
        """
        for _ in range(2):
            try:
                # Dask would take two equal calls for one, and a second try for the failed first.
                kwargs = {"pure": False} if _is_dask(self._executor) else {}
                return self._executor.submit(function, *args, **kwargs)
            except BrokenExecutor:
                self.renew()
            except RuntimeError as error:
                remedy = "pass an executor that is open"
                raise ExecutorError("executor", f"it refused a block ({error})", remedy) from error
        raise ExecutorError("executor", "it broke twice before it took a block", "look at its workers' logs")

    def renew(self) -> None:
        """Put a new executor in the place of one that lost workers, if that is what pools do."""
        broken = self._executor
        if self._owned:
            _end(broken, kill=True)
        elif not isinstance(broken, PROCESS_POOLS):
            return
        log.warning("a pool of %d processes broke and is replaced", self.size)
        self._executor = self._make() if self._owned else _processes(self.size, self._threads)
        self._owned = True

    def close(self, *, kill: bool = False) -> None:
        """Shut down what was started here; with `kill`, without waiting for blocks that are running."""
        if self._owned:
            _end(self._executor, kill=kill)


def worker_count(executor: Executor) -> int:
    """Number of workers of an executor as far as it tells; each thread of a Dask worker counts."""
    if _is_dask(executor):
        return max(1, sum(executor._client.nthreads().values()))  # type: ignore[attr-defined]
    size = getattr(executor, "_max_workers", None)
    return size if isinstance(size, int) and size > 0 else UNKNOWN_SIZE


def _is_dask(executor: Executor) -> bool:
    # By name, so that Dask is imported only where it is used.
    return type(executor).__module__.partition(".")[0] == "distributed"


def _maker(executor: Executor | Callable[[], Executor] | int | None, threads: int) -> Callable[[], Executor]:
    if executor is None:
        return Inline
    if isinstance(executor, int):
        return lambda: _processes(executor, threads)
    if isinstance(executor, Executor):
        return lambda: executor
    return executor


def _processes(count: int, threads: int) -> Executor:
    """Fresh interpreters: forked ones inherit thread pools of numba and torch that no longer run."""
    pool: Executor = loky.ProcessPoolExecutor(
        max_workers=count,
        env=dict.fromkeys(THREAD_VARIABLES, str(threads)),
        initializer=_ignore_interrupts,
    )
    return pool


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(executor: Executor, *, kill: bool) -> None:
    if isinstance(executor, loky.ProcessPoolExecutor):
        executor.shutdown(wait=True, kill_workers=kill)
    else:
        executor.shutdown(wait=not kill, cancel_futures=kill)
