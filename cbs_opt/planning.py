"""`plan`: what `prune` would do and take, without doing it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from cbs_opt.network.data import Data
from cbs_opt.pruning import prune
from cbs_opt.run_size import RunSize
from formulations.errors import ArgumentError


class _StatedError(Exception):
    """The plan is known; nothing more is wanted of the run."""


def plan(model: nn.Module, data: Data | None, **options: Any) -> RunSize:
    """State the size of a run of `prune` and its peak memory.

    Parameters
    ----------
    model, data
        As for `prune`. The network is not changed; the samples on which networks would be compared are
        read, and at most four of them run through it.
    **options
        The other arguments of `prune`, all of which are checked.

    Returns
    -------
    RunSize

    Raises
    ------
    CbsError
        What `prune` would raise before its first gradient, such as rows that do not fit on the disk.

    Examples
    --------
    >>> print(plan(model, (x, y), sparsity=0.9, partition="layer").summary())  # doctest: +SKIP
    """
    if "on_plan" in options:
        raise ArgumentError("on_plan", "given to plan", "use what plan returns")
    stated: list[RunSize] = []

    def stop(found: RunSize) -> None:
        stated.append(found)
        raise _StatedError

    with suppress(_StatedError):
        prune(model, data, **options, on_plan=stop)
    return stated[0]
