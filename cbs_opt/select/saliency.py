"""Scores that rank weights one by one: the loss increase expected from removing each alone.

Every score is on one scale for the whole network, so that a global budget can be spent by it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelSystem
from cbs_opt.hessian.products import column_pieces, factorise, hessian_diagonal, hessian_product, inner_gram
from formulations.errors import ArgumentError, NotPositiveDefiniteError


def magnitude(block: FisherBlock) -> Tensor:
    """``|w_i|``, (n,) float64."""
    return block.weights.double().abs()


def obd(block: FisherBlock) -> Tensor:
    """Optimal Brain Damage, ``1/2 H_ii w_i^2``, (n,) float64.

    Source: LeCun, Denker, Solla (NeurIPS 1989).
    """
    return 0.5 * hessian_diagonal(block) * block.weights.double() ** 2


def obs(block: FisherBlock) -> Tensor:
    """Optimal Brain Surgeon, ``w_i^2 / (2 [H^-1]_ii)``, (n,) float64.

    Raises
    ------
    NotPositiveDefiniteError
        If ``H`` is singular.

    Notes
    -----
    O(m^2 n) through the m x m Woodbury system where ``m < n``, else O(n^3). Sources: Hassibi,
    Stork (NeurIPS 1992); Singh, Alistarh (WoodFisher, NeurIPS 2020).
    """
    return 0.5 * block.weights.double() ** 2 / inverse_diagonal(block)


def inverse_diagonal(block: FisherBlock) -> Tensor:
    """``diag(H^-1)``, (n,) float64."""
    if block.channels is not None:
        everything = torch.arange(block.n, device=block.weights.device)
        precision = torch.float64 if block.rows is None else block.rows.dtype
        return ChannelSystem(block, everything, block.damping, precision).inverse_diagonal()
    if block.spectrum is not None:
        return block.spectrum.inverse_diagonal(block.damping)
    rows = block.rows
    if rows is None or rows.shape[0] >= block.n:
        hessian = block.hessian.double() if rows is None else inner_gram(rows.T)  # type: ignore[union-attr]
        damped = hessian + block.damping * torch.eye(block.n, dtype=torch.float64, device=hessian.device)
        return torch.diagonal(torch.cholesky_inverse(factorise(damped, block)))
    if block.damping == 0.0:
        found = f"0 with {rows.shape[0]} rows for {block.n} weights: H is singular"
        raise NotPositiveDefiniteError("damping", found, "use damping > 0")
    # H^-1 = (I - R^T (damping I + R R^T)^-1 R) / damping, so its diagonal needs |L^-1 R_i|^2.
    gram = inner_gram(rows)
    gram.diagonal().add_(block.damping)
    factor = factorise(gram, block)
    seen = torch.empty(block.n, dtype=torch.float64, device=rows.device)
    for span, columns in column_pieces(rows):
        seen[span] = torch.linalg.solve_triangular(factor, columns, upper=False).square_().sum(dim=0)
    return (1.0 - seen).clamp_min(torch.finfo(torch.float64).eps) / block.damping


def loss_preservation(block: FisherBlock) -> Tensor:
    """``|g_i w_i|``, the first-order loss change, (n,) float64. Source: SNIP (Lee et al., 2019)."""
    return (_gradient(block) * block.weights.double()).abs()


def gradient_norm(block: FisherBlock) -> Tensor:
    """``|w_i (H g)_i|``, the change of the gradient norm, (n,) float64.

    Source: GraSP (Wang, Zhang, Grosse, 2020).
    """
    return (block.weights.double() * hessian_product(block, _gradient(block))).abs()


def _gradient(block: FisherBlock) -> Tensor:
    if block.gradient is None:
        raise ArgumentError("gradient", "None", "this method needs the gradient: pass one")
    return block.gradient.double()


SALIENCIES: dict[str, Callable[[FisherBlock], Tensor]] = {
    "magnitude": magnitude,
    "obd": obd,
    "obs": obs,
    "loss_preservation": loss_preservation,
    "gradient_norm": gradient_norm,
}


def lowest(scores: Tensor, n_prune: int) -> Tensor:
    """The `n_prune` lowest scores as an (n,) bool tensor; ties fall to the weights that come first."""
    pruned = torch.zeros(scores.shape[0], dtype=torch.bool, device=scores.device)
    pruned[scores.argsort(stable=True)[:n_prune]] = True
    return pruned
