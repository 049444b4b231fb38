"""Which weights may be pruned, their order in one flat vector, and the blocks it is cut into."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cbs_opt.errors import NoEligibleWeightsError, PartitionMismatchError, UnmatchedPatternError
from formulations.errors import ArgumentError, NonFiniteError, ShapeError

Globs = str | Sequence[str]
DEFAULT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BlockRule = str | int
"""How a partition forms blocks: "global", "layer", "row", or a block size."""


@dataclass(frozen=True, kw_only=True)
class ParameterSpan:
    """One parameter tensor and its range ``start:stop`` in the flat vector (row-major).

    `aliases` are the further names of the same tensor where a network ties it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockSpan:
    """One block: the contiguous range ``start:stop`` of the flat vector."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The weights that may be pruned, as one flat vector cut into blocks.

    The flat vector holds the parameters in `named_parameters` order, each row-major, so that every
    block is a contiguous range. Build one with `from_model`.

    Parameters
    ----------
    parameters : tuple of ParameterSpan
        Tile ``0:n`` in order.
    blocks : tuple of BlockSpan
        Tile ``0:n`` in order.
    """

    parameters: tuple[ParameterSpan, ...]
    blocks: tuple[BlockSpan, ...]

    def __post_init__(self) -> None:
        _check_tiling("parameters", self.parameters, self.n)
        _check_tiling("blocks", self.blocks, self.n)

    @classmethod
    def from_model(
        cls, model: nn.Module, *, target: Globs | None = None, ignore: Globs = (), blocks: BlockRule = "layer"
    ) -> Partition:
        """Choose the weights of `model` that may be pruned and cut them into blocks.

        A tied parameter appears once, under its first name; a glob may use any of its names.

        Parameters
        ----------
        model : nn.Module
            The network. Only trainable floating-point parameters are eligible.
        target : str or sequence of str, optional
            Globs on parameter names, such as ``"layer*.conv?.weight"``. By default the weights of
            `nn.Linear` and `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: no biases, no norms.
        ignore : str or sequence of str, default ()
            Globs on parameter names to leave alone, applied after `target`.
        blocks : {"global", "layer", "row"} or int, default "layer"
            One block in all, one a parameter, one an output channel (first axis), or blocks of at
            most that many weights cut within each parameter in flat order.

        Raises
        ------
        NoEligibleWeightsError
            If nothing is left to prune.
        UnmatchedPatternError
            If a glob matches no parameter name.
        ArgumentError
            If `blocks` is none of the above.
        """
        rule = checked_rule("blocks", blocks)
        names = names_by_parameter(model)
        spans: list[ParameterSpan] = []
        stop = 0
        for parameter in eligible_parameters(model, names, target, ignore):
            first, *aliases = names[parameter]
            start, stop, shape = stop, stop + parameter.numel(), tuple(parameter.shape)
            span = ParameterSpan(name=first, shape=shape, start=start, stop=stop, aliases=tuple(aliases))
            spans.append(span)
        whole = (BlockSpan(name="global", start=0, stop=stop),)
        cut = chain.from_iterable(_cut(span, rule) for span in spans)
        return cls(parameters=tuple(spans), blocks=whole if rule == "global" else tuple(cut))

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.parameters[-1].stop if self.parameters else 0

    def tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of `model` by name; `PartitionMismatchError` if names or shapes differ."""
        present = dict(model.named_parameters())
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
        for name, tensor in self.tensors(model).items():
            if bad := int((~torch.isfinite(tensor)).sum()):
                found = f"{bad} of {tensor.numel()} weights of {name} are NaN or infinite"
                raise NonFiniteError("model", found, "load an undamaged network")
            flat.append(tensor.detach().reshape(-1))
        return torch.cat([weights.to(flat[0].device) for weights in flat]) if flat else torch.zeros(0)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views of a flat (n,) vector in the shapes of the parameters, by name."""
        if tuple(vector.shape) != (self.n,):
            found = f"shape {tuple(vector.shape)} for {self.n} weights"
            raise ShapeError("vector", found, f"pass ({self.n},)")
        return {span.name: vector[span.start : span.stop].view(span.shape) for span in self.parameters}

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
    size = math.prod(span.shape[1:]) if rule == "row" else int(rule)
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


def names_by_parameter(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return every parameter object with all its names, in `named_parameters` order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def eligible_parameters(
    model: nn.Module, names: dict[nn.Parameter, list[str]], target: Globs | None, ignore: Globs
) -> list[nn.Parameter]:
    """Return the trainable parameters that `target` names and `ignore` does not, in network order.

    `names` are those of `names_by_parameter`; see `Partition.from_model` for the rest.
    """
    if target is None:
        layers = (module for module in model.modules() if isinstance(module, DEFAULT_LAYERS))
        weights = {module._parameters.get("weight") for module in layers}
        wanted = [parameter for parameter in names if parameter in weights]
    else:
        wanted = _matching("target", names, target)
    ignored = set(_matching("ignore", names, ignore))
    wanted = [parameter for parameter in wanted if parameter not in ignored]
    if not wanted:
        found = "no parameter is left to prune" if names else "the network has no parameters"
        remedy = f"choose among {_listed(names)}" if names else "pass a network with weights"
        raise NoEligibleWeightsError("target, ignore" if names else "model", found, remedy)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in wanted):
        raise NoEligibleWeightsError("model", "lazy parameters without a shape", "run one forward pass first")
    chosen = [p for p in wanted if p.requires_grad and p.is_floating_point() and p.numel() > 0]
    if not chosen:
        found = f"none of {', '.join(names[p][0] for p in wanted)} is trainable"
        raise NoEligibleWeightsError("model", found, "call requires_grad_(True) on what may be pruned")
    return chosen


def _matching(argument: str, names: dict[nn.Parameter, list[str]], globs: Globs) -> list[nn.Parameter]:
    """Return the parameters of which any name matches any glob, in network order."""
    if not (isinstance(globs, str | list | tuple) and all(isinstance(glob, str) for glob in globs)):
        raise ArgumentError(argument, f"{globs!r}", "pass a glob on parameter names, or a list of them")
    matched: set[nn.Parameter] = set()
    for pattern in [globs] if isinstance(globs, str) else globs:
        hits = {p for p, known in names.items() if any(fnmatchcase(name, pattern) for name in known)}
        if not hits:
            found = f"{pattern!r} matches no parameter"
            raise UnmatchedPatternError(argument, found, f"choose among {_listed(names)}")
        matched |= hits
    return [parameter for parameter in names if parameter in matched]


def _listed(names: dict[nn.Parameter, list[str]]) -> str:
    return ", ".join(chain.from_iterable(names.values()))
