"""A network as the caller has it: whether it can be run, and everything about it as it was."""

from __future__ import annotations

from collections.abc import Iterator
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
    another, or where there was none, goes. Copies of all buffers are held meanwhile.
    """
    buffers = {id(b): (b, b.detach().clone(), b._version) for b in model.buffers() if not b.is_inference()}
    before = [(module, dict(module._buffers), _tensors_in(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, owned, attributes in before:
            module._buffers.clear()
            module._buffers.update(owned)
            for name in _tensors_in(module).keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        with torch.no_grad():
            for buffer, value, version in buffers.values():
                if buffer._version != version:
                    buffer.copy_(value)


def require_usable(model: nn.Module) -> None:
    """Raise `ArgumentError` for a network that cannot be differentiated, whatever its mode.

    That is one with tensors on the "meta" device, or made under `torch.inference_mode`, a call under it, or a
    default device of torch that is another accelerator than that of the network.
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
            continue
        if tensor.is_meta:
            found = f"{name} is on the meta device, without values"
            raise ArgumentError("model", found, "load its weights, and undo offloading, first")
        if tensor.is_inference():
            found = f"{name} was made under torch.inference_mode and cannot be differentiated"
            raise ArgumentError("model", found, "build or load the network outside of it")


def _tensors_in(module: nn.Module) -> dict[str, Any]:
    """Return the tensors that a module has as plain attributes."""
    return {name: value for name, value in module.__dict__.items() if isinstance(value, Tensor)}
