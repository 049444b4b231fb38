"""Which weights go under the joint program: small blocks by their Hessian, large ones by their rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.runs.choices import ChoiceLedger
from cbs_opt.select.choice import Choice
from cbs_opt.select.joint_program.channel_program import ChannelProgram
from cbs_opt.select.joint_program.channel_search import exchange_channel_set, greedy_channel_set
from cbs_opt.select.joint_program.program import JointProgram
from cbs_opt.select.joint_program.search import TOLERANCE, JointResult, joint_search
from cbs_opt.select.joint_program.starts import (
    DROPS,
    THRESHOLD_STEPS,
    greedy_obs_set,
    hard_threshold_set,
    relaxed_set,
)
from cbs_opt.select.saliency import lowest, magnitude
from cbs_opt.select.selectors import STARTS, choice_of_solution, ending, start_set
from formulations import incumbents
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.solution import BlockSolution, Limit, Limits

DENSE_JOINT = 1_024
"""Largest block whose Hessian is formed for a joint search."""
JOINT_STARTS = ("relaxation", "greedy_obs", "iterative_hard_threshold", *STARTS)


class SearchInterruptedError(KeyboardInterrupt):
    """Ctrl-C during a selection, with the choice for the block at which it came."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What a joint swap search was asked for, beside its blocks."""

    starts: tuple[str, ...]
    spread: float
    max_swaps: int | None
    restarts: int
    drops: int
    tolerance: float
    limits: Limits


def by_joint_swap_search(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int],
    *,
    limits: Limits,
    start: str | Sequence[str] | None = None,
    spread: float = 0.1,
    max_swaps: int | None = None,
    restarts: int = 0,
    drops: int = DROPS,
    tolerance: float = TOLERANCE,
    warm: Sequence[Tensor] | None = None,
    ledger: ChoiceLedger | None = None,
) -> list[Choice]:
    """Swap search on the joint program of every block, to proved 1-swap optima.

    Parameters
    ----------
    blocks : sequence of FisherBlock
    counts : sequence of int
        Weights to remove in each block.
    limits : Limits
        `time_limit` for all blocks together, shared by their size.
    start : str or sequence of str, optional
        Sets to start from: "relaxation", "greedy_obs", "iterative_hard_threshold", a saliency or
        "randomized_magnitude". Of several, the one that ends lowest in each block is kept. By
        default the rounded relaxation, and greedy elimination in blocks of at most `DENSE_JOINT`.
    spread : float, default 0.1
        Of "randomized_magnitude" starts.
    max_swaps : int, optional
        Swaps in each block from each start; by default as many as it takes to a 1-swap optimum.
    restarts : int, default 0
        Further descents from randomly changed sets, in a large block within its core.
    drops : int, default 12
        Of greedy elimination in large blocks.
    tolerance : float, default 1e-9
        Relative improvement that counts in large blocks.
    warm : sequence of (n,) bool tensors, optional
        A pruned set for each block to start from, instead of `start`; the result is never worse.
    ledger : ChoiceLedger, optional
        Of the blocks that are done: see `Selector`.

    Returns
    -------
    list of Choice

    Raises
    ------
    ArgumentError
        If a start is unknown, `restarts` is negative or `drops` below 1.
    NotPositiveDefiniteError
        If the Hessian of a block is singular.
    SearchInterruptedError
        After Ctrl-C: a `KeyboardInterrupt` with what was found for the block at hand.

    Notes
    -----
    Blocks of up to `DENSE_JOINT` weights: `formulations.incumbents.swap_search`, O(n^3). Larger ones:
    `cbs_opt.select.joint_program.search`, O(m^2 n) whenever many weights have changed. A Hessian without
    rows, and more rows than weights, cost an eigendecomposition there. Larger ones with a layer-input
    term: `cbs_opt.select.joint_program.channel_search`, from greedy OBS or a saliency, batches of swaps
    without a proof of 1-swap optimality and without restarts.
    """
    names = (start,) if isinstance(start, str) else tuple(start or ())
    if (start is not None and not names) or any(name not in JOINT_STARTS for name in names):
        raise ArgumentError("start", f"{start!r}", f"choose among {', '.join(JOINT_STARTS)}")
    if restarts < 0:
        raise ArgumentError("restarts", f"{restarts}", "pass 0 or more")
    if drops < 1:
        raise ArgumentError("drops", f"{drops}", "pass 1 or more")
    request = _Request(
        starts=names if warm is None else (),
        spread=spread,
        max_swaps=limits.iteration_limit if max_swaps is None else max_swaps,
        restarts=restarts,
        drops=drops,
        tolerance=tolerance,
        limits=limits,
    )

    def search(block: FisherBlock, count: int, number: int, deadline: float | None) -> Choice:
        given = None if warm is None else warm[number]
        engine = _search_dense if block.n <= DENSE_JOINT else _search_large
        if engine is _search_large and block.channels is not None and block.rows is not None:
            engine = _search_channels
        return engine(block, count, number, given, deadline, request)

    return _each(blocks, counts, limits, ledger, search)


