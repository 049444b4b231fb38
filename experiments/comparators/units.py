"""Hidden units of our networks: filters and neurons, what makes each, and what reads it.

A unit is a row of the weight that makes it (with its entries of bias and batch norm) and the slice of the
weight that reads it. With row and vectors at zero its output is zero, and it can be removed without a trace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units between two layers.

    Attributes
    ----------
    made_by : str
        Name of the weight whose rows make them.
    vectors : tuple of str
        Names of parameters with an entry a unit: bias, weight and bias of batch norm.
    read_by : str
        Name of the weight whose second axis has `each` entries a unit, side by side.
    each : int, default 1
        The number of pixels of a filter's picture where that is flattened.
    """

    made_by: str
    vectors: tuple[str, ...] = ()
    read_by: str
    each: int = 1


LENET5 = (
    Units(made_by="conv1.weight", vectors=("conv1.bias",), read_by="conv2.weight"),
    Units(made_by="conv2.weight", vectors=("conv2.bias",), read_by="fc1.weight", each=16),
    Units(made_by="fc1.weight", vectors=("fc1.bias",), read_by="fc2.weight"),
)
MLPNET = (
    Units(made_by="fc1.weight", read_by="fc2.weight"),
    Units(made_by="fc2.weight", read_by="fc3.weight"),
)
RESNET20 = tuple(
    Units(
        made_by=f"layer{stage}.{block}.conv1.weight",
        vectors=(f"layer{stage}.{block}.bn1.weight", f"layer{stage}.{block}.bn1.bias"),
        read_by=f"layer{stage}.{block}.conv2.weight",
    )
    for stage in (1, 2, 3)
    for block in (0, 1, 2)
)
"""Those within a residual block; the others are coupled by the shortcuts and stay."""
CHAINS: Mapping[str, tuple[Units, ...]] = {
    "lenet5": LENET5,
    "mlpnet_mnist": MLPNET,
    "resnet20_cifar10": RESNET20,
    "resnet20a_cifar10": RESNET20,
}
"""Hidden units by the name of the network, from its input to its output."""

Kept = dict[str, Tensor]
"""Which units stay, (units,) boolean, by the name of the weight that makes them."""


def all_kept(model: nn.Module, chain: Sequence[Units]) -> Kept:
    """Return that all units stay."""
    return {
        units.made_by: torch.ones(len(model.get_parameter(units.made_by)), dtype=torch.bool)
        for units in chain
    }


def unit_masks(model: nn.Module, chain: Sequence[Units], kept: Kept) -> dict[str, Tensor]:
    """Return masks (True = kept) of all parameters that make units or read them."""
    masks: dict[str, Tensor] = {}
    for units in chain:
        keep = kept[units.made_by]
        for name in (units.made_by, *units.vectors):
            _join(masks, model, name, keep.view(-1, *[1] * (model.get_parameter(name).ndim - 1)))
        reader = model.get_parameter(units.read_by)
        columns = keep.repeat_interleave(units.each).view(1, -1, *[1] * (reader.ndim - 2))
        _join(masks, model, units.read_by, columns)
    return masks


def remaining(model: nn.Module, chain: Sequence[Units], kept: Kept, names: Sequence[str]) -> int:
    """Return how many weights of these names a network has once the units that go are removed from it."""
    masks = unit_masks(model, chain, kept)
    return sum(
        int(masks[name].sum()) if name in masks else model.get_parameter(name).numel() for name in names
    )


def unused_removed(model: nn.Module, chain: Sequence[Units], kept: Kept) -> Kept:
    """Return the units that are left once unused ones are removed.

    A unit is unused if nothing reads it, or if its row and its vectors are zero. What a unit that goes read
    or fed may become unused in turn, so that it is looked for until nothing changes. At least one unit of
    each layer stays.
    """
    found = {name: keep.clone() for name, keep in kept.items()}
    with torch.no_grad():
        while True:
            masks = unit_masks(model, chain, found)

            def size(name: str, masks: Mapping[str, Tensor] = masks) -> Tensor:
                return (model.get_parameter(name) * masks[name]).abs()

            changed = False
            for units in chain:
                made = size(units.made_by).flatten(1).amax(1)
                for name in units.vectors:
                    made = made + size(name)
                read = size(units.read_by).transpose(0, 1).reshape(len(made), -1).amax(1)
                used = found[units.made_by] & (made > 0.0) & (read > 0.0)
                if not bool(used.any()):
                    used = found[units.made_by] & (
                        torch.arange(len(made)) == found[units.made_by].int().argmax()
                    )
                changed |= not used.equal(found[units.made_by])
                found[units.made_by] = used
            if not changed:
                return found


def rows(model: nn.Module, chain: Sequence[Units]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each weight that makes units, and the Euclidean norm of each of its rows."""
    for units in chain:
        weight = model.get_parameter(units.made_by).detach()
        yield units.made_by, weight.flatten(1).norm(dim=1)


def count_kept(units: int, share: float) -> int:
    """Return the number of units that stay of a layer: the share rounded up, at least one."""
    return max(1, math.ceil(share * units - 1e-9))


def _join(masks: dict[str, Tensor], model: nn.Module, name: str, keep: Tensor) -> None:
    """Let a mask also leave out what another says, spread over the shape of the parameter."""
    spread = keep.expand(model.get_parameter(name).shape)
    masks[name] = masks[name] & spread if name in masks else spread.clone()
