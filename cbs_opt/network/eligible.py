"""Which weights of a network may be pruned, and why the others are left alone: decided here alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from cbs_opt.errors import NoEligibleWeightsError, UnmatchedPatternError
from cbs_opt.network.state import require_usable
from formulations.errors import ArgumentError
from formulations.support import NofM

Globs = str | Sequence[str]
Names = Mapping[nn.Parameter, list[str]]
"""Every parameter with all its names, in `named_parameters` order."""

LAYERS = (
    *(nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention),
    *(nn.RNNBase, nn.RNNCellBase),
)
"""The layers of torch whose parameters of two or more axes are weights, whatever their shape."""
TABLES = (nn.Embedding, nn.EmbeddingBag)
EMBEDDINGS = tuple(table.__name__ for table in TABLES)
TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
"""Names of layers, by which those that `torch.jit` scripted or traced are known."""
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
LISTED = 10
"""Names that a message lists at most."""
GLOB = "*?["

ADAPTER = "adapter"
BIAS = "bias"
EMBEDDING = "embedding"
EMPTY = "empty"
FROZEN = "frozen"
GROUPED = "transposed in groups"
IGNORED = "ignored"
INDIVISIBLE = "inputs that m does not divide"
MASKED = "masked by torch.nn.utils.prune"
NORM = "normalisation"
PARAMETRISED = "parametrised"
QUANTISED = "quantised"
SHARED = "shared memory"
TIED = "tied to an embedding"
UNTARGETED = "not in target"
VECTOR = "one axis"
WEIGHT_NORM = "weight norm"

REMEDIES = {
    ADAPTER: "merge adapters into their layers, or name them in target",
    BIAS: "name it in target",
    EMBEDDING: "name it in target",
    FROZEN: "call requires_grad_(True) on what may be pruned",
    GROUPED: "prune it by a share: its inputs are not side by side",
    INDIVISIBLE: "choose a pattern whose m divides them, prune it by a share, or pad the layer",
    MASKED: "make the mask permanent by torch.nn.utils.prune.remove",
    NORM: "name it in target",
    PARAMETRISED: "call torch.nn.utils.parametrize.remove_parametrizations, or remove_spectral_norm, first",
    QUANTISED: "prune before quantising",
    SHARED: "give every parameter memory of its own, or tie layers by one and the same Parameter",
    TIED: "name it in target, which prunes both",
    VECTOR: "name it in target",
    WEIGHT_NORM: "call remove_weight_norm, or parametrize.remove_parametrizations, first",
}
"""What to do to have a weight pruned that is left out, by reason."""
IMPOSSIBLE = (EMPTY, FROZEN, GROUPED, INDIVISIBLE, MASKED, PARAMETRISED, QUANTISED, SHARED, WEIGHT_NORM)
"""Reasons that `target` does not override."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A parameter that is not pruned: its first name, its shape, and the reason in a word or two.

    Figures of the reason follow a colon.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def n(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)

    @property
    def remedy(self) -> str:
        """What to do to have it pruned; empty where nothing helps."""
        return REMEDIES.get(self.kind, "")

    @property
    def kind(self) -> str:
        """The reason without its figures."""
        return self.reason.partition(":")[0]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside `torch.compile` and `DataParallel`, whose parameters have its own names."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, WRAPPERS):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def names_by_parameter(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return every parameter object with all its names, in `named_parameters` order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def eligible_parameters(
    model: nn.Module,
    names: Names,
    target: Globs | None = None,
    ignore: Globs = (),
    pattern: NofM | None = None,
) -> tuple[list[nn.Parameter], tuple[LeftOut, ...]]:
    """Return the parameters that may be pruned, and all others with the reason, both in network order.

    By default every trainable floating-point parameter of two or more axes may be, but for embeddings (and
    heads tied to them), normalisations and adapters. `target` names parameters instead, of any kind but those
    that cannot be pruned as such: quantised, parametrised, masked, or sharing memory with another one. In a
    network with adapters (LoRA) the frozen weights may be pruned. `names`: see `names_by_parameter`. Where n
    of every m inputs are to stay by a `pattern`, m has to divide the inputs.

    Raises `NoEligibleWeightsError` if nothing is left, or `target` names a parameter in full that cannot be
    pruned; `UnmatchedPatternError` if a glob matches no parameter; `ArgumentError` if it is no glob, or the
    values of a parameter are not there (see `require_usable`).
    """
    _check_values(model, names)
    wanted = set(names) if target is None else set(_matching("target", names, target))
    ignored = set(_matching("ignore", names, ignore))
    reasons = _Reasons(model, names)
    chosen: list[nn.Parameter] = []
    left_out: list[LeftOut] = []
    for parameter, (name, *_) in names.items():
        reason = reasons.of(parameter, target is not None)
        reason = reason if parameter in wanted else UNTARGETED
        reason = IGNORED if parameter in ignored else reason
        if reason is None and pattern is not None:
            reason = reasons.against(parameter, pattern)
        if reason is None:
            chosen.append(parameter)
        else:
            left_out.append(LeftOut(name=name, shape=tuple(parameter.shape), reason=reason))
    left_out += _quantised(model)
    if not chosen:
        raise _nothing(names, left_out)
    _check_named(target, left_out)
    return chosen, tuple(left_out)


