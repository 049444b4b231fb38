"""Settings that must stand before any library starts its threads, and signals as tests expect them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# No test is timed.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

# Small cases start many short parallel regions. Threads that wait for the next one in a busy loop
# take several times the processor time of the tests themselves where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, also in a run that was started with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
