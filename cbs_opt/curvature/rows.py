"""Gradient rows with the gradient of the loss: in one tensor, or in a file from which blocks are mapped."""

from __future__ import annotations

import ctypes
import errno
import io
import math
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cbs_opt.errors import RowMemoryError, RowStoreError
from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.products import column_squares
from cbs_opt.network.partition import Partition
from cbs_opt.system.memory import readable
from formulations.errors import ShapeError

PathLike = str | os.PathLike[str]
LARGE_BLOCK = 1 << 20
"""Bytes of a block from which on freed memory is given back before it comes: 1 MiB."""


@dataclass(eq=False)
class RowsInMemory:
    """All rows in one tensor, `rows` (m, width), of which the first `filled` are set."""

    rows: Tensor
    filled: int = 0

    def space(self, count: int) -> Tensor:
        """Return a (rows, width) tensor to fill with the next rows, at most `count` and at least one."""
        return self.rows[self.filled : self.filled + count]

    def commit(self, count: int) -> None:
        """Take over the first `count` rows of `space`."""
        self.filled += count

    def total(self) -> Tensor:
        """Return the sum of the rows so far, (width,) float64."""
        total = torch.zeros(self.rows.shape[1], dtype=torch.float64, device=self.rows.device)
        add_rows(total, self.rows[: self.filled])
        return total

    def scale(self, factor: float, *, mean: bool) -> Tensor | None:
        """Multiply all rows by `factor`, as no row comes any more; if `mean`, return their mean before."""
        self.rows = self.rows[: self.filled]
        average = (self.total() / self.filled).to(self.rows.dtype) if mean else None
        self.rows.mul_(factor)
        return average

    def block(self, start: int, stop: int) -> Tensor:
        """Return the rows of the weights ``start:stop``, a view."""
        return self.rows[:, start:stop]

    def close(self) -> None:
        """Do nothing: nothing is on disk."""


