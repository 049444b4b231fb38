"""Sets of the joint program of a large block with a channel term: greedy OBS in drops, exchanges in batches.

Nothing of size n^2 is formed and no proof is given: the batches are those of weights whose scores, each
taken alone, promise an improvement, as many at once as keep the promise by the true objective.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.joint_program.channel_program import ChannelProgram, ChannelSet
from cbs_opt.select.joint_program.search import TOLERANCE, JointResult
from cbs_opt.select.saliency import lowest
from formulations.solution import Limit, TracePoint

LARGEST_SHARE = 0.1
"""Of the kept weights that the first batch may exchange."""
LEAST_YIELD = 1e-3
"""Relative fall of the objective in one round below which the exchanges end."""


def greedy_channel_set(
    block: FisherBlock, count: int, *, drops: int, deadline: float | None = None
) -> Tensor:
    """Drop what costs least, move the rest to the minimum of the model, score again.

    Parameters
    ----------
    block : FisherBlock
        With rows and channels.
    count : int
        Weights to prune.
    drops : int
        The kept count falls by the same factor each time.
    deadline : float, optional
        Reading of `time.monotonic` after which all that is left to drop goes at once.

    Returns
    -------
    (n,) bool tensor
        The pruned set.

    Notes
    -----
    O(m^2 s) a drop of s kept weights. Scores ``u_i^2 / (2 [H_KK^-1]_ii)`` of the moved weights u, after
    Hassibi & Stork (1993). The weights are those of the trained network throughout: the model stays one
    quadratic, only the kept set shrinks.
    """
    program = ChannelProgram(block)
    n = block.n
    keep = torch.ones(n, dtype=torch.bool, device=block.weights.device)
    size = n
    for drop in range(1, drops + 1):
        late = deadline is not None and time.monotonic() >= deadline
        goal = n - count if late or drop == drops else round(n * ((n - count) / n) ** (drop / drops))
        if goal >= size:
            continue
        costs = program.costs(program.at(keep))
        keep = keep.clone()
        keep[keep.nonzero().squeeze(1)[lowest(costs, size - goal)]] = False
        size = goal
    return ~keep


def exchange_channel_set(
    program: ChannelProgram,
    start: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_swaps: int | None = None,
    deadline: float | None = None,
) -> JointResult:
    """Exchange the weights that cost least for those that gain most while the objective falls.

    Parameters
    ----------
    program : ChannelProgram
    start : (n,) bool tensor
        Weights pruned at the start.
    tolerance : float, default 1e-9
        Relative improvement that counts; rounds end below `LEAST_YIELD` in any case.
    max_swaps : int, optional
    deadline : float, optional
        Reading of `time.monotonic`.

    Returns
    -------
    JointResult
        Never worse than the start, and without a proof of 1-swap optimality.

    Notes
    -----
    O(m^2 n) to score a set, O(m^2 s) to try one.
    """
    began = time.monotonic()
    best = program.at(~start)
    initial, swaps, limit = best.value, 0, None
    trace: list[TracePoint] = []
    n_kept = int(best.keep.sum())
    cap = max(1, round(LARGEST_SHARE * n_kept)) if 0 < n_kept < program.n else 0
    try:
        while cap:
            left = cap if max_swaps is None else min(cap, max_swaps - swaps)
            limit = _reached(left, deadline)
            if limit is not None:
                break
            found, made = _exchanged(program, best, left, tolerance, deadline)
            before, best = best.value, found
            swaps += made
            if made:
                trace.append(
                    TracePoint(seconds=time.monotonic() - began, nodes=0, objective=best.value, bound=None)
                )
            if before - best.value <= max(tolerance, LEAST_YIELD) * abs(before):
                limit = _reached(1, deadline)
                break
            cap = min(cap, 2 * made)
    except KeyboardInterrupt:
        limit = Limit.INTERRUPTED
    return JointResult(
        pruned=~best.keep,
        value=best.value,
        initial_value=initial,
        swaps=swaps,
        locally_optimal=cap == 0,
        limit=limit,
        seconds=time.monotonic() - began,
        trace=tuple(trace),
    )


def _exchanged(
    program: ChannelProgram, kept: ChannelSet, most: int, tolerance: float, deadline: float | None
) -> tuple[ChannelSet, int]:
    """The set after the largest batch, halved from `most`, that lowers the objective; its size."""
    inside, outside = kept.keep.nonzero().squeeze(1), (~kept.keep).nonzero().squeeze(1)
    size = min(most, len(inside), len(outside))
    costs, leaving = program.costs(kept).topk(size, largest=False)
    gains, entering = program.gains(kept).topk(size)
    size = int((gains > costs).sum())
    while size > 0 and (deadline is None or time.monotonic() < deadline):
        keep = kept.keep.clone()
        keep[inside[leaving[:size]]] = False
        keep[outside[entering[:size]]] = True
        found = program.at(keep)
        if found.value < kept.value - tolerance * abs(kept.value):
            return found, size
        size //= 2
    return kept, 0


def _reached(left: int, deadline: float | None) -> Limit | None:
    if deadline is not None and time.monotonic() >= deadline:
        return Limit.TIME
    return Limit.ITERATION if left <= 0 else None
