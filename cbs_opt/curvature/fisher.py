"""Gradient rows: the factor R of the Fisher model H = R^T R + damping I of a network's loss."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from cbs_opt.curvature.gradients import (
    Gradients,
    NetworkFunction,
    Signs,
    probe,
    require_classifier,
    require_evaluation_mode,
)
from cbs_opt.curvature.kinds import FISHERS, EmpiricalFisher, ExactFisher, Fisher, SketchedFisher
from cbs_opt.curvature.rows import Rows, RowsInMemory, RowsOnDisk, RowTarget, fit_in_memory
from cbs_opt.errors import EmptyDataError, LossError, NonFiniteGradientError
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.network.data import (
    Batch,
    Data,
    LossFunction,
    parts,
    peeked,
    read,
    regroup,
    sample_count,
    tensors_of,
)
from cbs_opt.network.eligible import Globs
from cbs_opt.network.objective import PEEKED, Objective, check_labels, logits_of
from cbs_opt.network.partition import BlockRule, Partition
from cbs_opt.network.state import kept
from cbs_opt.system.checks import finite_number, seed_number, whole_number
from cbs_opt.system.progress import Advance, Progress, ignored, reporting
from cbs_opt.system.resources import ORDINARY, Resources
from formulations.errors import ArgumentError, ShapeError, UnsupportedProblemError

log = logging.getLogger(__name__)

EMPIRICAL = EmpiricalFisher()
READ_AHEAD = 1024
"""Samples moved to the device of the network at a time."""
MOST_AT_ONCE = 256
"""Samples differentiated at once, each on its own: more are slower, as their gradients leave the caches."""


def gradient_rows(
    model: nn.Module,
    data: Data,
    loss_fn: LossFunction | Objective | None,
    partition: Partition,
    *,
    curvature: Fisher = EMPIRICAL,
    resources: Resources = ORDINARY,
    seed: int = 0,
    progress: Progress | bool = True,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
    gradient: bool = True,
    journal: Journal | None = None,
) -> Rows:
    """Compute gradient rows of a network's loss in the weights of a partition.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Its parameters, their `.grad`, buffers and modes are not touched.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        A loader is read in its own order; of a pair of tensors the samples are drawn without
        replacement. If there are fewer, all are used and a warning is logged.
    loss_fn : callable or None
        ``loss_fn(output, labels)``, see `prune`. Any loss for the empirical Fisher. The sketched one takes
        cross-entropy (over positions and tokens too), squared error and binary cross-entropy with logits,
        which it tells by their values. Of classifiers with another loss, and for the other kinds, the
        network's softmax is its distribution over classes, whose loss is cross-entropy; `loss_fn` is used
        for the gradient and for how much each sample counts.
    partition : Partition
        The weights, n of them.
    curvature : EmpiricalFisher, ExactFisher, MonteCarloFisher or SketchedFisher
        Which Fisher matrix is sampled, and from how many samples.
    resources : Resources
        `chunk_memory` bounds temporaries besides the rows: the chunk size follows from what the backward
        pass of a few samples saves. A sample is taken to need twice the gradient and five times that
        (averaged rows: three times that, and no gradient); one sample is the least. Rows that take more
        than `row_memory` go to a file in `row_dir`, one block of `partition` after the other; on a file
        system that is kept in memory (tmpfs) nothing is won.
    seed : int, default 0
        Draws the samples, the Monte-Carlo labels and the signs of sketches.
    progress : bool or Progress, default True
        A bar where standard error is a terminal, silence, or an object of one's own that is told.
    weights : (n,) Tensor, optional
        Take the gradients at these weights instead of the network's own.
    keep : (n,) bool Tensor, optional
        Compute only the columns of weights that are True here: the rows take less memory.
    gradient : bool, default True
        False spares the pass for the mean gradient, which only rows of the empirical Fisher have
        for nothing; `Rows.gradient` is then zero unless they are.
    journal : Journal, optional
        Where rows are put as they are made, and those that are there come from: to the same bits.

    Returns
    -------
    Rows
        ``m = samples / per_row`` rows, scaled by ``1 / sqrt(m)``; for the exact Fisher
        ``m = samples * C`` rows, class by class within each sample, scaled by
        ``1 / sqrt(samples)``. On the device of the network, in the dtype of the weights, float32 at
        least. Close those on disk, or use them as a context manager.

    Raises
    ------
    TrainingModeError
        If dropout or batch normalisation is in training mode.
    NonFiniteGradientError
        If a row holds NaN or infinity.
    PerSampleGradientError
        If there is no backward pass through the network or the loss.
    ForwardError, LossError, RandomOutputError
        If the network or the loss raises, the loss is no scalar or does not depend on the weights, or the
        network gives another output when it is run again.
    DataLoaderError, BatchFormatError, EmptyDataError, LabelRangeError
        If the data cannot be read or does not fit the network.
    UnsupportedProblemError
        If the curvature needs a classifier, or a loss of a certain form, and there is none.
    RowMemoryError, RowStoreError
        If the rows of the largest block alone exceed `row_memory`, or the folder cannot hold the rows;
        known before a gradient is computed.
    ArgumentError
        If an option is out of its range.

    Notes
    -----
    Peak memory is that of the rows, ``m n`` numbers, or `row_memory`, plus `chunk_memory`. Cost: one
    forward and one backward pass a sample (C backward passes for the exact Fisher, one a row for the
    sketched one). Rows on disk are written once, read and scaled once, and then read block by block as
    often as they are looked at.
    """
    if not isinstance(curvature, Fisher):
        kinds = ", ".join(record.__name__ for record in FISHERS.values())
        raise ArgumentError("curvature", f"{curvature!r}", f"pass one of {kinds}")
    if keep is not None and resources.row_memory is not None:
        raise ArgumentError("row_memory", "given beside keep", "leave it out: those rows stay in memory")
    seed_number("seed", seed)
    require_evaluation_mode(model)
    began = time.perf_counter()
    size = curvature.per_row
    with kept(model), ExitStack() as on_failure:

        def target_of(capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> RowTarget:
            # Of data that can be drawn from it is known how many samples they have; of others it is not.
            available = sample_count(data)
            if available is not None and not objective.in_batches:
                asked = max(1, curvature.samples // size)
                capacity = min(capacity, max(1, available // size) * (capacity // asked))
            memory, folder = resources.row_memory, resources.row_dir
            if memory is None or fit_in_memory(partition, capacity, dtype.itemsize, memory):
                return RowsInMemory(torch.empty(capacity, width, dtype=dtype, device=device))
            store = RowsOnDisk(partition, capacity, dtype, device, folder=folder, buffer_bytes=memory)
            on_failure.callback(store.close)
            return store

        objective = Objective.of(loss_fn)
        function = NetworkFunction(model, partition, objective, weights)
        builder = RowBuilder(
            function=function,
            partition=partition,
            curvature=curvature,
            seed=seed,
            chunk_memory=resources.chunk_memory,
            target_of=target_of,
            keep=keep,
            gradient=gradient,
            journal=Journal() if journal is None else journal,
        )
        wanted = curvature.samples
        batches = _settled(function, data, wanted, seed, min(wanted, READ_AHEAD))
        with reporting(progress).phase("gradients", wanted, unit="sample") as builder.advance:
            for batch in batches if size == 1 or objective.in_batches else regroup(batches, size):
                builder.consume(batch)
        mean = builder.finish()
        on_failure.pop_all()
    return Rows(
        store=builder.target,
        partition=partition,
        gradient=mean,
        samples=builder.samples,
        seconds=time.perf_counter() - began,
        curvature=curvature.kind,
    )


def mean_gradient(
    model: nn.Module,
    data: Data,
    loss_fn: LossFunction | Objective | None,
    partition: Partition,
    *,
    samples: int,
    batch_size: int = 256,
    seed: int = 0,
    weights: Tensor | None = None,
    progress: Progress | bool = True,
) -> tuple[Tensor, int]:
    """Return the gradient of the mean loss over many samples, by ordinary backward passes.

    `model`, `data`, `loss_fn`, `partition`, `seed`, `weights` and `progress`: see `gradient_rows`, also for
    errors. `samples`: samples to use; all that there are, if fewer. `batch_size`: samples in one backward
    pass. Returns the gradient, in the dtype of the weights, float32 at least; and the samples used.
    """
    whole_number("samples", samples)
    seed_number("seed", seed)
    require_evaluation_mode(model)
    objective = Objective.of(loss_fn)
    function = NetworkFunction(model, partition, objective, weights)
    total = torch.zeros(partition.n, dtype=function.dtype, device=function.device)
    used, mass = 0, 0.0
    counting = reporting(progress).phase("gradient", samples, unit="sample")
    with kept(model), counting as advance:
        for part in _settled(function, data, samples, seed, batch_size):
            mass += add_gradient(total, function, partition, part)
            used += part.size
            advance(part.size)
    if mass == 0.0:
        raise EmptyDataError("data", "labels that are all ignored", "pass samples with labels")
    total.div_(mass)
    if not bool(torch.isfinite(total).all()):
        raise NonFiniteGradientError("data", "the gradient is NaN or infinite", "check the loss and the data")
    return total, used


def add_gradient(total: Tensor, function: NetworkFunction, partition: Partition, part: Batch) -> float:
    """Add the gradient of a batch's mean loss to `total` (n,), times what the batch counts; return that."""
    batch = function.objective.prepared(part)
    shares = function.weights(batch)
    weight = batch.size if shares is None else float(shares.sum())
    weight = 1.0 if function.objective.in_batches else float(weight)
    (mean,) = function.differentiated(batch, batch.size, function.mean_loss(batch, shares))
    for name, piece in partition.split(total).items():
        piece.add_(mean[name].to(total), alpha=weight)
    return weight


