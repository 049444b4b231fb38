"""What a row builder asks of the place where rows are kept as they are made, so that a killed run goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from cbs_opt.network.data import Batch


class Journal(Protocol):
    """Rows of one pass over the data, appended as they are made and read back by a run that goes on.

    `cbs_opt.runs.rows.RowJournal` keeps them in the folder of a run.
    """

    def restore(self, gradient: Tensor) -> Iterable[Tensor]:
        """Yield the rows made before, (r, n) pieces not yet scaled; set `gradient` (n,) to their sum."""

    def seen(self, part: Batch, samples: int) -> bool:
        """Take note of a chunk that begins after `samples` samples; return whether its rows are there."""

    def take(self, rows: Tensor) -> None:
        """Take rows (r, n) that were made."""

    def save(self, gradient: Tensor, samples: int, *, done: bool = False) -> None:
        """Keep what was taken, of `samples` samples in all; `done` if no row comes any more."""


class NoJournal:
    """The journal of a run that keeps nothing."""

    def restore(self, gradient: Tensor) -> Iterable[Tensor]:
        return ()

    def seen(self, part: Batch, samples: int) -> bool:
        return False

    def take(self, rows: Tensor) -> None:
        pass

    def save(self, gradient: Tensor, samples: int, *, done: bool = False) -> None:
        pass
