"""New values for the weights that stay: the exact CBS-U, and OBS's independent updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelSystem
from cbs_opt.hessian.products import KeptGram, column_pieces, factorise, image
from formulations.errors import NotPositiveDefiniteError


def cbs_update(block: FisherBlock, pruned: Tensor) -> Tensor:
    """CBS-U: the best new weights for a pruned set, ``d_K = H_KK^-1 (H_KP w_P - g_K)``.

    Parameters
    ----------
    block : FisherBlock
    pruned : (n,) bool tensor

    Returns
    -------
    (n,) float64 tensor
        New weights, exactly 0 where pruned.

    Raises
    ------
    NotPositiveDefiniteError
        If the kept block of ``H`` is singular.

    Notes
    -----
    Solved in float64 through the kept block where it is no larger than m, and through the m x m
    Woodbury system otherwise: O(m s min(m, s)), and no array of the size of the rows is made.
    Source: Yu et al. (ICML 2022), CBS-U.
    """
    return cbs_updates(block, pruned, [block.damping])[0]


def cbs_updates(
    block: FisherBlock, pruned: Tensor, dampings: Sequence[float], gram: KeptGram | None = None
) -> list[Tensor]:
    """`cbs_update` for several dampings in place of the block's own, at little more than one's cost.

    A `gram` of the block's rows that is passed again spares what the sets have in common.
    """
    weights = block.weights.double()
    kept = (~pruned).nonzero().squeeze(1)
    if kept.numel() == 0:
        return [torch.zeros_like(weights) for _ in dampings]
    removed = torch.where(pruned, weights, 0.0)
    right = torch.zeros_like(weights[kept]) if block.gradient is None else -block.gradient[kept].double()
    pulled = None
    if block.rows is not None:
        pulled = image(block.rows, removed)
    else:
        assert block.hessian is not None
        right = right + block.hessian.index_select(0, kept).double() @ removed
    if block.channels is not None:
        right = right + block.channels.product(removed)[kept]
    updates = []
    for step in solve_kept(block, kept, right, dampings, pulled=pulled, gram=gram):
        new_weights = torch.zeros_like(weights)
        new_weights[kept] = weights[kept] + step
        updates.append(new_weights)
    return updates


def passed_over(block: FisherBlock, pruned: Tensor, gram: KeptGram | None) -> None:
    """Have `gram` see a set whose update is not needed, as if `cbs_updates` were called.

    A `KeptGram` is brought from set to set by differences, so its rounding depends on all that it saw: a
    run that goes on after a kill ends with the same bits only if it sees the same sets.
    """
    kept = ~pruned
    count = int(kept.sum())
    if gram is not None and block.channels is None and count > gram.rows.shape[0]:
        gram.of(kept)


def independent_update(block: FisherBlock, pruned: Tensor) -> Tensor:
    """The sum of the single-weight OBS updates, as WoodFisher applies them.

    Every pruned weight moves the others by ``-w_p / [H^-1]_pp H^-1[:, p]`` as if it were alone; the
    pruned entries are then set to 0. For comparison with `cbs_update`, which accounts for them
    jointly.

    Returns
    -------
    (n,) float64 tensor

    Notes
    -----
    O(m^2 n). Source: Singh, Alistarh (WoodFisher, NeurIPS 2020).
    """
    from cbs_opt.select.saliency import inverse_diagonal

    weights = block.weights.double()
    pull = torch.where(pruned, weights / inverse_diagonal(block), 0.0)
    everything = torch.arange(block.n, device=weights.device)
    moved = weights - solve_kept(block, everything, pull, [block.damping])[0]
    return torch.where(pruned, 0.0, moved)


def independent_updates(
    block: FisherBlock, pruned: Tensor, dampings: Sequence[float], gram: KeptGram | None = None
) -> list[Tensor]:
    """`independent_update` for several dampings in place of the block's own; `gram` is of no use."""
    return [independent_update(replace(block, damping=damping), pruned) for damping in dampings]


def solve_kept(
    block: FisherBlock,
    kept: Tensor,
    right: Tensor,
    dampings: Sequence[float],
    *,
    pulled: Tensor | None = None,
    gram: KeptGram | None = None,
) -> list[Tensor]:
    """Solve ``H_KK x = right + R_K^T pulled`` for each damping in place of the block's own.

    Parameters
    ----------
    block : FisherBlock
        Its gradient is not looked at.
    kept : (s,) int64 tensor
        K in increasing order; of all weights, where none is pruned.
    right : (s,) float64 tensor
    dampings : sequence of float
    pulled : (m,) float64 tensor, optional
        A part of the right-hand side in the space of the rows, which loses nothing to cancellation.
    gram : KeptGram, optional
        Of the block's rows, where it is passed again; of no use with a channel term.

    Returns
    -------
    list of (s,) float64 tensors

    Raises
    ------
    NotPositiveDefiniteError
        If ``H_KK`` is singular.

    Notes
    -----
    O(m s min(m, s)) for the first damping. Those that follow cost O(m^3 + m s), with a channel term as
    much as the first.
    """
    rows = block.rows
    if block.channels is not None:
        if rows is not None and pulled is not None:
            right = right + _back(rows, kept, pulled)
        precision = torch.float64 if rows is None else rows.dtype
        return [ChannelSystem(block, kept, damping, precision).solve(right) for damping in dampings]
    if rows is not None and kept.numel() > rows.shape[0]:
        return _solve_woodbury(block, gram or KeptGram(rows), kept, right, pulled, dampings)
    if rows is not None:
        columns = rows.index_select(1, kept).double()
        hessian = columns.T @ columns
        right = right if pulled is None else right + columns.T @ pulled
    else:
        assert block.hessian is not None
        hessian = block.hessian.index_select(0, kept).index_select(1, kept).double()
    return [
        torch.cholesky_solve(right[:, None], factorise(_damped(hessian, damping), block))[:, 0]
        for damping in dampings
    ]


def _solve_woodbury(
    block: FisherBlock,
    gram: KeptGram,
    kept: Tensor,
    right: Tensor,
    pulled: Tensor | None,
    dampings: Sequence[float],
) -> list[Tensor]:
    """`solve_kept` through the m x m system.

    ``(damping I + B^T B)^-1 = (I - B^T (damping I + B B^T)^-1 B) / damping``, and applied to
    ``B^T z`` it is ``B^T (damping I + B B^T)^-1 z``, where nothing cancels however small the damping.
    """
    rows = gram.rows
    if min(dampings) == 0.0:
        found = f"0 with {rows.shape[0]} rows for {kept.numel()} kept weights: H_KK is singular"
        raise NotPositiveDefiniteError("damping", found, "use damping > 0")
    keep = torch.zeros(block.n, dtype=torch.bool, device=rows.device)
    keep[kept] = True
    inner_matrix = gram.of(keep)
    scattered = torch.zeros(block.n, dtype=torch.float64, device=rows.device)
    scattered[kept] = right
    own = image(rows, scattered)
    solutions = []
    for damping in dampings:
        outer = (0.0 if pulled is None else pulled) - own / damping
        inner = torch.cholesky_solve(outer[:, None], factorise(_damped(inner_matrix, damping), block))[:, 0]
        solutions.append(right / damping + _back(rows, kept, inner))
    return solutions


def _damped(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    return damped


def _back(rows: Tensor, kept: Tensor, x: Tensor) -> Tensor:
    """``R_K^T x`` in float64, in chunks of columns."""
    product = torch.empty(len(kept), dtype=torch.float64, device=rows.device)
    for span, columns in column_pieces(rows, kept):
        product[span] = columns.T @ x
    return product
