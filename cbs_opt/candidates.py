"""One pruned network that a run tries, and what a report says of it block by block and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.products import step_loss
from cbs_opt.network.partition import Partition
from cbs_opt.report.parts import BlockSummary, LayerSummary
from cbs_opt.select.choice import Choice


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One pruned network: its sets, its flat weights in float64, and what it was made with."""

    choices: list[Choice]
    weights: Tensor
    keep: Tensor
    damping: float
    scale: float
    loss: float | None
    layer_inputs: float = 0.0

    @property
    def rank(self) -> float:
        """The training loss, where NaN is worse than anything."""
        return math.inf if self.loss is None or math.isnan(self.loss) else self.loss


def block_summaries(
    blocks: Iterable[FisherBlock], best: Candidate, *, modelled: bool, by_rows: bool
) -> tuple[BlockSummary, ...]:
    """Return what the report says of every block.

    `modelled` is whether there is a curvature to predict with, `by_rows` whether the sets were chosen
    without the layer-input term.
    """
    summaries = []
    for block, choice in zip(blocks, best.choices, strict=True):
        before = block.weights.double()
        selection = updated = None
        if modelled:
            chosen = replace(block, channels=None) if by_rows else block
            selection = step_loss(chosen, torch.where(choice.pruned, -before, 0.0))
            updated = step_loss(block, best.weights[block.start : block.stop].double() - before)
        summaries.append(
            BlockSummary(
                name=block.name,
                n=block.n,
                n_prune=int(choice.pruned.sum()),
                selection_loss=selection,
                updated_loss=updated,
                initial_loss=choice.initial_value,
                iterations=choice.iterations,
                locally_optimal=choice.locally_optimal,
                seconds=choice.seconds,
                bound=choice.bound,
                status=choice.status,
            )
        )
    return tuple(summaries)


def layer_summaries(
    partition: Partition, before: Tensor, after: Tensor, keep: Mapping[str, Tensor]
) -> tuple[LayerSummary, ...]:
    """Return what the report says of every parameter; weights (n,) before and after, masks by name."""
    old, new = partition.split(before), partition.split(after)
    return tuple(
        LayerSummary.from_weights(name, old[name].cpu(), new[name].cpu(), mask.cpu())
        for name, mask in keep.items()
    )
