"""Trying candidate weights without touching the network, and writing the chosen ones, or none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cbs_opt.network.partition import Partition
from formulations.errors import NonFiniteError


class TrialNetwork(nn.Module):
    """A network run with other weights in place of its own, which stay as they are.

    Parameters
    ----------
    model : nn.Module
    partition : Partition
        Which weights are replaced.
    weights : (n,) tensor
        Their values, cast to the dtype of each parameter.
    """

    def __init__(self, model: nn.Module, partition: Partition, weights: Tensor) -> None:
        super().__init__()
        self.model = model
        self._trial = as_parameters(model, partition, weights)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return the output of the network with the trial weights."""
        return functional_call(self.model, self._trial, args, kwargs)


def write_back(model: nn.Module, partition: Partition, weights: Tensor) -> None:
    """Write flat weights into the parameters in place; all of them, or none.

    Parameters
    ----------
    model : nn.Module
    partition : Partition
    weights : (n,) tensor

    Raises
    ------
    NonFiniteError
        If a weight is NaN, infinite, or too large for its parameter's dtype; nothing is written.

    Notes
    -----
    If anything raises in between, an interruption included, every parameter gets its old values
    back before the exception goes on. Other tensors are not touched.
    """
    values = as_parameters(model, partition, weights)
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            found = f"{bad} of {value.numel()} new weights of {name} do not fit {value.dtype} or are NaN"
            raise NonFiniteError("damping", found, "use a larger damping or a shorter update.scale")
    tensors = partition.tensors(model)
    backup = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
    except BaseException:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(backup[name])
        raise


def as_parameters(model: nn.Module, partition: Partition, weights: Tensor) -> dict[str, Tensor]:
    """Flat `weights` (n,) by parameter name, each as `model` has it: shape, dtype, device."""
    tensors = partition.tensors(model)
    pieces = partition.split(weights)
    return {
        name: pieces[name].to(device=tensor.device, dtype=tensor.dtype) for name, tensor in tensors.items()
    }
