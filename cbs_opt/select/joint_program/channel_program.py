"""The joint program of a large block with a channel term: the value and the scores of a kept set.

With ``D = C + damping I``, block-diagonal over channels, and ``M = I + R_K D_KK^-1 R_K^T``, the Schur
complement of the kept weights K in ``H = R^T R + D`` is

    H_PP - H_PK H_KK^-1 H_KP = (D_PP - D_PK D_KK^-1 D_KP) + Y M^-1 Y^T,   Y = R_P^T - D_PK D_KK^-1 R_K^T

where everything but M splits into channels. With u the best weights of K and r the slope of the model there,

    dropping i in K costs        1/2 cost_i,  cost_i = u_i^2 / [H_KK^-1]_ii
    adding j in P alone gains    1/2 gain_j,  gain_j = r_j^2 / (diagonal of the Schur complement)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelSystem
from cbs_opt.hessian.products import hessian_product


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelSet:
    """A kept set with its best weights.

    Attributes
    ----------
    keep : (n,) bool tensor
    system : ChannelSystem
        ``H_KK``, factored.
    weights : (n,) float64 tensor
        0 where pruned.
    slope : (n,) float64 tensor
        Slope of the model at `weights`; 0 on K.
    value : float
        Objective of the joint program.
    """

    keep: Tensor
    system: ChannelSystem
    weights: Tensor
    slope: Tensor
    value: float


class ChannelProgram:
    """The joint program of one block with rows and a channel term.

    Parameters
    ----------
    block : FisherBlock

    Notes
    -----
    Products with the rows where all the work is are taken in their own precision; weights, slopes and
    values are those of float64.
    """

    def __init__(self, block: FisherBlock) -> None:
        assert block.rows is not None
        self.block = block
        self.anchor = block.weights.double()
        self.linear = torch.zeros_like(self.anchor) if block.gradient is None else block.gradient.double()

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.block.n

    def at(self, keep: Tensor) -> ChannelSet:
        """Evaluate a kept set; O(m^2 s + m^3 + sum of m k^2 over channels of k kept weights)."""
        assert self.block.rows is not None
        kept = keep.nonzero().squeeze(1)
        system = ChannelSystem(self.block, kept, self.block.damping, self.block.rows.dtype)
        removal = torch.where(keep, 0.0, -self.anchor)
        weights = torch.zeros_like(self.anchor)
        slope = hessian_product(self.block, removal) + self.linear
        weights[kept] = self.anchor[kept] - system.solve(slope[kept])
        step = weights - self.anchor
        curved = hessian_product(self.block, step)
        value = float(self.linear @ step + 0.5 * (step @ curved))
        slope = torch.where(keep, 0.0, curved + self.linear)
        return ChannelSet(keep=keep, system=system, weights=weights, slope=slope, value=value)

    def costs(self, kept: ChannelSet) -> Tensor:
        """``cost_i``, (s,) float64; O(m^2 s)."""
        return kept.weights[kept.keep].square() / kept.system.inverse_diagonal()

    def gains(self, kept: ChannelSet) -> Tensor:
        """``gain_j``, (n - s,) float64; O(m^2 (n - s) + sum of m k p over channels)."""
        return kept.slope[~kept.keep].square() / kept.system.schur_diagonal()
