"""A smaller dense network in place of one with zeros: what is unread goes, what is constant is folded on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cbs_opt.errors import StructureError
from cbs_opt.network.data import Inputs
from cbs_opt.network.eligible import unwrapped
from cbs_opt.structure.atoms import IntArray, along, axes_of, compressed
from cbs_opt.structure.attention import HeadAttention
from cbs_opt.structure.groups import (
    FOLLOWS,
    MAKES,
    READS,
    BoolArray,
    GroupSet,
    Structure,
    groups,
    tensor_named,
)
from cbs_opt.structure.tracing import ROOT, Reading, Slot, Trace, run, trace
from cbs_opt.system.checks import finite_number
from formulations.errors import ArgumentError

CONSTANT = 16.0
"""Rounding errors by which what is constant may differ from place to place."""
AGREEMENT = 1e3
"""Rounding errors, relative to the largest output, by which the smaller network may differ."""
NAMED = 4
"""Sets that a message names at most."""
RESIZE_REMEDY = "pass the state dict of a network that shrink or prune_groups made of this one"


@dataclass(frozen=True, kw_only=True, eq=False)
class Shrinkage:
    """What was taken out of a network.

    Attributes
    ----------
    keep : mapping of str to (n_groups,) bool array
        The groups that are left, by the names in ``structure``; True = kept.
    structure : Structure
        The groups that there were.
    parameters, flops : tuple of int
        Before and after; operations of one pass over the example.
    notes : tuple of str
        Groups without input that had to stay, and why.
    difference : float
        Largest difference of the outputs on the example from those of the masked network, relative to the
        largest of them.
    """

    keep: Mapping[str, BoolArray]
    structure: Structure
    parameters: tuple[int, int]
    flops: tuple[int, int]
    notes: tuple[str, ...]
    difference: float

    def summary(self) -> str:
        """Return what was taken out of each layer, and sizes before and after."""
        lines = [
            f"{name}: {int(mask.sum())} of {mask.size} kept"
            for name, mask in self.keep.items()
            if not mask.all()
        ]
        for what, (before, after) in (("parameters", self.parameters), ("operations", self.flops)):
            lines.append(f"{what}: {before} -> {after} ({after / max(before, 1):.1%})")
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return self.summary()


def shrink(
    model: nn.Module,
    example: Inputs,
    *,
    keep: Mapping[str, Any] | None = None,
    threshold: float = 0.0,
) -> tuple[nn.Module, Shrinkage]:
    """Return a smaller dense network that computes what a pruned one does, and what was taken out.

    Groups that `keep` leaves out go; so do all groups whose zeros make them useless, as masks of single
    weights leave them too: those that no weight reads, and those that no input reaches. The constant that the
    latter pass on (a bias, the shift of a batch normalisation behind a ReLU) is folded into the biases of
    the layers that read it. One removal leads to others; this goes on until nothing changes.

    Parameters
    ----------
    model : nn.Module
        Not changed; zeros in it are what was pruned.
    example : Tensor, or tuple or dict of them
        Inputs of one batch, as for `groups`.
    keep : mapping of str to bool array, optional
        Groups to keep by the names of `groups`, True = kept; sets that are not named are kept.
    threshold : float, default 0
        Weights of at most this size count as zero: leftovers that cost no loss.

    Returns
    -------
    tuple of nn.Module and Shrinkage
        A network of the same classes, with smaller layers; an `nn.MultiheadAttention` that loses heads
        becomes a `HeadAttention`. Layers get a bias where a constant has to go.

    Raises
    ------
    ForwardError
        If the network raises on the example.
    StructureError
        If the smaller network cannot run, or gives other outputs: a size is stated in the code of a module,
        which is named.
    ArgumentError
        If a name or a mask does not fit, nothing of a set is kept, or the network cannot be copied.

    Examples
    --------
    >>> small, record = shrink(model, x[:2])  # doctest: +SKIP
    >>> print(record.summary())  # doctest: +SKIP
    """
    finite_number("threshold", threshold)
    model = unwrapped(model)
    structure = groups(model, example)
    masks = structure.checked({} if keep is None else keep)
    try:
        small = deepcopy(model)
    except Exception as error:
        # What makes a copy fail is the network's own, and may be anything.
        found = f"it cannot be copied ({type(error).__name__}: {error})"
        raise ArgumentError("model", found, "detach tensors it keeps") from error
    with torch.no_grad():
        work = _Removal(small, structure, masks, threshold)
        notes = work.settle(example)
        before = _tensors(trace(small, example).output)
        work.cut()
        remedy = f"leave out what {work.touched()} loses, or read its sizes from its weights"
        after = _tensors(run(small, example, [], StructureError, remedy))
        difference = _difference(before, after)
        if not difference <= _agreement(before):
            found = f"the smaller network differs by {difference:.2g} on the example"
            raise StructureError("model", found, remedy)
    parameters = (structure.parameters, sum(entry.numel() for entry in small.parameters()))
    flops = (structure.flops, groups(small, example).flops)
    record = Shrinkage(
        keep=masks,
        structure=structure,
        parameters=parameters,
        flops=flops,
        notes=notes,
        difference=difference,
    )
    return small, record


def resized(model: nn.Module, example: Inputs, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a network of the sizes and values of a smaller one that was cut from it.

    What `shrink` and `prune_groups` return is stored like any network, by its state dict. Where layers lost
    different numbers of groups no configuration says their sizes; this reads them from the tensors.

    Parameters
    ----------
    model : nn.Module
        The network before, whatever its values; not changed.
    example : Tensor, or tuple or dict of them
        Inputs of one batch, as for `groups`.
    state : mapping of str to Tensor
        State dict of the smaller network.

    Returns
    -------
    nn.Module

    Raises
    ------
    ArgumentError
        If `state` has not the names and sizes of a smaller network of `model`.
    StructureError, ForwardError
        As `shrink`.

    Examples
    --------
    >>> small = resized(model, x[:2], torch.load("small.pt"))  # doctest: +SKIP
    """
    model = unwrapped(model)
    structure = groups(model, example)
    masks = {part.name: _first_of(part, structure, state) for part in structure.sets}
    small = deepcopy(model)
    with torch.no_grad():
        work = _Removal(small, structure, masks, 0.0)
        work.cut()
        for name, tensor in state.items():
            owner, _, own = name.rpartition(".")
            layer = dict(small.named_modules()).get(owner)
            if own == "bias" and layer is not None and _takes_bias(layer) and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros_like(tensor))
    try:
        small.load_state_dict(state)
    except RuntimeError as error:
        raise ArgumentError("state", " ".join(str(error).split()), RESIZE_REMEDY) from error
    remedy = f"leave out what {work.touched()} loses, or read its sizes from its weights"
    run(small, example, [], StructureError, remedy)
    return small


