"""One selection and one update at the trained weights: the networks that recipes give, and the best one."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.budget.counts import allocate
from cbs_opt.curvature.fisher import gradient_rows
from cbs_opt.curvature.kinds import Fisher
from cbs_opt.curvature.layer_inputs import input_moments, with_layer_inputs
from cbs_opt.curvature.rows import Rows
from cbs_opt.execution.blocks import by_workers
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelHessian
from cbs_opt.hessian.on_demand import OnDemand
from cbs_opt.hessian.rows import RowsHessian, SharedGrams
from cbs_opt.network.data import Batch, Data, device_of, iterate
from cbs_opt.network.evaluation import Evaluation, evaluate
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.network.trial import TrialNetwork
from cbs_opt.recipe.records import Recipe, Request, in_units
from cbs_opt.recipe.select import Exact, Select
from cbs_opt.runs.progress import ChoiceLedger, RunProgress
from cbs_opt.select.choice import Choice
from cbs_opt.select.methods import Method, find_method
from cbs_opt.system.checks import within
from cbs_opt.system.progress import SILENT, Progress
from cbs_opt.system.resources import Resources
from cbs_opt.update.cbs import cbs_updates, independent_updates
from formulations.errors import ArgumentError
from formulations.solution import Limits
from formulations.support import Support

Sample = list[Batch]
"""Batches that networks are compared on."""
UPDATERS = {"cbs": cbs_updates, "independent": independent_updates}
SEED_STEP = 7919
"""Between the seeds of two runs of a randomised method."""


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block of code to a phase."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What a run works on, after its arguments were checked.

    `weights`: the trained weights, flat. `sample`: on which networks are compared; None without data. `done`:
    what is kept on disk. `notes`: what was changed or left out before, for the report. `choices`: what the
    recipe was chosen by, where the caller named one. `progress`: what is
    told how far the run is.
    """

    model: nn.Module
    partition: Partition
    weights: Tensor
    data: Data | None
    loss_fn: Objective
    request: Request
    resources: Resources
    sample: Sample | None
    progress: Progress = SILENT
    notes: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    done: RunProgress = field(default_factory=RunProgress)
    clock: Clock = field(default_factory=Clock)

    @property
    def recipe(self) -> Recipe:
        """The first recipe; all have the same curvature and weights."""
        return self.request.recipes[0]

    def loss(self, network: nn.Module) -> Evaluation | None:
        """Evaluate a network on the sample."""
        return None if self.sample is None else evaluate(network, self.sample, self.loss_fn)

    def trial(self, weights: Tensor, others: Mapping[str, Tensor] | None = None) -> TrialNetwork:
        """Return the network with flat `weights` (n,), and others by name, in the place of its own."""
        return TrialNetwork(self.model, self.partition, weights, others)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One pruned network: its sets, its flat weights in float64, and what it was made with.

    `damping` is what was added to the diagonal. `loss` is the training loss, None where nothing was compared.
    `others` are new tensors beside the weights, by name: batch-norm buffers that were estimated anew, biases
    and norms that moved.
    """

    choices: list[Choice]
    weights: Tensor
    keep: Tensor
    recipe: Recipe
    damping: float
    scale: float | None
    loss: float | None = None
    others: Mapping[str, Tensor] | None = None

    @property
    def rank(self) -> float:
        """What the choice goes by: the training loss, where NaN is worse than anything."""
        return math.inf if self.loss is None or math.isnan(self.loss) else self.loss


class LossModel:
    """The quadratic model of the loss at the trained weights, block by block.

    Gram matrices of kept sets are shared by all blocks of a name, and brought from one set to the next:
    the order of the updates decides their rounding.

    `rows` have the layer-input term if there is to be one; they are None without curvature.
    """

    def __init__(self, partition: Partition, weights: Tensor, rows: Rows | None) -> None:
        self.partition = partition
        self.weights = weights
        self.rows = rows
        self._grams = SharedGrams(len(partition.blocks))

    @cached_property
    def unit(self) -> float:
        """Mean diagonal entry of the Fisher matrix, without damping; 1 without curvature."""
        return 1.0 if self.rows is None else float(self.rows.column_squares().mean())

    def blocks(self, damping: float, layer_inputs: float, *, gradient: bool) -> Sequence[FisherBlock]:
        """Return the blocks with their model; of rows on disk, each when it is asked for."""
        rows = self.rows
        slope = rows.gradient if gradient and rows is not None else None
        term = None if rows is None or not layer_inputs else rows.channels
        term = None if term is None else term.scaled(layer_inputs / term.weight)

        def block(number: int) -> FisherBlock:
            span = self.partition.blocks[number]
            weights = self.weights[span.start : span.stop]
            none = weights.new_zeros((0, len(weights)))
            piece = none if rows is None else rows.block(span.start, span.stop)
            plain = RowsHessian(piece, self._grams.of(span.name, piece.shape[0]))
            return FisherBlock(
                name=span.name,
                weights=weights,
                hessian=plain if term is None else ChannelHessian(plain, term.within(span.start, span.stop)),
                damping=damping,
                gradient=None if slope is None else slope[span.start : span.stop],
            )

        blocks = OnDemand(block, len(self.partition.blocks))
        return blocks if rows is not None and rows.on_disk else list(blocks)


def select_of(recipe: Recipe) -> Select:
    """Return how a recipe selects, after its defaults were made concrete."""
    assert recipe.select is not None
    return recipe.select


def term_of(recipe: Recipe) -> float:
    """Return the weight of the layer-input term of a recipe, after its defaults were made concrete."""
    assert recipe.layer_inputs is not None
    return recipe.layer_inputs


def method_of(recipe: Recipe) -> Method:
    """Return the registered method of a recipe."""
    return find_method(select_of(recipe).method, select_of(recipe).program)


def scoring_of(recipe: Recipe) -> Method:
    """Return the method whose saliency spends a global budget."""
    score = recipe.weights.budget_score
    return method_of(recipe) if score is None else find_method(score, "selection")


def needs_curvature(request: Request) -> bool:
    """Whether any recipe needs gradient rows at all."""
    return request.certify is not None or any(
        recipe.update is not None or method_of(recipe).needs_curvature or scoring_of(recipe).needs_curvature
        for recipe in request.recipes
    )


def needs_gradient(request: Request) -> bool:
    """Whether any recipe looks at the mean gradient: it takes a backward pass of its own for most rows."""
    return any(
        recipe.gradient or "saliency" in (method_of(recipe).kind, scoring_of(recipe).kind)
        for recipe in request.recipes
    )


def selects_by_rows(recipe: Recipe) -> bool:
    """Whether the method leaves the layer-input term out: searches of the selection program do."""
    return select_of(recipe).program == "selection" and method_of(recipe).kind != "saliency"


def choose(
    recipe: Recipe,
    blocks: Sequence[FisherBlock],
    counts: Sequence[int | Support],
    *,
    seed: int,
    resources: Resources,
    ledger: ChoiceLedger,
) -> list[Choice]:
    """Select the kept set of every block by the method of a recipe, unless the ledger has them all."""
    if ledger.complete:
        return ledger.choices()
    select, method = select_of(recipe), method_of(recipe)
    engine = method.selector(select.program)
    if method.blockwise and resources.workers is not None:
        engine = by_workers(method.engine, method.name, select.program, resources.workers)
    limits = Limits(time_limit=select.time_limit, seed=seed)
    options = select.method_options
    names = {name: option_field(select, name) for name in options}
    select_fields = within("select", "method", *vars(select), **names)
    with select_fields, within("weights", partition="blocks"), within("resources", "workers"):
        choices = engine(blocks, counts, limits=limits, ledger=ledger, **options)
    ledger.close(choices)
    return choices


def option_field(select: Select, name: str) -> str:
    """Return the field of the record that has an option of the method."""
    return f"options.{name}" if isinstance(select, Exact) else name


def sampled_rows(
    task: Task, *, seed: int, step: str = "", curvature: Fisher | None = None, **options: Any
) -> Rows:
    """Take the gradient rows of a step; `options` are further ones of `gradient_rows`.

    `curvature` is by default that of the recipe.
    """
    kind, data = curvature or task.recipe.curvature, task.data
    assert isinstance(kind, Fisher)
    assert data is not None
    with task.clock.phase("curvature"), within("resources", "row_memory", "row_dir"):
        return gradient_rows(
            task.model,
            data,
            task.loss_fn,
            task.partition,
            curvature=kind,
            resources=task.resources,
            seed=seed,
            journal=task.done.rows(step),
            progress=task.progress,
            **options,
        )


def budget_fields() -> AbstractContextManager[None]:
    """Let errors about the budget name the field of the weights."""
    return within("weights", "budget", partition="blocks")


def one_shot(task: Task, rows: Rows | None) -> tuple[Candidate, LossModel]:
    """Try the networks of all recipes; return the one of lowest training loss, and the model it rests on."""
    model = LossModel(task.partition, task.weights, rows)
    best: Candidate | None = None
    with task.progress.phase("networks", task.request.candidates, unit="network") as advance:
        for candidate in candidates(task, model):
            if best is None or candidate.rank < best.rank:
                best = candidate
            advance(1)
    assert best is not None
    return best, model


def take_rows(task: Task) -> Rows | None:
    """Take the gradient rows and the layer-input term, as far as they are needed and not given."""
    request, curvature, data = task.request, task.recipe.curvature, task.data
    rows = None if isinstance(curvature, Fisher) else curvature
    if data is None:
        return rows
    if isinstance(curvature, Fisher) and needs_curvature(request):
        rows = sampled_rows(task, seed=request.seed, gradient=needs_gradient(request))
    if rows is not None and rows.channels is None and any(entry.layer_inputs for entry in request.recipes):
        with task.clock.phase("layer inputs"):
            given = task.model, data, task.partition
            options: dict[str, Any] = {"seed": request.seed, "progress": task.progress}
            moments = task.done.moments(lambda: input_moments(*given, objective=task.loss_fn, **options))
            rows = with_layer_inputs(rows, *given, moments=moments)
    return rows


def candidates(task: Task, model: LossModel) -> Iterator[Candidate]:
    """Yield the network of every recipe and seed; recipes with the same sets share the selection."""
    sizes = [block.stop - block.start for block in task.partition.blocks]
    selections = itertools.count()
    for group in grouped(task.request.recipes, lambda r: (r.layer_inputs, _selecting(r), r.select)):
        recipe = group[0]
        damping = in_units(_selecting(recipe), model.unit)
        counts = _counts(task, model, recipe, damping)
        scored = method_of(recipe).kind == "saliency"
        for attempt in range(select_of(recipe).tries):
            term = 0.0 if selects_by_rows(recipe) else term_of(recipe)
            blocks = model.blocks(damping, term, gradient=recipe.gradient or scored)
            ledger = task.done.selection(next(selections), sizes, progress=task.progress)
            seed = task.request.seed + SEED_STEP * attempt
            with task.clock.phase("selection"):
                choices = choose(recipe, blocks, counts, seed=seed, resources=task.resources, ledger=ledger)
            yield from _updated(task, model, group, choices)


def grouped(recipes: Iterable[Recipe], key: Callable[[Recipe], object]) -> list[list[Recipe]]:
    """Return recipes of equal key together, in the order in which keys come first."""
    pairs = [(key(recipe), recipe) for recipe in recipes]
    keys = [value for value, _ in pairs]
    firsts = [value for number, value in enumerate(keys) if value not in keys[:number]]
    return [[recipe for value, recipe in pairs if value == first] for first in firsts]


def _selecting(recipe: Recipe) -> Any:
    return recipe.damping if recipe.selection_damping is None else recipe.selection_damping


def _counts(task: Task, model: LossModel, recipe: Recipe, damping: float) -> Sequence[int | Support]:
    if task.request.pattern is not None:
        return [task.request.pattern] * len(task.partition.blocks)
    scores = None
    budget = recipe.weights.budget
    if budget != "uniform" and len(task.partition.blocks) > 1:
        scoring = scoring_of(recipe)
        gradient = recipe.gradient or scoring.kind == "saliency"
        blocks = model.blocks(damping, term_of(recipe), gradient=gradient)
        each = (scoring.score(block) for block in blocks)
        scores = torch.cat(task.progress.collect("scores", each, len(blocks), unit="block"))
    with budget_fields():
        return allocate(task.partition, task.request.sparsity, budget=budget, scores=scores)


def _updated(task: Task, model: LossModel, group: list[Recipe], choices: list[Choice]) -> Iterator[Candidate]:
    """Yield the networks that one selection gives, one a recipe."""
    keep = torch.cat([choice.keep for choice in choices])
    before = task.weights.double()
    for members in grouped(group, lambda recipe: recipe.update and recipe.update.kind):
        dampings = list(dict.fromkeys(in_units(recipe.damping, model.unit) for recipe in members))
        update = members[0].update
        targets: list[Tensor] = []
        if update is not None:
            blocks = model.blocks(dampings[0], term_of(members[0]), gradient=members[0].gradient)
            with task.clock.phase("update"):
                move = UPDATERS[update.kind]
                # No block outlives its turn: rows on disk leave memory with it.
                each = (move(blocks[i], choice.keep, dampings) for i, choice in enumerate(choices))
                moved = task.progress.collect("update", each, len(choices), unit="block")
            targets = [torch.cat(pieces) for pieces in zip(*moved, strict=True)]
            del moved
        for recipe in members:
            damping = in_units(recipe.damping, model.unit)
            if recipe.update is None:
                weights, scale = torch.where(keep, task.weights, 0.0), None
            else:
                target, scale = targets[dampings.index(damping)], recipe.update.scale
                # In place: there may be no room for more vectors of that length than these.
                weights = (target - before).mul_(scale).add_(before).masked_fill_(~keep, 0.0)
            loss = None
            if task.request.candidates > 1:
                with task.clock.phase("choice"):
                    loss = evaluate(task.trial(weights), task.sample or [], task.loss_fn).loss
            yield Candidate(
                choices=choices,
                weights=weights,
                keep=keep,
                recipe=recipe,
                damping=damping,
                scale=scale,
                loss=loss,
            )


def draw_sample(model: nn.Module, data: Data, samples: int, seed: int) -> Sample:
    """Return the samples on which networks are compared."""
    # Not cut: a loss may look at whole batches.
    return list(iterate(data, batch_size=None, max_samples=samples, seed=seed, device=device_of(model)))


def check_data(request: Request, data: Data | None) -> None:
    """Raise `ArgumentError` if there are no data where they are needed."""
    if data is not None:
        return
    if request.stages is not None:
        raise ArgumentError("data", "None for a run in stages", "pass training data")
    remedy = "pass training data, or use Magnitude() with update=None"
    curvature = request.recipes[0].curvature
    rows = None if isinstance(curvature, Fisher) else curvature
    if request.candidates > 1:
        found = f"None, but {request.candidates} networks are compared by their training loss"
        raise ArgumentError("data", found, remedy)
    (recipe,) = request.recipes
    lacks_term = bool(recipe.layer_inputs) and (rows is None or rows.channels is None)
    if needs_curvature(request) and (rows is None or lacks_term):
        raise ArgumentError("data", f"None, but {_needing(recipe)} needs it", remedy)


def _needing(recipe: Recipe) -> str:
    if method_of(recipe).needs_curvature:
        return select_of(recipe).method
    if recipe.update is not None:
        return "the update"
    return "the budget" if scoring_of(recipe).needs_curvature else "a certificate"
