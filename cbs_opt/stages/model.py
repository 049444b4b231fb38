"""The quadratic model of the loss at one stage: rows of the weights still there, and a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.products import KeptGram, column_squares, image, step_loss
from cbs_opt.hessian.spectrum import RowSpectrum
from cbs_opt.hessian.whitened import WhitenedRows
from cbs_opt.network.partition import BlockSpan, Partition
from cbs_opt.update.cbs import cbs_updates


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """What is left of one block: its place among the kept weights, and the Gram matrix of its rows."""

    span: BlockSpan
    start: int
    stop: int
    gram: KeptGram


IDENTITY_SHARE = 0.01
"""Of the identity in the metric beside the channel term, for steps that prune."""
UPDATE_SHARE = 1.0
"""The same for updates alone: gradients are noisy in every direction, also where layers are fed little."""


class StageModel:
    """``loss(w + d) = loss(w) + g.d + 1/2 d.(R^T R + damping M) d`` over the weights not pruned so far.

    The metric M of the trust region is the identity or, with a channel term C, ``C / unit + .01 I``
    (``C / unit + I`` for updates that prune nothing): long steps then are cheap where the layers are
    fed little, and not where rows are blind.

    Vectors of kept weights have length ``n_kept``; blocks without any are left out.

    Parameters
    ----------
    partition : Partition
    keep : (n,) bool tensor
        True where a weight is still there.
    rows : (m, n_kept) tensor
        Gradient rows of the kept weights.
    channels : ChannelTerm, optional
        Of the kept weights.
    """

    def __init__(
        self, partition: Partition, keep: Tensor, rows: Tensor, channels: ChannelTerm | None = None
    ) -> None:
        self.partition = partition
        self.keep = keep
        self.rows = rows
        self.channels = channels
        self._diagonal = column_squares(rows)
        self._spectra: dict[str, RowSpectrum] = {}
        self._whitened_rows: dict[tuple[str, float], WhitenedRows] = {}
        self._pieces: list[_Piece] = []
        start = 0
        for span in partition.blocks:
            stop = start + int(keep[span.start : span.stop].sum())
            if stop > start:
                gram = KeptGram(rows[:, start:stop])
                self._pieces.append(_Piece(span=span, start=start, stop=stop, gram=gram))
            start = stop

    @property
    def unit(self) -> float:
        """Mean diagonal entry of the Fisher matrix, without damping."""
        return float(self._diagonal.mean()) if self._diagonal.numel() else 1.0

    @property
    def spans(self) -> list[BlockSpan]:
        """The blocks of the partition that have weights left."""
        return [piece.span for piece in self._pieces]

    def restricted(self, keep: Tensor) -> StageModel:
        """The model of fewer weights, `keep` (n,) within the own one."""
        kept = keep[self.keep]
        channels = None if self.channels is None else self.channels.restricted(kept)
        return StageModel(self.partition, keep, self.rows[:, kept], channels)

    def blocks(self, weights: Tensor, gradient: Tensor | None, damping: float) -> list[FisherBlock]:
        """One block a span of `spans`, at `weights` (n_kept,) and with `gradient` (n_kept,)."""
        channels = None
        if self.channels is not None and damping > 0.0:
            channels = self.channels.scaled(damping / self.unit)
            damping *= IDENTITY_SHARE
        return [
            FisherBlock(
                name=piece.span.name,
                start=piece.start,
                stop=piece.stop,
                weights=weights[piece.start : piece.stop],
                rows=self.rows[:, piece.start : piece.stop],
                gradient=None if gradient is None else gradient[piece.start : piece.stop],
                damping=damping,
                channels=None if channels is None else channels.within(piece.start, piece.stop),
            )
            for piece in self._pieces
        ]

    def around_minimum(
        self, weights: Tensor, gradient: Tensor | None, damping: float, *, factorised: bool
    ) -> list[FisherBlock]:
        """The blocks at the minimum of the model, where it has no gradient.

        Pruning from there is pruning from `weights` with the gradient in the model, up to a constant:
        ``1/2 (u - u*).H (u - u*)`` for the minimum u*. Saliencies see the weights as they would be
        after a Newton step. `factorised` blocks carry the diagonal of their inverse, and no channel term.
        """
        minimum = weights
        if gradient is not None:
            pruned = torch.zeros_like(weights, dtype=torch.bool)
            minimum = self.updates(weights, gradient, pruned, [damping])[0]
        if not factorised:
            return self.blocks(minimum, None, damping)
        if self.channels is not None:
            plain = self.blocks(minimum, None, 0.0)
            return [
                replace(block, damping=damping, spectrum=self._whitened(block, IDENTITY_SHARE))
                for block in plain
            ]
        return [
            replace(block, spectrum=self._spectrum(piece))
            for block, piece in zip(self.blocks(minimum, None, damping), self._pieces, strict=True)
        ]

    def updates(
        self, weights: Tensor, gradient: Tensor | None, pruned: Tensor, dampings: Sequence[float]
    ) -> list[Tensor]:
        """CBS-U of the kept weights for a `pruned` set of them, (n_kept,) float64 each."""
        if self.channels is not None:
            found = [
                self._piece_updates(block, pruned[block.start : block.stop], dampings)
                for block in self.blocks(weights, gradient, 0.0)
            ]
        else:
            found = [
                cbs_updates(block, pruned[piece.start : piece.stop], dampings, piece.gram)
                for block, piece in zip(self.blocks(weights, gradient, 0.0), self._pieces, strict=True)
            ]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _piece_updates(self, block: FisherBlock, pruned: Tensor, dampings: Sequence[float]) -> list[Tensor]:
        """CBS-U of one block in the metric of its channel term, of which `block` knows nothing."""
        assert block.rows is not None
        weights = block.weights.double()
        kept = ~pruned
        if not bool(kept.any()):
            return [torch.zeros_like(weights) for _ in dampings]
        removed = torch.where(pruned, weights, 0.0)
        metric = self._metric(block)
        pull = metric.product(removed) + IDENTITY_SHARE * removed  # 0 where nothing is pruned
        slope = torch.zeros_like(weights) if block.gradient is None else block.gradient.double()
        if bool(pruned.any()):
            rows = WhitenedRows(block.rows[:, kept], metric.restricted(kept), IDENTITY_SHARE, block.name)
        else:
            rows = self._whitened(block, UPDATE_SHARE)
        rights = [(damping * pull - slope)[kept] for damping in dampings]
        results = []
        for step in rows.solve(rights, dampings, image(block.rows, removed)):
            moved = torch.zeros_like(weights)
            moved[kept] = weights[kept] + step
            results.append(moved)
        return results

    def predicted_change(self, weights: Tensor, gradient: Tensor | None, moved: Tensor) -> float:
        """What the model, without damping, says of going from `weights` to `moved` (both (n_kept,))."""
        step = moved - weights
        return sum(
            step_loss(block, step[block.start : block.stop]) for block in self.blocks(weights, gradient, 0.0)
        )

    def _spectrum(self, piece: _Piece) -> RowSpectrum:
        name = piece.span.name
        if name not in self._spectra:
            everything = torch.ones(piece.stop - piece.start, dtype=torch.bool, device=self.rows.device)
            rows = self.rows[:, piece.start : piece.stop]
            gram = piece.gram.of(everything) if rows.shape[0] < rows.shape[1] else None
            self._spectra[name] = RowSpectrum(rows, gram)
        return self._spectra[name]

    def _metric(self, block: FisherBlock) -> ChannelTerm:
        """The channel part of the metric of one block."""
        assert self.channels is not None
        return self.channels.scaled(1.0 / self.unit).within(block.start, block.stop)

    def _whitened(self, block: FisherBlock, share: float) -> WhitenedRows:
        if (block.name, share) not in self._whitened_rows:
            assert block.rows is not None
            rows = WhitenedRows(block.rows, self._metric(block), share, block.name)
            self._whitened_rows[block.name, share] = rows
        return self._whitened_rows[block.name, share]