def trainable_vectors(model: nn.Module, left_out: Sequence[LeftOut]) -> tuple[str, ...]:
    """Return the names of what is left out, has one axis at most, and may move with the kept weights.

    Biases, and scales and shifts of norms: not what was to be ignored, is frozen, or is not a plain parameter
    of its own.
    """
    model = unwrapped(model)
    names = names_by_parameter(model)
    reasons = _Reasons(model, names)
    first = {own[0]: parameter for parameter, own in names.items()}
    few = (entry.name for entry in left_out if len(entry.shape) < 2 and entry.reason != IGNORED)
    plain = (name for name in few if name in first and first[name].requires_grad)
    return tuple(name for name in plain if reasons.of(first[name], True) is None)


def _check_values(model: nn.Module, names: Names) -> None:
    """Raise `ArgumentError` if the values of a parameter are not there, or cannot be written to."""
    require_usable(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for parameter, (name, *_) in names.items():
        owner = modules[name.rpartition(".")[0]]
        if parameter.ndim == 1 and parameter.numel() == 0 and isinstance(owner, LAYERS):
            found = f"{name} is empty: its values are kept elsewhere"
            raise ArgumentError("model", found, "load its weights, and undo offloading, first")


def _check_named(target: Globs | None, left_out: Sequence[LeftOut]) -> None:
    """Raise `NoEligibleWeightsError` if `target` has the full name of a parameter that cannot be pruned."""
    named = [] if target is None else [glob for glob in _globs(target) if not set(GLOB) & set(glob)]
    for entry in left_out:
        if entry.kind in IMPOSSIBLE and entry.name in named:
            raise NoEligibleWeightsError("target", f"{entry.name}: {entry.reason}", entry.remedy)


def by_reason(left_out: Sequence[LeftOut]) -> dict[str, list[LeftOut]]:
    """Return what is left out by reason, that of most weights first."""
    groups: dict[str, list[LeftOut]] = {}
    for entry in left_out:
        groups.setdefault(entry.reason, []).append(entry)
    return dict(sorted(groups.items(), key=lambda group: -sum(entry.n for entry in group[1])))


class _Reasons:
    """Why parameters of one network are left out."""

    def __init__(self, model: nn.Module, names: Names) -> None:
        self._names = names
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._shared = _sharing(model)
        self._derived = {
            name: reason for path, module in self._modules.items() for name, reason in _derived(path, module)
        }
        self._adapted = any(map(_is_adapter, chain.from_iterable(names.values())))

    def of(self, parameter: nn.Parameter, asked: bool) -> str | None:
        """Return why a parameter is left out, by default or though it is `asked` for; None if it is not."""
        names = self._names[parameter]
        owners = [self._modules[name.rpartition(".")[0]] for name in names]
        embedded = [_class_name(owner) in EMBEDDINGS or isinstance(owner, TABLES) for owner in owners]
        leaf = names[0].rpartition(".")[2].lower()
        free = any(not isinstance(owner, LAYERS) and not by_columns(owner) for owner in owners)
        axes = sum(size > 1 for size in parameter.shape) if free else parameter.ndim
        cases = (
            (QUANTISED, not parameter.is_floating_point() or type(parameter.data) is not Tensor),
            (EMPTY, parameter.numel() == 0),
            *((self._derived.get(name), name in self._derived) for name in names),
            (SHARED, any(name in self._shared for name in names)),
            (ADAPTER, any(map(_is_adapter, names))),
            (FROZEN, not parameter.requires_grad and not self._adapted),
            (TIED, any(embedded) and not all(embedded)),
            (EMBEDDING, any(embedded)),
            (BIAS, "bias" in leaf),
            (NORM, any("norm" in _class_name(owner).lower() for owner in owners)),
            (VECTOR, axes < 2),
            (EMBEDDING, free and any(word in leaf for word in ("embed", "pos_", "position", "token"))),
        )
        reasons = (reason for reason, holds in cases if holds)
        return next((reason for reason in reasons if not asked or reason in IMPOSSIBLE), None)

    def against(self, parameter: nn.Parameter, pattern: NofM) -> str | None:
        """Return why a parameter that may be pruned cannot have a pattern; None if it can."""
        path, _, leaf = self._names[parameter][0].rpartition(".")
        owner, shape = self._modules[path], tuple(parameter.shape)
        columns = leaf == "weight" and by_columns(owner)
        if leaf == "weight" and _transposed(owner) and not columns:
            return GROUPED
        axis = input_axis(shape, columns)
        inputs = 1 if axis is None else shape[axis]
        cells, rest = divmod(inputs, pattern.m)
        return f"{INDIVISIBLE}: {inputs} = {cells} x {pattern.m} + {rest}" if rest else None


def by_columns(module: nn.Module) -> bool:
    """Return whether the output channels of a layer's weight are its second axis."""
    if _transposed(module):
        return getattr(module, "groups", None) == 1
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def input_axis(shape: Sequence[int], columns: bool) -> int | None:
    """Return the axis of a parameter along which its inputs lie; None if it has one axis.

    The second one, in transposed convolutions and `Conv1D` of transformers (`columns`) the first one.
    """
    return None if len(shape) < 2 else 0 if columns else 1


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvTransposeNd) or _class_name(module) in TRANSPOSED


