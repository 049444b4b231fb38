"""How much memory each phase of a run adds to the process, from the sizes of what it allocates."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbs_opt.prune_run import PruneRun


class MemoryModel:
    """Bytes by phase."""

    def __init__(self, run: PruneRun, memory_limit: int) -> None:
        self.on_disk = False
        self.rows = 0
        self.itemsize = 4
        self.complete = False

    def phases(self) -> dict[str, int]:
        """Most bytes that each phase adds."""
        return {}
