"""Data as the caller has it, read batch by batch: the one place that says what a batch is."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from cbs_opt.errors import BatchFormatError, DataLoaderError, EmptyDataError

Inputs = Any
"""What a network takes for a batch: a tensor, or a tuple or dict of tensors (nested ones too)."""
Labels = Any
"""A tensor, a tuple or dict of tensors, or None."""
Data = Iterable[Any] | Dataset[Any]
"""Batches, such as a `DataLoader`; a `Dataset`; or all samples at once. See `read` for what is a batch."""
LossFunction = Callable[[Any, Any], Tensor]
"""``loss_fn(output, labels)``: the loss of a batch as a scalar tensor, of what the network returns."""

LABELS = "labels"
"""The entry of a mapping that holds the labels, as in Hugging Face's networks."""
DATASET_BATCH = 256
"""Samples of a `Dataset` that are collated at a time."""
ACCEPTED = (
    "pass pairs (x, y), tuples (x1, x2, ..., y), mappings that are called as model(**batch) with or without "
    "'labels', or inputs alone; of tensors, NumPy arrays or numbers whose first axis counts the samples"
)
PASSED_ON = bool | str | int | float
"""Entries of a mapping that a network is given as they are."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Inputs and labels of some samples; the first axis of every tensor counts them.

    `index` (B,) int64 are their places in the data, where they are known; `uncut`: whether they come from all
    samples at once, or from a `Dataset`.
    """

    inputs: Inputs
    labels: Labels = None
    index: Tensor | None = None
    uncut: bool = False

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(next(tensors_of((self.labels, self.inputs))).shape[0])

    def take(self, index: slice | Tensor) -> Batch:
        """Return the samples at `index`; views where it is a slice."""
        trees = self.inputs, self.labels, self.index
        inputs, labels, places = map_tensors(lambda x: x[index], trees)
        return replace(self, inputs=inputs, labels=labels, index=places)

    def to(self, device: torch.device) -> Batch:
        """Return the same samples on `device`."""
        inputs, labels = map_tensors(lambda x: x.to(device), (self.inputs, self.labels))
        return replace(self, inputs=inputs, labels=labels)


