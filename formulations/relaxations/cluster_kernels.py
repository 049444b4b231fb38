"""Numba kernels of the path of clusters: the shares of supports at the best price, and its Newton system."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from formulations.compiled import INDICES, INTEGER, MATRIX, REAL, VECTOR, compiled, entry
from formulations.problem import FloatArray, IntArray

SingleArray = NDArray[np.float32]
SINGLES = numba.float32[:, ::1]

FARTHEST = 1e100
"""Distance, in units of the weight, from which a support is as good as out."""
ROOTS, PRICES = 40, 80
"""Most steps on the level of a cluster, and on the price."""


@compiled
def mix_cluster(values: FloatArray, shares: FloatArray) -> float:
    """Write where ``sum_S 1 / (level + behind_S)`` is 1, the terms; return the smoothed largest value.

    `values` are in units of the weight, and ``behind_S`` is how far one is below the largest of them.
    """
    many = values.size
    largest = values[0]
    for s in range(many):
        largest = max(largest, values[s])
    level, total = 1.0, 1.0
    for _ in range(ROOTS):
        total, square = 0.0, 0.0
        for s in range(many):
            shares[s] = 1.0 / (level + min(largest - values[s], FARTHEST))
            total += shares[s]
            square += shares[s] * shares[s]
        if abs(total - 1.0) < 1e-13:
            break
        level += total * (total - 1.0) / square
    smooth = largest + level
    for s in range(many):
        smooth += np.log(shares[s])
        shares[s] /= total
    return float(smooth)


@entry(MATRIX, VECTOR, REAL, REAL, REAL, MATRIX)
@compiled
def mix_clusters(
    values: FloatArray, counts: FloatArray, n_keep: float, weight: float, price: float, shares: FloatArray
) -> tuple[float, float]:
    """Write the shares of supports at the price at which `n_keep` weights are kept.

    Newton steps on the price inside a bracket, from the one given.

    Parameters
    ----------
    values : (c, subsets) array
        What a support of a cluster holds, without the price of its members.
    counts : (subsets,) array
        How many members a support has.
    n_keep : float
    weight : float
        Of the barrier.
    price : float
    shares : (c, subsets) array

    Returns
    -------
    total, price : float
        Sum over clusters of ``min over t of t - weight sum_S log(t - values_S + price counts_S)``.
    """
    clusters, many = values.shape
    net = np.empty(many)
    low, high = -np.inf, np.inf
    total = 0.0
    for _ in range(PRICES):
        total, kept, fall = 0.0, 0.0, 0.0
        for c in range(clusters):
            for s in range(many):
                net[s] = (values[c, s] - price * counts[s]) / weight
            total += mix_cluster(net, shares[c])
            size, first, second = 0.0, 0.0, 0.0
            for s in range(many):
                share = shares[c, s]
                kept += share * counts[s]
                size += share * share
                first += share * share * counts[s]
                second += share * share * counts[s] * counts[s]
            fall += second - first * first / size
        excess = kept - n_keep
        if abs(excess) <= 1e-9 * n_keep:
            break
        if excess > 0.0:
            low = price
        else:
            high = price
        price += weight * excess / max(fall, 1e-300)
        if not low < price < high:
            if np.isfinite(low) and np.isfinite(high):
                price = 0.5 * (low + high)
            elif np.isfinite(low):
                price = low + abs(low) + 100.0 * weight
            else:
                price = high - abs(high) - 100.0 * weight
    return weight * (total - clusters * many * np.log(weight)), price


@entry(SINGLES, SINGLES, INDICES, INDICES, VECTOR, INTEGER)
@compiled
def join_barrier(
    slack: SingleArray, system: SingleArray, first: IntArray, second: IntArray, scale: FloatArray, size: int
) -> None:
    """Replace the upper triangle of `system` by the curvature of ``-log det Q`` less what is in it.

    Entry ``(a, b)`` of a block and ``(c, d)`` of another: ``X_ac X_bd + X_ad X_bc`` with ``X = Q^-1``, the
    `slack`, times the `scale` of both.
    """
    entries = first.size
    factor = np.empty(entries, dtype=np.float32)
    for p in range(entries):
        factor[p] = scale[p]
    clusters = slack.shape[0] // size
    for left in range(clusters):
        for right in range(left, clusters):
            for p in range(entries):
                one, two = slack[left * size + first[p]], slack[left * size + second[p]]
                own = factor[p]
                row = system[left * entries + p]
                for q in range(entries):
                    c, d = right * size + first[q], right * size + second[q]
                    place = right * entries + q
                    row[place] = own * factor[q] * (one[c] * two[d] + one[d] * two[c]) - row[place]