class RowsOnDisk:
    """Gradient rows in a temporary file, block after block: an (m, n_b) array for each; see `RowsInMemory`.

    `capacity`: most rows that will come, m. `RowStoreError` if the folder has too little space: all of it is
    reserved at the start. `device`: where blocks are handed out. `folder`: where the file is; by default the
    system's place for temporary files. `buffer_bytes`: rows that are gathered in memory before they are
    written; one at least.

    Notes
    -----
    The file has no name (on POSIX systems), so nothing is left of it whatever ends the process. A block
    starts at a page of its own and is mapped privately: it costs its size in memory once it is read, and
    nothing after its tensor is gone.
    """

    def __init__(
        self,
        partition: Partition,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        folder: PathLike | None,
        buffer_bytes: int,
    ) -> None:
        self.filled = 0
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self._partition = partition
        self._device = device
        self._dtype = dtype
        self._offsets: dict[tuple[int, int], int] = {}
        self.bytes = 0
        for block in partition.blocks:
            self._offsets[block.start, block.stop] = self.bytes
            self.bytes += _whole_pages(capacity * (block.stop - block.start) * dtype.itemsize)
        check_space(self.folder, self.bytes)
        self._file = _reserved(self.folder, self.bytes)
        self._used = 0
        self._sum = torch.zeros(partition.n, dtype=torch.float64, device="cpu")
        held = buffer_bytes // max(1, partition.n * dtype.itemsize)
        most = max(1, min(capacity, held))
        self._buffer: Tensor | None = torch.empty(most, partition.n, dtype=dtype, device="cpu")

    def space(self, count: int) -> Tensor:
        assert self._buffer is not None
        return self._buffer[self._used : self._used + count]

    def commit(self, count: int) -> None:
        assert self._buffer is not None
        add_rows(self._sum, self._buffer[self._used : self._used + count])
        self._used += count
        self.filled += count
        if self._used == len(self._buffer):
            self._flush()

    def total(self) -> Tensor:
        return self._sum

    def scale(self, factor: float, *, mean: bool) -> Tensor | None:
        self._flush()
        self._buffer = None
        for block in self._partition.blocks:
            rows = self._mapped(block.start, block.stop)
            # The mapping is private: what is multiplied is a copy in memory until it is written.
            rows.mul_(factor)
            self._write(rows, self._offsets[block.start, block.stop])
        total, self._sum = self._sum, torch.zeros(0, dtype=torch.float64)
        return (total / self.filled).to(self._device, self._dtype) if mean else None

    def block(self, start: int, stop: int) -> Tensor:
        """Return the rows of the block ``start:stop``, (m, stop - start), not to be written to.

        They leave memory with the tensor. The range must be that of a block.
        """
        if self.filled * (stop - start) * self._dtype.itemsize >= LARGE_BLOCK:
            return_freed()
        rows = self._mapped(start, stop)
        return rows if self._device.type == "cpu" else rows.to(self._device)

    def close(self) -> None:
        """Give the disk space back; blocks that are still in use stay valid."""
        self._file.close()

    def _mapped(self, start: int, stop: int) -> Tensor:
        if self._file.closed:
            raise RowStoreError("curvature", "rows on disk that were closed", "compute them anew")
        shape = self.filled, stop - start
        size = math.prod(shape) * self._dtype.itemsize
        if size == 0:
            return torch.zeros(shape, dtype=self._dtype)
        offset = self._offsets[start, stop]
        view = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=offset)
        return torch.frombuffer(view, dtype=self._dtype).view(shape)

    def _flush(self) -> None:
        assert self._buffer is not None
        if not self._used:
            return
        first = self.filled - self._used
        for (start, stop), offset in self._offsets.items():
            part = self._buffer[: self._used, start:stop].contiguous()
            self._write(part, offset + first * (stop - start) * self._dtype.itemsize)
        self._used = 0

    def _write(self, rows: Tensor, offset: int) -> None:
        if not rows.numel():
            return
        left = memoryview(rows.view(torch.uint8).numpy().reshape(-1).data)
        try:
            while len(left):
                written = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            raise _refused(self.folder, self.bytes, error) from error


