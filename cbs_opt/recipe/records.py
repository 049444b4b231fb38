"""The records of a run: which weights, which curvature, how to select, how to update, in how many stages."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from cbs_opt.budget.counts import Budget, checked_sparsity, checked_target, share_of
from cbs_opt.budget.schedule import SCHEDULES, Schedule, pattern_schedule, sparsity_schedule
from cbs_opt.curvature.kinds import FISHERS, EmpiricalFisher, Fisher
from cbs_opt.curvature.rows import Rows
from cbs_opt.network.eligible import Globs
from cbs_opt.network.partition import BlockRule, checked_rule
from cbs_opt.recipe.select import Select, select_by_name
from cbs_opt.system.checks import (
    RUN_SEEDS,
    check_fields,
    finite_number,
    flag,
    names,
    one_of,
    path,
    seed_number,
    whole_number,
    within,
)
from formulations.errors import ArgumentError
from formulations.support import NofM

DAMPING = 0.1
"""Damping by default, in units of the mean diagonal of the Fisher matrix."""
UPDATES = ("cbs", "independent")


@dataclass(frozen=True)
class Absolute:
    """A damping as it is added to the diagonal, not in units of the mean diagonal."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", finite_number("damping", self.value))


absolute = Absolute


Damping = float | Absolute
"""In units of the mean diagonal of the Fisher matrix, unless it is `absolute`."""


