"""Counts of weights by value, small enough to travel in a report."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from formulations.problem import FloatArray

MOST_BINS = 60
FEWEST_BINS = 12


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts over bins: ``counts[i]`` values lie between ``edges[i]`` and ``edges[i + 1]``."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of values counted."""
        return sum(self.counts)


def shared_histograms(first: Tensor, second: Tensor) -> tuple[Histogram, Histogram]:
    """Histograms of two tensors over the same equal bins that cover both.

    Twice the square root of the number of values, within limits, gives the number of bins. Values
    that are not finite are left out. O(number of values).
    """
    arrays = [_finite(first), _finite(second)]
    joined = np.concatenate(arrays)
    low, high = (float(joined.min()), float(joined.max())) if joined.size else (0.0, 0.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    bins = min(MOST_BINS, max(FEWEST_BINS, 2 * math.isqrt(arrays[0].size)))
    edges = np.linspace(low, high, bins + 1)
    made = [
        Histogram(edges=tuple(edges.tolist()), counts=tuple(np.histogram(array, edges)[0].tolist()))
        for array in arrays
    ]
    return made[0], made[1]


def _finite(values: Tensor) -> FloatArray:
    array: FloatArray = values.detach().double().cpu().numpy().reshape(-1)
    return array[np.isfinite(array)]
