"""Several exchanges a row at once, for all rows, taken where they lower the loss.

What dropping a kept weight costs, and what adding a pruned one gains, takes the Schur complement ``c_i`` of
input i in H given the kept ones:

    dropping i costs  1/2 c_i u_i^2,     adding j gains  1/2 g_j^2 / c_j,     g = (w - u) H

In the exact figures c depends on the set, and so on the row, and takes an inverse each. But it hardly
differs between the rows of a layer (by 2 to 4 %, on inputs of attention outputs 10 %, measured on SmolLM2):
its mean over a few rows ranks the candidates of all as well as each row's own, and a product with H a step
is all that is left. Candidates that were ranked by an approximation are tried, not believed: a row takes its
exchanges if its loss at the weights found for them is lower, and else tries fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cbs_opt.select.layer_program.alternating import Alternating, alternating_sets
from cbs_opt.select.layer_program.one_swaps import search_swaps
from cbs_opt.select.layer_program.program import LayerProgram, LayerSolution
from cbs_opt.select.layer_program.update import descend, equal_rows, updated
from cbs_opt.system.checks import check_fields, finite_number, whole_number

RELAXATION = Alternating(penalty=0.5, growth=(1.25, 1.2, 1.1), iterations=30)
SAMPLED = 4
"""Rows whose Schur complements are averaged."""
FEWER = 4
"""Of the exchanges that did not lower the loss of a row, one in so many is tried next."""
LEAST_DECREASE = 1e-6
"""Of the loss of a row; less is rounding."""


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """How the sets of a layer are found: a relaxation, exchanges from there, and a proof for some rows.

    Raises `ArgumentError` if a field is out of its range.

    Parameters
    ----------
    relaxation : Alternating
        Where the sets come from.
    rounds : int, default 8
        Of exchanges, at most.
    share : float, default 0.1
        Of the kept weights of a row that are exchanged at once, at first.
    steps : int, default 8
        Of conjugate gradients after each round.
    examine : int, default 0
        Rows, spread evenly over the layer, that go on by single swaps with exact costs until none lowers the
        loss: see `one_swaps`. All, if there are no more. O(n^3) a row.
    """

    relaxation: Alternating = RELAXATION
    rounds: int = 8
    share: float = 0.1
    steps: int = 8
    examine: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "exchanges.", whole_number, "steps")
        check_fields(self, "exchanges.", whole_number, "rounds", "examine", least=0)
        check_fields(self, "exchanges.", finite_number, "share", most=1.0, above=True)


DEFAULT = Exchanges()


def by_exchanges(program: LayerProgram, options: Exchanges = DEFAULT) -> LayerSolution:
    """Return sets by relaxation and exchanges, with their best new weights; some rows 1-swap optimal."""
    scale = program.hessian.least_scale.sqrt()
    keep, weights = alternating_sets(program, scale, options.relaxation)
    program = program.settled(keep)
    solution = updated(program, *improved(program, keep, weights, options))
    if not options.examine:
        return solution
    rows = spread(program.rows, options.examine, program.weights.device)
    better = search_swaps(program.take(rows), solution.keep[rows])
    keep, weights, losses = solution.keep, solution.weights, solution.losses
    keep[rows], losses[rows] = better.keep, better.losses
    weights[rows] = better.weights.to(weights.dtype)
    return replace(better, keep=keep, weights=weights, losses=losses)


def improved(
    program: LayerProgram, keep: Tensor, weights: Tensor, options: Exchanges = DEFAULT
) -> tuple[Tensor, Tensor]:
    """Return sets (r, n) and weights (r, n) after rounds of exchanges from there; no row gets worse.

    O(rounds steps r n^2). A row leaves when a single exchange does not lower its loss.
    """
    schur = mean_schur(program, keep).to(weights.dtype)
    weights, residual = descend(program, keep, weights, options.steps)
    losses = _losses(program, weights, residual)
    keep = keep.clone()
    limits = (options.share * keep.sum(1)).ceil().long()
    active = torch.arange(program.rows, device=keep.device)
    for _ in range(options.rounds):
        part = program.take(active)
        kept, now, pull = keep[active], weights[active], residual[active]
        costs = torch.where(kept, schur * now.square(), torch.inf)
        gains = torch.where(kept, -torch.inf, pull.square() / schur)
        row, leaving, entering = program.support.exchanges(costs, gains, limits[active])
        moved = kept.clone()
        moved[row, leaving] = False
        moved[row, entering] = True
        start = now.clone()
        start[row, entering] = pull[row, entering] / schur[entering]
        found, pulled = descend(part, moved, start, options.steps)
        reached = _losses(part, found, pulled)
        better = reached < (1.0 - LEAST_DECREASE) * losses[active]
        taken = active[better]
        keep[taken], weights[taken], residual[taken] = moved[better], found[better], pulled[better]
        losses[taken] = reached[better]
        tried = torch.zeros_like(active).index_add_(0, row, torch.ones_like(row))
        fewer = torch.where(better, limits[active], tried.clamp(max=limits[active]) // FEWER)
        limits[active] = torch.where(better | (tried <= 1), fewer, fewer.clamp_min(1))
        active = active[limits[active] > 0]
        if not len(active):
            break
    return keep, weights


def mean_schur(program: LayerProgram, keep: Tensor, sampled: int = SAMPLED) -> Tensor:
    """Return the mean over rows of the Schur complement of every input given the kept others, (n,) float64.

    Over `sampled` rows, spread evenly; O(sampled n^3).
    """
    matrix = program.hessian.values
    total = torch.zeros_like(matrix[0])
    rows = spread(program.rows, sampled, keep.device)
    for _, kept in equal_rows(keep[rows], 8):
        factor = torch.linalg.cholesky(matrix[kept.unsqueeze(2), kept.unsqueeze(1)])
        solved = torch.linalg.solve_triangular(factor, matrix[kept], upper=False).square().sum(1)
        inverse = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
        total += (matrix.diagonal() - solved).scatter(1, kept, 1.0 / inverse).sum(0)
    return (total / len(rows)).clamp_min(program.hessian.least_scale)


def spread(rows: int, number: int, device: torch.device) -> Tensor:
    """Return `number` rows in equal distances, or all if there are no more, (number,) int64."""
    number = min(rows, number)
    return (torch.arange(number, device=device) * rows) // max(1, number)


def _losses(program: LayerProgram, weights: Tensor, residual: Tensor) -> Tensor:
    """Return twice the objective over the unit, (r,), without the cancellation of ``w H w - u H w``."""
    return ((program.weights - weights) * residual).sum(1)
