"""Exact costs of every single move of a row from its tableau: greedy OBS, and swaps until none is left.

The tableau of a kept set K with A = H_KK^-1 is the symmetric matrix

    [ -A      T ]      T = A H_KP,   S = H_PP - H_PK A H_KP,
    [  T'     S ]

with the new weights u_K and the residual g_P = ((w - u) H)_P beside it. One weight entering or leaving is a
sweep, a change of rank one. Dropping i costs ``u_i^2 / (2 A_ii)``, and a swap of i in K against j in P

    1/2 [ u_i^2 / A_ii  -  (g_j + T_ij u_i / A_ii)^2 / (S_j + T_ij^2 / A_ii) ].

Rows are taken as many at a time as fit into memory, each with a tableau of its own, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.select.layer_program.program import LayerProgram, LayerSolution
from cbs_opt.select.layer_program.update import equal_rows, exact_update

LEAST_GAIN = 1e-9
"""Of the loss of a row, that a swap must gain; less is rounding."""
REBUILDS = 50
"""Tableaus that are made from scratch for a row at most; rounding in one could let two sets take turns."""
ROOM = 48
"""Bytes that an entry of a tableau takes with what the search for the best swap makes of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tableaus:
    """Tableaus (b, n, n) of rows, their sets (b, n), and levels (b, n): u_i where kept, g_j where pruned."""

    matrix: Tensor
    levels: Tensor
    keep: Tensor

    def take(self, rows: Tensor) -> _Tableaus:
        """Return those of some rows, copied."""
        return _Tableaus(matrix=self.matrix[rows], levels=self.levels[rows], keep=self.keep[rows])

    def flip(self, inputs: Tensor) -> None:
        """Let one input (b,) of every row enter if it is pruned, or leave if it is kept. O(b n^2)."""
        rows = torch.arange(len(inputs), device=inputs.device)
        column = self.matrix[rows, inputs].clone()
        pivot = column[rows, inputs].clone()
        level = self.levels[rows, inputs].clone()
        size = pivot.abs()
        self.matrix.sub_(column.unsqueeze(2) * (column / pivot.unsqueeze(1)).unsqueeze(1))
        self.levels.sub_(column * (level / pivot).unsqueeze(1))
        column /= size.unsqueeze(1)
        self.matrix[rows, inputs] = column
        self.matrix[rows, :, inputs] = column
        self.matrix[rows, inputs, inputs] = -1.0 / pivot
        self.levels[rows, inputs] = level / size
        self.keep[rows, inputs] = ~self.keep[rows, inputs]


def by_greedy_obs(program: LayerProgram) -> LayerSolution:
    """Return each row's set after dropping, one by one, the weight that costs least, at its best new weights.

    O(n^2) a row and drop. Source: Hassibi, Stork (NIPS 1992), with exact updates of the inverse; as Frantar,
    Alistarh, "Optimal brain compression" (NeurIPS 2022), do it for one layer.
    """
    keep = torch.ones_like(program.weights, dtype=torch.bool)
    for rows, _ in equal_rows(keep, ROOM):
        part = program.take(rows)
        tableaus = _Tableaus(
            matrix=-program.hessian.inverse.expand(len(rows), -1, -1).clone(),
            levels=part.weights.double(),
            keep=keep[rows],
        )
        left = rows
        while True:
            allowed = part.support.droppable(tableaus.keep)
            going = allowed.any(1)
            if not bool(going.all()):
                keep[left[~going]] = tableaus.keep[~going]
                tableaus, left, allowed = tableaus.take(going), left[going], allowed[going]
                part = part.take(going.nonzero().squeeze(1))
            if not len(left):
                break
            own = -tableaus.matrix.diagonal(dim1=1, dim2=2)
            costs = torch.where(allowed, tableaus.levels.square() / own, torch.inf)
            tableaus.flip(costs.argmin(1))
    weights = exact_update(program, keep)
    return LayerSolution(keep=keep, weights=weights.to(program.weights.dtype), losses=program.losses(weights))


def search_swaps(program: LayerProgram, keep: Tensor) -> LayerSolution:
    """Return the sets after the best swap of each row, again and again, until no swap lowers its loss.

    `keep` (r, n) is where to begin; it must have the support of the program. The last look at every swap of a
    row is at a tableau made from scratch: a row that ends there is proved 1-swap optimal, to `LEAST_GAIN`.
    One that still swaps after `REBUILDS` of them is not. Weights and losses are exact, in float64. O(n^3) a
    row, and O(n^2) a swap.
    """
    keep, proved = keep.clone(), 0
    for rows, kept in equal_rows(keep, ROOM):
        left, inside = rows, kept
        for _ in range(REBUILDS):
            part = program.take(left)
            done = _descended(part, _from_scratch(part, inside))
            keep[left] = done.keep
            # Where no swap was taken, the tableau that was searched is the one made from scratch.
            proved += int((~done.moved).sum())
            left = left[done.moved]
            if not len(left):
                break
            inside = keep[left].nonzero()[:, 1].view(len(left), kept.shape[1])
    weights = exact_update(program, keep)
    return LayerSolution(keep=keep, weights=weights, losses=program.losses(weights), proved=proved)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Descent:
    """Sets (b, n), and which rows (b,) took a swap."""

    keep: Tensor
    moved: Tensor


