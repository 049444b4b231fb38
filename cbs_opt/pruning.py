"""`prune`: curvature, budget, selection, update, and the pruned weights written back in place."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor, nn

from cbs_opt.curvature.kinds import Fisher
from cbs_opt.curvature.layer_inputs import default_layer_inputs
from cbs_opt.curvature.rows import Rows
from cbs_opt.curvature.run_size import RunSize, check_fits, fitting_blocks, run_size
from cbs_opt.describe import certified, describe
from cbs_opt.hessian.channel_system import DENSE_LIMIT
from cbs_opt.network.data import Data, LossFunction, sample_count
from cbs_opt.network.partition import BlockRule, Partition
from cbs_opt.network.trial import unchanged, write_back
from cbs_opt.oneshot import (
    Task,
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
)
from cbs_opt.recipe.records import Certify, Recipe, Request, Stages, Weights, recipe_by_name
from cbs_opt.recipe.select import GreedyOBS, SwapSearch
from cbs_opt.report.record import PruneReport
from cbs_opt.runs.fingerprint import run_fingerprint
from cbs_opt.runs.folder import RunStore
from cbs_opt.runs.progress import RunProgress
from cbs_opt.select.methods import available_methods
from cbs_opt.select.preparation import prepare
from cbs_opt.stages.staged import Passes, StagedRun
from cbs_opt.system.checks import path, within
from cbs_opt.system.resources import Resources
from cbs_opt.system.threads import fitting_limit
from formulations.errors import ArgumentError, UnknownMethodError, UnsupportedProblemError

logger = logging.getLogger(__name__)

STAGE_DROPS = 3
"""Drops of joint greedy OBS in every stage, by default."""


def prune(
    model: nn.Module,
    data: Data | None,
    *,
    sparsity: float,
    recipe: Recipe | Sequence[Recipe] | str = "balanced",
    loss_fn: LossFunction = nn.functional.cross_entropy,
    stages: Stages | int | None = None,
    certify: Certify | bool = False,
    evaluate: Data | None = None,
    resources: Resources | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PruneReport:
    """Prune a network in place.

    The loss around the trained weights is modelled by its gradient rows; the recipe says how they are
    taken, which weights go, and how the others move to where the model puts its minimum. Where several
    networks are tried (several recipes, or repeats of a randomised method) the one with the lowest loss
    on training samples is kept.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Written to only at the very end: if anything raises or is interrupted
        it is as it was.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        Training data. None is allowed for methods that need no curvature, without update.
    sparsity : float
        Share of the eligible weights to remove, in [0, 1); met exactly, ``n_prune = round(sparsity * n)``.
    recipe : Recipe, sequence of Recipe, or str, default "balanced"
        How to prune. Of several recipes, which may differ in all but the curvature and the weights, the
        one with the lowest training loss wins; `Recipe.grid` makes them. A name is one of
        `cbs_opt.recipe.records.NAMED`.
    loss_fn : callable, default cross-entropy
        ``loss_fn(output, y)``: the mean loss of a batch.
    stages : Stages or int, optional
        Prune little by little: every stage takes gradient rows at the weights as they then are, selects,
        and updates within a trust region. By default everything goes at once.
    certify : Certify or bool, default False
        Bound the optimum of the recipe's program in every block from below, in float64 on the CPU, block
        after block, and report how far above it the chosen set can be at most. The sum over blocks
        bounds the block-diagonal quadratic model of the loss: it says nothing about accuracy.
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
    progress : bool, default True
        Show bars where standard error is a terminal.

    Returns
    -------
    PruneReport
        ``report.request`` says what was used, chosen or given.

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
    prepared = _prepared(model, data, sparsity, recipe, stages, certify, resources, seed)
    request, partition, resources, size = prepared
    with within("resources", "row_memory", "row_dir", memory="row_memory"):
        check_fits(size)
    for select in map(select_of, request.recipes):
        prepare(select.method, select.program)
        if request.certify is not None:
            prepare("lower_bound", select.program)
    with unchanged(model, partition), ExitStack() as opened:
        opened.enter_context(fitting_limit(size.row_bytes))
        check_data(request, data)
        task = Task(
            model=model,
            partition=partition,
            weights=partition.flatten(model),
            data=data,
            loss_fn=loss_fn,
            request=request,
            resources=resources,
            sample=None,
            progress=progress,
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
        weights, report = result
    write_back(model, partition, weights)
    return report


def plan(
    model: nn.Module,
    data: Data | None,
    *,
    sparsity: float,
    recipe: Recipe | Sequence[Recipe] | str = "balanced",
    stages: Stages | int | None = None,
    certify: Certify | bool = False,
    resources: Resources | None = None,
    seed: int = 0,
) -> RunSize:
    """Return the size of a run of `prune`, with an estimate of its peak memory, without doing it.

    Parameters
    ----------
    model, data, sparsity, recipe, stages, certify, resources, seed
        As for `prune`; all are checked. No data are read, and the network is not run.

    Raises
    ------
    CbsError
        What `prune` would raise before it reads data, but for a run that does not fit: the size says so.

    Examples
    --------
    >>> print(plan(model, (x, y), sparsity=0.9).summary())  # doctest: +SKIP
    """
    return _prepared(model, data, sparsity, recipe, stages, certify, resources, seed)[-1]


def _prepared(
    model: nn.Module,
    data: Data | None,
    sparsity: float,
    recipe: Recipe | Sequence[Recipe] | str,
    stages: Stages | int | None,
    certify: Certify | bool,
    resources: Resources | None,
    seed: int,
) -> tuple[Request, Partition, Resources, RunSize]:
    """Check all arguments, make defaults concrete, and cut the weights into blocks that fit in memory."""
    if resources is not None and not isinstance(resources, Resources):
        raise ArgumentError("resources", f"a {type(resources).__name__}", "pass a Resources record")
    resources = Resources() if resources is None else resources
    request = Request(
        sparsity=sparsity,
        recipes=recipe_by_name(recipe) if isinstance(recipe, str) else recipe,  # type: ignore[arg-type]
        stages=stages,  # type: ignore[arg-type]
        certify=certify,  # type: ignore[arg-type]
        seed=seed,
    )
    request = replace(request, recipes=tuple(_with_method(entry, request) for entry in request.recipes))
    _check_methods(request, resources)
    weights = request.recipes[0].weights
    partition = _partition(model, weights, weights.blocks or "global")
    recipes = [_with_layer_inputs(entry, request, partition) for entry in request.recipes]
    request = replace(request, recipes=tuple(recipes))
    size = _size(model, request, partition, resources, data)
    if weights.blocks is None:
        rule, row_memory = fitting_blocks(size)
        if rule != "global":
            text = 'rows of %s weights do not fit in memory: blocks are cut by "%s"'
            logger.warning(text, partition.n, rule)
            partition = _partition(model, weights, rule)
            resources = replace(resources, row_memory=row_memory)
            size = _size(model, request, partition, resources, data)
        recipes = [replace(entry, weights=replace(entry.weights, blocks=rule)) for entry in request.recipes]
        request = replace(request, recipes=tuple(recipes))
    rows = request.recipes[0].curvature
    if isinstance(rows, Rows):
        rows.check(partition)
    _check_certifiable(request, partition)
    if request.stages is not None and resources.row_memory is not None:
        remedy = "use one stage, or leave it out"
        raise ArgumentError("resources.row_memory", "given for a run in stages", remedy)
    return request, partition, resources, size


def _partition(model: nn.Module, weights: Weights, rule: BlockRule) -> Partition:
    with within("weights", "target", "ignore", "blocks", **{"target, ignore": "target, ignore"}):
        return Partition.from_model(model, target=weights.target, ignore=weights.ignore, blocks=rule)


def _size(
    model: nn.Module, request: Request, partition: Partition, resources: Resources, data: Data | None
) -> RunSize:
    curvature = request.recipes[0].curvature
    fresh = isinstance(curvature, Fisher)
    return run_size(
        partition,
        None if fresh and not needs_curvature(request) else curvature,
        layer_inputs=any(recipe.layer_inputs for recipe in request.recipes),
        resources=resources,
        itemsize=max(4, *(tensor.element_size() for tensor in partition.tensors(model).values())),
        available=None if data is None else sample_count(data),
        staged=request.stages is not None,
    )


def _with_method(recipe: Recipe, request: Request) -> Recipe:
    """Return the recipe with a method: exchanges pay in one stage, further stages more."""
    default = SwapSearch() if request.stages is None else GreedyOBS(drops=STAGE_DROPS)
    return recipe if recipe.select is not None else replace(recipe, select=default)


def _with_layer_inputs(recipe: Recipe, request: Request, partition: Partition) -> Recipe:
    if recipe.layer_inputs is not None:
        return recipe
    if not isinstance(recipe.curvature, Fisher):
        term = recipe.curvature.channels
        return replace(recipe, layer_inputs=0.0 if term is None else term.weight)
    return replace(recipe, layer_inputs=default_layer_inputs(partition) if needs_curvature(request) else 0.0)


def _check_methods(request: Request, resources: Resources) -> None:
    for recipe in request.recipes:
        select = select_of(recipe)
        with within("select", "method", "program"):
            method = method_of(recipe)
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


def _check_certifiable(request: Request, partition: Partition) -> None:
    """Raise `UnsupportedProblemError` if bounds for the largest block would need its whole Hessian."""
    largest = max(block.stop - block.start for block in partition.blocks)
    for recipe in request.recipes if request.certify is not None else ():
        if recipe.layer_inputs and not selects_by_rows(recipe) and largest > DENSE_LIMIT:
            found = f"True with a layer-input term and a block of {largest} weights"
            remedy = f"cut blocks of at most {DENSE_LIMIT} (weights.blocks), or use layer_inputs=0"
            raise UnsupportedProblemError("certify", found, remedy)


def _finished(task: Task, staged: StagedRun | None) -> tuple[Tensor, PruneReport] | None:
    """Return weights and report of a run that is finished, after all its stages were announced."""
    certify = task.request.certify
    result = task.done.finished(task.partition, None if certify is None else certify.block_dir)
    if result is not None and staged is not None and not staged.resume():
        return None
    return result


def _run(
    task: Task, staged: StagedRun | None, held_out: Data | None, opened: ExitStack
) -> tuple[Tensor, PruneReport]:
    certify = task.request.certify
    if staged is not None:
        best = staged.run()
        report = describe(task, best, None, held_out, state=staged.state)
    else:
        rows = take_rows(task)
        if rows is not None and rows is not task.recipe.curvature:
            opened.callback(rows.close)
        best, model = one_shot(task, rows)
        report = describe(task, best, model, held_out)
        if certify is not None:
            report = certified(task, best, model, report)
    keeps_steps = certify is not None and certify.block_dir is not None
    task.done.finish(best.weights, best.keep, report, steps_stay=keeps_steps)
    return best.weights, report
