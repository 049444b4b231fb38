"""A worker process as the parent sees it: started, given runs, watched, ended by force.

The limits are hard because they are kept here, outside the process: a run past its time or its memory
is ended with SIGKILL, whatever it is busy with, together with every process of its group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

import psutil

from cbs_opt.study.errors import CRASHED, OUT_OF_MEMORY, TIMED_OUT, WorkerStartError
from cbs_opt.study.expansion import Run
from cbs_opt.study.worker import READY, STARTED

START_PATIENCE = 300.0
"""Seconds a new process may take to import what it needs."""
LOAD_PATIENCE = 120.0
"""Seconds a process may take to read a block, beside the warm-up."""
EXIT_PATIENCE = 2.0
"""Seconds between the end of a connection and that of its process."""
LONGEST_TAIL = 600
FATAL, MODULES = "Fatal Python error", "Extension modules:"
"""What `faulthandler` writes first and last."""
KEPT_SHARE = 0.25
"""A process that holds on to more than this share of its limit between runs is replaced."""
LIBRARIES = ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "NUMBA_NUM", "VECLIB_MAXIMUM")
"""What the variables begin with that end in _THREADS and hold numerical libraries to some threads."""


class Worker:
    """One process that solves runs; the threads of its numerical libraries are fixed when it starts."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.run: Run | None = None
        self.ready = False
        self.started: float | None = None
        self._submitted = time.perf_counter()
        self._largest = 0
        self._at_rest = 0
        self._killed = False
        # Opened for appending, so that it can be emptied while the process writes to it.
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        # Threads that wait in a busy loop would take the cores of the other workers.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        environment |= {f"{name}_THREADS": str(threads) for name in LIBRARIES}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cbs_opt.study.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                # Ctrl-C is for the parent, and a kill reaches what the process started.
                start_new_session=True,
                env=environment,
            )
        self._gauge = psutil.Process(self._process.pid)

    @property
    def idle(self) -> bool:
        """True if it can be given a run."""
        return self.ready and self.run is None

    def submit(self, run: Run, warm_up: bool) -> None:
        """Let it solve `run`, after a warm-up of the method if this process has had none."""
        self.run, self.started = run, None
        self._submitted = time.perf_counter()
        self._largest = 0
        os.ftruncate(self._log.fileno(), 0)
        # If it died while idle, `step` finds out and says so.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send((run, warm_up and run.limits.warm_up > 0.0))

    def step(self) -> dict[str, Any] | None:
        """Take its messages and look at its clock and memory; the columns of a row if its run has ended.

        A process that ended before it was ready is a `WorkerStartError`.
        """
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if message == READY:
                    self.ready, self._at_rest = True, self._resident()
                elif message == STARTED:
                    self.started = time.perf_counter()
                else:
                    return self._ended(message)
        except (EOFError, ConnectionResetError):
            return self._died()
        # A process that it left behind may hold the connection open.
        return self._overdue() if self.alive else self._died()

    @property
    def alive(self) -> bool:
        """True if it can go on to another run."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it, with everything that it started."""
        self._kill()
        self.connection.close()
        self._log.close()

    def _ended(self, outcome: dict[str, Any]) -> dict[str, Any]:
        run, self.run = self.run, None
        assert run is not None
        limit = run.limits.memory_gib * 2**30
        kept = self._resident() - self._at_rest
        if outcome["status"] == OUT_OF_MEMORY or kept > KEPT_SHARE * limit:
            self._kill()
        return outcome

    def _died(self) -> dict[str, Any]:
        try:
            ending = f"the process ended with {_exit_words(self._process.wait(EXIT_PATIENCE))}"
        except subprocess.TimeoutExpired:
            ending = "the process closed its connection"
        self._kill()
        said = self._tail()
        if not self.ready:
            raise WorkerStartError(f"a worker did not start, {ending}: {said}")
        return self._outcome(CRASHED, f"{ending}: {said}")

    def _overdue(self) -> dict[str, Any] | None:
        now = time.perf_counter()
        if self.run is None:
            if not self.ready and now - self._submitted > START_PATIENCE:
                self._kill()
                raise WorkerStartError(f"a worker process did not start in {START_PATIENCE:g} s")
            return None
        limits = self.run.limits
        resident = self._resident()
        self._largest = max(self._largest, resident)
        if resident > limits.memory_gib * 2**30:
            return self._outcome(OUT_OF_MEMORY, f"killed: over {limits.memory_gib:g} GiB of memory")
        if self.started is not None and now - self.started > limits.longest:
            note = f"killed: still running {limits.grace:g} s past its limit of {limits.time_limit:g} s"
            return self._outcome(TIMED_OUT, note)
        if self.started is None and now - self._submitted > limits.warm_up + LOAD_PATIENCE:
            return self._outcome(TIMED_OUT, "killed: the block was not read, or the warm-up did not end")
        return None

    def _outcome(self, status: str, note: str) -> dict[str, Any]:
        """End the process and return the columns of the run that it did not finish."""
        self._kill()
        self.run = None
        seconds = None if self.started is None else time.perf_counter() - self.started
        note = note.strip().removesuffix(":")
        return {"status": status, "note": note, "seconds": seconds, "peak_memory": self._largest or None}

    def _kill(self) -> None:
        """End the process and its group, which may outlive it; once, since numbers are used again."""
        if not self._killed:
            self._killed = True
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _resident(self) -> int:
        with suppress(psutil.NoSuchProcess):
            return int(self._gauge.memory_info().rss)
        return 0

    def _tail(self) -> str:
        """Return what it wrote last, on one line; of a fatal error the kind and the innermost calls."""
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        _, fatal, calls = text.rpartition(FATAL)
        shown = (fatal + calls.partition(MODULES)[0])[:LONGEST_TAIL] if fatal else text[-LONGEST_TAIL:]
        return " ".join(shown.split())


def _exit_words(code: int) -> str:
    names = {entry.value: entry.name for entry in signal.Signals}
    return f"exit code {code}" if code >= 0 else f"signal {names.get(-code, -code)}"
