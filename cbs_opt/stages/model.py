"""The quadratic model of the loss at one stage: rows of the weights still there, and a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelHessian
from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.operators import Hessian
from cbs_opt.hessian.products import column_squares
from cbs_opt.hessian.rows import KeptGram, RowsHessian
from cbs_opt.hessian.whitened import MetricHessian
from cbs_opt.network.partition import BlockSpan, Partition
from cbs_opt.update.cbs import cbs_updates

IDENTITY_SHARE = 0.01
"""Of the identity in the metric beside the channel term, for steps that prune."""
UPDATE_SHARE = 1.0
"""The same for updates alone: gradients are noisy in every direction, also where layers are fed little."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """What is left of one block: its place among the kept weights, and its Hessian in several forms.

    `metric` is the channel part of the metric, None where the metric is the identity.
    """

    span: BlockSpan
    start: int
    stop: int
    rows: RowsHessian
    metric: ChannelTerm | None

    @property
    def part(self) -> slice:
        return slice(self.start, self.stop)

    @cached_property
    def pruning(self) -> Hessian:
        """With the metric of steps that prune."""
        return self._with_metric(IDENTITY_SHARE)

    @cached_property
    def moving(self) -> Hessian:
        """With the metric of steps that prune nothing."""
        return self._with_metric(UPDATE_SHARE)

    @cached_property
    def scoring(self) -> Hessian:
        """Ready to give the diagonal of its inverse for many dampings."""
        return self.pruning.prepared()

    def _with_metric(self, share: float) -> Hessian:
        return self.rows if self.metric is None else MetricHessian(self.rows.data, self.metric, share)


class StageModel:
    """``loss(w + d) = loss(w) + g.d + 1/2 d.(R^T R + damping M) d`` over the weights not pruned so far.

    The metric M of the trust region is the identity or, with a channel term C, ``C / unit + .01 I``
    (``C / unit + I`` for updates that prune nothing): long steps then are cheap where the layers are
    fed little, and not where rows are blind.

    `keep` (n,) is True where a weight is still there; `rows` (m, n_kept) and `channels` are of those weights,
    vectors of which have length ``n_kept``. Blocks without any are left out.
    """

    def __init__(
        self, partition: Partition, keep: Tensor, rows: Tensor, channels: ChannelTerm | None = None
    ) -> None:
        self.partition, self.keep, self.rows, self.channels = partition, keep, rows, channels
        self._diagonal = column_squares(rows)
        metric = None if channels is None else channels.scaled(1.0 / self.unit)
        self._pieces: list[_Piece] = []
        start = 0
        for span in partition.blocks:
            stop = start + int(keep[span.start : span.stop].sum())
            if stop > start:
                part = RowsHessian(rows[:, start:stop], KeptGram())
                within = None if metric is None else metric.within(start, stop)
                self._pieces.append(_Piece(span=span, start=start, stop=stop, rows=part, metric=within))
            start = stop

    @property
    def unit(self) -> float:
        """Mean diagonal entry of the Fisher matrix, without damping."""
        return float(self._diagonal.mean()) if self._diagonal.numel() else 1.0

    def restricted(self, keep: Tensor) -> StageModel:
        """Return the model of fewer weights, `keep` (n,) within the present one."""
        kept = keep[self.keep]
        channels = None if self.channels is None else self.channels.restricted(kept)
        return StageModel(self.partition, keep, self.rows[:, kept], channels)

    def blocks(self, weights: Tensor, gradient: Tensor | None, damping: float) -> list[FisherBlock]:
        """Return the blocks that have weights left, at `weights` (n_kept,) and with `gradient` (n_kept,)."""
        if self.channels is None or damping <= 0.0:
            return [self._block(piece, piece.rows, weights, gradient, damping) for piece in self._pieces]
        term = self.channels.scaled(damping / self.unit)
        blocks = []
        for piece in self._pieces:
            hessian = ChannelHessian(piece.rows, term.within(piece.start, piece.stop))
            blocks.append(self._block(piece, hessian, weights, gradient, damping * IDENTITY_SHARE))
        return blocks

    def around_minimum(
        self, weights: Tensor, gradient: Tensor | None, damping: float, *, factorised: bool
    ) -> list[FisherBlock]:
        """Return the blocks at the minimum of the model, where it has no gradient.

        Pruning from there is pruning from `weights` with the gradient in the model, up to a constant:
        ``1/2 (u - u*).H (u - u*)`` for the minimum u*. Saliencies see the weights as they would be
        after a Newton step. The inverse of `factorised` blocks is cheap for all dampings but the first.
        """
        minimum = weights
        if gradient is not None:
            keep = torch.ones_like(weights, dtype=torch.bool)
            minimum = self.updates(weights, gradient, keep, [damping])[0]
        if not factorised:
            return self.blocks(minimum, None, damping)
        return [self._block(piece, piece.scoring, minimum, None, damping) for piece in self._pieces]

    def updates(
        self, weights: Tensor, gradient: Tensor | None, keep: Tensor, dampings: Sequence[float]
    ) -> list[Tensor]:
        """Return CBS-U for a kept set `keep` (n_kept,) of the weights still there, (n_kept,) float64 each."""
        moved = []
        for piece in self._pieces:
            part = keep[piece.part]
            hessian = piece.moving if bool(part.all()) else piece.pruning
            moved.append(cbs_updates(self._block(piece, hessian, weights, gradient, 0.0), part, dampings))
        return [torch.cat(parts) for parts in zip(*moved, strict=True)]

    def solver(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Return ``x -> (R^T R + damping M)^-1 x`` for x (n_kept,), M as for updates alone; in float64."""
        factors = [(piece.part, next(iter(piece.moving.factored([damping])))) for piece in self._pieces]
        return lambda x: torch.cat([factor.solve(x[part].double()) for part, factor in factors]).to(x)

    def predicted_change(self, weights: Tensor, gradient: Tensor | None, moved: Tensor) -> float:
        """Return what the model, without damping, says of going from `weights` to `moved`, both (n_kept,)."""
        step = moved - weights
        blocks = self.blocks(weights, gradient, 0.0)
        pairs = zip(blocks, self._pieces, strict=True)
        return sum(block.step_loss(step[piece.part]) for block, piece in pairs)

    def _block(
        self, piece: _Piece, hessian: Hessian, weights: Tensor, gradient: Tensor | None, damping: float
    ) -> FisherBlock:
        return FisherBlock(
            name=piece.span.name,
            weights=weights[piece.part],
            hessian=hessian,
            damping=damping,
            gradient=None if gradient is None else gradient[piece.part],
        )
