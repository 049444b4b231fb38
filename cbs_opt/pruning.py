"""`prune`: curvature, budget, selection, update, and the pruned weights written back in place."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.budget.counts import checked_sparsity, checked_target, removed_by
from cbs_opt.curvature.kinds import ExactFisher, Fisher
from cbs_opt.curvature.layer_inputs import default_layer_inputs
from cbs_opt.curvature.rows import Rows
from cbs_opt.curvature.run_size import RunSize, Way, check_fits, fitting, run_size, ways
from cbs_opt.describe import certified, describe
from cbs_opt.errors import UnmatchedPatternError
from cbs_opt.network.data import Data, LossFunction, device_of, sample_count
from cbs_opt.network.eligible import unwrapped
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import BlockRule, Partition
from cbs_opt.network.state import kept
from cbs_opt.network.trial import plain_attention, unchanged, write_back
from cbs_opt.oneshot import (
    Task,
    budget_fields,
    check_data,
    draw_sample,
    method_of,
    needs_curvature,
    one_shot,
    option_field,
    scoring_of,
    select_of,
    selects_by_rows,
    take_rows,
    term_of,
)
from cbs_opt.recalibration import recalibrated
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import Certify, Recipe, Request, Stages, Weights
from cbs_opt.recipe.select import GreedyOBS, Select, SwapSearch
from cbs_opt.report.record import PruneReport
from cbs_opt.resolution import Scene, resolved
from cbs_opt.runs.fingerprint import run_fingerprint
from cbs_opt.runs.folder import RunStore
from cbs_opt.runs.progress import RunProgress
from cbs_opt.select.joint_program.selectors import DENSE_JOINT
from cbs_opt.select.methods import Method, available_methods
from cbs_opt.select.preparation import prepare
from cbs_opt.stages.staged import Passes, StagedRun
from cbs_opt.system.checks import path, within
from cbs_opt.system.memory import free_memory
from cbs_opt.system.progress import Progress, reporting
from cbs_opt.system.resources import Resources
from cbs_opt.system.threads import fitting_limit
from formulations.errors import ArgumentError, UnknownMethodError, UnsupportedProblemError
from formulations.support import NofM, n_of_m

logger = logging.getLogger(__name__)

Result = tuple[Tensor, Mapping[str, Tensor], PruneReport]
"""The weights of a run, other tensors by name where they are new, and the record."""
STAGE_DROPS = 3
"""Drops of joint greedy OBS in every stage, by default."""


def prune(
    model: nn.Module,
    data: Data | None,
    *,
    sparsity: float | str | Mapping[str, float],
    recipe: Recipe | Sequence[Recipe] | Named | str = "balanced",
    loss_fn: LossFunction | None = None,
    stages: Stages | int | None = None,
    certify: Certify | bool = False,
    evaluate: Data | None = None,
    resources: Resources | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> PruneReport:
    """Prune a network in place; `pruned` leaves it as it is and returns a copy.

    The loss around the trained weights is modelled by its gradient rows; the recipe says how they are
    taken, which weights go, and how the others move to where the model puts its minimum. Where several
    networks are tried (several recipes, or repeats of a randomised method) the one with the lowest loss
    on training samples is kept.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Written to only at the very end: if anything raises or is interrupted
        it is as it was. Of a network in `torch.compile` or `DataParallel` the one inside is pruned, and names
        are its own.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        Training data. None is allowed for methods that need no curvature, without update.
    sparsity : float, str or mapping of str to float
        Share of the eligible weights to remove, in [0, 1); met exactly, ``n_prune = round(sparsity * n)``. A
        mapping has the share of every parameter by glob, the first that matches; others are left as they are.
        A pattern such as "2:4" keeps 2 of every 4 consecutive inputs of each output, at each place of a
        kernel; layers whose inputs 4 does not divide are left out.
    recipe : {"fast", "balanced", "best"}, Named, Recipe or sequence of Recipe, default "balanced"
        How to prune. A name becomes a concrete recipe for this network, its loss and its data, which
        ``report.recipe`` shows with what it was chosen by; `fast`, `balanced` and `best` make names with a
        budget. Of several recipes, which may differ in all but the curvature and the weights, the one with
        the lowest training loss wins; `Recipe.grid` makes them.
    loss_fn : callable, optional
        ``loss_fn(output, labels)``: the loss of a batch, of what the network returns; labels are None where
        there are none. A mean over samples or over those that count (class weights, ignored labels), a sum,
        or a loss of whole batches: which of them is found out, see `cbs_opt.network.objective`. By default
        the loss that the network itself returns; else cross-entropy, where labels are classes of samples,
        pixels or tokens; else that of the next token, of a causal network without labels.
    stages : Stages or int, optional
        Prune little by little: every stage takes gradient rows at the weights as they then are, selects,
        and updates within a trust region. By default as the named recipe has it; everything at once for
        others.
    certify : Certify or bool, default False
        Bound the optimum of the recipe's program in every block from below, in float64 on the CPU, block
        after block, and report how far above it the chosen set can be at most. The sum over blocks
        bounds the block-diagonal quadratic model of the loss: it says nothing about accuracy. A recipe by
        name then has one stage and no fine-tuning.
    evaluate : DataLoader, iterable of (x, y), or pair of tensors (X, y), optional
        Held-out data to report loss and accuracy on, before and after. Never used for a choice.
    resources : Resources, optional
        Workers, memory and disk; they decide nothing.
    run_dir : path, optional
        Keep there what was computed, as it is computed: gradient rows, moments of layer inputs, the sets
        of exact blocks, certificates, stages, and the result. The same call on the same directory goes
        on where the last one was stopped or killed, and ends with the same weights and report, bit for
        bit; on a finished run it returns at once. Another network, data, option, version, processor or
        number of threads is refused, with the difference named, and so are a second process in the
        directory and a directory of other files. A loader must give the same samples again in every
        pass; a time limit counts anew, and what it cuts short may differ.
    seed : int, default 0
    progress : bool or Progress, default True
        Show bars where standard error is a terminal; or what is told of every step, an object of a subclass
        of `Progress`.

    Returns
    -------
    PruneReport
        ``report.request`` says what was used, chosen or given, ``report.left_out`` which parameters were
        not pruned and why, ``report.notes`` what was changed to fit the machine, and ``report.warnings``
        what looks wrong with the pruned network.

    Raises
    ------
    CbsError
        A subclass names the argument, what was found and what to do.

    Examples
    --------
    >>> report = prune(model, (x, y), sparsity=0.9, evaluate=(x_test, y_test))  # doctest: +SKIP
    >>> print(report.summary())  # doctest: +SKIP
    """
    path("run_dir", run_dir)
    model = unwrapped(model)
    told = reporting(progress)
    objective = Objective.of(loss_fn)
    if isinstance(recipe, Named) and recipe.seconds is not None and run_dir is not None:
        remedy = "give samples=, or leave run_dir out: what a time allows is different in every run"
        raise ArgumentError("recipe.seconds", "given for a run that can be resumed", remedy)
    prepared = _prepared(model, data, sparsity, recipe, stages, certify, resources, seed, objective)
    request, partition, resources = prepared.request, prepared.partition, prepared.resources
    with within("resources", "row_memory", "row_dir", memory="row_memory"):
        check_fits(prepared.size, prepared.free, prepared.remedy)
    for note in prepared.notes:
        logger.warning("%s", note)
    for select in map(select_of, request.recipes):
        if request.stages is not None or _has_kernels(select, partition):
            prepare(select.method, select.program)
        if request.certify is not None:
            prepare("lower_bound", select.program)
    with unchanged(model, partition), kept(model), plain_attention(), ExitStack() as opened:
        opened.enter_context(fitting_limit(prepared.size.row_bytes))
        check_data(request, data)
        task = Task(
            model=model,
            partition=partition,
            weights=partition.flatten(model),
            data=data,
            loss_fn=objective,
            request=request,
            resources=resources,
            sample=None,
            progress=told,
            notes=prepared.notes,
            choices=prepared.choices,
        )
        passes = Passes(task)
        if data is not None:
            most = task.recipe.choice_samples or task.recipe.samples
            once = request.stages is None
            sample = draw_sample(model, data, most, request.seed) if once else passes.sample()
            task = replace(task, sample=sample)
        if run_dir is not None:
            fingerprint = run_fingerprint(
                model,
                partition,
                loss_fn,
                request,
                task.sample or [],
                chunk_memory=resources.chunk_memory,
                held_out=evaluate,
            )
            store = opened.enter_context(RunStore(run_dir, fingerprint))
            task = replace(task, done=RunProgress(store, task.weights.device))
        staged = None if request.stages is None else StagedRun(task, passes)
        result = _finished(task, staged)
        if result is None:
            result = _run(task, staged, evaluate, opened)
        weights, others, report = result
    write_back(model, partition, weights, others)
    return report


def pruned(model: nn.Module, data: Data | None, **options: Any) -> tuple[nn.Module, PruneReport]:
    """Return a pruned copy of a network, and the report; the network itself is not touched.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Anything that `copy.deepcopy` copies.
    data
        As for `prune`.
    **options
        Those of `prune`, of which ``sparsity`` must be given.

    Returns
    -------
    tuple of nn.Module and PruneReport
        The copy, all that a run takes in memory beyond `prune`, and the record of its pruning.

    Raises
    ------
    ArgumentError
        If the network cannot be copied; known before anything else is done.
    CbsError
        What `prune` raises.

    Examples
    --------
    >>> small, report = pruned(model, (x, y), sparsity=0.9)  # doctest: +SKIP
    """
    try:
        copy = deepcopy(model)
    except Exception as error:
        # What makes a copy fail is the network's own, and may be anything.
        found = f"it cannot be copied ({type(error).__name__}: {error})"
        remedy = "detach tensors it keeps, or use prune, which works in place"
        raise ArgumentError("model", found, remedy) from error
    return copy, prune(copy, data, **options)


def plan(
    model: nn.Module,
    data: Data | None,
    *,
    sparsity: float | str | Mapping[str, float],
    recipe: Recipe | Sequence[Recipe] | Named | str = "balanced",
    loss_fn: LossFunction | None = None,
    stages: Stages | int | None = None,
    certify: Certify | bool = False,
    resources: Resources | None = None,
    seed: int = 0,
) -> RunSize:
    """Return the size of a run of `prune`, with an estimate of its peak memory, without doing it.

    Parameters
    ----------
    model, data, sparsity, recipe, loss_fn, stages, certify, resources, seed
        As for `prune`; all are checked. For a recipe by name the network is run on a few samples; for others
        no data are read, and the network is not run.

    Raises
    ------
    CbsError
        What `prune` would raise before it reads data, but for a run that does not fit: the size says so.

    Examples
    --------
    >>> print(plan(model, (x, y), sparsity=0.9).summary())  # doctest: +SKIP
    """
    model = unwrapped(model)
    objective = Objective.of(loss_fn)
    return _prepared(model, data, sparsity, recipe, stages, certify, resources, seed, objective).size


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A run whose arguments were checked, with all defaults made concrete.

    `notes` say what was changed or left out, `choices` what a recipe by name was chosen by, `free` are the
    bytes of memory that it may take, and `remedy` is what to do where it needs more.
    """

    request: Request
    partition: Partition
    resources: Resources
    size: RunSize
    free: int
    notes: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    remedy: str = ""


