"""Best-improvement swaps on many selection programs that share one Hessian, on any device.

The rows of a linear layer that is judged by its inputs alone have one Gram matrix H between them and differ
in their weights: block b is ``A_b = diag(w_b) H diag(w_b)``. Nothing of size n^2 is made for a block: a step
of all blocks costs a few passes over (B, n) arrays, two rows of H a block, and a table of the pairs that
cannot be excluded. The exclusion is that of `dense_swaps`: ``A_ij <= sqrt(A_ii A_jj)`` proves of most weights
that they are in no better pair than one already found, so that each step is the best of all pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.select.selection_program.dense import SwapCounts
from formulations.errors import ShapeError

TABLE_NUMBERS = 1 << 25
"""Pairs in the tables of the blocks that are looked at together: 256 MiB in float64."""


LEVELS = 32
"""Intervals of norms within which weights share a bound on what their best partner brings."""


@dataclass(kw_only=True, eq=False)
class _Blocks:
    """Blocks that are still searched: their weights and the state of their search."""

    weights: Tensor
    norm: Tensor
    half_diagonal: Tensor
    product: Tensor
    linear: Tensor
    pruned: Tensor


def swap_shared(
    hessian: Tensor,
    weights: Tensor,
    pruned: Tensor,
    *,
    linear: Tensor | None = None,
    tolerance: Tensor | float = 0.0,
    max_swaps: int | None = None,
) -> SwapCounts:
    """Run best-improvement swaps on blocks that share a Hessian until none helps.

    Parameters
    ----------
    hessian : (n, n) tensor
        H, damping included: symmetric positive semidefinite. Its dtype is that of the search.
    weights : (B, n) tensor
        Trained weights of the blocks.
    pruned : (B, n) bool tensor
        The sets to start from; updated in place, their sizes never change.
    linear : (B, n) tensor, optional
        ``c = g * w``; zero by default.
    tolerance : (B,) tensor or float, default 0
        A swap must lower the objective of its block by more than this.
    max_swaps : int, optional
        In each block; by default as many as it takes.

    Returns
    -------
    SwapCounts

    Raises
    ------
    ShapeError
        If the shapes do not fit.

    Notes
    -----
    O(B n) a step and what is left of the tables. Memory: six arrays of the size of `weights`, and at most
    `TABLE_NUMBERS` numbers for pairs, or the table of one block. The blocks make the swaps of
    `dense_swaps.swap_dense`, up to ties within rounding.
    """
    blocks, n = weights.shape
    for name, tensor, shape in (("hessian", hessian, (n, n)), ("pruned", pruned, (blocks, n))):
        if tuple(tensor.shape) != shape:
            raise ShapeError(name, f"shape {tuple(tensor.shape)}", f"pass {shape}")
    w = weights.to(hessian)
    y = pruned.to(hessian)
    diagonal = hessian.diagonal()
    state = _Blocks(
        weights=w,
        norm=w.abs() * diagonal.clamp_min(0.0).sqrt(),
        half_diagonal=0.5 * w.square() * diagonal,
        product=w * ((w * y) @ hessian),
        linear=torch.zeros_like(w) if linear is None else linear.to(hessian),
        pruned=pruned,
    )
    least = torch.as_tensor(tolerance, dtype=hessian.dtype, device=hessian.device).expand(blocks)
    swaps = torch.zeros(blocks, dtype=torch.int64, device=hessian.device)
    settled = torch.zeros(blocks, dtype=torch.bool, device=hessian.device)
    budget = torch.iinfo(torch.int64).max if max_swaps is None else max_swaps
    while bool((searched := ~settled & (swaps < budget)).any()):
        chosen = searched.nonzero().squeeze(1)
        change, out, into = _best_pairs(hessian, state, chosen)
        better = change < -least[chosen]
        settled[chosen[~better]] = True
        moved, out, into = chosen[better], out[better], into[better]
        gone, come = state.weights[moved, out], state.weights[moved, into]
        step = hessian[into] * come[:, None] - hessian[out] * gone[:, None]
        state.product[moved] += state.weights[moved] * step
        pruned[moved, out] = False
        pruned[moved, into] = True
        swaps[moved] += 1
    return SwapCounts(swaps=swaps, locally_optimal=settled)


def _best_pairs(hessian: Tensor, state: _Blocks, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each block of `chosen` the lowest change and its pair (out of P, into P); inf without a pair."""
    pruned, norm, w = state.pruned[chosen], state.norm[chosen], state.weights[chosen]
    price = state.half_diagonal[chosen]
    slope = state.product[chosen] - state.linear[chosen]
    cost_out = (price - slope).masked_fill_(~pruned, torch.inf)
    cost_in = (price + slope).masked_fill_(pruned, torch.inf)
    low_out, first_out = cost_out.min(dim=1)
    low_in, first_in = cost_in.min(dim=1)
    each = torch.arange(len(chosen), device=w.device)
    # The row and the column of the two cheapest: a good pair excludes the rest.
    row = low_out[:, None] + cost_in - w[each, first_out][:, None] * hessian[first_out] * w
    column = low_in[:, None] + cost_out - w[each, first_in][:, None] * hessian[first_in] * w
    best, into = row.min(dim=1)
    out = first_out
    other, from_column = column.min(dim=1)
    swapped = other < best
    best = torch.where(swapped, other, best)
    out, into = torch.where(swapped, from_column, out), torch.where(swapped, first_in, into)
    leaving = cost_out + _lowest_partner(norm, cost_in, ~pruned) < best[:, None]
    entering = cost_in + _lowest_partner(norm, cost_out, pruned) < best[:, None]
    return _best_of_tables(hessian, w, (cost_out, cost_in), (leaving, entering), (best, out, into))


