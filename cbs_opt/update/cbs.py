"""New values for the weights that stay: the exact CBS-U, and OBS's independent updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock


def cbs_update(block: FisherBlock, keep: Tensor) -> Tensor:
    """Return the best new weights for a kept set, ``d_K = H_KK^-1 (H_KP w_P - g_K)``: CBS-U.

    `keep` (n,) is True where the weight stays; the new weights (n,) float64 are exactly 0 elsewhere.
    Raises `NotPositiveDefiniteError` if the kept block of ``H`` is singular.

    Solved in float64; see `cbs_opt.hessian` for what it costs. Source: Yu et al. (ICML 2022), CBS-U.
    """
    return cbs_updates(block, keep, [block.damping])[0]


def cbs_updates(block: FisherBlock, keep: Tensor, dampings: Sequence[float]) -> list[Tensor]:
    """Return `cbs_update` for several dampings in place of the block's, at little more than one's cost."""
    weights = block.weights.double()
    if not bool(keep.any()):
        return [torch.zeros_like(weights) for _ in dampings]
    removed = torch.where(keep, 0.0, weights)
    right = torch.zeros_like(weights[keep]) if block.gradient is None else -block.gradient[keep].double()
    updates = []
    for factor in block.hessian.factored(dampings, keep, block.name):
        new_weights = torch.zeros_like(weights)
        new_weights[keep] = weights[keep] + factor.solve(right, removed)
        updates.append(new_weights)
    return updates


def independent_update(block: FisherBlock, keep: Tensor) -> Tensor:
    """Return the sum of the single-weight OBS updates, as WoodFisher applies them.

    Every pruned weight moves the others by ``-w_p / [H^-1]_pp H^-1[:, p]`` as if it were alone; the
    pruned entries are then set to 0. For comparison with `cbs_update`, which accounts for them
    jointly. O(m^2 n). Source: Singh, Alistarh (WoodFisher, NeurIPS 2020).
    """
    weights = block.weights.double()
    factor = block.factor()
    pull = torch.where(keep, 0.0, weights / factor.inverse_diagonal())
    return torch.where(keep, weights - factor.solve(pull), 0.0)


def independent_updates(block: FisherBlock, keep: Tensor, dampings: Sequence[float]) -> list[Tensor]:
    """Return `independent_update` for several dampings in place of the block's own."""
    return [independent_update(replace(block, damping=damping), keep) for damping in dampings]