def _prepared(
    model: nn.Module,
    data: Data | None,
    sparsity: float | str | Mapping[str, float],
    recipe: Recipe | Sequence[Recipe] | Named | str,
    stages: Stages | int | None,
    certify: Certify | bool,
    resources: Resources | None,
    seed: int,
    objective: Objective,
) -> _Prepared:
    """Check all arguments, make defaults concrete, and change what may be changed to fit the machine."""
    if resources is not None and not isinstance(resources, Resources):
        raise ArgumentError("resources", f"a {type(resources).__name__}", "pass a Resources record")
    resources = Resources() if resources is None else resources
    recipes: Any = recipe
    choices: tuple[str, ...] = ()
    if isinstance(recipe, str | Named):
        named = Named(name=recipe) if isinstance(recipe, str) else recipe
        recipes, stages, choices = _by_name(named, model, data, sparsity, stages, certify, objective)
    if isinstance(sparsity, Mapping):
        sparsity, recipes = _by_glob(model, sparsity, Request(sparsity=0.0, recipes=recipes).recipes)
    request = Request(
        sparsity=sparsity,  # type: ignore[arg-type]
        recipes=recipes,
        stages=stages,  # type: ignore[arg-type]
        certify=certify,  # type: ignore[arg-type]
        seed=seed,
    )
    request = replace(request, recipes=tuple(_with_method(entry, request) for entry in request.recipes))
    _check_methods(request, resources)
    if request.stages is not None and resources.row_memory is not None:
        remedy = "use one stage, or leave it out"
        raise ArgumentError("resources.row_memory", "given for a run in stages", remedy)
    weights = request.recipes[0].weights
    partition = _partition(model, weights, weights.blocks or weights.default_blocks, request.pattern)
    _check_budget(request, partition)
    notes: list[str] = []
    recipes = tuple(_with_layer_inputs(entry, request, partition, notes) for entry in request.recipes)
    request = replace(request, recipes=recipes)
    prepared = _fitted(model, request, resources, data)
    rows = request.recipes[0].curvature
    if isinstance(rows, Rows):
        rows.check(prepared.partition)
    _check_searches(prepared.request, prepared.partition)
    return replace(prepared, notes=(*prepared.size.changes, *dict.fromkeys(notes)), choices=choices)


