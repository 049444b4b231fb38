"""Pruning in stages: fresh curvature at the current weights, a selection, damped Newton steps.

Every step is the minimum of a stated quadratic, with a gradient over `gradient_samples` samples, and
is taken only as far as the training loss agrees. The network is written to after the last stage.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from cbs_opt.budget.remaining import narrowed
from cbs_opt.curvature.fisher import mean_gradient
from cbs_opt.curvature.kinds import Fisher, SketchedFisher
from cbs_opt.curvature.layer_inputs import input_covariances, input_moments, with_layer_inputs
from cbs_opt.curvature.rows import Rows
from cbs_opt.network.batchnorm import has_statistics
from cbs_opt.network.data import fixed_samples, forward
from cbs_opt.network.drawing import Drawing
from cbs_opt.network.eligible import trainable_vectors
from cbs_opt.network.evaluation import BATCH_SIZE, evaluate
from cbs_opt.network.objective import Objective
from cbs_opt.network.trial import as_parameters
from cbs_opt.oneshot import Candidate, Sample, Task, draw_sample, sampled_rows
from cbs_opt.recalibration import Comparison, fitting
from cbs_opt.recipe.records import Absolute, Stages
from cbs_opt.report.parts import StageRecord
from cbs_opt.runs.progress import ChoiceLedger
from cbs_opt.select.choice import Choice
from cbs_opt.stages import trials
from cbs_opt.stages.fine_tuning import WHOLE, FineTuner, Narrowing, Rate, Span, probe_samples
from cbs_opt.stages.input_metric import InputMetric
from cbs_opt.stages.model import StageModel
from cbs_opt.stages.state import StageResult, StageState, keep_stage, stored_stages

log = logging.getLogger(__name__)

PATIENCE = 2
"""Updates refused in a row that end the final stage."""
INPUT_SAMPLES = 256
"""Samples of the layer inputs at every stage: a quarter of what one stage has, as the term is a metric."""
CURVATURE = (256, 4)
"""Samples of the largest curvature after a sharp stage, and how many a sketched row sums up."""
FAR = 0.15
"""Share of the way to no weights from which on a network is so far from rest that long steps pay."""
NEAR, MATCHED_NEAR = 0.07, 0.1
"""What the rate is times where it is nearer, and keeps its statistics; the latter where outputs match."""
MOST_PER_STEP, MATCHED_PER_STEP = 0.001, 0.012
"""What it is times at most, for every step, where steps are too few for a rate to be tried; the latter where
outputs are matched, whose curvature does not change with what they are."""
NARROWED = 0.6
"""What the rate is times where the set narrows meanwhile: as far from rest as it will be on the way."""
FEWEST_PER_CURVATURE = 8
"""Times so many samples of fine-tuning below which the rows of the stage serve for that."""
PASS_SEED_STEP = 1_000_003
"""Between the seeds of two passes over the data."""


class Passes:
    """Passes over the training data: each has a seed of its own, and its samples are counted."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.count = 0
        self.samples = 0

    def seed(self) -> int:
        """Begin another pass; return its seed.

        A loader that has `set_epoch`, as samplers of PyTorch have, is told the number of the pass, so
        that it can give other samples in each and the same ones in a run that is resumed.
        """
        number = self.count
        self.count += 1
        set_epoch = getattr(self._task.data, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(number)
        return self._task.request.seed + PASS_SEED_STEP * number

    def sample(self) -> Sample:
        """Draw samples on which networks are compared, fresh ones each time."""
        task = self._task
        assert task.data is not None
        most = task.recipe.choice_samples or task.recipe.samples
        return draw_sample(task.model, task.data, most, self.seed())


class StagedRun:
    """A run in stages of a task with stages and data; `passes` drew its sample."""

    def __init__(self, task: Task, passes: Passes) -> None:
        assert task.request.stages is not None
        self.plan: Stages = task.request.stages
        # Statistics and vectors are those of this run: the caller's network keeps its own until the end.
        tuning = self.plan.fine_tuning
        settles = tuning is not None and (tuning.rest or tuning.batch_statistics) and task.recipe.recalibrate
        settles = settles and has_statistics(task.model)
        vectors: tuple[str, ...] = ()
        if tuning is not None and tuning.vectors:
            vectors = trainable_vectors(task.model, task.partition.left_out)
        own = _own_network(task.model, vectors) if settles or vectors else None
        self._settles = settles and own is not None
        self._vectors = vectors if own is not None else ()
        self._normalized = self._settles and tuning is not None and tuning.batch_statistics
        self._before = task
        self.task = task if own is None else replace(task, model=own)
        self.sparsities = self.plan.sparsities(task.request.sparsity, task.request.pattern)
        self.passes = passes
        self._drawing: Drawing | None = None
        if self.plan.fine_tuning is not None:
            assert task.data is not None
            aside = task.recipe.choice_samples or task.recipe.samples
            self._drawing = Drawing(task.data, aside=aside, seed=task.request.seed)
        self.state = StageState(
            stages=0,
            weights=task.weights.double(),
            keep=torch.ones(task.partition.n, dtype=torch.bool, device=task.weights.device),
        )

    def resume(self) -> bool:
        """Take over the stages on disk and announce them, each once; return whether all are there."""
        for state in stored_stages(self.task.done.pieces, self.task.weights.device):
            if state.stages > self.state.stages:
                self._take(state.others)
                # On disk half precision is float32.
                own = self.task.model.state_dict()
                others = {name: value.to(own[name].dtype) for name, value in state.others.items()}
                self.state = replace(state, others=others)
                self._announce()
        return self.state.stages == len(self.plan.steps)

    def run(self) -> Candidate:
        """Do the stages that are still to do; return what they end with."""
        self.resume()
        steps = self.plan.steps
        done = self.state.stages
        with self.task.progress.phase("stages", len(steps), unit="stage", done=done) as advance:
            while self.state.stages < len(steps):
                self.state = self._next_stage(self.state)
                keep_stage(self.task.done.pieces, self.state)
                self.task.done.forget_steps()
                self._announce()
                advance(1)
        last = [record for record in self.state.records if not record.rate_kind][-1]
        return Candidate(
            choices=[Choice(keep=self.state.keep[s.start : s.stop]) for s in self.task.partition.blocks],
            weights=self.state.weights,
            keep=self.state.keep,
            recipe=self.task.recipe,
            damping=last.damping,
            scale=last.update_scale,
            loss=self.state.records[-1].loss,
            others=self.state.others or None,
        )

    def _next_stage(self, state: StageState) -> StageState:
        self.passes.count, self.passes.samples = state.passes, state.samples
        first, stage = trials.first_dampings(self.task.request), state.stages
        self._selections = itertools.count()
        pruning = trials.DampingSearch(first, state.damping)
        updating = trials.DampingSearch(first, state.update_damping)
        records: list[StageRecord] = []
        refused = 0
        began = time.perf_counter()
        weights = state.weights
        model = self._model(weights, state.keep)
        target = round(self._sparsity(stage) * self.task.partition.n)
        for update in range(self.plan.steps[stage]):
            prunes = target > int((~model.keep).sum())
            best, record = self._step(model, weights, pruning if prunes else updating, update, prunes)
            records.append(replace(record, seconds=time.perf_counter() - began))
            began = time.perf_counter()
            refused = 0 if record.accepted else refused + 1
            if record.accepted:
                weights = best.weights
                if not best.keep.equal(model.keep):
                    model = model.restricted(best.keep)
            if refused == PATIENCE and stage == len(self.sparsities):
                break
        rate = Rate(kind=state.rate_kind, value=state.rate, decay=state.decay) if state.rate_kind else None
        others = dict(state.others)
        if self.plan.fine_tuning is not None and stage < len(self.sparsities):
            others |= self._settled(weights)
            weights, keep, vectors, rate, record = self._fine_tuned(weights, model, rate, len(records))
            model = model if keep.equal(model.keep) else model.restricted(keep)
            self._take(vectors)
            others |= vectors
            if self._normalized and stage + 1 < len(self.plan.steps):
                # After the last one the run as a whole does this.
                others |= self._settled(weights)
            records.append(record)
        return StageState(
            stages=stage + 1,
            weights=weights,
            keep=model.keep,
            damping=pruning.centre,
            update_damping=updating.centre,
            rate_kind="" if rate is None else rate.kind,
            rate=0.0 if rate is None else rate.value,
            decay=0.0 if rate is None else rate.decay,
            passes=self.passes.count,
            samples=self.passes.samples,
            records=(*state.records, *records),
            others=others,
        )

    def _settled(self, weights: Tensor) -> Mapping[str, Tensor]:
        """Give the network of this run the statistics that fit `weights`, if it is to; return them."""
        if not self._settles:
            return {}
        found, _ = fitting(self.task, weights, self.sample())
        self._take(found)
        return found

    def _take(self, others: Mapping[str, Tensor]) -> None:
        """Give the network of this run tensors beside the weights, by name."""
        own: dict[str, Tensor] = dict(self.task.model.named_parameters())
        own |= dict(self.task.model.named_buffers())
        with torch.no_grad():
            for name, value in others.items():
                own[name].copy_(value)

    def _sparsity(self, stage: int) -> float:
        """Sparsity of the selection of a stage, the final updates included."""
        last = len(self.sparsities) - 1
        asked = self.sparsities[min(stage, last)]
        return self._wide(asked) if stage == last else asked

    def _wide(self, sparsity: float) -> float:
        """Return the sparsity from which the set of the last selection narrows while steps are taken."""
        tuning = self.plan.fine_tuning
        surplus = 1.0 if tuning is None or self.task.request.pattern is not None else tuning.surplus
        before = self.sparsities[-2] if len(self.sparsities) > 1 else 0.0
        return sparsity if surplus == 1.0 else max(before, 1.0 - surplus * (1.0 - sparsity))

    def _narrowing(self, stage: int) -> Narrowing | None:
        """Return how the set of a stage narrows, None if it stays."""
        begin, end = self._sparsity(stage), self.sparsities[stage]
        if begin == end:
            return None
        partition, request, budget = self.task.partition, self.task.request, self.task.recipe.weights.budget

        def narrow(keep: Tensor, saliency: Tensor, sparsity: float) -> Tensor:
            own = narrowed(
                partition,
                keep[: partition.n],
                saliency[: partition.n],
                sparsity,
                request.sparsity,
                budget=budget,
            )
            return torch.cat([own, keep[partition.n :]])

        return Narrowing(begin=begin, end=end, narrow=narrow)

    def _step(
        self, model: StageModel, weights: Tensor, search: trials.DampingSearch, update: int, prunes: bool
    ) -> tuple[trials.Proposal, StageRecord]:
        """Return the best network one step away, and whether it is to be taken."""
        task, stage = self.task, self.state.stages
        unit = 1.0 if isinstance(task.recipe.damping, Absolute) else model.unit
        gradient = self._gradient(weights, model) if task.recipe.gradient or not prunes else None
        expansion = trials.Expansion(model=model, weights=weights, gradient=gradient, unit=unit)
        sample = self.sample()
        before = self._loss_at(weights, sample)
        with task.clock.phase("steps"):
            proposals = (
                trials.selections(
                    expansion,
                    task.request,
                    task.resources,
                    search.grid(),
                    self._sparsity(stage),
                    self._ledger,
                )
                if prunes
                else trials.updates(expansion, task.request, search.grid())
            )
            best, losses = trials.judged(
                proposals,
                lambda proposal: self._loss_at(proposal.weights, sample),
                self._affordable(before, sample) if prunes else -math.inf,
            )
        accepted = prunes or losses[0] < before
        if not accepted:
            search.refused()
        elif best.scale > 0.0:
            search.accepted(best.damping)
        kept = int((best.keep if accepted else model.keep).sum())
        others = losses[1:] if accepted else losses
        record = StageRecord(
            stage=stage,
            update=update,
            sparsity=1.0 - kept / task.partition.n,
            n_prune=task.partition.n - kept,
            loss_before=before,
            loss=losses[0] if accepted else before,
            damping=best.damping * unit,
            update_scale=best.scale if accepted else 0.0,
            accepted=accepted,
            tried=len(losses),
            best_rejected=others[0] if others else None,
            predicted_change=model.predicted_change(
                expansion.kept_weights, expansion.gradient, best.weights[model.keep]
            ),
            samples=self.passes.samples,
            seconds=0.0,
        )
        return best, record

    def _affordable(self, before: float, sample: Sample) -> float:
        """Return the loss up to which a selection needs no update."""
        share = self.plan.update_above
        if share == 0.0:
            return -math.inf
        without = self._loss_at(torch.zeros_like(self.task.weights), sample)
        return before + share * max(0.0, without - before)

    def _fine_tuned(
        self, weights: Tensor, model: StageModel, rate: Rate | None, update: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Rate, StageRecord]:
        """Return weights, kept ones and vectors after stochastic steps, the next rate, and the record."""
        plan, task, stage = self.plan.fine_tuning, self.task, self.state.stages
        assert plan is not None
        assert self._drawing is not None
        began = time.perf_counter()
        aim = self._aim()
        shares = plan.shares(len(self.sparsities))
        samples, rows = shares[stage], None
        anew = plan.rest and (self._normalized or not probe_samples(plan, samples))
        if plan.matching or (anew and samples >= FEWEST_PER_CURVATURE * CURVATURE[0]):
            few = self._rows_at(weights, model.keep, aim, samples // FEWEST_PER_CURVATURE)
            rows, samples = few.rows, samples - few.samples
        sample, normalized, stretch = self.sample(), self._normalized, 1.0
        narrowing = self._narrowing(stage)
        most_per_step = MATCHED_PER_STEP if plan.matching else MOST_PER_STEP
        most = 1.0 if probe_samples(plan, samples) else most_per_step * samples / plan.batch_size
        if normalized and narrowing is not None:
            stretch = min(NARROWED, most)
        elif normalized and plan.rest:
            harm = self._harm(weights, sample)
            normalized = harm >= FAR
            near = MATCHED_NEAR if plan.matching else NEAR
            stretch = min(1.0 if plan.matching else harm, most) if normalized else near
        # What batch normalisation does by its own statistics is too sensitive to scales and shifts.
        names = self._vectors if normalized or not has_statistics(task.model) else ()
        wide = replace(task, partition=task.partition.widened(task.model, names))
        flat = wide.partition.flatten(task.model).double()
        beside = len(flat) - len(weights)
        flat[: len(weights)] = weights
        free = torch.ones(beside, dtype=torch.bool, device=weights.device)

        comparison = Comparison(wide, sample, estimated=normalized)
        measuring, known = aim.labelled(sample, size=BATCH_SIZE, device=weights.device)
        rows = model.rows if rows is None else rows
        metric = self._metric(weights, model.keep, rows) if normalized and plan.input_metric else None
        span = Span(begin=sum(shares[:stage]) / sum(shares), end=sum(shares[: stage + 1]) / sum(shares))
        with (
            task.clock.phase("fine-tuning"),
            task.progress.phase("fine-tuning", samples, unit="sample") as advance,
        ):
            tuner = FineTuner(
                model=task.model,
                partition=wide.partition,
                objective=aim,
                plan=plan,
                keep=torch.cat([model.keep, free]),
                batches=self._drawing.batches(
                    aim, size=plan.batch_size, device=weights.device, begin=self.passes.seed
                ),
                stage=model,
                rows=rows,
                loss=partial(comparison.loss, objective=measuring, sample=known),
                advance=advance,
                stretch=stretch,
                span=WHOLE if plan.rest else span,
                normalized=normalized,
                beside=beside,
                metric=metric,
            )
            if narrowing is not None:
                tuned = tuner.narrowed(flat, narrowing, samples=samples)
            else:
                tuned = tuner.best(flat, rate=None if plan.rest else rate, samples=samples)
        self.passes.samples += tuned.samples
        keep = tuned.keep[: len(weights)]
        kept = int(keep.sum())
        before, after = tuned.loss_before, tuned.loss
        if plan.matching:
            # The report tells the loss.
            before, after = comparison.loss(flat), comparison.loss(tuned.weights)
        record = StageRecord(
            stage=stage,
            update=update,
            sparsity=1.0 - kept / task.partition.n,
            n_prune=task.partition.n - kept,
            loss_before=before,
            loss=after,
            damping=0.0,
            update_scale=0.0,
            accepted=tuned.moved,
            tried=tuned.tried,
            best_rejected=None,
            predicted_change=None,
            samples=self.passes.samples,
            seconds=time.perf_counter() - began,
            rate_kind=tuned.rate.kind,
            rate=tuned.rate.value,
        )
        moved = as_parameters(task.model, wide.partition, tuned.weights)
        vectors = {name: moved[name].clone() for name in names if tuned.moved}
        return tuned.weights[: len(weights)].clone(), keep, vectors, tuned.next_rate, record

    def _aim(self) -> Objective:
        """Return what steps go down: the loss, or the distance from the outputs before pruning."""
        assert self.plan.fine_tuning is not None
        if not self.plan.fine_tuning.matching:
            return self.task.loss_fn
        assert self.task.data is not None
        before = partial(forward, self._before.trial(self._before.weights))
        return Objective.matching(before, samples=fixed_samples(self.task.data))

    def _harm(self, weights: Tensor, sample: Sample) -> float:
        """Return where the loss is between that with none pruned and that with none left, in [0, 1]."""
        task = self._before
        dense = evaluate(task.trial(task.weights), sample, task.loss_fn).loss
        none = Comparison(self.task, sample).loss(torch.zeros_like(weights))
        share = (self._loss_at(weights, sample) - dense) / (none - dense) if none > dense else 1.0
        return min(max(share, 0.0), 1.0) if math.isfinite(share) else 1.0

    def _rows_at(self, weights: Tensor, keep: Tensor, aim: Objective, most: int) -> Rows:
        """Return a few rows at `weights` of those kept, (m, n_kept), for the largest curvature there.

        Of what steps go down, and of at most `most` samples, if that is enough for two rows.
        """
        kind, (samples, per_row) = self.task.recipe.curvature, CURVATURE
        samples = min(samples, max(2 * per_row, most - most % per_row))
        assert isinstance(kind, Fisher)
        if aim is not self.task.loss_fn:
            few: Fisher = SketchedFisher(samples=samples, per_row=per_row)
        elif isinstance(kind, SketchedFisher):
            few = replace(kind, samples=samples, per_row=per_row)
        else:
            few = replace(kind, samples=samples // per_row)
        step, seed, task = f"{self._name}_rate", self.passes.seed(), replace(self.task, loss_fn=aim)
        rows = sampled_rows(
            task, seed=seed, step=step, curvature=few, weights=weights, keep=keep, gradient=False
        )
        self.passes.samples += rows.samples
        return rows

    def _metric(self, weights: Tensor, keep: Tensor, rows: Tensor) -> InputMetric | None:
        """Return the metric of what layers are fed at `weights`; None where the run has no layer inputs."""
        task, data = self.task, self.task.data
        assert data is not None
        if not task.recipe.layer_inputs:
            return None
        with task.clock.phase("layer inputs"):
            covariances = input_covariances(
                task.model,
                data,
                task.partition,
                samples=INPUT_SAMPLES,
                seed=self.passes.seed(),
                weights=weights,
                objective=task.loss_fn,
            )
            return InputMetric(task.partition, covariances, keep, rows)

    def sample(self) -> Sample:
        """Return the samples on which networks are compared: those set aside, or fresh ones."""
        if self._drawing is None:
            return self.passes.sample()
        return self._drawing.aside(self.task.weights.device)

    def _ledger(self, sizes: Sequence[int]) -> ChoiceLedger:
        """Return the ledger of the next selection of this stage; the order is the same in every run."""
        number = next(self._selections)
        return self.task.done.selection(number, sizes, step=self._name, progress=self.task.progress)

    @property
    def _name(self) -> str:
        """What the pieces of this stage are named by."""
        return f"_s{self.state.stages:04d}"

    def _model(self, weights: Tensor, keep: Tensor) -> StageModel:
        """Return the model at `weights` of those still there, with the channel term if there is to be one."""
        task, step = self.task, self._name
        data = task.data
        assert data is not None
        rows = sampled_rows(
            task,
            seed=self.passes.seed(),
            step=step,
            weights=weights,
            # A channel's slope is that of all its weights, pruned ones as well.
            keep=None if task.recipe.layer_inputs else keep,
            gradient=False,
        )
        self.passes.samples += rows.samples
        if not task.recipe.layer_inputs:
            return StageModel(task.partition, keep, rows.rows)
        seed = self.passes.seed()
        with task.clock.phase("layer inputs"):
            moments = task.done.moments(
                lambda: input_moments(
                    task.model,
                    data,
                    task.partition,
                    samples=INPUT_SAMPLES,
                    seed=seed,
                    weights=weights,
                    objective=task.loss_fn,
                    progress=task.progress,
                ),
                step,
            )
            both = with_layer_inputs(
                rows, task.model, data, task.partition, weight=task.recipe.layer_inputs, moments=moments
            )
        assert both.channels is not None
        return StageModel(task.partition, keep, rows.rows[:, keep], both.channels.restricted(keep))

    def _gradient(self, weights: Tensor, model: StageModel) -> Tensor:
        task = self.task
        assert task.data is not None
        with task.clock.phase("gradient"):
            gradient, used = mean_gradient(
                task.model,
                task.data,
                task.loss_fn,
                task.partition,
                samples=self.plan.gradient_samples or task.recipe.samples,
                seed=self.passes.seed(),
                weights=weights,
                progress=task.progress,
            )
        self.passes.samples += used
        return gradient[model.keep]

    def _loss_at(self, weights: Tensor, sample: Sample) -> float:
        return evaluate(self.task.trial(weights), sample, self.task.loss_fn).loss

    def _announce(self) -> None:
        if self.plan.on_stage is None:
            return
        task, state = self.task, self.state
        self.plan.on_stage(
            StageResult(
                stage=state.stages - 1,
                stages=len(self.plan.steps),
                sparsity=1.0 - int(state.keep.sum()) / task.partition.n,
                network=task.trial(state.weights),
                weights=as_parameters(task.model, task.partition, state.weights),
                keep=task.partition.keep_by_parameter(state.keep),
                records=tuple(record for record in state.records if record.stage == state.stages - 1),
            )
        )


def _own_network(model: nn.Module, vectors: Sequence[str]) -> nn.Module | None:
    """Return a copy of a network with buffers and `vectors` of its own; None where it cannot be copied.

    It has its other parameters in common with the network: they are lent other values, and not written to.
    """
    common = {id(tensor): tensor for name, tensor in model.named_parameters() if name not in vectors}
    try:
        return deepcopy(model, common)
    except Exception as error:  # what modules hold is the caller's
        log.warning(
            "the network cannot be copied (%s): its biases stay, statistics are estimated at the end alone",
            error,
        )
        return None
