"""Memory of this process: a limit on what it may allocate, and the peak of one run."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

ADDRESS_SLACK = 2**30
"""Address space beyond the memory limit, for libraries and for arenas that are reserved, not used."""
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"
"""What Linux's clear_refs takes to forget the peak."""


def limit_allocations(memory_bytes: int) -> None:
    """Let allocations fail that would take this process `memory_bytes` beyond what it has mapped.

    Reserved address space counts, which a gauge of resident memory does not see; so this is the net
    under that gauge, for allocations faster than its ticks. Linux only.
    """
    if sys.platform != "linux":
        return
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = mapped + memory_bytes + ADDRESS_SLACK
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))


def reset_peak() -> None:
    """Start a new measurement of the peak, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    except OSError:
        # Not on this system; `peak` is then that of the whole process so far.
        return


def peak() -> int | None:
    """Largest resident memory since `reset_peak` in bytes, None where the system does not say."""
    return _status("VmHWM:")


def resident() -> int:
    """Resident memory now in bytes; where the system does not say, the peak of the process so far."""
    now = _status("VmRSS:")
    return process_peak() if now is None else now


def process_peak() -> int:
    """Return the largest resident memory of the process so far in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(field: str) -> int | None:
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return None
