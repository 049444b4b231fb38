"""Gradient rows computed chunk by chunk and put where they are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cbs_opt.curvature.disk import RowsInMemory, RowTarget
from cbs_opt.curvature.gradients import Gradients, NetworkFunction, probe, require_classifier, sampled_labels
from cbs_opt.errors import NonFiniteGradientError
from cbs_opt.network.data import Batch, LossFunction, check_labels, device_of, positive_integer
from cbs_opt.network.partition import Partition
from cbs_opt.runs.rows import RowJournal
from formulations.errors import ArgumentError, ShapeError

CURVATURES = ("empirical_fisher", "exact_fisher", "monte_carlo_fisher", "sketched_fisher")

TargetOf = Callable[[int, int, torch.dtype, torch.device], RowTarget]
"""Where rows go, from their number at most, their width, dtype and device."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Options of `gradient_rows`, checked; see there."""

    curvature: str
    samples: int
    samples_per_row: int
    memory_limit: int
    rows_dtype: torch.dtype | None
    vectorize: bool
    gradient: bool = True

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise ArgumentError("curvature", f"{self.curvature!r}", f"use one of {', '.join(CURVATURES)}")
        positive_integer("samples", self.samples)
        positive_integer("samples_per_row", self.samples_per_row)
        positive_integer("memory_limit", self.memory_limit)
        if self.samples_per_row > self.samples:
            found = f"{self.samples_per_row} of {self.samples} samples"
            raise ArgumentError("samples_per_row", found, "average at most all samples into a row")
        if self.rows_dtype is not None and not self.rows_dtype.is_floating_point:
            raise ArgumentError("rows_dtype", f"{self.rows_dtype}", "use a floating-point dtype")
        if self.exact and self.samples_per_row > 1:
            found = f"{self.samples_per_row} with the exact Fisher"
            raise ArgumentError("samples_per_row", found, "use 1: its rows are one a class, not averages")
        if self.exact and not self.vectorize:
            raise ArgumentError("vectorize", "False with the exact Fisher", "use another curvature")

    @property
    def exact(self) -> bool:
        return self.curvature == "exact_fisher"

    @property
    def sketched(self) -> bool:
        return self.curvature == "sketched_fisher"

    @property
    def at_own_labels(self) -> bool:
        """Whether the mean of the rows is the gradient of the loss."""
        return self.curvature == "empirical_fisher"


