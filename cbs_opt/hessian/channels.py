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
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import formulations.channels


@dataclass(frozen=True, kw_only=True, eq=False)
class Channel:
    """The weights ``start:stop`` of one output channel, or what is left of them.

    `moment` (f, f) float64 are second moments of the inputs, which channels of a layer share; `index` says
    which inputs the weights belong to, by default all, in order.
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
        """Return ``scale * E[x x^T]``, (k, k) float64, of the weights at positions `part` (k,), or of all."""
        index = self.index if part is None else part if self.index is None else self.index[part]
        moment = self.moment if index is None else self.moment.index_select(0, index).index_select(1, index)
        return self.scale * moment

    def diagonal(self) -> Tensor:
        """Return the diagonal of `matrix`."""
        return self.scale * self.moment.diagonal()[self.inputs]

    def part_of(self, part: Tensor, start: int) -> Channel:
        """Return the weights at positions `part` in increasing order, at a new place."""
        if len(part) == self.stop - self.start:
            return replace(self, start=start, stop=start + len(part))
        index = part if self.index is None else self.index[part]
        return replace(self, start=start, stop=start + len(part), index=index)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelTerm:
    """A block-diagonal positive semidefinite (n, n) matrix.

    Its channels tile ``0:n`` in order; `weight` is the mean diagonal in units of that of the rows it was
    matched with. `unseen` names the parameters whose channels are multiples of the identity, as nothing is
    known of their inputs.
    """

    channels: tuple[Channel, ...]
    weight: float = 1.0
    unseen: tuple[str, ...] = ()

    def scaled(self, factor: float) -> ChannelTerm:
        """Return the term times a number >= 0; moments are shared."""
        return ChannelTerm(
            channels=tuple(replace(channel, scale=factor * channel.scale) for channel in self.channels),
            weight=factor * self.weight,
        )

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.channels[-1].stop if self.channels else 0

    def norm_bound(self) -> float:
        """Return a number no less than the largest eigenvalue, by absolute row sums of whole moments."""
        moments = {id(channel.moment): channel.moment for channel in self.channels}
        bounds = {key: float(moment.abs().sum(dim=1).max()) for key, moment in moments.items()}
        return max((channel.scale * bounds[id(channel.moment)] for channel in self.channels), default=0.0)

    def within(self, start: int, stop: int) -> ChannelTerm:
        """Return the term of the weights ``start:stop``, whose indices count from `start`."""
        if (start, stop) == (0, self.n):
            return self
        first = bisect_right(self.channels, start, key=lambda channel: channel.start) - 1
        last = bisect_left(self.channels, stop, key=lambda channel: channel.start)
        channels = []
        for channel in self.channels[first:last]:
            span = max(start, channel.start), min(stop, channel.stop)
            place = torch.arange(*span, device=channel.moment.device)
            channels.append(channel.part_of(place - channel.start, int(place[0]) - start))
        return ChannelTerm(channels=tuple(channels), weight=self.weight)

    def restricted(self, keep: Tensor) -> ChannelTerm:
        """Return the term of the weights where `keep` (n,) is True; moments are shared, not copied."""
        channels: list[Channel] = []
        start = 0
        for channel in self.channels:
            part = keep[channel.start : channel.stop].nonzero().squeeze(1)
            if len(part):
                channels.append(channel.part_of(part, start))
                start += len(part)
        return ChannelTerm(channels=tuple(channels), weight=self.weight)

    def product(self, x: Tensor) -> Tensor:
        """Return the matrix times a float64 vector (n,): one product for all channels of a layer."""
        result = torch.empty_like(x)
        for _, neighbours in itertools.groupby(self.channels, key=lambda channel: id(channel.moment)):
            run = list(neighbours)
            spread = x.new_zeros(len(run), run[0].moment.shape[0])
            for row, channel in zip(spread, run, strict=True):
                row[channel.inputs] = channel.scale * x[channel.start : channel.stop]
            spread = spread @ run[0].moment
            for row, channel in zip(spread, run, strict=True):
                result[channel.start : channel.stop] = row[channel.inputs]
        return result

    def diagonal(self) -> Tensor:
        """Return the diagonal of the matrix, (n,) float64."""
        parts = [channel.diagonal() for channel in self.channels]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def entries(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the entries at `left` (a,) and `right` (b,), both in increasing order, (a, b) float64."""
        entries = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
        stops = torch.tensor([c.stop for c in self.channels], dtype=torch.int64, device=left.device)
        ends = (torch.searchsorted(side, stops).tolist() for side in (left, right))
        a = b = 0
        for channel, row_end, column_end in zip(self.channels, *ends, strict=True):
            if row_end > a and column_end > b:
                rows = torch.arange(channel.moment.shape[0], device=left.device)[channel.inputs]
                above = rows[left[a:row_end] - channel.start]
                across = rows[right[b:column_end] - channel.start]
                entries[a:row_end, b:column_end] = channel.scale * channel.moment[above][:, across]
            a, b = row_end, column_end
        return entries

    def to_arrays(self) -> formulations.channels.ChannelTerm:
        """Return the term in float64 on the CPU, moments symmetric to the last bit."""
        places: dict[int, int] = {}
        moments: list[Tensor] = []
        for channel in self.channels:
            if places.setdefault(id(channel.moment), len(moments)) == len(moments):
                moments.append(0.5 * (channel.moment + channel.moment.T))
        lines = [torch.arange(len(c.moment))[c.inputs] if c.index is None else c.index for c in self.channels]
        return formulations.channels.ChannelTerm(
            moments=tuple(moment.double().cpu().numpy() for moment in moments),
            start=np.array([0, *(channel.stop for channel in self.channels)]),
            moment=np.array([places[id(channel.moment)] for channel in self.channels], dtype=np.int64),
            scale=np.array([channel.scale for channel in self.channels], dtype=np.float64),
            inputs=torch.cat([torch.zeros(0, dtype=torch.int64), *(line.cpu() for line in lines)]).numpy(),
        )

    @staticmethod
    def of_arrays(term: formulations.channels.ChannelTerm) -> ChannelTerm:
        """Return the term of a `BlockProblem`, in new tensors."""
        moments = [torch.tensor(moment) for moment in term.moments]
        return ChannelTerm(
            channels=tuple(
                Channel(
                    start=span.start,
                    stop=span.stop,
                    moment=moments[moment],
                    scale=scale,
                    index=torch.tensor(term.inputs[span]),
                )
                for span, moment, scale in zip(
                    term.spans(), term.moment.tolist(), term.scale.tolist(), strict=True
                )
            )
        )

    def dense(self) -> Tensor:
        """Return the matrix itself, (n, n) float64: for small blocks."""
        device = self.channels[0].moment.device if self.channels else None
        everything = torch.arange(self.n, device=device)
        return self.entries(everything, everything)
