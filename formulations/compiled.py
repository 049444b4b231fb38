"""One typed decorator for the numba kernels of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Compile a kernel with numba, cached on disk.

    Sums may be reassociated (that vectorises them), NaN and infinity keep their meaning, and a
    division by zero gives infinity as in numpy instead of raising.
    """
    kernel: Callable[Arguments, Result] = numba.njit(
        cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
    )(function)
    return kernel
