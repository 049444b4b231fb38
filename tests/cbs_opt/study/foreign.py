"""A package of another author, as its installation leaves it: a module and its metadata on the path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cbs_opt.select import methods
from cbs_opt.system.versions import versions
from formulations import plugins, solvers

WELL_BEHAVED = """
import numpy as np
from formulations.incumbents import IncumbentPool, magnitude_keep

def solve(problem, program, *, limits, incumbent=None, shift: int = 0):
    "Prune consecutive weights, from a given one on."
    keep = np.ones(problem.n, dtype=bool)
    keep[(shift + np.arange(problem.n_prune)) % problem.n] = False
    pool = IncumbentPool(problem, program, incumbent)
    pool.offer(keep)
    return pool.solution(method="consecutive")
"""

MISBEHAVED = """
import ctypes, dataclasses, os, time
from consecutive import solve

def segfault(problem, program, *, limits, incumbent=None):
    ctypes.string_at(0)

def deaf(problem, program, *, limits, incumbent=None):
    while True:
        time.sleep(60)

def hungry(problem, program, *, limits, incumbent=None):
    eaten = []
    while True:
        eaten.append(b"x" * 2**24)
        time.sleep(0.01)

def greedy_allocation(problem, program, *, limits, incumbent=None):
    return bytearray(2**38)

def leaves(problem, program, *, limits, incumbent=None):
    os._exit(3)

def severs(problem, program, *, limits, incumbent=None):
    os.closerange(3, 256)
    time.sleep(60)

def raises(problem, program, *, limits, incumbent=None):
    raise LookupError("nothing here")

def liar(problem, program, *, limits, incumbent=None):
    answer = solve(problem, program, limits=limits)
    return dataclasses.replace(answer, objective=0.5 * answer.objective)

def mute(problem, program, *, limits, incumbent=None):
    return None
"""


def write_package(folder: Path, name: str, source: str, points: dict[str, str], group: str) -> None:
    """Put a module and the metadata that declares its entry points into a folder of `sys.path`."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "\n".join(f"{point} = {target}" for point, target in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")


@contextmanager
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was written to `folder` counts as installed, in worker processes too."""
    monkeypatch.syspath_prepend(str(folder))
    forget()
    try:
        yield
    finally:
        monkeypatch.undo()
        forget()


def forget() -> None:
    """Look for plug-ins again at the next call."""
    versions.cache_clear()
    methods._plugged_in.cache_clear()
    solvers._plugged_in.cache_clear()


def write_misbehaved(folder: Path) -> None:
    """A good method and every kind of bad one."""
    write_package(folder, "consecutive", WELL_BEHAVED, {"consecutive": "consecutive:solve"}, plugins.METHODS)
    names = ("segfault", "deaf", "hungry", "greedy_allocation", "leaves", "severs", "raises", "liar", "mute")
    points = {name: f"misbehaved:{name}" for name in names}
    write_package(folder, "misbehaved", MISBEHAVED, points, plugins.METHODS)
