"""The blocks of a network that run one after the other, found by themselves, and the layers in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from cbs_opt.errors import BlockListError, NoEligibleWeightsError
from cbs_opt.network.eligible import (
    Globs,
    LeftOut,
    by_columns,
    eligible_parameters,
    names_by_parameter,
    unmatched,
)

OUTSIDE = "outside of the blocks"
NOT_LINEAR = "no linear layer"
NOT_REACHED = "no calibration token reached it"
REMEDY = 'name the blocks by a glob of modules: blocks="{}*"'
EXAMPLE = "model.layers."


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A linear layer: the name of its weight in the network, the module, and whether outputs are columns."""

    name: str
    module: nn.Module
    by_columns: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def rows(self, weight: Tensor) -> Tensor:
        """Return a tensor in the shape of the weight as (outputs, inputs), or back."""
        return weight.T if self.by_columns else weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One of the blocks of a network, with the layers that are pruned in it, in the network's order."""

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]


def find_blocks(
    model: nn.Module, pattern: str | None = None, ignore: Globs = ()
) -> tuple[tuple[Block, ...], tuple[LeftOut, ...]]:
    """Return the blocks of a network in order, and the parameters that are not pruned with the reason.

    Without a `pattern` the blocks are the `ModuleList` or `Sequential` of modules of one class that has the
    most weights of linear layers; so of lists within lists, as experts are, it is the outer one. A pattern is
    a glob of module names; of those that match, modules within another one do not count, and the others may
    be of any class. Weights of linear layers in the blocks are pruned that `eligible_parameters` lets be;
    `ignore` as there.

    Raises `BlockListError` if there is no such list, or a weight is used in two blocks;
    `UnmatchedPatternError` if the pattern matches nothing; `NoEligibleWeightsError` if no layer is left.
    """
    modules = list(_largest_list(model) if pattern is None else _matching(model, pattern))
    names = names_by_parameter(model)
    chosen, left_out = eligible_parameters(model, names, None, ignore)
    wanted, more = set(chosen), list(left_out)
    blocks, found = [], set()
    for name, module in modules:
        layers = []
        for inner, part in module.named_modules():
            weight = getattr(part, "weight", None)
            if not (isinstance(part, nn.Linear) or by_columns(part)) or weight not in wanted:
                continue
            full = f"{name}.{inner}.weight" if inner else f"{name}.weight"
            if weight in found or len(names[weight]) > 1:
                shared = " and ".join(dict.fromkeys([*names[weight], full]))
                remedy = f'give each a weight of its own, or leave it out: ignore="{names[weight][0]}"'
                raise BlockListError("model", f"{shared} are one and the same weight", remedy)
            found.add(weight)
            layers.append(Layer(name=full, module=part, by_columns=by_columns(part)))
        blocks.append(Block(name=name, module=module, layers=tuple(layers)))
    if not found:
        where = f"no linear layer in {len(blocks)} blocks, from {blocks[0].name} on"
        raise NoEligibleWeightsError("model", where, f"leave fewer layers out, or {REMEDY.format(EXAMPLE)}")
    inside = {parameter for block in blocks for parameter in block.module.parameters()}
    for parameter in chosen:
        if parameter not in found:
            reason = NOT_LINEAR if parameter in inside else OUTSIDE
            more.append(LeftOut(name=names[parameter][0], shape=tuple(parameter.shape), reason=reason))
    return tuple(blocks), tuple(more)


def _largest_list(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules of the list of modules of one class with the most weights of linear layers."""
    best, most = "", 0
    unlike: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        kinds = sorted({type(part).__name__ for part in module})
        if len({type(part) for part in module}) > 1:
            unlike.append((name, ", ".join(kinds)))
        elif (count := _linear_weights(module)) > most:
            best, most = name, count
    if not most:
        found, remedy = "no list of blocks of one class", REMEDY.format(EXAMPLE)
        if unlike:
            name, classes = unlike[0]
            found += f"; the modules of {name or 'the network itself'} are of several ({classes})"
            remedy = REMEDY.format(f"{name}." if name else "")
        raise BlockListError("model", found, f"{remedy}, or use `prune`, which needs none")
    prefix = f"{best}." if best else ""
    for name, part in model.get_submodule(best).named_children():
        yield f"{prefix}{name}", part


def _linear_weights(module: nn.Module) -> int:
    """Return how many weights the linear layers in a module have."""
    layers = (part for part in module.modules() if isinstance(part, nn.Linear) or by_columns(part))
    return sum(weight.numel() for part in layers if isinstance(weight := part.weight, Tensor))


def handed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a layer is fed, of the arguments of a call."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def kind_of(module: nn.Module) -> tuple[object, ...]:
    """Return what modules that are alike have in common: the class, names and shapes of parameters."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return type(module), shapes


def _matching(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules that match a glob and are not within another one that does."""
    names = [name for name, _ in model.named_modules() if name]
    outer = ""
    for name in names:
        if fnmatchcase(name, pattern) and not (outer and name.startswith(f"{outer}.")):
            outer = name
            yield name, model.get_submodule(name)
    if not outer:
        raise unmatched("blocks", pattern, names, what="module")