def _by_name(
    named: Named,
    model: nn.Module,
    data: Data | None,
    sparsity: float | str | Mapping[str, float],
    stages: Stages | int | None,
    certify: Certify | bool,
    objective: Objective,
) -> tuple[tuple[Recipe, ...], Stages | None, tuple[str, ...]]:
    """Return recipes and stages that a name stands for here, and what they were chosen by."""
    weights = named.with_changes(Recipe(weights=named.weights)).weights
    if isinstance(sparsity, Mapping):
        sparsity = _by_glob(model, sparsity, (Recipe(weights=weights),))[0]
    target, pattern = checked_target("sparsity", sparsity)
    asked = Request(sparsity=target, pattern=pattern, stages=stages).stages  # type: ignore[arg-type]
    if data is None:
        # Whether it can be done without is found out later.
        return (named.with_changes(Recipe(weights=weights)),), asked, ()
    partition = _partition(model, weights, weights.blocks or weights.default_blocks, pattern)
    found = resolved(
        named,
        Scene(
            model=model,
            data=data,
            objective=objective,
            partition=partition,
            sparsity=target,
            pattern=pattern,
            stages=asked,
            certify=certify is not False,
            free=_free(model),
        ),
    )
    return found.recipes, found.stages, found.choices


def _by_glob(
    model: nn.Module, sparsity: Mapping[str, float], recipes: tuple[Recipe, ...]
) -> tuple[float, tuple[Recipe, ...]]:
    """Return the sparsity that a mapping comes to, and the recipes with a budget that says the same."""
    weights = recipes[0].weights
    if weights.budget != "global":
        remedy = "leave weights.budget out: the mapping says what it would"
        raise ArgumentError("sparsity", "a mapping beside weights.budget", remedy)
    for glob, share in sparsity.items():
        if isinstance(share, str) and n_of_m(share) is not None:
            remedy = f"pass sparsity={share!r}, and name its parameters in weights.target"
            raise UnsupportedProblemError(f"sparsity[{glob!r}]", f"{share!r} in a mapping", remedy)
    shares = {str(glob): checked_sparsity(f"sparsity[{glob!r}]", share) for glob, share in sparsity.items()}
    partition = _partition(model, weights, "layer", None)
    try:
        removed = removed_by(partition, 0.0, shares)
    except UnmatchedPatternError as error:
        raise UnmatchedPatternError("sparsity", error.found, error.remedy) from error
    weights = replace(weights, budget={**shares, "*": shares.get("*", 0.0)})
    return removed / partition.n, tuple(replace(recipe, weights=weights) for recipe in recipes)


