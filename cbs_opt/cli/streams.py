"""Keep standard output for data while a solver runs."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT, STDERR = 1, 2


@contextmanager
def solver_messages_on_stderr() -> Iterator[None]:
    """Send what native code writes to file descriptor 1 to standard error.

    SCIP and Gurobi announce an interrupt there, whatever their output options say.
    """
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        yield
    finally:
        if os.name == "posix":
            # What C buffered must leave before the descriptor is standard output again.
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, STDOUT)
        os.close(kept)