def _first_of(part: GroupSet, structure: Structure, state: Mapping[str, Tensor]) -> BoolArray:
    """Return a mask of as many groups as a state dict has of a set: the first ones."""
    others = {
        (entry.name, entry.axis) for other in structure.sets if other is not part for entry in other.members
    }
    before = {(slot.name, slot.axis): slot.size for slot in structure.trace.slots}
    for member in part.members:
        place = member.name, member.axis
        if member.name not in state or place in others:
            continue
        shape = tuple(state[member.name].shape)
        gone = before[place] - (shape[member.axis] if member.axis < len(shape) else 0)
        count, rest = divmod(gone, member.index.shape[1])
        if rest or not 0 <= count < part.n_groups:
            found = f"{member.name} of shape {shape}, which no number of {part.kind} of {part.name} gives"
            raise ArgumentError("state", found, RESIZE_REMEDY)
        return np.asarray(np.arange(part.n_groups) < part.n_groups - count)
    found = f"nothing that tells how many {part.kind} of {part.name} there are"
    raise ArgumentError("state", found, "store the whole network instead: torch.save(small, path)")


class _Removal:
    """A copy of a network on its way to a smaller one; `keep` changes as more is found to be useless."""

    def __init__(
        self, model: nn.Module, structure: Structure, keep: dict[str, BoolArray], threshold: float
    ) -> None:
        self.model = model
        self.structure = structure
        self.keep = keep
        self._trace = structure.trace
        self._slots = structure.trace.slots
        self._starts = [slot.first for slot in self._slots]
        self._first = {(slot.name, slot.axis): slot.first for slot in self._slots}
        weights = {entry.name for part in structure.sets for entry in part.members if entry.role != FOLLOWS}
        for name in weights:
            tensor = tensor_named(model, name)
            tensor[tensor.abs() <= threshold] = 0.0
        for part in structure.sets:
            self._erase(part, np.flatnonzero(~keep[part.name]))

    def settle(self, example: Inputs) -> tuple[str, ...]:
        """Take out what is useless until nothing changes; return notes on what has to stay."""
        while True:
            found = trace(self.model, example)
            self._silence(found)
            notes: list[str] = []
            if not any([self._reduce(part, found, notes) for part in self.structure.sets]):
                self._restore()
                return tuple(notes)

    def _silence(self, found: Trace) -> None:
        """Zero the weights whose outputs are multiplied by zero at once."""
        for passage in found.passages:
            slot, index = self._place(passage.gate)
            gate = tensor_named(self.model, slot.name).movedim(slot.axis, 0)[index]
            zero = ~gate.flatten(1).any(1).cpu().numpy() if gate.ndim > 1 else (gate == 0.0).cpu().numpy()
            if zero.any():
                slot, index = self._place(passage.source[zero])
                tensor_named(self.model, slot.name).movedim(slot.axis, 0)[index] = 0.0

    def _place(self, atoms: IntArray) -> tuple[Slot, Tensor]:
        """Return the slot that atoms belong to, and their indices along its axis."""
        slot = self._slots[bisect_right(self._starts, int(atoms[0])) - 1]
        return slot, torch.from_numpy(atoms - slot.first)

    def _erase(self, part: GroupSet, units: IntArray) -> None:
        """Zero the weights of some groups."""
        for member in part.members:
            if member.role != FOLLOWS and units.size:
                index = torch.from_numpy(member.index[units].reshape(-1))
                tensor_named(self.model, member.name).movedim(member.axis, 0)[index] = 0.0

    def _alive(self, part: GroupSet, role: str) -> BoolArray:
        """Return which groups of a set own a weight of a role that is not zero."""
        alive = np.zeros(part.n_groups, dtype=np.bool_)
        for member in part.members:
            if member.role == role:
                tensor = tensor_named(self.model, member.name).movedim(member.axis, 0)
                rows = tensor.reshape(len(tensor), -1).any(1).cpu().numpy()
                alive |= rows[member.index].any(1)
        return alive

    def _reduce(self, part: GroupSet, found: Trace, notes: list[str]) -> bool:
        """Take out the useless groups of a set; return whether there were any."""
        kept_before = self.keep[part.name].copy()
        read, fed = self._alive(part, READS), self._alive(part, MAKES)
        self.keep[part.name] &= read
        for unit in np.flatnonzero(self.keep[part.name] & ~fed).tolist():
            why = self._fold(part, unit, found)
            if why is None:
                self.keep[part.name][unit] = False
            else:
                notes.append(f"{part.name}[{unit}] has no input, but stays: {why}")
        gone = np.flatnonzero(kept_before & ~self.keep[part.name])
        self._erase(part, gone)
        return bool(gone.size)

    def _fold(self, part: GroupSet, unit: int, found: Trace) -> str | None:
        """Add the constants that a group without input passes on to biases; return why not, if not."""
        additions: list[tuple[Any, Tensor]] = []
        for member in part.members:
            for index in member.index[unit].tolist() if member.role == READS else ():
                value = _passed_on(found, self._first[member.name, member.axis] + index)
                if isinstance(value, str):
                    return value
                if value.constant == 0.0:
                    continue
                if not value.uniform:
                    return f"{member.name} pads it with zeros, and it passes on {value.constant:.3g}"
                owner = self.model.get_submodule(member.name.rpartition(".")[0])
                if not member.name.endswith("weight") or not _takes_bias(owner):
                    return f"{member.name} has no bias to hold {value.constant:.3g}"
                column = tensor_named(self.model, member.name).select(member.axis, index)
                additions.append((owner, value.constant * column.reshape(len(column), -1).sum(1)))
        for owner, addition in additions:
            if owner.bias is None:
                owner.bias = nn.Parameter(torch.zeros_like(addition))
            owner.bias.add_(addition)
        return None

    def _restore(self) -> None:
        """Keep one group, of zeros, where all of an axis is gone: no tensor may be empty."""
        for slot in self._slots:
            gone = [
                (part.name, unit, member.index[unit].size)
                for part in self.structure.sets
                for member in part.members
                if (member.name, member.axis) == (slot.name, slot.axis)
                for unit in np.flatnonzero(~self.keep[part.name]).tolist()
            ]
            if gone and sum(size for _, _, size in gone) == slot.size:
                name, unit, _ = gone[0]
                self.keep[name][unit] = True

    def cut(self) -> None:
        """Cut parameters, statistics and what modules state about their sizes."""
        old = {
            name: tuple(tensor.shape)
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
        }
        stated = self._stated()
        owners = _owners(self.model)
        for name, indices in self._kept_indices().items():
            tensor = tensor_named(self.model, name)
            smaller = tensor.detach()
            for axis, index in indices:
                smaller = smaller.index_select(axis, torch.as_tensor(index, device=tensor.device))
            smaller = smaller.contiguous()
            if isinstance(tensor, nn.Parameter):
                smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
            for module, own in owners[id(tensor)]:
                setattr(module, own, smaller)
        for path, module in list(self.model.named_modules()):
            restate(module, old.get(f"{path}.weight".lstrip(".")))
            for name, size in stated.get(path, {}).items():
                setattr(module, name, size)
        self._replace_attention(old)

    def touched(self) -> str:
        """Return the names of the sets that lost groups, of the first few."""
        found = [name for name, mask in self.keep.items() if not mask.all()]
        rest = [f"{len(found) - NAMED} others"] if len(found) > NAMED else []
        return " or ".join([*found[:NAMED], *rest])

    def _kept_indices(self) -> dict[str, list[tuple[int, IntArray]]]:
        """Return what is kept along each axis that is cut, by name of the tensor."""
        gone: dict[tuple[str, int], list[IntArray]] = {}
        for part in self.structure.sets:
            mask = self.keep[part.name]
            for member in part.members if not mask.all() else ():
                gone.setdefault((member.name, member.axis), []).append(member.index[~mask].reshape(-1))
        found: dict[str, list[tuple[int, IntArray]]] = {}
        for (name, axis), parts in gone.items():
            size = tensor_named(self.model, name).shape[axis]
            found.setdefault(name, []).append((axis, np.setdiff1d(np.arange(size), np.concatenate(parts))))
        return found

    def _stated(self) -> dict[str, dict[str, int]]:
        """Return what modules say about sizes that change: the whole numbers among their attributes."""
        everything = np.concatenate([*self.keep.values(), np.ones(1, dtype=np.bool_)])
        changes: dict[str, dict[int, set[int]]] = {}
        for entry in self._trace.sizes:
            sizes = changes.setdefault("" if entry.module == ROOT else entry.module, {})
            smaller = list(entry.shape)
            for raw in entry.labels:
                labels = compressed(torch.from_numpy(self._trace.atoms.roots(raw.numpy())))
                if len(axes_of(labels)) == 1:
                    (axis,) = axes_of(labels)
                    units = self.structure.units_of(along(labels, axis))
                    smaller[axis] -= int((~everything[units]).sum())
            for before, after in zip(entry.shape, smaller, strict=True):
                sizes.setdefault(before, set()).add(after)
        stated: dict[str, dict[str, int]] = {}
        places = _places(self.model)
        for path, sizes in changes.items():
            module = self.model.get_submodule(path)
            own = {} if type(module).__module__.startswith("torch.nn") else vars(module)
            numbers = {name: value for name, value in own.items() if type(value) is int}
            for name in numbers.keys() - places(module):
                value = numbers[name]
                if len(sizes.get(value, ())) == 1:
                    stated.setdefault(path, {})[name] = next(iter(sizes[value]))
        return stated

    def _replace_attention(self, old: Mapping[str, tuple[int, ...]]) -> None:
        for path, module in list(self.model.named_modules()):
            if isinstance(module, nn.MultiheadAttention):
                width = module.out_proj.weight.shape[1]
                if width != old[f"{path}.out_proj.weight".lstrip(".")][1]:
                    smaller = HeadAttention(module, module.head_dim)
                    if not path:
                        found = "nn.MultiheadAttention itself, whose class would change"
                        raise StructureError("model", found, "put it into a module that calls it")
                    self.model.set_submodule(path, smaller)


