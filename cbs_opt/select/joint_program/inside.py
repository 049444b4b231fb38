"""What a support of n of every m leaves to drops and exchanges of a large block: moves within its cells."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from cbs_opt.select.joint_program.pairs import ImprovingPairs, Scores
from cbs_opt.select.joint_program.program import JointProgram, KeptSet
from formulations.errors import UnsupportedProblemError
from formulations.support import NofM, Support

PIECE = 4_096
"""Weights whose cells are scanned together."""


def in_cells(support: int | Support, n: int, method: str) -> NofM | None:
    """Return the support of a large block whose moves stay within cells; None for a count.

    Raises `UnsupportedProblemError` for groups, which only dense blocks are searched by.
    """
    if not isinstance(support, Support):
        return None
    support.check(n)
    if not isinstance(support, NofM):
        found = f"{support} ({support.kind}) on a block of {n} weights, which {method} does not take by rows"
        raise UnsupportedProblemError("support", found, "cut smaller blocks, or raise dense_limit")
    return support


def number_pruned(support: int | Support, n: int) -> int:
    """Return how many of n weights go."""
    return n - support.n_keep_of(n) if isinstance(support, Support) else support


def cheapest_inside(costs: Tensor, index: Tensor, number: int, support: NofM) -> Tensor:
    """Return so many of the kept weights that cost least and that their cells can spare, cheapest first.

    `costs` (s,) are those of the kept weights `index` (s,), in increasing order; of each cell at most those
    above its `n` may go, the cheapest of it.
    """
    order = costs.argsort(stable=True)
    order = order[(index[order] // support.m).argsort(stable=True)]
    cell = index[order] // support.m
    first = torch.searchsorted(cell, cell)
    spare = torch.searchsorted(cell, cell, right=True) - first - support.n
    spared = order[torch.arange(len(order), device=order.device) - first < spare].sort().values
    return index[spared[costs[spared].argsort(stable=True)[:number]]]


def paired_inside(costs: Tensor, gains: Tensor, most: int, support: NofM) -> tuple[Tensor, Tensor]:
    """Return for each cell the weight that costs least and the one that gains most, the best pairs first.

    `costs` and `gains` (n,) are infinite where pruned and -1 where kept. Only pairs that gain more than they
    cost, and at most so many.
    """
    least, leaving = costs.reshape(-1, support.m).min(dim=1)
    largest, entering = gains.reshape(-1, support.m).max(dim=1)
    better = largest - least
    cells = better.argsort(descending=True, stable=True)[:most]
    cells = cells[better[cells] > 0.0]
    return cells * support.m + leaving[cells], cells * support.m + entering[cells]


def improving_pairs_inside(
    program: JointProgram,
    kept: KeptSet,
    scores: Scores,
    threshold: float,
    deadline: float | None,
    support: NofM,
) -> ImprovingPairs:
    """Return what `pairs.improving_pairs` does where both weights of a swap are of one cell.

    The exact change of every such swap is computed, the best of each cell returned: O(m^2) a weight for
    m rows, as for the leverages.
    """
    size, m = PIECE // support.m * support.m or support.m, support.m
    slack = (1.0 - scores.leverages).clamp_min(torch.finfo(torch.float64).eps)
    cost = torch.where(kept.keep, scores.costs, torch.inf)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    complete = True
    for start in range(0, program.n, size):
        if deadline is not None and time.monotonic() >= deadline:
            complete = False
            break
        span = slice(start, min(start + size, program.n))
        columns = program.rows[:, span].double()
        whitened = torch.linalg.solve_triangular(kept.factor, columns, upper=False)
        whitened = whitened.T.reshape(-1, m, whitened.shape[0])
        inner = whitened @ whitened.transpose(1, 2)
        h, out, into = (x[span].reshape(-1, m) for x in (scores.levels, slack, 1.0 + scores.leverages))
        both = out[:, :, None] * into[:, None, :]
        change = cost[span].reshape(-1, m)[:, :, None] - scores.gains[span].reshape(-1, m)[:, None, :]
        change = change - 2.0 * program.damping * h[:, :, None] * h[:, None, :] * inner / both
        change = change / (2.0 + 2.0 * inner.square() / both)
        keep = kept.keep[span].reshape(-1, m)
        change = torch.where(keep[:, :, None] & ~keep[:, None, :], change, torch.inf)
        value, place = change.reshape(-1, m * m).min(dim=1)
        cells = (value < -threshold).nonzero().squeeze(1)
        base = start + cells * m
        parts.append((base + place[cells] // m, base + place[cells] % m, value[cells]))
    nothing = kept.keep.nonzero().squeeze(1)[:0]
    parts.append((nothing, nothing, scores.costs[nothing]))
    leaving, entering, changes = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    order = changes.argsort(stable=True)
    return ImprovingPairs(
        leaving=leaving[order], entering=entering[order], changes=changes[order], complete=complete
    )
