"""The networks that one step of a stage compares: sets, dampings and step lengths.

How far a quadratic model is trusted is told by dampings after Levenberg and Marquardt, by the training loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbs_opt import oneshot
from cbs_opt.budget.remaining import counts_left, pattern_left
from cbs_opt.recipe.records import Absolute, Damping, Recipe, Request, in_units
from cbs_opt.runs.progress import ChoiceLedger
from cbs_opt.stages.model import StageModel
from cbs_opt.system.resources import Resources
from formulations.support import Support

LedgerOf = Callable[[Sequence[int]], ChoiceLedger]
"""What gives the ledger of the next selection for the sizes of its blocks."""
FACTOR = 3.0
"""Between neighbours of the grid of dampings."""


class DampingSearch:
    """The grid of dampings of the next step, which follows the winners.

    It begins with `first`, the grid of the first step, or goes on around `centre`. After a step was accepted
    the grid is the winner, a third and three times that; after one was refused it starts at the largest
    tried. Levenberg (1944), Marquardt (1963), with the ratio test replaced by the comparison of actual
    losses.
    """

    def __init__(self, first: Sequence[float], centre: float | None = None) -> None:
        self._first = tuple(first)
        self.centre = centre

    def grid(self) -> tuple[float, ...]:
        """Dampings to try, in increasing order."""
        if self.centre is None:
            return tuple(sorted(self._first))
        return (self.centre / FACTOR, self.centre, self.centre * FACTOR)

    def accepted(self, damping: float) -> None:
        """`damping` won."""
        self.centre = damping

    def refused(self) -> None:
        """Nothing improved: trust the model less."""
        self.centre = max(self.grid()) * (FACTOR if self.centre is not None else 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """New weights (n,) float64 with their `keep`, not yet evaluated.

    `damping` is in the units of the recipes; `scale` 0 means that the kept weights did not move.
    """

    weights: Tensor
    keep: Tensor
    damping: float
    scale: float
    recipe: Recipe


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

    def proposal(
        self, kept: Tensor, staying: Tensor, damping: float, scale: float, recipe: Recipe
    ) -> Proposal:
        """Return the network whose kept weights are `kept` (n_kept,), of which those `staying` stay."""
        weights = torch.zeros_like(self.weights)
        keep = torch.zeros_like(self.model.keep)
        weights[self.model.keep] = torch.where(staying, kept, 0.0)
        keep[self.model.keep] = staying
        return Proposal(weights=weights, keep=keep, damping=damping, scale=scale, recipe=recipe)

    def updates(
        self, staying: Tensor, dampings: tuple[float, ...], recipes: Iterable[Recipe]
    ) -> Iterator[Proposal]:
        """Yield the networks between the present one and the minimum of the model, by damping and recipe.

        Recipes that differ in their step length alone share a solve.
        """
        start = self.kept_weights
        absolute = [damping * self.unit for damping in dampings]
        recipes = list(recipes)
        targets = self.model.updates(start, self.gradient, staying, absolute)
        for damping, target in zip(dampings, targets, strict=True):
            for recipe in recipes:
                assert recipe.update is not None
                scale = recipe.update.scale
                yield self.proposal(start + scale * (target - start), staying, damping, scale, recipe)


def number_of(damping: Damping) -> float:
    """Return a damping in the units of its recipe."""
    return damping.value if isinstance(damping, Absolute) else damping


def first_dampings(request: Request) -> tuple[float, ...]:
    """Return the dampings of the recipes, which the first step tries."""
    return tuple(dict.fromkeys(number_of(recipe.damping) for recipe in request.recipes))


def updates(expansion: Expansion, request: Request, dampings: tuple[float, ...]) -> Iterator[Proposal]:
    """Yield damped Newton steps that prune nothing, one for every damping and step length."""
    staying = torch.ones_like(expansion.kept_weights, dtype=torch.bool)
    movers = [recipe for recipe in _by_scale(request.recipes) if recipe.update is not None]
    if movers:
        yield from expansion.updates(staying, dampings, movers)
    else:
        yield expansion.proposal(expansion.kept_weights, staying, dampings[0], 0.0, request.recipes[0])


def selections(
    expansion: Expansion,
    request: Request,
    resources: Resources,
    dampings: tuple[float, ...],
    sparsity: float,
    ledger_of: LedgerOf,
) -> Iterator[Proposal]:
    """Yield sets at `sparsity` for every method, seed and damping, each with its updates and without."""
    for group in oneshot.grouped(request.recipes, lambda recipe: (recipe.select, recipe.selection_damping)):
        recipe = group[0]
        for attempt in range(oneshot.select_of(recipe).tries):
            pairs: list[tuple[float, tuple[float, ...]]] = [(damping, (damping,)) for damping in dampings]
            if recipe.selection_damping is not None:
                pairs = [(_selecting(expansion, recipe, recipe.selection_damping), dampings)]
            for selecting, updating in pairs:
                staying = _staying(
                    expansion, request, recipe, resources, selecting, sparsity, attempt, ledger_of
                )
                yield expansion.proposal(expansion.kept_weights, staying, updating[0], 0.0, recipe)
                movers = [entry for entry in _by_scale(group) if entry.update is not None]
                if movers:
                    yield from expansion.updates(staying, updating, movers)


def _selecting(expansion: Expansion, recipe: Recipe, damping: Damping) -> float:
    """Return the damping of the selection in the units of the other one, which may be absolute."""
    if isinstance(damping, Absolute) == isinstance(recipe.damping, Absolute):
        return number_of(damping)
    return in_units(damping, expansion.model.unit) / expansion.unit


def _by_scale(recipes: Iterable[Recipe]) -> list[Recipe]:
    return [members[0] for members in oneshot.grouped(recipes, lambda recipe: recipe.update)]


def _staying(
    expansion: Expansion,
    request: Request,
    recipe: Recipe,
    resources: Resources,
    damping: float,
    sparsity: float,
    attempt: int,
    ledger_of: LedgerOf,
) -> Tensor:
    """Return what the method keeps of the weights still there, (n_kept,) bool."""
    model, method = expansion.model, oneshot.method_of(recipe)
    place = expansion.kept_weights, expansion.gradient, damping * expansion.unit
    if oneshot.selects_by_rows(recipe) and method.kind == "search":
        blocks = model.blocks(*place)
    else:
        blocks = model.around_minimum(*place, factorised=method.name == "obs")
    counts: Sequence[int | Support]
    pattern = request.pattern_at(sparsity)
    if pattern is not None:
        counts = [pattern_left(model.keep, pattern)] * len(blocks)
    else:
        with oneshot.budget_fields():
            counts = counts_left(
                model.partition,
                model.keep,
                sparsity,
                request.sparsity,
                budget=recipe.weights.budget,
                scoring=oneshot.scoring_of(recipe),
                blocks=blocks,
            )
    choices = oneshot.choose(
        recipe,
        blocks,
        counts,
        seed=request.seed + oneshot.SEED_STEP * attempt,
        resources=resources,
        ledger=ledger_of([block.n for block in blocks]),
    )
    return torch.cat([choice.keep for choice in choices])


def judged(
    proposals: Iterable[Proposal], loss: Callable[[Proposal], float], enough: float = -math.inf
) -> tuple[Proposal, list[float]]:
    """Return the proposal of lowest training loss, of equals the first, and all losses in increasing order.

    NaN is worse than anything. The first whose loss is `enough` or less ends the search.
    """
    losses: list[float] = []
    best: Proposal | None = None
    for proposal in proposals:
        value = loss(proposal)
        value = math.inf if math.isnan(value) else value
        if best is None or value < min(losses):
            best = proposal
        losses.append(value)
        if value <= enough:
            break
    assert best is not None
    return best, sorted(losses)