RowTarget = RowsInMemory | RowsOnDisk
"""What takes rows in the order in which they are computed, then hands out their blocks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The factor R of a Fisher model, (m, n), and the gradient of the loss. A context manager.

    Parameters
    ----------
    store : RowTarget
        The rows, scaled so that the Fisher model is ``R^T R``. ``RowsInMemory(tensor, len(tensor))``
        makes a curvature of any (m, n) tensor.
    partition : Partition
        The weights; of rows on disk its blocks are those that can be had.
    gradient : (n,) Tensor
        Mean gradient of the loss at the data's own labels over all samples used.
    samples : int
        Samples used; ``m`` rows may average several of them, or give each several rows.
    seconds : float
        Wall-clock time taken.
    curvature : str
        Which Fisher matrix the rows sample.
    channels : ChannelTerm, optional
        A further term of the Hessian, see `cbs_opt.curvature.layer_inputs.with_layer_inputs`.
    """

    store: RowTarget
    partition: Partition
    gradient: Tensor
    samples: int
    seconds: float = 0.0
    curvature: str = "empirical_fisher"
    channels: ChannelTerm | None = None

    @property
    def on_disk(self) -> bool:
        """Whether a block has its rows in memory only while they are in use."""
        return not isinstance(self.store, RowsInMemory)

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``; n counts the columns that were kept."""
        kept = self.store.rows.shape[1] if isinstance(self.store, RowsInMemory) else self.partition.n
        return self.store.filled, kept

    @property
    def rows(self) -> Tensor:
        """All rows in one (m, n) tensor; those on disk are read."""
        if isinstance(self.store, RowsInMemory):
            return self.store.rows
        return torch.cat([self.block(span.start, span.stop) for span in self.partition.blocks], dim=1)

    def block(self, start: int, stop: int) -> Tensor:
        """Return the rows of the block ``start:stop``: a view, or read from disk while it is used."""
        return self.store.block(start, stop)

    def column_squares(self) -> Tensor:
        """Return ``diag(R^T R)``, (n,) float64: one pass over the rows."""
        if isinstance(self.store, RowsInMemory):
            return column_squares(self.store.rows)
        pieces = (self.block(span.start, span.stop) for span in self.partition.blocks)
        return torch.cat([column_squares(piece) for piece in pieces])

    def check(self, partition: Partition) -> None:
        """Raise `ShapeError` unless these are the rows of all weights of `partition`, in its blocks."""
        if self.shape[1] != partition.n:
            found = f"rows of shape {self.shape} for {partition.n} weights"
            raise ShapeError("curvature", found, "compute them with the same target and ignore")
        orders = [[span.axes for span in each.parameters] for each in (self.partition, partition)]
        if orders[0] != orders[1]:
            found = "rows of weights in another order"
            raise ShapeError("curvature", found, "compute them with the same pattern of the partition")
        if self.on_disk and self.partition.blocks != partition.blocks:
            raise ShapeError("curvature", "rows on disk in other blocks", "use one partition for both")

    def close(self) -> None:
        """Give the disk space back."""
        self.store.close()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def return_freed() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc).

    Arrays of some megabytes are freed into its heap, and with every block that would grow by some more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def add_rows(total: Tensor, rows: Tensor) -> None:
    """Add `rows` (r, n) to `total` (n,) float64 in place, in an order that the width does not change."""
    for row in rows:
        total += row


def stored_bytes(partition: Partition, rows: int, itemsize: int) -> int:
    """Return the bytes of the file for that many rows."""
    return sum(_whole_pages(rows * (block.stop - block.start) * itemsize) for block in partition.blocks)


def fit_in_memory(partition: Partition, rows: int, itemsize: int, row_memory: int) -> bool:
    """Return whether that many rows may be in memory all at once; raise if not even the largest block may."""
    if rows * partition.n * itemsize <= row_memory:
        return True
    largest = max(partition.blocks, key=lambda block: block.stop - block.start)
    check_block(largest.name, rows * (largest.stop - largest.start) * itemsize, rows * itemsize, row_memory)
    return False


def check_block(name: str, size: int, column: int, row_memory: int) -> None:
    """Raise `RowMemoryError` if rows of `size` bytes, `column` a weight, are not within `row_memory`."""
    if size <= row_memory:
        return
    weights = row_memory // column
    found = f"{readable(row_memory)}, but the rows of block {name!r} alone take {readable(size)}"
    remedy = f"allow more, or cut blocks of at most {weights} weights (partition=...)"
    raise RowMemoryError("row_memory", found, remedy if weights else "allow more, or use fewer rows")


def check_space(folder: Path, needed: int) -> None:
    """Raise `RowStoreError` if `folder` is none or has less than `needed` bytes free."""
    if not folder.is_dir():
        raise RowStoreError("row_dir", f"{folder} is not a folder", "make it, or name another one")
    free = shutil.disk_usage(folder).free
    if free < needed:
        found = f"{readable(free)} free in {folder}, {readable(needed)} needed for the rows"
        raise RowStoreError("row_dir", found, "free some space, name another folder, or use fewer rows")


def _reserved(folder: Path, size: int) -> io.FileIO:
    """Return a nameless file of `size` bytes, all of which the disk has set aside."""
    try:
        file = tempfile.TemporaryFile(prefix="cbs-opt-rows-", dir=folder, buffering=0)  # noqa: SIM115
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise _refused(folder, size, error) from error
    return file


def _refused(folder: Path, size: int, error: OSError) -> RowStoreError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space, or name another folder" if full else "name a folder that can be written"
    found = f"{readable(size)} of rows cannot be written to {folder} ({error.strerror or error})"
    return RowStoreError("row_dir", found, remedy)


def _whole_pages(size: int) -> int:
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
