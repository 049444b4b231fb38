"""Second moments of what the layers of a network are fed: the channel term of its Hessian model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt.batches import Data, device_of, forward, iterate
from cbs_opt.blocks import Partition
from cbs_opt.curvature import GradientRows
from cbs_opt.gradients import require_evaluation_mode
from cbs_opt.heuristics.channel_term import ChannelTerm
from cbs_opt.write_back import TrialNetwork
from formulations.errors import NonFiniteError, UnsupportedProblemError

INPUT_SAMPLES = 1_000
"""Samples that second moments are taken over: every one brings as many inputs as there are positions."""
BATCH_SIZE = 50


def with_layer_inputs(
    rows: GradientRows,
    model: nn.Module,
    data: Data,
    partition: Partition,
    *,
    weight: float = 1.0,
    samples: int = INPUT_SAMPLES,
    seed: int = 0,
    weights: Tensor | None = None,
) -> GradientRows:
    """Gradient rows together with the channel term of the same network.

    Parameters
    ----------
    rows : GradientRows
        Of all weights of the partition. Not copied.
    model, data, partition, samples, seed, weights
        See `input_moments`.
    weight : float, default 1
        Mean diagonal of the term in units of that of the rows, channel by channel.

    Returns
    -------
    GradientRows
        With `channels` set: the model is then ``H = R^T R + channels + damping I``.
    """
    moments = input_moments(model, data, partition, samples=samples, seed=seed, weights=weights)
    return replace(rows, channels=ChannelTerm.matched(moments, partition, rows.rows, weight=weight))


def input_moments(
    model: nn.Module,
    data: Data,
    partition: Partition,
    *,
    samples: int = INPUT_SAMPLES,
    seed: int = 0,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """``E[sum over positions of x x^T]`` of the inputs of every layer whose weights are pruned.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; not changed.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        Labels are not looked at.
    partition : Partition
        Its parameters must be weights of `nn.Linear`, or of `nn.Conv2d` without groups.
    samples : int, default 1000
    seed : int, default 0
        Draws the samples of a pair of tensors.
    weights : (n,) Tensor, optional
        Run the network at these weights instead of its own.

    Returns
    -------
    dict of str to (f, f) Tensor
        Float64, by parameter name; f is the fan-in, in the order of one output channel's weights.

    Raises
    ------
    UnsupportedProblemError
        If a parameter belongs to another kind of layer.
    NonFiniteError
        If a layer is fed NaN or infinity.

    Notes
    -----
    One forward pass a sample and O(positions f^2) for every layer.
    """
    require_evaluation_mode(model)
    modules = dict(model.named_modules())
    layers = {span.name: _layer(span.name, modules) for span in partition.parameters}
    totals: dict[str, Tensor] = {}
    network = model if weights is None else TrialNetwork(model, partition, weights)
    batches = iterate(
        data, batch_size=BATCH_SIZE, max_samples=samples, seed=seed, device=device_of(model), argument="data"
    )
    seen = 0
    with _recording(layers, totals), torch.no_grad():
        for batch in batches:
            forward(network, batch.inputs)
            seen += batch.size
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            found = f"the inputs of {name} are NaN or infinite"
            raise NonFiniteError("model, data", found, "check the data and the weights")
    return {name: total / seen for name, total in totals.items()}


def _layer(name: str, modules: dict[str, nn.Module]) -> nn.Linear | nn.Conv2d:
    owner, _, attribute = name.rpartition(".")
    layer = modules[owner]
    plain = isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
    if attribute != "weight" or not plain:
        found = f"{name} of {type(layer).__name__}"
        remedy = "leave the layer-input term out, or ignore what is no nn.Linear or plain nn.Conv2d"
        raise UnsupportedProblemError("layer_inputs", found, remedy)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer


@contextmanager
def _recording(layers: dict[str, nn.Linear | nn.Conv2d], totals: dict[str, Tensor]) -> Iterator[None]:
    """Add up the second moments of what `layers` are fed while the body runs."""

    def recorder(name: str) -> Any:
        def record(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = _columns(layer, args[0])
            moment = (x @ x.T).double()
            totals[name] = totals[name] + moment if name in totals else moment

        return record

    handles = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _columns(layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a layer as columns, (f, positions of all samples)."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(0, 1).flatten(1)
    return x.reshape(-1, x.shape[-1]).T