def _descended(program: LayerProgram, tableaus: _Tableaus) -> _Descent:
    """Swap in every row while a swap lowers its loss by enough, but no more often than it has inputs."""
    unit = program.hessian.unit
    losses = program.losses(_weights_of(tableaus)) / unit
    keep, moved = tableaus.keep.clone(), torch.zeros_like(tableaus.keep[:, 0])
    left = torch.arange(len(keep), device=keep.device)
    for _ in range(keep.shape[1]):
        gain, leaving, entering = best_swaps(tableaus, program.support.group(program.hessian.n))
        going = gain > LEAST_GAIN * losses
        keep[left] = tableaus.keep
        if not bool(going.all()):
            tableaus, left, losses = tableaus.take(going), left[going], losses[going]
            gain, leaving, entering = gain[going], leaving[going], entering[going]
        if not len(left):
            break
        tableaus.flip(leaving)
        tableaus.flip(entering)
        losses = losses - gain
        moved[left] = True
    keep[left] = tableaus.keep
    return _Descent(keep=keep, moved=moved)


def best_swaps(tableaus: _Tableaus, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest gain of a swap within a group (b,), with who leaves and who enters, (b,) int64.

    -infinity where there is no pair. In units of the program's Hessian.
    """
    rows, n = tableaus.keep.shape
    shape = (rows, n // group, group)
    own = tableaus.matrix.diagonal(dim1=1, dim2=2).view(shape)
    cross = tableaus.matrix.view(rows, n // group, group, n // group, group)
    cross = cross.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    keep, levels = tableaus.keep.view(shape), tableaus.levels.view(shape)
    inverse = torch.where(keep, -own, 1.0).unsqueeze(3)
    step = torch.where(keep, levels, 0.0).unsqueeze(3) / inverse
    schur = torch.where(keep, 1.0, own).unsqueeze(2)
    gains = (levels.unsqueeze(2) + cross * step).square_()
    gains /= schur + cross.square() / inverse
    gains -= step.square() * inverse
    gains *= 0.5
    gains.masked_fill_(~keep.unsqueeze(3) | keep.unsqueeze(2), -torch.inf)
    best, index = gains.view(rows, -1).max(1)
    number, pair = index // group**2, index % group**2
    return best, number * group + pair // group, number * group + pair % group


def _from_scratch(program: LayerProgram, kept: Tensor) -> _Tableaus:
    """Return the tableaus of sets with as many kept inputs (b, s) each. O(b n^3)."""
    matrix = program.hessian.values
    rows, n = len(kept), len(matrix)
    keep = torch.zeros(rows, n, dtype=torch.bool, device=kept.device).scatter_(1, kept, True)
    pruned = (~keep).nonzero()[:, 1].view(rows, n - kept.shape[1])
    inner = matrix[kept.unsqueeze(2), kept.unsqueeze(1)]
    across = matrix[kept.unsqueeze(2), pruned.unsqueeze(1)]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inner))
    cross = inverse @ across
    rest = matrix[pruned.unsqueeze(2), pruned.unsqueeze(1)] - across.mT @ cross
    table = torch.empty(rows, n, n, dtype=torch.float64, device=kept.device)
    row = torch.arange(rows, device=kept.device).view(-1, 1, 1)
    table[row, kept.unsqueeze(2), kept.unsqueeze(1)] = -inverse
    table[row, kept.unsqueeze(2), pruned.unsqueeze(1)] = cross
    table[row, pruned.unsqueeze(2), kept.unsqueeze(1)] = cross.mT
    table[row, pruned.unsqueeze(2), pruned.unsqueeze(1)] = rest
    # With the whole row kept the levels are w; what leaves moves them by T', or -A: u_K = w_K + T w_P.
    weights = program.weights.double()
    gone = weights.gather(1, pruned).unsqueeze(2)
    levels = torch.empty_like(weights)
    levels.scatter_(1, kept, weights.gather(1, kept) + (cross @ gone).squeeze(2))
    levels.scatter_(1, pruned, (rest @ gone).squeeze(2))
    return _Tableaus(matrix=table, levels=levels, keep=keep)


def _weights_of(tableaus: _Tableaus) -> Tensor:
    return torch.where(tableaus.keep, tableaus.levels, 0.0)