class RowBuilder:
    """Computes rows batch by batch and puts them into `target`, which `target_of` makes at the first one.

    `samples` counts those used so far. With `share` they are those of a part of a longer run of
    ``options.samples``, and the random draws are the ones which that run makes for them. With `journal`
    the rows that it has are taken from it, and the others are put there as they are made.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        partition: Partition,
        options: RowOptions,
        seed: int,
        *,
        weights: Tensor | None = None,
        keep: Tensor | None = None,
        share: range | None = None,
        journal: RowJournal | None = None,
        target_of: TargetOf = RowsInMemory,
    ) -> None:
        self.samples = 0
        self._journal = journal
        self._target_of = target_of
        share = range(options.samples) if share is None else share
        self._wanted, self._before = len(share), share.start
        self._model = model
        self._function = NetworkFunction(model, partition, loss_fn, weights)
        self._partition = partition
        self._options = options
        self._columns = _columns_by_parameter(partition, keep)
        self._generator = torch.Generator().manual_seed(seed)
        # One number a sample, drawn at once, so that labels do not depend on the chunk size.
        uniforms = torch.rand(options.samples, dtype=torch.float64, generator=self._generator)
        self._uniforms = uniforms[share.start : share.stop]

    def consume(self, batch: Batch) -> None:
        """Append the rows of `batch`: one group of samples, or any number of single ones."""
        options = self._options
        if self.samples == 0:
            self._prepare(batch)
        elif batch.size < options.samples_per_row:
            return
        if self._classes is not None:
            check_labels(batch.labels, self._classes)
        for part in _parts(batch, self._part_size):
            known = self._journal is not None and self._journal.seen(part, self.samples)
            signs = self._signs(part.size) if options.sketched else None
            if not known:
                self._append(part, signs)
            self.samples += part.size
            if not known and self._journal is not None:
                self._journal.save(self._gradient, self.samples)

    def finish(self) -> Tensor:
        """Scale the rows in their target; the mean gradient, (n,)."""
        options = self._options
        if self.samples < self._wanted - self._wanted % options.samples_per_row:
            log.warning("data: %d samples used where %d were asked for", self.samples, self._wanted)
        if self._journal is not None:
            self._journal.save(self._gradient, self.samples, done=True)
        factor = 1.0 / math.sqrt(self.samples if options.exact else self.target.filled)
        average = self.target.scale(factor, mean=options.at_own_labels)
        return self._gradient / self.samples if average is None else self._widened(average)

    def _prepare(self, batch: Batch) -> None:
        """Learn from one sample how many rows there will be and how many fit in memory."""
        options, n = self._options, self._partition.n
        self._classes, saved = probe(self._function, batch.take(slice(1)))
        self._rows_function = self._function
        capacity = self._wanted // options.samples_per_row
        if not options.at_own_labels:
            classes = require_classifier(self._classes, options.curvature)
            capacity *= classes if options.exact else 1
            if options.sketched:
                # The signs of the samples that come before this share.
                torch.randint(0, 2, (self._before, classes), generator=self._generator)
            self._rows_function = self._function.with_loss(cross_entropy)
        tensors = self._function.parameters.values()
        dtype = options.rows_dtype or reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
        width = n if self._columns is None else sum(index.numel() for index in self._columns.values())
        device = device_of(self._model)
        self.target = self._target_of(capacity, width, dtype, device)
        self._gradient = torch.zeros(n, dtype=dtype, device=device)
        gradient_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._chunk, self._group = chunk_sizes(options.memory_limit, gradient_bytes, saved)
        if self._journal is not None:
            for rows in self._journal.restore(self._gradient):
                self._put([rows])

    @property
    def _part_size(self) -> int:
        """Samples whose rows are made at once."""
        options = self._options
        if options.exact:
            return max(1, self._chunk // require_classifier(self._classes, options.curvature))
        averaged = options.sketched or options.samples_per_row > 1 or not options.vectorize
        return options.samples_per_row if averaged else self._chunk

    def _append(self, part: Batch, signs: Tensor | None) -> None:
        """Write the rows of one part: a group of samples for one row, or some single ones."""
        options = self._options
        if options.exact:
            self._append_classes(part)
        elif signs is not None:
            self._write(self._function.sketched_gradient(part, signs, self._group), 1)
            self._add_gradient(part)
        elif options.samples_per_row > 1 or not options.vectorize:
            self._write(self._rows_function.mean_gradient(self._at_row_labels(part), self._group), 1)
        else:
            self._write(self._rows_function.sample_gradients(self._at_row_labels(part)), part.size)

    def _at_row_labels(self, batch: Batch) -> Batch:
        if self._options.curvature != "monte_carlo_fisher":
            return batch
        self._add_gradient(batch)
        uniforms = self._uniforms[self.samples : self.samples + batch.size]
        pairs = zip(_parts(batch, self._group), torch.split(uniforms, self._group), strict=True)
        labels = torch.cat([sampled_labels(self._function, part, draws) for part, draws in pairs])
        return Batch(inputs=batch.inputs, labels=labels)

    def _append_classes(self, part: Batch) -> None:
        """All classes of some samples, or of one sample some classes at a time."""
        classes = require_classifier(self._classes, self._options.curvature)
        for first in range(0, classes, self._chunk):
            chosen = range(first, min(first + self._chunk, classes))
            gradients = self._function.class_gradients(part, slice(chosen.start, chosen.stop))
            self._write(gradients, part.size * len(chosen))
        self._add_gradient(part)

    def _signs(self, samples: int) -> Tensor:
        """The random signs of a row of the sketched Fisher, (samples, C)."""
        classes = require_classifier(self._classes, self._options.curvature)
        signs = 2 * torch.randint(0, 2, (samples, classes), generator=self._generator) - 1
        return signs.to(self._gradient.device)

    def _add_gradient(self, batch: Batch) -> None:
        if not self._options.gradient:
            return
        found = self._function.mean_gradient(batch, self._group)
        for name, total in self._partition.split(self._gradient).items():
            total.add_(found[name].to(total.device), alpha=batch.size)

    def _write(self, gradients: Gradients, count: int) -> None:
        """Put `count` rows in place, each the gradients of all parameters side by side."""
        pieces = []
        for span in self._partition.parameters:
            values = gradients[span.name].reshape(count, -1)
            pieces.append(
                values if self._columns is None else values.index_select(1, self._columns[span.name])
            )
        self._put(pieces, self._journal)

    def _put(self, pieces: Sequence[Tensor], journal: RowJournal | None = None) -> None:
        """Hand rows to the target, given as some of their columns after the other."""
        done, count = 0, len(pieces[0])
        while done < count:
            rows = self.target.space(count - done)
            start = 0
            for piece in pieces:
                rows[:, start : start + piece.shape[1]] = piece[done : done + len(rows)]
                start += piece.shape[1]
            # A sum is finite only if every entry is; an overflow of the sum alone is told apart below.
            if not bool(torch.isfinite(rows.sum())):
                self._check_finite(rows)
            if journal is not None:
                journal.take(rows)
            self.target.commit(len(rows))
            done += len(rows)

    def _check_finite(self, rows: Tensor) -> None:
        finite = torch.isfinite(rows)
        bad = (~finite.all(dim=1)).nonzero().flatten().tolist()
        if not bad:
            return
        names = self._names_where(~finite.all(dim=0))
        shown = ", ".join(str(self.target.filled + row) for row in bad[:5])
        found = f"gradient rows {shown}{' ...' if len(bad) > 5 else ''} are NaN or infinite"
        remedy = "check the loss and the data there (rows count samples in the order read, from 0)"
        raise NonFiniteGradientError("data", f"{found} in {', '.join(names)}", remedy)

    def _widened(self, values: Tensor) -> Tensor:
        """Values of the columns that were kept as (n,), zero elsewhere."""
        if self._columns is None:
            return values
        wide = values.new_zeros(self._partition.n)
        sizes = [index.numel() for index in self._columns.values()]
        targets = self._partition.split(wide).values()
        pieces = torch.split(values, sizes)
        for target, index, piece in zip(targets, self._columns.values(), pieces, strict=True):
            target.view(-1)[index] = piece
        return wide

    def _names_where(self, bad: Tensor) -> list[str]:
        """Parameters with a column of the rows that is `bad`."""
        spans = self._partition.parameters
        sizes = [
            span.stop - span.start if self._columns is None else self._columns[span.name].numel()
            for span in spans
        ]
        pieces = torch.split(bad, sizes)
        return [span.name for span, piece in zip(spans, pieces, strict=True) if bool(piece.any())]


def chunk_sizes(memory_limit: int, gradient_bytes: int, saved: int) -> tuple[int, int]:
    """Samples that are differentiated at once: each on its own, and added up."""
    # Beside what backward saves it makes gradients of that size, and vmap(grad) copies; the factors cover
    # what was measured on convolutional networks.
    alone = max(1, memory_limit // (2 * gradient_bytes + 5 * saved))
    return alone, max(1, memory_limit // (3 * max(saved, 1)))


def _columns_by_parameter(partition: Partition, keep: Tensor | None) -> dict[str, Tensor] | None:
    """Positions of the weights to keep within each parameter; None for all of them."""
    if keep is None:
        return None
    if keep.dtype != torch.bool or tuple(keep.shape) != (partition.n,):
        found = f"{keep.dtype} of shape {tuple(keep.shape)}"
        raise ShapeError("keep", found, f"pass ({partition.n},) booleans, True for each wanted column")
    return {name: kept.reshape(-1).nonzero().squeeze(1) for name, kept in partition.split(keep).items()}


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, batch.size, size):
        yield batch.take(slice(start, start + size))
