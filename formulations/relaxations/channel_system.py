"""Solves with ``H + shift`` for gradient rows and a term over channels.

Channels with the same lines of one moment A differ by a factor: with ``A + sigma diag(A) = V L V^T`` their
matrix ``scale (A + sigma diag(A)) + damping I`` has the eigenvectors V, whatever the factor is. So one
eigendecomposition a layer serves all its channels, as matrix products; the rows come in by Woodbury. Where
their largest eigenvalue is 10^5 times the damping or more, that formula loses all digits of single precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from formulations.channels import ChannelTerm
from formulations.problem import BlockProblem, FloatArray, IntArray

LEAST_SHARE = 1e-7
"""Eigenvalues count as at least this share of the largest: where there is no damping they may be 0."""
LIFTS = (0.0, 1e-14, 1e-12, 1e-10, 1e-8)
"""What a matrix that is definite but for rounding is lifted by, relative to its largest diagonal entry."""
DELICATE = 1e7
"""What the rows are, relative to all else, from which on a solution is corrected by its residual."""
PANEL = 2**24
"""Entries of rows that one product takes at once."""


@dataclass(frozen=True)
class Alike:
    """Channels that differ by a factor alone: those with the same lines of one moment.

    Attributes
    ----------
    channels : (r,) int64 array
    place : (r, k) int64 array
        Where their weights are in the block.
    """

    channels: IntArray
    place: IntArray

    def singly(self) -> list[Alike]:
        """Return each channel as a group of its own."""
        return [Alike(self.channels[[i]], self.place[[i]]) for i in range(len(self.channels))]


def alike(term: ChannelTerm) -> list[Alike]:
    """Return all channels in groups that differ by a factor alone."""
    groups: dict[tuple[int, bytes], list[int]] = {}
    for channel, span in enumerate(term.spans()):
        key = int(term.moment[channel]), term.inputs[span].tobytes()
        groups.setdefault(key, []).append(channel)
    found = []
    for members in groups.values():
        channels = np.array(members)
        first = term.start[channels]
        width = int(term.start[members[0] + 1] - first[0])
        found.append(Alike(channels, first[:, None] + np.arange(width)))
    return found


def unit_matrix(term: ChannelTerm, group: Alike) -> FloatArray:
    """Return what the channels of a group are multiples of, (k, k)."""
    lines = term.inputs[group.place[0]]
    return np.asarray(term.moments[term.moment[group.channels[0]]][np.ix_(lines, lines)])


class ShiftedChannels:
    """``(H + shift)^-1``, ``shift = sigma diag(C)`` with C the term over channels.

    Attributes
    ----------
    shift : (n,) float64 array
        What is added to the diagonal of H.

    Notes
    -----
    O(k^3) an eigendecomposition of order k, O(m k n + m^2 n) for the rows; a solve is O((m + k) n). Memory
    beyond the rows: an order-k matrix a group and one of order m.
    """

    def __init__(self, problem: BlockProblem, sigma: float) -> None:
        assert problem.channels is not None
        assert problem.rows is not None
        term = problem.channels
        self.problem, self.rows = problem, problem.rows
        self.shift = sigma * term.diagonal()
        self._parts: list[tuple[IntArray, FloatArray, FloatArray]] = []
        for group in alike(term):
            matrix = unit_matrix(term, group)
            matrix[np.diag_indices(len(matrix))] *= 1.0 + sigma
            values, vectors = np.linalg.eigh(matrix)
            spectrum = term.scale[group.channels, None] * np.maximum(values, 0.0) + problem.damping
            least = LEAST_SHARE * float(spectrum.max(initial=0.0)) or 1.0
            self._parts.append((group.place, vectors, 1.0 / np.maximum(spectrum, least)))
        seen = np.zeros((len(self.rows), len(self.rows)))
        for panel in self._whitened_rows():
            seen += panel @ panel.T
        self._delicate = float(seen.max(initial=0.0)) > DELICATE
        seen[np.diag_indices(len(seen))] += 1.0
        self._inner = _factored(seen) if len(seen) else None

    def solve(self, right: FloatArray) -> FloatArray:
        """Return ``(H + shift)^-1 right``, (n,)."""
        x = self._by_woodbury(right)
        if self._delicate:
            x += self._by_woodbury(right - self.problem.hessian_product(x) - self.shift * x)
        return x

    def _by_woodbury(self, right: FloatArray) -> FloatArray:
        alone = self._by_channel(right)
        if self._inner is None:
            return alone
        inner = cho_solve(self._inner, self.rows @ alone, check_finite=False)
        return alone - self._by_channel(self.rows.T @ inner)

    def _by_channel(self, x: FloatArray) -> FloatArray:
        result = np.empty_like(x)
        for place, vectors, inverse in self._parts:
            result[place] = ((x[place] @ vectors) * inverse) @ vectors.T
        return result

    def _whitened_rows(self) -> Iterator[FloatArray]:
        """Yield panels of ``R (C + shift + damping I)^-1/2``, up to a rotation."""
        m = len(self.rows)
        for place, vectors, inverse in self._parts:
            many = max(1, PANEL // max(1, m * place.shape[1]))
            for first in range(0, len(place) if m else 0, many):
                part = slice(first, first + many)
                panel = self.rows[:, place[part]] @ vectors
                panel *= np.sqrt(inverse[part])
                yield panel.reshape(m, -1)


def _factored(matrix: FloatArray) -> tuple[FloatArray, bool]:
    """Return the Cholesky factor of a matrix that is definite but for rounding, lifted as far as it takes."""
    largest = float(np.diag(matrix).max())
    for lift in LIFTS:
        try:
            lifted = matrix.copy()
            lifted[np.diag_indices(len(matrix))] += lift * largest
            factor, lower = cho_factor(lifted, overwrite_a=True)
            return factor, bool(lower)
        except LinAlgError:
            continue
    raise LinAlgError("the rows beside the layer inputs are not finite")
