"""Networks that are wrapped, in other number formats, offloaded, or run code of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.any_network.case import SAMPLES, Case, Trial, classes, perceptron


class Around(nn.Module):
    """Two linear layers with `function` of the module and the hidden units between them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = perceptron()
        self.function = function
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        logits: Tensor = self.layers[2](self.function(self, self.layers[0](x)))
        return logits


class Clipped(torch.autograd.Function):
    """A ramp with a gradient of its own, in the old form with one `ctx`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return max(x, 0)."""
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient, a tenth of it where x is negative."""
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, gradients[0], 0.1 * gradients[0])


def _data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 8).to(dtype), classes()


def _around(function: Callable[[Any, Tensor], Tensor]) -> Callable[[], Trial]:
    return lambda: Trial(model=Around(function).eval(), data=_data())


def _counted(module: Any, hidden: Tensor) -> Tensor:
    module.calls += 1
    return torch.relu(hidden)


def _running_mean(module: Any, hidden: Tensor) -> Tensor:
    module.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(dim=0))
    return torch.relu(hidden)


def _branch(module: Any, hidden: Tensor) -> Tensor:
    return torch.relu(hidden) if hidden.sum() > 0 else torch.tanh(hidden)


def _scaled_by_item(module: Any, hidden: Tensor) -> Tensor:
    return torch.relu(hidden) * (1.0 + 0.0 * hidden.detach().max().item())


def _in(dtype: torch.dtype) -> Callable[[], Trial]:
    return lambda: Trial(model=perceptron().to(dtype), data=_data(dtype))


def _compiled() -> Trial:
    return Trial(model=torch.compile(perceptron(), backend="eager"), data=_data())  # type: ignore[arg-type]


def _training_dropout() -> Trial:
    model = nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, 3))
    return Trial(model=model.train(), data=_data())


def _training_batchnorm() -> Trial:
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    return Trial(model=model.train(), data=_data())


def _randomised_relu() -> Trial:
    model = nn.Sequential(nn.Linear(8, 12), nn.RReLU(), nn.Linear(12, 3))
    return Trial(model=model.train(), data=_data())


def _offloaded_by_accelerate() -> Trial:
    from accelerate import cpu_offload

    model = perceptron()
    cpu_offload(model[0], execution_device=torch.device("cpu"))
    return Trial(model=model, data=_data())


def _offloaded_by_hooks() -> Trial:
    model = perceptron()
    layer = model[0]
    stored = layer.weight.data.to(torch.float64)

    def load(module: nn.Module, args: Any) -> None:
        layer.weight.data = stored.float()

    def unload(module: nn.Module, args: Any, output: Any) -> None:
        layer.weight.data = torch.empty(0)

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(unload)
    layer.weight.data = torch.empty(0)
    return Trial(model=model, data=_data())


def _on_meta() -> Trial:
    return Trial(model=perceptron().to("meta"), data=_data())


def _partly_on_meta() -> Trial:
    model = perceptron()
    model[2].to("meta")
    return Trial(model=model, data=_data())


def _in_inference_mode() -> Trial:
    with torch.inference_mode():
        return Trial(model=perceptron(), data=_data())


def _damaged() -> Trial:
    model = perceptron()
    model[0].weight.data[3, 1] = torch.nan
    return Trial(model=model, data=_data())


def _lazy() -> Trial:
    return Trial(model=nn.Sequential(nn.LazyLinear(12), nn.ReLU(), nn.LazyLinear(3)), data=_data())


def _jitted(*, scripted: bool) -> Trial:
    model = perceptron()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jitted = torch.jit.script(model) if scripted else torch.jit.trace(model, torch.randn(2, 8))
    return Trial(model=jitted, data=_data())


CASES = (
    Case(network="torch.compile", batch="tensors", build=_compiled),
    Case(
        network="DataParallel",
        batch="tensors",
        build=lambda: Trial(model=nn.DataParallel(perceptron()), data=_data()),
    ),
    Case(network="float16", batch="tensors", build=_in(torch.float16)),
    Case(network="bfloat16", batch="tensors", build=_in(torch.bfloat16)),
    Case(network="float64", batch="tensors", build=_in(torch.float64)),
    Case(
        network="a part offloaded by accelerate",
        batch="tensors",
        build=_offloaded_by_accelerate,
        refused="meta device",
        needs=("accelerate",),
    ),
    Case(
        network="a part offloaded by own hooks", batch="tensors", build=_offloaded_by_hooks, refused="empty"
    ),
    Case(network="on the meta device", batch="tensors", build=_on_meta, refused="meta"),
    Case(network="partly on the meta device", batch="tensors", build=_partly_on_meta, refused="meta"),
    Case(
        network="made in inference mode", batch="tensors", build=_in_inference_mode, refused="inference_mode"
    ),
    Case(network="NaN in a weight", batch="tensors", build=_damaged, refused="0.weight are NaN"),
    Case(network="lazy layers, never run", batch="tensors", build=_lazy, refused="one forward pass"),
    Case(network="traced by torch.jit", batch="tensors", build=lambda: _jitted(scripted=False)),
    Case(network="scripted by torch.jit", batch="tensors", build=lambda: _jitted(scripted=True)),
    Case(
        network="activation checkpointing",
        batch="tensors",
        build=_around(lambda module, hidden: checkpoint(torch.relu, hidden, use_reentrant=False)),  # type: ignore[no-any-return]
    ),
    Case(
        network="custom autograd.Function",
        batch="tensors",
        build=_around(lambda module, hidden: Clipped.apply(hidden)),  # type: ignore[no-any-return,no-untyped-call]
    ),
    Case(network="control flow that looks at the data", batch="tensors", build=_around(_branch)),
    Case(network="`.item()` in the forward pass", batch="tensors", build=_around(_scaled_by_item)),
    Case(network="counter in a buffer", batch="tensors", build=_around(_counted)),
    Case(network="running mean in a buffer", batch="tensors", build=_around(_running_mean)),
    Case(
        network="functional dropout, always on",
        batch="tensors",
        build=_around(lambda module, hidden: torch.dropout(hidden, 0.5, train=True)),
        refused="again",
    ),
    Case(network="RReLU in training mode", batch="tensors", build=_randomised_relu, refused="eval()"),
    Case(network="dropout in training mode", batch="tensors", build=_training_dropout, refused="eval()"),
    Case(
        network="batch normalisation in training mode",
        batch="tensors",
        build=_training_batchnorm,
        refused="eval()",
    ),
)
