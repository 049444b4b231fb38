"""Pruning in stages: fresh curvature at the current weights, a selection, damped Newton steps.

Every step is the minimum of a stated quadratic, with a gradient over `gradient_samples` samples, and
is taken only as far as the training loss agrees. The network is written to after the last stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cbs_opt.candidates import Candidate
from cbs_opt.curvature.fisher import gradient_rows, mean_gradient
from cbs_opt.curvature.layer_inputs import input_moments, with_layer_inputs
from cbs_opt.network.data import Data, LossFunction, device_of, iterate
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.partition import Partition
from cbs_opt.network.trial import TrialNetwork, as_parameters
from cbs_opt.oneshot import PruneRun, Sample
from cbs_opt.prune_options import PruneOptions
from cbs_opt.report.parts import StageRecord
from cbs_opt.report.record import PruneReport
from cbs_opt.runs.folder import PathLike, RunStore
from cbs_opt.select.choice import Choice
from cbs_opt.stage_options import StageOptions
from cbs_opt.stages.model import StageModel
from cbs_opt.stages.state import StageResult, StageState, StepState
from cbs_opt.stages.store import StageStore
from cbs_opt.stages.trials import Expansion, Proposal, judged, selections, updates
from cbs_opt.stages.trust_region import DampingSearch
from cbs_opt.system.plain import plain
from formulations.errors import ArgumentError

PATIENCE = 2
"""Updates refused in a row that end the final stage."""
INPUT_SAMPLES = 256
"""Samples of the layer inputs at every stage: a quarter of what one stage has, as the term is a metric."""
SEED_STEP = 1_000_003
"""Between the seeds of two passes over the data."""
OnStage = Callable[[StageResult], None]


class StagedRun(PruneRun):
    """One call of `prune` in stages, after its arguments were checked.

    Parameters
    ----------
    model, partition, options, loss_fn, progress
        As for `PruneRun`.
    plan : StageOptions
    on_stage : callable, optional
        Called with a `StageResult` after every stage, and first for those that are on disk.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        options: PruneOptions,
        loss_fn: LossFunction,
        plan: StageOptions,
        progress: bool,
        *,
        on_stage: OnStage | None = None,
    ) -> None:
        super().__init__(model, partition, options, loss_fn, None, progress)
        self.plan = plan
        self.states: StageStore | None = None
        self.on_stage = on_stage
        self.passes = 0
        self.samples = 0
        self.state = StageState(
            stages=0,
            weights=self.weights.double(),
            keep=torch.ones(partition.n, dtype=torch.bool, device=self.weights.device),
        )

    def draw_sample(self, data: Data | None) -> None:
        """Remember the data, and take the samples that the losses of the report are measured on."""
        if data is None:
            raise ArgumentError("data", "None for a run in stages", "pass training data")
        self.data = data
        self.sample = self._draw_sample()

    def fingerprint(self, memory_limit: int, held_out: Data | None) -> dict[str, Any]:
        """As for one stage, with the plan."""
        return {**super().fingerprint(memory_limit, held_out), "plan": plain(self.plan)}

    def go_on(self, store: RunStore) -> None:
        """Keep every stage, and begin after those that are there."""
        super().go_on(store)
        self.states = StageStore(store, device=self.weights.device)

    def finished(self, block_dir: PathLike | None) -> tuple[Tensor, PruneReport] | None:
        """Weights and report, if the run is finished, after its stages were told."""
        found = super().finished(block_dir)
        if found is not None:
            self._read_states()
        return found

    def take_curvature(self, data: Data | None, memory_limit: int) -> None:
        """Every stage takes its own."""
        self.memory_limit = memory_limit

    def best_candidate(self) -> Candidate:
        """Do the stages that are still to do; what they end with."""
        self._read_states()
        total = len(self.plan.updates)
        silent = None if self.progress else True
        with tqdm(total=total, initial=self.state.stages, desc="stages", unit="stage", disable=silent) as bar:
            while self.state.stages < total:
                self.state = self._next_stage(self.state)
                if self.states is not None:
                    self.states.add(self.state)
                self.done.forget_steps()
                self._announce()
                bar.update()
        last = self.state.records[-1]
        return Candidate(
            choices=[Choice(pruned=~self.state.keep[s.start : s.stop]) for s in self.partition.blocks],
            weights=self.state.weights,
            keep=self.state.keep,
            damping=last.damping,
            scale=last.update_scale,
            loss=last.loss,
        )

    def report(self, best: Candidate, data: Data | None) -> PruneReport:
        """As for one stage, with a record of every step."""
        rows = max(1, self.options.samples // self.options.samples_per_row)
        found = super().report(best, data)
        return replace(
            found,
            samples=self.state.samples,
            rows=rows,
            stages=self.state.records,
            settings={**found.settings, "stages": self.plan},
        )

    def _next_stage(self, state: StageState) -> StageState:
        """Rows, a selection if weights are to go, and updates."""
        self.passes, self.samples = state.passes, state.samples
        stage = state.stages
        pruning = DampingSearch(self.options.damping, state.damping)
        updating = DampingSearch(self.options.damping, state.update_damping)
        records: list[StageRecord] = []
        refused = 0
        began = time.perf_counter()
        weights = state.weights
        model = self._curvature(weights, state.keep)
        for update in range(self.plan.updates[stage]):
            step = f"step_{stage:04d}_{update:04d}"
            known = self.done.step(step)
            if known is None:
                prunes = round(self.plan.sparsity(stage) * self.partition.n) > int((~model.keep).sum())
                search = pruning if prunes else updating
                best, record = self._step(model, weights, search, stage, update, prunes)
                accepted = record.accepted
                known = StepState(
                    weights=best.weights if accepted else weights,
                    keep=best.keep if accepted else model.keep,
                    damping=pruning.centre,
                    update_damping=updating.centre,
                    passes=self.passes,
                    record=replace(record, seconds=time.perf_counter() - began),
                )
                self.done.keep_step(step, known)
            began = time.perf_counter()
            weights, self.passes, self.samples = known.weights, known.passes, known.record.samples
            pruning.centre, updating.centre = known.damping, known.update_damping
            records.append(known.record)
            refused = 0 if known.record.accepted else refused + 1
            if not known.keep.equal(model.keep):
                model = model.restricted(known.keep)
            if refused == PATIENCE and stage == len(self.plan.sparsities):
                break
        return StageState(
            stages=stage + 1,
            weights=weights,
            keep=model.keep,
            damping=pruning.centre,
            update_damping=updating.centre,
            passes=self.passes,
            samples=self.samples,
            records=(*state.records, *records),
        )

    def _step(
        self,
        model: StageModel,
        weights: Tensor,
        search: DampingSearch,
        stage: int,
        update: int,
        prunes: bool,
    ) -> tuple[Proposal, StageRecord]:
        """The best network one step away, and whether it is to be taken."""
        options, sparsity = self.options, self.plan.sparsity(stage)
        unit = model.unit if options.relative_damping else 1.0
        gradient = self._gradient(weights, model) if options.gradient_term or not prunes else None
        expansion = Expansion(model=model, weights=weights, gradient=gradient, unit=unit)
        sample = self._draw_sample()
        before = self._loss_at(weights, sample)
        with self._phase("steps"):
            proposals = (
                selections(expansion, options, search.grid(), sparsity)
                if prunes
                else updates(expansion, options, search.grid())
            )
            verdict = judged(proposals, lambda proposal: self._loss_at(proposal.weights, sample))
        best, losses = verdict.best, verdict.losses
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
            sparsity=1.0 - kept / self.partition.n,
            n_prune=self.partition.n - kept,
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
            samples=self.samples,
            seconds=0.0,
        )
        return best, record

    def _curvature(self, weights: Tensor, keep: Tensor) -> StageModel:
        """Rows at `weights` of the weights still there, and the channel term if there is to be one."""
        options, step = self.options, f"_s{self.state.stages:04d}"
        with self._phase("curvature"):
            found = gradient_rows(
                self.model,
                self.data,
                self.loss_fn,
                self.partition,
                curvature=options.curvature,
                samples=options.samples,
                samples_per_row=options.samples_per_row,
                memory_limit=self.memory_limit,
                seed=self._next_pass(),
                weights=weights,
                # A channel's slope is that of all its weights, pruned ones as well.
                keep=None if options.layer_input_weight else keep,
                gradient=False,
                progress=False,
                journal=self.done.rows(step),
            )
        self.samples += found.samples
        if not options.layer_input_weight:
            return StageModel(self.partition, keep, found.rows)
        seed = self._next_pass()
        with self._phase("layer inputs"):
            moments = self.done.moments(
                lambda: input_moments(
                    self.model, self.data, self.partition, samples=INPUT_SAMPLES, seed=seed, weights=weights
                ),
                step,
            )
            both = with_layer_inputs(
                found,
                self.model,
                self.data,
                self.partition,
                weight=options.layer_input_weight,
                moments=moments,
            )
        assert both.channels is not None
        return StageModel(self.partition, keep, found.rows[:, keep], both.channels.restricted(keep))

    def _gradient(self, weights: Tensor, model: StageModel) -> Tensor:
        """The gradient at `weights` in those still there."""
        with self._phase("gradient"):
            found, used = mean_gradient(
                self.model,
                self.data,
                self.loss_fn,
                self.partition,
                samples=self.plan.gradient_samples or self.options.samples,
                seed=self._next_pass(),
                weights=weights,
                progress=False,
            )
        self.samples += used
        return found[model.keep]

    def _draw_sample(self) -> Sample:
        """Samples on which networks are compared, fresh ones each time."""
        batches = iterate(
            self.data,
            batch_size=512,
            max_samples=self.options.choice_samples or self.options.samples,
            seed=self._next_pass(),
            device=device_of(self.model),
        )
        return [(batch.inputs, batch.labels) for batch in batches]

    def _next_pass(self) -> int:
        """Begin another pass over the data; its seed.

        A loader that has `set_epoch`, as samplers of PyTorch have, is told the number of the pass, so
        that it can give other samples in each and the same ones in a run that is resumed.
        """
        number = self.passes
        self.passes += 1
        set_epoch = getattr(self.data, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(number)
        return self.options.seed + SEED_STEP * number

    def _loss_at(self, weights: Tensor, sample: Sample) -> float:
        return evaluate(TrialNetwork(self.model, self.partition, weights), sample, self.loss_fn).loss

    def _read_states(self) -> None:
        """Take over the stages on disk."""
        for state in () if self.states is None else self.states.states():
            self.state = state
            self._announce()

    def _announce(self) -> None:
        if self.on_stage is None:
            return
        state = self.state
        self.on_stage(
            StageResult(
                stage=state.stages - 1,
                stages=len(self.plan.updates),
                sparsity=1.0 - int(state.keep.sum()) / self.partition.n,
                network=TrialNetwork(self.model, self.partition, state.weights),
                weights=as_parameters(self.model, self.partition, state.weights),
                keep=self.partition.keep_by_parameter(state.keep),
                records=tuple(record for record in state.records if record.stage == state.stages - 1),
            )
        )