def by_joint_greedy_obs(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int],
    *,
    limits: Limits,
    drops: int = DROPS,
    ledger: ChoiceLedger | None = None,
) -> list[Choice]:
    """Greedy OBS on every block: one weight at a time in small blocks, `drops` times in large ones.

    Parameters and errors as in `by_joint_swap_search`.
    """
    if drops < 1:
        raise ArgumentError("drops", f"{drops}", "pass 1 or more")

    def drop(block: FisherBlock, count: int, number: int, deadline: float | None) -> Choice:
        if block.n <= DENSE_JOINT:
            left = Limits(time_limit=_left(deadline))
            return choice_of_solution(block, incumbents.greedy(block.to_problem(count), "joint", limits=left))
        if block.channels is not None and block.rows is not None:
            pruned = greedy_channel_set(block, count, drops=drops, deadline=deadline)
        else:
            pruned = greedy_obs_set(JointProgram.of(block), count, drops=drops, deadline=deadline)
        return _finished(pruned, deadline)

    return _each(blocks, counts, limits, ledger, drop)


def by_iterative_hard_threshold(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int],
    *,
    limits: Limits,
    steps: int = THRESHOLD_STEPS,
    ledger: ChoiceLedger | None = None,
) -> list[Choice]:
    """Iterative hard thresholding on every block, at most `steps` gradient steps.

    Parameters and errors as in `by_joint_swap_search`.
    """
    if steps < 0:
        raise ArgumentError("steps", f"{steps}", "pass 0 or more")

    def threshold(block: FisherBlock, count: int, number: int, deadline: float | None) -> Choice:
        pruned = hard_threshold_set(JointProgram.of(block), count, steps=steps, deadline=deadline)
        return _finished(pruned, deadline)

    return _each(blocks, counts, limits, ledger, threshold)


def _each(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int],
    limits: Limits,
    ledger: ChoiceLedger | None,
    method: Callable[[FisherBlock, int, int, float | None], Choice],
) -> list[Choice]:
    """`method` on every block not known, with a share of the time left in proportion to its size."""
    ends = None if limits.time_limit is None else time.monotonic() + limits.time_limit
    rest = sum(block.n for block in blocks)
    choices = []
    # Nothing but the loop holds a block: `zip` within `enumerate` would keep the one before.
    for number, block in enumerate(blocks):
        began = time.monotonic()
        deadline = None if ends is None else began + max(0.0, ends - began) * block.n / max(1, rest)
        rest -= block.n
        known = None if ledger is None else ledger.known(number)
        if known is not None:
            choices.append(known)
            continue
        try:
            choice = method(block, counts[number], number, deadline)
        except KeyboardInterrupt:
            pruned = lowest(magnitude(block), counts[number])
            choice = Choice(pruned=pruned, status=ending(False, Limit.INTERRUPTED), limit=Limit.INTERRUPTED)
        choices.append(replace(choice, seconds=time.monotonic() - began))
        if choice.limit is Limit.INTERRUPTED:
            raise SearchInterruptedError(choice)
        if ledger is not None:
            ledger.add(number, choices[-1])
    return choices


