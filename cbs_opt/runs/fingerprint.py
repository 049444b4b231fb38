"""Everything that decides the result of a run, as plain values that JSON has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.curvature.kinds import Fisher
from cbs_opt.curvature.rows import Rows
from cbs_opt.network.data import Batch, Data, LossFunction, device_of, iterate, tensors_of
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.files import request_to_plain
from cbs_opt.recipe.records import Request
from cbs_opt.select.methods import find_method
from cbs_opt.system.plain import plain
from cbs_opt.system.versions import LIBRARIES, versions

FORMAT = "cbs-opt run"


def run_fingerprint(
    model: nn.Module,
    partition: Partition,
    loss_fn: LossFunction | None,
    request: Request,
    sample: Iterable[Batch],
    *,
    chunk_memory: int,
    held_out: Data | None = None,
) -> dict[str, Any]:
    """Return the fingerprint of a run of `prune`.

    Weights and buffers go in by their SHA-256, the loss function by its name. The memory for temporaries
    decides how many samples are differentiated at once, and so the rounding. Of held-out data that are
    an iterable the first batch is looked at: it may be long.
    """
    used = versions()
    curvature = request.recipes[0].curvature
    selects = [recipe.select for recipe in request.recipes if recipe.select is not None]
    kinds = {find_method(select.method, select.program).kind for select in selects}
    solves = bool(kinds - {"saliency", "search"})
    state = model.state_dict()
    network = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        network.update(name.encode())
        absorb_tensor(network, tensor)
    given = None if isinstance(curvature, Fisher) else _tensors_digest(_tensors(curvature, partition))
    return {
        "format": FORMAT,
        "network": network.hexdigest(),
        "tensors": {name: _tensors_digest([tensor]) for name, tensor in state.items()},
        "pruned": {span.name: list(span.shape) for span in partition.parameters},
        "blocks": len(partition.blocks),
        "data": _samples_digest(sample),
        "loss_fn": plain(loss_fn),
        "request": request_to_plain(request),
        "curvature": given,
        "evaluate": None if held_out is None else _first_batch(held_out),
        "chunk_memory": chunk_memory,
        "threads": torch.get_num_threads(),
        "device": _device(device_of(model)),
        "versions": {name: found for name, found in used.items() if solves or name in ("python", *LIBRARIES)},
    }


def absorb_batch(digest: Any, batch: Batch) -> None:
    """Feed dtypes, shapes and contents of a batch to a hash."""
    for tensor in tensors_of((batch.inputs, batch.labels)):
        absorb_tensor(digest, tensor)


def absorb_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed dtype, shape and content of a tensor to a hash."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    content = tensor.detach().cpu().contiguous()
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data if content.numel() else b"")


def _tensors_digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        absorb_tensor(digest, tensor)
    return digest.hexdigest()


def _samples_digest(sample: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in sample:
        absorb_batch(digest, batch)
    return digest.hexdigest()


def _first_batch(data: Data) -> str:
    return _samples_digest([next(iterate(data, batch_size=None, argument="evaluate"))])


def _tensors(found: Rows, partition: Partition) -> Iterable[Tensor]:
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
    """Return the kind of device; other processors round otherwise."""
    cuda = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return f"{device} ({kind})"
