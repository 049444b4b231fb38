"""Everything that decides the result of a run, as plain values that JSON has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.curvature.fisher import GradientRows
from cbs_opt.curvature.rows import StoredRows
from cbs_opt.network.data import Data, LossFunction, device_of, iterate
from cbs_opt.network.partition import Partition
from cbs_opt.prune_options import PruneOptions
from cbs_opt.runs.digests import absorb, samples_digest, tensors_digest
from cbs_opt.system.plain import plain
from cbs_opt.system.versions import versions

FORMAT = "cbs-opt run"
LIBRARIES = ("python", "cbs-opt", "torch", "numpy", "scipy", "numba")
"""What every run rests on; those that call solvers rest on these as well."""


def run_fingerprint(
    model: nn.Module,
    partition: Partition,
    loss_fn: LossFunction,
    options: PruneOptions,
    sample: Iterable[tuple[Any, Tensor]],
    *,
    memory_limit: int,
    plan: object = None,
    curvature: GradientRows | StoredRows | None = None,
    held_out: Data | None = None,
) -> dict[str, Any]:
    """The fingerprint of a run of `prune`.

    Parameters
    ----------
    model, partition, loss_fn, options, memory_limit
        Weights and buffers go in by their SHA-256, the loss function by its name. The memory limit
        decides how many samples are differentiated at once, and so the rounding.
    sample : iterable of (inputs, labels)
        The samples of the first pass over the training data, in order.
    plan : object, optional
        Of a run in stages.
    curvature : GradientRows or StoredRows, optional
        Rows that the caller computed.
    held_out : DataLoader, iterable of (x, y), or pair of tensors (X, y), optional
        Of an iterable the first batch is looked at: it may be long.
    """
    used = versions()
    solves = options.chosen_method.kind not in ("saliency", "search")
    state = model.state_dict()
    network = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        network.update(name.encode())
        absorb(network, tensor)
    return {
        "format": FORMAT,
        "network": network.hexdigest(),
        "tensors": {name: tensors_digest([tensor]) for name, tensor in state.items()},
        "pruned": {span.name: list(span.shape) for span in partition.parameters},
        "data": samples_digest(sample),
        "loss_fn": plain(loss_fn),
        "options": plain(options.settings()),
        "plan": plain(plan),
        "curvature": None if curvature is None else tensors_digest(_tensors(curvature, partition)),
        "evaluate": None if held_out is None else _first_batch(held_out),
        "memory_limit": memory_limit,
        "threads": torch.get_num_threads(),
        "device": _device(device_of(model)),
        "versions": {name: found for name, found in used.items() if solves or name in LIBRARIES},
    }


def _first_batch(data: Data) -> str:
    batch = next(iter(iterate(data, batch_size=2**62, argument="evaluate")))
    return samples_digest([(batch.inputs, batch.labels)])


def _tensors(found: GradientRows | StoredRows, partition: Partition) -> Iterable[Tensor]:
    for span in partition.blocks:
        yield found.block(span.start, span.stop)
    yield found.gradient
    moment = None
    for channel in () if found.channels is None else found.channels.channels:
        if channel.moment is not moment:
            moment = channel.moment
            yield moment
        yield torch.tensor([channel.start, channel.stop, channel.scale], dtype=torch.float64)


def _device(device: torch.device) -> str:
    """The kind of device; other processors round otherwise."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.backends.cpu.get_cpu_capability()})"
