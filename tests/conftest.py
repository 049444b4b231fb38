"""Settings that must stand before any library starts its threads."""

from __future__ import annotations

import os

# Small cases start many short parallel regions. Threads that wait for the next one in a busy loop
# take several times the processor time of the tests themselves where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
