"""Second moments of what the layers of a network are fed: the channel term of its Hessian model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt.curvature.gradients import require_evaluation_mode
from cbs_opt.curvature.rows import Rows
from cbs_opt.hessian.channels import Channel, ChannelTerm
from cbs_opt.network.data import Data, device_of, forward, iterate
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import ParameterSpan, Partition
from cbs_opt.network.state import kept
from cbs_opt.network.trial import TrialNetwork
from cbs_opt.system.checks import whole_number
from formulations.errors import ArgumentError, NonFiniteError, ShapeError

log = logging.getLogger(__name__)

INPUT_SAMPLES = 1_000
"""Samples that second moments are taken over: every one brings as many inputs as there are positions."""
BATCH_SIZE = 50
TERM_WORK = 1e12
"""Multiplications in the factorisations of all channels up to which `prune` takes the term by itself."""
PATCH_NUMBERS = 1 << 20
"""Numbers in the patches of a convolution that are unfolded at once: 8 MiB. More are no faster."""
Layer = nn.Linear | nn.Conv1d | nn.Conv2d
"""The layers whose inputs are looked at."""


def with_layer_inputs(
    rows: Rows,
    model: nn.Module,
    data: Data,
    partition: Partition,
    *,
    weight: float = 1.0,
    samples: int = INPUT_SAMPLES,
    seed: int = 0,
    moments: Mapping[str, Tensor] | None = None,
) -> Rows:
    """Return gradient rows together with the channel term of the same network.

    `rows`: of all weights of the partition. Not copied. `model`, `data`, `partition`, `samples` and `seed`:
    see `input_moments`. `weight`: see `matched_term`. `moments`: what `input_moments` returned; by default it
    is called. The rows that are returned have `channels` set: the model is then ``H = R^T R + channels +
    damping I``.
    """
    if moments is None:
        moments = input_moments(model, data, partition, samples=samples, seed=seed)
    return replace(rows, channels=matched_term(moments, partition, rows.column_squares(), weight=weight))


def matched_term(
    moments: Mapping[str, Tensor], partition: Partition, squares: Tensor, *, weight: float = 1.0
) -> ChannelTerm:
    """Return the term whose mean diagonal in every channel is `weight` times that of the rows.

    `moments`: see `input_moments`. A parameter without moments, or with moments that are zero, gets a
    multiple of the identity; one that they do not fit raises `ShapeError`. `squares`: ``diag(rows^T rows)``
    of all its weights. `weight`: positive.
    """
    if not weight > 0.0:
        raise ArgumentError("weight", f"{weight!r}", "pass a number > 0, or leave the term out")
    channels: list[Channel] = []
    for span in partition.parameters:
        groups = _by_group(span, moments.get(span.name), squares)
        size = groups[0].shape[0]
        members = span.shape[0] // len(groups)
        means = squares[span.start : span.stop].view(-1, size).mean(dim=1).tolist()
        for number, mean in enumerate(means):
            moment = groups[number // members]
            first = span.start + number * size
            scale = weight * mean / float(moment.diagonal().mean())
            channels.append(Channel(start=first, stop=first + size, moment=moment, scale=scale))
    return ChannelTerm(channels=tuple(channels), weight=weight)


def _by_group(span: ParameterSpan, moment: Tensor | None, squares: Tensor) -> list[Tensor]:
    size = math.prod(span.shape[1:])
    identity = torch.eye(size, dtype=torch.float64, device=squares.device)
    moment = identity if moment is None else moment
    blocks = list(moment.double().reshape(-1, *moment.shape[-2:]))
    if moment.shape[-2:] != (size, size) or span.shape[0] % len(blocks):
        shape = f"shape {tuple(moment.shape)} for {span.name} of shape {span.shape}"
        raise ShapeError("moments", shape, "compute them for this network")
    return [group if bool(group.diagonal().any()) else identity for group in blocks]


def term_work(partition: Partition) -> float:
    """Multiplications of one factorisation of every channel, up to a constant: ``sum out * fan_in^3``."""
    shapes = (span.shape for span in partition.parameters if span.shape)
    return sum(shape[0] * float(math.prod(shape[1:])) ** 3 for shape in shapes)


def default_layer_inputs(partition: Partition) -> float:
    """Return the weight of the term where none is asked for: 1, or 0 where layers are too wide."""
    work = term_work(partition)
    if work <= TERM_WORK:
        return 1.0
    log.info("layer-input term left out: %.1e multiplications a factorisation; layer_inputs=1 insists", work)
    return 0.0


def input_moments(
    model: nn.Module,
    data: Data,
    partition: Partition,
    *,
    samples: int = INPUT_SAMPLES,
    seed: int = 0,
    weights: Tensor | None = None,
    objective: Objective | None = None,
) -> dict[str, Tensor]:
    """``E[sum over positions of x x^T]`` of the inputs of every layer whose weights are pruned.

    Raises `NonFiniteError` if a layer is fed NaN or infinity; other errors as from `gradient_rows`.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; not changed.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        Labels are not looked at.
    partition : Partition
    samples : int, default 1000
    seed : int, default 0
        Draws the samples of a pair of tensors.
    weights : (n,) Tensor, optional
        Run the network at these weights instead of its own.
    objective : Objective, optional
        Its loss, which knows how samples are converted for it.

    Returns
    -------
    dict of str to (f, f) Tensor, or (groups, f, f) for a convolution with groups
        Float64, by parameter name; f is the fan-in, in the order of one output channel's weights. The
        uses of tied weights are added up. Parameters are left out that belong to no `nn.Linear`,
        `nn.Conv1d` or `nn.Conv2d`, and those of layers that the network does not call.

    Notes
    -----
    One forward pass a sample and O(positions f^2) for every layer; temporaries of some 16 MiB, or
    twice the patches of one sample.
    """
    whole_number("samples", samples)
    require_evaluation_mode(model)
    totals: dict[str, Tensor] = {}
    network = model if weights is None else TrialNetwork(model, partition, weights)
    batches = iterate(
        data, batch_size=BATCH_SIZE, max_samples=samples, seed=seed, device=device_of(model), argument="data"
    )
    seen = 0
    objective = Objective() if objective is None else objective
    with kept(model), _recording(_layers(model, partition), totals), torch.no_grad():
        for batch in batches:
            objective.output(partial(forward, network), objective.prepared(batch))
            seen += batch.size
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            found = f"the inputs of {name} are NaN or infinite"
            raise NonFiniteError("model, data", found, "check the data and the weights")
    # Products are symmetric only to rounding.
    return {name: (total + total.mT) / (2 * seen) for name, total in totals.items()}


def _layers(model: nn.Module, partition: Partition) -> dict[Layer, str]:
    """Return the layers that use a parameter of `partition`, with its name there."""
    names = {alias: span.name for span in partition.parameters for alias in (span.name, *span.aliases)}
    paths = ((module, f"{path}.weight" if path else "weight") for path, module in model.named_modules())
    return {layer: names[path] for layer, path in paths if isinstance(layer, Layer) and path in names}


@contextmanager
def _recording(layers: Mapping[Layer, str], totals: dict[str, Tensor]) -> Iterator[None]:
    """Add up the second moments of what `layers` are fed while the body runs."""

    def record(layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        # Under autocast the sums of products would be rounded to half precision, which is too coarse.
        with torch.autocast(x.device.type, enabled=False):
            moment = _moment(layer, x.detach())
        name = layers[layer]
        totals[name] = totals[name] + moment if name in totals else moment

    with ExitStack() as handles:
        for layer in layers:
            # A handle is a context manager that removes its hook.
            handles.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
        yield


def _moment(layer: Layer, x: Tensor) -> Tensor:
    """``sum of x x^T`` over samples and positions, (f, f) or (groups, f, f) float64."""
    # Sums of single-precision products are not positive semidefinite to the accuracy that solvers ask for.
    x = x.double()
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        return flat.T @ flat
    fan_in = layer.weight[0].numel()
    batched = x if x.ndim == len(layer.kernel_size) + 2 else x.unsqueeze(0)
    total = torch.zeros(layer.groups, fan_in, fan_in, dtype=torch.float64, device=x.device)
    patch_numbers = layer.groups * fan_in * batched[0, 0].numel()
    for part in torch.split(batched, max(1, PATCH_NUMBERS // patch_numbers)):
        patches = _patches(layer, part)
        total += patches @ patches.transpose(1, 2)
    return total[0] if layer.groups == 1 else total


def _patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Patches of batched inputs as columns, (groups, f, positions of all samples)."""
    # What torch itself pads by, last dimension first, whether "same", zeros or another mode was asked for.
    padding = layer._reversed_padding_repeated_twice
    x = F.pad(x, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    sizes: list[tuple[int, ...]] = [layer.kernel_size, layer.dilation, layer.stride]
    if isinstance(layer, nn.Conv1d):
        x, sizes = x.unsqueeze(-2), [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    patches = F.unfold(x, kernel, dilation, 0, stride)
    grouped = patches.view(len(x), layer.groups, -1, patches.shape[-1])
    return grouped.permute(1, 2, 0, 3).flatten(2)
