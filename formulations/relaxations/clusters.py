"""Clusters of weights that are relaxed together: which belong in one, and their place in arrays.

What a diagonal split leaves open is what a semidefinite ``W`` with the right diagonal can do to
``1/2 <H, W>`` that no distribution over supports can. Near the best diagonal split ``W`` is a multiple of the
inverse of ``H - D``, so that ``|H_ij [(H - D)^-1]_ij|`` says how much of it the pair i, j accounts for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from formulations.problem import BoolArray, FloatArray, IntArray

OFF_THE_BOUNDARY = 0.98
"""Share of a split whose slack is inverted."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """A partition of n weights into clusters of at most m.

    Attributes
    ----------
    order : (clusters, m) int64 array
        Weights of each cluster; -1 in empty places. An empty place stands for a weight of its own that has
        nothing to do with the block: no linear term, and 1 on the diagonal of the matrix.
    n : int
    """

    order: IntArray
    n: int

    @property
    def is_partition(self) -> bool:
        """Whether every weight is in one place."""
        used = self.order[self.order >= 0]
        return self.order.ndim == 2 and np.array_equal(np.sort(used), np.arange(self.n))

    @property
    def filled(self) -> BoolArray:
        """True in places that hold a weight, (clusters * m,)."""
        return np.asarray(self.order.reshape(-1) >= 0)

    def gathered(self, values: FloatArray, empty: float = 0.0) -> FloatArray:
        """Return values by place, (clusters * m,)."""
        return np.where(self.filled, values[self.order.reshape(-1)], empty)

    def scattered(self, values: FloatArray) -> FloatArray:
        """Return values by weight, (n,)."""
        found = np.empty(self.n)
        found[self.order.reshape(-1)[self.filled]] = values[self.filled]
        return found

    def matrix(self, matrix: FloatArray) -> FloatArray:
        """Return a matrix by place, with a unit diagonal in empty ones."""
        place = self.order.reshape(-1)
        found = matrix[np.ix_(place, place)]
        empty = np.flatnonzero(~self.filled)
        found[empty], found[:, empty] = 0.0, 0.0
        found[empty, empty] = 1.0
        return found

    def spread(self, blocks: FloatArray) -> FloatArray:
        """Return ``blkdiag(blocks)`` by weight, (n, n); what is in empty places is left out."""
        found = np.zeros((self.n + 1, self.n + 1))
        found[self.order[:, :, None], self.order[:, None, :]] = blocks
        return found[: self.n, : self.n]


def choose_clusters(matrix: FloatArray, split: FloatArray, size: int, *, multiple: int = 1) -> Clusters:
    """Return clusters of `size` weights, a power of 2, by matching pairs, then pairs of pairs.

    Parameters
    ----------
    matrix : (n, n) float64 array
        ``H``, or scaled.
    split : (n,) float64 array
        A diagonal split of it.
    size : int
    multiple : int
        What the number of clusters shall be a multiple of.
    """
    n = split.size
    slack = matrix.copy()
    slack[np.diag_indices(n)] -= OFF_THE_BOUNDARY * split
    many = -(-n // (size * multiple)) * size * multiple
    shared = np.zeros((many, many))
    shared[:n, :n] = np.abs(matrix * np.linalg.inv(slack))
    groups = np.arange(many)[:, None]
    while groups.shape[1] < size:
        left, right = matched_pairs(shared)
        groups = np.concatenate((groups[left], groups[right]), axis=1)
        shared = _joined(shared, left, right)
    order = np.where(groups < n, groups, -1).astype(np.int64)
    return Clusters(order, n)


def paired_clusters(matrix: FloatArray, slack: FloatArray, size: int) -> tuple[IntArray, IntArray]:
    """Match clusters in pairs; `slack` is the inverse of what their blocks leave of `matrix`, by place."""
    every = np.arange(len(matrix) // size)
    shared = np.abs(matrix * slack).reshape(every.size, size, every.size, size).sum(axis=(1, 3))
    return matched_pairs(shared)


def _joined(shared: FloatArray, left: IntArray, right: IntArray) -> FloatArray:
    """Return what pairs share with each other."""
    shared = shared[:, left] + shared[:, right]
    return shared[left] + shared[right]


def matched_pairs(gains: FloatArray) -> tuple[IntArray, IntArray]:
    """Match an even number of items in pairs: those that are each other's best, until none is left.

    What taking the pair of largest gain, again and again, comes to; `gains` is symmetric.
    """
    count = len(gains)
    gains = gains.copy()
    gains[np.diag_indices(count)] = -np.inf
    single = np.ones(count, dtype=np.bool_)
    left: list[int] = []
    right: list[int] = []
    while single.any():
        index = np.flatnonzero(single)
        among = gains[np.ix_(index, index)]
        best = among.argmax(axis=1)
        mutual = best[best] == np.arange(index.size)
        if mutual.any() and among.max() > 0.0:
            first = np.flatnonzero(mutual & (np.arange(index.size) < best))
        else:
            # Nothing to choose between any more: as they come.
            first, best = np.arange(0, index.size, 2), np.arange(index.size) + 1
        left.extend(index[first])
        right.extend(index[best[first]])
        single[index[first]] = single[index[best[first]]] = False
    return np.array(left, dtype=np.int64), np.array(right, dtype=np.int64)


def subsets_of(size: int) -> list[IntArray]:
    """Return the subsets of ``range(size)`` by their number of elements, (subsets, elements) each."""
    return [np.array(list(combinations(range(size), count)), dtype=np.int64) for count in range(size + 1)]


def support_rows(size: int) -> BoolArray:
    """Return what is in each subset, in the order of `subsets_of`, (subsets, size)."""
    found = np.zeros((2**size, size), dtype=np.bool_)
    place = 0
    for sets in subsets_of(size):
        found[np.arange(place, place + len(sets))[:, None], sets] = True
        place += len(sets)
    return found


def best_by_count(values: FloatArray, counts: FloatArray) -> FloatArray:
    """Return the largest of the values (c, subsets) of subsets with 0 to m members, (c, m + 1)."""
    sizes = np.unique(counts)
    return np.stack([values[:, counts == size].max(axis=1) for size in sizes], axis=1)


def held_by_count(best: FloatArray, n_keep: int) -> tuple[float, float]:
    """Return ``min over prices >= 0 of price n_keep + sum of max_k (best_k - price k)``.

    Parameters
    ----------
    best : (c, m + 1) float64 array
        What a cluster holds with 0 to m kept.
    n_keep : int

    Returns
    -------
    held, price : float
        The largest sum of slopes of the concave envelopes, so many of them, beside what clusters hold with
        none kept; and the least of those slopes.
    """
    slopes = envelope_slopes(best)
    most = min(n_keep, slopes.size)
    chosen = np.sort(slopes.reshape(-1))[::-1][:most]
    held = float(best[:, 0].sum()) + float(chosen.sum())
    return held, max(float(chosen[-1]), 0.0) if most else 0.0


def envelope_slopes(best: FloatArray) -> FloatArray:
    """Return the slopes of the least concave function above each row, (c, m), decreasing and at least 0."""
    clusters, size = best.shape
    rows = np.arange(clusters)
    rising = np.maximum.accumulate(best, axis=1)
    slopes = np.zeros((clusters, size - 1))
    at = np.zeros(clusters, dtype=np.int64)
    for step in range(size - 1):
        ahead = np.arange(size)[None, :] - at[:, None]
        rise = rising - rising[rows, at][:, None]
        rate = np.where(ahead > 0, rise / np.maximum(ahead, 1), -np.inf)
        slopes[:, step] = rate.max(axis=1)
        # The end of a piece is where the next slope is looked for.
        end = size - 1 - rate[:, ::-1].argmax(axis=1)
        at = np.where(step + 1 >= end, end, at)
    return slopes
