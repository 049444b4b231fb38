"""How much memory each phase of a run adds to the process, from the sizes of what it allocates.

Networks and data are not known by size alone, so what they take is counted on up to four samples
(`cbs_opt.plan.allocation_meter`) and carried on in a straight line. The rest is arithmetic.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import torch

from cbs_opt.curvature.builder import chunk_sizes
from cbs_opt.curvature.disk import buffered_rows
from cbs_opt.curvature.fisher import READ_AHEAD
from cbs_opt.curvature.gradients import NetworkFunction, probe, require_classifier
from cbs_opt.curvature.layer_inputs import BATCH_SIZE, INPUT_SAMPLES, input_moments
from cbs_opt.curvature.rows import StoredRows
from cbs_opt.network.data import Batch, Inputs, map_tensors
from cbs_opt.network.evaluation import evaluate
from cbs_opt.plan.allocation_meter import extrapolated, peak_of
from cbs_opt.plan.working_set import (
    DOUBLE,
    PRODUCT_VECTORS,
    BlockSize,
    score_bytes,
    selection_bytes,
    update_bytes,
)
from cbs_opt.runs.rows import MOST_BYTES
from cbs_opt.update.grams import SHARED_GRAM_SIZE

if TYPE_CHECKING:
    from cbs_opt.oneshot import PruneRun

EVALUATION_BATCH = 512
"""Samples that a network is evaluated on at a time."""
BUDGET_VECTORS = 6
"""Vectors of length n while a global budget is spent: scores, their pieces, a copy, a sort and its sums."""
CANDIDATE_VECTORS = 6
"""Vectors of length n while candidates are made and compared."""


class MemoryModel:
    """Bytes by phase of a run that has drawn its sample.

    Parameters
    ----------
    run : PruneRun
    memory_limit : int
        For temporaries of the curvature.
    kept : bool, default False
        Rows are kept in a `run_dir` too.

    Attributes
    ----------
    rows, itemsize : int
        Number of gradient rows and bytes of one entry.
    on_disk : bool
    complete : bool
        Whether every phase is known; solvers and runs in stages are not.
    """

    def __init__(self, run: PruneRun, memory_limit: int, *, kept: bool = False) -> None:
        self._run = run
        self._kept = kept
        self._memory_limit = memory_limit
        self._options = run.options
        self._n = run.partition.n
        self.itemsize = torch.promote_types(run.weights.dtype, torch.float32).itemsize
        self._batch = _first(run)
        self._function = NetworkFunction(run.model, run.partition, run.loss_fn)
        self._classes, self._saved = (None, 0) if self._batch is None else self._probed(self._batch)
        self.rows = self._row_count()
        given = run.curvature
        self.on_disk = isinstance(given, StoredRows) or (
            given is None and not run.row_place.holds(run.partition, self.rows, self.itemsize)
        )
        own = None if given is None else given.channels
        weights = self._options.layer_inputs or (() if own is None else (own.weight,))
        self._term = any(weights) and self._options.needs_curvature
        self.complete = run.weights.device.type == "cpu"

    def phases(self) -> dict[str, int]:
        """Most bytes that each phase adds to what the process had before."""
        found: dict[str, int] = {}
        if self._options.needs_curvature and self._batch is not None:
            if self._run.curvature is None:
                found["curvature"] = self._curvature(self._batch)
            if self._term and (self._run.curvature is None or self._run.curvature.channels is None):
                found["layer inputs"] = self._held_rows() + self._layer_inputs(self._batch)
        sizes = self._sizes()
        kept = self._held_rows() + self._moments()
        if self._options.budget != "uniform" and len(self._run.partition.blocks) > 1:
            scores = self._block_rows() + max(self._score(size) for size in sizes) + DOUBLE * self._n
            found["budget"] = kept + max(scores, BUDGET_VECTORS * DOUBLE * self._n)
        chosen = [selection_bytes(self._options.method, self._options.program, size) for size in sizes]
        self.complete = self.complete and None not in chosen and not self._options.certify
        found["selection"] = kept + self._block_rows() + max(size or 0 for size in chosen)
        kept += self._grams()
        vectors = CANDIDATE_VECTORS * DOUBLE * self._n
        if self._options.update is not None:
            # The sets, the weights before and those after the update, and what is made for a block.
            updated = (1 + len(self._options.damping)) * DOUBLE * self._n
            most = max(update_bytes(self._options.update, size) for size in sizes)
            found["update"] = kept + updated + max(2 * self._n + self._block_rows() + most, vectors)
        evaluated = 0 if self._batch is None else self._evaluation(self._batch)
        found["evaluation"] = kept + vectors + self.itemsize * self._n + evaluated
        return found

    def _probed(self, batch: Batch) -> tuple[int | None, int]:
        return probe(self._function, batch.take(slice(1)))

    def _row_count(self) -> int:
        options, given = self._options, self._run.curvature
        if given is not None:
            return given.shape[0]
        if not options.needs_curvature or self._run.sample is None:
            return 0
        drawn = sum(len(labels) for _, labels in self._run.sample)
        wanted = options.choice_samples or options.samples
        # Fewer than were asked for is all that there are.
        samples = options.samples if drawn == wanted else min(options.samples, drawn)
        rows = max(1, samples // options.samples_per_row)
        if options.curvature == "exact_fisher":
            rows *= require_classifier(self._classes, options.curvature)
        return rows

    def _held_rows(self) -> int:
        """Rows in memory and the gradient, from the curvature on."""
        if self._run.curvature is not None or not self.rows:
            return 0
        return self.itemsize * self._n * (1 if self.on_disk else self.rows + 1)

    def _block_rows(self) -> int:
        """Rows of the largest block while it is worked on."""
        largest = max(block.stop - block.start for block in self._run.partition.blocks)
        return self.rows * largest * self.itemsize if self.on_disk else 0

    def _curvature(self, batch: Batch) -> int:
        """Rows or their buffer, the samples that are read, and the gradients of a chunk."""
        options = self._options
        row = self.itemsize * self._n
        sample = _bytes(batch) // batch.size
        read = sample * max(options.samples, min(options.samples, READ_AHEAD))
        gradients = self._gradients(batch)
        if self._kept:
            # Rows that wait to be written, and the piece that they are joined to.
            gradients += 2 * min(MOST_BYTES, row * self.rows)
        if not self.on_disk:
            return row * (self.rows + 1) + max(row, read + gradients)
        limit = self._run.row_place.memory
        assert limit is not None
        held = buffered_rows(self.rows, row, limit)
        written = held * self._block_rows() // max(1, self.rows)
        # The buffer and the gradient, the sum of all rows, and a chunk that finds the buffer full.
        filled = row * (held + 1) + DOUBLE * self._n + read + gradients + written
        # The last block that is scaled, the gradient, and the sum and the mean of the rows.
        return max(filled, self._block_rows() + 2 * row + 2 * DOUBLE * self._n)

    def _gradients(self, batch: Batch) -> int:
        """What differentiating one chunk of samples allocates."""
        options = self._options
        parameters = self._function.parameters.values()
        gradient_bytes = sum(tensor.numel() * tensor.element_size() for tensor in parameters)
        chunk, group = chunk_sizes(self._memory_limit, gradient_bytes, self._saved)
        available = batch.size

        def added_up(count: int) -> int:
            part = batch.take(slice(count))
            return peak_of(lambda: self._function.mean_gradient(part, count))

        def alone(count: int) -> int:
            part = batch.take(slice(count))
            if options.curvature != "exact_fisher":
                return peak_of(lambda: self._function.sample_gradients(part))
            classes = min(chunk, require_classifier(self._classes, options.curvature))
            return peak_of(lambda: self._function.class_gradients(part, slice(classes)))

        if options.samples_per_row > 1 or options.curvature == "sketched_fisher":
            return extrapolated(added_up, min(options.samples_per_row, group), available)
        if options.curvature == "exact_fisher":
            chunk = max(1, chunk // require_classifier(self._classes, options.curvature))
        chunk = min(chunk, options.samples, READ_AHEAD)
        single = extrapolated(alone, chunk, available)
        if options.curvature == "empirical_fisher":
            return single
        return max(single, extrapolated(added_up, min(chunk, group), available))

    def _moments(self) -> int:
        """Second moments of layer inputs: one float64 matrix a layer."""
        if not self._term:
            return 0
        fans = (math.prod(span.shape[1:]) for span in self._run.partition.parameters)
        return DOUBLE * sum(fan**2 for fan in fans)

    def _layer_inputs(self, batch: Batch) -> int:
        """The pass that takes the moments, and the match with the rows."""

        def taken(count: int) -> int:
            part = batch.take(slice(count))
            pair = part.inputs, part.labels
            return peak_of(lambda: input_moments(self._run.model, [pair], self._run.partition))

        sample = _bytes(batch) // batch.size
        passed = extrapolated(taken, min(BATCH_SIZE, INPUT_SAMPLES), batch.size) + sample * INPUT_SAMPLES
        widest = max(block.stop - block.start for block in self._run.partition.blocks)
        matched = PRODUCT_VECTORS * DOUBLE * (widest if self.on_disk else self._n) + self._block_rows()
        return max(passed, self._moments() + matched + DOUBLE * self._n)

    def _sizes(self) -> list[BlockSize]:
        """Blocks by size, the largest first, with what their channels take."""
        partition, options = self._run.partition, self._options
        alike = Counter(block.stop - block.start for block in partition.blocks)
        factors: dict[int, int] = {}
        for block in partition.blocks:
            size = block.stop - block.start
            own = 0
            for span in partition.parameters_of(block) if self._term else ():
                fan = math.prod(span.shape[1:])
                own += DOUBLE * fan * (min(block.stop, span.stop) - max(block.start, span.start))
            factors[size] = max(factors.get(size, 0), own)
        return [
            BlockSize(
                n=n,
                n_keep=n - round(options.sparsity * n),
                m=self.rows,
                itemsize=self.itemsize,
                factors=factors[n],
                alike=alike[n],
            )
            for n in sorted(alike, reverse=True)
        ]

    def _score(self, size: BlockSize) -> int:
        options = self._options
        joint = options.budget_score is None and options.chosen_method.kind == "search"
        if joint and options.program == "joint":
            return score_bytes("joint", size)
        scoring = options.scoring
        return score_bytes(scoring.name if scoring.kind == "saliency" else "magnitude", size)

    def _grams(self) -> int:
        """Gram matrices that are kept for further candidates."""
        numbers = len(self._run.partition.blocks) * self.rows**2
        return DOUBLE * numbers if self._options.update == "cbs" and numbers <= SHARED_GRAM_SIZE else 0

    def _evaluation(self, batch: Batch) -> int:
        drawn = sum(len(labels) for _, labels in self._run.sample or ())

        def passed(count: int) -> int:
            part = batch.take(slice(count))
            pair = part.inputs, part.labels
            return peak_of(lambda: evaluate(self._run.model, [pair], self._run.loss_fn))

        return extrapolated(passed, min(EVALUATION_BATCH, drawn), batch.size)


def _first(run: PruneRun) -> Batch | None:
    """The first batch of the sample that networks are compared on."""
    return None if not run.sample else Batch(inputs=run.sample[0][0], labels=run.sample[0][1])


def _bytes(batch: Batch) -> int:
    """Of inputs and labels."""
    sizes = [batch.labels.nbytes]

    def add(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    inputs: Inputs = batch.inputs
    map_tensors(add, inputs)
    return sum(sizes)
