"""One pruned network that a run tries, and what a report says of it block by block and layer by layer."""

from __future__ import annotations

import math
import platform
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.network.partition import Partition
from cbs_opt.report.record import BlockSummary, LayerSummary
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
        """What the choice goes by: the training loss, where NaN is worse than anything."""
        return math.inf if self.loss is None or math.isnan(self.loss) else self.loss


def block_summaries(
    blocks: Iterable[FisherBlock], best: Candidate, *, modelled: bool, by_rows: bool
) -> tuple[BlockSummary, ...]:
    """What the report says of every block.

    `modelled` is whether there is a curvature to predict with, `by_rows` whether the sets were chosen
    without the layer-input term.
    """
    summaries = []
    start = 0
    for block, choice in zip(blocks, best.choices, strict=True):
        before = block.weights.double()
        selection = updated = None
        if modelled:
            chosen = block.without_channels() if by_rows else block
            selection = chosen.step_loss(torch.where(choice.keep, 0.0, -before))
            updated = block.step_loss(best.weights[start : start + block.n].double() - before)
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
    """What the report says of every parameter; weights (n,) before and after, masks by name."""
    old, new = partition.split(before), partition.split(after)
    return tuple(
        LayerSummary.from_weights(name, old[name].cpu(), new[name].cpu(), mask.cpu())
        for name, mask in keep.items()
    )


def peak_memory() -> int:
    """Peak resident memory of the process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that take part in every run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cbs-opt": version("cbs-opt"),
    }
