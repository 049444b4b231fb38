"""Gradient rows with the gradient of the loss: in one tensor, or on disk, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from cbs_opt.curvature.disk import RowsInMemory, RowTarget
from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.products import column_squares
from cbs_opt.network.partition import Partition
from formulations.errors import ShapeError


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
        return torch.cat(
            [column_squares(self.block(span.start, span.stop)) for span in self.partition.blocks]
        )

    def check(self, partition: Partition) -> None:
        """Raise `ShapeError` unless these are the rows of all weights of `partition`, in its blocks."""
        if self.shape[1] != partition.n:
            found = f"rows of shape {self.shape} for {partition.n} weights"
            raise ShapeError("curvature", found, "compute them with the same target and ignore")
        if self.on_disk and self.partition.blocks != partition.blocks:
            raise ShapeError("curvature", "rows on disk in other blocks", "use one partition for both")

    def close(self) -> None:
        """Give the disk space back."""
        self.store.close()

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