def map_tensors(function: Callable[..., Any], tree: Inputs, *others: Inputs) -> Inputs:
    """Apply `function` to every tensor of nested tuples and dicts (of several, side by side)."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, dict):
        return {key: map_tensors(function, tree[key], *(other[key] for other in others)) for key in tree}
    if isinstance(tree, tuple | list):
        return tuple(map_tensors(function, *parts) for parts in zip(tree, *others, strict=True))
    return tree


def tensors_of(tree: Inputs) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from chain.from_iterable(map(tensors_of, tree.values()))
    elif isinstance(tree, tuple | list):
        yield from chain.from_iterable(map(tensors_of, tree))


def structure(tree: Any) -> str:
    """Return types, dtypes, shapes and keys of a batch or an output, in one line for messages."""
    if isinstance(tree, Tensor | np.ndarray):
        kind = "" if isinstance(tree, Tensor) else "array "
        return f"{kind}{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    if isinstance(tree, Mapping):
        name = "" if type(tree) is dict else type(tree).__name__
        return f"{name}{{{', '.join(f'{key}: {structure(value)}' for key, value in tree.items())}}}"
    if isinstance(tree, tuple | list):
        shown = [structure(entry) for entry in tree[:4]] + ["..."] * (len(tree) > 4)
        return f"{type(tree).__name__}({', '.join(shown)})"
    return repr(tree) if tree is None or isinstance(tree, bool | int | float) else type(tree).__name__


def call_arguments(model: Any, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments that pass `inputs` to a network.

    A tensor is the one argument, a tuple is spread over positions, a dict over keywords. Labels are among
    the latter only if the network has an argument of that name.
    """
    if isinstance(inputs, dict):
        unwanted = LABELS in inputs and not _takes_labels(model)
        return (), {key: value for key, value in inputs.items() if key != LABELS} if unwanted else inputs
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def forward(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Return the output of `model` for a batch of inputs."""
    args, kwargs = call_arguments(model, inputs)
    return model(*args, **kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter (or buffer) of `model`; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def read(
    data: Data, *, max_samples: int | None = None, seed: int | None = None, argument: str = "data"
) -> Iterator[Batch]:
    """Read batches as they come, until `max_samples` were read: the last one may bring more.

    A batch is a pair ``(x, y)``; a tuple ``(x1, x2, ..., y)``; a mapping with or without "labels", which the
    network takes as keywords; or inputs alone: a tensor, or a sequence of one. Inputs are tensors, NumPy
    arrays, lists of numbers, or nested tuples, lists and mappings of such; labels likewise, or None. Numbers,
    strings and None in a mapping are handed on as they are. Whole numbers as labels become int64, and
    nothing keeps its graph. All samples may come as one batch, and a `Dataset` is collated by `DataLoader`.

    A loader is read in its own order. Of a `Dataset` or of one batch with all samples, `seed` draws
    `max_samples` without replacement in random order; without a seed the first ones are read in order.
    `argument` is what messages call the data. Raises `DataLoaderError` (the original exception is chained),
    `BatchFormatError` and `EmptyDataError` if the data raise, have another form, or hold no sample.
    """
    whole = _whole(data)
    uncut = isinstance(data, Dataset) or (whole is not None and not isinstance(whole, Batch))
    count = sample_count(data)
    order = None
    if count is not None and max_samples is not None:
        order = torch.arange(count, device="cpu")
        if seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
        order = order[:max_samples]
    if whole is not None:
        batch = _as_batch(whole, argument, 0)
        items: Iterable[Any] = [batch if order is None else _drawn(batch, order, drawn=seed is not None)]
    elif isinstance(data, Dataset):
        chosen = data if order is None else Subset(data, order.tolist())
        items = DataLoader(chosen, batch_size=DATASET_BATCH)
    else:
        items = data
    seen = 0
    for number, item in enumerate(_guarded(items, argument)):
        batch = _as_batch(item, argument, number)
        size = batch.size
        if batch.index is None:
            index = torch.arange(seen, seen + size, device="cpu")
            batch = replace(batch, index=index if order is None else order[index])
        batch = replace(batch, uncut=True) if uncut else batch
        seen += size
        if size:
            yield batch
        if max_samples is not None and seen >= max_samples:
            return
    if seen == 0:
        raise _nothing(data, argument)


def _nothing(data: Data, argument: str) -> EmptyDataError:
    """Return the error for data without a sample, or of which none is left."""
    if isinstance(data, Iterator):
        found = f"nothing is left in a {type(data).__name__}, which can be read only once"
        return EmptyDataError(argument, found, "pass a list of its batches: data are read more than once")
    return EmptyDataError(argument, "no sample", "pass at least one sample")


def cut(
    batches: Iterable[Batch],
    *,
    size: int | None = None,
    max_samples: int | None = None,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Cut batches to at most `size` samples, stop at `max_samples` in all, and move each to `device`."""
    seen = 0
    for batch in batches:
        whole = batch if max_samples is None else batch.take(slice(max_samples - seen))
        seen += whole.size
        for part in [whole] if size is None else parts(whole, size):
            yield part if device is None else part.to(device)
        if max_samples is not None and seen >= max_samples:
            return


def iterate(
    data: Data,
    *,
    batch_size: int | None,
    max_samples: int | None = None,
    seed: int | None = None,
    device: torch.device | None = None,
    argument: str = "data",
) -> Iterator[Batch]:
    """Read batches of at most `batch_size` samples, at most `max_samples` in all; see `read` and `cut`."""
    batches = read(data, max_samples=max_samples, seed=seed, argument=argument)
    return cut(batches, size=batch_size, max_samples=max_samples, device=device)


def peeked(batches: Iterator[Batch], enough: int) -> tuple[Batch, Iterator[Batch]]:
    """Return the first samples, `enough` of them if batches can be joined, and all batches with them."""
    firsts: list[Batch] = []
    for batch in batches:
        firsts.append(batch)
        if sum(first.size for first in firsts) >= enough:
            break
    try:
        joined = _join(firsts, "data")
    except BatchFormatError:
        joined = firsts[0]
    return joined, chain(firsts, batches)


def parts(batch: Batch, size: int) -> Iterator[Batch]:
    """Yield the samples of a batch in parts of at most `size`."""
    if batch.size <= size:
        yield batch
        return
    for start in range(0, batch.size, size):
        yield batch.take(slice(start, start + size))


def sample_count(data: Data) -> int | None:
    """Return how many samples data have that can be drawn from; None for others, which tell at their end."""
    whole = _whole(data)
    if whole is not None:
        return _as_batch(whole, "data", 0).size
    sized = isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__")
    return len(data) if sized else None  # type: ignore[arg-type]


def picker(data: Data) -> Callable[[Tensor], Batch] | None:
    """Return what gives the samples at an index (B,) of `data`; None if they cannot be drawn from.

    These are the data of which `sample_count` knows how many samples they have.
    """
    whole = _whole(data)
    if whole is not None:
        batch = replace(_as_batch(whole, "data", 0), uncut=True)
        return lambda index: _drawn(batch, index, drawn=True)
    if sample_count(data) is None:
        return None

    def pick(index: Tensor) -> Batch:
        (item,) = _guarded(DataLoader(Subset(data, index.tolist()), batch_size=len(index)), "data")  # type: ignore[arg-type]
        return replace(_as_batch(item, "data", 0), index=index, uncut=True)

    return pick


def fixed_samples(data: Data) -> int:
    """Return how many samples tensors have; 0 of data that may give others each time they are read."""
    return 0 if _whole(data) is None else sample_count(data) or 0


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


def _takes_labels(model: Any) -> bool:
    for wrapped in ("model", "module", "_orig_mod"):  # a trial, DataParallel, torch.compile
        inner = getattr(model, wrapped, None) if _passes_on(model) else None
        if inner is not None:
            return _takes_labels(inner)
    try:
        arguments = inspect.signature(getattr(model, "forward", model)).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(a.name == LABELS or a.kind is inspect.Parameter.VAR_KEYWORD for a in arguments)


def _passes_on(model: Any) -> bool:
    """Return whether a network hands all arguments on, whatever they are."""
    function = getattr(model, "forward", None)
    try:
        kinds = {a.kind for a in inspect.signature(function).parameters.values()} if function else set()
    except (TypeError, ValueError):
        return False
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def _whole(data: Any) -> Any:
    """Return `data` if they are all samples at once, else None."""
    array = Tensor | np.ndarray
    if isinstance(data, Batch | Mapping | array):
        return data
    if not isinstance(data, tuple | list) or len(data) < 2:
        return None
    first, last = data[0], data[-1]
    if len(data) == 2:
        several = last is None or isinstance(last, Mapping)
        pair = isinstance(last, array) or _is_numbers(last) or (several and isinstance(first, array))
        return (
            data
            if pair or (isinstance(first, array) and (last is None or isinstance(last, Mapping)))
            else None
        )
    return data if isinstance(data, tuple) and all(isinstance(entry, array) for entry in data) else None


def _drawn(batch: Batch, order: Tensor, *, drawn: bool) -> Batch:
    """Return the samples at `order`: a view where they are the first ones."""
    taken = batch.take(order) if drawn else batch.take(slice(len(order)))
    return replace(taken, index=order)


def _guarded(data: Iterable[Any], argument: str) -> Iterator[Any]:
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
    """Return an item of the caller's data as a batch, or raise `BatchFormatError` with its structure."""
    if isinstance(item, Batch):
        return item
    inputs, labels = item, None
    if isinstance(item, tuple | list) and item and not _is_numbers(item):
        inputs, labels = (item[0], None) if len(item) == 1 else (item[:-1], item[-1])
        inputs = inputs[0] if len(item) == 2 else inputs
    try:
        inputs, labels = _converted(inputs), _converted(labels)
        if isinstance(inputs, dict) and labels is None and inputs.get(LABELS) is not None:
            labels = inputs[LABELS] = map_tensors(_counted, inputs[LABELS])
        labels = map_tensors(_counted, labels)
        tensors = list(tensors_of((inputs, labels)))
        if any(tensor.ndim == 0 for tensor in tensors):
            raise TypeError("a tensor without an axis of samples")
        sizes = {tensor.shape[0] for tensor in tensors}
        if len(sizes) != 1 or not any(True for _ in tensors_of(inputs)):
            counts = " and ".join(map(str, sorted(sizes)))
            raise TypeError(f"tensors of {counts} samples" if len(sizes) > 1 else "no tensor as input")
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"batch {number}: {error}; it is {structure(item)}"
        raise BatchFormatError(argument, found, ACCEPTED) from error
    return Batch(inputs=inputs, labels=labels)


def _converted(tree: Any) -> Any:
    """Return nested inputs or labels as tuples and dicts of tensors without a graph."""
    if isinstance(tree, np.ndarray) or _is_numbers(tree):
        return torch.as_tensor(tree, device="cpu")
    if isinstance(tree, Tensor):
        if tree.is_nested or tree.layout is not torch.strided:
            raise TypeError("a nested or sparse tensor, whose samples cannot be taken one by one")
        return tree.clone() if tree.is_inference() else tree.detach()
    if isinstance(tree, Mapping):
        return {
            key: value if isinstance(value, PASSED_ON) else _converted(value) for key, value in tree.items()
        }
    if isinstance(tree, tuple | list):
        if tree and all(isinstance(entry, Tensor) and entry.ndim == 0 for entry in tree):
            return torch.stack([_converted(entry) for entry in tree])
        return tuple(map(_converted, tree))
    if tree is None:
        return None
    raise TypeError(f"{type(tree).__name__} where a tensor was expected")


def _is_numbers(value: Any) -> bool:
    """Return whether `value` is a list of numbers, nested or not."""
    if isinstance(value, list | tuple) and len(value):
        entry = value[0]
        return isinstance(entry, bool | int | float | np.generic) or (
            isinstance(value, list) and isinstance(entry, list) and _is_numbers(entry)
        )
    return False


def _counted(labels: Tensor) -> Tensor:
    """Return labels that are whole numbers as int64, as losses need them."""
    floating = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    return labels if floating else labels.long()


def _join(batches: list[Batch], argument: str) -> Batch:
    if len(batches) == 1:
        return batches[0]
    try:
        trees = [(batch.inputs, batch.labels, batch.index) for batch in batches]
        inputs, labels, index = map_tensors(lambda *parts: torch.cat(parts), *trees)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        found = (
            f"batches of different shapes ({structure(batches[0].inputs)}, {structure(batches[-1].inputs)})"
        )
        remedy = "pad all samples to one shape, or use per_row=1"
        raise BatchFormatError(argument, found, remedy) from error
    return replace(batches[0], inputs=inputs, labels=labels, index=index)
