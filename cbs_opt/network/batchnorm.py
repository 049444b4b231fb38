"""Batch-normalisation statistics of a network whose weights have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn

from cbs_opt.errors import EmptyDataError, NoBatchNormError
from cbs_opt.network.data import Data, device_of, forward, iterate, regroup
from cbs_opt.network.objective import Objective
from cbs_opt.network.state import evaluation_mode
from cbs_opt.system.checks import whole_number
from formulations.errors import ArgumentError, NonFiniteError

BatchNorm = nn.modules.batchnorm._BatchNorm


def recalibrate_batchnorm(
    model: nn.Module, data: Data, *, samples: int | None = None, batch_size: int = 256
) -> int:
    """Estimate running means and variances anew from data; return the number of samples used.

    Pruning shifts what every layer passes on, so the statistics of training no longer fit. Batch
    normalisation runs in training mode (each batch normalised by itself), everything else in
    evaluation mode; the statistics become the averages of those of the batches, weighted by their
    numbers of samples. Nothing else changes, and if anything raises the old statistics return.

    Parameters
    ----------
    model : nn.Module
        The network; `running_mean` and `running_var` are written in place,
        `num_batches_tracked` counts anew, modes and momenta are kept.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        Read in order; labels are not looked at. Training data, never test data.
    samples : int, optional
        Where to stop; by default at the end.
    batch_size : int, default 256
        Batches are joined and cut to this size; a single sample left over at the end is dropped.

    Raises
    ------
    NoBatchNormError
        If no layer has running statistics.
    ArgumentError
        If `batch_size` is below 2 or `samples` is not positive.
    NonFiniteError
        If the new statistics are NaN or infinite.
    EmptyDataError, DataLoaderError, BatchFormatError
        If the data cannot be read or holds fewer than two samples.
    """
    if whole_number("batch_size", batch_size) < 2:
        raise ArgumentError("batch_size", "1", "a single sample has no variance; pass 2 or more")
    limit = None if samples is None else whole_number("samples", samples)
    layers = [module for module in model.modules() if holds_statistics(module)]
    if not layers:
        found = "no batch normalisation with running statistics"
        raise NoBatchNormError("model", found, "leave recalibration out")
    used = 0
    batches = iterate(data, batch_size=batch_size, max_samples=limit, device=device_of(model))
    objective = Objective()
    with evaluation_mode(model), _fresh_statistics(layers), torch.no_grad():
        for batch in regroup(batches, batch_size):
            if batch.size > 1:
                objective.output(partial(forward, model), batch)
                used += batch.size
        if used == 0:
            raise EmptyDataError("data", "one sample has no variance", "pass two samples or more")
        statistics = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        if not all(torch.isfinite(buffer).all() for buffer in statistics):
            remedy = "check the data and the weights; the old statistics are back"
            raise NonFiniteError("data", "leads to NaN or infinite statistics", remedy)
    return used


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch normalisation normalise every batch by itself, its running statistics kept as they are."""
    layers = [module for module in model.modules() if holds_statistics(module) and not module.training]
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    old = [buffer.clone() for buffer in buffers]
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer in layers:
            layer.eval()
        with torch.no_grad():
            for buffer, value in zip(buffers, old, strict=True):
                buffer.copy_(value)


def has_statistics(model: nn.Module) -> bool:
    """Whether any layer has running statistics."""
    return any(holds_statistics(module) for module in model.modules())


def holds_statistics(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a module is a batch normalisation with running statistics."""
    return isinstance(module, BatchNorm) and module.running_mean is not None


@contextmanager
def _fresh_statistics(layers: list[BatchNorm]) -> Iterator[None]:
    """Let `layers` average over all batches; put the old statistics back if the body raises."""
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    old = [buffer.clone() for buffer in buffers]
    momenta = [layer.momentum for layer in layers]
    hooks = [layer.register_forward_pre_hook(_averaging()) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        yield
    except BaseException:  # an interrupt must not leave half-made statistics either
        for buffer, value in zip(buffers, old, strict=True):
            buffer.copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _averaging() -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Return a hook that makes running statistics the mean over all samples so far."""
    sizes: list[int] = []

    def weigh(layer: nn.Module, args: tuple[Any, ...]) -> None:
        sizes.append(len(args[0]))
        layer.momentum = sizes[-1] / sum(sizes)  # type: ignore[assignment]

    return weigh
