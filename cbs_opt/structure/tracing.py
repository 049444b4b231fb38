"""Follow the parameters of a network through one forward pass, operation by operation.

The network runs as it is, whatever its code does: no symbolic tracer has to understand it. Each operation of
PyTorch says how the axes of what it makes belong to the axes of what it was given (`_RULES`). An operation
without a rule fixes everything that reaches it, and the reason names it and the module that ran it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cbs_opt.errors import ForwardError
from cbs_opt.network.data import forward
from cbs_opt.network.operations import OperationMode
from cbs_opt.network.state import evaluation_mode, kept
from cbs_opt.network.trial import plain_attention
from cbs_opt.structure.atoms import (
    NONE,
    Atoms,
    IntArray,
    along,
    axes_of,
    compressed,
    placed,
    to_labels,
    varying,
)
from formulations.errors import ArgumentError

BatchNorm = nn.modules.batchnorm._BatchNorm
Labels = list[Tensor]

ROOT = "the network itself"


@dataclass(frozen=True, kw_only=True, eq=False)
class Slot:
    """An axis of a parameter or of a running statistic, and its atoms: ``first`` to ``first + size - 1``."""

    name: str
    axis: int
    first: int
    size: int

    @property
    def atoms(self) -> IntArray:
        """The atoms, one for each index along the axis."""
        return np.arange(self.first, self.first + self.size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """A product that was run: its operations, and the labels of the axes that they are proportional to."""

    module: str
    flops: int
    axes: tuple[IntArray, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """A weight that was multiplied with activations.

    `atoms` are those of the axis that was summed over; `lowest` and `highest` what was read there, one entry
    an index. `uniform`: whether a constant that is read adds the same constant to every output.
    """

    atoms: IntArray
    lowest: Tensor
    highest: Tensor
    uniform: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Passage:
    """A scale of single channels (batch normalisation, depthwise convolution) and what alone feeds it.

    Where an entry of `gate` is zero, what the atoms of `source` at the same place make is not seen by anyone.
    """

    gate: IntArray
    source: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Sizes:
    """Axes whose sizes a module may have stated: the labels of what it reshaped, split or cut."""

    module: str
    shape: tuple[int, ...]
    labels: tuple[Tensor, ...]


@dataclass(kw_only=True, eq=False)
class Trace:
    """What one forward pass told; `read` and `made` are the atoms of weights by what products did to them."""

    atoms: Atoms = field(default_factory=Atoms)
    slots: list[Slot] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    sizes: list[Sizes] = field(default_factory=list)
    values: list[tuple[Tensor, ...]] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
    made: set[int] = field(default_factory=set)
    shifted: set[int] = field(default_factory=set)
    heads: set[int] = field(default_factory=set)
    output: Any = None


def trace(model: nn.Module, example: Any) -> Trace:
    """Run a network on an example batch, in evaluation mode and without gradients, and return what it told.

    Nothing of the network is changed. Raises `ForwardError`, which names the module that raised.
    """
    tracer = _Tracer(model)
    for tensor in tree_leaves(example):
        if isinstance(tensor, Tensor):
            tracer.data.add(id(tensor))
            tracer.alive.append(tensor)
    output = run(model, example, tracer.running, ForwardError, "pass inputs that the network takes", tracer)
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor):
            tracer.fix(tracer.labels(tensor), "reaches the output of the network")
    tracer.found.output = output
    tracer.settle()
    return tracer.found


def run(
    model: nn.Module,
    example: Any,
    running: list[str],
    kind: type[ArgumentError],
    remedy: str,
    watch: AbstractContextManager[Any] | None = None,
) -> Any:
    """Return what a network gives for a batch, in evaluation mode and without gradients.

    `running` has the names of the modules that are running, outermost first, while they do. Whatever the
    network raises becomes an error of a `kind` that names the module.
    """

    def entered(name: str, *_: Any) -> None:
        running.append(name)

    def left(*_: Any) -> None:
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(entered, name)))
        hooks.append(module.register_forward_hook(left))
    try:
        with kept(model), evaluation_mode(model), torch.no_grad(), plain_attention(), watch or nullcontext():
            return forward(model, example)
    except Exception as error:
        # What a network raises is its own, and may be anything.
        where = next(filter(None, reversed(running)), ROOT)
        raise kind("model", f"{where} raised {type(error).__name__}: {error}", remedy) from error
    finally:
        for hook in hooks:
            hook.remove()


class _Tracer(OperationMode):
    """The dispatch mode that follows labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found = Trace()
        self.atoms = self.found.atoms
        self.data: set[int] = set()
        self.alive: list[Any] = []
        self._labels: dict[int, Labels] = {}
        self.running: list[str] = []
        self._uses: dict[int, int] = {}
        self._origin: dict[int, tuple[str, int, IntArray | None]] = {}
        self._summed: list[IntArray] = []
        self._gates: list[tuple[int, IntArray]] = []
        statistics = (
            (f"{path}.{name}".lstrip("."), buffer)
            for path, module in model.named_modules()
            if isinstance(module, BatchNorm)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.ndim == 1
        )
        for name, tensor in (*model.named_parameters(), *statistics):
            for axis, size in enumerate(tensor.shape):
                if size > 1:
                    atoms = self.atoms.new(size)
                    self.found.slots.append(Slot(name=name, axis=axis, first=int(atoms[0]), size=size))
                    self._labels.setdefault(id(tensor), []).append(to_labels(atoms, axis, tensor.ndim))

    @property
    def module(self) -> str:
        """Name of the module that is running."""
        return (self.running and self.running[-1]) or ROOT

    def raw(self, tensor: Any) -> Labels:
        """Return the labels of a tensor as they were given."""
        return self._labels.get(id(tensor), [])

    def labels(self, tensor: Any) -> Labels:
        """Return the labels of a tensor by what is united, without those that are fixed altogether."""
        return self.united(self.raw(tensor))

    def united(self, labels: Sequence[Tensor]) -> Labels:
        """Return labels by what is united, without those that are fixed altogether."""
        found = []
        for entry in labels:
            roots = self.atoms.roots(np.ascontiguousarray(entry.numpy()))
            if not self.atoms.fixed(roots.reshape(-1)).all():
                found.append(compressed(torch.from_numpy(roots)))
        return found

    def fixed_by(self, tensor: Tensor) -> str | None:
        """Return why a tensor has labels that are fixed; None if it has none."""
        reasons = (self.atoms.reason(int(entry.reshape(-1)[0])) for entry in self.raw(tensor))
        return next((reason for reason in reasons if reason is not None), None)

    def give(self, tensor: Any, labels: Labels) -> None:
        """Label a tensor that an operation made."""
        self._labels[id(tensor)] = labels

    def why(self, what: str) -> str:
        """Return a reason that names the running module."""
        return f"{what} in {self.module}"

    def fix(self, labels: Sequence[Tensor], reason: str) -> None:
        """Say that nothing under `labels` can be taken out."""
        for entry in labels:
            self.atoms.fix(entry.numpy(), reason)

    def spread(self, labels: Tensor, axes: Sequence[int]) -> Tensor:
        """Unite what lies along `axes`, so that labels vary along the others alone."""
        first = labels
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        self.atoms.unite(labels.numpy(), first.numpy(), self.why("held together with what is fixed"))
        return compressed(torch.from_numpy(self.atoms.roots(np.ascontiguousarray(first.numpy()))))

    def only(self, labels: Labels, axis: int) -> Tensor | None:
        """Return the labels that vary along `axis`, made to vary along no other; None if none do."""
        found = varying(labels, [axis])
        for entry in found:
            self.spread(entry, [other for other in axes_of(entry) if other != axis])
        first = found[0] if found else None
        if first is None:
            return None
        for axis_other in [other for other in axes_of(first) if other != axis]:
            first = first.narrow(axis_other, 0, 1)
        for entry in found[1:]:
            self.atoms.unite(entry.numpy(), first.numpy(), self.why("held together with what is fixed"))
        return first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        tensors = [entry for entry in tree_leaves((args, given)) if isinstance(entry, Tensor)]
        made = [entry for entry in tree_leaves(result) if isinstance(entry, Tensor)]
        self.alive.append((tensors, made))
        for tensor in tensors:
            self._uses[id(tensor)] = self._uses.get(id(tensor), 0) + 1
        if any(id(tensor) in self.data for tensor in tensors):
            self.data.update(id(tensor) for tensor in made)
        if not any(self.raw(tensor) for tensor in tensors):
            for tensor in made:
                self._labels.pop(id(tensor), None)
            self._count(func, args, given, result)
            return result
        name = func._schema.name.partition("::")[2]
        known = _RULES.get(name) or _RULES.get(name.rstrip("_"))
        if known is None and torch.Tag.pointwise in func.tags:
            known = _pointwise
        if known is None:
            for tensor in tensors:
                self.fix(self.labels(tensor), self.why(f"passes {name}, which cannot be followed,"))
            for tensor in made:
                self._labels.pop(id(tensor), None)
        else:
            known(self, _Call(func=func, name=name, args=args, kwargs=given, result=result))
        self._count(func, args, given, result)
        self.found.values += [tuple(self.raw(tensor)) for tensor in made if self.raw(tensor)]
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        count = flop_registry.get(func.overloadpacket)
        if count is None:
            return
        flops = count(*args, **kwargs, out_val=result)
        first = next(entry for entry in tree_leaves(result) if isinstance(entry, Tensor))
        axes = [along(entry, axes_of(entry)[0]) for entry in self.labels(first) if len(axes_of(entry)) == 1]
        axes += self._summed
        self._summed = []
        self.found.products.append(Product(module=self.module, flops=int(flops), axes=tuple(axes)))

    def summed(self, atoms: IntArray) -> None:
        """Note the labels of an axis that a product sums over."""
        self._summed.append(atoms)

    def came_from(self, made: Any, name: str, source: Any, atoms: IntArray | None = None) -> None:
        """Note that a tensor is made of another channel by channel, or by a weight with outputs `atoms`."""
        self._origin[id(made)] = (name, id(source), atoms)

    def gate(self, source: Any, atoms: IntArray) -> None:
        """Note a scale of single channels of `source`."""
        self._gates.append((id(source), atoms))

    def settle(self) -> None:
        """Decide what is still open when the pass is over."""
        for source, gate in self._gates:
            atoms = self._alone(source)
            if atoms is not None and atoms.size == gate.size:
                self.found.passages.append(Passage(gate=gate, source=atoms))
        changed = True
        while changed:
            changed = False
            for values in self.found.values:
                for entry in values:
                    changed |= self._straighten(entry)
        self._labels.clear()
        self.alive.clear()

    def _alone(self, source: int) -> IntArray | None:
        """Return the outputs of the weight that makes a tensor, if nothing else sees it on its way."""
        while self._uses.get(source, 0) == 1 and source in self._origin:
            _, before, atoms = self._origin[source]
            if atoms is not None:
                return atoms
            source = before
        return None

    def _straighten(self, entry: Tensor) -> bool:
        """Unite atoms until labels vary along one axis: only whole slices of a tensor can be taken out."""
        if len(axes_of(entry)) < 2:
            return False
        roots = self.atoms.roots(np.ascontiguousarray(entry.numpy()))
        fixed = self.atoms.fixed(roots.reshape(-1))
        if fixed.all():
            return False
        labels = compressed(torch.from_numpy(roots))
        axes = axes_of(labels)
        if len(axes) < 2:
            return False
        if fixed.any():
            self.fix([labels], "is reshaped together with what is fixed")
            return True
        longest = max(axes, key=lambda axis: (labels.shape[axis], -axis))
        self.spread(labels, [axis for axis in axes if axis != longest])
        return True


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """One operation: what it was given, and what it made."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any

    def get(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument by place or name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    @property
    def first(self) -> Any:
        """The tensor that it made, or the first of several."""
        return self.result[0] if isinstance(self.result, tuple | list) else self.result


Rule = Callable[[_Tracer, _Call], None]


def _pointwise(t: _Tracer, call: _Call) -> None:
    tensors = [entry for entry in tree_leaves((call.args, call.kwargs)) if isinstance(entry, Tensor)]
    result = call.first
    met = _meet(t, tensors, result.ndim)
    if call.name.rstrip("_") not in ("mul", "div") and len(tensors) > 1:
        _note_shifts(t, tensors, met)
    sources = [entry for entry in tensors if t.raw(entry)]
    if len(tensors) == 1 or (len(sources) == 1 and result.numel() == sources[0].numel()):
        t.came_from(result, call.name, sources[0])
    t.give(result, met)


def _note_shifts(t: _Tracer, tensors: Sequence[Tensor], met: Labels) -> None:
    """Remember channels that something of the data is added to which is no channel of theirs."""
    if any(id(entry) in t.data and not t.labels(entry) for entry in tensors):
        for entry in met:
            t.found.shifted.update(t.atoms.roots(entry.numpy().reshape(-1)).tolist())


def _meet(t: _Tracer, tensors: Sequence[Tensor], ndim: int) -> Labels:
    """Unite what broadcasting lays upon one another; return the labels of the result."""
    every = [
        (index, placed(entry, range(ndim - tensor.ndim, ndim), ndim))
        for index, tensor in enumerate(tensors)
        for entry in t.labels(tensor)
    ]
    for index, entry in every:
        for other, tensor in enumerate(tensors):
            if other != index:
                covered = {axis for i, labels in every if i == other for axis in axes_of(labels)}
                _fix_bare(t, entry, tensor, covered, ndim)
    reason = t.why("meets what is fixed")
    for place, (index, entry) in enumerate(every):
        for other, labels in every[place + 1 :]:
            if other != index and set(axes_of(entry)) & set(axes_of(labels)):
                t.atoms.unite(entry.numpy(), labels.numpy(), reason)
    return _distinct(t.united([entry for _, entry in every]))


def _fix_bare(t: _Tracer, entry: Tensor, other: Tensor, covered: set[int], ndim: int) -> None:
    """Fix labels along axes where another tensor has entries that are not labelled."""
    shape = [1] * (ndim - other.ndim) + list(other.shape)
    bare = [axis for axis in axes_of(entry) if shape[axis] > 1 and axis not in covered]
    if bare and len(bare) == len(axes_of(entry)):
        t.fix([entry], t.fixed_by(other) or t.why("meets what is no channel"))
    elif bare:
        t.spread(entry, bare)


def _distinct(labels: Sequence[Tensor]) -> Labels:
    """Return labels without those that are there twice."""
    found: Labels = []
    for entry in labels:
        if not any(known.shape == entry.shape and bool((known == entry).all()) for known in found):
            found.append(entry)
    return found


_FIXED_CUT = "is cut at fixed places"


def _move(t: _Tracer, call: _Call) -> None:
    """Follow a view or a copy: the operation itself, run on the labels."""
    source = call.args[0]
    results = list(call.result) if isinstance(call.result, tuple | list) else [call.result]
    others = [entry for entry in tree_leaves((call.args[1:], call.kwargs)) if isinstance(entry, Tensor)]
    for entry in others:
        t.fix(t.labels(entry), t.why(f"passes {call.name} as an index"))
    given: list[Labels] = [[] for _ in results]
    for raw in _evened(t, call, source):
        kwargs = dict(call.kwargs)
        args = list(call.args[1:])
        if call.name == "constant_pad_nd":
            args, kwargs = [call.get(1, "pad"), NONE], {}
        moved = call.func(raw.expand(source.shape).contiguous(), *args, **kwargs)
        for place, entry in enumerate(moved if isinstance(moved, tuple | list) else [moved]):
            labels = compressed(entry)
            if axes_of(labels):
                given[place].append(labels)
            else:
                t.fix([labels], t.why("has a part picked out"))
    for tensor, found in zip(results, given, strict=True):
        t.give(tensor, found)
        if tensor.numel() == source.numel() and tensor.shape == source.shape:
            t.came_from(tensor, call.name, source)
    if call.name in _SIZED:
        for tensor in (source, *results):
            t.found.sizes.append(
                Sizes(module=t.module, shape=tuple(tensor.shape), labels=tuple(t.raw(tensor)))
            )


_SIZED = ("view", "_unsafe_view", "expand", "split", "split_with_sizes", "slice", "repeat")


def _evened(t: _Tracer, call: _Call, source: Tensor) -> Labels:
    """Return the labels of a tensor, with parts united that have to stay of equal size when it is cut."""
    raw = t.raw(source)
    if call.name not in _CUTS:
        return raw
    default = 1 if call.name == "roll" else 0
    place = 2 if call.name in ("split", "split_with_sizes", "roll") else 1
    dims = call.get(place, "dims" if call.name == "roll" else "dim", default)
    if call.name == "index":
        dims = [axis for axis, index in enumerate(call.args[1]) if index is not None]
    for axis in [dims] if isinstance(dims, int) else list(dims):
        axis %= source.ndim
        size = source.shape[axis]
        for entry in varying(raw, [axis]):
            length = _part(call, axis, size)
            if length == size:
                continue
            if length == 0 or (length == 1 and len(axes_of(entry)) == 1):
                t.fix([entry], t.why(_FIXED_CUT))
                continue
            shape = [*entry.shape[:axis], size // length, length, *entry.shape[axis + 1 :]]
            t.spread(entry.reshape(shape), [axis])
    return raw


def _part(call: _Call, axis: int, size: int) -> int:
    """Return the length of the equal parts that an axis is cut into; 0 if they are not equal."""
    if call.name in ("select", "unbind"):
        return 1
    if call.name == "split":
        length = int(call.get(1, "split_size"))
        return length if size % length == 0 else 0
    if call.name == "split_with_sizes":
        return math.gcd(*map(int, call.get(1, "split_sizes")))
    if call.name == "slice":
        start = call.get(2, "start") or 0
        end = call.get(3, "end")
        end = size if end is None else min(int(end), size)
        start, end = (bound + size if bound < 0 else bound for bound in (start, end))
        length = end - start
        even = length > 0 and size % length == 0 and start % length == 0 and call.get(4, "step", 1) == 1
        return length if even else 0
    return 0


_CUTS = ("select", "unbind", "split", "split_with_sizes", "slice", "index", "index_select", "roll", "gather")


def _same(t: _Tracer, call: _Call) -> None:
    source = call.args[0]
    t.came_from(call.first, call.name, source)
    t.give(call.first, t.raw(source))


def _cat(t: _Tracer, call: _Call) -> None:
    tensors = [entry for entry in call.args[0] if entry.numel()]
    axis = int(call.get(1, "dim", 0)) % call.first.ndim
    every = [t.labels(entry) for entry in tensors]
    found: Labels = []
    taken: list[set[int]] = [set() for _ in tensors]
    for index, labels in enumerate(every):
        for place, entry in enumerate(labels):
            if place in taken[index]:
                continue
            match: list[Tensor | None] = []
            for other, candidates in enumerate(every):
                hits = [
                    spot
                    for spot, candidate in enumerate(candidates)
                    if spot not in taken[other] and set(axes_of(candidate)) & set(axes_of(entry))
                ]
                hits = [place] if other == index else hits[:1]
                taken[other].update(hits)
                match.append(candidates[hits[0]] if hits else None)
            if any(piece is None for piece in match) and axes_of(entry) != [axis]:
                t.fix([piece for piece in match if piece is not None], t.why("is joined with what is fixed"))
                continue
            pieces = [
                (torch.full((1,) * tensor.ndim, NONE) if piece is None else piece).expand(tensor.shape)
                for piece, tensor in zip(match, tensors, strict=True)
            ]
            found.append(compressed(torch.cat(pieces, axis)))
    t.give(call.first, [entry for entry in found if axes_of(entry)])


def _stack(t: _Tracer, call: _Call) -> None:
    axis = int(call.get(1, "dim", 0)) % call.first.ndim
    pieces = []
    for entry in call.args[0]:
        piece = entry.unsqueeze(axis)
        labels = [label.unsqueeze(axis) for label in t.labels(entry)]
        t.give(piece, labels)
        t.alive.append(piece)
        pieces.append(piece)
    _cat(t, _Call(func=call.func, name="cat", args=(pieces, axis), kwargs={}, result=call.result))


def _product(
    t: _Tracer,
    one: Tensor,
    other: Tensor,
    summed: tuple[int, int],
    batch: Sequence[tuple[int, int]],
    places: tuple[Sequence[int | None], Sequence[int | None]],
    ndim: int,
) -> tuple[Labels, IntArray | None]:
    """Follow a product that sums over an axis of either factor.

    `batch` are pairs of axes that run along, `places` where the axes of the factors are in the result.
    Returns its labels, and the atoms of the outputs of the factor that is a weight.
    """
    weight = one if id(one) not in t.data else other
    two_sided = id(one) in t.data and id(other) in t.data
    if two_sided:
        _sum_over_activations(t, one, other, summed, batch)
    elif weight is one:
        _read(t, other, one, summed[1], summed[0])
    else:
        _read(t, one, other, summed[0], summed[1])
    for pair in batch:
        _run_along(t, one, other, pair, two_sided)
    found = [
        placed(entry, axes, ndim)
        for tensor, axes, axis in zip((one, other), places, summed, strict=True)
        for entry in t.labels(tensor)
        if axis not in axes_of(entry)
    ]
    outputs = None if two_sided else _outputs(t, weight, summed[0] if weight is one else summed[1])
    return _distinct(found), outputs


def _run_along(t: _Tracer, one: Tensor, other: Tensor, pair: tuple[int, int], heads: bool) -> None:
    """Unite the labels along an axis that runs along in a product of many matrices."""
    met = []
    for tensor, axis in zip((one, other), pair, strict=True):
        only = t.only(t.labels(tensor), axis)
        if only is not None:
            met.append(placed(only, _only_axis(only, axis), 1))
    if len(met) == 1 and one.shape[pair[0]] > 1:
        t.fix(met, t.why("is multiplied with what is fixed"))
    for entry in met[1:]:
        t.atoms.unite(met[0].numpy(), entry.numpy(), t.why("meets what is fixed"))
    if heads:
        for entry in met:
            t.found.heads.update(entry.numpy().reshape(-1).tolist())


def _outputs(t: _Tracer, weight: Tensor, summed: int) -> IntArray | None:
    """Note which atoms of a weight are outputs; return them, if they lie along one axis."""
    outputs = None
    for entry in t.raw(weight):
        if axes_of(entry) and summed not in axes_of(entry):
            t.found.made.update(entry.numpy().reshape(-1).tolist())
            outputs = along(entry, axes_of(entry)[0]) if len(axes_of(entry)) == 1 else outputs
    return outputs


def _only_axis(entry: Tensor, axis: int) -> list[int | None]:
    return [0 if place == axis else None for place in range(entry.ndim)]


def _sum_over_activations(
    t: _Tracer,
    one: Tensor,
    other: Tensor,
    summed: tuple[int, int],
    batch: Sequence[tuple[int, int]],
) -> None:
    """Keep the axis whole that a product of two activations sums over; what is around it may go."""
    for tensor, axis, side in ((one, summed[0], 0), (other, summed[1], 1)):
        around = {pair[side] for pair in batch}
        for entry in varying(t.labels(tensor), [axis]):
            if around & set(axes_of(entry)):
                t.spread(entry, [other for other in axes_of(entry) if other not in around])
            else:
                t.fix([entry], t.why("is summed over in a product of activations"))


def _read(t: _Tracer, data: Tensor, weight: Tensor, k_data: int, k_weight: int, uniform: bool = True) -> None:
    """Unite the channels that a weight reads with its inputs."""
    raw = varying(t.raw(weight), [k_weight])
    if len(raw) > 1 or (raw and len(axes_of(raw[0])) > 1):
        t.fix(raw, t.why("is a weight that is reshaped"))
    atoms = along(raw[0], k_weight) if raw and len(axes_of(raw[0])) == 1 else None
    channels = t.only(t.labels(data), k_data)
    reason = t.why("is read together with what is fixed")
    if channels is None:
        t.fix(raw, t.why("reads what is no channel: the input of the network, or what cannot be followed,"))
        return
    if atoms is None:
        t.fix([channels], t.why("is read by what is no weight"))
        return
    read = along(channels, k_data)
    t.atoms.unite(read, atoms, reason)
    t.found.read.update(atoms.tolist())
    t.summed(atoms)
    axes = [axis for axis in range(data.ndim) if axis != k_data]
    lowest, highest = (data.amin(axes), data.amax(axes)) if axes else (data, data)
    t.found.readings.append(Reading(atoms=atoms, lowest=lowest, highest=highest, uniform=uniform))


def _add_bias(t: _Tracer, labels: Labels, bias: Tensor | None, like: Tensor) -> Labels:
    """Return labels of an output once a bias was added."""
    t.give(like, labels)
    return labels if bias is None else _meet(t, [like, bias], like.ndim)


def _finish(
    t: _Tracer, result: Tensor, labels: Labels, bias: Tensor | None, outputs: IntArray | None
) -> None:
    t.give(result, _add_bias(t, labels, bias, result))
    if outputs is not None:
        t.came_from(result, "product", None, outputs)


def _mm(t: _Tracer, call: _Call) -> None:
    bias, one, other = (call.args if call.name == "addmm" else (None, *call.args))[:3]
    found, outputs = _product(t, one, other, (1, 0), (), ((0, None), (None, 1)), 2)
    _finish(t, call.first, found, bias, outputs)


def _linear(t: _Tracer, call: _Call) -> None:
    one, weight = call.args[:2]
    last = one.ndim - 1
    places = ([*range(last), None], [last, None])
    found, outputs = _product(t, one, weight, (last, 1), (), places, one.ndim)
    _finish(t, call.first, found, call.get(2, "bias"), outputs)


def _bmm(t: _Tracer, call: _Call) -> None:
    bias, one, other = (call.args if call.name == "baddbmm" else (None, *call.args))[:3]
    places = ((0, 1, None), (0, None, 2))
    found, outputs = _product(t, one, other, (2, 1), ((0, 0),), places, 3)
    _finish(t, call.first, found, bias, outputs)


def _attention(t: _Tracer, call: _Call) -> None:
    query, key, value = call.args[:3]
    for tensor in (query, key, value):
        t.fix(varying(t.labels(tensor), [0, 2]), t.why("is a position of attention"))
    for tensor in (query, key):
        for entry in varying(t.labels(tensor), [3]):
            if 1 in axes_of(entry):
                t.spread(entry, [3])
            else:
                t.fix([entry], t.why("is summed over in attention"))
    reason = t.why("meets what is fixed")
    mask = call.kwargs.get("attn_mask", call.kwargs.get("attn_bias"))
    parts = [query, key, value]
    if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        parts.append(mask)
    heads = [t.only(t.labels(tensor), 1) for tensor in parts]
    named = [entry for entry in heads if entry is not None]
    if query.shape[1] > 1 and len(named) < len(parts):
        t.fix(named, t.why("is a head of attention with a part that is fixed"))
    for entry in named:
        t.found.heads.update(t.atoms.roots(entry.numpy().reshape(-1)).tolist())
        ratio = max(query.shape[1] // entry.shape[1], 1)
        grown = entry.repeat_interleave(ratio, 1)
        t.atoms.unite(named[0].numpy(), grown.numpy(), reason)
        if ratio > 1:
            # How many queries share a key stays, even where it is as many as there are keys.
            t.found.sizes.append(Sizes(module=t.module, shape=(ratio,), labels=()))
    t.give(call.first, t.labels(value) if value.shape[1] == query.shape[1] else t.labels(query))
    if value.shape[1] != query.shape[1]:
        t.give(call.first, [entry for entry in t.labels(query) if axes_of(entry) == [1]])


def _convolution(t: _Tracer, call: _Call) -> None:
    data, weight, bias = call.args[:3]
    padding, transposed, groups = call.args[4], bool(call.args[6]), int(call.args[8])
    spatial = range(2, data.ndim)
    _freeze_over(t, [data], [0, *spatial], "is a position of a convolution")
    t.fix(varying(t.raw(weight), spatial), t.why("is a place of a kernel"))
    if id(weight) in t.data or any(len(axes_of(entry)) > 1 for entry in t.raw(weight)):
        t.fix([*t.labels(weight), *t.labels(data)], t.why("is convolved with what is no weight"))
        return
    if groups > 1:
        _grouped(t, call, transposed, groups)
        return
    reads, makes = (0, 1) if transposed else (1, 0)
    uniform = not transposed and not any(padding)
    _read(t, data, weight, 1, reads, uniform)
    outputs = None
    found: Labels = []
    for entry in varying(t.raw(weight), [makes]):
        outputs = along(entry, makes)
        t.found.made.update(outputs.tolist())
        found.append(to_labels(outputs, 1, data.ndim))
    _bias_of_channels(t, outputs, bias)
    t.give(call.first, found)
    if outputs is not None:
        t.came_from(call.first, call.name, None, outputs)


def _bias_of_channels(t: _Tracer, outputs: IntArray | None, *vectors: Any) -> None:
    """Unite vectors of one entry a channel with the channels."""
    for vector in vectors:
        if isinstance(vector, Tensor):
            own = t.raw(vector)
            if own and outputs is not None:
                t.atoms.unite(outputs, along(own[0], 0), t.why("meets what is fixed"))
            elif own:
                t.fix(own, t.why("belongs to what is fixed"))
            elif outputs is not None and vector.numel() > 1:
                t.atoms.fix(outputs, t.why("has an entry that is no parameter"))


def _grouped(t: _Tracer, call: _Call, transposed: bool, groups: int) -> None:
    """Unite the inputs and outputs of every group of a convolution."""
    data, weight, bias = call.args[:3]
    t.fix(varying(t.raw(weight), [1]), t.why("is a channel within a group of a convolution"))
    own = varying(t.raw(weight), [0])
    channels = t.only(t.labels(data), 1)
    if channels is None or not own:
        t.fix(own, t.why("reads what is no channel"))
        return
    first, inputs = along(own[0], 0), along(channels, 1)
    reason = t.why("is in a group with what is fixed")
    leader = inputs.reshape(groups, -1)[:, :1]
    t.atoms.unite(inputs.reshape(groups, -1), leader, reason)
    t.atoms.unite(first.reshape(groups, -1), leader, reason)
    outputs = first if not transposed else np.repeat(leader, call.first.shape[1] // groups, 1).reshape(-1)
    _bias_of_channels(t, outputs, bias)
    t.give(call.first, [to_labels(outputs, 1, data.ndim)])
    t.gate(data, first)
    t.came_from(call.first, call.name, data)


def _batch_norm(t: _Tracer, call: _Call) -> None:
    data = call.args[0]
    channels = t.only(t.labels(data), 1)
    outputs = None if channels is None else along(channels, 1)
    _bias_of_channels(t, outputs, *call.args[1:5])
    t.give(call.first, t.labels(data))
    if isinstance(call.args[1], Tensor) and t.raw(call.args[1]):
        t.gate(data, along(t.raw(call.args[1])[0], 0))
    t.came_from(call.first, call.name, data)


def _layer_norm(t: _Tracer, call: _Call) -> None:
    data = call.args[0]
    over = range(data.ndim - len(call.args[1]), data.ndim)
    _freeze_over(t, [data], over, "is normalised over")
    for vector in call.args[2:4]:
        t.fix(t.labels(vector), t.why("is normalised over"))
    t.give(call.first, t.labels(data))


def _group_norm(t: _Tracer, call: _Call) -> None:
    data, groups = call.args[0], int(call.args[6])
    channels = t.only(t.labels(data), 1)
    outputs = None if channels is None else along(channels, 1)
    if outputs is not None:
        parts = outputs.reshape(groups, -1)
        t.atoms.unite(parts, parts[:, :1], t.why("is normalised with what is fixed"))
    _bias_of_channels(t, outputs, *call.args[1:3])
    t.give(call.first, t.labels(data))


def _freeze_over(t: _Tracer, tensors: Sequence[Tensor], over: Sequence[int], what: str) -> None:
    """Fix what varies along `over` alone; unite along it what varies along other axes too."""
    for tensor in tensors:
        for entry in varying(t.labels(tensor), over):
            inside = [axis for axis in axes_of(entry) if axis in over]
            if len(inside) == len(axes_of(entry)):
                t.fix([entry], t.why(what))
            else:
                t.spread(entry, inside)


def _reduction(t: _Tracer, call: _Call) -> None:
    data, result = call.args[0], call.first
    dims = call.get(1, "dim")
    if call.name in ("linalg_vector_norm", "norm"):
        dims = call.get(2, "dim")
    if not isinstance(dims, int | list | tuple) or (isinstance(dims, list | tuple) and not dims):
        dims = range(data.ndim)
    over = sorted({axis % max(data.ndim, 1) for axis in ([dims] if isinstance(dims, int) else dims)})
    _freeze_over(t, [data], over, f"is under {call.name}")
    stays = result.ndim == data.ndim
    left = [axis for axis in range(data.ndim) if axis not in over]
    axes = [axis if stays else (left.index(axis) if axis in left else None) for axis in range(data.ndim)]
    labels = [placed(entry, axes, result.ndim) for entry in t.labels(data)]
    for tensor in tree_leaves(call.result):
        if isinstance(tensor, Tensor):
            t.give(tensor, labels)
    if result.ndim and labels:
        t.came_from(result, call.name, data)


def _spatial(t: _Tracer, call: _Call) -> None:
    """Let channels pass pooling and resizing, and fix places."""
    data = call.args[0]
    rank = next((int(digit) for digit in "123" if f"{digit}d" in call.name), data.ndim - 2)
    _freeze_over(t, [data], range(data.ndim - rank, data.ndim), "is a place under pooling or resizing")
    for tensor in tree_leaves(call.result):
        if isinstance(tensor, Tensor):
            t.give(tensor, t.labels(data))
    t.came_from(call.first, call.name, data)


def _mixing(t: _Tracer, call: _Call) -> None:
    """Fix the axis of an operation that keeps the shape: softmax, sums so far."""
    data = call.args[0]
    _freeze_over(t, [data], [int(call.get(1, "dim")) % data.ndim], f"is under {call.name}")
    t.give(call.first, t.labels(data))


def _embedding(t: _Tracer, call: _Call) -> None:
    weight = call.args[0]
    t.fix(varying(t.raw(weight), [0]), t.why("is an entry of an embedding"))
    ndim = call.first.ndim
    columns = varying(t.raw(weight), [1])
    t.give(call.first, [placed(entry, [None, ndim - 1], ndim) for entry in columns])
    for entry in columns:
        t.found.made.update(entry.numpy().reshape(-1).tolist())


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "unsqueeze", "squeeze"),
            *("expand", "select", "slice", "split", "split_with_sizes", "unbind", "repeat", "flip", "roll"),
            *("pixel_shuffle", "pixel_unshuffle", "index", "index_select", "gather", "constant_pad_nd"),
            *("repeat_interleave", "unsafe_split", "unfold"),
        ),
        _move,
    ),
    **dict.fromkeys(("clone", "alias", "detach", "_to_copy", "lift_fresh", "contiguous", "dropout"), _same),
    **dict.fromkeys(("mm", "addmm"), _mm),
    **dict.fromkeys(("bmm", "baddbmm"), _bmm),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
        ),
        _attention,
    ),
    **dict.fromkeys(
        (
            *("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"),
            *("_native_batch_norm_legit_no_training",),
        ),
        _batch_norm,
    ),
    **dict.fromkeys(
        (
            *("mean", "sum", "amax", "amin", "max", "min", "var", "std", "prod", "logsumexp", "argmax"),
            *("norm", "linalg_vector_norm", "var_mean", "any", "all"),
        ),
        _reduction,
    ),
    **dict.fromkeys(
        (
            *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
            *("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d"),
            *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
            *("upsample_linear1d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d"),
            *("replication_pad2d",),
        ),
        _spatial,
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "cumsum"), _mixing),
    "linear": _linear,
    "convolution": _convolution,
    "cat": _cat,
    "stack": _stack,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "embedding": _embedding,
}
"""How each operation passes labels on, by its name in ATen."""
