"""Improving swaps of the joint program among all pairs, most of them discarded with proof.

With ``p_ij = r_i^T M^-1 r_j`` and ``t^2 = p_ij^2 / ((1 - q_i) (1 + q_j))``, dropping i and adding j changes
the objective by exactly

    1/2 (cost_i - gain_j - 2 damping h_i h_j p_ij / ((1 - q_i) (1 + q_j))) / (1 + t^2)

Since ``|p_ij| <= sqrt(q_i q_j)`` (Cauchy-Schwarz) a pair can only improve if ``gain_j + 2 x_i y_j > cost_i``
with ``x_i^2 = cost_i q_i / (1 - q_i)`` and ``y_j^2 = gain_j q_j / (1 + q_j)``. Near a local optimum few pairs
pass, and only theirs are computed. Derived from the block inverse (Woodbury; Hassibi & Stork 1993).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cbs_opt.hessian.products import column_pieces
from cbs_opt.select.joint_program.program import JointProgram, KeptSet

LEAVING_CHUNK = 256
"""Kept weights whose pairs are computed together."""
ENOUGH = 512
"""Improving pairs after which a scan ends: they conflict, and are better tried than counted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What each weight of a block costs or brings in a swap, (n,) float64 each.

    `levels` and `leverages` are ``h`` and ``q`` of `cbs_opt.select.joint_program.program`, `costs` twice the
    cost of dropping, infinite where pruned, and `gains` twice the gain of adding, -1 where kept.
    """

    levels: Tensor
    leverages: Tensor
    costs: Tensor
    gains: Tensor

    @classmethod
    def of(cls, program: JointProgram, kept: KeptSet, levels: Tensor, leverages: Tensor) -> Scores:
        """Return the scores of a kept set from its levels and leverages."""
        square = program.damping * levels.square()
        # Rounding may bring a leverage to 1, which only a damping of 0 does.
        slack = (1.0 - leverages).clamp_min(torch.finfo(torch.float64).eps)
        return cls(
            levels=levels,
            leverages=leverages,
            costs=torch.where(kept.keep, square / slack, torch.inf),
            gains=torch.where(kept.keep, -1.0, square / (1.0 + leverages)),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ImprovingPairs:
    """What a scan of pairs found.

    `leaving` and `entering` (p,) are disjoint pairs, the best first; `changes` (p,) float64 are the exact
    changes of the objective by each pair alone, negative. If `complete`, every pair was computed or discarded
    with proof.
    """

    leaving: Tensor
    entering: Tensor
    changes: Tensor
    complete: bool


def improving_pairs(
    program: JointProgram, kept: KeptSet, scores: Scores, threshold: float, deadline: float | None
) -> ImprovingPairs:
    """Return swaps that lower the objective by more than `threshold`, each kept weight with its best partner.

    The threshold is not negative, the deadline a `time.monotonic` at which to return what there is.
    O(m) a pair that is computed, O(n) for every 256 kept weights that cannot be discarded as a whole.
    """
    candidates, reach, pull = _candidates(kept, scores, threshold)
    nothing = candidates[:0]
    parts = [(nothing, nothing, scores.costs[nothing])]
    complete, number = True, 0
    for chunk in torch.split(candidates, LEAVING_CHUNK) if len(candidates) else ():
        if number >= ENOUGH or (deadline is not None and time.monotonic() >= deadline):
            complete = False
            break
        least = scores.costs[chunk].min() - 2.0 * threshold
        partners = (scores.gains + 2.0 * pull[chunk].max() * reach > least) & ~kept.keep
        entering = partners.nonzero().squeeze(1)
        if len(entering) == 0:
            continue
        changes, best = _best_partners(program, kept, scores, chunk, entering)
        better = changes < -threshold
        number += int(better.sum())
        parts.append((chunk[better], best[better], changes[better]))
    leaving, entering, changes = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    order = changes.argsort(stable=True)
    _, first = np.unique(entering[order].cpu().numpy(), return_index=True)
    order = order[torch.from_numpy(np.sort(first)).to(order.device)]
    return ImprovingPairs(
        leaving=leaving[order], entering=entering[order], changes=changes[order], complete=complete
    )


def _candidates(kept: KeptSet, scores: Scores, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return kept weights that may leave, the best first; ``y`` of the pruned and ``x`` of the kept."""
    gains = scores.gains.clamp_min(0.0)
    reach = (gains * scores.leverages / (1.0 + scores.leverages)).sqrt()
    finite = torch.where(kept.keep, scores.costs, 0.0)
    slack = (1.0 - scores.leverages).clamp_min(torch.finfo(torch.float64).eps)
    pull = torch.where(kept.keep, finite * scores.leverages / slack, 0.0).sqrt()
    if bool(kept.keep.all()) or not bool(kept.keep.any()):
        return kept.keep.new_zeros(0, dtype=torch.int64), reach, pull
    need = torch.where(kept.keep, finite - 2.0 * pull * reach.max(), torch.inf)
    order = need.argsort()
    promising = need[order] < gains.max() + 2.0 * threshold
    return order[promising], reach, pull


def _best_partners(
    program: JointProgram, kept: KeptSet, scores: Scores, leaving: Tensor, entering: Tensor
) -> tuple[Tensor, Tensor]:
    """Return least change and the partner that brings it, for each of `leaving` among `entering`."""
    out = program.rows.index_select(1, leaving).double()
    solved = torch.cholesky_solve(out, kept.factor).T
    inner = 1.0 / (1.0 - scores.leverages[leaving]).clamp_min(torch.finfo(torch.float64).eps)
    step = program.damping * scores.levels[leaving] * inner
    least = torch.full(leaving.shape, torch.inf, dtype=torch.float64, device=leaving.device)
    best = torch.zeros_like(leaving)
    for span, columns in column_pieces(program.rows, entering):
        piece, product = entering[span], solved @ columns
        outer = 1.0 / (1.0 + scores.leverages[piece])
        change = 2.0 * product * step[:, None] * (scores.levels[piece] * outer)
        change = scores.costs[leaving][:, None] - scores.gains[piece] - change
        change /= 2.0 + 2.0 * product.square_() * inner[:, None] * outer
        value, index = change.min(dim=1)
        closer = value < least
        least = torch.where(closer, value, least)
        best = torch.where(closer, piece[index], best)
    return least, best
