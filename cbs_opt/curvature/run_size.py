"""How large a run of `prune` is, before its first gradient, and what of it is changed to fit the machine."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cbs_opt.curvature.kinds import ExactFisher, Fisher
from cbs_opt.curvature.rows import Rows, check_block, check_space, stored_bytes
from cbs_opt.errors import RowMemoryError
from cbs_opt.network.partition import BlockRule, Partition
from cbs_opt.system.memory import readable, resident
from cbs_opt.system.plain import plain
from cbs_opt.system.resources import ORDINARY, Resources

DOUBLE = 8
VECTORS = 3
"""Vectors of length n in float64 that a run has throughout: weights, their copies, the gradient and masks."""
SPREADING = 5
"""Further ones while the budget is spent over blocks, or the kept weights are moved."""
BLOCK_VECTORS = 32
"""Vectors of the length of a block that a search has at a time."""
GRADIENTS = 3
"""Gradients of the whole network that one backward pass has at a time, at least."""
SYSTEMS = 2
"""Systems of the kept weights of a block that are there while a search goes from one to the next."""
LARGEST_ARRAYS = 3
SHARES = ((1 / 3, 1 / 3), (1 / 2, 1 / 3), (1.0, 1 / 3), (1.0, 1.0))
"""Of the free memory, and of the free disk, that a run aims at which has to be changed to fit, in order."""
FEWEST_ROWS = 16
"""Rows below which no more samples are averaged into one."""


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
        An estimate of the peak: ``resident_bytes`` and all arrays that are there at a time. The network's
        activations, the data and what solvers take are not in it.
    changes : tuple of str
        What was changed so that the run fits the machine, in sentences.
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
    changes: tuple[str, ...] = ()

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
        changes = "".join(f"\nchanged: {change}" for change in self.changes)
        return (
            f"weights: {self.n:,} in {self.blocks:,} blocks\n"
            f"largest block: {largest}, {readable(self.largest_block_bytes)} of rows\n"
            f"gradient rows: {self.rows:,}, {readable(self.row_bytes)}, {place}\n"
            f"peak memory: about {readable(self.peak_bytes)}, {readable(self.resident_bytes)} of it now\n"
            f"largest arrays: {self.listed_arrays}{changes}"
        )

    @property
    def needed_bytes(self) -> int:
        """What the run takes beyond what the process has now."""
        return self.peak_bytes - self.resident_bytes

    @property
    def listed_arrays(self) -> str:
        """The largest arrays, for messages."""
        return ", ".join(f"{name} {readable(size)}" for name, size in self.arrays.items())


def run_size(
    partition: Partition,
    curvature: Fisher | Rows | None,
    *,
    layer_inputs: bool = False,
    in_double: bool = False,
    resources: Resources = ORDINARY,
    itemsize: int = 4,
    available: int | None = None,
    staged: bool = False,
) -> RunSize:
    """Return the size of a run, without reading data.

    `curvature`: None for methods that look at weights alone. `layer_inputs`: whether the layer-input term is
    taken. `in_double`: whether the method copies the rows of a block to float64. `itemsize`: bytes of a
    number of the rows. `available`: samples that there are, if that is known. The exact Fisher has a row for
    each of them and each row of the last weight matrix. `staged`: rows of several stages stay in memory.
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
        held = row_bytes if memory is None else min(row_bytes, max(memory, partition.n * itemsize))
    folder = Path(resources.row_dir or tempfile.gettempdir()) if on_disk else None
    spans = partition.parameters
    standing = {
        "gradient rows": held,
        "vectors of the network": VECTORS * DOUBLE * partition.n,
        "second moments": DOUBLE * sum(span.fan_in**2 for span in spans) if layer_inputs else 0,
    }
    chunk = max(resources.chunk_memory, GRADIENTS * itemsize * partition.n)
    passing = {"gradients of a chunk": chunk if fresh else 0}
    spreading = {"scores of the network": SPREADING * DOUBLE * partition.n}
    working = {
        "vectors of a block": BLOCK_VECTORS * DOUBLE * size,
        "rows of a block in float64": DOUBLE * rows * size if in_double else 0,
        "channel inverses": SYSTEMS * DOUBLE * _channel_numbers(partition) if layer_inputs else 0,
        "channel inverses times rows": SYSTEMS * itemsize * rows * size if layer_inputs else 0,
        "equations of a block": 2 * DOUBLE * min(rows, size) ** 2,
    }
    # These come one after the other.
    phases = passing, spreading, working
    arrays = {name: value for phase in (standing, *phases) for name, value in phase.items()}
    now = resident()
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
        arrays=dict(sorted(arrays.items(), key=lambda entry: -entry[1])[:LARGEST_ARRAYS]),
        resident_bytes=now,
        peak_bytes=now + sum(standing.values()) + max(sum(phase.values()) for phase in phases),
    )


