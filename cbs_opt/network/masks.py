"""Kept masks: files, zeros in place, and zeros that stay in training. True means kept throughout."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from cbs_opt.errors import MaskFileError, MaskMismatchError
from cbs_opt.network.eligible import unwrapped
from formulations.errors import ArgumentError
from formulations.files import CHECKSUM, checksum, write_atomically

FORMAT = "cbs-opt masks"
VERSION = 2
RESERVED = ("format", "version", "sense", "sparsity", CHECKSUM)
SENSE = "true = kept"
STEPS = "step"
"""The entry of an optimizer's state that counts steps, and is never masked."""

Stepping = TypeVar("Stepping", bound=Optimizer)

Masks = Mapping[str, Tensor]
"""Boolean tensors in the shapes of the parameters, by parameter name; True where a weight is kept."""


def save_masks(
    path: str | os.PathLike[str], masks: Masks, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write kept masks to a safetensors file.

    The file is written beside its destination and moved there in one step: a crash leaves either
    the old file or the new one.

    Parameters
    ----------
    path : path-like
        Where to write; an existing file is replaced.
    masks : mapping of str to Tensor
        Boolean, True = kept, by parameter name.
    metadata : mapping of str to str, optional
        Stored beside ``format``, ``version``, ``sense``, ``sparsity`` (share of False over all
        masks) and ``checksum`` (SHA-256 of all the rest), which are ours.

    Raises
    ------
    ArgumentError
        If a mask is not boolean, there is none, or `metadata` is not strings or uses our keys.
    OSError
        If the file cannot be written.
    """
    entries = dict(metadata or {})
    for key, value in entries.items():
        if key in RESERVED or not isinstance(key, str) or not isinstance(value, str):
            remedy = f"map strings to strings, without {', '.join(RESERVED)}"
            raise ArgumentError("metadata", f"{key!r}: {value!r}", remedy)
    # Copies: masks split from one flat vector share memory, which the format refuses.
    tensors = {
        name: keep.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, keep in _boolean(masks).items()
    }
    size = sum(keep.numel() for keep in tensors.values())
    pruned = size - sum(int(keep.sum()) for keep in tensors.values())
    entries |= {"format": FORMAT, "version": str(VERSION), "sense": SENSE}
    entries["sparsity"] = repr(pruned / max(size, 1))
    entries[CHECKSUM] = _checksum(entries, tensors)
    write_atomically(path, save(tensors, metadata=entries))


def load_masks(path: str | os.PathLike[str], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the kept masks in a file of `save_masks`, boolean, True = kept, on the CPU, by parameter name.

    Parameters
    ----------
    path : path-like
    model : nn.Module, optional
        A network the masks must fit.

    Raises
    ------
    MaskFileError
        If the file cannot be read, is damaged, or is not a mask file.
    MaskMismatchError
        If names or shapes do not fit `model`.
    """
    masks = _read(Path(path))[0]
    if model is not None:
        _fitting(_named(model), masks)
    return masks


def load_mask_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the strings stored with masks, ours (``sparsity`` among them) and the caller's."""
    return _read(Path(path))[1]


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set pruned weights to exactly 0 in place, as after a step of fine-tuning.

    All masks, as `load_masks` returns them or on any device, are checked before anything is written.
    Parameters keep their identity, kept weights their bits.

    Raises
    ------
    ArgumentError
        If a mask is not boolean.
    MaskMismatchError
        If names or shapes do not fit `model`; nothing is written.
    """
    pairs = _fitting(_named(model), _boolean(masks))
    with torch.no_grad():
        for parameter, keep in pairs:
            parameter.masked_fill_(~keep.to(parameter.device), 0.0)


def masked(optimizer: Stepping, masks: Masks, model: nn.Module | None = None) -> Stepping:
    """Make an optimizer leave pruned weights at exactly zero, now and after each of its steps.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Of any kind, on any device. Parameters of groups that are added later are masked as well.
    masks : mapping of str to Tensor
        Boolean, True = kept, by parameter name, as `PruneReport.masks` or what `load_masks` returns.
    model : nn.Module, optional
        The network that the names are those of. An optimizer of ``model.named_parameters()`` that has all
        that the masks belong to knows them by itself; several that share a network need it.

    Returns
    -------
    torch.optim.Optimizer
        `optimizer` itself. A second call replaces the masks of the first.

    Raises
    ------
    ArgumentError
        If a mask is not boolean, names of parameters are not known, or the optimizer has none of those
        that are pruned. Nothing is written.
    MaskMismatchError
        If names or shapes do not fit; nothing is written.

    Notes
    -----
    Entries of the optimizer's state in the shape of the weights, such as momentum, are set to zero with
    them, so that weight decay and momentum do not build up behind a mask. A step costs O(weights) more. A
    copy of the optimizer, or one that is loaded from a file, has to be masked anew.
    """
    stepper: Any = optimizer
    while isinstance(getattr(stepper, "optimizer", None), Optimizer):  # accelerate wraps them
        stepper = stepper.optimizer
    if not isinstance(stepper, Optimizer):
        raise ArgumentError("optimizer", f"a {type(optimizer).__name__}", "pass an optimizer of torch.optim")
    names = _named(model) if model is not None else _names_of(stepper)
    remedy = "use the masks of this network"
    if model is None:
        remedy += "; pass it as model if the optimizer has a part of it"
    zeros = _Zeros(_fitting(names, _boolean(masks), remedy))
    if not any(True for _ in zeros.pairs(stepper)):
        found = f"has none of the {len(masks)} parameters that the masks belong to"
        raise ArgumentError("optimizer", found, "make it of the parameters of the network that was pruned")
    hooks = stepper._optimizer_step_post_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Zeros)]:
        del hooks[key]
    zeros(stepper)
    stepper.register_step_post_hook(zeros)
    return optimizer


class _Zeros:
    """What an optimizer calls after a step: pruned weights, and their part of its state, become zero."""

    def __init__(self, pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        # The parameters are held as well, so that no other can have the identity of one.
        self._pruned: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for parameter, keep in pairs:
            pruned = ~keep.to(parameter.device)
            if id(parameter) in self._pruned:  # tied weights, under both names
                pruned = pruned | self._pruned[id(parameter)][1]
            self._pruned[id(parameter)] = parameter, pruned

    def __call__(self, optimizer: Optimizer, *_: object) -> None:
        with torch.no_grad():
            for parameter, pruned in self.pairs(optimizer):
                state = optimizer.state.get(parameter, {})
                for value in (parameter, *(value for name, value in state.items() if name != STEPS)):
                    if isinstance(value, Tensor) and value.shape == pruned.shape:
                        value.masked_fill_(pruned.to(value.device), 0)

    def pairs(self, optimizer: Optimizer) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """Yield the parameters of an optimizer that have masks, with True where a weight is pruned."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._pruned:
                    yield self._pruned[id(parameter)]


def _boolean(masks: Masks) -> Masks:
    if not isinstance(masks, Mapping):
        raise ArgumentError("masks", f"a {type(masks).__name__}", "map names of parameters to masks")
    if not masks:
        raise ArgumentError("masks", "none", "pass at least one mask")
    for name, keep in masks.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise ArgumentError("masks", f"the name {name!r}", "use the names of parameters")
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            found = f"{keep.dtype}" if isinstance(keep, Tensor) else type(keep).__name__
            remedy = "pass a boolean tensor, True where a weight is kept"
            raise ArgumentError(f"masks[{name!r}]", found, remedy)
    return masks


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(unwrapped(model).named_parameters(remove_duplicate=False))


def _names_of(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by the names that it was given."""
    named: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        if "param_names" not in group:
            found = "not given, and the optimizer knows no names of its parameters"
            remedy = "pass the network, or make the optimizer of model.named_parameters()"
            raise ArgumentError("model", found, remedy)
        named |= zip(group["param_names"], group["params"], strict=True)
    return named


def _fitting(
    parameters: Mapping[str, nn.Parameter], masks: Masks, remedy: str = "use the masks of this network"
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each mask with its parameter; every misfit is listed in one `MaskMismatchError`."""
    misfits: list[str] = []
    for name, keep in masks.items():
        if name not in parameters:
            misfits.append(f"no parameter {name}")
        elif parameters[name].shape != keep.shape:
            misfits.append(f"{name} is {tuple(parameters[name].shape)}, its mask {tuple(keep.shape)}")
    if misfits:
        shown = "; ".join(misfits[:10]) + ("; ..." if len(misfits) > 10 else "")
        found = f"{len(misfits)} of {len(masks)} do not fit: {shown}"
        raise MaskMismatchError("masks", found, remedy)
    return [(parameters[name], keep) for name, keep in masks.items()]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    remedy = "pass a file written by save_masks"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise MaskFileError("path", f"{path} cannot be read ({error})", remedy) from error
    if metadata.get("format") != FORMAT:
        raise MaskFileError("path", f"{path} is a safetensors file, but holds no masks of ours", remedy)
    version = metadata.get("version", "")
    if version not in map(str, range(1, VERSION + 1)) or metadata.get("sense") != SENSE:
        found = f"{path} has version {version}, sense {metadata.get('sense')!r}"
        raise MaskFileError("path", found, f"read versions up to {VERSION}, or upgrade cbs-opt")
    for name, keep in masks.items():
        if keep.dtype != torch.bool:
            raise MaskFileError("path", f"{path}: {name} is {keep.dtype}, not boolean", remedy)
        if bool((keep.view(torch.uint8) > 1).any()):
            raise MaskFileError("path", f"{path}: {name} holds truth values other than 0 and 1", remedy)
    expected = metadata.pop(CHECKSUM, None)
    if expected != _checksum(metadata, masks):
        why = "has no checksum" if expected is None else "does not match its checksum"
        raise MaskFileError("path", f"{path} {why}", "write the file again")
    return masks, metadata


def _checksum(metadata: Mapping[str, str], masks: Masks) -> str:
    return checksum(metadata, {name: keep.numpy() for name, keep in masks.items()})
