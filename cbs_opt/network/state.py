"""A network as the caller has it: whether it can be run, and everything about it as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from formulations.errors import ArgumentError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode and give each its own mode back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Give every module its buffers and plain tensors back at the end, whatever a forward pass did to them.

    Running statistics and counters get their old values, in place; a tensor that was put in the place of
    another, or where there was none, goes, in lists and dictionaries too. Copies of all buffers are held.
    Whether gradients are recorded is as before as well: a signal may come while `torch.no_grad` ends.
    """
    grad = torch.is_grad_enabled()
    buffers = [(b, b.detach().clone(), b._version) for b in model.buffers()]
    modules = (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))
    before = [(module, dict(module._buffers), _attributes(module)) for module in modules]
    try:
        yield
    finally:
        try:
            for module, owned, attributes in before:
                _restore_module(module, owned, attributes)
            with torch.no_grad():
                for buffer, value, version in buffers:
                    if buffer._version != version:
                        buffer.copy_(value)
        finally:
            torch.set_grad_enabled(grad)


def _restore_module(module: nn.Module, owned: dict[str, Any], attributes: dict[str, tuple[Any, Any]]) -> None:
    """Give a module its buffers and plain tensors back, in lists and dictionaries too."""
    _restore(module._buffers, owned)
    for name, value in list(module.__dict__.items()):
        old, copy = attributes.get(name, (None, None))
        if isinstance(value, Tensor) and value is not old:
            module.__dict__[name] = old
        elif isinstance(value, list) and value is old and _holds_new(value, copy):
            value[:] = copy
        elif isinstance(value, dict) and value is old and _holds_new(value.values(), copy.values()):
            _restore(value, copy)
        if name not in attributes and isinstance(value, Tensor):
            del module.__dict__[name]


def require_usable(model: nn.Module) -> None:
    """Raise `ArgumentError` for a network that cannot be differentiated, whatever its mode.

    That is one with tensors that are lazy, on the "meta" device, or made under `torch.inference_mode`, a call
    under it, or a default device of torch that is another accelerator than that of the network.
    """
    if torch.is_inference_mode_enabled():
        found = "called under torch.inference_mode, where nothing can be differentiated"
        raise ArgumentError("model", found, "call it outside of it; torch.no_grad is harmless")
    default, devices = torch.get_default_device(), {p.device.type for p in model.parameters()}
    if default.type != "cpu" and devices and default.type not in devices:
        found = f"a network on {', '.join(sorted(devices))}, but torch.set_default_device says {default}"
        raise ArgumentError(
            "model", found, "move the network there, or set the default device back to the CPU"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ArgumentError("model", f"{name} is lazy, without a shape", "run one forward pass first")
        if tensor.is_meta:
            found = f"{name} is on the meta device, without values"
            raise ArgumentError("model", found, "load its weights, and undo offloading, first")
        if tensor.is_inference():
            found = f"{name} was made under torch.inference_mode and cannot be differentiated"
            raise ArgumentError("model", found, "build or load the network outside of it")


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return the plain attributes of a module, with shallow copies of lists and dictionaries."""
    return {
        name: (value, value.copy() if type(value) in (list, dict) else value)
        for name, value in module.__dict__.items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


def _holds_new(entries: Iterable[Any], before: Iterable[Any]) -> bool:
    """Return whether there is a tensor among `entries` that was not there `before`."""
    known = {id(entry) for entry in before}
    return any(isinstance(entry, Tensor) and id(entry) not in known for entry in entries)


def _restore(entries: dict[str, Any], before: dict[str, Any]) -> None:
    entries.clear()
    entries.update(before)
