"""How large a run of `prune` is, before its first gradient, and whether it fits the machine."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cbs_opt.curvature.kinds import ExactFisher, Fisher
from cbs_opt.curvature.rows import Rows, check_block, check_space, stored_bytes
from cbs_opt.errors import RowMemoryError
from cbs_opt.network.partition import BlockRule, Partition
from cbs_opt.system.memory import readable, resident
from cbs_opt.system.plain import plain
from cbs_opt.system.resources import ORDINARY, Resources

DOUBLE = 8
VECTORS = 8
"""Vectors of length n in float64 that a run has at a time: weights, scores, candidates and their copies."""
LARGEST_ARRAYS = 3


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """The size of a run, and an estimate of the memory that it takes.

    Attributes
    ----------
    n, blocks : int
        Weights that may go, and the blocks they are cut into.
    largest_block : str
        Name of the largest block.
    largest_block_n, largest_block_bytes : int
        Its weights, and the bytes of their rows.
    rows, row_bytes : int
        Gradient rows, fewer if the data end early, and the bytes of all of them.
    row_memory : int or None
        Bytes of rows that may be in memory at a time.
    row_dir : str or None
        The folder in which rows are kept; None if they are in memory.
    disk_bytes, disk_free_bytes : int
        What they take there and what is free; 0 in memory.
    arrays : mapping of str to int
        The three largest arrays of the run, in bytes.
    resident_bytes : int
        Of this process now.
    peak_bytes : int
        An estimate of the peak: ``resident_bytes`` and those three arrays. The network's activations, the
        data and what solvers take are not in it.
    alternatives : mapping of str to (int, int)
        By partition, "layer" or "row": the least `row_memory` with the rows on disk, and the peak then.
    """

    n: int
    blocks: int
    largest_block: str
    largest_block_n: int
    largest_block_bytes: int
    rows: int
    row_bytes: int
    row_memory: int | None
    row_dir: str | None
    disk_bytes: int
    disk_free_bytes: int
    arrays: dict[str, int]
    resident_bytes: int
    peak_bytes: int
    alternatives: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        values: dict[str, Any] = plain(self)
        return values

    def summary(self) -> str:
        """Return a few lines for people."""
        place = "in memory"
        if self.row_dir is not None:
            free = readable(self.disk_free_bytes)
            place = f"on disk in {self.row_dir}: {readable(self.disk_bytes)} of {free} free"
        largest = f"{self.largest_block}, {self.largest_block_n:,} weights"
        return (
            f"weights: {self.n:,} in {self.blocks:,} blocks\n"
            f"largest block: {largest}, {readable(self.largest_block_bytes)} of rows\n"
            f"gradient rows: {self.rows:,}, {readable(self.row_bytes)}, {place}\n"
            f"peak memory: about {readable(self.peak_bytes)}, {readable(self.resident_bytes)} of it now\n"
            f"largest arrays: {self.listed_arrays}"
        )

    @property
    def listed_arrays(self) -> str:
        """The largest arrays, for messages."""
        return ", ".join(f"{name} {readable(size)}" for name, size in self.arrays.items())


def run_size(
    partition: Partition,
    curvature: Fisher | Rows | None,
    *,
    layer_inputs: bool = False,
    resources: Resources = ORDINARY,
    itemsize: int = 4,
    available: int | None = None,
    staged: bool = False,
) -> RunSize:
    """Return the size of a run, without reading data.

    `curvature`: None for methods that look at weights alone. `layer_inputs`: whether the layer-input term is
    taken. `itemsize`: bytes of a number of the rows. `available`: samples that there are, if that is known.
    The exact Fisher has a row for each of them and each row of the last weight matrix. `staged`: rows of
    several stages stay in memory.
    """
    rows = _row_count(partition, curvature, available)
    memory = None if staged else resources.row_memory
    row_bytes = rows * partition.n * itemsize
    largest = max(partition.blocks, key=lambda block: block.stop - block.start)
    size = largest.stop - largest.start
    block_bytes = rows * size * itemsize
    if isinstance(curvature, Rows):
        fresh, on_disk = False, curvature.on_disk
        held = block_bytes if on_disk else 0
    else:
        fresh, on_disk = rows > 0, memory is not None and row_bytes > memory
        held = row_bytes if memory is None else min(row_bytes, memory)
    folder = Path(resources.row_dir or tempfile.gettempdir()) if on_disk else None
    spans = [(span.stop - span.start, math.prod(span.shape[1:])) for span in partition.parameters]

    def arrays(held: int, largest: int) -> dict[str, int]:
        equations = min(rows, largest)
        sizes = {
            "gradient rows": held,
            "gradients of a chunk": resources.chunk_memory if fresh else 0,
            "second moments": DOUBLE * sum(fan**2 for _, fan in spans) if layer_inputs else 0,
            "channel factors": DOUBLE * max(min(n, largest) * fan for n, fan in spans) if layer_inputs else 0,
            "equations of a block": 2 * DOUBLE * equations**2,
            "vectors": VECTORS * DOUBLE * partition.n,
        }
        return dict(sorted(sizes.items(), key=lambda entry: -entry[1])[:LARGEST_ARRAYS])

    now = resident()
    largest_arrays = arrays(held, size)
    alternatives = {}
    if fresh and not staged:
        for rule, most in (("layer", max(n for n, _ in spans)), ("row", max(fan for _, fan in spans))):
            least = rows * most * itemsize
            alternatives[rule] = least, now + sum(arrays(least, most).values())
    return RunSize(
        n=partition.n,
        blocks=len(partition.blocks),
        largest_block=largest.name,
        largest_block_n=size,
        largest_block_bytes=block_bytes,
        rows=rows,
        row_bytes=row_bytes,
        row_memory=memory,
        row_dir=None if folder is None else str(folder),
        disk_bytes=0 if folder is None else stored_bytes(partition, rows, itemsize),
        disk_free_bytes=shutil.disk_usage(folder).free if folder is not None and folder.is_dir() else 0,
        arrays=largest_arrays,
        resident_bytes=now,
        peak_bytes=now + sum(largest_arrays.values()),
        alternatives=alternatives,
    )


def check_fits(size: RunSize, free: int | None = None) -> None:
    """Refuse a run that does not fit, before its first gradient.

    `free` are the bytes of memory that it may take; by default those that the machine has free. Raises
    `RowMemoryError` if the rows of the largest block are not within `row_memory`, or the run not within
    `free`: then with a partition and a `row_memory` that fit, if any do; `RowStoreError` if the folder for
    the rows is none, or has too little space.
    """
    if size.row_dir is not None:
        if size.row_memory is not None:
            column = size.largest_block_bytes // size.largest_block_n
            check_block(size.largest_block, size.largest_block_bytes, column, size.row_memory)
        check_space(Path(size.row_dir), size.disk_bytes)
    free = psutil.virtual_memory().available if free is None else free
    needed = size.peak_bytes - size.resident_bytes
    if needed <= free:
        return
    found = f"about {readable(needed)} ({size.listed_arrays}) where {readable(free)} are free"
    remedy = "use fewer samples, or more of them in a row"
    choice = _fitting(size, free)
    if choice is not None:
        remedy = f'use blocks of a "{choice[0]}" with row_memory={choice[1]}, or fewer samples'
    raise RowMemoryError("memory", found, remedy)


def fitting_blocks(size: RunSize, free: int | None = None) -> tuple[BlockRule, int | None]:
    """Return the partition and the `row_memory` that fit, where the caller asked for no partition.

    `size` is that of the run with one block. The partition is "global" if that fits, or if nothing does:
    `check_fits` then says so. Else it is "layer" or "row".
    """
    free = psutil.virtual_memory().available if free is None else free
    whole = size.row_memory is None or size.row_bytes <= size.row_memory
    if whole and size.peak_bytes - size.resident_bytes <= free:
        return "global", size.row_memory
    return _fitting(size, free) or ("global", size.row_memory)


def _fitting(size: RunSize, free: int) -> tuple[BlockRule, int] | None:
    """Return the first partition that fits `free` and the limit of the caller, with its `row_memory`."""
    for rule, (least, peak) in size.alternatives.items():
        allowed = size.row_memory is None or least <= size.row_memory
        if allowed and peak - size.resident_bytes <= free:
            return rule, least if size.row_memory is None else size.row_memory
    return None


def _row_count(partition: Partition, curvature: Fisher | Rows | None, available: int | None) -> int:
    if curvature is None:
        return 0
    if isinstance(curvature, Rows):
        return curvature.shape[0]
    samples = curvature.samples if available is None else min(curvature.samples, available)
    if isinstance(curvature, ExactFisher):
        return samples * partition.parameters[-1].shape[0]
    return max(1, samples // curvature.per_row)
