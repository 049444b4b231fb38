"""Gradient rows within a memory budget: in one tensor if they fit, else on disk, one block at a time."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from cbs_opt.curvature.builder import RowBuilder, RowOptions
from cbs_opt.curvature.disk import RowsInMemory, RowStore, RowTarget
from cbs_opt.curvature.fisher import MEMORY_LIMIT, GradientRows, consume
from cbs_opt.curvature.gradients import require_evaluation_mode
from cbs_opt.errors import RowMemoryError
from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.products import column_squares
from cbs_opt.network.data import Data, LossFunction, device_of, positive_integer, sample_count
from cbs_opt.network.partition import Partition
from cbs_opt.runs.rows import RowJournal
from cbs_opt.system.sizes import readable

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredRows:
    """`GradientRows` on disk: what a run asks of them, block by block. A context manager.

    Parameters
    ----------
    store : RowStore
    partition : Partition
        Whose blocks can be had.
    gradient, samples, seconds, curvature, channels
        As in `GradientRows`.
    """

    store: RowStore
    partition: Partition
    gradient: Tensor
    samples: int
    seconds: float
    curvature: str = "empirical_fisher"
    channels: ChannelTerm | None = None

    in_memory = False
    kind = property(lambda self: self.curvature)

    def check_blocks(self, p) -> None:
        pass

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.store.filled, self.partition.n

    def block(self, start: int, stop: int) -> Tensor:
        """The rows of the block ``start:stop``, in memory for as long as the tensor is."""
        return self.store.block(start, stop)

    def column_squares(self) -> Tensor:
        """``diag(rows^T rows)``, (n,) float64: one pass over the file."""
        return torch.cat(
            [column_squares(self.block(span.start, span.stop)) for span in self.partition.blocks]
        )

    def close(self) -> None:
        """Give the disk space back."""
        self.store.close()

    def __enter__(self) -> StoredRows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class RowPlace:
    """Where gradient rows may be.

    Parameters
    ----------
    memory : int, optional
        Bytes of rows in memory at a time; no limit by default.
    folder : path, optional
        For those that are on disk; by default the system's place for temporary files.
    """

    memory: int | None = None
    folder: PathLike | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            positive_integer("row_memory", self.memory)

    def holds(self, partition: Partition, rows: int, itemsize: int) -> bool:
        """Whether that many rows may be in memory all at once.

        Raises
        ------
        RowMemoryError
            If not even the rows of the largest block may.
        """
        if self.memory is None or rows * partition.n * itemsize <= self.memory:
            return True
        largest = max(partition.blocks, key=lambda block: block.stop - block.start)
        alone = rows * (largest.stop - largest.start) * itemsize
        if alone > self.memory:
            allowed, size = readable(self.memory), self.memory // (rows * itemsize)
            found = f"{allowed}, but the rows of block {largest.name!r} alone take {readable(alone)}"
            remedy = f"allow more, or cut blocks of at most {size} weights (partition=...)"
            raise RowMemoryError("row_memory", found, remedy if size else "allow more, or use fewer rows")
        return False


def streamed_rows(
    model: nn.Module,
    data: Data,
    loss_fn: LossFunction,
    partition: Partition,
    *,
    row_memory: int | None,
    row_dir: PathLike | None = None,
    curvature: str = "empirical_fisher",
    samples: int = 1000,
    samples_per_row: int = 1,
    memory_limit: int = MEMORY_LIMIT,
    seed: int = 0,
    progress: bool = True,
    rows_dtype: torch.dtype | None = None,
    vectorize: bool = True,
    journal: RowJournal | None = None,
) -> GradientRows | StoredRows:
    """`gradient_rows`, written to disk where they would take more memory than allowed.

    Parameters
    ----------
    model, data, loss_fn, partition, curvature, samples, samples_per_row, memory_limit, seed, progress, \
rows_dtype, vectorize, journal
        See `gradient_rows`.
    row_memory : int or None
        Bytes that rows may take in memory at a time: while they are computed, and later those of one
        block. None is no limit.
    row_dir : path, optional
        Folder for the file; by default the system's place for temporary files. Where that is kept in
        memory (tmpfs) nothing is won.

    Returns
    -------
    GradientRows or StoredRows
        The same numbers. Close the latter, or use it as a context manager; it may be passed to `prune`
        as its `curvature` with the same partition.

    Raises
    ------
    RowMemoryError
        If the rows of the largest block alone exceed `row_memory`.
    RowStoreError
        If the folder cannot hold the rows; known before a gradient is computed.
    CbsError
        As `gradient_rows`.

    Notes
    -----
    The file takes ``m n`` numbers. The rows are written once, read and scaled once, and then read block
    by block as often as the method looks at them.
    """
    place = RowPlace(memory=row_memory, folder=row_dir)
    options = RowOptions(
        curvature=curvature,
        samples=samples,
        samples_per_row=samples_per_row,
        memory_limit=memory_limit,
        rows_dtype=rows_dtype,
        vectorize=vectorize,
    )
    require_evaluation_mode(model)
    began = time.perf_counter()
    available = sample_count(data) or samples

    with ExitStack() as on_failure:

        def target_of(capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> RowTarget:
            # A pair of tensors may have fewer samples than were asked for; of other data it is not known.
            most = max(1, available // samples_per_row)
            capacity = min(capacity, most * (capacity // max(1, samples // samples_per_row)))
            if place.holds(partition, capacity, dtype.itemsize):
                return RowsInMemory(capacity, width, dtype, device)
            assert place.memory is not None
            store = RowStore(partition, capacity, dtype, device, folder=row_dir, buffer_bytes=place.memory)
            on_failure.callback(store.close)
            return store

        builder = RowBuilder(model, loss_fn, partition, options, seed, journal=journal, target_of=target_of)
        mean = consume(
            builder, data, options, range(samples), seed=seed, device=device_of(model), progress=progress
        )
        on_failure.pop_all()
    seconds, target = time.perf_counter() - began, builder.target
    if isinstance(target, RowStore):
        return StoredRows(
            store=target,
            partition=partition,
            gradient=mean,
            samples=builder.samples,
            seconds=seconds,
            curvature=curvature,
        )
    assert isinstance(target, RowsInMemory)
    return GradientRows(
        rows=target.rows, gradient=mean, samples=builder.samples, seconds=seconds, curvature=curvature
    )


Rows = GradientRows | StoredRows
