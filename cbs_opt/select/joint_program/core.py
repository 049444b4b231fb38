"""The core of a joint program: the few weights whose fate is open, the others eliminated exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt.select.joint_program.pairs import Scores
from cbs_opt.select.joint_program.program import JointProgram, KeptSet
from formulations.incumbents import swap_search
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution, Limits

CORE = 512
"""Weights in a core."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Core:
    """A small dense block that stands for a large one.

    Attributes
    ----------
    index : (c,) int64 tensor
        Its weights in the large block.
    keep : (c,) bool tensor
        Those kept now.
    problem : BlockProblem
        ``min 1/2 u.H u - l.u`` over u with as many non-zeros as are kept now: the large program where the
        other weights stay kept or pruned.
    """

    index: Tensor
    keep: Tensor
    problem: BlockProblem


def open_core(program: JointProgram, kept: KeptSet, scores: Scores, size: int = CORE) -> Core:
    """Return the kept weights that cost least and the pruned ones that gain most, as a dense block.

    Notes
    -----
    With K' the other kept weights, ``H = damping (I + R_C^T M_K'^-1 R_C)`` and ``l = damping h_C``, the
    Schur complement and its right-hand side. O(m^2 (c + m) + m n).
    """
    half = size // 2
    leaving = scores.costs.topk(min(half, int(kept.keep.sum())), largest=False).indices
    entering = scores.gains.topk(min(half, int((~kept.keep).sum()))).indices
    index = torch.cat([leaving, entering])
    rest = program.exchanged(kept, leaving, leaving[:0])
    columns = program.rows.index_select(1, index).double()
    hessian = program.damping * (columns.T @ torch.cholesky_solve(columns, rest.factor))
    linear = program.damping * program.levels(rest)[index]
    problem = BlockProblem(
        weights=torch.zeros(len(index), dtype=torch.float64).numpy(),
        n_prune=len(entering),
        hessian=(0.5 * (hessian + hessian.T)).cpu().numpy(),
        gradient=-linear.cpu().numpy(),
        damping=program.damping,
    )
    return Core(index=index, keep=kept.keep[index], problem=problem)


def restarted_core(core: Core, restarts: int, limits: Limits) -> tuple[Tensor, Tensor]:
    """Run descents of the core from randomly changed sets: which weights then leave and which enter."""
    warm = BlockSolution(
        keep=core.keep.cpu().numpy(), weights=None, objective=None, program="joint", method="swap_search"
    )
    solution = swap_search(core.problem, "joint", limits=limits, incumbent=warm, restarts=restarts)
    assert solution.keep is not None
    keep = torch.tensor(solution.keep, device=core.index.device)
    return core.index[core.keep & ~keep], core.index[~core.keep & keep]