@dataclass(frozen=True)
class _Passed:
    """A constant that is read, and whether it adds a constant to what reads it."""

    constant: float
    uniform: bool


def _passed_on(found: Trace, atom: int) -> _Passed | str:
    """Return the constant that is read at an atom; why there is none, if what is read varies."""
    if int(found.atoms.roots(np.array([atom]))[0]) in found.shifted:
        return "something else is added to it"
    readings = [entry for entry in found.readings if entry.atoms[0] <= atom <= entry.atoms[-1]]
    readings = [entry for entry in readings if atom in entry.atoms]
    values = {_constant(entry, atom) for entry in readings}
    if not values or None in values:
        return "what it passes on is not the same at all places"
    if len(values) > 1:
        return "it is read with different values"
    return _Passed(values.pop() or 0.0, all(entry.uniform for entry in readings))


def _constant(reading: Reading, atom: int) -> float | None:
    """Return what is read at an atom if it is the same everywhere, else None."""
    place = int(np.flatnonzero(reading.atoms == atom)[0])
    low, high = reading.lowest[place], reading.highest[place]
    slack = CONSTANT * torch.finfo(low.dtype).eps * max(abs(float(low)), abs(float(high)))
    return float(high) if float(high - low) <= slack else None


def _places(model: nn.Module) -> Callable[[nn.Module], set[str]]:
    """Return what tells which whole numbers of a module are no sizes: those that differ among its like.

    Modules of one class with weights of the same shapes have the same sizes; the number of a layer, which is
    a size by accident, is another in each.
    """

    def kind(module: nn.Module) -> tuple[Any, ...]:
        return type(module), *((name, tuple(entry.shape)) for name, entry in module.named_parameters())

    values: dict[tuple[Any, ...], dict[str, set[Any]]] = {}
    for module in model.modules():
        numbers = {name: value for name, value in vars(module).items() if type(value) is int}
        if numbers:
            own = values.setdefault(kind(module), {})
            for name, value in numbers.items():
                own.setdefault(name, set()).add(value)

    def different(module: nn.Module) -> set[str]:
        return {name for name, found in values.get(kind(module), {}).items() if len(found) > 1}

    return different