def in_units(damping: Damping, unit: float) -> float:
    """Return what is added to the diagonal, where `unit` is its mean."""
    return damping.value if isinstance(damping, Absolute) else damping * unit


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which weights may go, how they form blocks, and how the pruned count is spread over blocks.

    Raises `ArgumentError` if a field is out of its range; the message names it as ``weights.<field>``.

    Parameters
    ----------
    target, ignore : str or sequence of str
        Globs on parameter names; by default all parameters of two or more axes, but for embeddings, norms
        and adapters (see `Partition.from_model`).
    blocks : {"global", "layer", "row"} or int, optional
        One block in all, one a parameter, one an output channel, or blocks of at most that many
        weights. Weights of different blocks do not interact in the model. By default one block; one a
        parameter where the fields below spread the pruned count over blocks, or where one does not fit the
        memory of the machine.
    budget : {"global", "uniform"} or mapping of parameter glob to sparsity, default "global"
        How the pruned count is spread over blocks. A mapping has to come to the sparsity of the call, which
        parameters that no glob matches take; ``prune(sparsity={...})`` says both at once.
    budget_score : str, optional
        Saliency by which a global budget is spent; by default that of the method (magnitude for
        methods that have none).
    """

    target: Globs | None = None
    ignore: Globs = ()
    blocks: BlockRule | None = None
    budget: Budget = "global"
    budget_score: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "weights.", names, "target", "ignore")
        if isinstance(self.blocks, Integral) and not isinstance(self.blocks, bool):
            object.__setattr__(self, "blocks", int(self.blocks))
        if self.blocks is not None:
            checked_rule("weights.blocks", self.blocks)
        if isinstance(self.budget, Mapping):
            pairs = ((glob, f"weights.budget[{glob!r}]", share) for glob, share in self.budget.items())
            budget = {str(glob): checked_sparsity(argument, share) for glob, argument, share in pairs}
            object.__setattr__(self, "budget", budget)
        elif self.budget not in ("global", "uniform"):
            remedy = 'use "global", "uniform" or a mapping from parameter globs to sparsities'
            raise ArgumentError("weights.budget", f"{self.budget!r}", remedy)
        if self.budget_score is not None and not isinstance(self.budget_score, str):
            raise ArgumentError("weights.budget_score", f"{self.budget_score!r}", "name a saliency")
        if self.budget_score is not None and self.budget == "uniform":
            found = f"{self.budget_score!r} under a uniform budget, which looks at no score"
            raise ArgumentError("weights.budget_score", found, 'leave it out, or use budget="global"')
        spread = [name for name in ("budget", "budget_score") if getattr(self, name) not in ("global", None)]
        if self.blocks == "global" and spread:
            found = f"{getattr(self, spread[0])!r} for one block of all weights, which it cannot spread"
            remedy = 'use blocks="layer", "row" or a size, or leave blocks out'
            raise ArgumentError(f"weights.{spread[0]}", found, remedy)

    @property
    def default_blocks(self) -> BlockRule:
        """The blocks where none are asked for and memory is no matter."""
        spread = self.budget != "global" or self.budget_score is not None
        return "layer" if spread else "global"


@dataclass(frozen=True, kw_only=True)
class Update:
    """How the kept weights move after the selection.

    Raises `ArgumentError` if a field is out of its range; the message names it as ``update.<field>``.

    Parameters
    ----------
    kind : {"cbs", "independent"}, default "cbs"
        To the minimum of the model (CBS-U), or by the sum of single-weight OBS updates (WoodFisher).
    scale : float, default 1
        Step length.
    """

    kind: str = "cbs"
    scale: float = 1.0

    def __post_init__(self) -> None:
        one_of("update.kind", self.kind, UPDATES)
        check_fields(self, "update.", finite_number, "scale", above=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is pruned: the model of its loss, the selection, and the update.

    Raises `ArgumentError` if a field is out of its range; the message names it.

    Parameters
    ----------
    curvature : EmpiricalFisher, ExactFisher, MonteCarloFisher, SketchedFisher, their name, or Rows
        Which gradient rows are taken; or `gradient_rows` computed before for these very weights.
    layer_inputs : float, optional
        Weight of the layer-input term: a block-diagonal part of the Hessian, one block an output
        channel, made of the second moments of what its layer is fed and scaled to this many times the
        mean diagonal of the rows there. It has full rank, where the rows leave most directions unseen.
        0 is without. By default 1; for given `Rows` what they bring; and 0 where layers are so wide that
        factorising the term, ``sum out * fan_in^3``, takes over 10^12 multiplications.
    damping : float or Absolute, default .1
        Added to the diagonal, in units of the mean diagonal of the Fisher matrix (`absolute` ones are
        added as they are).
    selection_damping : float or Absolute, optional
        Another damping while selecting; by default the same.
    gradient : bool, default False
        Keep the gradient in the model while selecting. At a trained minimum, and after an update brought the
        network to one, it is mostly sampling noise. Updates without selection, in stages, always follow it.
    weights : Weights
    select : Select or str, optional
        A record of `cbs_opt.recipe.select`, or the name of a method. By default `SwapSearch`, and
        `GreedyOBS` in three drops where the run has stages.
    update : Update, str or None
        None leaves the kept weights where they are.
    choice_samples : int, optional
        Training samples on which tried networks are compared; by default as many as the curvature is
        taken from.
    recalibrate : bool, default False
        Estimate batch-norm statistics anew at the end, where that lowers the loss on samples set aside.
    """

    curvature: Fisher | Rows = field(default_factory=EmpiricalFisher)
    layer_inputs: float | None = None
    damping: Damping = DAMPING
    selection_damping: Damping | None = None
    gradient: bool = False
    weights: Weights = field(default_factory=Weights)
    select: Select | None = None
    update: Update | None = field(default_factory=Update)
    choice_samples: int | None = None
    recalibrate: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        if isinstance(self.select, str):
            put(self, "select", select_by_name(self.select))
        if isinstance(self.update, str):
            put(self, "update", Update(kind=one_of("update", self.update, UPDATES)))
        check_fields(self, "", _curvature, "curvature")
        check_fields(self, "", finite_number, "layer_inputs")
        check_fields(self, "", _damping, "damping", "selection_damping")
        check_fields(self, "", flag, "gradient", "recalibrate")
        check_fields(self, "", whole_number, "choice_samples")
        for name, kind in (("weights", Weights), ("select", Select), ("update", Update)):
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or name == "weights"):
                raise ArgumentError(name, f"a {type(value).__name__}", f"pass a {kind.__name__} record")

    @property
    def samples(self) -> int:
        """Training samples that the curvature is taken from."""
        return self.curvature.samples

    @staticmethod
    def grid(base: Recipe | None = None, **fields: Iterable[Any]) -> list[Recipe]:
        """Return one recipe for every combination of the values given by field.

        Parameters
        ----------
        base : Recipe, optional
            Has the other fields.
        **fields
            A sequence of values for each field that varies; the last one varies fastest.

        Examples
        --------
        >>> grid = Recipe.grid(damping=[0.03, 0.1], update=[Update(scale=s) for s in (0.5, 1.0)])
        >>> len(grid)
        4
        """
        base = Recipe() if base is None else base
        for name, values in fields.items():
            if name not in Recipe.__dataclass_fields__:
                known = ", ".join(Recipe.__dataclass_fields__)
                raise ArgumentError("fields", f"{name!r}", f"choose among {known}")
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise ArgumentError(name, f"{values!r}", "pass a sequence of values")
        combinations = itertools.product(*fields.values())
        return [replace(base, **dict(zip(fields, values, strict=True))) for values in combinations]


