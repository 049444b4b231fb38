"""Kept sets of the joint program to start a search from, none of them needing more than O(m^2 n) a step."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from cbs_opt.hessian.products import image
from cbs_opt.select.choice import NO_JOURNAL, SearchJournal
from cbs_opt.select.joint_program.inside import cheapest_inside, in_cells, number_pruned
from cbs_opt.select.joint_program.program import JointProgram, KeptSet, Program
from cbs_opt.select.saliency import without_lowest
from formulations.relaxations.matrix_free import relax_joint_rows
from formulations.solution import Limits
from formulations.support import Support

DROPS = 12
SLOWING = 1.5
"""How much smaller the last drops are than the first: 1 is the same share of what is kept each time."""
RELAXATION_STEPS = 40
THRESHOLD_STEPS = 100
HALVINGS = 30


def greedy_obs_set(
    program: Program[Any],
    count: int | Support,
    *,
    drops: int = DROPS,
    deadline: float | None = None,
    journal: SearchJournal = NO_JOURNAL,
) -> Tensor:
    """Return the set of greedy OBS in blocks: drop what costs least, move the rest, score again.

    `count` weights are pruned, the larger shares of what is kept by the first drops (`kept_after`): where few
    weights are left, each one that goes changes what the others cost. After the deadline, a reading of
    `time.monotonic`, all that is left to drop goes at once. The journal has the kept set before each drop,
    and the one that it has is gone on from.
    O(m^2 s) a drop of s kept weights. The scores, ``u_i^2 / (2 [H_KK^-1]_ii)`` of the moved weights u, are
    those of Hassibi & Stork (1993); one weight at a time would be their method. The weights are those of the
    trained network throughout: the model stays one quadratic, only the kept set shrinks. Where n of every m
    weights are to stay, those go that cost least of what their cells can spare.
    """
    n, state = program.n, journal.recall()
    support, count = in_cells(count, n, "greedy_obs"), number_pruned(count, n)
    first = state.get("drop", 1)
    kept = program.restored(state) if state else None
    keep = torch.ones(n, dtype=torch.bool, device=program.anchor.device) if kept is None else kept.keep
    leaving = keep.nonzero().squeeze(1)[:0]
    size = int(keep.sum())
    with journal.progress.phase("drops", drops, unit="drop", done=first - 1) as advance:
        for drop in range(first, drops + 1):
            late = deadline is not None and time.monotonic() >= deadline
            goal = n - count if late else kept_after(drop, drops, n, count)
            if goal < size:
                if kept is None:
                    kept = program.at(keep)
                elif len(leaving):
                    kept = program.dropped(kept, leaving)
                journal.keep({"drop": drop, **program.state(kept)})
                if support is None:
                    leaving = program.cheapest(kept, size - goal)
                else:
                    index = kept.keep.nonzero().squeeze(1)
                    leaving = cheapest_inside(program.costs(kept), index, size - goal, support)
                keep = keep.clone()
                keep[leaving] = False
                size = goal
            advance(1)
    return keep


def kept_after(drop: int, drops: int, n: int, count: int) -> int:
    """Return how many of n weights are left after so many of the drops that prune `count` together."""
    ahead = (1.0 - drop / drops) ** SLOWING
    return n - count if drop == drops else round(n * ((n - count) / n) ** (1.0 - ahead))


def hard_threshold_set(
    program: JointProgram,
    count: int | Support,
    *,
    steps: int = THRESHOLD_STEPS,
    deadline: float | None = None,
    journal: SearchJournal = NO_JOURNAL,
) -> Tensor:
    """Return the set of iterative hard thresholding: a gradient step, then a solve for the largest weights.

    Arguments are those of `greedy_obs_set`, and at most so many steps: it ends when no step length lowers the
    objective any more. The kept set is never worse than that of magnitude pruning.
    O(m n) a step, and O(m^2 (changes + m)) for each length that is tried. The first length is the exact one
    for the pruned weights alone, or as much longer as changes the set; then it is halved until the objective
    falls. Source: Foucart (2011), Hard thresholding pursuit; Blumensath & Davies (2010) for the step length;
    CHITA (Benbaki et al., ICML 2023) uses the method for pruning.
    """
    state = journal.recall()
    first = state.get("step", 0)
    kept = (
        program.restored(state)
        if state
        else program.at(without_lowest(program.block.weights.double().abs(), count))
    )
    with journal.progress.phase("thresholds", steps, unit="step", done=first) as advance:
        for step in range(first, steps):
            journal.keep({"step": step, **program.state(kept)})
            after = _thresholded(program, kept, count, deadline)
            if after is kept:
                break
            kept = after
            advance(1)
    return kept.keep


def _thresholded(
    program: JointProgram, before: KeptSet, count: int | Support, deadline: float | None
) -> KeptSet:
    """Return the set after a step that lowers the objective; `before` itself if there is none, or no time."""
    levels = program.levels(before)
    slope = torch.where(before.keep, 0.0, program.damping * levels)
    curvature = image(program.rows, slope).square().sum() + program.damping * slope.square().sum()
    if not bool(curvature > 0.0):
        return before
    length, changed = float(slope.square().sum() / curvature), False
    for _ in range(HALVINGS):
        if deadline is not None and time.monotonic() >= deadline:
            return before
        keep = without_lowest(torch.where(before.keep, levels, length * slope).abs(), count)
        if keep.equal(before.keep):
            if changed:
                return before
            length *= 2.0
            continue
        changed = True
        leaving, entering = before.keep & ~keep, keep & ~before.keep
        trial = program.exchanged(before, leaving.nonzero().squeeze(1), entering.nonzero().squeeze(1))
        if trial.value < before.value:
            return trial
        length *= 0.5
    return before


def relaxed_set(
    program: JointProgram,
    count: int | Support,
    *,
    steps: int = RELAXATION_STEPS,
    time_limit: float | None = None,
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
