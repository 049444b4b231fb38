"""Pruned sets of the joint program to start a search from, none of them needing more than O(m^2 n) a step."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from cbs_opt.heuristics.joint_program import JointProgram
from cbs_opt.heuristics.products import adjoint_image, image
from cbs_opt.heuristics.saliency import lowest
from formulations.relaxations.matrix_free import relax_joint_rows
from formulations.solution import Limits

DROPS = 12
RELAXATION_STEPS = 40
THRESHOLD_STEPS = 100
LEAST_PROGRESS = 1e-5
"""Relative fall of the objective in one step below which hard thresholding ends."""
HALVINGS = 30


def greedy_obs_set(
    program: JointProgram, count: int, *, drops: int = DROPS, deadline: float | None = None
) -> Tensor:
    """Greedy OBS in blocks: drop what costs least, move the rest, score again.

    Parameters
    ----------
    program : JointProgram
    count : int
        Weights to prune.
    drops : int, default 12
        The kept count falls by the same factor each time.
    deadline : float, optional
        Reading of `time.monotonic` after which all that is left to drop goes at once.

    Returns
    -------
    (n,) bool tensor
        The pruned set.

    Notes
    -----
    O(m^2 s) a drop of s kept weights. The scores, ``u_i^2 / (2 [H_KK^-1]_ii)``, are those of Hassibi &
    Stork (1993); one weight at a time would be their method.
    """
    n, precision = program.n, program.rows.dtype
    kept = program.at(torch.ones(n, dtype=torch.bool, device=program.rows.device))
    size = n
    for drop in range(1, drops + 1):
        late = deadline is not None and time.monotonic() >= deadline
        goal = n - count if late or drop == drops else round(n * ((n - count) / n) ** (drop / drops))
        if goal >= size:
            continue
        index = kept.keep.nonzero().squeeze(1)
        slack = 1.0 - program.leverages(kept, precision, index)
        costs = program.levels(kept)[index].square() / slack.clamp_min(torch.finfo(precision).eps)
        leaving = index[costs.argsort(stable=True)[: size - goal]]
        kept = program.exchanged(kept, leaving, leaving[:0])
        size = goal
    return ~kept.keep


def hard_threshold_set(
    program: JointProgram, count: int, *, steps: int = THRESHOLD_STEPS, deadline: float | None = None
) -> Tensor:
    """Iterative hard thresholding: gradient steps on the weights, each keeping the largest.

    Parameters
    ----------
    program : JointProgram
    count : int
        Weights to prune.
    steps : int, default 100
        At most; it ends when the objective has settled.
    deadline : float, optional
        Reading of `time.monotonic`.

    Returns
    -------
    (n,) bool tensor
        The pruned set.

    Notes
    -----
    O(m n) a step. The step length is exact on the support and halved until the objective falls.
    Source: Blumensath & Davies (2010), Normalized iterative hard thresholding; CHITA (Benbaki et al.,
    ICML 2023) for pruning.
    """
    rows, damping = program.rows, program.damping
    point = _thresholded(program.block.weights.double(), count)
    residual = image(rows, point) - program.pull
    value = _ridge_value(program, point, residual)
    for _ in range(steps):
        if deadline is not None and time.monotonic() >= deadline:
            break
        slope = adjoint_image(rows, residual) + damping * (point - program.anchor)
        inside = torch.where(point != 0.0, slope, 0.0)
        if not bool(inside.any()):
            inside = slope
        curvature = float(image(rows, inside).square().sum() + damping * inside.square().sum())
        if curvature == 0.0:
            break
        length = float(inside.square().sum()) / curvature
        before = value
        for _ in range(HALVINGS):
            trial = _thresholded(point - length * slope, count)
            trial_residual = image(rows, trial) - program.pull
            trial_value = _ridge_value(program, trial, trial_residual)
            if trial_value < value:
                point, residual, value = trial, trial_residual, trial_value
                break
            length *= 0.5
        if before - value <= LEAST_PROGRESS * abs(before):
            break
    return lowest(point.abs(), count)


def relaxed_set(
    program: JointProgram, count: int, *, steps: int = RELAXATION_STEPS, time_limit: float | None = None
) -> Tensor:
    """The perspective relaxation rounded: keep the largest residuals.

    Parameters
    ----------
    program : JointProgram
    count : int
        Weights to prune.
    steps : int, default 40
        ADMM steps.
    time_limit : float, optional
        Seconds.

    Returns
    -------
    (n,) bool tensor
        The pruned set.

    Notes
    -----
    O(m^2 n + m^3) once and O(m n) a step; the rows are copied to float64. See
    `formulations.relaxations`.
    """
    problem = program.block.to_problem(count)
    limits = Limits(iteration_limit=steps, time_limit=time_limit)
    _, residual = relax_joint_rows(problem, limits, time.perf_counter(), float("inf"))
    return lowest(torch.from_numpy(residual).to(program.rows.device).abs(), count)


def _thresholded(point: Tensor, count: int) -> Tensor:
    return torch.where(lowest(point.abs(), count), 0.0, point)


def _ridge_value(program: JointProgram, point: Tensor, residual: Tensor) -> float:
    """Joint objective of a point with `residual` = ``R (u - w)``."""
    distance = (point - program.anchor).square().sum()
    return 0.5 * float(residual.square().sum() + program.damping * distance) - program.offset
