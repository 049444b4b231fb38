"""Trying candidate weights without touching the network, and writing the chosen ones, or none.

Whatever else changes the network in the meantime is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cbs_opt.errors import NetworkChangedError
from cbs_opt.network.eligible import unwrapped
from cbs_opt.network.partition import Partition
from cbs_opt.network.state import require_usable
from formulations.errors import NonFiniteError

Result = TypeVar("Result")


class TrialNetwork(nn.Module):
    """A network run with other weights in place of its own, which stay as they are.

    `weights` (n,) are those of `partition`, cast to the dtype of each parameter; `others` are buffers and
    further parameters by name, by default its own.
    """

    weights: dict[str, Tensor]
    """The weights by parameter name."""

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        weights: Tensor,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = unwrapped(model)
        self.weights = as_parameters(model, partition, weights)
        self._lent = {**self.weights, **(others or {})}

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the output of the network with the trial weights."""
        return lent(self.model, self._lent, lambda: self.model(*args, **kwargs))


class _Borrower(nn.Module):
    """Runs what it is given, which is how long `functional_call` of it lends tensors to the network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, act: Callable[[], Any]) -> Any:
        return act()


def lent(model: nn.Module, tensors: dict[str, Tensor], act: Callable[[], Result]) -> Result:
    """Return what `act` returns while a network has `tensors`, by name, in the place of its own.

    A backward pass may run parts of the network again (`torch.utils.checkpoint`), so it belongs into `act`.
    """
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    result: Result = functional_call(_Borrower(model), named, (act,))
    return result


def write_back(
    model: nn.Module,
    partition: Partition,
    weights: Tensor,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write flat weights (n,) into the parameters in place, and other tensors by name; all, or none.

    `others` are buffers and further parameters.

    If anything raises in between, an interruption included, every tensor gets its old values back before
    the exception goes on. Other tensors are not touched. Raises `NonFiniteError` if a weight is NaN,
    infinite, or too large for its parameter's dtype; nothing is written.
    """
    values = as_parameters(model, partition, weights)
    for name, value in values.items():
        if bad := int((~torch.isfinite(value)).sum()):
            found = f"{bad} of {value.numel()} new weights of {name} do not fit {value.dtype} or are NaN"
            raise NonFiniteError("damping", found, "use a larger damping or a shorter update.scale")
    tensors: dict[str, Tensor] = dict(partition.tensors(model))
    inner = unwrapped(model)
    named: dict[str, Tensor] = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    tensors |= {name: named[name] for name in others or ()}
    values |= others or {}
    _replace(tensors, values)


def write_layers(values: Mapping[str, tuple[nn.Parameter, Tensor]]) -> None:
    """Write new values into parameters in place, by name; all of them, or none.

    As `write_back`, for some layers of a network of which no second copy is held.
    """
    cast = {name: value.to(parameter.device, parameter.dtype) for name, (parameter, value) in values.items()}
    for name, value in cast.items():
        if bad := int((~torch.isfinite(value)).sum()):
            found = f"{bad} of {value.numel()} new weights of {name} do not fit {value.dtype} or are NaN"
            raise NonFiniteError("damping", found, "use a larger damping")
    _replace({name: parameter for name, (parameter, _) in values.items()}, cast)


def _replace(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same name, or leave all as they were."""
    backup = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        try:
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
        except BaseException:
            for name, tensor in tensors.items():
                tensor.copy_(backup[name])
            raise


def as_parameters(model: nn.Module, partition: Partition, weights: Tensor) -> dict[str, Tensor]:
    """Return flat `weights` (n,) by parameter name, each as `model` has it: shape, dtype, device."""
    pieces = partition.split(weights)
    return {
        name: pieces[name].to(tensor.device, tensor.dtype)
        for name, tensor in partition.tensors(model).items()
    }


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run transformers by the operations that they are made of, as when they are differentiated.

    The fast path of evaluation without gradients makes nested tensors of padded batches, and gives other
    outputs at padded positions.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def unchanged(model: nn.Module, partition: Partition) -> Iterator[None]:
    """Raise at the end, or in place of what the change led to, if `model` is not as it was.

    A data loader, a loss, a callback or another thread may move the network, cast it, replace a parameter or
    train it; rows, sets and weights would then belong to different networks. Compared are dtype, device and
    shape of every parameter and buffer, and the values of the weights of `partition`, of which a copy is
    held. Raises `ArgumentError` for a network that cannot be differentiated; `NetworkChangedError` with the
    tensor and what changed: an error that the change led to is its cause.
    """
    require_usable(model)
    kinds = _kinds(model)
    weights = {name: tensor.detach().clone() for name, tensor in partition.tensors(model).items()}

    def check(cause: Exception | None = None) -> None:
        change = _change(model, partition, kinds, weights)
        if change is not None:
            remedy = "leave the network alone while it is pruned (data, loss_fn and callbacks included)"
            raise NetworkChangedError("model", f"{change} while it was being pruned", remedy) from cause

    try:
        yield
    except Exception as error:
        check(error)
        raise
    check()


def _kinds(model: nn.Module) -> dict[str, tuple[object, ...]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.dtype, tensor.device, tuple(tensor.shape)) for name, tensor in tensors}


def _change(
    model: nn.Module, partition: Partition, kinds: dict[str, tuple[object, ...]], weights: dict[str, Tensor]
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
        if not _same(tensor.detach(), weights[name]):
            return f"values of {name} changed"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether all values agree; a NaN agrees with a NaN."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
