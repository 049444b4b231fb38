"""Memory: sizes as people write them, what this process has and had at most, and a limit on it."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import psutil

UNITS: dict[str, int] = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": int(base**power)
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
ADDRESS_SLACK = 2**30
"""Address space beyond the memory limit, for libraries and for arenas that are reserved, not used."""
STATUS = Path("/proc/self/status")
GROUPS = Path("/proc/self/cgroup")
GROUP_FILES = Path("/sys/fs/cgroup")
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
    match = re.search(r"VmHWM:\s*(\d+)", STATUS.read_text()) if STATUS.exists() else None
    return None if match is None else 1024 * int(match[1])


def resident() -> int:
    """Resident memory now in bytes."""
    return int(psutil.Process().memory_info().rss)


def free_memory(groups: Path = GROUPS, root: Path = GROUP_FILES) -> int:
    """Return the bytes of memory that this process may still take: of the machine, and of its control groups.

    `groups` says which they are, and the files under `root` their limits.
    """
    left = [int(psutil.virtual_memory().available)]
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, place = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        folder = root / "memory" if kinds else root
        names = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        # In a container the place may be that outside, where the innermost group is at the root.
        paths = [folder, *(folder / Path(place.lstrip("/")).parent, folder / place.lstrip("/"))]
        left += [_left(path, *names) for path in paths]
    return min(left)


def _left(folder: Path, limit: str, used: str) -> int:
    """Return what a control group has left, without the file pages that the system gives up for it."""
    try:
        most, now = (int((folder / f"memory.{name}").read_text()) for name in (limit, used))
        cached = re.search(
            r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE
        )
    except (OSError, ValueError):
        # No such group, or one without a limit ("max").
        return sys.maxsize
    return max(0, most - now + (int(cached[1]) if cached else 0))


def process_peak() -> int:
    """Return the largest resident memory of the process so far in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def readable(size: int) -> str:
    """``1536`` as "1.5 KiB"; exact below one KiB."""
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024.0:
            break
        amount, unit = amount / 1024.0, larger
    return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"


def parsed(text: str) -> int:
    """``"2GB"``, ``"500 MiB"`` or ``"1e9"`` as bytes.

    Raises `ValueError` if the text is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text!r} is no size; write such as 2GB or 500MiB")
    amount = float(match[1]) * float(UNITS[match[2]])
    if not 1.0 <= amount < 2.0**63:
        raise ValueError(f"{text!r} is no size of memory")
    return round(amount)
