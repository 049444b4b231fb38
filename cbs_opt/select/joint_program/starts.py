"""Kept sets of the joint program to start a search from, none of them needing more than O(m^2 n) a step."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from cbs_opt.hessian.products import image
from cbs_opt.select.joint_program.program import JointProgram, Program
from cbs_opt.select.saliency import without_lowest
from formulations.relaxations.matrix_free import relax_joint_rows
from formulations.solution import Limits

DROPS = 12
RELAXATION_STEPS = 40
THRESHOLD_STEPS = 100
HALVINGS = 30


def greedy_obs_set(
    program: Program[Any], count: int, *, drops: int = DROPS, deadline: float | None = None
) -> Tensor:
    """Return the set of greedy OBS in blocks: drop what costs least, move the rest, score again.

    `count` weights are pruned; the kept count falls by the same factor with each of the drops. After the
    deadline, a reading of `time.monotonic`, all that is left to drop goes at once.
    O(m^2 s) a drop of s kept weights. The scores, ``u_i^2 / (2 [H_KK^-1]_ii)`` of the moved weights u, are
    those of Hassibi & Stork (1993); one weight at a time would be their method. The weights are those of the
    trained network throughout: the model stays one quadratic, only the kept set shrinks.
    """
    n = program.n
    keep = torch.ones(n, dtype=torch.bool, device=program.anchor.device)
    kept = None
    nothing = leaving = keep.nonzero().squeeze(1)[:0]
    size = n
    for drop in range(1, drops + 1):
        late = deadline is not None and time.monotonic() >= deadline
        goal = n - count if late or drop == drops else round(n * ((n - count) / n) ** (drop / drops))
        if goal >= size:
            continue
        kept = program.at(keep) if kept is None else program.exchanged(kept, leaving, nothing)
        leaving = keep.nonzero().squeeze(1)[program.costs(kept).argsort(stable=True)[: size - goal]]
        keep = keep.clone()
        keep[leaving] = False
        size = goal
    return keep


def hard_threshold_set(
    program: JointProgram, count: int, *, steps: int = THRESHOLD_STEPS, deadline: float | None = None
) -> Tensor:
    """Return the set of iterative hard thresholding: a gradient step, then a solve for the largest weights.

    Arguments are those of `greedy_obs_set`, and at most so many steps: it ends when no step length lowers the
    objective any more. The kept set is never worse than that of magnitude pruning.
    O(m n) a step, and O(m^2 (changes + m)) for each length that is tried. The first length is the exact one
    for the pruned weights alone, or as much longer as changes the set; then it is halved until the objective
    falls. Source: Foucart (2011), Hard thresholding pursuit; Blumensath & Davies (2010) for the step length;
    CHITA (Benbaki et al., ICML 2023) uses the method for pruning.
    """
    kept = program.at(without_lowest(program.block.weights.double().abs(), count))
    for _ in range(steps):
        levels = program.levels(kept)
        slope = torch.where(kept.keep, 0.0, program.damping * levels)
        curvature = image(program.rows, slope).square().sum() + program.damping * slope.square().sum()
        if not bool(curvature > 0.0):
            break
        length, changed = float(slope.square().sum() / curvature), False
        before = kept
        for _ in range(HALVINGS):
            if deadline is not None and time.monotonic() >= deadline:
                return kept.keep
            keep = without_lowest(torch.where(before.keep, levels, length * slope).abs(), count)
            if keep.equal(before.keep):
                if changed:
                    break
                length *= 2.0
                continue
            changed = True
            leaving, entering = before.keep & ~keep, keep & ~before.keep
            trial = program.exchanged(before, leaving.nonzero().squeeze(1), entering.nonzero().squeeze(1))
            if trial.value < before.value:
                kept = trial
                break
            length *= 0.5
        if kept is before:
            break
    return kept.keep


def relaxed_set(
    program: JointProgram, count: int, *, steps: int = RELAXATION_STEPS, time_limit: float | None = None
) -> Tensor:
    """Return the perspective relaxation rounded: keep its largest residuals or its largest weights.

    It takes so many ADMM steps: O(m^2 n + m^3) once and O(m n) a step; the rows are copied to float64. See
    `formulations.relaxations`.
    """
    problem = program.block.to_problem(count)
    limits = Limits(iteration_limit=steps, time_limit=time_limit)
    points = relax_joint_rows(problem, limits, time.perf_counter(), float("inf"))
    # The residual, which the bound goes by, ranks best where damping dominates, the point where it does not.
    sets = [
        program.at(without_lowest(torch.from_numpy(v).to(program.rows.device).abs(), count)) for v in points
    ]
    return min(sets, key=lambda kept: kept.value).keep
