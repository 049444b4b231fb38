"""Ray as a `concurrent.futures.Executor`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from cbs_opt.errors import ExecutorError


class RayExecutor(Executor):
    """Runs calls as Ray tasks on the cluster that this process is connected to.

    Parameters
    ----------
    num_cpus : float, default 1
        Processors that Ray sets aside for each call; make it the number of threads a block may use.
    max_workers : int, optional
        Calls that the cluster can run at a time; by default its processors over `num_cpus`, as they are
        now.

    Raises
    ------
    ExecutorError
        If Ray is not installed or not initialised.

    Notes
    -----
    Ray is never started or stopped here: call ``ray.init()`` first. A task whose worker dies fails
    once, without Ray's own retries, so that whoever submitted it decides.

    Examples
    --------
    >>> import ray  # doctest: +SKIP
    >>> ray.init()  # doctest: +SKIP
    >>> solve_blocks(problems, program="joint", executor=RayExecutor())  # doctest: +SKIP
    """

    def __init__(self, *, num_cpus: float = 1.0, max_workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ExecutorError("executor", "ray is not installed", 'pip install "cbs-opt[ray]"') from error
        if not ray.is_initialized():
            raise ExecutorError("executor", "ray is not initialised", "call ray.init() first")
        self._ray: Any = ray
        self._options = {"num_cpus": num_cpus, "max_retries": 0}
        self._max_workers = max_workers or max(1, int(self._ray.cluster_resources().get("CPU", 1) / num_cpus))
        self._lock = threading.Lock()
        self._running: set[Future[Any]] = set()
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start ``fn(*args, **kwargs)`` as a Ray task."""
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            reference = self._ray.remote(fn).options(**self._options).remote(*args, **kwargs)
            future = _RayFuture(self._ray, reference)
            self._running.add(future)
        future.add_done_callback(self._forget)
        reference.future().add_done_callback(future.take)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; wait for those that run, or cancel them. The cluster stays up."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for future in running:
            if cancel_futures:
                future.cancel()
            elif wait:
                future.exception()

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._running.discard(future)


class _RayFuture(Future[Any]):
    """A future whose `cancel` also ends the Ray task, running or not."""

    def __init__(self, ray: Any, reference: Any) -> None:
        super().__init__()
        self._ray = ray
        self._reference = reference

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled:
            self._ray.cancel(self._reference, force=True)
        return cancelled

    def take(self, done: Future[Any]) -> None:
        """Take over the outcome of the Ray task, unless it was cancelled here."""
        if not self.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is None:
            self.set_result(done.result())
        else:
            self.set_exception(error)
