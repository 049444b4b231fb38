"""Kept masks: files, and zeros in place. True means kept throughout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cbs_opt.errors import MaskFileError, MaskMismatchError
from cbs_opt.network.eligible import unwrapped
from formulations.errors import ArgumentError
from formulations.files import CHECKSUM, checksum, write_atomically

FORMAT = "cbs-opt masks"
VERSION = 2
RESERVED = ("format", "version", "sense", "sparsity", CHECKSUM)
SENSE = "true = kept"

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
        _fitting(model, masks)
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
    pairs = _fitting(model, _boolean(masks))
    with torch.no_grad():
        for parameter, keep in pairs:
            parameter.masked_fill_(~keep.to(parameter.device), 0.0)


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


def _fitting(model: nn.Module, masks: Masks) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each mask with its parameter; every misfit is listed in one `MaskMismatchError`."""
    parameters = dict(unwrapped(model).named_parameters(remove_duplicate=False))
    misfits: list[str] = []
    for name, keep in masks.items():
        if name not in parameters:
            misfits.append(f"no parameter {name}")
        elif parameters[name].shape != keep.shape:
            misfits.append(f"{name} is {tuple(parameters[name].shape)}, its mask {tuple(keep.shape)}")
    if misfits:
        shown = "; ".join(misfits[:10]) + ("; ..." if len(misfits) > 10 else "")
        found = f"{len(misfits)} of {len(masks)} do not fit: {shown}"
        raise MaskMismatchError("masks", found, "use the masks of this network")
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
