"""How many more weights every block loses in a stage, so that the counts of the network are exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor

from cbs_opt.budget.counts import Budget, allocate
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.network.partition import Partition
from cbs_opt.select.methods import Method
from formulations.support import NofM


def pattern_left(keep: Tensor, pattern: NofM) -> NofM:
    """Return what a pattern leaves of the weights that a looser one of the same m kept, `keep` (n,).

    The weights still there lie cell by cell, as many of each: those are the cells of what is returned.
    """
    return NofM(pattern.n, int(keep.sum()) * pattern.m // len(keep))


def counts_left(
    partition: Partition,
    keep: Tensor,
    sparsity: float,
    target: float,
    *,
    budget: Budget,
    scoring: Method,
    blocks: Sequence[FisherBlock],
) -> list[int]:
    """Return the weights to prune now in each of `blocks`, the blocks that have any left.

    They sum to ``round(sparsity * n)`` minus what is pruned already. A block that lost more than its
    share in earlier stages loses nothing, and others with it in view lose less.

    `keep` (n,) is True where a weight is still there, `sparsity` that of this stage and `target` that of the
    last one; sparsities of a `budget` by parameter are those of the last stage and grow towards it in
    proportion. The saliency of `scoring` spends a global budget.
    """

    def scores() -> Tensor:
        return torch.cat([scoring.score(block) for block in blocks]).double()

    more = _more_gone(partition, keep, sparsity, target, budget=budget, scores=scores)
    left = [bool(keep[span.start : span.stop].any()) for span in partition.blocks]
    return list(compress(more, left))


def narrowed(
    partition: Partition, keep: Tensor, saliency: Tensor, sparsity: float, target: float, *, budget: Budget
) -> Tensor:
    """Return which weights of `keep` (n,) are still kept at a sparsity: those of largest `saliency` (n,).

    Counts are those of `counts_left`.
    """
    more = _more_gone(
        partition, keep, sparsity, target, budget=budget, scores=lambda: saliency[keep].double()
    )
    result = keep.clone()
    for span, count in zip(partition.blocks, more, strict=True):
        part = slice(span.start, span.stop)
        standing = torch.where(keep[part], saliency[part].double(), math.inf)
        result[part][standing.argsort(stable=True)[:count]] = False
    return result


def _more_gone(
    partition: Partition,
    keep: Tensor,
    sparsity: float,
    target: float,
    *,
    budget: Budget,
    scores: Callable[[], Tensor],
) -> list[int]:
    """Return the weights that every block loses now; `scores` are of those still there."""
    spans = partition.blocks
    if isinstance(budget, Mapping):
        budget = {name: value * sparsity / target for name, value in budget.items()}
    known = None
    if budget != "uniform" and len(spans) > 1:
        known = torch.full((partition.n,), -torch.inf, dtype=torch.float64, device=keep.device)
        known[keep] = scores()
    wanted = allocate(partition, sparsity, budget=budget, scores=known)
    gone = [int((~keep[span.start : span.stop]).sum()) for span in spans]
    more = [max(0, want - lost) for want, lost in zip(wanted, gone, strict=True)]
    excess = sum(more) - max(0, sum(wanted) - sum(gone))
    for index in sorted(range(len(more)), key=lambda i: -more[i]):
        cut = min(excess, more[index])
        more[index] -= cut
        excess -= cut
    return more