def fisher_blocks(
    model: nn.Module,
    data: Data,
    *,
    loss_fn: LossFunction | Objective | None,
    partition: BlockRule | Partition = "layer",
    target: Globs | None = None,
    ignore: Globs = (),
    curvature: Fisher = EMPIRICAL,
    damping: float = 1e-3,
    resources: Resources = ORDINARY,
    seed: int = 0,
    progress: Progress | bool = True,
) -> list[FisherBlock]:
    """Cut the weights of a network into blocks, each with its Fisher model and gradient.

    Raises `ArgumentError` if `damping` is negative or not finite, or a glob accompanies a `Partition`; and
    all that `Partition.from_model` and `gradient_rows` raise.

    Parameters
    ----------
    partition : {"global", "layer", "row"}, int or Partition, default "layer"
        How the weights form blocks, see `Partition.from_model`, which also takes `target` and
        `ignore`; they may not accompany a `Partition`.
    damping : float, default 1e-3
        Added to the diagonal of every block.
    model, data, loss_fn, curvature, resources, seed, progress
        See `gradient_rows`.

    Returns
    -------
    list of FisherBlock
        In the order of the partition. Rows, weights and gradients are views of one tensor each for
        the whole network.
    """
    damping = finite_number("damping", damping)
    if not isinstance(partition, Partition):
        partition = Partition.from_model(model, target=target, ignore=ignore, blocks=partition)
    elif target is not None or ignore != ():
        raise ArgumentError("target, ignore", "given beside a Partition", "choose the weights in one place")
    weights = partition.flatten(model)
    rows = gradient_rows(
        model,
        data,
        loss_fn,
        partition,
        curvature=curvature,
        resources=resources,
        seed=seed,
        progress=progress,
    )
    return [
        FisherBlock(
            name=block.name,
            weights=weights[block.start : block.stop],
            hessian=RowsHessian(rows.block(block.start, block.stop)),
            gradient=rows.gradient[block.start : block.stop],
            damping=damping,
        )
        for block in partition.blocks
    ]


