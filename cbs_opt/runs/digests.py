"""SHA-256 of tensors and of samples: dtypes, shapes and contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cbs_opt.network.data import map_tensors


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of several tensors, in hex."""
    digest = hashlib.sha256()
    for tensor in tensors:
        absorb(digest, tensor)
    return digest.hexdigest()


def samples_digest(sample: Iterable[tuple[Any, Tensor]]) -> str:
    """SHA-256 of inputs and labels, in the batches in which they come."""
    digest = SampleDigest()
    for inputs, labels in sample:
        digest.absorb(inputs, labels)
    return digest.value


class SampleDigest:
    """SHA-256 of the samples seen so far."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def absorb(self, inputs: Any, labels: Tensor) -> None:
        """Take in a batch."""
        map_tensors(lambda tensor: absorb(self._digest, tensor), inputs)
        absorb(self._digest, labels)

    @property
    def value(self) -> str:
        """In hex."""
        return self._digest.hexdigest()


def absorb(digest: Any, tensor: Tensor) -> Tensor:
    """Feed dtype, shape and content of a tensor to a hash; returns the tensor."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    content = tensor.detach().cpu().contiguous()
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data if content.numel() else b"")
    return tensor
