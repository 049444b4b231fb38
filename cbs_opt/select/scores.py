"""Which weights go by scores: saliencies and randomised magnitude, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.choice import NO_LEDGER, Choice, Ledger
from cbs_opt.select.randomized_magnitude import randomized_magnitude
from cbs_opt.select.saliency import (
    SALIENCIES,
    gradient_norm,
    loss_preservation,
    magnitude,
    obd,
    obs,
    without_lowest,
)
from formulations.solution import Limits

STARTS = (*SALIENCIES, "randomized_magnitude")


def start_set(name: str, block: FisherBlock, count: int, seed: int, spread: float) -> Tensor:
    """Return the kept set of a start of `STARTS`."""
    if name == "randomized_magnitude":
        return randomized_magnitude(block.weights, count, spread=spread, seed=seed)
    return without_lowest(SALIENCIES[name](block), count)


class BySaliency:
    """The `Selector` that removes the weights of lowest `score` (n,) of a block."""

    def __init__(self, score: Callable[[FisherBlock], Tensor]) -> None:
        self.score = score

    def __call__(
        self,
        blocks: Sequence[FisherBlock],
        counts: Sequence[int],
        *,
        limits: Limits,
        warm: Sequence[Tensor] | None = None,
        ledger: Ledger = NO_LEDGER,
    ) -> list[Choice]:
        """Return one choice a block; `limits`, `warm` and `ledger` are of no use."""
        choices = []
        for block, count in zip(blocks, counts, strict=True):
            began = time.perf_counter()
            keep = without_lowest(self.score(block), count)
            choices.append(Choice(keep=keep, seconds=time.perf_counter() - began))
        return choices


by_magnitude, by_obd, by_obs = BySaliency(magnitude), BySaliency(obd), BySaliency(obs)
by_loss_preservation, by_gradient_norm = BySaliency(loss_preservation), BySaliency(gradient_norm)


def by_randomized_magnitude(
    blocks: Sequence[FisherBlock],
    counts: Sequence[int],
    *,
    limits: Limits,
    spread: float = 0.1,
    warm: Sequence[Tensor] | None = None,
    ledger: Ledger = NO_LEDGER,
) -> list[Choice]:
    """Return the sets of randomised magnitude pruning; `spread` as in `randomized_magnitude`."""
    return [
        Choice(keep=start_set("randomized_magnitude", block, counts[number], limits.seed + number, spread))
        for number, block in enumerate(blocks)
    ]
