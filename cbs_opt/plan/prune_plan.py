"""What a run of `prune` is going to do and take, stated before it starts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbs_opt.curvature.disk import check_space, stored_bytes
from cbs_opt.plan.memory_model import MemoryModel
from cbs_opt.system.memory import resident
from cbs_opt.system.sizes import readable

if TYPE_CHECKING:
    from cbs_opt.oneshot import PruneRun


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """The size of a run and the memory it takes.

    Attributes
    ----------
    n, n_prune : int
        Weights that may go, and how many will.
    blocks : int
    largest_block : str
        Name of the largest block.
    largest_block_n : int
        Its weights.
    rows : int
        Gradient rows; fewer if the data end early.
    row_bytes : int
        Of all of them.
    largest_block_bytes : int
        Of those of the largest block.
    row_dir : str or None
        The folder in which rows are kept; None if they are in memory.
    disk_bytes, disk_free_bytes : int
        What they take there and what is free; 0 in memory.
    method, program : str
    candidates : int
        Pruned networks that are tried.
    phases : mapping of str to int
        Most bytes that each part of the run adds to `resident_bytes`.
    resident_bytes : int
        Of this process when the plan was made: the network, the samples that networks are compared on,
        and the libraries.
    peak_bytes : int
        ``resident_bytes`` and the most that a phase adds.
    complete : bool
        False if the memory of the method is not known: the peak is then the least to expect.
    """

    n: int
    n_prune: int
    blocks: int
    largest_block: str
    largest_block_n: int
    rows: int
    row_bytes: int
    largest_block_bytes: int
    row_dir: str | None
    disk_bytes: int
    disk_free_bytes: int
    method: str
    program: str
    candidates: int
    phases: dict[str, int]
    resident_bytes: int
    peak_bytes: int
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        rows = f"{self.rows} rows, {readable(self.row_bytes)}"
        place = "in memory"
        if self.row_dir is not None:
            free = readable(self.disk_free_bytes)
            place = f"on disk in {self.row_dir}: {readable(self.disk_bytes)} of {free} free"
        largest = f"{self.largest_block}, {self.largest_block_n:,} weights"
        least = "" if self.complete else "at least "
        lines = [
            f"{self.n_prune:,} of {self.n:,} weights go ({self.method}, {self.program} program)",
            f"blocks: {self.blocks:,}, the largest {largest}, {readable(self.largest_block_bytes)} of rows",
            f"gradient rows: {rows}, {place}",
            f"networks tried: {self.candidates}",
            f"peak memory: {least}{readable(self.peak_bytes)}, {readable(self.resident_bytes)} of it now",
        ]
        lines += [f"  {name}: {least}+{readable(size)}" for name, size in self.phases.items()]
        return "\n".join(lines)


OnPlan = Callable[[PrunePlan], object]


def plan_of(run: PruneRun, memory_limit: int, *, staged: bool = False, kept: bool = False) -> PrunePlan:
    """The plan of a run that has drawn its sample.

    Parameters
    ----------
    run : PruneRun
    memory_limit : int
        For temporaries of the curvature.
    staged : bool, default False
        It is the first of several stages: sizes are those of the first, memory is the least to expect.
    kept : bool, default False
        Rows are kept in a `run_dir` too.

    Raises
    ------
    RowMemoryError, RowStoreError
        If the rows cannot be where they should.
    """
    partition, options = run.partition, run.options
    model = MemoryModel(run, memory_limit, kept=kept)
    largest = max(partition.blocks, key=lambda block: block.stop - block.start)
    size = largest.stop - largest.start
    folder, disk, free = None, 0, 0
    if model.on_disk:
        folder = Path(run.row_place.folder or tempfile.gettempdir())
        disk = stored_bytes(partition, model.rows, model.itemsize)
        check_space(folder, disk)
        free = shutil.disk_usage(folder).free
    phases = model.phases()
    now = resident()
    return PrunePlan(
        n=partition.n,
        n_prune=round(options.sparsity * partition.n),
        blocks=len(partition.blocks),
        largest_block=largest.name,
        largest_block_n=size,
        rows=model.rows,
        row_bytes=model.rows * partition.n * model.itemsize,
        largest_block_bytes=model.rows * size * model.itemsize,
        row_dir=None if folder is None else str(folder),
        disk_bytes=disk,
        disk_free_bytes=free,
        method=options.method,
        program=options.program,
        candidates=options.candidates,
        phases=phases,
        resident_bytes=now,
        peak_bytes=now + max(phases.values(), default=0),
        complete=model.complete and not staged,
    )
