"""The record of a run: the chosen network evaluated, predicted against measured, certified."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.certify.certificates import CertifiedBlock, Chosen, certify_blocks, relative_gap
from cbs_opt.curvature.kinds import Fisher
from cbs_opt.curvature.rows import Rows
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.network.data import Data
from cbs_opt.network.evaluation import Evaluation, evaluate
from cbs_opt.network.partition import Partition
from cbs_opt.oneshot import Candidate, LossModel, Task, method_of, select_of, selects_by_rows, term_of
from cbs_opt.recipe.records import in_units
from cbs_opt.report.health import label_share, warnings_of
from cbs_opt.report.parts import BlockSummary, CertifiedSum, LayerSummary
from cbs_opt.report.record import PruneReport, listed
from cbs_opt.select.choice import Choice
from cbs_opt.stages.state import StageState
from cbs_opt.system.checks import within
from cbs_opt.system.memory import process_peak
from cbs_opt.system.versions import library_versions

log = logging.getLogger(__name__)

SEARCHED = ("iterations", "locally_optimal", "seconds", "bound", "status")
"""Fields of a `Choice` that a block summary has as they are."""
PROVED = ("rho", "effective_rank", "n_fixed")
"""Fields of a certificate that a block summary has as they are."""


def describe(
    task: Task,
    best: Candidate,
    model: LossModel | None,
    held_out: Data | None,
    *,
    state: StageState | None = None,
) -> PruneReport:
    """Evaluate the chosen network without writing it, and put everything on record.

    `model`: what the network was chosen by; None for a run in stages, whose `state` has a record of every
    step instead. `state`: at the end of a run in stages.
    """
    request, recipe, partition = task.request, best.recipe, task.partition
    curvature = recipe.curvature
    others = best.others or {}
    buffers = {name for name, _ in task.model.named_buffers()}
    after = task.trial(best.weights, others)
    with task.clock.phase("evaluation"):
        passes = _evaluations(task, after, held_out)
        train_before, train_after, *measured = task.progress.collect("evaluation", passes, 4, unit="pass")
    rows = None if model is None else model.rows
    model = LossModel(partition, task.weights, None) if model is None else model
    blocks = _block_summaries(
        model.blocks(best.damping, term_of(recipe), gradient=recipe.gradient),
        best.choices,
        best.weights,
        modelled=rows is not None,
        by_rows=selects_by_rows(recipe),
    )
    keep = {name: mask.cpu() for name, mask in partition.keep_by_parameter(best.keep).items()}
    axes = {span.name: span.axes for span in partition.parameters}
    dtypes = {name: tensor.dtype for name, tensor in partition.tensors(task.model).items()}
    old, new = partition.split(task.weights), partition.split(best.weights)
    selection = [block.selection_loss for block in blocks if block.selection_loss is not None]
    updated = [block.updated_loss for block in blocks if block.updated_loss is not None]
    samples, n_rows = (0, 0) if rows is None else (rows.samples, rows.shape[0])
    if state is not None:
        samples = state.samples
        n_rows = max(1, recipe.samples // getattr(recipe.curvature, "per_row", 1))
    predicted = sum(updated) if updated else None
    guess = label_share(batch.labels for batch in task.sample or ())
    warnings = [
        *warnings_of(train_before, train_after, predicted=predicted, guess=guess),
        *(
            f"on the evaluation data {warning}"
            for warning in warnings_of(measured[0], measured[1], predicted=None, guess=guess)
        ),
    ]
    for warning in warnings:
        log.warning("%s", warning)
    return PruneReport(
        method=select_of(recipe).method,
        kind=method_of(recipe).kind,
        program=select_of(recipe).program,
        update=recipe.update is not None,
        curvature=curvature.kind if isinstance(curvature, Fisher) else curvature.curvature,
        partition=recipe.weights.blocks or "global",
        budget=recipe.weights.budget,
        requested_sparsity=request.sparsity,
        pattern="" if request.pattern is None else str(request.pattern),
        n=partition.n,
        n_prune=int((~best.keep).sum()),
        layers=tuple(
            LayerSummary.from_weights(
                name, old[name].to(dtypes[name]).cpu(), new[name].cpu(), mask, axes[name]
            )
            for name, mask in keep.items()
        ),
        blocks=blocks,
        predicted_selection_loss=sum(selection) if selection else None,
        predicted_loss_increase=predicted,
        train_before=train_before,
        train_after=train_after,
        before=measured[0],
        after=measured[1],
        seconds=task.clock.seconds,
        peak_memory_bytes=process_peak(),
        samples=samples,
        rows=n_rows,
        damping=best.damping,
        layer_inputs=term_of(recipe),
        update_scale=best.scale,
        seed=request.seed,
        masks=keep,
        recalibrated=any(name in buffers for name in others),
        moved=tuple(name for name in others if name not in buffers),
        request=request,
        versions=library_versions(),
        stages=() if state is None else state.records,
        left_out=partition.left_out,
        notes=(*task.notes, *_unseen(rows), *_without_gradient(rows, partition)),
        choices=task.choices,
        warnings=tuple(warnings),
    )


def _unseen(rows: Rows | None) -> Iterator[str]:
    """Yield which parameters have no layer-input term beside others that have."""
    names = () if rows is None or rows.channels is None else rows.channels.unseen
    if names:
        yield f"no layer inputs, rows alone, for {listed(names)}"


def _without_gradient(rows: Rows | None, partition: Partition) -> Iterator[str]:
    """Yield which parameters the loss does not depend on: they are pruned by their size, if at all."""
    if rows is None or rows.on_disk or not rows.shape[0]:
        return
    # Where there is a gradient, the first row has one nearly always: the others are then not looked at.
    pieces = ((span.name, rows.block(span.start, span.stop)) for span in partition.parameters)
    names = [name for name, piece in pieces if not bool(piece[0].any()) and not bool(piece.any())]
    if names:
        yield f"the loss does not depend on {listed(names)}, as far as the samples say"


def _evaluations(task: Task, after: nn.Module, held_out: Data | None) -> Iterator[Evaluation | None]:
    """Yield the losses on the sample before and after, then those on the held-out data; None without data."""
    for network in (task.model, after):
        yield task.loss(network)
    for network in (task.model, after):
        yield None if held_out is None else evaluate(network, held_out, task.loss_fn, argument="evaluate")


def certified(task: Task, best: Candidate, model: LossModel, report: PruneReport) -> PruneReport:
    """Return the report with a bound and its certificate for every block, for the sets that were chosen."""
    recipe, certify = best.recipe, task.request.certify
    assert certify is not None
    damping, proved = best.damping, [choice.bound for choice in best.choices]
    if recipe.selection_damping is not None:
        if select_of(recipe).program == "selection":
            damping = in_units(recipe.selection_damping, model.unit)
        else:
            # The sets were chosen for another Hessian than the one that the update minimises.
            proved = [None] * len(proved)
    layer_inputs = 0.0 if selects_by_rows(recipe) else term_of(recipe)
    support = task.request.pattern
    chosen = [Chosen(choice.keep, bound, support) for choice, bound in zip(best.choices, proved, strict=True)]
    with task.clock.phase("certificates"), within("weights", partition="blocks"):
        bounded = certify_blocks(
            model.blocks(damping, layer_inputs, gradient=recipe.gradient),
            chosen,
            report.program,
            method=report.method,
            time_limit=certify.time_limit,
            block_dir=certify.block_dir,
            progress=task.progress,
            path_of=task.done.certificate_path,
        )
    blocks = tuple(map(_with_certificate, report.blocks, bounded))
    return replace(
        report,
        blocks=blocks,
        certified=CertifiedSum.of(report.program, blocks),
        certificates=tuple(block.solution for block in bounded),
    )


def _block_summaries(
    blocks: Iterable[FisherBlock],
    choices: Sequence[Choice],
    weights: Tensor,
    *,
    modelled: bool,
    by_rows: bool,
) -> tuple[BlockSummary, ...]:
    """Return what the report says of every block; `weights` (n,) are those of the pruned network.

    `modelled` is whether there is a curvature to predict with, `by_rows` whether the sets were chosen
    without the layer-input term.
    """
    summaries = []
    start = 0
    for block, choice in zip(blocks, choices, strict=True):
        before = block.weights.double()
        selection = updated = None
        if modelled:
            chosen = block.without_channels() if by_rows else block
            selection = chosen.step_loss(torch.where(choice.keep, 0.0, -before))
            updated = block.step_loss(weights[start : start + block.n].double() - before)
        start += block.n
        summary = BlockSummary(
            name=block.name,
            n=block.n,
            n_prune=int((~choice.keep).sum()),
            selection_loss=selection,
            updated_loss=updated,
            initial_loss=choice.initial_value,
            **{name: getattr(choice, name) for name in SEARCHED},
        )
        summaries.append(summary)
    return tuple(summaries)


def _with_certificate(block: BlockSummary, certified: CertifiedBlock) -> BlockSummary:
    solution, evidence = certified.solution, certified.solution.certificate
    proved: dict[str, Any] = {name: getattr(evidence, name, None) for name in PROVED}
    return replace(
        block,
        objective=solution.objective,
        bound=solution.bound,
        gap=relative_gap(solution.objective, solution.bound),
        certificate=None if evidence is None else evidence.kind,
        certificate_status=certified.status,
        certificate_seconds=solution.stats.seconds,
        fingerprint=certified.fingerprint,
        **proved,
    )
