"""One block of weights with the quadratic model of the loss there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbs_opt.hessian.operators import Factor, Hessian
from formulations.errors import ShapeError
from formulations.problem import BlockProblem
from formulations.support import Support


@dataclass(frozen=True, kw_only=True, eq=False)
class FisherBlock:
    """One block of a network's weights and the curvature of the loss there.

    `name` is that of the block in its partition, `weights` (n,) are the trained ones, `hessian` is ``A``,
    without the damping that is added to its diagonal: ``H = A + damping I``. `gradient` (n,) is the mean
    gradient of the loss; absent means zero. Raises `ShapeError` if the Hessian or the gradient is that of
    another number of weights.
    """

    name: str
    weights: Tensor
    hessian: Hessian
    damping: float = 0.0
    gradient: Tensor | None = None

    def __post_init__(self) -> None:
        for label, tensor in (("weights", self.weights), ("gradient", self.gradient)):
            if tensor is not None and tuple(tensor.shape) != (self.hessian.n,):
                found = f"shape {tuple(tensor.shape)} for block {self.name!r}"
                raise ShapeError(
                    label, found, f"pass the ({self.hessian.n},) values of its Hessian's weights"
                )

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.hessian.n

    @property
    def slope(self) -> Tensor:
        """The gradient, or zeros; (n,) float64."""
        if self.gradient is None:
            return torch.zeros(self.n, dtype=torch.float64, device=self.weights.device)
        return self.gradient.double()

    def product(self, x: Tensor) -> Tensor:
        """Return ``H x`` for float64 `x`, (n,)."""
        return self.hessian.product(x) + self.damping * self.hessian.metric(x)

    def diagonal(self) -> Tensor:
        """Return ``diag(H)``, (n,) float64."""
        return self.hessian.diagonal() + self.damping * self.hessian.metric_diagonal()

    def inverse_diagonal(self) -> Tensor:
        """Return ``diag(H^-1)``, (n,) float64.

        Raises `NotPositiveDefiniteError` if ``H`` is singular.
        """
        return self.factor().inverse_diagonal()

    def factor(self) -> Factor:
        """Return ``H``, factored."""
        return next(iter(self.hessian.factored([self.damping], name=self.name)))

    def step_loss(self, step: Tensor) -> float:
        """Return the loss increase ``g.d + 1/2 d.H d`` that the model predicts for a float64 step (n,)."""
        quadratic = self.hessian.quadratic(step) + self.damping * self.hessian.metric_quadratic(step)
        linear = 0.0 if self.gradient is None else float(self.gradient.double() @ step)
        return linear + 0.5 * quadratic

    def without_channels(self) -> FisherBlock:
        """Return the block whose Hessian has no term over channels."""
        return replace(self, hessian=self.hessian.without_channels())

    def to_problem(self, n_prune: int | Support, *, by_channels: bool = False) -> BlockProblem:
        """Return the block as a `BlockProblem` that removes `n_prune` weights, or keeps to a support.

        Tensors are converted to float64 once; contiguous float64 tensors on the CPU are shared, not copied,
        so do not write to them while the problem is in use. With a channel term the Hessian is formed,
        O(m n^2): `UnsupportedProblemError` if the block is too large for that, unless `by_channels` allows
        the problem of a block of more than 600 weights to have the term beside its rows, which only
        `formulations.lower_bound` and `verify` take at any size.
        """
        parts = self.hessian.parts() if by_channels else None
        plain = self.hessian.plain(f"block {self.name!r} as one problem") if parts is None else parts[0]
        kept: dict[str, Any] = {"support" if isinstance(n_prune, Support) else "n_prune": n_prune}
        return BlockProblem(
            weights=_read_only(self.weights),
            **kept,
            rows=_read_only(plain.data) if plain.by_rows else None,
            hessian=None if plain.by_rows else _read_only(plain.data),
            gradient=None if self.gradient is None else _read_only(self.gradient),
            damping=self.damping,
            name=self.name,
            channels=None if parts is None else parts[1].to_arrays(),
        )


def _read_only(tensor: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().to(device="cpu", dtype=torch.float64).contiguous().numpy()
    array.flags.writeable = False
    return array
