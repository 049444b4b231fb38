"""Greedy OBS on a large block whose Hessian has a channel term."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from cbs_opt.blocks import FisherBlock
from cbs_opt.heuristics.channel_solve import ChannelSystem
from cbs_opt.heuristics.products import hessian_product
from cbs_opt.heuristics.saliency import lowest


def greedy_channel_set(
    block: FisherBlock, count: int, *, drops: int, deadline: float | None = None
) -> Tensor:
    """Drop what costs least, move the rest to the minimum of the model, score again.

    Parameters
    ----------
    block : FisherBlock
        With rows and channels.
    count : int
        Weights to prune.
    drops : int
        The kept count falls by the same factor each time.
    deadline : float, optional
        Reading of `time.monotonic` after which all that is left to drop goes at once.

    Returns
    -------
    (n,) bool tensor
        The pruned set.

    Notes
    -----
    O(m^2 s) a drop of s kept weights. Scores ``u_i^2 / (2 [H_KK^-1]_ii)`` of the moved weights u, after
    Hassibi & Stork (1993). The weights are those of the trained network throughout: the model stays one
    quadratic, only the kept set shrinks.
    """
    n = block.n
    keep = torch.ones(n, dtype=torch.bool, device=block.weights.device)
    size = n
    for drop in range(1, drops + 1):
        late = deadline is not None and time.monotonic() >= deadline
        goal = n - count if late or drop == drops else round(n * ((n - count) / n) ** (drop / drops))
        if goal >= size:
            continue
        kept = keep.nonzero().squeeze(1)
        keep[kept[lowest(_costs(block, keep, kept), size - goal)]] = False
        size = goal
    return ~keep


def _costs(block: FisherBlock, keep: Tensor, kept: Tensor) -> Tensor:
    """Loss increase of dropping each kept weight alone, the others free to move, (s,) float64."""
    assert block.rows is not None
    weights = block.weights.double()
    system = ChannelSystem(block, kept, block.damping, block.rows.dtype)
    right = hessian_product(block, torch.where(keep, 0.0, weights))[kept]
    if block.gradient is not None:
        right = right - block.gradient.double()[kept]
    moved = weights[kept] + system.solve(right)
    return 0.5 * moved.square() / system.inverse_diagonal()