def _check_budget(request: Request, partition: Partition) -> None:
    """Raise `ArgumentError` if sparsities by parameter come to another one than is asked for."""
    budget = request.recipes[0].weights.budget
    if not isinstance(budget, Mapping):
        return
    with budget_fields():
        removed = removed_by(partition, request.sparsity, budget)
    if abs(removed - request.sparsity * partition.n) > len(partition.parameters):
        found = f"it comes to {removed / partition.n:.4g} where sparsity={request.sparsity:g} is asked for"
        remedy = (
            "pass the mapping as sparsity={...} (what no glob matches is left as it is), or make them agree"
        )
        raise ArgumentError("weights.budget", found, remedy)


def _fitted(model: nn.Module, request: Request, resources: Resources, data: Data | None) -> _Prepared:
    """Return the run in the first way that fits the machine, or as it was asked for if none does."""
    recipe, free = request.recipes[0], _free(model)
    curvature, weights = recipe.curvature, recipe.weights
    asked = Way(blocks=weights.blocks or weights.default_blocks, per_row=getattr(curvature, "per_row", 1))
    fresh = isinstance(curvature, Fisher)
    can_average = fresh and not isinstance(curvature, ExactFisher)
    # A limit of the caller is met by cutting blocks, or not at all.
    averages = can_average and asked.per_row == 1 and resources.row_memory is None

    cut = cache(lambda blocks: _partition(model, weights, blocks, request.pattern))

    def at(way: Way) -> tuple[Request, Partition, Resources, RunSize]:
        partition = cut(way.blocks)
        changed = replace(weights, blocks=way.blocks) if weights.blocks is None else weights
        same = way.per_row == asked.per_row
        kind = curvature if same else replace(curvature, per_row=way.per_row)  # type: ignore[arg-type]
        entries = [replace(entry, weights=changed, curvature=kind) for entry in request.recipes]
        run = replace(request, recipes=tuple(entries))
        place = resources
        if way.on_disk and resources.row_memory is None:
            size = _size(model, run, partition, resources, data)
            place = replace(resources, row_memory=size.largest_block_bytes)
        return run, partition, place, _size(model, run, partition, place, data)

    whole = at(asked)[-1]

    def possible(*, cut: bool, average: bool) -> tuple[Way, RunSize] | None:
        disk = fresh and request.stages is None
        chosen = ways(asked, whole.rows, cut=cut and fresh, average=average, disk=disk)
        return fitting(chosen, lambda way: at(way)[-1], free)

    placed = whole.row_dir is None or Path(whole.row_dir).is_dir()
    found = possible(cut=weights.blocks is None, average=averages) if placed else None
    remedy = "prune a part of the network (weights.target), or free some memory"
    if found is None and fresh and placed:
        freer = possible(cut=True, average=can_average)
        if freer is not None:
            remedy = f"what would fit: {'; '.join(freer[1].changes)} (leave weights.blocks and per_row out)"
    way, size = (asked, whole) if found is None else found
    run, partition, place, _ = at(way)
    return _Prepared(request=run, partition=partition, resources=place, size=size, free=free, remedy=remedy)


