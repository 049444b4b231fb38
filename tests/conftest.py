"""Settings that must stand before anything else is loaded, and signals as tests expect them."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

MOST_WORKERS = 4

COLLECTED_EVERY = 20_000, 20, 20
"""Objects that a collection of garbage waits for, and how many of a generation one of the next."""

# No test is timed.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

# Small cases start many short parallel regions. Threads that wait for the next one in a busy loop
# take several times the processor time of the tests themselves where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Each worker of a run reads every module of the tests, and dozens of tests start a process that reads the
# packages: what one has compiled the others find, where the environment forbids to keep it too.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes run the tests: one more than there are cores, as some wait for others."""
    return min(MOST_WORKERS, 1 + (os.cpu_count() or 1))


def pytest_collection_finish() -> None:
    """Look for garbage less often, and not among what is loaded by now, which stays to the end.

    That takes a twentieth of the processor time of the tests otherwise.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTED_EVERY)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, also in a run that was started with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