def _class_name(module: nn.Module) -> str:
    """Return the name of a module's class; of a scripted or traced one, that of what it was made from."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return str(module.original_name) if scripted else type(module).__name__


def _is_adapter(name: str) -> bool:
    return any(part.lower().startswith("lora_") for part in name.split("."))


def _derived(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the parameters from which a layer makes its weight in every forward pass, with the reason."""
    prefix = f"{path}." if path else ""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield from ((f"{prefix}{hook.name}_{part}", WEIGHT_NORM) for part in "gv")
        elif isinstance(hook, SpectralNorm):
            yield f"{prefix}{hook.name}_orig", PARAMETRISED
        elif isinstance(hook, BasePruningMethod):
            yield f"{prefix}{hook._tensor_name}_orig", MASKED
    if isinstance(module, ParametrizationList):
        normed = any(isinstance(part, _WeightNorm) for part in module)
        inside = (name for name, _ in module.named_parameters())
        yield from ((f"{prefix}{name}", WEIGHT_NORM if normed else PARAMETRISED) for name in inside)


def _sharing(model: nn.Module) -> set[str]:
    """Return the names of parameters that share memory with another tensor of the network, or within.

    One Parameter with several names is none of them. Overlap is that of extents in a storage: views of
    interleaved columns count as sharing.
    """
    ranges: list[tuple[str, int, int, str]] = []
    shared: set[str] = set()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            continue
        if tensor.numel() == 0 or tensor.is_quantized or str(tensor.layout) != "torch.strided":
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps)
        if extent < tensor.numel():
            shared.add(name)
        first = tensor.data_ptr()
        ranges.append((str(tensor.device), first, first + extent * tensor.element_size(), name))
    ranges.sort()
    for before, after in _overlaps(ranges):
        shared |= {before, after}
    return shared


