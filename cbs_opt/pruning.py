"""`prune`: curvature, budget, selection, update, and the pruned weights written back in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from cbs_opt.budget.counts import Budget
from cbs_opt.budget.schedule import Schedule
from cbs_opt.curvature.fisher import MEMORY_LIMIT, GradientRows
from cbs_opt.curvature.layer_inputs import default_layer_inputs
from cbs_opt.curvature.rows import RowPlace, StoredRows
from cbs_opt.execution.workers import Workers, lasting
from cbs_opt.network.data import Data, LossFunction
from cbs_opt.network.guard import unchanged
from cbs_opt.network.partition import BlockRule, Partition
from cbs_opt.network.targets import Globs
from cbs_opt.network.trial import write_back
from cbs_opt.oneshot import PruneRun
from cbs_opt.plan.prune_plan import OnPlan, plan_of
from cbs_opt.preparation import prepare
from cbs_opt.prune_options import (
    DAMPING,
    PruneOptions,
    alternatives,
    check_certifiable,
    checked_score,
    chosen_method,
    grid,
    update_kind,
)
from cbs_opt.report.record import PruneReport
from cbs_opt.runs.folder import RunStore
from cbs_opt.stage_options import check_one_stage, check_stageable, stage_options
from cbs_opt.stages.staged import OnStage, StagedRun
from formulations.errors import ArgumentError


def prune(
    model: nn.Module,
    data: Data | None,
    *,
    sparsity: float,
    loss_fn: LossFunction = nn.functional.cross_entropy,
    program: str = "joint",
    method: str | None = None,
    update: bool | str = True,
    update_scale: float | Sequence[float] = 1.0,
    curvature: str | GradientRows | StoredRows = "empirical_fisher",
    samples: int = 1000,
    samples_per_row: int = 1,
    damping: float | Sequence[float] | None = None,
    relative_damping: bool = False,
    selection_damping: float | None = None,
    gradient_term: bool = False,
    layer_inputs: float | Sequence[float] | None = None,
    partition: BlockRule = "global",
    budget: Budget = "global",
    budget_score: str | None = None,
    target: Globs | None = None,
    ignore: Globs = (),
    restarts: int = 1,
    choice_samples: int | None = None,
    evaluate: Data | None = None,
    method_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    time_limit: float | None = None,
    stages: int = 1,
    schedule: Schedule = "geometric",
    start_sparsity: float | None = None,
    updates_per_stage: int | None = None,
    final_updates: int | None = None,
    gradient_samples: int | None = None,
    on_stage: OnStage | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    executor: Workers | Executor | Callable[[], Executor] | int | None = None,
    certify: bool = False,
    certify_time_limit: float | None = None,
    block_dir: str | os.PathLike[str] | None = None,
    memory_limit: int = MEMORY_LIMIT,
    row_memory: int | None = None,
    row_dir: str | os.PathLike[str] | None = None,
    on_plan: OnPlan | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PruneReport:
    """Prune a network in place.

    The loss around the trained weights is modelled by its gradient rows; `method` chooses which
    weights go, and the others move to where the model puts its minimum (CBS-U). Where several
    networks are tried (restarts, grids of damping and step length) the one with the lowest loss on
    training samples is kept.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Written to only at the very end: if anything raises or is interrupted
        it is as it was.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        Training data. None is allowed for methods that need no curvature, without update.
    sparsity : float
        Share of the eligible weights to remove, in [0, 1); met exactly,
        ``n_prune = round(sparsity * n)``.
    loss_fn : callable, default cross-entropy
        ``loss_fn(output, y)``: the mean loss of a batch.
    program : {"joint", "selection"}, default "joint"
        The program that `method` solves. "joint" accounts for the update while selecting.
    method : str, optional
        See `available_methods`. By default "swap_search", and "greedy_obs" in three drops a stage where
        the joint program is solved in stages.
    update : bool or "independent", default True
        Move the kept weights by CBS-U; "independent" adds up single-weight OBS updates instead.
    update_scale : float or sequence of float, default 1
        Step length of the update, or a grid to choose from by training loss.
    curvature : str, GradientRows or StoredRows, default "empirical_fisher"
        What `gradient_rows` computes: "empirical_fisher", "exact_fisher", "monte_carlo_fisher" or
        "sketched_fisher"; or its result for these very weights: computed once, it serves many
        sparsities and methods.
    samples, samples_per_row : int, default 1000 and 1
        Training samples, and how many are averaged into one gradient row.
    damping : float or sequence of float, optional
        Added to the diagonal of the Fisher matrix, or a grid to choose from by training loss. By default
        a tenth of the mean of that diagonal.
    relative_damping : bool, default False
        Give `damping` (and `selection_damping`) in units of the mean diagonal of the Fisher matrix.
    selection_damping : float, optional
        Another damping while selecting; by default the same.
    gradient_term : bool, default False
        Keep the gradient in the model of the loss while selecting. At a trained minimum, and after an
        update brought the network to one, it is mostly sampling noise. Updates without selection, in
        stages, always follow it.
    layer_inputs : float or sequence of float, optional
        Weight of the layer-input term, or a grid to choose from by training loss: a block-diagonal part
        of the Hessian, one block an output channel, made of the second moments of what its layer is fed
        and scaled to this many times the mean diagonal of the rows there. It has full rank, where the
        rows leave most directions unseen. 0 is without. By default 1; for given `GradientRows` what they
        bring; and 0 where layers are so wide that factorising the term, ``sum out * fan_in^3``, takes
        over 10^12 multiplications. Saliencies, the update and, under the joint program, `greedy_obs` and
        `swap_search` take it in blocks of any size, certificates and dense methods up to 4 096 weights;
        the swap search of the selection program goes by the rows. See `cbs_opt.curvature.layer_inputs`.
    partition : {"global", "layer", "row"} or int, default "global"
        How weights form blocks; weights of different blocks do not interact in the model.
    budget : {"global", "uniform"} or mapping of parameter glob to sparsity, default "global"
        How the pruned count is spread over blocks.
    budget_score : str, optional
        Saliency by which a global budget is spent; by default that of the method (magnitude for
        methods that have none).
    target, ignore : str or sequence of str
        Globs on parameter names; by default the weights of linear and convolution layers.
    restarts : int, default 1
        Runs of a randomised method with different seeds.
    choice_samples : int, optional
        Training samples on which tried networks are compared; by default as many as `samples`.
    evaluate : DataLoader, iterable of (x, y), or pair of tensors (X, y), optional
        Held-out data to report loss and accuracy on, before and after. Never used for a choice.
    method_options : mapping or sequence of mappings, optional
        Further options of the method, or alternatives to choose from by training loss, such as
        ``[{"max_swaps": 100}, {"max_swaps": 400}]``.
    time_limit : float, optional
        Seconds for each run of the method.
    stages : int, default 1
        Prune little by little: every stage takes gradient rows and the gradient at the weights as they
        then are, selects with the gradient in the model, and updates within a trust region. One stage
        without extra updates is the one-shot run.
    schedule : {"geometric", "polynomial", "linear"} or sequence of float, default "geometric"
    start_sparsity : float, optional
        How sparsity grows and where it starts; see `sparsity_schedule`.
    updates_per_stage : int, optional
        Updates of every stage, the one that comes with the selection included; 2 by default. They
        share the rows of the stage; each has a gradient of its own. An update is a damped Newton step
        and is taken only if it lowers the loss on training samples drawn afresh; the grid of dampings
        follows the winners, a third to three times the last one.
    final_updates : int, optional
        Updates at the last sparsity, with new rows, after all stages; 4 by default. They end early
        when nothing improves.
    gradient_samples : int, optional
        Training samples of every gradient; by default as many as the rows of a stage are made of.
    on_stage : callable, optional
        Called with a `StageResult` after every stage, and first for those found in `run_dir`: its
        network can be evaluated or copied, so that one run serves a whole table of sparsities.
    run_dir : path, optional
        Keep there what was found, as it is found: gradient rows, moments of layer inputs, the sets of every
        block, training losses, certificates, stages, and the result. The same call on the same directory
        goes on where the last one was stopped or killed, and ends with the same weights and report, bit for
        bit; on a finished run it returns at once. Another network, data, option, version, processor or number
        of threads is refused, with the difference named, and so are a second process in the directory and a
        directory of other files.
        The rows take as much space there as in memory, until the run is finished. A loader must give the same
        samples again in every pass; a time limit counts anew, and what it cuts short may differ.
    executor : Executor, int, callable or Workers, optional
        Where the blocks are solved, for methods that take one block at a time (such as
        "branch_and_bound" with ``partition="row"``); see `cbs_opt.execution.workers.Workers`. The result does
        not depend on it, as long as no time limit is met.
    certify : bool, default False
        Bound the optimum of `program` in every block from below, in float64 on the CPU, block after
        block, and report how far above it the chosen set can be at most. The sum over blocks bounds
        the block-diagonal quadratic model of the loss: it says nothing about accuracy. See
        `cbs_opt.certify.certificates`.
    certify_time_limit : float, optional
        Seconds for all certificates together. A block that they do not reach has no bound.
    block_dir : path, optional
        With `certify`: write the data of every block there, each as large as its rows in float64, so
        that anybody can check the certificates; see `cbs_opt.certify.files`.
    memory_limit : int
        Bytes for temporaries of the curvature, besides the rows.
    row_memory : int, optional
        Bytes that gradient rows may take in memory at a time. If all of them take more, they are written
        to a file, and every block has its rows in memory only while it is worked on; the largest block
        must be within the limit, so give a partition into blocks. Not for several stages. By default
        the rows are in memory.
    row_dir : path, optional
        Folder for that file; by default the system's place for temporary files. Nothing is left of it,
        whatever ends the run.
    on_plan : callable, optional
        Called with the `PrunePlan` of the run, which states sizes and peak memory, before any gradient
        is computed. See `plan`.
    seed : int, default 0
    progress : bool, default True
        Show bars where standard error is a terminal.

    Returns
    -------
    PruneReport

    Raises
    ------
    CbsError
        A subclass names the argument, what was found and what to do.

    Examples
    --------
    >>> report = prune(model, (x, y), sparsity=0.9, evaluate=(x_test, y_test))  # doctest: +SKIP
    >>> print(report.summary())  # doctest: +SKIP
    """
    plan = stage_options(
        sparsity,
        stages=stages,
        schedule=schedule,
        start_sparsity=start_sparsity,
        updates_per_stage=updates_per_stage,
        final_updates=final_updates,
        gradient_samples=gradient_samples,
    )
    if not isinstance(curvature, str | GradientRows | StoredRows):
        remedy = "pass the name of a curvature, or GradientRows"
        raise ArgumentError("curvature", f"a {type(curvature).__name__}", remedy)
    if selection_damping is not None and damping is None and not relative_damping:
        remedy = "give damping too, or relative_damping=True"
        raise ArgumentError("selection_damping", "given without damping", remedy)
    place = RowPlace(memory=row_memory, folder=row_dir)
    workers, ended = lasting(executor)
    method, alternative = chosen_method(method, method_options, program, staged=plan is not None)
    options = PruneOptions(
        sparsity=sparsity,
        program=program,
        method=method,
        update=update_kind(update),
        update_scale=grid("update_scale", update_scale, positive=True),
        curvature=curvature if isinstance(curvature, str) else curvature.curvature,
        samples=samples if isinstance(curvature, str) else curvature.samples,
        samples_per_row=samples_per_row,
        damping=grid("damping", DAMPING if damping is None else damping, positive=False),
        relative_damping=relative_damping or damping is None,
        selection_damping=None
        if selection_damping is None
        else grid("selection_damping", selection_damping, positive=False)[0],
        gradient_term=gradient_term,
        partition=partition,
        budget=budget,
        budget_score=checked_score(budget_score),
        restarts=restarts,
        choice_samples=choice_samples,
        method_options=alternatives(alternative),
        time_limit=time_limit,
        certify=certify,
        certify_time_limit=certify_time_limit,
        seed=seed,
        layer_inputs=None if layer_inputs is None else grid("layer_inputs", layer_inputs, positive=False),
        executor=workers,
    )
    parts = Partition.from_model(model, target=target, ignore=ignore, blocks=partition)
    if layer_inputs is None and isinstance(curvature, str) and options.needs_curvature:
        options = replace(options, layer_inputs=default_layer_inputs(parts))
    given = None if isinstance(curvature, str) else curvature
    largest = max(block.stop - block.start for block in parts.blocks)
    check_certifiable(options, largest, given_term=given is not None and given.channels is not None)
    if plan is None:
        check_one_stage(on_stage)
        run = PruneRun(model, parts, options, loss_fn, given, progress)
    else:
        check_stageable(options, plan, given_rows=given is not None)
        if row_memory is not None:
            raise ArgumentError("row_memory", "given for a run in stages", "use one stage, or leave it out")
        run = StagedRun(model, parts, options, loss_fn, plan, progress, on_stage=on_stage)
    run.row_place = place
    with ended, unchanged(model, parts), ExitStack() as opened:
        opened.callback(run.close)
        run.draw_sample(data)
        if on_plan is not None:
            on_plan(plan_of(run, memory_limit, staged=plan is not None, kept=run_dir is not None))
        if run_dir is not None:
            told = run.fingerprint(memory_limit, evaluate)
            run.go_on(opened.enter_context(RunStore(run_dir, told)))
        result = run.finished(block_dir)
        if result is None:
            prepare(options.method, options.program)
            if certify:
                prepare("lower_bound", options.program)
            run.take_curvature(data, memory_limit)
            best = run.best_candidate()
            report = run.report(best, evaluate)
            if certify:
                report = run.certified(report, best, block_dir)
            run.done.finish(best.weights, best.keep, report, steps_stay=block_dir is not None)
            result = best.weights, report
    weights, report = result
    write_back(model, parts, weights)
    return report
