"""What a report says of a pruned network, block by block and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.network.partition import Partition
from cbs_opt.report.parts import BlockSummary, LayerSummary
from cbs_opt.select.choice import Choice


def block_summaries(
    blocks: Iterable[FisherBlock],
    choices: Sequence[Choice],
    weights: Tensor,
    *,
    modelled: bool,
    by_rows: bool,
) -> tuple[BlockSummary, ...]:
    """Return what the report says of every block; `weights` (n,) are those of the pruned network.

    `modelled` is whether there is a curvature to predict with, `by_rows` whether the sets were chosen
    without the layer-input term.
    """
    summaries = []
    start = 0
    for block, choice in zip(blocks, choices, strict=True):
        before = block.weights.double()
        selection = updated = None
        if modelled:
            chosen = block.without_channels() if by_rows else block
            selection = chosen.step_loss(torch.where(choice.keep, 0.0, -before))
            updated = block.step_loss(weights[start : start + block.n].double() - before)
        start += block.n
        summaries.append(
            BlockSummary(
                name=block.name,
                n=block.n,
                n_prune=int((~choice.keep).sum()),
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
