"""One block of weights with the quadratic model of the loss there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formulations.errors import ArgumentError, ShapeError, UnsupportedProblemError
from formulations.problem import BlockProblem

if TYPE_CHECKING:
    from cbs_opt.hessian.channels import ChannelTerm
    from cbs_opt.hessian.spectrum import RowSpectrum
    from cbs_opt.hessian.whitened import WhitenedRows


DENSE_LIMIT = 4_096
"""Largest block whose whole Hessian is formed where rows alone do not describe it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FisherBlock:
    """One block of a network's weights and the curvature of the loss there.

    Parameters
    ----------
    name : str
        Name of the block in its partition.
    start, stop : int
        Range of the block in the flat vector.
    weights : (n,) Tensor
        Trained weights.
    rows : (m, n) Tensor, optional
        Scaled gradient rows, ``H = rows^T rows + damping I``; often a view of the rows of the
        whole network. Exactly one of `rows` and `hessian` is given.
    hessian : (n, n) Tensor, optional
        Symmetric positive semidefinite matrix, without the damping.
    gradient : (n,) Tensor, optional
        Mean gradient of the loss; absent means zero.
    damping : float, default 0
        Added to the diagonal.
    spectrum : RowSpectrum or WhitenedRows, optional
        Of `rows`, where several dampings are tried: it gives `obs` the diagonal of the inverse, in a
        metric of its own if it has one, and spares a factorisation each time.
    channels : ChannelTerm, optional
        A further term of the Hessian, block-diagonal over output channels.

    Raises
    ------
    ArgumentError
        If neither or both of `rows` and `hessian` are given.
    ShapeError
        If a tensor does not fit the range.
    """

    name: str
    start: int
    stop: int
    weights: Tensor
    rows: Tensor | None = None
    hessian: Tensor | None = None
    gradient: Tensor | None = None
    damping: float = 0.0
    spectrum: RowSpectrum | WhitenedRows | None = None
    channels: ChannelTerm | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.hessian is None):
            found = "neither" if self.rows is None else "both"
            raise ArgumentError("rows, hessian", f"{found} given", "pass exactly one of them")
        for label, tensor, ndim in (
            ("weights", self.weights, 1),
            ("rows", self.rows, 2),
            ("hessian", self.hessian, 2),
            ("gradient", self.gradient, 1),
        ):
            if tensor is not None and (tensor.ndim != ndim or tensor.shape[-1] != self.n):
                found = f"shape {tuple(tensor.shape)} for the {self.n} weights of {self.name}"
                raise ShapeError(label, found, f"pass {ndim} dimensions, the last of size {self.n}")
        if self.channels is not None and self.channels.n != self.n:
            found = f"a term of {self.channels.n} weights for the {self.n} of {self.name}"
            raise ShapeError("channels", found, "take the term within the range of the block")

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.stop - self.start

    def dense_hessian(self) -> Tensor:
        """``H`` without the damping, (n, n) float64; O(m n^2), for small blocks."""
        hessian = self.hessian.double() if self.rows is None else None  # type: ignore[union-attr]
        if hessian is None:
            assert self.rows is not None
            rows = self.rows.double()
            hessian = rows.T @ rows
        return hessian if self.channels is None else hessian + self.channels.dense()

    def to_problem(self, n_prune: int) -> BlockProblem:
        """The block as a `BlockProblem` that removes `n_prune` weights.

        Tensors are converted to float64 once; contiguous float64 tensors on the CPU are shared,
        not copied, so do not write to them while the problem is in use. With a channel term the
        Hessian is formed: O(m n^2).

        Raises
        ------
        UnsupportedProblemError
            If there is a channel term and the block is larger than `DENSE_LIMIT`.
        """
        rows, hessian = self.rows, self.hessian
        if self.channels is not None:
            if self.n > DENSE_LIMIT:
                found = f"block {self.name!r} of {self.n} weights with a layer-input term, as one problem"
                remedy = f"cut blocks of at most {DENSE_LIMIT}, or leave the term out"
                raise UnsupportedProblemError("partition", found, remedy)
            rows, hessian = None, self.dense_hessian()
        return BlockProblem(
            weights=_read_only(self.weights),
            n_prune=n_prune,
            rows=None if rows is None else _read_only(rows),
            hessian=None if hessian is None else _read_only(hessian),
            gradient=None if self.gradient is None else _read_only(self.gradient),
            damping=self.damping,
            name=self.name,
        )


def _read_only(tensor: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().to(device="cpu", dtype=torch.float64).contiguous().numpy()
    array.flags.writeable = False
    return array
