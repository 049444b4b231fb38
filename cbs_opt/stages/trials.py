"""The networks that one step of a stage compares: sets, dampings and step lengths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cbs_opt.budget.remaining import counts_left
from cbs_opt.prune_options import PruneOptions
from cbs_opt.stages.model import StageModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """New weights (n,) float64 with their `keep`, not yet evaluated.

    `damping` is in the units of the options; `scale` 0 means that the kept weights did not move.
    """

    weights: Tensor
    keep: Tensor
    damping: float
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Expansion:
    """A model of the loss around `weights` (n,) float64; `gradient` is (n_kept,) or None."""

    model: StageModel
    weights: Tensor
    gradient: Tensor | None
    unit: float

    @property
    def kept_weights(self) -> Tensor:
        """The weights still there."""
        return self.weights[self.model.keep]

    def proposal(self, kept: Tensor, staying: Tensor, damping: float, scale: float) -> Proposal:
        """Return the network whose kept weights are `kept` (n_kept,), of which those `staying` stay."""
        weights = torch.zeros_like(self.weights)
        keep = torch.zeros_like(self.model.keep)
        weights[self.model.keep] = torch.where(staying, kept, 0.0)
        keep[self.model.keep] = staying
        return Proposal(weights=weights, keep=keep, damping=damping, scale=scale)

    def steps(
        self, target: Tensor, staying: Tensor, damping: float, scales: tuple[float, ...]
    ) -> Iterator[Proposal]:
        """The networks between the present one and `target` (n_kept,)."""
        start = self.kept_weights
        for scale in scales:
            yield self.proposal(start + scale * (target - start), staying, damping, scale)


def updates(expansion: Expansion, options: PruneOptions, dampings: tuple[float, ...]) -> Iterator[Proposal]:
    """Damped Newton steps that prune nothing, one for every damping and step length."""
    staying = torch.ones_like(expansion.kept_weights, dtype=torch.bool)
    absolute = [damping * expansion.unit for damping in dampings]
    targets = expansion.model.updates(expansion.kept_weights, expansion.gradient, staying, absolute)
    for damping, target in zip(dampings, targets, strict=True):
        yield from expansion.steps(target, staying, damping, options.update_scale)


def selections(
    expansion: Expansion, options: PruneOptions, dampings: tuple[float, ...], sparsity: float
) -> Iterator[Proposal]:
    """Sets at `sparsity` for every restart, alternative and damping, each with its updates and without."""
    for restart, alternative in itertools.product(range(options.restarts), options.method_options):
        groups: list[tuple[float, tuple[float, ...]]] = [(damping, (damping,)) for damping in dampings]
        if options.selection_damping is not None:
            groups = [(options.selection_damping, dampings)]
        for selecting, updating in groups:
            staying = _staying(expansion, options, selecting, sparsity, restart, alternative)
            start = expansion.kept_weights
            yield expansion.proposal(start, staying, updating[0], 0.0)
            if options.update is None:
                continue
            absolute = [damping * expansion.unit for damping in updating]
            targets = expansion.model.updates(start, expansion.gradient, staying, absolute)
            for damping, target in zip(updating, targets, strict=True):
                yield from expansion.steps(target, staying, damping, options.update_scale)


def _staying(
    expansion: Expansion,
    options: PruneOptions,
    damping: float,
    sparsity: float,
    restart: int,
    alternative: Mapping[str, Any],
) -> Tensor:
    """Return what the method keeps of the weights still there, (n_kept,) bool."""
    model = expansion.model
    method = options.chosen_method
    if method.kind == "search" and options.program == "selection":
        blocks = model.blocks(expansion.kept_weights, expansion.gradient, damping * expansion.unit)
    else:
        blocks = model.around_minimum(
            expansion.kept_weights,
            expansion.gradient,
            damping * expansion.unit,
            factorised=method.name == "obs",
        )
    counts = counts_left(
        model.partition,
        model.keep,
        sparsity,
        options.sparsity,
        budget=options.budget,
        scoring=options.scoring,
        blocks=blocks,
    )
    choices = options.engine(blocks, counts, limits=options.limits(restart), **alternative)
    return torch.cat([choice.keep for choice in choices])


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """The proposal of lowest training loss, and the losses of all in increasing order."""

    best: Proposal
    losses: list[float]


def judged(proposals: Iterable[Proposal], loss: Callable[[Proposal], float]) -> Verdict:
    """Evaluate every proposal; of equals the first wins, and NaN is worse than anything."""
    losses: list[float] = []
    best: Proposal | None = None
    for proposal in proposals:
        value = loss(proposal)
        value = math.inf if math.isnan(value) else value
        if best is None or value < min(losses):
            best = proposal
        losses.append(value)
    assert best is not None
    return Verdict(best=best, losses=sorted(losses))
