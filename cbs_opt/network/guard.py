"""A network must stay as it is while it is pruned: whatever changes it on the way is found out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cbs_opt.errors import NetworkChangedError
from cbs_opt.network.partition import Partition

Kind = tuple[torch.dtype, torch.device, tuple[int, ...]]


@contextmanager
def unchanged(model: nn.Module, partition: Partition) -> Iterator[None]:
    """Raise at the end, or in place of what the change led to, if `model` is not as it was.

    A data loader, a loss, a callback or another thread may move the network, cast it, replace a
    parameter or train it; rows, sets and weights would then belong to different networks. Compared are
    dtype, device and shape of every parameter and buffer, and the values of the weights of
    `partition`, of which a copy is held.

    Raises
    ------
    NetworkChangedError
        With the tensor and what changed; an error that the change led to is its cause.
    """
    kinds, weights = _kinds(model), _values(model, partition)
    try:
        yield
    except Exception as error:
        change = _change(model, partition, kinds, weights)
        if change is None:
            raise
        raise _named(change) from error
    change = _change(model, partition, kinds, weights)
    if change is not None:
        raise _named(change)


def _named(change: str) -> NetworkChangedError:
    remedy = "leave the network alone while it is pruned (data, loss_fn and callbacks included)"
    return NetworkChangedError("model", f"{change} while it was being pruned", remedy)


def _kinds(model: nn.Module) -> dict[str, Kind]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.dtype, tensor.device, tuple(tensor.shape)) for name, tensor in tensors}


def _values(model: nn.Module, partition: Partition) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in partition.tensors(model).items()}


def _change(
    model: nn.Module, partition: Partition, kinds: dict[str, Kind], weights: dict[str, Tensor]
) -> str | None:
    now = _kinds(model)
    for name in kinds.keys() | now.keys():
        before, after = kinds.get(name), now.get(name)
        if before is None or after is None:
            return f"{name} {'came' if before is None else 'went'}"
        for what, old, new in zip(("dtype", "device", "shape"), before, after, strict=True):
            if old != new:
                return f"the {what} of {name} went from {old} to {new}"
    for name, tensor in partition.tensors(model).items():
        if not torch.equal(tensor.detach(), weights[name]):
            return f"values of {name} changed"
    return None