class Journal:
    """Where rows are kept as they are made, so that a killed run goes on: here nowhere.

    `cbs_opt.runs.progress.RowJournal` keeps them in the folder of a run.
    """

    def restore(self, gradient: Tensor) -> Iterable[Tensor]:
        """Yield the rows made before, (r, n) pieces not yet scaled; set `gradient` (n,) to their sum."""
        return ()

    def seen(self, part: Batch, samples: int) -> bool:
        """Take note of a chunk that begins after `samples` samples; return whether its rows are there."""
        return False

    def take(self, rows: Tensor) -> None:
        """Take rows (r, n) that were made, to be kept with the next `save`."""

    def save(self, gradient: Tensor, samples: int, *, done: bool = False) -> None:
        """Keep what was taken, of `samples` samples in all, in time; `done` if no row comes any more."""


@dataclass(kw_only=True, eq=False)
class RowBuilder:
    """Computes rows batch by batch and puts them into `target`.

    `target_of` makes it of the number of rows, at most, their width, dtype and device, at the first one.
    `samples` counts those used so far, of which `advance` is told, `mass` how much they count; the other
    fields are the arguments of `gradient_rows`. A row of samples that count ``c`` on average is stored times
    ``sqrt(c)``.
    """

    function: NetworkFunction
    partition: Partition
    curvature: Fisher
    seed: int
    chunk_memory: int
    target_of: Callable[[int, int, torch.dtype, torch.device], RowTarget]
    keep: Tensor | None = None
    gradient: bool = True
    journal: Journal = field(default_factory=Journal)
    advance: Advance = ignored
    samples: int = field(init=False, default=0)
    mass: float = field(init=False, default=0.0)
    target: RowTarget = field(init=False)

    def __post_init__(self) -> None:
        self._exact = isinstance(self.curvature, ExactFisher)
        self._sketched = isinstance(self.curvature, SketchedFisher)
        self._at_own_labels = isinstance(self.curvature, EmpiricalFisher)
        self._one_by_one = self._sketched or self.curvature.per_row > 1 or not self.curvature.vectorize
        self._columns = _columns_by_parameter(self.partition, self.keep)
        self._generator = torch.Generator().manual_seed(self.seed)
        # One number a sample, drawn at once, so that labels do not depend on the chunk size.
        count = self.curvature.samples
        self._uniforms = torch.rand(count, dtype=torch.float64, generator=self._generator, device="cpu")
        self._weighted = False
        self._nonzero = False

    def consume(self, batch: Batch) -> None:
        """Append the rows of `batch`: one group of samples, or any number of single ones."""
        objective = self.function.objective
        batch = objective.prepared(batch)
        if self.samples == 0:
            self._prepare(batch)
        elif (batch.size < self.curvature.per_row and not objective.in_batches) or self._full:
            return
        if self._classes is not None:
            check_labels(batch.labels, self._classes, ignored=objective.ignored)
        for part in [batch] if objective.in_batches else parts(batch, self._part_size):
            stored = self.journal.seen(part, self.samples)
            signs = self._signs(part.size) if self._sketched else None
            weights = self.function.weights(part)
            if weights is None and self._weighted:
                weights = torch.ones(part.size, dtype=torch.float64, device=self._gradient.device)
            if not stored:
                self._append(part, weights, signs)
            self.samples += part.size
            self.mass += part.size if weights is None else float(weights.sum())
            if not stored:
                self.journal.save(self._gradient, self.samples)
            self.advance(part.size)

    def finish(self) -> Tensor:
        """Scale the rows in their target; return the mean gradient, (n,)."""
        wanted = self.curvature.samples
        if self.samples < wanted - wanted % self.curvature.per_row:
            log.warning("data: %d samples used where %d were asked for", self.samples, wanted)
        if self.mass == 0.0:
            raise EmptyDataError("data", "labels that are all ignored", "pass samples with labels")
        if not self._nonzero:
            raise self._all_zero()
        self.journal.save(self._gradient, self.samples, done=True)
        rows = self.samples if self._exact else self.target.filled
        factor = 1.0 / math.sqrt(rows * (self.mass / self.samples))
        average = self.target.scale(factor, mean=self._at_own_labels and not self._weighted)
        return self._gradient / self.mass if average is None else self._widened(average)

    def _prepare(self, batch: Batch) -> None:
        """Learn from some samples how many rows there will be and how many fit in memory."""
        n = self.partition.n
        objective = self.function.objective
        capacity = self.curvature.samples // self.curvature.per_row
        if objective.in_batches:
            if not self._at_own_labels:
                found = f"{self.curvature.kind!r} for a loss that looks at whole batches"
                raise UnsupportedProblemError("curvature", found, "use EmpiricalFisher")
            # The largest batch may not fit twice, so rows that average less are all there is to bound.
            self._one_by_one = True
            capacity = -(-self.curvature.samples // batch.size)
        self._classes, one, another = probe(self.function, batch)
        if self._sketched and self._classes is None and objective.output_hessian is None:
            found = f"{self.curvature.kind!r} for a loss that is no cross-entropy, squared error or "
            found += "binary cross-entropy of the network's logits"
            raise UnsupportedProblemError("curvature", found, "use EmpiricalFisher, or one of those losses")
        if not (self._at_own_labels or self._sketched):
            classes = require_classifier(self._classes, self.curvature.kind)
            capacity *= classes if self._exact else 1
        dtype, device = self.function.dtype, self.function.device
        width = n if self._columns is None else sum(index.numel() for index in self._columns.values())
        self._capacity = capacity
        self.target = self.target_of(capacity, width, dtype, device)
        self._gradient = torch.zeros(n, dtype=dtype, device=device)
        gradient_bytes = sum(t.numel() * t.element_size() for t in self.function.parameters.values())
        self._chunk, self._group = chunk_sizes(self.chunk_memory, gradient_bytes, one, another)
        if objective.in_batches:
            self._group = batch.size
        for rows in self.journal.restore(self._gradient):
            self._put([rows], kept=True)
        self._weighted = self._at_own_labels and bool(self._gradient.any())

    @property
    def _full(self) -> bool:
        return self.function.objective.in_batches and self.target.filled == self._capacity

    @property
    def _part_size(self) -> int:
        if self._exact:
            return max(1, self._chunk // require_classifier(self._classes, self.curvature.kind))
        return self.curvature.per_row if self._one_by_one else self._chunk

    def _append(self, part: Batch, weights: Tensor | None, signs: Signs | None) -> None:
        """Write the rows of one part: a group of samples for one row, or some single ones."""
        self._part = part
        if self._one_by_one:
            self._append_group(part, weights, signs)
            return
        if self._exact:
            self._append_classes(part, weights)
        else:
            rows = self.function.sample_gradients(part, None if self._at_own_labels else self._drawn(part))
            if weights is not None:
                self._add_rows(rows, weights.tolist())
                rows = _weighted(rows, weights)
            self._write(rows, part.size)
        if self.gradient and not self._at_own_labels:
            own = self.function.mean_loss(part, weights)
            (mean,) = self.function.differentiated(part, self._group, own)
            self._add_gradient(mean, part, weights)

    def _append_group(self, part: Batch, weights: Tensor | None, signs: Signs | None) -> None:
        """One row of all samples of a part, and their mean gradient by the same forward passes."""
        targets = [self.function.mean_loss(part, weights)]
        if signs is not None:
            targets.insert(0, self.function.sketch(part, signs, weights))
        elif not self._at_own_labels:
            targets.insert(0, self.function.drawn_loss(self._draws(part), weights))
        row, *means = self.function.differentiated(part, self._group, *targets[: 1 + self.gradient])
        if weights is not None and signs is None:
            weight = float(weights.sum())
            self._add_rows({name: value.unsqueeze(0) for name, value in row.items()}, [weight])
            row = {name: value * math.sqrt(weight / part.size) for name, value in row.items()}
        self._write(row, 1)
        for mean in means:
            self._add_gradient(mean, part, weights)

    def _append_classes(self, part: Batch, weights: Tensor | None) -> None:
        """All classes of some samples, or of one sample some classes at a time."""
        classes = require_classifier(self._classes, self.curvature.kind)
        for first in range(0, classes, self._chunk):
            chosen = range(first, min(first + self._chunk, classes))
            gradients = self.function.class_gradients(part, slice(chosen.start, chosen.stop))
            if weights is not None:
                gradients = _weighted(gradients, weights)
            self._write(gradients, part.size * len(chosen))

    def _draws(self, part: Batch) -> Tensor:
        """Return the numbers in [0, 1) that decide the labels of a part."""
        return self._uniforms[self.samples : self.samples + part.size]

    def _drawn(self, part: Batch) -> Tensor:
        """Return labels that the network draws itself."""
        draws = torch.split(self._draws(part), self._group)
        pieces = zip(parts(part, self._group), draws, strict=True)
        return torch.cat([self.function.sampled_labels(*piece) for piece in pieces])

    def _signs(self, samples: int) -> Signs:
        """Return the signs of a part, which do not depend on how it is cut."""
        device = self._gradient.device
        if self._classes is not None:
            drawn = _random_signs((samples, self._classes), self._generator).to(device)
            return lambda shape: drawn
        # Sequences may have other lengths in other batches: the shape is known once the network has run.
        seed = int(torch.randint(1 << 62, (1,), generator=self._generator, device="cpu"))
        return cache(
            lambda shape: _random_signs((samples, *shape), torch.Generator().manual_seed(seed)).to(device)
        )

    def _add_gradient(self, mean: Gradients, part: Batch, weights: Tensor | None) -> None:
        """Add the mean gradient of a part, as often as its samples count."""
        weight = part.size if weights is None else float(weights.sum())
        for name, total in self.partition.split(self._gradient).items():
            total.add_(mean[name].to(total.device), alpha=weight)

    def _add_rows(self, rows: Gradients, weights: Sequence[float]) -> None:
        """Add up gradients (r, *shape) times their weights, as rows will be scaled by the roots of these."""
        if not self._at_own_labels:
            return
        if not self._weighted:
            # All rows so far count as 1.
            self._gradient.copy_(self._widened(self.target.total().to(self._gradient)))
            self._weighted = True
        for name, total in self.partition.split(self._gradient).items():
            for row, weight in zip(rows[name], weights, strict=True):
                if weight > 0.0:
                    total.add_(row.to(total), alpha=weight)

    def _write(self, gradients: Gradients, count: int) -> None:
        """Put `count` rows in place, each the gradients of all parameters side by side."""
        pieces = [
            span.flat(gradients[span.name].reshape(count, *span.shape)) for span in self.partition.parameters
        ]
        if self._columns is not None:
            columns = self._columns.values()
            pieces = [piece.index_select(1, index) for piece, index in zip(pieces, columns, strict=True)]
        self._put(pieces)

    def _put(self, pieces: Sequence[Tensor], *, kept: bool = False) -> None:
        """Hand rows to the target, given as some of their columns after the other."""
        done, count = 0, len(pieces[0])
        while done < count:
            rows = self.target.space(count - done)
            assert len(rows), "more rows than there is room for"
            start = 0
            for piece in pieces:
                rows[:, start : start + piece.shape[1]] = piece[done : done + len(rows)]
                start += piece.shape[1]
            # A sum is finite only if every entry is; an overflow of the sum alone is told apart below.
            if not bool(torch.isfinite(rows.sum())):
                self._check_finite(rows, done)
            self._nonzero = self._nonzero or bool(rows.any())
            if not kept:
                self.journal.take(rows)
            self.target.commit(len(rows))
            done += len(rows)

    def _check_finite(self, rows: Tensor, first: int) -> None:
        finite = torch.isfinite(rows)
        bad = (~finite.all(dim=1)).nonzero().flatten().tolist()
        if not bad:
            return
        spans = self.partition.parameters
        sizes = [span.stop - span.start for span in spans]
        if self._columns is not None:
            sizes = [index.numel() for index in self._columns.values()]
        pieces = torch.split(finite.all(dim=0), sizes)
        names = [span.name for span, piece in zip(spans, pieces, strict=True) if not bool(piece.all())]
        shown = ", ".join(str(self.target.filled + row) for row in bad[:5])
        noun = "row" if len(bad) == 1 else "rows"
        found = f"NaN or infinity in gradient {noun} {shown}{' ...' if len(bad) > 5 else ''}"
        remedy = "check the loss and the data there (samples count from 0, in the order of the data)"
        raise NonFiniteGradientError(
            "data", f"{found} ({', '.join(names)}), {self._culprits(bad, first)}", remedy
        )

    def _culprits(self, bad: Sequence[int], first: int) -> str:
        """Return which samples of the current part lead to the rows `bad`, of those from `first` on."""
        part = self._part
        each = max(1, self._classes or 1) if self._exact else 1
        numbers = range(part.size) if self._one_by_one else sorted({(first + row) // each for row in bad})
        inputs = [list(tensors_of(part.take(slice(n, n + 1)).inputs)) for n in numbers]
        finite = [all(bool(torch.isfinite(x).all()) for x in tensors) for tensors in inputs]
        broken = [number for number, whole in zip(numbers, finite, strict=True) if not whole]
        places = [number if part.index is None else int(part.index[number]) for number in broken or numbers]
        shown = f"{', '.join(map(str, places[:5]))}{' ...' if len(places) > 5 else ''}"
        what = "with NaN or infinite inputs" if broken else "whose inputs are finite"
        return f"of {'sample' if len(places) == 1 else 'samples'} {shown}, {what}"

    def _all_zero(self) -> LossError:
        """Return the error for rows that are all zero."""
        with torch.no_grad():
            output = self.function.objective.output(self.function.run, self._part.take(slice(2)))
        logits = logits_of(output)
        if logits is not None and logits.ndim == 2 and logits.shape[1] == 1:
            found = "every gradient is zero: the network has one output, of which cross-entropy is always 0"
            remedy = "use torch.nn.functional.binary_cross_entropy_with_logits, with labels of shape (B, 1)"
        else:
            found = "every gradient is zero: the loss is at a minimum, or does not see the weights"
            remedy = "check loss_fn and the labels; training data that are fitted perfectly say nothing"
        return LossError("loss_fn", found, remedy)

    def _widened(self, values: Tensor) -> Tensor:
        """Values of the columns that were kept as (n,), zero elsewhere."""
        if self._columns is None:
            return values
        wide = values.new_zeros(self.partition.n)
        wide[self.keep] = values
        return wide


def chunk_sizes(chunk_memory: int, gradient_bytes: int, one: int, another: int) -> tuple[int, int]:
    """Return samples that are differentiated at once: each on its own, and added up.

    `one` and `another`: bytes that the backward pass of one sample saves, and of another one besides.
    """
    # Beside what backward saves it makes gradients of that size, and vmap(grad) copies; the factors cover
    # what was measured on convolutional networks.
    alone = max(1, chunk_memory // (2 * gradient_bytes + 5 * one))
    return min(alone, MOST_AT_ONCE), max(1, chunk_memory // (3 * max(another, 1)))


def _settled(
    function: NetworkFunction, data: Data, samples: int, seed: int, batch_size: int
) -> Iterator[Batch]:
    """Read samples on the device of the network; the first ones settle how its loss is made up."""
    objective, device = function.objective, function.device
    first, batches = peeked(read(data, max_samples=samples, seed=seed), PEEKED)
    function.settle(first.take(slice(batch_size)).to(device))
    return objective.pieces(batches, size=batch_size, max_samples=samples, device=device)


def _weighted(rows: Gradients, weights: Tensor) -> Gradients:
    """Return gradients (B, ...) times the roots of weights (B,); zero where a sample does not count."""
    roots = weights.sqrt()

    def scaled(rows: Tensor) -> Tensor:
        factor = roots.to(rows).view(-1, *[1] * (rows.ndim - 1))
        return torch.where(factor > 0, rows * factor, 0.0)

    return {name: scaled(value) for name, value in rows.items()}


def _random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 2 * torch.randint(0, 2, shape, generator=generator, device="cpu") - 1


def _columns_by_parameter(partition: Partition, keep: Tensor | None) -> dict[str, Tensor] | None:
    if keep is None:
        return None
    if keep.dtype != torch.bool or tuple(keep.shape) != (partition.n,):
        found = f"{keep.dtype} of shape {tuple(keep.shape)}"
        raise ShapeError("keep", found, f"pass ({partition.n},) booleans, True for each wanted column")
    return {s.name: keep[s.start : s.stop].nonzero().squeeze(1) for s in partition.parameters}
