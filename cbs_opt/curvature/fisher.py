"""Gradient rows: the factor R of the Fisher model H = R^T R + damping I of a network's loss."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cbs_opt.curvature.builder import RowBuilder, RowOptions
from cbs_opt.curvature.disk import RowsInMemory
from cbs_opt.curvature.gradients import NetworkFunction, require_evaluation_mode
from cbs_opt.errors import NonFiniteGradientError
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.products import column_squares
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.network.data import Data, LossFunction, device_of, iterate, positive_integer, regroup, section
from cbs_opt.network.partition import BlockRule, Partition
from cbs_opt.network.targets import Globs
from cbs_opt.runs.rows import RowJournal
from formulations.errors import ArgumentError

MEMORY_LIMIT = 1 << 28
"""Default bytes for temporaries: 256 MiB."""
READ_AHEAD = 1024
"""Samples moved to the device of the network at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientRows:
    """The factor of a Fisher model and the gradient of the loss.

    Parameters
    ----------
    rows : (m, n) Tensor
        Scaled so that the Fisher model is ``rows^T rows``.
    gradient : (n,) Tensor
        Mean gradient of the loss at the data's own labels over all samples used.
    samples : int
        Samples used; ``m`` rows may average several of them, or give each several rows.
    seconds : float
        Wall-clock time taken.
    curvature : str
        Which Fisher matrix the rows sample.
    channels : ChannelTerm, optional
        A further term of the Hessian, see `cbs_opt.curvature.layer_inputs.with_layer_inputs`.
    """

    rows: Tensor
    gradient: Tensor
    samples: int
    seconds: float
    curvature: str = "empirical_fisher"
    channels: ChannelTerm | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.rows.shape[0], self.rows.shape[1]

    def block(self, start: int, stop: int) -> Tensor:
        """The rows of the weights ``start:stop``, a view."""
        return self.rows[:, start:stop]

    def column_squares(self) -> Tensor:
        """``diag(rows^T rows)``, (n,) float64."""
        return column_squares(self.rows)