def _free(model: nn.Module) -> int:
    """Return the bytes of memory that the run may take where its rows are."""
    device = device_of(model)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def _partition(model: nn.Module, weights: Weights, rule: BlockRule, pattern: NofM | None) -> Partition:
    chosen: dict[str, Any] = {"target": weights.target, "ignore": weights.ignore, "pattern": pattern}
    with within("weights", "target", "ignore", "blocks", **{"target, ignore": "target, ignore"}):
        return Partition.from_model(model, blocks=rule, **chosen)


def _size(
    model: nn.Module, request: Request, partition: Partition, resources: Resources, data: Data | None
) -> RunSize:
    curvature = request.recipes[0].curvature
    fresh = isinstance(curvature, Fisher)
    return run_size(
        partition,
        None if fresh and not needs_curvature(request) else curvature,
        layer_inputs=any(recipe.layer_inputs for recipe in request.recipes),
        in_double=request.certify is not None or any(map(_copies_rows, request.recipes)),
        resources=resources,
        itemsize=max(4, *(tensor.element_size() for tensor in partition.tensors(model).values())),
        available=None if data is None else sample_count(data),
        staged=request.stages is not None,
    )


def _copies_rows(recipe: Recipe) -> bool:
    """Whether the method works on a copy of a block's rows in float64."""
    method = method_of(recipe)
    by_channels = bool(recipe.layer_inputs) and not selects_by_rows(recipe)
    return method.kind != "saliency" and method.name != "greedy_obs" and not by_channels


def _with_method(recipe: Recipe, request: Request) -> Recipe:
    """Return the recipe with a method: exchanges pay in one stage, further stages more."""
    default = SwapSearch() if request.stages is None else GreedyOBS(drops=STAGE_DROPS)
    return recipe if recipe.select is not None else replace(recipe, select=default)


def _with_layer_inputs(recipe: Recipe, request: Request, partition: Partition, notes: list[str]) -> Recipe:
    """Return the recipe with a weight of the layer-input term; `notes` takes why it is 0 by default."""
    if not needs_curvature(request):
        if recipe.layer_inputs:
            found = f"{recipe.layer_inputs} for a recipe that needs no curvature"
            raise ArgumentError("recipe.layer_inputs", found, "leave it out")
        return replace(recipe, layer_inputs=0.0)
    if recipe.layer_inputs is not None:
        return recipe
    if not isinstance(recipe.curvature, Fisher):
        term = recipe.curvature.channels
        return replace(recipe, layer_inputs=0.0 if term is None else term.weight)
    weight, why = default_layer_inputs(partition)
    notes += [why] if why else []
    return replace(recipe, layer_inputs=weight)