def _lowest_partner(norm: Tensor, cost: Tensor, partners: Tensor) -> Tensor:
    """For every weight a lower bound of ``cost_j - norm_i norm_j`` over its `partners` j, (B, n).

    The bound falls as ``norm_i`` grows, so that its value at the upper end of an interval of norms holds for
    the whole interval.
    """
    ends = norm.amax(1, keepdim=True)
    bounds = torch.empty(len(norm), LEVELS, dtype=norm.dtype, device=norm.device)
    weight = norm.masked_fill(~partners, 0.0)
    for level in range(LEVELS):
        bounds[:, level] = torch.addcmul(cost, ends * ((level + 1) / LEVELS), weight, value=-1.0).amin(1)
    place = (norm * (LEVELS / ends.clamp_min(torch.finfo(norm.dtype).tiny))).long().clamp_(max=LEVELS - 1)
    return bounds.gather(1, place)


def _best_of_tables(
    hessian: Tensor,
    weights: Tensor,
    costs: tuple[Tensor, Tensor],
    candidates: tuple[Tensor, Tensor],
    known: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """`known` pairs, or better ones among the candidates that leave and enter."""
    best, out, into = known
    counts = torch.stack([mask.sum(1) for mask in candidates])
    longest = torch.where(counts.amin(0) > 0, counts.amax(0), 0)
    # Blocks with tables of like size side by side, so that little of a table is padding.
    order = longest.argsort()
    order = order[longest[order] > 0]
    while len(order):
        size = int(longest[order[-1]])
        some = order[-max(1, TABLE_NUMBERS // size**2) :]
        order = order[: -len(some)]
        left, right = (_listed(mask[some]) for mask in candidates)
        columns = right.shape[1]
        table = hessian[left[:, :, None], right[:, None, :]]
        table *= -weights[some].gather(1, left)[:, :, None]
        table *= weights[some].gather(1, right)[:, None, :]
        # What fills up a list is no candidate, or the first one once more.
        for side, (cost, mask, index) in enumerate(zip(costs, candidates, (left, right), strict=True)):
            value = cost[some].gather(1, index).masked_fill_(~mask[some].gather(1, index), torch.inf)
            table += value[:, :, None] if side == 0 else value[:, None, :]
        found, flat = table.flatten(1).min(dim=1)
        better = found < best[some]
        members = some[better]
        best[members] = found[better]
        out[members] = left.gather(1, (flat // columns)[:, None])[:, 0][better]
        into[members] = right.gather(1, (flat % columns)[:, None])[:, 0][better]
    return best, out, into


def _listed(mask: Tensor) -> Tensor:
    """Positions of the entries that are True, row by row, filled up with 0, (rows, most in a row)."""
    counts = mask.sum(1)
    row, position = mask.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]
    index = torch.zeros(len(mask), int(counts.max()), dtype=torch.int64, device=mask.device)
    index[row, place] = position
    return index