def _overlaps(ranges: Sequence[tuple[str, int, int, str]]) -> Iterator[tuple[str, str]]:
    """Yield names of overlapping ranges (place, first, last, name), which are in order, two at a time."""
    furthest = ("", 0, 0, "")
    for entry in ranges:
        if entry[0] == furthest[0] and entry[1] < furthest[2]:
            yield furthest[3], entry[3]
        if entry[0] != furthest[0] or entry[2] > furthest[2]:
            furthest = entry


def _quantised(model: nn.Module) -> Iterator[LeftOut]:
    """Yield the weights of quantised layers, which are no parameters."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "quantized" in type(module).__module__ and callable(weight):
            shape = tuple(weight().shape)
            yield LeftOut(name=f"{path}.weight" if path else "weight", shape=shape, reason=QUANTISED)


def _nothing(names: Names, left_out: Sequence[LeftOut]) -> NoEligibleWeightsError:
    """Return the error that says why no parameter may be pruned, and what to do."""
    if not left_out:
        return NoEligibleWeightsError("model", "the network has no parameters", "pass a network with weights")
    groups = by_reason(left_out)
    kinds = [entries[0].kind for entries in groups.values()]
    parts = (f"{reason} ({_listed([e.name for e in entries], 3)})" for reason, entries in groups.items())
    found = f"no parameter is left to prune: {', '.join(parts)}"
    if IGNORED in groups or UNTARGETED in groups:
        return NoEligibleWeightsError("target, ignore", found, f"choose among {_listed(_all(names))}")
    remedies = (REMEDIES[kind] for kind in kinds if kind in IMPOSSIBLE and kind in REMEDIES)
    remedy = next(remedies, f"name what may be pruned in target: {_listed(_all(names))}")
    return NoEligibleWeightsError("model", found, remedy)


def _globs(globs: Globs) -> Sequence[str]:
    return [globs] if isinstance(globs, str) else globs


def _matching(argument: str, names: Names, globs: Globs) -> list[nn.Parameter]:
    """Return the parameters of which any name matches any glob, in network order."""
    if not (isinstance(globs, str | list | tuple) and all(isinstance(glob, str) for glob in globs)):
        raise ArgumentError(argument, f"{globs!r}", "pass a glob on parameter names, or a list of them")
    matched: set[nn.Parameter] = set()
    for pattern in _globs(globs):
        hits = {p for p, known in names.items() if any(fnmatchcase(name, pattern) for name in known)}
        if not hits:
            raise unmatched(argument, pattern, _all(names))
        matched |= hits
    return [parameter for parameter in names if parameter in matched]


def unmatched(
    argument: str, pattern: str, names: Sequence[str], *, what: str = "parameter"
) -> UnmatchedPatternError:
    """Return the error about a glob that matches none of `names`, with what it could have meant."""
    found = f"{pattern!r} matches no {what}"
    if any(name.startswith(f"{pattern}.") for name in names):
        return UnmatchedPatternError(argument, found, f'use "{pattern}.*" for all of that module')
    close = get_close_matches(pattern, names, n=3)
    for name in names:
        # "head.weight" for "model.head.weight", as names begin with those of the modules around.
        if name.endswith(f".{pattern}") and name not in close:
            close.append(name)
    if close:
        return UnmatchedPatternError(argument, found, f"did you mean {' or '.join(close)}?")
    return UnmatchedPatternError(argument, found, f"choose among {_listed(names)}")


def _all(names: Names) -> list[str]:
    return list(chain.from_iterable(names.values()))


def _listed(names: Sequence[str], most: int = LISTED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
