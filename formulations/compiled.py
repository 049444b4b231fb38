"""The numba kernels of this package: how they are compiled, kept on disk and made ready in time.

Compiling all that an exact method uses takes about half a minute. It happens once an installation: the
result is kept beside the source or, where that cannot be written, in the user's cache folder. And it
happens in `make_ready`, before the clock of a method starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numba
from numba import types
from numba.core import event

from formulations.support import Cells

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

CUBE = numba.float64[:, :, ::1]
MATRIX = numba.float64[:, ::1]
VECTOR = numba.float64[::1]
INDICES = numba.int64[::1]
INDEX_ROWS = numba.int64[:, ::1]
FLAGS = numba.boolean[::1]
FLAG_ROWS = numba.boolean[:, ::1]
REAL = numba.float64
INTEGER = numba.int64
SWITCH = numba.boolean
CELLS = types.NamedUniTuple(INDICES, 2, Cells)  # type: ignore[no-untyped-call]


class BySize(NamedTuple):
    """A type that differs where sizes are `Cells` instead of a number."""

    count: Any
    cells: Any


SIZE = BySize(INTEGER, CELLS)
"""Of how many units are chosen: of all, or in each cell."""

SAVING_TRIES = 100
"""Kernels within a kernel whose saving may fail on a full disk before the error counts."""


def compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Compile a kernel when it is first used, and keep the result on disk where a folder can be written.

    Sums may be reassociated (that vectorises them), NaN and infinity keep their meaning, and a
    division by zero gives infinity as in numpy instead of raising.
    """
    kernel = numba.njit(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})(function)
    return kept_on_disk(kernel)  # type: ignore[no-any-return]


def kept_on_disk(kernel: Any) -> Any:
    """Keep what numba compiles for `kernel` on disk; leave it in memory where no folder can be written.

    With NUMBA_DISABLE_JIT=1 kernels are plain functions, of which there is nothing to keep.
    """
    if getattr(numba.config, "DISABLE_JIT", False):
        return kernel
    try:
        kernel.enable_caching()
    except (RuntimeError, OSError) as refusal:
        logger.debug("%s: %s", kernel.__name__, refusal)
    return kernel


def entry(*types: Any) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Declare the types that Python calls a kernel with, so that `make_ready` can compile it for them."""

    def declare(kernel: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        for name in BySize._fields:
            chosen = tuple(getattr(kind, name) if isinstance(kind, BySize) else kind for kind in types)
            setattr(kernel, f"{name}_types", chosen)
        return kernel

    return declare


def make_ready(kernels: Sequence[Callable[..., Any]], purpose: str, cells: bool = False) -> None:
    """Compile the kernels that are not compiled yet, or load them from disk.

    Parameters
    ----------
    kernels : sequence of kernels with an `entry`
    cells : bool
        Whether for sizes that are `Cells` instead of a number.
    purpose : str
        What they are for, as in "branch_and_bound (joint)". A warning says so if one has to be
        compiled; loading is silent, and takes some tenths of a second.
    """
    waiting: list[Any] = [kernel for kernel in kernels if not _is_ready(kernel, cells)]
    if not waiting:
        return
    with event.install_listener("numba:compile", _Announcement(purpose, waiting)):
        for kernel in waiting:
            _compile(kernel, cells)


def _types(kernel: Any, cells: bool) -> Any:
    return kernel.cells_types if cells else kernel.count_types


def _is_ready(kernel: Any, cells: bool) -> bool:
    return bool(getattr(numba.config, "DISABLE_JIT", False)) or _types(kernel, cells) in kernel.overloads


def _compile(kernel: Any, cells: bool) -> None:
    """Compile one kernel; what cannot be saved stays in memory."""
    for _ in range(SAVING_TRIES):
        try:
            kernel.compile(_types(kernel, cells))
        except OSError as error:
            # Each try has compiled one more of the kernels that this one calls.
            logger.warning("%s cannot be kept on disk and will be compiled again: %s", kernel.__name__, error)
        if _is_ready(kernel, cells):
            return
    kernel.compile(_types(kernel, cells))


class _Announcement(event.Listener):
    """Says once that compilation has begun, when it has."""

    def __init__(self, purpose: str, kernels: Sequence[Any]) -> None:
        self.purpose = purpose
        self.kernels = kernels
        self.is_said = False

    def on_start(self, event: Any) -> None:
        if self.is_said:
            return
        self.is_said = True
        if all(kernel.stats.cache_path for kernel in self.kernels):
            often = "once after an installation"
        else:
            often = "in every process, as no folder can be written for the result (set NUMBA_CACHE_DIR)"
        logger.warning("compiling %s, %s; this takes up to a minute", self.purpose, often)

    def on_end(self, event: Any) -> None:
        pass
