"""The budget: one sparsity for the network becomes a number of weights to prune for every block."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cbs_opt.network.eligible import unmatched
from cbs_opt.network.partition import BlockSpan, ParameterSpan, Partition
from formulations.errors import ArgumentError, NonFiniteError, ShapeError
from formulations.support import NofM, n_of_m

logger = logging.getLogger(__name__)

FLOOR = 0.1
"""Share of what a uniform budget leaves of a layer that a global one leaves at least."""
Budget = str | Mapping[str, float]
"""How sparsity is spent: "global", "uniform", or a mapping from parameter globs to sparsities."""


def allocate(
    partition: Partition,
    sparsity: float,
    *,
    budget: Budget = "global",
    scores: Tensor | None = None,
    floor: float = FLOOR,
) -> list[int]:
    """Return the number of weights to prune in every block.

    They sum to ``round(sparsity * n)`` exactly; under a mapping those of each parameter sum to ``round(its
    sparsity * its size)``. O(n log n) with scores, else O(blocks log blocks).

    Parameters
    ----------
    partition : Partition
    sparsity : float
        Share of the weights to prune, ``0 <= sparsity < 1``.
    budget : {"global", "uniform"} or mapping of str to float, default "global"
        "global": the weights with the lowest scores of the whole network; what a block has of them is its
        count. "uniform": every block the same share, rounded by largest remainders. A mapping gives
        sparsities by parameter glob; of several globs that match the first counts, and parameters that none
        matches take `sparsity`. Blocks must then lie within parameters; the count of a parameter with several
        blocks goes to its lowest scores where scores are given, else uniformly.
    scores : (n,) Tensor, optional
        The loss expected from removing each weight, on one scale for the whole network; infinite entries are
        allowed. Needed for "global" if there are several blocks. Ties fall to the weights that come first.
    floor : float, default 0.1
        Under "global" no parameter is left with less than this share of what "uniform" would leave
        of it, nor with nothing: scores that are right one by one can empty a layer, which cuts the
        network. 0 is the scores alone. Where it comes into play a warning is logged.

    Raises
    ------
    ArgumentError
        If a sparsity is no number in [0, 1), `floor` is not in [0, 1], `budget` is unknown, scores are
        missing, or a mapping meets blocks that span several parameters.
    UnmatchedPatternError
        If a glob of the mapping matches no parameter of the partition.
    ShapeError, NonFiniteError
        If `scores` is not (n,) or holds NaN.
    """
    share = checked_sparsity("sparsity", sparsity)
    if not 0.0 <= floor <= 1.0:
        raise ArgumentError("floor", f"{floor!r}", "pass a number, 0 <= floor <= 1")
    if scores is not None:
        _check_scores(scores, partition.n)
    if isinstance(budget, Mapping):
        return _by_parameter(partition, share, budget, scores)
    if budget not in ("global", "uniform"):
        remedy = 'use "global", "uniform" or a mapping from parameter globs to sparsities'
        raise ArgumentError("budget", f"{budget!r}", remedy)
    if budget == "uniform":
        return _uniform(partition.blocks, share)
    if len(partition.blocks) > 1 and scores is None:
        remedy = 'pass one score a weight, or use budget="uniform"'
        raise ArgumentError("scores", f'none for {len(partition.blocks)} blocks under "global"', remedy)
    if scores is not None and len(partition.blocks) > 1:
        scores = _protected(partition, share, scores, floor)
    return _lowest(partition.blocks, share, scores)


def checked_sparsity(argument: str, sparsity: Any) -> float:
    """Return `sparsity` as a float if it is a number in [0, 1), else raise `ArgumentError`."""
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0.0 <= float(sparsity) < 1.0:  # NaN fails as well
        found = f"{sparsity!r}" if number else f"{sparsity!r} ({type(sparsity).__name__})"
        raise ArgumentError(argument, found, "pass a number, 0 <= sparsity < 1")
    return float(sparsity)


def checked_target(argument: str, sparsity: Any) -> tuple[float, NofM | None]:
    """Return the share of weights to prune, and the pattern where `sparsity` is one, such as "2:4"."""
    if not isinstance(sparsity, str):
        return checked_sparsity(argument, sparsity), None
    pattern = n_of_m(sparsity)
    if pattern is None:
        remedy = 'pass a number in [0, 1), or "n:m" with 1 <= n <= m, such as "2:4"'
        raise ArgumentError(argument, f"{sparsity!r}", remedy)
    return share_of(pattern), pattern


def share_of(pattern: NofM) -> float:
    """Return the share of the weights that a pattern prunes."""
    return (pattern.m - pattern.n) / pattern.m


def _protected(partition: Partition, share: float, scores: Tensor, floor: float) -> Tensor:
    """Return `scores` where the best weights of every parameter, as many as its floor, are infinite."""
    if floor == 0.0:
        return scores
    lifted = scores.detach().double().clone()
    goes = torch.zeros(partition.n, dtype=torch.bool, device=scores.device)
    goes[torch.argsort(lifted, stable=True)[: round(share * partition.n)]] = True
    starved = []
    for span in partition.parameters:
        size = span.stop - span.start
        least = max(1, math.floor(floor * (1.0 - share) * size))
        own = slice(span.start, span.stop)
        if size - int(goes[own].sum()) < least:
            starved.append(span.name)
        lifted[own][torch.argsort(lifted[own], stable=True)[size - least :]] = torch.inf
    if starved:
        logger.warning("a global budget would nearly empty %s: its floor keeps some", ", ".join(starved))
    return lifted


def _size(blocks: Sequence[BlockSpan]) -> int:
    return sum(block.stop - block.start for block in blocks)


def _lowest(blocks: Sequence[BlockSpan], share: float, scores: Tensor | None) -> list[int]:
    """Return counts of the lowest scores among neighbouring blocks."""
    total = round(share * _size(blocks))
    if len(blocks) == 1 or scores is None:
        return _uniform(blocks, share)
    first = blocks[0].start
    order = torch.argsort(scores[first : blocks[-1].stop].detach(), stable=True)
    chosen = torch.zeros(_size(blocks) + 1, dtype=torch.int64, device=order.device)
    chosen[order[:total] + 1] = 1
    before = chosen.cumsum(0).cpu()
    edges = torch.tensor([0] + [block.stop - first for block in blocks])
    counts: list[int] = before[edges].diff().tolist()
    return counts


def _uniform(blocks: Sequence[BlockSpan], share: float) -> list[int]:
    """Return the same share of every block by largest remainders, ties to the block that comes first."""
    # In integers, so that no rounding of share * size can miss the total or overfill a block.
    numerator, denominator = share.as_integer_ratio()
    quotas = [divmod(numerator * (block.stop - block.start), denominator) for block in blocks]
    counts = [whole for whole, _ in quotas]
    missing = round(share * _size(blocks)) - sum(counts)
    by_remainder = sorted(range(len(blocks)), key=lambda index: -quotas[index][1])
    for index in by_remainder[:missing]:
        counts[index] += 1
    return counts


def removed_by(partition: Partition, sparsity: float, budget: Mapping[str, float]) -> int:
    """Return how many weights a budget by parameter removes in all; errors are those of `allocate`."""
    shares = _shares(partition, checked_sparsity("sparsity", sparsity), budget)
    spans = partition.parameters
    return sum(round(own * (s.stop - s.start)) for own, s in zip(shares, spans, strict=True))


def _shares(partition: Partition, share: float, budget: Mapping[str, float]) -> list[float]:
    """Return the sparsity of every parameter: that of the first pattern that matches, else `share`."""
    shares = {pattern: checked_sparsity(f"budget[{pattern!r}]", value) for pattern, value in budget.items()}
    names = [name for span in partition.parameters for name in (span.name, *span.aliases)]
    for pattern in shares:
        if not any(_matches(span, pattern) for span in partition.parameters):
            raise unmatched("budget", pattern, names, what="parameter that may be pruned")
    return [
        next((value for pattern, value in shares.items() if _matches(span, pattern)), share)
        for span in partition.parameters
    ]


def _by_parameter(
    partition: Partition, share: float, budget: Mapping[str, float], scores: Tensor | None
) -> list[int]:
    counts: list[int] = []
    blocks = list(reversed(partition.blocks))
    for span, own in zip(partition.parameters, _shares(partition, share, budget), strict=True):
        inside: list[BlockSpan] = []
        while blocks and blocks[-1].start < span.stop:
            inside.append(blocks.pop())
        if not inside or inside[-1].stop != span.stop:
            remedy = 'use blocks="layer", "row" or a block size'
            raise ArgumentError("budget", "sparsities by parameter for blocks that span several", remedy)
        counts += _lowest(inside, own, scores)
    return counts


def _matches(span: ParameterSpan, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (span.name, *span.aliases))


def _check_scores(scores: Tensor, n: int) -> None:
    if not isinstance(scores, Tensor):
        raise ArgumentError("scores", f"a {type(scores).__name__}", "pass a tensor, one score a weight")
    if tuple(scores.shape) != (n,):
        raise ShapeError("scores", f"shape {tuple(scores.shape)} for {n} weights", f"pass ({n},)")
    if bad := int(torch.isnan(scores).sum()):
        raise NonFiniteError("scores", f"{bad} of {n} are NaN", "repair the scores")
