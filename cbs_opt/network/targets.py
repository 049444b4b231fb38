"""Which parameters of a network may be pruned: globs on their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import chain

from torch import nn

from cbs_opt.errors import NoEligibleWeightsError, UnmatchedPatternError
from formulations.errors import ArgumentError

Globs = str | Sequence[str]
DEFAULT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def names_by_parameter(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter object with all its names, in `named_parameters` order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def eligible_parameters(
    model: nn.Module, names: dict[nn.Parameter, list[str]], target: Globs | None, ignore: Globs
) -> list[nn.Parameter]:
    """Return the trainable parameters that `target` names and `ignore` does not, in network order.

    Parameters
    ----------
    model : nn.Module
    names : dict
        See `names_by_parameter`.
    target : str, sequence of str or None
        Globs; None takes the weights of linear and convolution layers.
    ignore : str or sequence of str

    Raises
    ------
    NoEligibleWeightsError
        If nothing is left to prune.
    UnmatchedPatternError
        If a glob matches no parameter name.
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
    """Parameters of which any name matches any glob, in network order."""
    if not (isinstance(globs, str | list | tuple) and all(isinstance(glob, str) for glob in globs)):
        raise ArgumentError(argument, f"{globs!r}", "pass a glob on parameter names, or a list of them")
    matched: set[nn.Parameter] = set()
    for pattern in [globs] if isinstance(globs, str) else globs:
        hits = {p for p, known in names.items() if any(fnmatchcase(name, pattern) for name in known)}
        if not hits:
            remedy = f"choose among {_listed(names)}"
            raise UnmatchedPatternError(argument, f"{pattern!r} matches no parameter", remedy)
        matched |= hits
    return [parameter for parameter in names if parameter in matched]


def _listed(names: dict[nn.Parameter, list[str]]) -> str:
    return ", ".join(chain.from_iterable(names.values()))
