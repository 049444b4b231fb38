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
from functools import cached_property

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelHessian, ChannelSystem
from cbs_opt.select.joint_program.program import JointProgram, Program, exchange
from formulations.support import NofM


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelSet:
    """A kept set (n,) with ``H_KK`` and its best weights (n,) float64, exactly 0 where nothing is kept.

    `ceiling` (n,) float64 is nowhere below ``diag(H_KK^-1)``, which only falls while K shrinks; what becomes
    known of that diagonal is written to it.
    """

    block: FisherBlock
    keep: Tensor
    system: ChannelSystem
    weights: Tensor
    ceiling: Tensor

    @cached_property
    def _curved(self) -> tuple[Tensor, Tensor]:
        """The step to the weights and the Hessian times it, (n,) float64."""
        step = self.weights - self.block.weights
        return step, self.block.product(step)

    @cached_property
    def value(self) -> float:
        """The objective at the weights: ``g.d + 1/2 d.H d``."""
        step, curved = self._curved
        return float(self.block.slope @ step + 0.5 * (step @ curved))

    @cached_property
    def slope(self) -> Tensor:
        """The slope of the model at the weights, (n,) float64, 0 on K."""
        return torch.where(self.keep, 0.0, self._curved[1] + self.block.slope)


class ChannelProgram(Program[ChannelSet]):
    """The joint program of one block with rows and a channel term.

    Products with the rows where all the work is are taken in their own precision; weights, slopes and
    values are those of float64.
    """

    offset = 0.0

    def __init__(self, block: FisherBlock, support: NofM | None = None) -> None:
        self.support = support
        assert isinstance(block.hessian, ChannelHessian)
        self.block, self.hessian = block, block.hessian
        self.anchor = block.weights.double()

    def at(self, keep: Tensor) -> ChannelSet:
        """Return a kept set, evaluated; O(m^2 s + m^3 + sum of m k^2 over channels of k kept weights)."""
        return self._evaluated(keep, self.hessian.system(self.block.damping, keep, self.block.name))

    def exchanged(self, kept: ChannelSet, leaving: Tensor, entering: Tensor) -> ChannelSet:
        """Return the kept set after an exchange of indices, evaluated; see `ChannelSystem.without`."""
        keep = exchange(kept.keep, leaving, entering)
        return self.at(keep) if len(entering) else self._evaluated(keep, kept.system.without(leaving))

    def dropped(self, kept: ChannelSet, leaving: Tensor) -> ChannelSet:
        """Return what is left, with the weights of `kept` moved by one step of refinement.

        Its slope is that of float64, so that what one step leaves is for the next one to remove.
        """
        keep = exchange(kept.keep, leaving, leaving[:0])
        system = kept.system.without(leaving)
        weights = torch.where(keep, kept.weights, 0.0)
        slope = self.block.product(weights - self.anchor) + self.block.slope
        weights[keep] -= system.nearly_solve(slope[keep])
        return ChannelSet(block=self.block, keep=keep, system=system, weights=weights, ceiling=kept.ceiling)

    def _evaluated(self, keep: Tensor, system: ChannelSystem) -> ChannelSet:
        removal = torch.where(keep, 0.0, -self.anchor)
        slope = self.block.product(removal) + self.block.slope
        weights = torch.zeros_like(self.anchor)
        weights[keep] = self.anchor[keep] - system.solve(slope[keep])
        ceiling = torch.full_like(weights, torch.inf)
        return ChannelSet(block=self.block, keep=keep, system=system, weights=weights, ceiling=ceiling)

    def cheapest(self, kept: ChannelSet, number: int) -> Tensor:
        """Return the kept weights that cost least, cheapest first, (number,) int64.

        A weight that would cost too much even with the ceiling for its entry of the inverse's diagonal is
        not scored: O(m^2) for each of the others.
        """
        if kept.system.whole is not None:
            return super().cheapest(kept, number)
        index = kept.keep.nonzero().squeeze(1)
        squares = kept.weights[index].square()
        diagonal = kept.ceiling[index].minimum(kept.system.alone())
        scored = torch.zeros_like(index, dtype=torch.bool)
        while True:
            cheapest = (squares / diagonal).argsort(stable=True)[:number]
            open_ones = cheapest[~scored[cheapest]].sort().values
            if not len(open_ones):
                kept.ceiling[index] = diagonal
                return index[cheapest]
            diagonal[open_ones] = kept.system.inverse_diagonal(open_ones)
            scored[open_ones] = True

    def costs(self, kept: ChannelSet, precision: torch.dtype | None = None) -> Tensor:
        return kept.weights[kept.keep].square() / kept.system.inverse_diagonal()

    def gains(self, kept: ChannelSet) -> Tensor:
        """Return ``gain_j``, (n - s,) float64; O(m^2 (n - s) + sum of m k p over channels)."""
        return kept.slope[~kept.keep].square() / kept.system.schur_diagonal()


def joint_program(block: FisherBlock, support: NofM | None = None) -> JointProgram | ChannelProgram:
    """Return the joint program of a block in the space where its Hessian is factored.

    Exchanges keep to `support` where one is given. Raises `NotPositiveDefiniteError` if ``H`` is singular.
    """
    return (ChannelProgram if block.hessian.by_channels else JointProgram)(block, support)


def joint_saliency(block: FisherBlock) -> Tensor:
    """Return what removing one weight costs the joint program, ``u_i^2 / (2 [H^-1]_ii)``, (n,) float64.

    `u` is the minimiser of the block's model, the gradient included; without one it is `w`, and the
    saliency is that of OBS. O(m^2 n); errors as of `joint_program`.
    """
    return joint_program(block).saliency()
