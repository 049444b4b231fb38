"""How many threads the libraries of this process may use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numba
import scipy.linalg  # noqa: F401  (its BLAS has threads of its own, which a limit reaches once it is loaded)
import torch
from threadpoolctl import threadpool_limits

SMALL_WORK = 2**25
"""Bytes of a run's rows up to which threads wait for one another longer than they work."""
_LIMITED = threading.local()
"""The limit that holds in a thread: looking through the loaded libraries takes milliseconds."""


@contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Hold BLAS, OpenMP, torch and numba to `threads` threads, and set all back at the end.

    The limit of numba is one of the calling thread; the others are of the process. Where the same limit holds
    already it costs nothing.
    """
    held = getattr(_LIMITED, "threads", None)
    if held == threads:
        yield
        return
    torch_before, numba_before = torch.get_num_threads(), numba.get_num_threads()
    try:
        limit_numba(threads)  # First: it loads libraries that have threads of their own.
        with threadpool_limits(limits=threads):
            torch.set_num_threads(threads)
            _LIMITED.threads = threads
            yield
    finally:
        _LIMITED.threads = held
        torch.set_num_threads(torch_before)
        numba.set_num_threads(numba_before)


def fitting_limit(size: int) -> AbstractContextManager[None]:
    """Hold work on so many bytes to one thread if it is small; else leave the libraries as they are."""
    return thread_limit(1) if size <= SMALL_WORK else nullcontext()


def limit_thread(threads: int) -> None:
    """Hold what the calling thread starts to `threads` threads for good, as in a worker.

    OpenMP and numba keep a limit of their own for every thread, which `thread_limit` elsewhere does not
    reach; BLAS keeps one for the process. Setting the same limit again costs nothing.
    """
    limit_numba(threads)  # First: it loads libraries that have threads of their own.
    if getattr(_LIMITED, "threads", None) != threads:
        threadpool_limits(limits=threads)
        torch.set_num_threads(threads)
        _LIMITED.threads = threads


def limit_numba(threads: int) -> None:
    """Hold the kernels that the calling thread starts to `threads` threads."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, most))
