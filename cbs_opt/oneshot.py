"""One run of `prune`: its candidates, the choice among them, and the record of what was done."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cbs_opt.budget.counts import allocate
from cbs_opt.candidates import Candidate, block_summaries, layer_summaries
from cbs_opt.certify.certificates import ChosenSet, PathLike, certify_blocks
from cbs_opt.curvature.fisher import GradientRows
from cbs_opt.curvature.layer_inputs import input_moments, with_layer_inputs
from cbs_opt.curvature.rows import RowPlace, StoredRows, streamed_rows
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.on_demand import OnDemand
from cbs_opt.network.data import Data, LossFunction, device_of, iterate
from cbs_opt.network.evaluation import Evaluation, evaluate
from cbs_opt.network.partition import Partition
from cbs_opt.network.trial import TrialNetwork
from cbs_opt.prune_options import PruneOptions
from cbs_opt.report.certified import with_certificates
from cbs_opt.report.record import PruneReport
from cbs_opt.runs.fingerprint import run_fingerprint
from cbs_opt.runs.folder import RunStore
from cbs_opt.runs.progress import LossLedger, RunProgress
from cbs_opt.select.choice import Choice
from cbs_opt.select.selectors import without_channels
from cbs_opt.system.memory import process_peak
from cbs_opt.system.versions import library_versions
from cbs_opt.update.cbs import cbs_updates, independent_updates
from cbs_opt.update.grams import SharedGrams
from formulations.errors import ArgumentError, ShapeError

Sample = list[tuple[Any, Tensor]]
"""Batches of inputs and labels that networks are compared on."""
UPDATERS = {"cbs": cbs_updates, "independent": independent_updates}


class PruneRun:
    """One call of `prune` after its arguments were checked."""

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        options: PruneOptions,
        loss_fn: LossFunction,
        curvature: GradientRows | StoredRows | None,
        progress: bool,
    ) -> None:
        if curvature is not None and curvature.shape[1] != partition.n:
            found = f"rows of shape {curvature.shape} for {partition.n} weights"
            raise ShapeError("curvature", found, "compute them with the same target and ignore")
        if isinstance(curvature, StoredRows) and curvature.partition.blocks != partition.blocks:
            raise ShapeError("curvature", "rows on disk in other blocks", "use one partition for both")
        self.model = model
        self.partition = partition
        self.options = options
        self.loss_fn = loss_fn
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.weights = partition.flatten(model)
        self.curvature = self._given = curvature
        self.grams = SharedGrams(len(partition.blocks))
        self.sample: Sample | None = None
        self.row_place = RowPlace()
        self.done = RunProgress()
        self._best: Candidate | None = None
        self._selections = 0

    def draw_sample(self, data: Data | None) -> None:
        """Take the samples on which networks are compared: the first pass over the data."""
        options = self.options
        if data is None:
            missing = self.curvature is None or self._lacks_term
            if (options.needs_curvature and missing) or options.candidates > 1:
                remedy = "pass training data, or use magnitude with update=False"
                raise ArgumentError("data", f"None, but {options.method} needs it", remedy)
            return
        batches = iterate(
            data,
            batch_size=512,
            max_samples=options.choice_samples or options.samples,
            seed=options.seed,
            device=device_of(self.model),
        )
        self.sample = [(batch.inputs, batch.labels) for batch in batches]

    def fingerprint(self, memory_limit: int, held_out: Data | None) -> dict[str, Any]:
        """Everything that decides the result."""
        return run_fingerprint(
            self.model,
            self.partition,
            self.loss_fn,
            self.options,
            self.sample or [],
            memory_limit=memory_limit,
            curvature=self.curvature,
            held_out=held_out,
        )

    def go_on(self, store: RunStore) -> None:
        """Keep what is found in `store`, and begin with what is there."""
        self.done = RunProgress(store, self.weights.device)

    def finished(self, block_dir: PathLike | None) -> tuple[Tensor, PruneReport] | None:
        """Weights and report, if the run is finished."""
        return self.done.finished(self.partition, block_dir)

    def take_curvature(self, data: Data | None, memory_limit: int) -> None:
        """Take the gradient rows and the layer-input term, as far as they are needed and not given."""
        options = self.options
        if data is None:
            return
        if options.needs_curvature and self.curvature is None:
            with self._phase("curvature"):
                self.curvature = streamed_rows(
                    self.model,
                    data,
                    self.loss_fn,
                    self.partition,
                    row_memory=self.row_place.memory,
                    row_dir=self.row_place.folder,
                    curvature=options.curvature,
                    samples=options.samples,
                    samples_per_row=options.samples_per_row,
                    memory_limit=memory_limit,
                    seed=options.seed,
                    progress=self.progress,
                    journal=self.done.rows(),
                )
        rows = self.curvature
        if rows is not None and self._lacks_term:
            with self._phase("layer inputs"):
                parts, seed = self.partition, options.seed
                moments = self.done.moments(lambda: input_moments(self.model, data, parts, seed=seed))
                self.curvature = with_layer_inputs(rows, self.model, data, parts, moments=moments)

    def close(self) -> None:
        """Give back the disk space of rows that this run took."""
        if isinstance(self.curvature, StoredRows) and self.curvature is not self._given:
            self.curvature.close()

    def best_candidate(self) -> Candidate:
        """Select and update for every restart, damping and step length; the lowest loss wins."""
        options = self.options
        unit = self._mean_diagonal() if options.relative_damping and options.needs_curvature else 1.0
        silent = None if self.progress and options.candidates > 1 else True
        with tqdm(total=options.candidates, desc="networks", unit="network", disable=silent) as bar:
            for candidate in self._candidates(unit):
                if self._best is None or candidate.rank < self._best.rank:
                    self._best = candidate
                bar.update()
        assert self._best is not None
        return self._best

    @property
    def _lacks_term(self) -> bool:
        """Whether a layer-input term is wanted that the curvature does not bring."""
        wanted = any(self.options.layer_inputs or ())
        return wanted and (self.curvature is None or self.curvature.channels is None)

    def _candidates(self, unit: float) -> Iterator[Candidate]:
        options = self.options
        own = None if self.curvature is None else self.curvature.channels
        for weight in options.layer_inputs or (0.0 if own is None else own.weight,):
            counts = self._counts(options.damping[0] * unit, weight)
            for restart, alternative in itertools.product(range(options.restarts), options.method_options):
                if options.selection_damping is not None:
                    selecting = options.selection_damping * unit
                    choices = self._select(counts, selecting, weight, restart, alternative)
                    dampings = [damping * unit for damping in options.damping]
                    yield from self._updated(choices, dampings, weight)
                    continue
                for damping in options.damping:
                    choices = self._select(counts, damping * unit, weight, restart, alternative)
                    yield from self._updated(choices, [damping * unit], weight)

    def report(self, best: Candidate, data: Data | None) -> PruneReport:
        """Evaluate the chosen network without writing it, and put everything on record."""
        options = self.options
        after = TrialNetwork(self.model, self.partition, best.weights)
        with self._phase("evaluation"):
            train_before = self._loss(self.model)
            train_after = self._loss(after)
            measured = [
                None if data is None else evaluate(network, data, self.loss_fn, argument="evaluate")
                for network in (self.model, after)
            ]
        blocks = block_summaries(
            self._blocks(best.damping, best.layer_inputs, gradient=options.gradient_term),
            best,
            modelled=self.curvature is not None,
            by_rows=options.selects_by_rows,
        )
        keep = self.partition.keep_by_parameter(best.keep)
        selection = [block.selection_loss for block in blocks if block.selection_loss is not None]
        updated = [block.updated_loss for block in blocks if block.updated_loss is not None]
        return PruneReport(
            method=options.method,
            kind=options.chosen_method.kind,
            program=options.program,
            update=options.update is not None,
            curvature=options.curvature,
            partition=options.partition,
            budget=options.budget,
            requested_sparsity=options.sparsity,
            n=self.partition.n,
            n_prune=int((~best.keep).sum()),
            layers=layer_summaries(self.partition, self.weights, best.weights, keep),
            blocks=blocks,
            predicted_selection_loss=sum(selection) if selection else None,
            predicted_loss_increase=sum(updated) if updated else None,
            train_before=train_before,
            train_after=train_after,
            before=measured[0],
            after=measured[1],
            seconds=self.seconds,
            peak_memory_bytes=process_peak(),
            samples=0 if self.curvature is None else self.curvature.samples,
            rows=0 if self.curvature is None else self.curvature.shape[0],
            damping=best.damping,
            layer_inputs=best.layer_inputs,
            update_scale=best.scale if options.update is not None else None,
            seed=options.seed,
            masks={name: mask.cpu() for name, mask in keep.items()},
            settings=options.settings(),
            versions=library_versions(),
        )

    def certified(self, report: PruneReport, best: Candidate, block_dir: PathLike | None) -> PruneReport:
        """The report with a bound and its certificate for every block, for the sets that were chosen."""
        options = self.options
        damping, proved = best.damping, [choice.bound for choice in best.choices]
        layer_inputs = 0.0 if options.selects_by_rows else best.layer_inputs
        if options.selection_damping is not None:
            if options.program == "selection":
                unit = self._mean_diagonal() if options.relative_damping else 1.0
                damping = options.selection_damping * unit
            else:
                # The sets were chosen for another Hessian than the one that the update minimises.
                proved = [None] * len(proved)
        with self._phase("certificates"):
            certified = certify_blocks(
                self._blocks(damping, layer_inputs, gradient=options.gradient_term),
                [
                    ChosenSet(keep=~choice.pruned, proved=bound)
                    for choice, bound in zip(best.choices, proved, strict=True)
                ],
                report.program,
                method=report.method,
                time_limit=options.certify_time_limit,
                block_dir=block_dir,
                progress=self.progress,
                path_of=self.done.certificate_path,
            )
        return with_certificates(report, certified)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def _blocks(self, damping: float, layer_inputs: float, *, gradient: bool) -> Sequence[FisherBlock]:
        """The blocks with their model; of rows on disk, each when it is asked for."""
        slope = self.curvature.gradient if gradient and self.curvature is not None else None
        term = None if self.curvature is None or not layer_inputs else self.curvature.channels
        term = None if term is None else term.scaled(layer_inputs / term.weight)

        def block(number: int) -> FisherBlock:
            span = self.partition.blocks[number]
            weights = self.weights[span.start : span.stop]
            return FisherBlock(
                name=span.name,
                start=span.start,
                stop=span.stop,
                weights=weights,
                rows=weights.new_zeros((0, len(weights)))
                if self.curvature is None
                else self.curvature.block(span.start, span.stop),
                gradient=None if slope is None else slope[span.start : span.stop],
                damping=damping,
                channels=None if term is None else term.within(span.start, span.stop),
            )

        blocks = OnDemand(block, len(self.partition.blocks))
        return blocks if isinstance(self.curvature, StoredRows) else list(blocks)

    def _mean_diagonal(self) -> float:
        """Mean diagonal entry of the Fisher matrix, without damping."""
        if self.curvature is None:
            raise ArgumentError("relative_damping", "True without curvature", "use False")
        return float(self.curvature.column_squares().mean())

    def _counts(self, damping: float, layer_inputs: float) -> list[int]:
        scores = None
        if self.options.budget != "uniform" and len(self.partition.blocks) > 1:
            scoring = self.options.scoring
            needs_gradient = self.options.gradient_term or scoring.kind == "saliency"
            blocks = self._blocks(damping, layer_inputs, gradient=needs_gradient)
            scores = torch.cat([scoring.score(block) for block in blocks])
        return allocate(self.partition, self.options.sparsity, budget=self.options.budget, scores=scores)

    def _select(
        self,
        counts: list[int],
        damping: float,
        layer_inputs: float,
        restart: int,
        alternative: Mapping[str, Any],
    ) -> list[Choice]:
        options = self.options
        scored = options.chosen_method.kind == "saliency"
        blocks = self._blocks(damping, layer_inputs, gradient=options.gradient_term or scored)
        if options.selects_by_rows:
            blocks = without_channels(blocks)
        ledger = self.done.selection(self._selections, [block.n for block in blocks])
        self._selections += 1
        if ledger.complete:
            return ledger.choices()
        engine = options.engine
        takes = "ledger" in inspect.signature(engine).parameters
        known = {"ledger": ledger} if takes else {}
        with self._phase("selection"):
            choices: list[Choice] = engine(
                blocks, counts, limits=options.limits(restart), **known, **alternative
            )
            ledger.close(choices)
        return choices

    def _updated(
        self, choices: list[Choice], dampings: list[float], layer_inputs: float
    ) -> Iterator[Candidate]:
        """The networks that one selection gives, one a damping and step length.

        Those of a run that goes on are left out where their losses are known and not the lowest so far.
        """
        options = self.options
        sets = [choice.pruned for choice in choices]
        pruned = torch.cat(sets)
        before = self.weights.double()
        scales = options.update_scale if options.update is not None else (1.0,)
        losses = self.done.losses(self._selections, len(dampings) * len(scales))
        if options.update is None:
            removed = torch.where(pruned, 0.0, self.weights)
            yield self._candidate(choices, removed, dampings[0], 1.0, layer_inputs, losses, 0)
            return
        blocks = self._blocks(dampings[0], layer_inputs, gradient=options.gradient_term)
        lowest = losses.lowest()
        if self._best is not None and lowest is not None and lowest >= self._best.rank:
            if options.update == "cbs":
                self.grams.pass_over(blocks, sets)
            return
        with self._phase("update"):
            found = self.grams.updates(UPDATERS[options.update], blocks, sets, dampings)
        number = itertools.count()
        for damping, pieces in zip(dampings, zip(*found, strict=True), strict=True):
            target = torch.cat(pieces)
            for scale in scales:
                moved = torch.where(pruned, 0.0, before + scale * (target - before))
                yield self._candidate(choices, moved, damping, scale, layer_inputs, losses, next(number))

    def _candidate(
        self,
        choices: list[Choice],
        weights: Tensor,
        damping: float,
        scale: float,
        layer_inputs: float,
        losses: LossLedger,
        number: int,
    ) -> Candidate:
        loss = None
        if self.options.candidates > 1:
            with self._phase("choice"):
                network = TrialNetwork(self.model, self.partition, weights)
                loss = losses.loss(number, lambda: evaluate(network, self.sample or [], self.loss_fn).loss)
        return Candidate(
            choices=choices,
            weights=weights,
            keep=~torch.cat([choice.pruned for choice in choices]),
            damping=damping,
            scale=scale,
            loss=loss,
            layer_inputs=layer_inputs,
        )

    def _loss(self, network: nn.Module) -> Evaluation | None:
        return None if self.sample is None else evaluate(network, self.sample, self.loss_fn)
