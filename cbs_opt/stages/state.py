"""What is kept of a run in stages: a line for every step, and the state between two stages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cbs_opt.report.parts import StageRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class StageState:
    """All that a run needs to go on after a number of stages.

    Parameters
    ----------
    stages : int
        Stages done.
    weights : (n,) float64 Tensor
    keep : (n,) bool Tensor
        True = kept.
    damping, update_damping : float or None
        Centres of the next grids, for steps that prune and for updates alone, in the units of the
        run's options; None before the first step.
    passes : int
        Times that the data were read.
    samples : int
        Samples differentiated.
    records : tuple of StageRecord
    """

    stages: int
    weights: Tensor
    keep: Tensor
    damping: float | None = None
    update_damping: float | None = None
    passes: int = 0
    samples: int = 0
    records: tuple[StageRecord, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class StageResult:
    """What `on_stage` is given when a stage is done.

    Parameters
    ----------
    stage : int
        From 0.
    stages : int
        How many there are.
    sparsity : float
    network : nn.Module
        The network as it is now, to evaluate or to copy; valid during the call. The caller's own is
        untouched until the end of the run.
    weights, keep : dict of str to Tensor
        Weights and boolean masks (True = kept) by parameter name.
    records : tuple of StageRecord
        The steps of this stage.
    """

    stage: int
    stages: int
    sparsity: float
    network: nn.Module
    weights: dict[str, Tensor]
    keep: dict[str, Tensor]
    records: tuple[StageRecord, ...]
