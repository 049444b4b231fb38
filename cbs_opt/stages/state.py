"""What is kept of a run in stages: a line for every step, and the state between two stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One step: a selection with its update, or an update alone.

    Parameters
    ----------
    stage, update : int
        From 0; update 0 of a stage also prunes, where the stage prunes at all.
    sparsity : float
        Share of weights pruned after the step.
    n_prune : int
        Their number.
    loss_before, loss : float
        Training loss before and after, on the same samples, drawn afresh for every step.
    damping : float
        Damping of the winner, added to the diagonal of the Fisher matrix.
    update_scale : float
        Step length of the winner; 0 if the kept weights did not move.
    accepted : bool
        False if an update did not lower the loss, so that nothing changed.
    tried : int
        Networks that were compared.
    best_rejected : float, optional
        Lowest training loss among the others; None if there was no other.
    predicted_change : float
        What the quadratic model, without damping, says of the winner's step.
    samples : int
        Samples differentiated since the run began, for rows and gradients.
    seconds : float
        Wall-clock time of the step; the first of a stage includes the rows.
    """

    stage: int
    update: int
    sparsity: float
    n_prune: int
    loss_before: float
    loss: float
    damping: float
    update_scale: float
    accepted: bool
    tried: int
    best_rejected: float | None
    predicted_change: float
    samples: int
    seconds: float

    @classmethod
    def from_plain(cls, entry: Mapping[str, Any]) -> StageRecord:
        """A record from JSON, where losses that are not finite are strings."""
        numbers = ("loss_before", "loss", "best_rejected", "predicted_change")
        values: dict[str, Any] = {
            name: float(value) if name in numbers and value is not None else value
            for name, value in entry.items()
        }
        return cls(**values)


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