def check_fits(size: RunSize, free: int, remedy: str = "use fewer samples, or more of them in a row") -> None:
    """Refuse a run that does not fit, before its first gradient.

    `free` are the bytes of memory that it may take. Raises `RowMemoryError` if the rows of the largest block
    are not within `row_memory`, or the run not within `free`, with `remedy`; `RowStoreError` if the folder
    for the rows is none, or has too little space.
    """
    if size.row_dir is not None:
        if size.row_memory is not None:
            column = size.largest_block_bytes // size.largest_block_n
            check_block(size.largest_block, size.largest_block_bytes, column, size.row_memory)
        check_space(Path(size.row_dir), size.disk_bytes)
    if size.needed_bytes > free:
        needed = f"about {readable(size.needed_bytes)} ({size.listed_arrays})"
        raise RowMemoryError("memory", f"{needed} where {readable(free)} are free", remedy)


@dataclass(frozen=True, kw_only=True)
class Way:
    """What of a run may be changed to make it fit: its blocks, rows on disk, samples averaged into a row."""

    blocks: BlockRule
    per_row: int = 1
    on_disk: bool = False


def ways(first: Way, rows: int, *, cut: bool, average: bool, disk: bool) -> Iterator[Way]:
    """Yield ways to do a run of so many rows, the best first, from the one that was asked for.

    Where blocks may be `cut`: by layer, then with rows on `disk`, then with fewer rows that `average` more of
    the same samples, down to some 16; last by output channel.
    """
    yield first
    factors = [1]
    while average and rows // (2 * factors[-1]) >= FEWEST_ROWS:
        factors.append(2 * factors[-1])
    for blocks in ("layer", "row") if cut else (first.blocks,):
        for factor in factors:
            for on_disk in (False, True) if disk else (False,):
                yield Way(blocks=blocks, per_row=first.per_row * factor, on_disk=on_disk)


def fitting(ways: Iterator[Way], size_of: Callable[[Way], RunSize], free: int) -> tuple[Way, RunSize] | None:
    """Return the first way that fits, with its size; None if none does.

    The first one may take all that is `free`, and all the disk; those that stray from what was asked for a
    third of each, so that others are left some, or more if none fits into that: see `SHARES`.
    """
    asked = next(ways)
    size = size_of(asked)
    if _fits(size, free, 1.0, 1.0):
        return asked, size
    for _, group in itertools.groupby(ways, key=lambda way: way.blocks):
        changed = [(way, size_of(way)) for way in group]
        for memory, disk in SHARES:
            for way, size in changed:
                if _fits(size, free, memory, disk):
                    return way, replace(size, changes=_changes(asked, way, size))
    return None


def _fits(size: RunSize, free: int, memory: float, disk: float) -> bool:
    on_disk = size.row_dir is not None
    within = size.row_memory is None or size.largest_block_bytes <= size.row_memory
    room = size.disk_bytes <= disk * size.disk_free_bytes
    return size.needed_bytes <= memory * free and (not on_disk or (within and room))


def _changes(asked: Way, way: Way, size: RunSize) -> tuple[str, ...]:
    """Return in sentences how a way differs from what was asked for."""
    changes = []
    if way.blocks != asked.blocks:
        changes.append(f'blocks are cut by "{way.blocks}", as one of {size.n:,} weights does not fit')
    if size.row_dir is not None:
        changes.append(f"gradient rows are on disk in {size.row_dir}, {readable(size.disk_bytes)}")
    if way.per_row != asked.per_row:
        changes.append(f"a row averages {way.per_row} samples, which makes {size.rows:,} rows")
    return tuple(changes)


def _channel_numbers(partition: Partition) -> int:
    """Return how many numbers the matrices of channels have, of the block where they have most."""
    totals = []
    spans = iter(partition.parameters)
    span = next(spans, None)
    for block in partition.blocks:
        total = 0
        while span is not None and span.start < block.stop:
            total += (min(span.stop, block.stop) - max(span.start, block.start)) * span.fan_in
            if span.stop > block.stop:
                break
            span = next(spans, None)
        totals.append(total)
    return max(totals, default=0)


def _row_count(partition: Partition, curvature: Fisher | Rows | None, available: int | None) -> int:
    if curvature is None:
        return 0
    if isinstance(curvature, Rows):
        return curvature.shape[0]
    samples = curvature.samples if available is None else min(curvature.samples, available)
    if isinstance(curvature, ExactFisher):
        return samples * partition.parameters[-1].channels
    return max(1, samples // curvature.per_row)