def _check_methods(request: Request, resources: Resources) -> None:
    for recipe in request.recipes:
        select = select_of(recipe)
        with within("select", "method", "program"):
            method = method_of(recipe)
        if request.pattern is not None:
            _check_pattern(select, method, request.pattern)
        for name, value in select.method_options.items():
            with within("select", method_options=option_field(select, name)):
                method.check_options({name: value}, select.program)
        score = recipe.weights.budget_score
        scores = [entry.name for entry in available_methods() if entry.kind == "saliency"]
        if score is not None and score not in scores:
            remedy = f"choose among {', '.join(scores)}"
            raise UnknownMethodError("weights.budget_score", f"{score!r}", remedy)
        scoring_of(recipe)
        if select.tries > 1 and not method.randomized:
            found = f"{select.tries} for {method.name}"
            raise ArgumentError("select.repeats", found, "it has no random choice: use 1")
        if resources.workers is not None and not method.blockwise:
            found = f"given for {method.name} on program {select.program!r}, which takes all blocks at once"
            remedy = 'leave it out, or use a method that takes a block at a time, such as "branch_and_bound"'
            raise ArgumentError("resources.workers", found, remedy)


def _check_pattern(select: Select, method: Method, pattern: NofM) -> None:
    """Raise `UnsupportedProblemError` if a method cannot keep to a pattern."""
    with within("select", support="method"):
        method.for_support(pattern)
    starts = getattr(select, "start", None) or ()
    if "randomized_magnitude" in ((starts,) if isinstance(starts, str) else starts):
        found = f"'randomized_magnitude' for {pattern}"
        raise UnsupportedProblemError("select.start", found, "start from a saliency or greedy_obs")


def _has_kernels(select: Select, partition: Partition) -> bool:
    """Whether blocks as they are without stages are searched by something compiled."""
    if not isinstance(select, GreedyOBS) or select.program == "selection":
        return True
    limit = DENSE_JOINT if select.dense_limit is None else select.dense_limit
    return any(block.stop - block.start <= limit for block in partition.blocks)


def _check_searches(request: Request, partition: Partition) -> None:
    """Raise `UnsupportedProblemError` for what swap searches of large blocks with layer inputs cannot do."""
    largest = max(block.stop - block.start for block in partition.blocks)
    for select, recipe in zip(map(select_of, request.recipes), request.recipes, strict=True):
        if not isinstance(select, SwapSearch) or select.program == "selection" or not term_of(recipe):
            continue
        limit = DENSE_JOINT if select.dense_limit is None else select.dense_limit
        starts = (select.start,) if isinstance(select.start, str) else select.start or ()
        rows_alone = [name for name in starts if name in ("relaxation", "iterative_hard_threshold")]
        unable = {"restarts": select.restarts, "start": ", ".join(rows_alone)}
        for name, value in unable.items() if largest > limit else ():
            if value:
                found = f"{value} for a block of {largest} weights with layer inputs"
                raise UnsupportedProblemError(f"select.{name}", found, "leave it out, or use layer_inputs=0")


def _finished(task: Task, staged: StagedRun | None) -> Result | None:
    """Return weights and report of a run that is finished, after all its stages were announced."""
    certify = task.request.certify
    result = task.done.finished(task.partition, None if certify is None else certify.block_dir)
    if result is not None and staged is not None and not staged.resume():
        return None
    return result


def _run(task: Task, staged: StagedRun | None, held_out: Data | None, opened: ExitStack) -> Result:
    certify = task.request.certify
    if staged is not None:
        best, note = recalibrated(task, staged.run(), staged.sample())
        task = replace(task, notes=(*task.notes, note) if note else task.notes)
        report = describe(task, best, None, held_out, state=staged.state)
    else:
        rows = take_rows(task)
        if rows is not None and rows is not task.recipe.curvature:
            opened.callback(rows.close)
        best, model = one_shot(task, rows)
        best, note = recalibrated(task, best, task.sample or [])
        task = replace(task, notes=(*task.notes, note) if note else task.notes)
        report = describe(task, best, model, held_out)
        if certify is not None:
            report = certified(task, best, model, report)
    keeps_steps = certify is not None and certify.block_dir is not None
    task.done.finish(best.weights, best.keep, best.others or {}, report, steps_stay=keeps_steps)
    return best.weights, best.others or {}, report
