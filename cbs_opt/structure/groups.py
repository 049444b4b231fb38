"""Groups of weights that can be taken out of a network whole: channels, neurons, heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cbs_opt.errors import EmptyDataError
from cbs_opt.network.data import Inputs, tensors_of
from cbs_opt.network.eligible import unwrapped
from cbs_opt.network.state import require_usable
from cbs_opt.structure.atoms import NONE, IntArray
from cbs_opt.structure.tracing import Product, Slot, Trace, trace
from formulations.errors import ArgumentError

BoolArray = NDArray[np.bool_]

CHANNELS, HEADS, NEURONS = "channels", "heads", "neurons"
MAKES, READS, FOLLOWS = "makes", "reads", "follows"


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """What groups own of a parameter or running statistic.

    Attributes
    ----------
    name : str
        Name in the network.
    axis : int
    index : (n_groups, k) int64 array
        Indices along the axis, k for each group.
    role : {"makes", "reads", "follows"}
        Whether the parameter is a weight whose outputs or inputs these are, or goes with them: a
        bias, a batch normalisation, a depthwise kernel.
    """

    name: str
    axis: int
    index: IntArray
    role: str


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupSet:
    """Groups that are alike: those of one layer, or of layers that are coupled by additions.

    Attributes
    ----------
    name : str
        The layer whose outputs they are, the first if several are coupled.
    kind : {"channels", "heads", "neurons"}
    members : tuple of Member
    parameters, flops : int
        What one group has of the network.
    """

    name: str
    kind: str
    members: tuple[Member, ...]
    parameters: int = 0
    flops: int = 0

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return int(self.members[0].index.shape[0])

    def layers(self, role: str) -> list[str]:
        """Return the layers whose parameters have a role."""
        found = (entry.name.rpartition(".")[0] or entry.name for entry in self.members if entry.role == role)
        return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Outputs of a layer that cannot be taken out one by one, and why."""

    name: str
    outputs: int
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """The groups of a network; ``print`` shows them as a table.

    Attributes
    ----------
    sets : tuple of GroupSet
        In network order.
    whole : tuple of Whole
        Layers with outputs that have to stay.
    parameters, flops : int
        Those of the whole network; operations of one pass over the example, a multiplication and an addition
        counted as two.
    """

    sets: tuple[GroupSet, ...]
    whole: tuple[Whole, ...]
    shapes: Mapping[str, tuple[int, ...]]
    trace: Trace

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of one pass over the example."""
        return sum(entry.flops for entry in self.trace.products)

    def __getitem__(self, name: str) -> GroupSet:
        """Return the groups called `name`."""
        for entry in self.sets:
            if entry.name == name:
                return entry
        found = f"{name!r}, of which there are no groups" + self._why_not(name)
        raise ArgumentError("name", found, f"choose among {', '.join(entry.name for entry in self.sets)}")

    def _why_not(self, name: str) -> str:
        return next((f" (it {entry.reason})" for entry in self.whole if entry.name == name), "")

    def __len__(self) -> int:
        return len(self.sets)

    def checked(self, keep: Mapping[str, Any], argument: str = "keep") -> dict[str, BoolArray]:
        """Return which groups of each set are kept, (n_groups,), for all sets; those not named are whole.

        Raises `ArgumentError` if a name is unknown, a mask is no boolean vector of that length, or nothing of
        a set is kept.
        """
        if not isinstance(keep, Mapping):
            found = f"a {type(keep).__name__}"
            raise ArgumentError(argument, found, "map names of groups to boolean masks, True = kept")
        masks = {entry.name: np.ones(entry.n_groups, dtype=np.bool_) for entry in self.sets}
        for name, mask in keep.items():
            groups = self[name]
            array = np.asarray(mask)
            if array.dtype != np.bool_ or array.shape != (groups.n_groups,):
                found = f"{array.dtype} of shape {array.shape} for {groups.n_groups} groups"
                remedy = "pass a boolean vector, True where a group is kept"
                raise ArgumentError(f"{argument}[{name!r}]", found, remedy)
            if not array.any():
                raise ArgumentError(f"{argument}[{name!r}]", "no group is kept", "keep one at least")
            masks[name] = array
        return masks

    def flops_of(self, keep: Mapping[str, BoolArray]) -> float:
        """Return the operations of the network when only some groups are kept; sets not named are whole."""
        kept = self._kept_units(keep)
        return float(sum(_share_of(entry, kept) for entry in self.priced_axes))

    def parameters_of(self, keep: Mapping[str, BoolArray]) -> int:
        """Return the number of parameters when only some groups are kept; sets not named are whole."""
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for groups in self.sets:
            if groups.name in keep:
                gone = int((~keep[groups.name]).sum())
                for member in groups.members:
                    if member.name in sizes:
                        sizes[member.name][member.axis] -= gone * member.index.shape[1]
        return sum(map(math.prod, sizes.values()))

    def _kept_units(self, keep: Mapping[str, BoolArray]) -> BoolArray:
        masks = [keep.get(entry.name, np.ones(entry.n_groups, dtype=np.bool_)) for entry in self.sets]
        return np.concatenate([*masks, np.ones(1, dtype=np.bool_)])

    @cached_property
    def units(self) -> IntArray:
        """Number of the group that an atom belongs to, over all sets; the last one is none."""
        total = sum(entry.n_groups for entry in self.sets)
        units = np.full(len(self.trace.atoms), total, dtype=np.int64)
        first = {(slot.name, slot.axis): slot.first for slot in self.trace.slots}
        start = 0
        for groups in self.sets:
            for member in groups.members:
                atoms = first[member.name, member.axis] + member.index
                units[self.trace.atoms.roots(atoms.reshape(-1))] = np.repeat(
                    np.arange(start, start + groups.n_groups), member.index.shape[1]
                )
            start += groups.n_groups
        roots = self.trace.atoms.roots(np.arange(len(self.trace.atoms)))
        return units[roots]

    def units_of(self, atoms: IntArray) -> IntArray:
        """Return the group of each atom, numbered over all sets; the number after the last for none."""
        none = sum(entry.n_groups for entry in self.sets)
        return np.where(atoms == NONE, none, self.units[atoms])

    @cached_property
    def priced_axes(self) -> list[tuple[int, list[IntArray]]]:
        """Operations of every product, and the group of each index along the axes that they grow with."""
        return [(entry.flops, self._axes(entry)) for entry in self.trace.products]

    def _axes(self, product: Product) -> list[IntArray]:
        """Return the group of each index along the axes that a product is proportional to."""
        none = sum(entry.n_groups for entry in self.sets)
        axes = (self.units_of(atoms) for atoms in product.axes)
        return [units for units in axes if (units != none).any()]

    def rows(self) -> list[tuple[str, str, int, int, int, str]]:
        """Return name, kind, number of groups, parameters and operations of one, and the layers they feed."""
        return [
            (
                entry.name,
                entry.kind,
                entry.n_groups,
                entry.parameters,
                entry.flops,
                ", ".join([*entry.layers(MAKES)[1:], "->", *entry.layers(READS)]),
            )
            for entry in self.sets
        ]

    def __str__(self) -> str:
        """Return the groups as a table, and below it what has to stay whole."""
        head = ("groups", "kind", "n", "parameters each", "operations each", "with, and feeding")
        lines = [head, *([str(cell) for cell in row] for row in self.rows())]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        text.append(f"{self.parameters} parameters, {self.flops} operations in all")
        text += [f"whole: {entry.name} ({entry.outputs} outputs): {entry.reason}" for entry in self.whole]
        return "\n".join(text)


def groups(model: nn.Module, example: Inputs) -> Structure:
    """Return the groups of weights that can be taken out of a network whole.

    The network runs once on an example, and each axis of every parameter is followed through its operations:
    an output channel of a layer belongs together with its bias, its batch normalisation, the inputs of the
    layers that it feeds, and the channels that it is added to; a head of attention with its slices of query,
    key, value and output. What reaches the output of the network, reads its input, or passes an operation
    that mixes channels (a layer normalisation, a softmax, an unknown one) stays whole.

    Parameters
    ----------
    model : nn.Module
        Run in evaluation mode; not changed.
    example : Tensor, or tuple or dict of them
        Inputs of one batch, as the network takes them; no labels. Two samples are enough. Sizes that differ
        from one another (batch, length, channels) make what a module states about them plain.

    Returns
    -------
    Structure
        Its ``sets`` hold the groups; ``print`` shows names, layers, numbers, parameters and operations.

    Raises
    ------
    ForwardError
        If the network raises on the example; names the module.
    ArgumentError
        If it cannot be run at all: lazy or meta tensors.
    EmptyDataError
        If the example holds no sample.

    Notes
    -----
    Time and memory of one forward pass, all of whose activations are held.

    Examples
    --------
    >>> print(groups(model, x[:2]))  # doctest: +SKIP
    """
    model = unwrapped(model)
    require_usable(model)
    if any(tensor.ndim and not len(tensor) for tensor in tensors_of(example)):
        raise EmptyDataError("example", "a batch of no sample", "pass one of two samples or more")
    return _structure(model, trace(model, example))


def _structure(model: nn.Module, found: Trace) -> Structure:
    units, whole = _units(found)
    by_signature: dict[tuple[Any, ...], list[dict[int, list[int]]]] = {}
    for unit in units:
        signature = tuple((slot, len(index)) for slot, index in sorted(unit.items()))
        by_signature.setdefault(signature, []).append(unit)
    sets: list[GroupSet] = []
    for signature, alike in by_signature.items():
        slots = [slot for slot, _ in signature]
        members = tuple(
            Member(
                name=found.slots[slot].name,
                axis=found.slots[slot].axis,
                index=np.array([entry[slot] for entry in alike], dtype=np.int64),
                role=_role(found.slots[slot], alike[0][slot], found),
            )
            for slot in slots
        )
        makes = [member for member in members if member.role == MAKES]
        reads = [member for member in members if member.role == READS]
        if not makes or not reads or len(alike) == 1:
            reason = "is a single group" if makes and reads else "is read by no weight, or made by none"
            name = (makes or list(members))[0].name.rpartition(".")[0]
            whole.append(Whole(name=name, outputs=len(alike), reason=reason))
            continue
        base = makes[0].name.rpartition(".")[0] or makes[0].name
        taken = sum(entry.name == base or entry.name.startswith(f"{base}#") for entry in sets)
        name = base if not taken else f"{base}#{taken + 1}"
        sets.append(GroupSet(name=name, kind=_kind(found, model, makes, alike, slots), members=members))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    structure = Structure(sets=tuple(sets), whole=tuple(whole), shapes=shapes, trace=found)
    return Structure(sets=tuple(_priced(structure)), whole=tuple(whole), shapes=shapes, trace=found)


def _units(found: Trace) -> tuple[list[dict[int, list[int]]], list[Whole]]:
    """Return the indices in each slot of all that may be taken out, and which layers are whole."""
    units: dict[int, dict[int, list[int]]] = {}
    whole: list[Whole] = []
    for number, slot in enumerate(found.slots):
        roots = found.atoms.roots(slot.atoms)
        fixed = found.atoms.fixed(roots)
        for index in np.flatnonzero(~fixed).tolist():
            units.setdefault(int(roots[index]), {}).setdefault(number, []).append(index)
        if fixed.any() and slot.first in found.made:
            stays = roots[fixed]
            reason = found.atoms.reason(int(stays[0])) or ""
            name = slot.name.rpartition(".")[0] or slot.name
            whole.append(Whole(name=name, outputs=int(fixed.sum()), reason=reason))
    return list(units.values()), whole


def _role(slot: Slot, index: Sequence[int], found: Trace) -> str:
    atom = slot.first + index[0]
    if atom in found.read:
        return READS
    return MAKES if atom in found.made else FOLLOWS


def _kind(
    found: Trace, model: nn.Module, makes: Sequence[Member], alike: Sequence[Any], slots: Sequence[int]
) -> str:
    slot = slots[0]
    atom = np.array([found.slots[slot].first + alike[0][slot][0]])
    heads = {int(found.atoms.roots(np.array([head]))[0]) for head in found.heads}
    if int(found.atoms.roots(atom)[0]) in heads:
        return HEADS
    return CHANNELS if model.get_parameter(makes[0].name).ndim > 2 else NEURONS


def _priced(structure: Structure) -> list[GroupSet]:
    """Return the sets with what one group of each has of the network."""
    priced = []
    for entry in structure.sets:
        keep = np.ones(entry.n_groups, dtype=np.bool_)
        keep[0] = False
        without = {entry.name: keep}
        priced.append(
            GroupSet(
                name=entry.name,
                kind=entry.kind,
                members=entry.members,
                parameters=structure.parameters - structure.parameters_of(without),
                flops=round(structure.flops - structure.flops_of(without)),
            )
        )
    return priced


def _share_of(product: tuple[int, list[IntArray]], kept: BoolArray) -> float:
    flops, axes = product
    return flops * math.prod(float(kept[units].mean()) for units in axes)


def tensor_named(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer by its name."""
    owner, _, own = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), own)
    assert isinstance(tensor, torch.Tensor)
    return tensor
