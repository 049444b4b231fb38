"""What a row says about the software and the machine that made it."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

from formulations.plugins import METHODS, SOLVERS

LIBRARIES = ["cbs-opt", "numpy", "scipy", "numba", "torch"]
"""What every run rests on; those that call solvers rest on the others as well."""
BACKENDS = ["pyomo", "highspy", "ortools", "pyscipopt", "gurobipy"]


@cache
def versions() -> dict[str, str]:
    """Versions of Python, of every package that a result may depend on, and of plug-ins."""
    installed = {"python": platform.python_version()}
    for name in LIBRARIES + BACKENDS:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    for group in (METHODS, SOLVERS):
        for point in metadata.entry_points(group=group):
            if point.dist is not None:
                installed[point.dist.name] = point.dist.version
    return installed


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that take part in every run."""
    return {name: versions()[name] for name in ("python", "torch", "cbs-opt")}


@cache
def machine() -> dict[str, str | int | float]:
    """System, processor, cores that this process may use, memory in GiB; no name of the host."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text(errors="replace") if listing.exists() else ""
    match = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    return (match[1].strip() if match else platform.processor()) or "unknown"
