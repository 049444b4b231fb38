"""Small files in the formats of the data directory, and the real directory where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from experiments.data_files import DATA_VARIABLE

needs_data = pytest.mark.skipif(
    not os.environ.get(DATA_VARIABLE), reason=f"{DATA_VARIABLE} does not name a data directory"
)


def write_mnist(
    directory: Path, *, train: int = 12, test: int = 5, seed: int = 0
) -> dict[str, NDArray[np.uint8]]:
    """Random digits; returns the arrays."""
    generator = np.random.default_rng(seed)
    arrays = {
        f"{split}_{part}": generator.integers(0, high, size=shape, dtype=np.uint8)
        for split, count in (("train", train), ("test", test))
        for part, high, shape in (("images", 256, (count, 28, 28)), ("labels", 10, (count,)))
    }
    np.savez(directory / "mnist.npz", **arrays)
    return arrays


def write_cifar10(
    directory: Path, *, train: int = 6, test: int = 4, seed: int = 0
) -> dict[str, NDArray[np.uint8]]:
    """Random pictures stored as differences; returns the plain pixels by split."""
    generator = np.random.default_rng(seed)
    pixels = {}
    for split, count in (("train", train), ("test", test)):
        images = generator.integers(0, 256, size=(count, 3, 32, 32), dtype=np.uint8)
        labels = generator.integers(0, 10, size=count, dtype=np.uint8)
        np.savez(directory / f"cifar10_{split}.npz", delta=differences(images), labels=labels)
        pixels[split] = images
    return pixels


def differences(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The stored form, value by value as the format is described (modulo 256)."""
    delta = images.astype(np.int64)
    delta[:, [0, 2]] -= delta[:, [1]]
    delta[..., 1:] = delta[..., 1:] - delta[..., :-1]
    delta[..., 1:, :] = delta[..., 1:, :] - delta[..., :-1, :]
    return (delta % 256).astype(np.uint8)


def write_network(directory: Path, name: str, model: nn.Module) -> None:
    """The state dict as the checkpoints have it, without the batch counters."""
    tensors = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    save_file(tensors, directory / f"{name}.safetensors")
