"""Gradient rows computed chunk by chunk and put where they are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cbs_opt.curvature.gradients import Gradients, NetworkFunction, probe, require_classifier, sampled_labels
from cbs_opt.curvature.kinds import EmpiricalFisher, ExactFisher, Fisher, SketchedFisher
from cbs_opt.curvature.rows import RowTarget
from cbs_opt.errors import NonFiniteGradientError
from cbs_opt.network.data import Batch, check_labels
from cbs_opt.network.partition import Partition
from formulations.errors import ShapeError

log = logging.getLogger(__name__)

TargetOf = Callable[[int, int, torch.dtype, torch.device], RowTarget]
"""Where rows go, from their number at most, their width, dtype and device."""


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
    """Computes rows batch by batch and puts them into `target`, which `target_of` makes at the first one.

    `samples` counts those used so far; the other fields are the arguments of `gradient_rows`.
    """

    function: NetworkFunction
    partition: Partition
    curvature: Fisher
    seed: int
    chunk_memory: int
    target_of: TargetOf
    keep: Tensor | None = None
    gradient: bool = True
    journal: Journal = field(default_factory=Journal)
    samples: int = field(init=False, default=0)
    target: RowTarget = field(init=False)

    def __post_init__(self) -> None:
        self._exact = isinstance(self.curvature, ExactFisher)
        self._sketched = isinstance(self.curvature, SketchedFisher)
        self._at_own_labels = isinstance(self.curvature, EmpiricalFisher)
        self._one_by_one = self._sketched or self.curvature.per_row > 1 or not self.curvature.vectorize
        self._columns = _columns_by_parameter(self.partition, self.keep)
        self._generator = torch.Generator().manual_seed(self.seed)
        # One number a sample, drawn at once, so that labels do not depend on the chunk size.
        self._uniforms = torch.rand(self.curvature.samples, dtype=torch.float64, generator=self._generator)

    def consume(self, batch: Batch) -> None:
        """Append the rows of `batch`: one group of samples, or any number of single ones."""
        if self.samples == 0:
            self._prepare(batch)
        elif batch.size < self.curvature.per_row:
            return
        if self._classes is not None:
            check_labels(batch.labels, self._classes)
        for part in _parts(batch, self._part_size):
            stored = self.journal.seen(part, self.samples)
            signs = self._signs(part.size) if self._sketched else None
            if not stored:
                self._append(part, signs)
            self.samples += part.size
            if not stored:
                self.journal.save(self._gradient, self.samples)

    def finish(self) -> Tensor:
        """Scale the rows in their target; return the mean gradient, (n,)."""
        wanted = self.curvature.samples
        if self.samples < wanted - wanted % self.curvature.per_row:
            log.warning("data: %d samples used where %d were asked for", self.samples, wanted)
        self.journal.save(self._gradient, self.samples, done=True)
        factor = 1.0 / math.sqrt(self.samples if self._exact else self.target.filled)
        average = self.target.scale(factor, mean=self._at_own_labels)
        return self._gradient / self.samples if average is None else self._widened(average)

    def _prepare(self, batch: Batch) -> None:
        """Learn from one sample how many rows there will be and how many fit in memory."""
        n = self.partition.n
        self._classes, saved = probe(self.function, batch.take(slice(1)))
        self._rows_function = self.function
        capacity = self.curvature.samples // self.curvature.per_row
        if not self._at_own_labels:
            classes = require_classifier(self._classes, self.curvature.kind)
            capacity *= classes if self._exact else 1
            self._rows_function = self.function.with_loss(cross_entropy)
        dtype, device = self.function.dtype, self.function.device
        width = n if self._columns is None else sum(index.numel() for index in self._columns.values())
        self.target = self.target_of(capacity, width, dtype, device)
        self._gradient = torch.zeros(n, dtype=dtype, device=device)
        gradient_bytes = sum(t.numel() * t.element_size() for t in self.function.parameters.values())
        self._chunk, self._group = chunk_sizes(self.chunk_memory, gradient_bytes, saved)
        for rows in self.journal.restore(self._gradient):
            self._put([rows], kept=True)

    @property
    def _part_size(self) -> int:
        """Samples whose rows are made at once."""
        if self._exact:
            return max(1, self._chunk // require_classifier(self._classes, self.curvature.kind))
        return self.curvature.per_row if self._one_by_one else self._chunk

    def _append(self, part: Batch, signs: Tensor | None) -> None:
        """Write the rows of one part: a group of samples for one row, or some single ones."""
        if self._exact:
            self._append_classes(part)
        elif signs is not None:
            self._write(self.function.sketched_gradient(part, signs, self._group), 1)
            self._add_gradient(part)
        elif self._one_by_one:
            self._write(self._rows_function.mean_gradient(self._at_row_labels(part), self._group), 1)
        else:
            self._write(self._rows_function.sample_gradients(self._at_row_labels(part)), part.size)

    def _at_row_labels(self, batch: Batch) -> Batch:
        if self._at_own_labels:
            return batch
        self._add_gradient(batch)
        uniforms = self._uniforms[self.samples : self.samples + batch.size]
        pairs = zip(_parts(batch, self._group), torch.split(uniforms, self._group), strict=True)
        labels = torch.cat([sampled_labels(self.function, part, draws) for part, draws in pairs])
        return Batch(inputs=batch.inputs, labels=labels)

    def _append_classes(self, part: Batch) -> None:
        """All classes of some samples, or of one sample some classes at a time."""
        classes = require_classifier(self._classes, self.curvature.kind)
        for first in range(0, classes, self._chunk):
            chosen = range(first, min(first + self._chunk, classes))
            gradients = self.function.class_gradients(part, slice(chosen.start, chosen.stop))
            self._write(gradients, part.size * len(chosen))
        self._add_gradient(part)

    def _signs(self, samples: int) -> Tensor:
        """Return the random signs of a row of the sketched Fisher, (samples, C)."""
        classes = require_classifier(self._classes, self.curvature.kind)
        signs = 2 * torch.randint(0, 2, (samples, classes), generator=self._generator) - 1
        return signs.to(self._gradient.device)

    def _add_gradient(self, batch: Batch) -> None:
        if not self.gradient:
            return
        mean = self.function.mean_gradient(batch, self._group)
        for name, total in self.partition.split(self._gradient).items():
            total.add_(mean[name].to(total.device), alpha=batch.size)

    def _write(self, gradients: Gradients, count: int) -> None:
        """Put `count` rows in place, each the gradients of all parameters side by side."""
        pieces = [gradients[span.name].reshape(count, -1) for span in self.partition.parameters]
        if self._columns is not None:
            columns = self._columns.values()
            pieces = [piece.index_select(1, index) for piece, index in zip(pieces, columns, strict=True)]
        self._put(pieces)

    def _put(self, pieces: Sequence[Tensor], *, kept: bool = False) -> None:
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
            if not kept:
                self.journal.take(rows)
            self.target.commit(len(rows))
            done += len(rows)

    def _check_finite(self, rows: Tensor) -> None:
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
        found = f"gradient rows {shown}{' ...' if len(bad) > 5 else ''} are NaN or infinite"
        remedy = "check the loss and the data there (rows count samples in the order read, from 0)"
        raise NonFiniteGradientError("data", f"{found} in {', '.join(names)}", remedy)

    def _widened(self, values: Tensor) -> Tensor:
        """Values of the columns that were kept as (n,), zero elsewhere."""
        if self._columns is None:
            return values
        wide = values.new_zeros(self.partition.n)
        wide[self.keep] = values
        return wide


def chunk_sizes(chunk_memory: int, gradient_bytes: int, saved: int) -> tuple[int, int]:
    """Return samples that are differentiated at once: each on its own, and added up."""
    # Beside what backward saves it makes gradients of that size, and vmap(grad) copies; the factors cover
    # what was measured on convolutional networks.
    alone = max(1, chunk_memory // (2 * gradient_bytes + 5 * saved))
    return alone, max(1, chunk_memory // (3 * max(saved, 1)))


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
