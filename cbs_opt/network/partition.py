"""Which weights may be pruned, their order in one flat vector, and the blocks it is cut into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cbs_opt.errors import PartitionMismatchError
from cbs_opt.network.eligible import (
    Globs,
    LeftOut,
    by_columns,
    eligible_parameters,
    names_by_parameter,
    unwrapped,
)
from formulations.errors import ArgumentError, NonFiniteError, ShapeError
from formulations.support import NofM

BlockRule = str | int
"""How a partition forms blocks: "global", "layer", "row", or a block size."""


@dataclass(frozen=True, kw_only=True)
class ParameterSpan:
    """One parameter tensor and its range ``start:stop`` in the flat vector, output channel by output channel.

    `aliases` are the further names of the same tensor where a network ties it. Output channels are its first
    axis; the second one `by_columns`: in transposed convolutions and `Conv1D` of transformers. With
    `inputs_last` the inputs of a channel at one place of the kernel lie side by side in the flat vector.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    aliases: tuple[str, ...] = ()
    by_columns: bool = False
    inputs_last: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the parameter in the order of the flat vector, the slowest first."""
        order = list(range(len(self.shape)))
        if self.by_columns:
            order[:2] = [1, 0]
        if self.inputs_last:
            order.append(order.pop(1))
        return tuple(order)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[1 if self.by_columns else 0] if self.shape else 1

    @property
    def fan_in(self) -> int:
        """Number of weights of an output channel."""
        return (self.stop - self.start) // self.channels

    def flat(self, values: Tensor) -> Tensor:
        """Return values of the parameter, (..., *shape), in the order of the flat vector, (..., n)."""
        first = values.ndim - len(self.shape)
        values = values.permute(*range(first), *(first + axis for axis in self.axes))
        return values.reshape(*values.shape[:first], self.stop - self.start)

    def shaped(self, vector: Tensor) -> Tensor:
        """Return a view of its part (n,) of a flat vector in the shape of the parameter."""
        places = [self.axes.index(axis) for axis in range(len(self.shape))]
        return vector.view([self.shape[axis] for axis in self.axes]).permute(places)

    def reordered(self, moment: Tensor) -> Tensor:
        """Return a matrix (..., f, f) over the weights of a channel, given inputs first, as they lie here."""
        if not self.inputs_last:
            return moment
        inputs = self.shape[0 if self.by_columns else 1]
        place = torch.arange(self.fan_in, device=moment.device).view(inputs, -1).T.flatten()
        return moment.index_select(-2, place).index_select(-1, place)


@dataclass(frozen=True, kw_only=True)
class BlockSpan:
    """One block: the contiguous range ``start:stop`` of the flat vector."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The weights that may be pruned, as one flat vector cut into blocks.

    The flat vector holds the parameters in `named_parameters` order, each channel by channel, so that every
    block is a contiguous range. Build one with `from_model`.

    Parameters
    ----------
    parameters : tuple of ParameterSpan
        Tile ``0:n`` in order.
    blocks : tuple of BlockSpan
        Tile ``0:n`` in order.
    left_out : tuple of LeftOut
        The other parameters of the network, each with its name, shape and reason.
    """

    parameters: tuple[ParameterSpan, ...]
    blocks: tuple[BlockSpan, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        _check_tiling("parameters", self.parameters, self.n)
        _check_tiling("blocks", self.blocks, self.n)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        target: Globs | None = None,
        ignore: Globs = (),
        blocks: BlockRule = "layer",
        pattern: NofM | None = None,
    ) -> Partition:
        """Choose the weights of `model` that may be pruned and cut them into blocks.

        A tied parameter appears once, under its first name; a glob may use any of its names.

        Parameters
        ----------
        model : nn.Module
            The network. Names are those inside of `torch.compile` and `DataParallel`. `left_out` has
            what is not pruned, and why.
        target : str or sequence of str, optional
            Globs on parameter names, such as ``"layer*.conv?.weight"``. By default all trainable
            floating-point parameters of two or more axes, but for embeddings, what is tied to them, norms
            and adapters.
        ignore : str or sequence of str, default ()
            Globs on parameter names to leave alone, applied after `target`.
        blocks : {"global", "layer", "row"} or int, default "layer"
            One block in all, one a parameter, one an output channel (first axis), or blocks of at
            most that many weights cut within each parameter in flat order.
        pattern : NofM, optional
            Order the flat vector such that every `m` consecutive weights are fed by consecutive inputs of one
            output, at one place of a kernel. Parameters whose inputs `m` does not divide are left out.

        Raises
        ------
        NoEligibleWeightsError
            If nothing is left to prune, or `target` names a parameter in full that cannot be pruned.
        UnmatchedPatternError
            If a glob matches no parameter name.
        ArgumentError
            If `blocks` is none of the above, or would cut through the `m` weights of a pattern.
        """
        rule = checked_rule("blocks", blocks)
        if pattern is not None and isinstance(rule, int) and rule % pattern.m:
            raise ArgumentError("blocks", f"{rule} weights for {pattern}", f"use a multiple of {pattern.m}")
        model = unwrapped(model)
        names = names_by_parameter(model)
        chosen, left_out = eligible_parameters(model, names, target, ignore, pattern)
        modules = dict(model.named_modules(remove_duplicate=False))
        spans: list[ParameterSpan] = []
        stop = 0
        for parameter in chosen:
            first, *aliases = names[parameter]
            path, _, leaf = first.rpartition(".")
            start, stop = stop, stop + parameter.numel()
            span = ParameterSpan(
                name=first,
                shape=tuple(parameter.shape),
                start=start,
                stop=stop,
                aliases=tuple(aliases),
                by_columns=leaf == "weight" and by_columns(modules[path]),
                inputs_last=pattern is not None and parameter.ndim > 2,
            )
            spans.append(span)
        whole = (BlockSpan(name="global", start=0, stop=stop),)
        cut = chain.from_iterable(_cut(span, rule) for span in spans)
        formed = whole if rule == "global" else tuple(cut)
        return cls(parameters=tuple(spans), blocks=formed, left_out=left_out)

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.parameters[-1].stop if self.parameters else 0

    @property
    def n_network(self) -> int:
        """Number of weights of the whole network, those that are left out among them."""
        return self.n + sum(entry.n for entry in self.left_out)

    def tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of `model` by name; `PartitionMismatchError` if names or shapes differ."""
        present = dict(unwrapped(model).named_parameters())
        for span in self.parameters:
            found = present.get(span.name)
            if found is None or tuple(found.shape) != span.shape:
                what = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {span.shape}"
                remedy = "build the partition from this network"
                raise PartitionMismatchError("model", f"parameter {span.name} {what}", remedy)
        return {span.name: present[span.name] for span in self.parameters}

    def flatten(self, model: nn.Module) -> Tensor:
        """Return a detached copy of the weights as one (n,) vector.

        It is on the device of the first parameter, in the smallest dtype that holds them all
        (`torch.promote_types`: float16 beside float32 becomes float32).

        Raises
        ------
        PartitionMismatchError
            If `model` lacks a parameter or has it in another shape.
        NonFiniteError
            If a weight is NaN or infinite.
        """
        flat = []
        for span, (name, tensor) in zip(self.parameters, self.tensors(model).items(), strict=True):
            if bad := int((~torch.isfinite(tensor)).sum()):
                found = f"{bad} of {tensor.numel()} weights of {name} are NaN or infinite"
                raise NonFiniteError("model", found, "load an undamaged network")
            flat.append(span.flat(tensor.detach()))
        return torch.cat([weights.to(flat[0].device) for weights in flat]) if flat else torch.zeros(0)

    def widened(self, model: nn.Module, names: Iterable[str]) -> Partition:
        """Return this partition with further parameters of `model` behind its weights, a block each."""
        present = dict(unwrapped(model).named_parameters())
        spans, stop = list(self.parameters), self.n
        for name in names:
            start, stop = stop, stop + present[name].numel()
            spans.append(ParameterSpan(name=name, shape=tuple(present[name].shape), start=start, stop=stop))
        further = (
            BlockSpan(name=span.name, start=span.start, stop=span.stop)
            for span in spans[len(self.parameters) :]
        )
        return replace(self, parameters=tuple(spans), blocks=(*self.blocks, *further))

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views of a flat (n,) vector in the shapes of the parameters, by name."""
        if tuple(vector.shape) != (self.n,):
            found = f"shape {tuple(vector.shape)} for {self.n} weights"
            raise ShapeError("vector", found, f"pass ({self.n},)")
        return {span.name: span.shaped(vector[span.start : span.stop]) for span in self.parameters}

    def keep_by_parameter(self, keep: Tensor | NDArray[np.bool_]) -> dict[str, Tensor]:
        """Split a flat boolean (n,) `keep` (True = kept) into masks by parameter name."""
        flat = torch.as_tensor(keep)
        if flat.dtype != torch.bool:
            raise ArgumentError("keep", f"dtype {flat.dtype}", "pass booleans, True where a weight is kept")
        return self.split(flat)


def checked_rule(argument: str, blocks: BlockRule) -> BlockRule:
    """Return `blocks` if it is a rule that forms blocks, else raise `ArgumentError`."""
    size = isinstance(blocks, int) and not isinstance(blocks, bool) and blocks > 0
    if size or (isinstance(blocks, str) and blocks in ("global", "layer", "row")):
        return blocks
    raise ArgumentError(argument, f"{blocks!r}", 'use "global", "layer", "row" or a positive block size')


def _cut(span: ParameterSpan, rule: BlockRule) -> Iterator[BlockSpan]:
    if rule == "layer":
        yield BlockSpan(name=span.name, start=span.start, stop=span.stop)
        return
    size = span.fan_in if rule == "row" else int(rule)
    for start in range(span.start, span.stop, size):
        stop, first = min(start + size, span.stop), start - span.start
        label = str(first // size) if rule == "row" else f"{first}:{stop - span.start}"
        yield BlockSpan(name=f"{span.name}[{label}]", start=start, stop=stop)


def _check_tiling(argument: str, spans: Sequence[ParameterSpan | BlockSpan], n: int) -> None:
    position = 0
    for span in spans:
        if span.start != position or span.stop <= span.start:
            found = f"{span.name} covers {span.start}:{span.stop} after {position}"
            raise ArgumentError(argument, found, "make the ranges follow one another without gaps")
        position = span.stop
    if position != n:
        raise ArgumentError(argument, f"cover {position} of {n} weights", "cover all of them")
