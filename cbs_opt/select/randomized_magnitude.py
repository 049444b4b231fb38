"""Randomised magnitude pruning: starts for a search that differ, yet stay near magnitude pruning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formulations.errors import ArgumentError


def randomized_magnitude(weights: Tensor, n_prune: int, *, spread: float = 0.1, seed: int = 0) -> Tensor:
    """Draw a kept set that lacks small weights, but not exactly the smallest.

    The ``n_prune + spread * n_keep`` weights of least magnitude are sorted and cut into about
    ``sqrt(n)`` buckets of similar magnitude; from every bucket the same share is drawn at random,
    with the remainders spread so that the total is exact.

    Parameters
    ----------
    weights : (n,) tensor
    n_prune : int
    spread : float, default 0.1
        Share of the kept weights that enters the draw; 0 is plain magnitude pruning.
    seed : int, default 0

    Returns
    -------
    (n,) bool tensor
        True where kept, all but `n_prune` of them, on the device of `weights`.

    Notes
    -----
    O(n log n). After RMP of Yu et al. (ICML 2022), whose counts are met on average only.
    """
    if not (math.isfinite(spread) and 0.0 <= spread <= 1.0):
        raise ArgumentError("spread", f"{spread}", "pass a number from 0 to 1")
    n = weights.shape[0]
    generator = torch.Generator().manual_seed(seed)
    candidates = min(n, n_prune + round(spread * (n - n_prune)))
    order = weights.detach().double().abs().cpu().argsort(stable=True)[:candidates]
    keep = torch.ones(n, dtype=torch.bool)
    if candidates > 0:
        size = max(1, math.isqrt(n))
        drawn = 0
        for start in range(0, candidates, size):
            bucket = order[start : start + size]
            # Cumulative rounding: what brings the total to this bucket's share of n_prune.
            take = round((start + bucket.numel()) * n_prune / candidates) - drawn
            keep[bucket[torch.randperm(bucket.numel(), generator=generator)[:take]]] = False
            drawn += take
    return keep.to(weights.device)
