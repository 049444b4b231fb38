"""Scores that rank weights one by one: the loss increase expected from removing each alone.

Every score is on one scale for the whole network, so that a global budget can be spent by it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from formulations.errors import ArgumentError
from formulations.support import Support


def magnitude(block: FisherBlock) -> Tensor:
    """Return ``|w_i|``, (n,) float64."""
    return block.weights.double().abs()


def obd(block: FisherBlock) -> Tensor:
    """Return the saliency of Optimal Brain Damage, ``1/2 H_ii w_i^2``, (n,) float64.

    Source: LeCun, Denker, Solla (NeurIPS 1989).
    """
    return 0.5 * block.diagonal() * block.weights.double() ** 2


def obs(block: FisherBlock) -> Tensor:
    """Return the saliency of Optimal Brain Surgeon, ``w_i^2 / (2 [H^-1]_ii)``, (n,) float64.

    Raises `NotPositiveDefiniteError` if ``H`` is singular.
    O(m^2 n) through the m x m Woodbury system where ``m < n``, else O(n^3). Sources: Hassibi, Stork (NeurIPS
    1992); Singh, Alistarh (WoodFisher, NeurIPS 2020).
    """
    return 0.5 * block.weights.double() ** 2 / block.inverse_diagonal()


def loss_preservation(block: FisherBlock) -> Tensor:
    """Return ``|g_i w_i|``, the first-order loss change, (n,) float64. Source: SNIP (Lee et al., 2019)."""
    return (_gradient(block) * block.weights.double()).abs()


def gradient_norm(block: FisherBlock) -> Tensor:
    """Return ``|w_i (H g)_i|``, the change of the gradient norm, (n,) float64.

    Source: GraSP (Wang, Zhang, Grosse, 2020).
    """
    return (block.weights.double() * block.product(_gradient(block))).abs()


def _gradient(block: FisherBlock) -> Tensor:
    if block.gradient is None:
        raise ArgumentError("gradient", "None", "this method needs the gradient: pass one")
    return block.gradient.double()


SALIENCIES: dict[str, Callable[[FisherBlock], Tensor]] = {
    saliency.__name__: saliency for saliency in (magnitude, obd, obs, loss_preservation, gradient_norm)
}


def without_lowest(scores: Tensor, n_prune: int | Support) -> Tensor:
    """Return the set (n,) that keeps all but the `n_prune` lowest scores; of equals the first go.

    Of a support it is the set of largest total score.
    """
    if isinstance(n_prune, Support):
        best = n_prune.best(scores.detach().double().cpu().numpy())
        return torch.tensor(best, device=scores.device)
    keep = torch.ones(scores.shape[0], dtype=torch.bool, device=scores.device)
    keep[scores.argsort(stable=True)[:n_prune]] = False
    return keep
