"""A block-diagonal term of ``H``, one block an output channel, whose matrices are multiples of shared ones.

The weights that feed one output channel have ``scale * A[inputs, inputs]``, with ``A`` the second moments of
what the layer is fed: one matrix a layer, one number a channel, and no array of order n^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.errors import ArgumentError, ShapeError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FIELDS = ("start", "moment", "scale", "inputs")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelTerm:
    """A block-diagonal positive semidefinite (n, n) matrix with c blocks.

    Parameters
    ----------
    moments : sequence of (f, f) array_like
        Symmetric positive semidefinite matrices, of any sizes; `BlockProblem` checks that they are.
    start : (c + 1,) int array_like
        Channel number j has the weights ``start[j]:start[j + 1]``; from 0 to n, strictly increasing.
    moment : (c,) int array_like
        Which of the moments a channel has.
    scale : (c,) float array_like
        Its factor, finite and >= 0.
    inputs : (n,) int array_like
        Which line of that moment each weight belongs to.

    Raises
    ------
    ArgumentError
        If the arrays do not fit together.
    """

    moments: tuple[FloatArray, ...]
    start: IntArray
    moment: IntArray
    scale: FloatArray
    inputs: IntArray

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "moments", tuple(_frozen("moments", matrix, np.float64, 2) for matrix in self.moments))
        put(self, "scale", _frozen("scale", self.scale, np.float64, 1))
        for name in ("start", "moment", "inputs"):
            put(self, name, _frozen(name, getattr(self, name), np.int64, 1))
        _check(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: state[name] for name in ("moments", *FIELDS)})
        for array in (*self.moments, *(getattr(self, name) for name in FIELDS)):
            array.flags.writeable = False

    @property
    def n(self) -> int:
        """Number of weights."""
        return int(self.start[-1])

    def __len__(self) -> int:
        """Return the number of channels."""
        return self.scale.size

    def spans(self) -> Iterator[slice]:
        """Yield where the weights of each channel are."""
        for first, stop in pairwise(self.start.tolist()):
            yield slice(first, stop)

    def span(self, channel: int) -> slice:
        """Return where the weights of one channel are."""
        return slice(int(self.start[channel]), int(self.start[channel + 1]))

    def matrix(self, channel: int) -> FloatArray:
        """Return the matrix of one channel, a new (k, k) array."""
        moment, lines = self.moments[self.moment[channel]], self.inputs[self.span(channel)]
        whole = lines.size == len(moment) and bool((lines == np.arange(lines.size)).all())
        return np.asarray(self.scale[channel] * (moment if whole else moment[np.ix_(lines, lines)]))

    @cached_property
    def absolute(self) -> ChannelTerm:
        """The term of absolute values; it may be indefinite and serves error bounds alone."""
        parts = {name: getattr(self, name) for name in FIELDS}
        return ChannelTerm(moments=tuple(np.abs(matrix) for matrix in self.moments), **parts)

    @cached_property
    def runs(self) -> tuple[slice, ...]:
        """Neighbouring channels of one moment together."""
        changes = np.flatnonzero(np.diff(self.moment)) + 1
        return tuple(slice(a, b) for a, b in pairwise([0, *changes.tolist(), len(self)]) if b > a)

    def product(self, x: FloatArray) -> FloatArray:
        """Return the matrix times `x`, (n,) or (n, p), one product for neighbours of one moment."""
        flat = x.reshape(self.n, -1)
        result = np.empty_like(flat)
        channel_of = self._channel_of
        for run in self.runs:
            moment = self.moments[self.moment[run.start]]
            part = slice(int(self.start[run.start]), int(self.start[run.stop]))
            place = self.inputs[part], channel_of[part] - run.start
            spread = np.zeros((len(moment), run.stop - run.start, flat.shape[1]))
            spread[place] = flat[part] * self.scale[channel_of[part], None]
            product = (moment @ spread.reshape(len(moment), -1)).reshape(spread.shape)
            result[part] = product[place]
        return result.reshape(x.shape)

    def diagonal(self) -> FloatArray:
        """Return the diagonal, (n,)."""
        return self._lines(lambda matrix: np.diagonal(matrix))

    def columns(self, index: IntArray) -> FloatArray:
        """Return columns `index` (p,) of the matrix, (n, p)."""
        result = np.zeros((self.n, index.size))
        channel_of = self._channel_of
        for place, column in enumerate(index.tolist()):
            channel = int(channel_of[column])
            span = self.span(channel)
            moment = self.moments[self.moment[channel]]
            result[span, place] = self.scale[channel] * moment[self.inputs[span], self.inputs[column]]
        return result

    def dense(self) -> FloatArray:
        """Return the matrix, a new (n, n) array."""
        result = np.zeros((self.n, self.n))
        for channel, span in enumerate(self.spans()):
            result[span, span] = self.matrix(channel)
        return result

    def restricted(self, index: IntArray) -> ChannelTerm:
        """Return the term of the weights at `index`, in increasing order; moments are shared."""
        counts = np.bincount(self._channel_of[index], minlength=len(self))
        used = counts > 0
        return ChannelTerm(
            moments=self.moments,
            start=np.concatenate(([0], np.cumsum(counts[used]))),
            moment=self.moment[used],
            scale=self.scale[used],
            inputs=self.inputs[index],
        )

    def largest_scales(self) -> FloatArray:
        """Return the largest factor that each moment has, 0 where no channel has it."""
        largest = np.zeros(len(self.moments))
        np.maximum.at(largest, self.moment, self.scale)
        return largest

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what the term is made of by name, as for a file."""
        parts = {name: getattr(self, name) for name in FIELDS}
        return {**parts, **{f"moment_{number}": matrix for number, matrix in enumerate(self.moments)}}

    @staticmethod
    def of_arrays(arrays: dict[str, NDArray[Any]]) -> ChannelTerm:
        """Return the term that `arrays` described."""
        moments = tuple(arrays[f"moment_{number}"] for number in range(len(arrays) - len(FIELDS)))
        integers = {name: arrays[name].astype(np.int64) for name in FIELDS if name != "scale"}
        return ChannelTerm(moments=moments, scale=arrays["scale"], **integers)

    @cached_property
    def _channel_of(self) -> IntArray:
        """Number of the channel of each weight, (n,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.start))

    def _lines(self, line: Any) -> FloatArray:
        parts = [
            self.scale[channel] * line(self.moments[self.moment[channel]])[self.inputs[span]]
            for channel, span in enumerate(self.spans())
        ]
        return np.concatenate(parts) if parts else np.zeros(0)


def _frozen(name: str, value: ArrayLike, dtype: Any, ndim: int) -> NDArray[Any]:
    """Return a read-only, C-contiguous array; a read-only one of that kind is shared."""
    array = np.asarray(value, dtype=dtype)
    if array.ndim != ndim:
        raise ShapeError(f"channels.{name}", f"{array.ndim} dimensions, shape {array.shape}", f"pass {ndim}")
    if array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C", copy=True)
        array.flags.writeable = False
    return array


def _check(term: ChannelTerm) -> None:
    channels, start = len(term), term.start
    if start.size != channels + 1 or term.moment.size != channels:
        found = f"{start.size} starts and {term.moment.size} moments for {channels} scales"
        raise ShapeError(
            "channels.start", found, "pass a scale and a moment for each channel, one start more"
        )
    if start[0] != 0 or bool((np.diff(start) <= 0).any()) or start[-1] != term.inputs.size:
        found = f"from {start[0]} to {start[-1]} for {term.inputs.size} weights"
        raise ArgumentError("channels.start", found, "pass increasing starts that tile the weights")
    if not bool((np.isfinite(term.scale) & (term.scale >= 0.0)).all()):
        raise ArgumentError("channels.scale", "negative or not finite", "pass finite factors >= 0")
    if channels and not 0 <= int(term.moment.min()) <= int(term.moment.max()) < len(term.moments):
        found = f"moments up to {int(term.moment.max())} of {len(term.moments)}"
        raise ArgumentError("channels.moment", found, "pass places of the moments, from 0")
    for channel, span in enumerate(term.spans()):
        lines, moment = term.inputs[span], term.moments[term.moment[channel]]
        if moment.shape[0] != moment.shape[1] or int(lines.min()) < 0 or int(lines.max()) >= len(moment):
            found = f"inputs {int(lines.min())} to {int(lines.max())} of moments of shape {moment.shape}"
            raise ArgumentError("channels.inputs", found, "pass lines of the channel's own square moments")
        if bool((np.diff(lines) <= 0).any()):
            raise ArgumentError("channels.inputs", "not increasing within a channel", "order its weights")
