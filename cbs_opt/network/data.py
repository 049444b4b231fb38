"""Data as the caller has it, read batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.errors import BatchFormatError, DataLoaderError, EmptyDataError, LabelRangeError
from formulations.errors import ArgumentError

Inputs = Any
"""What a network takes for a batch: a tensor, or a tuple, list or dict of tensors (nested ones too)."""
Data = Iterable[Any]
"""An iterable of batches ``(x, y)`` such as a `DataLoader`, or one pair of tensors ``(X, y)``."""
LossFunction = Callable[[Any, Tensor], Tensor]
"""``loss_fn(output, y)``: the mean loss of a batch as a scalar tensor."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Inputs and labels of some samples; the first axis of every tensor counts them."""

    inputs: Inputs
    labels: Tensor

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(self.labels.shape[0])

    def take(self, index: slice | Tensor) -> Batch:
        """Return the samples at `index`; views where it is a slice."""
        return Batch(inputs=map_tensors(lambda x: x[index], self.inputs), labels=self.labels[index])

    def to(self, device: torch.device) -> Batch:
        """Return the same samples on `device`."""
        return Batch(inputs=map_tensors(lambda x: x.to(device), self.inputs), labels=self.labels.to(device))


def map_tensors(function: Callable[..., Any], tree: Inputs, *others: Inputs) -> Inputs:
    """Apply `function` to every tensor of nested tuples, lists and dicts (of several, side by side)."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, dict):
        return {key: map_tensors(function, tree[key], *(other[key] for other in others)) for key in tree}
    if isinstance(tree, tuple | list):
        return tuple(map_tensors(function, *parts) for parts in zip(tree, *others, strict=True))
    raise TypeError(f"{type(tree).__name__} where a tensor was expected")


def call_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments that pass `inputs` to a network.

    A tensor is the one argument, a tuple or list is spread over positions, a dict over keywords.
    """
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def forward(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Return the output of `model` for a batch of inputs."""
    args, kwargs = call_arguments(inputs)
    return model(*args, **kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter (or buffer) of `model`; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def iterate(
    data: Data,
    *,
    batch_size: int,
    max_samples: int | None = None,
    seed: int | None = None,
    device: torch.device | None = None,
    argument: str = "data",
) -> Iterator[Batch]:
    """Read batches of at most `batch_size` samples, at most `max_samples` in all.

    A loader is read in its own order. Of a pair of tensors, `seed` draws `max_samples` without replacement in
    random order; without a seed the first ones are read in order. Larger batches are cut, smaller ones passed
    on as they come, each moved to `device`. `argument` is what messages call the data.
    Raises `DataLoaderError` (the original exception is chained), `BatchFormatError` and `EmptyDataError` if
    the data raises, a batch is not a pair of tensors with one entry a sample, or there is no sample.
    """
    if _is_pair(data):
        whole = _as_batch(data, argument, 0)
        if max_samples is not None and seed is not None:
            order = torch.randperm(whole.size, generator=torch.Generator().manual_seed(seed))
            whole = whole.take(order[:max_samples])
        batches: Iterable[Batch] = [whole]
    else:
        batches = (_as_batch(item, argument, i) for i, item in enumerate(_guarded(data, argument)))
    seen = 0
    for batch in batches:
        if max_samples is not None:
            batch = batch.take(slice(max_samples - seen))
        for start in range(0, batch.size, batch_size):
            part = batch.take(slice(start, start + batch_size))
            yield part if device is None else part.to(device)
        seen += batch.size
        if max_samples is not None and seen >= max_samples:
            return
    if seen == 0:
        remedy = "pass at least one sample; a generator can be read only once"
        raise EmptyDataError(argument, "no sample", remedy)


def sample_count(data: Data) -> int | None:
    """Return how many samples a pair of tensors has; None for other data, which tell at their end."""
    pair: Any = data
    return len(pair[1]) if _is_pair(pair) else None


def regroup(batches: Iterable[Batch], size: int, *, argument: str = "data") -> Iterator[Batch]:
    """Join and cut batches so that each holds exactly `size` samples; the last may hold fewer."""
    waiting: list[Batch] = []
    held = 0
    for batch in batches:
        waiting.append(batch)
        held += batch.size
        if held < size:
            continue
        joined = _join(waiting, argument)
        whole = held - held % size
        for start in range(0, whole, size):
            yield joined.take(slice(start, start + size))
        held -= whole
        waiting = [joined.take(slice(whole, None))] if held else []
    if held:
        yield _join(waiting, argument)


def class_count(output: Any, labels: Tensor) -> int | None:
    """Return the number of classes if `output` (B, C >= 2) and integer `labels` (B,) are a classifier's."""
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        return None
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return int(output.shape[1]) if labels.ndim == 1 and whole else None


def check_labels(labels: Tensor, classes: int, argument: str = "data") -> None:
    """Raise `LabelRangeError` unless every label is one of ``0 ... classes - 1``."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        found = f"labels from {low} to {high} for {classes} outputs"
        remedy = f"number the classes 0 to {classes - 1}; make the labels float if they are no classes"
        raise LabelRangeError(argument, found, remedy)


def check_loss(loss: Any) -> Tensor:
    """Return `loss` if it is a scalar tensor, else raise `ArgumentError`."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError("loss_fn", f"returned {found}", "return the mean loss as a scalar tensor")
    return loss


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)


def _guarded(data: Data, argument: str) -> Iterator[Any]:
    """Yield the items of `data`; whatever it raises becomes a `DataLoaderError`."""
    number = 0
    try:
        for item in data:
            yield item
            number += 1
    except Exception as error:
        found = f"raised {type(error).__name__} at batch {number}: {error}"
        raise DataLoaderError(argument, found, "repair the data; the network is as it was") from error


def _as_batch(item: Any, argument: str, number: int) -> Batch:
    remedy = "yield pairs (x, y) of tensors whose first axis counts the samples"
    if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[1], Tensor):
        parts = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise BatchFormatError(argument, f"batch {number} is a {type(item).__name__}{parts}", remedy)
    inputs, labels = item
    sizes: list[int] = []
    try:
        map_tensors(lambda x: sizes.append(x.shape[0] if x.ndim else -1), inputs)
    except TypeError as error:
        raise BatchFormatError(argument, f"batch {number}: {error}", remedy) from error
    if labels.ndim == 0 or not sizes or any(size != labels.shape[0] for size in sizes):
        found = f"batch {number}: inputs of {sizes} samples, labels of shape {tuple(labels.shape)}"
        raise BatchFormatError(argument, found, remedy)
    return Batch(inputs=inputs, labels=labels)


def _join(batches: list[Batch], argument: str) -> Batch:
    if len(batches) == 1:
        return batches[0]
    try:
        inputs = map_tensors(lambda *parts: torch.cat(parts), *(batch.inputs for batch in batches))
        labels = torch.cat([batch.labels for batch in batches])
    except RuntimeError as error:
        remedy = "pad all samples to one shape"
        raise BatchFormatError(argument, f"batches of different shapes ({error})", remedy) from error
    return Batch(inputs=inputs, labels=labels)
