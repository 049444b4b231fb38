"""Second moments of what the layers of a network are fed: the channel term of its Hessian model."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from cbs_opt.curvature.gradients import require_evaluation_mode
from cbs_opt.curvature.input_recorder import InputRecorder
from cbs_opt.curvature.rows import Rows
from cbs_opt.hessian.channels import Channel, ChannelTerm
from cbs_opt.network.data import Data, device_of, forward, iterate, sample_count
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import ParameterSpan, Partition
from cbs_opt.network.state import kept
from cbs_opt.network.trial import TrialNetwork, plain_attention
from cbs_opt.system.checks import seed_number, whole_number
from cbs_opt.system.progress import SILENT, Advance, Progress
from formulations.errors import ArgumentError, NonFiniteError, ShapeError

INPUT_SAMPLES = 1_000
"""Samples that second moments are taken over: every one brings as many inputs as there are positions."""
BATCH_SIZE = 50
TERM_WORK = 1e12
"""Multiplications in the factorisations of all channels up to which `prune` takes the term by itself."""


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

    `moments`: see `input_moments`. A parameter without moments, which the term lists as `unseen`, or with
    moments that are zero, gets a multiple of the identity; one that they do not fit raises `ShapeError`.
    `squares`: ``diag(rows^T rows)`` of all its weights. `weight`: positive.
    """
    if not weight > 0.0:
        raise ArgumentError("weight", f"{weight!r}", "pass a number > 0, or leave the term out")
    channels: list[Channel] = []
    for span in partition.parameters:
        groups = _by_group(span, moments.get(span.name), squares)
        size = groups[0].shape[0]
        members = span.channels // len(groups)
        means = squares[span.start : span.stop].view(-1, size).mean(dim=1).tolist()
        for number, mean in enumerate(means):
            moment = groups[number // members]
            first = span.start + number * size
            scale = weight * mean / float(moment.diagonal().mean())
            channels.append(Channel(start=first, stop=first + size, moment=moment, scale=scale))
    unseen = tuple(span.name for span in partition.parameters if span.name not in moments)
    return ChannelTerm(channels=tuple(channels), weight=weight, unseen=unseen)


def _by_group(span: ParameterSpan, moment: Tensor | None, squares: Tensor) -> list[Tensor]:
    size = span.fan_in
    identity = torch.eye(size, dtype=torch.float64, device=squares.device)
    moment = identity if moment is None else moment
    blocks = list(moment.double().reshape(-1, *moment.shape[-2:]))
    if moment.shape[-2:] != (size, size) or span.channels % len(blocks):
        shape = f"shape {tuple(moment.shape)} for {span.name} of shape {span.shape}"
        raise ShapeError("moments", shape, "compute them for this network")
    return [group if bool(group.diagonal().any()) else identity for group in blocks]


def term_work(partition: Partition) -> float:
    """Multiplications of one factorisation of every channel, up to a constant: ``sum out * fan_in^3``."""
    return sum(span.channels * float(span.fan_in) ** 3 for span in partition.parameters)


def default_layer_inputs(partition: Partition) -> tuple[float, str]:
    """Return the weight of the term where none is asked for, 1, or 0 where layers are too wide; and why."""
    work = term_work(partition)
    if work <= TERM_WORK:
        return 1.0, ""
    why = f"no layer-input term: layers are wide, {work:.1e} multiplications a factorisation"
    return 0.0, f"{why} (Recipe(layer_inputs=1) takes it all the same)"


def input_moments(
    model: nn.Module,
    data: Data,
    partition: Partition,
    *,
    samples: int = INPUT_SAMPLES,
    seed: int = 0,
    weights: Tensor | None = None,
    objective: Objective | None = None,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """``E[sum over positions of x x^T]`` of the inputs of every layer whose weights are pruned.

    Raises `NonFiniteError` if a layer is fed NaN or infinity; other errors as from `gradient_rows`.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; not changed, buffers included.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        As of `gradient_rows`. Labels are not looked at.
    partition : Partition
    samples : int, default 1000
    seed : int, default 0
        Draws the samples of a pair of tensors, and positions of layers that have many.
    weights : (n,) Tensor, optional
        Run the network at these weights instead of its own.
    objective : Objective, optional
        Its loss, which knows how samples are converted for it.
    progress : Progress, optional
        Is told of the samples.

    Returns
    -------
    dict of str to (f, f) Tensor, or (groups, f, f) where groups of output channels are fed differently
        Float64, by parameter name; f is the fan-in, in the order of one output channel's weights. All uses
        of a weight are added up. Parameters are left out in which no output that was seen is linear with
        these weights: those of recurrent layers and embeddings, and what the network does not use.

    Notes
    -----
    One forward pass a sample and O(min(positions, 48 f) f^2) for every layer, positions of all samples
    together: where there are more, some of every sample are drawn, and the moment is an unbiased estimate by
    float32 products and float64 sums (see `input_recorder.VECTORS`). Where there are not, as in linear layers
    of single vectors, all count, in float64. Temporaries of some 16 MiB, or twice the patches of one sample.
    Where a batch has an ``attention_mask`` (B, T), padded positions do not count. The products themselves are
    watched, not the layers: whatever code multiplies a weight is seen, such as the projections inside of
    `nn.MultiheadAttention`.
    """
    whole_number("samples", samples)
    seed_number("seed", seed)
    network, tensors = _placed(model, partition, weights)
    recorder = InputRecorder(partition, tensors, seed)
    objective = Objective() if objective is None else objective
    counting = progress.phase("layer inputs", samples, unit="sample")
    with kept(model), counting as advance:
        return _recorded(recorder, network, partition, data, samples, objective, advance)


def input_covariances(
    model: nn.Module,
    data: Data,
    partition: Partition,
    *,
    samples: int,
    seed: int,
    weights: Tensor,
    objective: Objective,
) -> dict[str, Tensor]:
    """Return `input_moments` of inputs less their mean, over a batch or a few samples of a convolution."""
    network, tensors = _placed(model, partition, weights)
    recorder = InputRecorder(partition, tensors, seed, centred=True)
    with kept(model):
        return _recorded(recorder, network, partition, data, samples, objective, lambda _: None)


def _placed(
    model: nn.Module, partition: Partition, weights: Tensor | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network that is run at `weights`, its own without any, and the tensors it multiplies with."""
    require_evaluation_mode(model)
    if weights is None:
        return model, dict[str, Tensor](partition.tensors(model))
    trial = TrialNetwork(model, partition, weights)
    return trial, trial.weights


def _recorded(
    recorder: InputRecorder,
    network: nn.Module,
    partition: Partition,
    data: Data,
    samples: int,
    objective: Objective,
    advance: Advance,
) -> dict[str, Tensor]:
    """Return the moments that a recorder finds in a pass over so many samples."""
    expected = min(samples, _expected(data))
    batches = iterate(
        data,
        batch_size=BATCH_SIZE,
        max_samples=samples,
        seed=recorder.seed,
        device=device_of(network),
        argument="data",
    )
    seen = 0
    with plain_attention(), torch.no_grad():
        for batch in batches:
            batch = objective.prepared(batch)
            recorder.positions, recorder.samples = _positions(batch.inputs), batch.size
            recorder.total = max(expected, seen + batch.size)
            with recorder:
                objective.output(partial(forward, network), batch)
            seen += batch.size
            advance(batch.size)
    totals = recorder.totals()
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            found = f"the inputs of {name} are NaN or infinite"
            raise NonFiniteError("model, data", found, "check the data and the weights")
    spans = {span.name: span for span in partition.parameters}
    # Products are symmetric only to rounding.
    means = {name: (total + total.mT) / (2 * seen) for name, total in totals.items()}
    return {name: spans[name].reordered(mean) for name, mean in means.items()}


def _expected(data: Data) -> int:
    """Return how many samples there are; 0 where nothing says so."""
    source = data.sampler if isinstance(data, DataLoader) else data
    return (
        len(source) if isinstance(source, Sampler) and isinstance(source, Sized) else sample_count(data) or 0
    )


def _positions(inputs: Any) -> Tensor | None:
    """Return which positions of a batch are no padding, (B, T) bool; None where nothing says so."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
