"""The process that runs are solved in: ``python -m cbs_opt.study.worker``, started by `pool.Worker`.

It takes one run after another and answers each with what happened. Whatever goes wrong inside costs the
run it was given: the parent ends it by force. It dies with its parent, even inside a solver.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
READY = "ready"
STARTED = "started"


def main(handle: int, parent: int) -> None:
    """Answer runs on the socket with file descriptor `handle` until it closes; die with process `parent`."""
    _die_with(parent)
    faulthandler.enable()
    from cbs_opt.study.single_run import RunSolver
    from cbs_opt.system.memory import limit_allocations

    connection = Connection(handle)
    solver = RunSolver()
    # The libraries stay; without this every collection would walk through them.
    gc.collect()
    gc.freeze()
    connection.send(READY)
    while True:
        try:
            run, warm_up = connection.recv()
        except EOFError:
            return
        limit_allocations(int(run.limits.memory_gib * 2**30))
        if warm_up:
            solver.warm_up(run)
        solver.load(run)
        gc.collect()
        connection.send(STARTED)
        connection.send(solver.answer(run))


def _die_with(parent: int) -> None:
    """Let the kernel end this process with its parent; elsewhere than on Linux, a thread looks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
