"""One run of `prune`: its candidates, the choice among them, and the record of what was done."""

from __future__ import annotations

import itertools
import math
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cbs_opt.batches import Data, Evaluation, LossFunction, device_of, evaluate, iterate
from cbs_opt.blocks import FisherBlock, Partition
from cbs_opt.budget import allocate
from cbs_opt.certification import PathLike, certify_report
from cbs_opt.curvature import GradientRows, gradient_rows
from cbs_opt.heuristics.products import KeptGram, column_squares, step_loss
from cbs_opt.heuristics.updates import cbs_updates, independent_updates
from cbs_opt.layer_inputs import with_layer_inputs
from cbs_opt.prune_options import PruneOptions
from cbs_opt.report import BlockSummary, LayerSummary, PruneReport
from cbs_opt.selection import Choice
from cbs_opt.write_back import TrialNetwork
from formulations.errors import ArgumentError, ShapeError

SHARED_GRAM_SIZE = 1 << 26
"""Numbers in the Gram matrices that are kept from one tried network to the next: 512 MiB."""
Sample = list[tuple[Any, Tensor]]
"""Batches of inputs and labels that networks are compared on."""
UPDATERS = {"cbs": cbs_updates, "independent": independent_updates}


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One pruned network: its sets, its flat weights in float64, and what it was made with."""

    choices: list[Choice]
    weights: Tensor
    keep: Tensor
    damping: float
    scale: float
    loss: float | None
    layer_inputs: float = 0.0

    @property
    def rank(self) -> float:
        """What the choice goes by: the training loss, where NaN is worse than anything."""
        return math.inf if self.loss is None or math.isnan(self.loss) else self.loss


class PruneRun:
    """One call of `prune` after its arguments were checked."""

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        options: PruneOptions,
        loss_fn: LossFunction,
        curvature: GradientRows | None,
        progress: bool,
    ) -> None:
        if curvature is not None and curvature.rows.shape[1:] != (partition.n,):
            found = f"rows of shape {tuple(curvature.rows.shape)} for {partition.n} weights"
            raise ShapeError("curvature", found, "compute them with the same target and ignore")
        self.model = model
        self.partition = partition
        self.options = options
        self.loss_fn = loss_fn
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.weights = partition.flatten(model)
        self.curvature = curvature
        self.grams: dict[str, KeptGram] = {}
        self.sample: Sample | None = None

    def read_training_data(self, data: Data | None, memory_limit: int) -> None:
        """Take the gradient rows, and the samples on which networks are compared."""
        options = self.options
        if data is None:
            missing = self.curvature is None or self._lacks_term
            if (options.needs_curvature and missing) or options.candidates > 1:
                remedy = "pass training data, or use magnitude with update=False"
                raise ArgumentError("data", f"None, but {options.method} needs it", remedy)
            return
        if options.needs_curvature and self.curvature is None:
            with self._phase("curvature"):
                self.curvature = gradient_rows(
                    self.model,
                    data,
                    self.loss_fn,
                    self.partition,
                    curvature=options.curvature,
                    samples=options.samples,
                    samples_per_row=options.samples_per_row,
                    memory_limit=memory_limit,
                    seed=options.seed,
                    progress=self.progress,
                )
        if self.curvature is not None and self._lacks_term:
            with self._phase("layer inputs"):
                self.curvature = with_layer_inputs(
                    self.curvature, self.model, data, self.partition, seed=options.seed
                )
        batches = iterate(
            data,
            batch_size=512,
            max_samples=options.choice_samples or options.samples,
            seed=options.seed,
            device=device_of(self.model),
        )
        self.sample = [(batch.inputs, batch.labels) for batch in batches]

    def best_candidate(self) -> Candidate:
        """Select and update for every restart, damping and step length; the lowest loss wins."""
        options = self.options
        unit = self._mean_diagonal() if options.relative_damping else 1.0
        best: Candidate | None = None
        silent = None if self.progress and options.candidates > 1 else True
        with tqdm(total=options.candidates, desc="networks", unit="network", disable=silent) as bar:
            for candidate in self._candidates(unit):
                if best is None or candidate.rank < best.rank:
                    best = candidate
                bar.update()
        assert best is not None
        return best

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
        blocks = self._summaries(best)
        keep = self.partition.keep_by_parameter(best.keep)
        selection = [block.selection_loss for block in blocks if block.selection_loss is not None]
        updated = [block.updated_loss for block in blocks if block.updated_loss is not None]
        return PruneReport(
            method=options.method,
            program=options.program,
            update=options.update is not None,
            curvature=options.curvature,
            partition=options.partition,
            budget=options.budget,
            requested_sparsity=options.sparsity,
            n=self.partition.n,
            n_prune=int((~best.keep).sum()),
            layers=self._layers(best, keep),
            blocks=blocks,
            predicted_selection_loss=sum(selection) if selection else None,
            predicted_loss_increase=sum(updated) if updated else None,
            train_before=train_before,
            train_after=train_after,
            before=measured[0],
            after=measured[1],
            seconds=self.seconds,
            peak_memory_bytes=_peak_memory(),
            samples=0 if self.curvature is None else self.curvature.samples,
            rows=0 if self.curvature is None else self.curvature.rows.shape[0],
            damping=best.damping,
            layer_inputs=best.layer_inputs,
            update_scale=best.scale if options.update is not None else None,
            seed=options.seed,
            masks={name: mask.cpu() for name, mask in keep.items()},
            settings=options.settings(),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cbs-opt": version("cbs-opt"),
            },
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
            return certify_report(
                report,
                self._blocks(damping, layer_inputs, gradient=options.gradient_term),
                [~choice.pruned for choice in best.choices],
                proved=proved,
                time_limit=options.certify_time_limit,
                block_dir=block_dir,
                progress=self.progress,
            )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def _blocks(self, damping: float, layer_inputs: float, *, gradient: bool) -> list[FisherBlock]:
        rows = (
            self.weights.new_zeros((0, self.partition.n)) if self.curvature is None else self.curvature.rows
        )
        slope = self.curvature.gradient if gradient and self.curvature is not None else None
        term = None if self.curvature is None or not layer_inputs else self.curvature.channels
        term = None if term is None else term.scaled(layer_inputs / term.weight)
        return [
            FisherBlock(
                name=span.name,
                start=span.start,
                stop=span.stop,
                weights=self.weights[span.start : span.stop],
                rows=rows[:, span.start : span.stop],
                gradient=None if slope is None else slope[span.start : span.stop],
                damping=damping,
                channels=None if term is None else term.within(span.start, span.stop),
            )
            for span in self.partition.blocks
        ]

    def _mean_diagonal(self) -> float:
        """Mean diagonal entry of the Fisher matrix, without damping."""
        if self.curvature is None:
            raise ArgumentError("relative_damping", "True without curvature", "use False")
        return float(column_squares(self.curvature.rows).mean())

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
            blocks = [replace(block, channels=None) for block in blocks]
        with self._phase("selection"):
            choices: list[Choice] = options.engine(
                blocks,
                counts,
                limits=options.limits(restart),
                **alternative,
            )
        return choices

    def _updated(
        self, choices: list[Choice], dampings: list[float], layer_inputs: float
    ) -> Iterator[Candidate]:
        """The networks that one selection gives: one a damping and step length."""
        options = self.options
        pruned = torch.cat([choice.pruned for choice in choices])
        before = self.weights.double()
        if options.update is None:
            removed = torch.where(pruned, 0.0, self.weights)
            yield self._candidate(choices, removed, dampings[0], 1.0, layer_inputs)
            return
        with self._phase("update"):
            update = UPDATERS[options.update]
            blocks = self._blocks(dampings[0], layer_inputs, gradient=options.gradient_term)
            found = [
                update(block, choice.pruned, dampings, self._gram(block))
                for block, choice in zip(blocks, choices, strict=True)
            ]
        for damping, pieces in zip(dampings, zip(*found, strict=True), strict=True):
            target = torch.cat(pieces)
            for scale in options.update_scale:
                moved = torch.where(pruned, 0.0, before + scale * (target - before))
                yield self._candidate(choices, moved, damping, scale, layer_inputs)

    def _gram(self, block: FisherBlock) -> KeptGram | None:
        """The Gram matrix that tried networks share, where there are few enough blocks to keep them."""
        if block.rows is None or len(self.partition.blocks) * block.rows.shape[0] ** 2 > SHARED_GRAM_SIZE:
            return None
        if block.name not in self.grams:
            self.grams[block.name] = KeptGram(block.rows)
        return self.grams[block.name]

    def _candidate(
        self, choices: list[Choice], weights: Tensor, damping: float, scale: float, layer_inputs: float
    ) -> Candidate:
        loss = None
        if self.options.candidates > 1:
            with self._phase("choice"):
                evaluation = self._loss(TrialNetwork(self.model, self.partition, weights))
                loss = None if evaluation is None else evaluation.loss
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

    def _summaries(self, best: Candidate) -> tuple[BlockSummary, ...]:
        summaries = []
        blocks = self._blocks(best.damping, best.layer_inputs, gradient=self.options.gradient_term)
        for block, choice in zip(blocks, best.choices, strict=True):
            before = block.weights.double()
            selection = updated = None
            if self.curvature is not None:
                selection = step_loss(block, torch.where(choice.pruned, -before, 0.0))
                updated = step_loss(block, best.weights[block.start : block.stop].double() - before)
            summaries.append(
                BlockSummary(
                    name=block.name,
                    n=block.n,
                    n_prune=int(choice.pruned.sum()),
                    selection_loss=selection,
                    updated_loss=updated,
                    initial_loss=choice.initial_value,
                    iterations=choice.iterations,
                    locally_optimal=choice.locally_optimal,
                    seconds=choice.seconds,
                    bound=choice.bound,
                    status=choice.status,
                )
            )
        return tuple(summaries)

    def _layers(self, best: Candidate, keep: Mapping[str, Tensor]) -> tuple[LayerSummary, ...]:
        before, after = self.partition.split(self.weights), self.partition.split(best.weights)
        return tuple(
            LayerSummary.from_weights(name, before[name].cpu(), after[name].cpu(), mask.cpu())
            for name, mask in keep.items()
        )


def _peak_memory() -> int:
    """Peak resident memory of the process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
