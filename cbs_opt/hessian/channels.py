"""The part of a Hessian model that is block-diagonal over output channels.

For a linear layer, or a convolution seen as one on patches, the Gauss-Newton matrix of the weights that
feed output channel c is ``E[b_c^2 x x^T]`` with the layer's input x and the loss's slope b_c. With input
and slope taken as independent it is ``scale_c * E[x x^T]``: one matrix of the size of the fan-in for the
whole layer, times a number a channel (the diagonal of the Kronecker-factored approximation). It has full
rank from few samples, which gradient rows have not, and so says what moving the kept weights costs in all
the directions that the rows have not seen.

Source: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
2015; convolutions: Grosse, Martens, ICML 2016.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cbs_opt.hessian.block import DENSE_LIMIT, FisherBlock
from cbs_opt.hessian.products import column_squares
from cbs_opt.network.partition import ParameterSpan, Partition
from formulations.errors import ArgumentError, ShapeError, UnsupportedProblemError


@dataclass(frozen=True, kw_only=True, eq=False)
class Channel:
    """The weights ``start:stop`` of one output channel, or what is left of them.

    Parameters
    ----------
    start, stop : int
    moment : (f, f) float64 Tensor
        Second moments of the inputs; channels of a layer share one.
    scale : float
    index : (stop - start,) int64 Tensor, optional
        Which inputs the weights belong to; by default all, in order.
    """

    start: int
    stop: int
    moment: Tensor
    scale: float
    index: Tensor | None = None

    @property
    def inputs(self) -> Tensor | slice:
        """What takes the inputs of the weights out of a vector of all f."""
        return slice(None) if self.index is None else self.index

    def matrix(self, part: Tensor | None = None) -> Tensor:
        """``scale * E[x x^T]``, (k, k) float64, of the weights at positions `part` (k,), or of all."""
        index = self.index if part is None else part if self.index is None else self.index[part]
        moment = self.moment if index is None else self.moment.index_select(0, index).index_select(1, index)
        return self.scale * moment

    def diagonal(self) -> Tensor:
        """The diagonal of `matrix`."""
        return self.scale * self.moment.diagonal()[self.inputs]

    def taken(self, part: Tensor, start: int) -> Channel:
        """The weights at positions `part` in increasing order, at a new place."""
        if len(part) == self.stop - self.start:
            return replace(self, start=start, stop=start + len(part))
        index = part if self.index is None else self.index[part]
        return replace(self, start=start, stop=start + len(part), index=index)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelTerm:
    """A block-diagonal positive semidefinite (n, n) matrix.

    Parameters
    ----------
    channels : tuple of Channel
        Tile ``0:n`` in order.
    weight : float, default 1
        Mean diagonal in units of that of the rows it was matched with.
    """

    channels: tuple[Channel, ...]
    weight: float = 1.0

    @classmethod
    def matched(
        cls, moments: Mapping[str, Tensor], partition: Partition, rows: Tensor, *, weight: float = 1.0
    ) -> ChannelTerm:
        """The term whose mean diagonal in every channel is `weight` times that of ``rows^T rows``.

        Parameters
        ----------
        moments : mapping of parameter name to (f, f) or (groups, f, f) Tensor
            See `cbs_opt.curvature.layer_inputs.input_moments`. A parameter without moments, or with moments
            that are zero, gets a multiple of the identity.
        partition : Partition
        rows : (m, n) Tensor
            Of all its weights.
        weight : float, default 1

        Raises
        ------
        ArgumentError
            If `weight` is not positive.
        ShapeError
            If a moment does not fit its parameter.
        """
        return cls.matched_to(moments, partition, column_squares(rows), weight=weight)

    @classmethod
    def matched_to(
        cls, moments: Mapping[str, Tensor], partition: Partition, squares: Tensor, *, weight: float = 1.0
    ) -> ChannelTerm:
        """`matched` from ``diag(rows^T rows)``, (n,) float64, in place of the rows."""
        if not weight > 0.0:
            raise ArgumentError("weight", f"{weight!r}", "pass a number > 0, or leave the term out")
        channels: list[Channel] = []
        for span in partition.parameters:
            groups = _by_group(span, moments.get(span.name), squares)
            size = groups[0].shape[0]
            members = span.shape[0] // len(groups)
            own = squares[span.start : span.stop].view(-1, size).mean(dim=1).tolist()
            for number, mean in enumerate(own):
                moment = groups[number // members]
                first = span.start + number * size
                scale = weight * mean / float(moment.diagonal().mean())
                channels.append(Channel(start=first, stop=first + size, moment=moment, scale=scale))
        return cls(channels=tuple(channels), weight=weight)

    def scaled(self, factor: float) -> ChannelTerm:
        """The term times a number >= 0; moments are shared."""
        return ChannelTerm(
            channels=tuple(replace(channel, scale=factor * channel.scale) for channel in self.channels),
            weight=factor * self.weight,
        )

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.channels[-1].stop if self.channels else 0

    def within(self, start: int, stop: int) -> ChannelTerm:
        """The term of the weights ``start:stop``, whose indices count from `start`."""
        if (start, stop) == (0, self.n):
            return self
        first = bisect_right(self.channels, start, key=lambda channel: channel.start) - 1
        last = bisect_left(self.channels, stop, key=lambda channel: channel.start)
        channels = []
        for channel in self.channels[first:last]:
            own = torch.arange(
                max(start, channel.start), min(stop, channel.stop), device=channel.moment.device
            )
            channels.append(channel.taken(own - channel.start, int(own[0]) - start))
        return ChannelTerm(channels=tuple(channels), weight=self.weight)

    def restricted(self, keep: Tensor) -> ChannelTerm:
        """The term of the weights where `keep` (n,) is True; moments are shared, not copied."""
        channels: list[Channel] = []
        start = 0
        for channel in self.channels:
            part = keep[channel.start : channel.stop].nonzero().squeeze(1)
            if len(part):
                channels.append(channel.taken(part, start))
                start += len(part)
        return ChannelTerm(channels=tuple(channels), weight=self.weight)

    def product(self, x: Tensor) -> Tensor:
        """The matrix times a float64 vector (n,): one product of matrices for all channels of a layer."""
        result = torch.empty_like(x)
        for run in self._runs():
            spread = x.new_zeros(len(run), run[0].moment.shape[0])
            for row, channel in zip(spread, run, strict=True):
                row[channel.inputs] = channel.scale * x[channel.start : channel.stop]
            spread = spread @ run[0].moment
            for row, channel in zip(spread, run, strict=True):
                result[channel.start : channel.stop] = row[channel.inputs]
        return result

    def _runs(self) -> Iterator[list[Channel]]:
        """Neighbouring channels that share their moments."""
        for _, run in itertools.groupby(self.channels, key=lambda channel: id(channel.moment)):
            yield list(run)

    def diagonal(self) -> Tensor:
        """(n,) float64."""
        parts = [channel.diagonal() for channel in self.channels]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def entries(self, left: Tensor, right: Tensor) -> Tensor:
        """The entries at `left` (a,) and `right` (b,), both in increasing order, (a, b) float64."""
        found = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
        stops = torch.tensor(
            [channel.stop for channel in self.channels], dtype=torch.int64, device=left.device
        )
        row_ends = torch.searchsorted(left, stops).tolist()
        column_ends = torch.searchsorted(right, stops).tolist()
        a = b = 0
        for channel, row_end, column_end in zip(self.channels, row_ends, column_ends, strict=True):
            if row_end > a and column_end > b:
                rows = torch.arange(channel.moment.shape[0], device=left.device)[channel.inputs]
                above = rows[left[a:row_end] - channel.start]
                across = rows[right[b:column_end] - channel.start]
                found[a:row_end, b:column_end] = channel.scale * channel.moment[above][:, across]
            a, b = row_end, column_end
        return found

    def dense(self) -> Tensor:
        """The matrix itself, (n, n) float64: for small blocks."""
        device = self.channels[0].moment.device if self.channels else None
        everything = torch.arange(self.n, device=device)
        return self.entries(everything, everything)


def _by_group(span: ParameterSpan, moment: Tensor | None, squares: Tensor) -> list[Tensor]:
    """The (f, f) moments of each group of output channels; the identity where nothing is known."""
    size = math.prod(span.shape[1:])
    if moment is None:
        moment = torch.eye(size, dtype=torch.float64, device=squares.device)
    found = list(moment.double().reshape(-1, *moment.shape[-2:]))
    if any(group.shape != (size, size) for group in found) or span.shape[0] % len(found):
        shape = f"shape {tuple(moment.shape)} for {span.name} of shape {span.shape}"
        raise ShapeError("moments", shape, "compute them for this network")
    identity = torch.eye(size, dtype=torch.float64, device=squares.device)
    return [group if bool(group.diagonal().any()) else identity for group in found]


def densified(block: FisherBlock, program: str) -> FisherBlock:
    """A small block with its channel term inside a dense Hessian.

    Raises
    ------
    UnsupportedProblemError
        If the block is larger than `DENSE_LIMIT`.
    """
    if block.n > DENSE_LIMIT:
        found = f"this search of the {program} program on {block.n} weights with a layer-input term"
        remedy = f'cut blocks of at most {DENSE_LIMIT}, or use method="greedy_obs", program="joint"'
        raise UnsupportedProblemError("partition", found, remedy)
    return replace(block, rows=None, hessian=block.dense_hessian(), channels=None, spectrum=None)
