"""Which weights go by scores: saliencies and randomised magnitude, block by block."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.choice import NO_LEDGER, Choice, Ledger
from cbs_opt.select.saliency import SALIENCIES, without_lowest
from cbs_opt.system.checks import seed_number
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.solution import Limits
from formulations.support import Support

STARTS = (*SALIENCIES, "randomized_magnitude")


def randomized_magnitude(weights: Tensor, n_prune: int, *, spread: float = 0.1, seed: int = 0) -> Tensor:
    """Draw a kept set that lacks small weights, but not exactly the smallest.

    The ``n_prune + spread * n_keep`` weights of least magnitude are sorted and cut into about
    ``sqrt(n)`` buckets of similar magnitude; from every bucket the same share is drawn at random,
    with the remainders spread so that the total is exact.

    The share `spread` of the kept weights enters the draw; 0 is plain magnitude pruning. The set (n,) keeps
    all but `n_prune` weights, on the device of `weights`.
    O(n log n). After RMP of Yu et al. (ICML 2022), whose counts are met on average only.
    """
    if not (math.isfinite(spread) and 0.0 <= spread <= 1.0):
        raise ArgumentError("spread", f"{spread}", "pass a number from 0 to 1")
    n = weights.shape[0]
    generator = torch.Generator().manual_seed(seed_number("seed", seed))
    candidates = min(n, n_prune + round(spread * (n - n_prune)))
    order = weights.detach().double().abs().cpu().argsort(stable=True)[:candidates]
    keep = torch.ones(n, dtype=torch.bool)
    if candidates > 0:
        size = max(1, math.isqrt(n))
        drawn = 0
        for start in range(0, candidates, size):
            bucket = order[start : start + size]
            # Cumulative rounding: what brings the total to this bucket's share of n_prune.
            take = round((start + bucket.numel()) * n_prune / candidates) - drawn
            keep[bucket[torch.randperm(bucket.numel(), generator=generator)[:take]]] = False
            drawn += take
    return keep.to(weights.device)


def required_count(count: int | Support, method: str) -> int:
    """Return a count; refuse a support by name."""
    if isinstance(count, Support):
        found = f"{count} ({count.kind}), which {method} does not take"
        remedy = f"use one of: {', '.join(SALIENCIES)}, greedy_obs, swap_search"
        raise UnsupportedProblemError("support", found, remedy)
    return count


def start_set(name: str, block: FisherBlock, count: int | Support, seed: int, spread: float) -> Tensor:
    """Return the kept set of a start of `STARTS`."""
    if name == "randomized_magnitude":
        count = required_count(count, name)
        return randomized_magnitude(block.weights, count, spread=spread, seed=seed)
    return without_lowest(SALIENCIES[name](block), count)


def start_sets(
    name: str, blocks: Sequence[FisherBlock], counts: Sequence[int | Support], seed: int, spread: float
) -> list[Tensor]:
    """Return that start of every block, each with a seed of its own."""
    return [start_set(name, block, counts[i], seed + i, spread) for i, block in enumerate(blocks)]


class BySaliency:
    """The `Selector` that removes the weights of lowest `score` (n,) of a block."""

    def __init__(self, score: Callable[[FisherBlock], Tensor]) -> None:
        self.score = score

    def __call__(
        self,
        blocks: Sequence[FisherBlock],
        counts: Sequence[int | Support],
        *,
        limits: Limits,
        warm: Sequence[Tensor] | None = None,
        ledger: Ledger = NO_LEDGER,
    ) -> list[Choice]:
        """Return one choice a block; `limits` and `warm` are of no use, the ledger for its progress alone."""
        each = (self._choice(block, count) for block, count in zip(blocks, counts, strict=True))
        return ledger.progress.collect("blocks", each, len(blocks), unit="block")

    def _choice(self, block: FisherBlock, count: int | Support) -> Choice:
        began = time.perf_counter()
        keep = without_lowest(self.score(block), count)
        return Choice(keep=keep, seconds=time.perf_counter() - began)


by_magnitude, by_obd, by_obs, by_loss_preservation, by_gradient_norm = map(BySaliency, SALIENCIES.values())


def by_randomized_magnitude(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int | Support],
    *,
    limits: Limits,
    spread: float = 0.1,
    warm: Sequence[Tensor] | None = None,
    ledger: Ledger = NO_LEDGER,
) -> list[Choice]:
    """Return the sets of randomised magnitude pruning; `spread` as in `randomized_magnitude`."""
    sets = start_sets("randomized_magnitude", blocks, counts, limits.seed, spread)
    return [Choice(keep=keep) for keep in sets]