def _search_large(
    block: FisherBlock,
    count: int,
    number: int,
    warm: Tensor | None,
    deadline: float | None,
    request: _Request,
) -> Choice:
    """The search by rows, from every start; the lowest end."""
    program = JointProgram.of(block)
    seed = request.limits.seed + number
    names = request.starts or ("relaxation",)
    best: JointResult | None = None
    for name in ("warm",) if warm is not None else names:
        start = warm if warm is not None else _start(name, block, program, count, seed, deadline, request)
        found = joint_search(
            program,
            start,
            tolerance=request.tolerance,
            max_swaps=request.max_swaps,
            restarts=request.restarts,
            deadline=deadline,
            seed=seed,
        )
        if best is None or found.value < best.value:
            best = found
        if found.limit is Limit.INTERRUPTED:
            break
    assert best is not None
    limit = found.limit if found.limit is Limit.INTERRUPTED else best.limit
    return Choice(
        pruned=best.pruned,
        iterations=best.swaps,
        locally_optimal=best.locally_optimal,
        status=ending(best.locally_optimal, limit),
        limit=limit,
    )


def _search_channels(
    block: FisherBlock,
    count: int,
    number: int,
    warm: Tensor | None,
    deadline: float | None,
    request: _Request,
) -> Choice:
    """Exchanges in batches with the layer-input term, from every start; the lowest end."""
    program = ChannelProgram(block)
    best: JointResult | None = None
    for name in request.starts or ("greedy_obs",):
        start = warm
        if start is None and name == "greedy_obs":
            start = greedy_channel_set(block, count, drops=request.drops, deadline=deadline)
        elif start is None and name in STARTS:
            start = start_set(name, block, count, request.limits.seed + number, request.spread)
        if start is None:
            found = f"{name!r} on {block.n} weights with a layer-input term"
            raise UnsupportedProblemError("start", found, f"use greedy_obs, or one of {', '.join(STARTS)}")
        result = exchange_channel_set(
            program, start, tolerance=request.tolerance, max_swaps=request.max_swaps, deadline=deadline
        )
        if best is None or result.value < best.value:
            best = result
        if result.limit is Limit.INTERRUPTED:
            break
    assert best is not None
    limit = result.limit if result.limit is Limit.INTERRUPTED else best.limit
    status = "no batch of swaps improves" if limit is None else ending(best.locally_optimal, limit)
    return Choice(
        pruned=best.pruned,
        iterations=best.swaps,
        locally_optimal=best.locally_optimal,
        status=status,
        limit=limit,
    )


def _search_dense(
    block: FisherBlock,
    count: int,
    number: int,
    warm: Tensor | None,
    deadline: float | None,
    request: _Request,
) -> Choice:
    """The search on the swept tableau, from every start; the lowest end."""
    problem = block.to_problem(count)
    seed = request.limits.seed + number
    starts: list[Tensor | None] = [warm]
    if warm is None and request.starts:
        program = JointProgram.of(block)
        starts = [_start(name, block, program, count, seed, deadline, request) for name in request.starts]
    best: BlockSolution | None = None
    for start in starts:
        found = incumbents.swap_search(
            problem,
            "joint",
            limits=Limits(time_limit=_left(deadline), iteration_limit=request.max_swaps, seed=seed),
            incumbent=None if start is None else _as_incumbent(start),
            restarts=request.restarts,
        )
        assert found.objective is not None
        if best is None or best.objective is None or found.objective < best.objective:
            best = found
    assert best is not None
    settled = best.limit is None
    return replace(
        choice_of_solution(block, best), locally_optimal=settled, status=ending(settled, best.limit)
    )


def _start(
    name: str,
    block: FisherBlock,
    program: JointProgram,
    count: int,
    seed: int,
    deadline: float | None,
    request: _Request,
) -> Tensor:
    """The pruned set of a start of `JOINT_STARTS`; the smallest weights where no time or choice is left."""
    left = _left(deadline)
    if left == 0.0 or count in (0, block.n):
        return lowest(magnitude(block), count)
    if name == "relaxation":
        return relaxed_set(program, count, time_limit=left)
    if name == "greedy_obs":
        return greedy_obs_set(program, count, drops=request.drops, deadline=deadline)
    if name == "iterative_hard_threshold":
        return hard_threshold_set(program, count, deadline=deadline)
    return start_set(name, block, count, seed, request.spread)


def _as_incumbent(pruned: Tensor) -> BlockSolution:
    keep = (~pruned).cpu().numpy()
    return BlockSolution(keep=keep, weights=None, objective=None, program="joint", method="start")


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _finished(pruned: Tensor, deadline: float | None) -> Choice:
    """The choice of a method that hurries once its time is over."""
    late = deadline is not None and time.monotonic() >= deadline
    return Choice(
        pruned=pruned, status=Limit.TIME.value + " limit" if late else "", limit=Limit.TIME if late else None
    )