def gradient_rows(
    model: nn.Module,
    data: Data,
    loss_fn: LossFunction,
    partition: Partition,
    *,
    curvature: str = "empirical_fisher",
    samples: int = 1000,
    samples_per_row: int = 1,
    memory_limit: int = MEMORY_LIMIT,
    seed: int = 0,
    progress: bool = True,
    rows_dtype: torch.dtype | None = None,
    vectorize: bool = True,
    weights: Tensor | None = None,
    keep: Tensor | None = None,
    gradient: bool = True,
    share: range | None = None,
    journal: RowJournal | None = None,
) -> GradientRows:
    """Gradient rows of a network's loss in the weights of a partition.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Its parameters, their `.grad`, buffers and modes are not touched.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        A loader is read in its own order; of a pair of tensors `samples` are drawn without
        replacement. If there are fewer, all are used and a warning is logged.
    loss_fn : callable
        ``loss_fn(output, y)``: the mean loss of a batch. Any loss for the empirical Fisher; the
        others take the network's softmax as its distribution over classes, whose loss is
        cross-entropy, and use `loss_fn` for the gradient alone.
    partition : Partition
        The weights, n of them.
    curvature : {"empirical_fisher", "exact_fisher", "monte_carlo_fisher", "sketched_fisher"}
        Empirical: gradients at the data's labels. Exact: one row ``sqrt(p_c) grad log p_c`` a
        sample and class, which is the Gauss-Newton matrix of cross-entropy. Monte-Carlo: gradients
        at labels drawn from the network's own distribution. Sketched: the rows of the exact Fisher
        of `samples_per_row` samples added up with random signs, one backward pass a row; the model
        is that of the exact Fisher in expectation.
    samples : int, default 1000
        Samples to use.
    samples_per_row : int, default 1
        Average that many samples into each row. A row is then the gradient of the mean loss of
        `samples_per_row` samples, without a factor to make up for the smaller variance, as is
        usual in the pruning literature. Sketched rows need no such factor: all their samples count.
        An incomplete last row is dropped unless it is the only one. Not for the exact Fisher.
    memory_limit : int
        Bytes for temporaries besides the rows. The chunk size follows from an estimate: a sample
        takes twice the gradient and five times what its backward pass saves (averaged rows: three
        times that). One sample is the least.
    seed : int, default 0
        Draws the samples and the Monte-Carlo labels.
    progress : bool, default True
        Show a bar where standard error is a terminal.
    rows_dtype : torch.dtype, optional
        By default that of the weights, float32 at least.
    vectorize : bool, default True
        Differentiate many samples at once with `torch.func`. False takes one backward pass a row,
        slower, for networks that `torch.func` cannot follow. Not for the exact Fisher.
    weights : (n,) Tensor, optional
        Take the gradients at these weights instead of the network's own.
    keep : (n,) bool Tensor, optional
        Return only the columns of weights that are True here: the rows take less memory.
    gradient : bool, default True
        False spares the pass for the mean gradient, which only rows of the empirical Fisher have
        for nothing; `GradientRows.gradient` is then zero unless they are.
    share : range, optional
        Only these samples of the run, from 0 in the order in which it takes them: the rows are those
        of the whole run for them, scaled as a run of their own. See `cbs_opt.curvature.distributed`.
    journal : RowJournal, optional
        Where rows are put as they are made, and those that are there come from: to the same bits.

    Returns
    -------
    GradientRows
        ``m = samples / samples_per_row`` rows, scaled by ``1 / sqrt(m)``; for the exact Fisher
        ``m = samples * C`` rows, class by class within each sample, scaled by
        ``1 / sqrt(samples)``. On the device of the network.

    Raises
    ------
    TrainingModeError
        If dropout or batch normalisation is in training mode.
    NonFiniteGradientError
        If a row holds NaN or infinity.
    PerSampleGradientError
        If `torch.func` cannot differentiate the network or the loss.
    DataLoaderError, BatchFormatError, EmptyDataError, LabelRangeError
        If the data cannot be read or does not fit the network, or ends before `share`.
    UnsupportedProblemError
        If the curvature needs a classifier and the network is none.
    ArgumentError
        If an option is out of its range.

    Notes
    -----
    Peak memory is that of the rows, ``m n`` numbers, plus `memory_limit`. Cost: one forward and one
    backward pass a sample (C backward passes for the exact Fisher).

    Empirical and exact Fisher: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher
    approximation for natural gradient descent", NeurIPS 2019. Averaged rows: Singh, Alistarh,
    "WoodFisher", NeurIPS 2020.
    """
    options = RowOptions(
        curvature=curvature,
        samples=samples,
        samples_per_row=samples_per_row,
        memory_limit=memory_limit,
        rows_dtype=rows_dtype,
        vectorize=vectorize,
        gradient=gradient,
    )
    require_evaluation_mode(model)
    began = time.perf_counter()
    wanted = _checked_share(share, options)
    builder = RowBuilder(
        model, loss_fn, partition, options, seed, weights=weights, keep=keep, share=wanted, journal=journal
    )
    mean = consume(builder, data, options, wanted, seed=seed, device=device_of(model), progress=progress)
    assert isinstance(builder.target, RowsInMemory)
    return GradientRows(
        rows=builder.target.rows,
        gradient=mean,
        samples=builder.samples,
        seconds=time.perf_counter() - began,
        curvature=curvature,
    )


def consume(
    builder: RowBuilder,
    data: Data,
    options: RowOptions,
    wanted: range,
    *,
    seed: int,
    device: torch.device,
    progress: bool,
) -> Tensor:
    """Give `builder` the samples `wanted` of a run; the mean gradient."""
    batches = iterate(data, batch_size=min(options.samples, READ_AHEAD), max_samples=wanted.stop, seed=seed)
    batches = (batch.to(device) for batch in section(batches, wanted))
    size = options.samples_per_row
    with tqdm(total=len(wanted), desc="gradients", unit="sample", disable=None if progress else True) as bar:
        for batch in batches if size == 1 else regroup(batches, size):
            builder.consume(batch)
            bar.update(batch.size)
    return builder.finish()


def _checked_share(share: range | None, options: RowOptions) -> range:
    """The samples that are wanted: all, or a part that holds whole rows."""
    if share is None:
        return range(options.samples)
    size = options.samples_per_row
    cut = share.start % size == 0 and (share.stop % size == 0 or share.stop == options.samples)
    if share.step != 1 or not 0 <= share.start < share.stop <= options.samples or not cut:
        remedy = f"pass a range within {options.samples} samples, cut between rows of {size}"
        raise ArgumentError("share", f"{share}", remedy)
    return share


