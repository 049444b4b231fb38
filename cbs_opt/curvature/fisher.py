"""Gradient rows: the factor R of the Fisher model H = R^T R + damping I of a network's loss."""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cbs_opt.curvature.builder import Journal, RowBuilder
from cbs_opt.curvature.gradients import NetworkFunction, require_evaluation_mode
from cbs_opt.curvature.kinds import FISHERS, EmpiricalFisher, Fisher
from cbs_opt.curvature.rows import Rows, RowsInMemory, RowsOnDisk, RowTarget, fit_in_memory
from cbs_opt.errors import NonFiniteGradientError
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.network.data import Data, LossFunction, device_of, iterate, regroup, sample_count
from cbs_opt.network.partition import BlockRule, Partition
from cbs_opt.network.targets import Globs
from cbs_opt.system.checks import finite_number, whole_number
from cbs_opt.system.resources import Resources
from formulations.errors import ArgumentError

EMPIRICAL = EmpiricalFisher()
ORDINARY = Resources()
READ_AHEAD = 1024
"""Samples moved to the device of the network at a time."""


def gradient_rows(
    model: nn.Module,
    data: Data,
    loss_fn: LossFunction,
    partition: Partition,
    *,
    curvature: Fisher = EMPIRICAL,
    resources: Resources = ORDINARY,
    seed: int = 0,
    progress: bool = True,
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
    loss_fn : callable
        ``loss_fn(output, y)``: the mean loss of a batch. Any loss for the empirical Fisher; the
        others take the network's softmax as its distribution over classes, whose loss is
        cross-entropy, and use `loss_fn` for the gradient alone.
    partition : Partition
        The weights, n of them.
    curvature : EmpiricalFisher, ExactFisher, MonteCarloFisher or SketchedFisher
        Which Fisher matrix is sampled, and from how many samples.
    resources : Resources
        `chunk_memory` bounds temporaries besides the rows: the chunk size follows from an estimate, in
        which a sample takes twice the gradient and five times what its backward pass saves (averaged
        rows: three times that); one sample is the least. Rows that take more than `row_memory` go to a
        file in `row_dir`, one block of `partition` after the other; on a file system that is kept in
        memory (tmpfs) nothing is won.
    seed : int, default 0
        Draws the samples, the Monte-Carlo labels and the signs of sketches.
    progress : bool, default True
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
        If `torch.func` cannot differentiate the network or the loss.
    DataLoaderError, BatchFormatError, EmptyDataError, LabelRangeError
        If the data cannot be read or does not fit the network.
    UnsupportedProblemError
        If the curvature needs a classifier and the network is none.
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
    require_evaluation_mode(model)
    began = time.perf_counter()
    size = curvature.per_row
    with ExitStack() as on_failure:

        def target_of(capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> RowTarget:
            # A pair of tensors may have fewer samples than were asked for; of other data it is not known.
            most = max(1, (sample_count(data) or curvature.samples) // size)
            capacity = min(capacity, most * (capacity // max(1, curvature.samples // size)))
            if fit_in_memory(partition, capacity, dtype.itemsize, resources.row_memory):
                return RowsInMemory(torch.empty(capacity, width, dtype=dtype, device=device))
            assert resources.row_memory is not None
            store = RowsOnDisk(
                partition,
                capacity,
                dtype,
                device,
                folder=resources.row_dir,
                buffer_bytes=resources.row_memory,
            )
            on_failure.callback(store.close)
            return store

        builder = RowBuilder(
            function=NetworkFunction(model, partition, loss_fn, weights),
            partition=partition,
            curvature=curvature,
            seed=seed,
            chunk_memory=resources.chunk_memory,
            target_of=target_of,
            keep=keep,
            gradient=gradient,
            journal=Journal() if journal is None else journal,
        )
        batches = iterate(
            data,
            batch_size=min(curvature.samples, READ_AHEAD),
            max_samples=curvature.samples,
            seed=seed,
            device=device_of(model),
        )
        silent = None if progress else True
        with tqdm(total=curvature.samples, desc="gradients", unit="sample", disable=silent) as bar:
            for batch in batches if size == 1 else regroup(batches, size):
                builder.consume(batch)
                bar.update(batch.size)
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
    loss_fn: LossFunction,
    partition: Partition,
    *,
    samples: int,
    batch_size: int = 256,
    seed: int = 0,
    weights: Tensor | None = None,
    progress: bool = True,
) -> tuple[Tensor, int]:
    """Return the gradient of the mean loss over many samples, by ordinary backward passes.

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
    whole_number("samples", samples)
    require_evaluation_mode(model)
    function = NetworkFunction(model, partition, loss_fn, weights)
    total = torch.zeros(partition.n, dtype=function.dtype, device=function.device)
    used = 0
    batches = iterate(data, batch_size=batch_size, max_samples=samples, seed=seed, device=total.device)
    with tqdm(total=samples, desc="gradient", unit="sample", disable=None if progress else True) as bar:
        for batch in batches:
            mean = function.mean_gradient(batch, batch.size)
            for name, piece in partition.split(total).items():
                piece.add_(mean[name].to(total), alpha=batch.size)
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
    curvature: Fisher = EMPIRICAL,
    damping: float = 1e-3,
    resources: Resources = ORDINARY,
    seed: int = 0,
    progress: bool = True,
) -> list[FisherBlock]:
    """Cut the weights of a network into blocks, each with its Fisher model and gradient.

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

    Raises
    ------
    ArgumentError
        If `damping` is negative or not finite, or a glob accompanies a `Partition`; and all that
        `Partition.from_model` and `gradient_rows` raise.
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