def _takes_bias(module: nn.Module) -> bool:
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not transposed
    return layer or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return where each parameter and buffer hangs, by its identity; tied ones hang in several places."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append((module, own))
    return found


def restate(module: nn.Module, old: Sequence[int] | None) -> None:
    """Let a layer of torch say the sizes that its weight has."""
    weight = getattr(module, "weight", None)
    if old is None or not isinstance(weight, Tensor) or tuple(weight.shape) == tuple(old):
        return
    shape = weight.shape
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            module.groups = module.groups * shape[0] // old[0]
        sizes = (shape[1] * module.groups, shape[0])
        module.in_channels, module.out_channels = (
            (shape[0], shape[1] * module.groups) if module.transposed else sizes
        )
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape[0], shape[1]
    elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm):
        module.num_features = shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * shape[0] // old[0]
        module.num_channels = shape[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        vars(module).update(nx=shape[0], nf=shape[1])


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest difference relative to the largest output; infinite where shapes differ."""
    worst = 0.0
    if len(before) != len(after):
        return float("inf")
    for one, other in zip(before, after, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.numel():
            scale = max(float(one.double().abs().max()), 1e-30)
            worst = max(worst, float((one.double() - other.double()).abs().max()) / scale)
    return worst


def _agreement(outputs: Sequence[Tensor]) -> float:
    kinds = [entry.dtype for entry in outputs if entry.is_floating_point()]
    eps = max((torch.finfo(kind).eps for kind in kinds), default=2.0**-23)
    return AGREEMENT * eps if eps < 1e-6 else 20.0 * eps