def mean_gradient(
    model: nn.Module,
    data: Data,
    loss_fn: LossFunction,
    partition: Partition,
    *,
    samples: int,
    batch_size: int = 256,
    seed: int = 0,
    weights: Tensor | None = None,
    progress: bool = True,
) -> tuple[Tensor, int]:
    """Gradient of the mean loss over many samples, by ordinary backward passes.

    Parameters
    ----------
    model, data, loss_fn, partition, seed, weights, progress
        See `gradient_rows`.
    samples : int
        Samples to use; all that there are, if fewer.
    batch_size : int, default 256
        Samples in one backward pass.

    Returns
    -------
    (n,) Tensor
        In the dtype of the weights, float32 at least.
    int
        Samples used.

    Raises
    ------
    TrainingModeError, NonFiniteGradientError, DataLoaderError, BatchFormatError, EmptyDataError
        As `gradient_rows`.
    """
    positive_integer("samples", samples)
    require_evaluation_mode(model)
    function = NetworkFunction(model, partition, loss_fn, weights)
    dtype = reduce(
        torch.promote_types, (tensor.dtype for tensor in function.parameters.values()), torch.float32
    )
    total = torch.zeros(partition.n, dtype=dtype, device=device_of(model))
    used = 0
    batches = iterate(data, batch_size=batch_size, max_samples=samples, seed=seed, device=total.device)
    with tqdm(total=samples, desc="gradient", unit="sample", disable=None if progress else True) as bar:
        for batch in batches:
            found = function.mean_gradient(batch, batch.size)
            for name, piece in partition.split(total).items():
                piece.add_(found[name].to(total), alpha=batch.size)
            used += batch.size
            bar.update(batch.size)
    total.div_(used)
    if not bool(torch.isfinite(total).all()):
        raise NonFiniteGradientError("data", "the gradient is NaN or infinite", "check the loss and the data")
    return total, used


def fisher_blocks(
    model: nn.Module,
    data: Data,
    *,
    loss_fn: LossFunction,
    partition: BlockRule | Partition = "layer",
    target: Globs | None = None,
    ignore: Globs = (),
    curvature: str = "empirical_fisher",
    samples: int = 1000,
    samples_per_row: int = 1,
    damping: float = 1e-3,
    memory_limit: int = MEMORY_LIMIT,
    seed: int = 0,
    progress: bool = True,
    rows_dtype: torch.dtype | None = None,
    vectorize: bool = True,
) -> list[FisherBlock]:
    """The weights of a network in blocks, each with its Fisher model and gradient.

    Parameters
    ----------
    partition : {"global", "layer", "row"}, int or Partition, default "layer"
        How the weights form blocks, see `Partition.from_model`, which also takes `target` and
        `ignore`; they may not accompany a `Partition`.
    damping : float, default 1e-3
        Added to the diagonal of every block.
    model, data, loss_fn, curvature, samples, samples_per_row, memory_limit, seed, progress, \
rows_dtype, vectorize
        See `gradient_rows`.

    Returns
    -------
    list of FisherBlock
        In the order of the partition. Rows, weights and gradients are views of one tensor each for
        the whole network.

    Raises
    ------
    ArgumentError
        If `damping` is negative or not finite, or a glob accompanies a `Partition`; and all that
        `Partition.from_model` and `gradient_rows` raise.
    """
    if isinstance(damping, bool) or not (math.isfinite(damping) and damping >= 0.0):
        raise ArgumentError("damping", f"{damping!r}", "pass a finite number >= 0")
    if not isinstance(partition, Partition):
        partition = Partition.from_model(model, target=target, ignore=ignore, blocks=partition)
    elif target is not None or ignore != ():
        raise ArgumentError("target, ignore", "given beside a Partition", "choose the weights in one place")
    weights = partition.flatten(model)
    found = gradient_rows(
        model,
        data,
        loss_fn,
        partition,
        curvature=curvature,
        samples=samples,
        samples_per_row=samples_per_row,
        memory_limit=memory_limit,
        seed=seed,
        progress=progress,
        rows_dtype=rows_dtype,
        vectorize=vectorize,
    )
    return [
        FisherBlock(
            name=block.name,
            weights=weights[block.start : block.stop],
            hessian=RowsHessian(found.rows[:, block.start : block.stop]),
            gradient=found.gradient[block.start : block.stop],
            damping=float(damping),
        )
        for block in partition.blocks
    ]