OnStage = Callable[[Any], None]
"""Called with a `StageResult` after every stage."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Stochastic gradient steps on the kept weights at the end of every stage.

    Their rate falls over all stages together, so that the network comes to rest at the end of the last one;
    there it must have gained, on samples set aside, and before it must not have run away. `rest` changes it.

    Raises `ArgumentError` if a field is out of its range; the message names it as
    ``stages.fine_tuning.<field>``.

    Parameters
    ----------
    samples : int
        Training samples differentiated after a stage, drawn again where there are fewer. In the first stage
        some of them, 15 % of those of all stages, go to the rates below, if there are several and this
        allows 50 steps of each; the best one, by the loss on samples set aside, goes on, else the first one.
        It is divided by three from then on where steps are not taken.
    final_samples : int, optional
        The same after the last stage; by default as many.
    batch_size : int, default 64
        Samples of every step.
    momentum_rates : tuple of float, default (.75,)
        Learning rates for steps with Nesterov momentum .9, over the largest eigenvalue of the Fisher matrix
        of the first stage.
    newton_dampings : tuple of float, default ()
        For the same steps with the gradient times the inverse of the damped Fisher matrix: what is added to
        it, over its largest eigenvalue.
    adam_rates : tuple of float, default ()
        Learning rates for steps of Adam, in units of the root mean square of the kept weights.
    decay : float, default 5e-5
        Weight decay: steps go down the loss and ``1/2 lambda |w|^2`` of the kept weights, with lambda this
        share of the largest eigenvalue of the Fisher matrix of the first stage. It keeps predictions from
        becoming surer than they are right where fine-tuning is long (thousands of steps); a few hundred
        steps hardly feel it.
    rest : bool, default False
        Whether the network comes to rest at the end of every stage, where it must have gained, and finds its
        rate anew in each: for stages that prune so much that the curvature before one says little about that
        after it.
    batch_statistics : bool, default False
        Whether batch normalisation normalises every batch of eight samples or more by itself meanwhile, as in
        training, so that longer steps are safe; its statistics are estimated anew before losses are compared,
        and at the end. With `rest` momentum rates are then over the largest eigenvalue at the pruned weights,
        and times how far the network is from rest: its loss above that before pruning, as a share of that
        without any weights above it. Where that is below .15 the network keeps its statistics, and rates are
        times .07. Of no consequence where no layer has running statistics, or the recipe may not change them
        (`recalibrate`).
    vectors : bool, default False
        Whether biases, and scales and shifts of norms, move as well: all parameters of one axis that require
        gradients and are not ignored by the recipe, at the rate of the weights. Where batch normalisation
        keeps its statistics meanwhile they stay: it is too sensitive to them then. Not beside
        `newton_dampings`.
    surplus : float, default 1
        How many times as many weights as asked for the last selection keeps, at most all that are left. The
        others go while steps are taken after it, over the first two thirds of the samples, those of the
        smallest squares times the root mean squares of their gradients first. The result is then taken
        whatever its loss, as it alone is as sparse as asked for. One rate, not of `newton_dampings`; of no
        consequence for n of m.
    matching : bool, default False
        Whether steps go down half the squared distance of outputs from those of the network before pruning,
        in place of the loss: for networks that have learnt the labels of their training data by heart, so
        that these say nothing that is not in the outputs, and less. Rates are over the largest eigenvalue
        of the curvature of that distance at the pruned weights. What is taken is decided by that
        distance too, on samples set aside. Not beside `newton_dampings`; the loss has to be one of
        single samples, by outputs that are a tensor.
    input_metric : bool, default False
        Whether gradients are multiplied by the inverse of the covariance of what each layer is fed, a tenth
        of its mean diagonal added to it, while every batch is normalised by itself: steps then go about as
        far along inputs that vary little as along those that vary most. Momentum rates are over the largest
        eigenvalue in this metric. Not beside `newton_dampings` or `adam_rates`, which have their own; of no
        consequence where `batch_statistics` is of none, and in a recipe without layer inputs.
    """

    samples: int
    final_samples: int | None = None
    batch_size: int = 64
    momentum_rates: tuple[float, ...] = (0.75,)
    newton_dampings: tuple[float, ...] = ()
    adam_rates: tuple[float, ...] = ()
    decay: float = 5e-5
    rest: bool = False
    batch_statistics: bool = False
    vectors: bool = False
    surplus: float = 1.0
    matching: bool = False
    input_metric: bool = False

    def __post_init__(self) -> None:
        prefix = "stages.fine_tuning."
        check_fields(self, prefix, whole_number, "samples", "final_samples", "batch_size")
        check_fields(self, prefix, finite_number, "decay")
        check_fields(self, prefix, flag, "rest", "batch_statistics", "vectors", "matching", "input_metric")
        check_fields(self, prefix, _rates, "momentum_rates", "newton_dampings", "adam_rates")
        if not (self.momentum_rates or self.newton_dampings or self.adam_rates):
            raise ArgumentError(f"{prefix}momentum_rates", "no rate of any kind", "give at least one")
        if self.vectors and self.newton_dampings:
            found = "True beside newton_dampings, which know the curvature of weights alone"
            raise ArgumentError(f"{prefix}vectors", found, "leave one of them out")
        if self.matching and self.newton_dampings:
            found = "True beside newton_dampings, which know the curvature of the loss alone"
            raise ArgumentError(f"{prefix}matching", found, "leave one of them out")
        if self.input_metric and (self.newton_dampings or self.adam_rates):
            found = "True beside newton_dampings or adam_rates, whose steps have a metric of their own"
            raise ArgumentError(f"{prefix}input_metric", found, "leave one of them out")
        check_fields(self, prefix, finite_number, "surplus")
        if self.surplus < 1.0:
            found = f"{self.surplus:g}"
            raise ArgumentError(
                f"{prefix}surplus", found, "keep at least as many weights as asked for: 1 or more"
            )
        if self.surplus > 1.0 and (
            self.newton_dampings or len(self.momentum_rates) + len(self.adam_rates) > 1
        ):
            found = f"{self.surplus:g} beside several rates, or newton_dampings"
            raise ArgumentError(f"{prefix}surplus", found, "give one momentum rate or one of Adam")

    def shares(self, stages: int) -> tuple[int, ...]:
        """Return the samples of each of so many stages."""
        final = self.samples if self.final_samples is None else self.final_samples
        return (*(self.samples,) * (stages - 1), final)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Pruning little by little, with fresh curvature at every stage.

    Raises `ArgumentError` if a field is out of its range; the message names it as ``stages.<field>``.

    Parameters
    ----------
    count : int, default 1
        Stages that prune. One stage still differs from no stages: its updates have gradients of their
        own and are taken only where they lower the loss on training samples drawn afresh.
    schedule : {"geometric", "polynomial", "linear"} or sequence of float, default "geometric"
    start : float, optional
        How sparsity grows and where it starts; see `sparsity_schedule`.
    updates : int, default 2
        Updates of every stage, the one that comes with the selection included. They share the rows of
        the stage; each has a gradient of its own. An update is a damped Newton step; the grid of
        dampings follows the winners, a third to three times the last one.
    final_updates : int, default 4
        Updates at the last sparsity, with new rows, after all stages. They end early when nothing improves.
    gradient_samples : int, optional
        Training samples of every gradient; by default as many as the rows of a stage are made of.
    fine_tuning : FineTuning, optional
        Stochastic steps at the end of every stage; by default none.
    update_above : float, default 0
        What a selection may cost by itself, as a share of the way from the loss before it to the loss without
        any weight: up to there the kept weights stay where they are, and what follows moves them. Beyond, and
        always by default, updates are compared with it.
    on_stage : callable, optional
        Called with a `StageResult` after every stage, and first for those in `run_dir`: its network can be
        evaluated or copied, so that one run serves a whole table of sparsities. Not saved with the recipe.
    """

    count: int = 1
    schedule: Schedule = "geometric"
    start: float | None = None
    updates: int = 2
    final_updates: int = 4
    gradient_samples: int | None = None
    fine_tuning: FineTuning | None = None
    update_above: float = 0.0
    on_stage: OnStage | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self, "stages.", whole_number, "count", "updates", "gradient_samples")
        check_fields(self, "stages.", whole_number, "final_updates", least=0)
        check_fields(self, "stages.", _schedule, "schedule")
        check_fields(self, "stages.", checked_sparsity, "start")
        check_fields(self, "stages.", finite_number, "update_above", most=1.0)
        if not isinstance(self.fine_tuning, FineTuning | None):
            found = f"a {type(self.fine_tuning).__name__}"
            raise ArgumentError("stages.fine_tuning", found, "pass a FineTuning record")
        if self.on_stage is not None and not callable(self.on_stage):
            raise ArgumentError("stages.on_stage", f"{self.on_stage!r}", "pass a function of a StageResult")

    def sparsities(self, target: float, pattern: NofM | None = None) -> tuple[float, ...]:
        """Return the sparsity of every stage that prunes, the last one `target`.

        Those before a `pattern` are of looser ones, such as 3:4 before 2:4.
        """
        with within("stages", "schedule", "start", stages="count"):
            shares = sparsity_schedule(target, stages=self.count, schedule=self.schedule, start=self.start)
            if pattern is None:
                return shares
            return pattern_schedule(pattern, shares, exact=not isinstance(self.schedule, str))

    @property
    def steps(self) -> tuple[int, ...]:
        """Updates of every stage; a last stage of updates alone follows if there are any."""
        pruning = (self.updates,) * self.count
        return (*pruning, self.final_updates) if self.final_updates else pruning


@dataclass(frozen=True, kw_only=True)
class Certify:
    """Bounds on the optimum of every block, and how far above it the chosen set can be at most.

    Parameters
    ----------
    time_limit : float, optional
        Seconds for all certificates together. A block that they do not reach has no bound.
    block_dir : path, optional
        Write the data of every block there, each as large as its rows in float64, so that anybody can
        check the certificates; see `cbs_opt.certify.files`.
    """

    time_limit: float | None = None
    block_dir: str | os.PathLike[str] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "certify.", finite_number, "time_limit")
        path("certify.block_dir", self.block_dir)


SHARED = ("curvature", "gradient", "weights", "choice_samples", "recalibrate")
"""What recipes that are tried side by side have in common."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that decides the result of a run beside the network, its loss and the data.

    Raises `ArgumentError` if a field is out of its range, or fields contradict each other.

    Parameters
    ----------
    sparsity : float or str
        Share of the eligible weights to remove, in [0, 1); or a pattern such as "2:4", in whose place is then
        its share.
    recipes : tuple of Recipe
        At least one; the one with the lowest training loss wins.
    stages : Stages, optional
    certify : Certify, optional
    seed : int, default 0
    pattern : NofM, optional
        How many of every m consecutive inputs are kept, where the sparsity is that of a pattern.
    """

    sparsity: float
    recipes: tuple[Recipe, ...] = field(default_factory=lambda: (Recipe(),))
    stages: Stages | None = None
    certify: Certify | None = None
    seed: int = 0
    pattern: NofM | None = None

    def __post_init__(self) -> None:
        share, pattern = checked_target("sparsity", self.sparsity)
        pattern = self.pattern if pattern is None else pattern
        if pattern is not None and share != share_of(pattern):
            remedy = f"pass sparsity={str(pattern)!r} alone"
            raise ArgumentError("pattern", f"{pattern} beside a sparsity of {share:g}", remedy)
        object.__setattr__(self, "sparsity", share)
        object.__setattr__(self, "pattern", pattern)
        check_fields(self, "", _recipes, "recipes")
        check_fields(self, "", _stages, "stages")
        check_fields(self, "", _certify, "certify")
        check_fields(self, "", seed_number, "seed", below=RUN_SEEDS)
        for number, recipe in enumerate(self.recipes):
            for name in SHARED:
                first, other = getattr(self.recipes[0], name), getattr(recipe, name)
                if other is not first and other != first:
                    found = f"{other!r}, where the first recipe has {first!r}"
                    remedy = "give recipes that are tried in one call the same, or call prune for each"
                    raise ArgumentError(f"recipe[{number}].{name}", found, remedy)
        if self.pattern is not None:
            self._check_pattern(self.pattern)
        if self.stages is not None:
            self._check_stages(self.stages)

    def _check_pattern(self, pattern: NofM) -> None:
        weights = self.recipes[0].weights
        for name in ("budget", "budget_score"):
            value = getattr(weights, name)
            if value not in ("global", "uniform", None):
                remedy = "leave it out: a pattern prunes the same share everywhere"
                raise ArgumentError(f"weights.{name}", f"{value!r} beside sparsity={str(pattern)!r}", remedy)
        if isinstance(weights.blocks, int) and weights.blocks % pattern.m:
            remedy = f"use a multiple of {pattern.m}"
            raise ArgumentError("weights.blocks", f"{weights.blocks} weights for {pattern}", remedy)

    def _check_stages(self, stages: Stages) -> None:
        stages.sparsities(self.sparsity, self.pattern)
        first = self.recipes[0]
        if not isinstance(first.curvature, Fisher):
            remedy = "name a curvature: every stage needs rows at its own weights"
            raise ArgumentError("recipe.curvature", "rows computed once, for a run in stages", remedy)
        if self.certify is not None:
            remedy = "use one stage: a bound holds for the model of one stage only"
            raise ArgumentError("certify", "given for a run in stages", remedy)
        if len({isinstance(recipe.damping, Absolute) for recipe in self.recipes}) > 1:
            found = "absolute and relative ones in one run in stages"
            raise ArgumentError("recipe.damping", found, "use one kind")
        for recipe in self.recipes:
            if recipe.layer_inputs != first.layer_inputs:
                found = f"{first.layer_inputs} and {recipe.layer_inputs} for a run in stages"
                remedy = "use one: in stages the damping scales the term, and is chosen by training loss"
                raise ArgumentError("recipe.layer_inputs", found, remedy)
            if recipe.update is not None and recipe.update.kind == "independent":
                found = "'independent' for a run in stages"
                raise ArgumentError("recipe.update", found, 'use "cbs", or None for no update')
            if recipe.update is None and (stages.updates > 1 or stages.final_updates):
                found = f"None with {stages.updates} updates a stage and {stages.final_updates} at the end"
                remedy = "use Stages(updates=1, final_updates=0)"
                raise ArgumentError("recipe.update", found, remedy)

    def pattern_at(self, sparsity: float) -> NofM | None:
        """Return the pattern of a stage of so high a sparsity, None where the run has none."""
        if self.pattern is None:
            return None
        return NofM(self.pattern.m - round(sparsity * self.pattern.m), self.pattern.m)

    @property
    def candidates(self) -> int:
        """How many pruned networks are tried."""
        return sum(1 if recipe.select is None else recipe.select.tries for recipe in self.recipes)


def _curvature(argument: str, value: Any) -> Fisher | Rows:
    if isinstance(value, str):
        return FISHERS[one_of(argument, value, FISHERS)]()
    if not isinstance(value, Fisher | Rows):
        remedy = f"pass one of {', '.join(record.__name__ for record in FISHERS.values())}, or Rows"
        raise ArgumentError(argument, f"a {type(value).__name__}", remedy)
    return value


def _damping(argument: str, value: Any) -> Damping:
    return value if isinstance(value, Absolute) else finite_number(argument, value)


def _rates(argument: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ArgumentError(argument, f"{value!r}", "pass a sequence of numbers > 0")
    return tuple(finite_number(argument, rate, above=True) for rate in value)


def _schedule(argument: str, value: Any) -> Schedule:
    if isinstance(value, str):
        return one_of(argument, value, SCHEDULES)
    if not isinstance(value, Iterable):
        raise ArgumentError(argument, f"{value!r}", "name a rule, or pass the sparsities, one a stage")
    return tuple(checked_sparsity(argument, share) for share in value)


def _recipes(_: str, value: Any) -> tuple[Recipe, ...]:
    recipes = (value,) if isinstance(value, Recipe) else tuple(value) if isinstance(value, Sequence) else ()
    if not recipes or not all(isinstance(recipe, Recipe) for recipe in recipes):
        raise ArgumentError("recipe", f"{value!r}", "pass a Recipe, or a sequence of them")
    return recipes


def _stages(argument: str, value: Any) -> Stages:
    return value if isinstance(value, Stages) else Stages(count=whole_number(argument, value))


def _certify(argument: str, value: Any) -> Certify | None:
    if isinstance(value, Certify):
        return value
    return Certify() if flag(argument, value) else None
