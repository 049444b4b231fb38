"""MNIST and CIFAR-10 as normalised float32 tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.data_files import DataFileFormatError, data_file
from formulations.errors import ArgumentError

DATASETS = ("mnist", "cifar10")


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images and labels of the training and test sets, in the original order.

    Attributes
    ----------
    train_x, test_x : (N, C, H, W) float32 Tensor
        ``(pixel / 255 - mean) / std`` a channel.
    train_y, test_y : (N,) int64 Tensor
        Class labels.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    verify: bool = True,
) -> Dataset:
    """Read a data set.

    Parameters
    ----------
    name : {"mnist", "cifar10"}
    data_dir : path, optional
        Directory of the files in `experiments.data_files.DATA_FILES`; by default the one that the
        environment variable `CBS_OPT_DATA` names.
    mean, std : sequence of float
        One entry a channel, for pixels scaled to [0, 1]. They belong to the network: take them from
        `experiments.networks.load_network`.
    verify : bool, default True
        Check the files' SHA-256 (once a process).

    Returns
    -------
    Dataset
        About 220 MB for MNIST and 740 MB for CIFAR-10.

    Raises
    ------
    ArgumentError
        If the name is unknown, the normalisation does not fit the channels, or a file is missing,
        different from the published one, or without the arrays it should hold.
    """
    if name not in DATASETS:
        raise ArgumentError("name", f"{name!r}", f"choose one of {', '.join(DATASETS)}")
    splits = _mnist(data_dir, verify) if name == "mnist" else _cifar10(data_dir, verify)
    (train_x, train_y), (test_x, test_y) = (
        (_normalised(images, mean, std), torch.from_numpy(labels.astype(np.int64)))
        for images, labels in splits
    )
    return Dataset(train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)


Split = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def _mnist(data_dir: str | os.PathLike[str] | None, verify: bool) -> list[Split]:
    path = data_file("mnist.npz", data_dir, verify=verify)
    arrays = _arrays(
        path,
        {
            f"{split}_{part}": axes
            for split in ("train", "test")
            for part, axes in (("images", 3), ("labels", 1))
        },
    )
    return [(arrays[f"{split}_images"][:, None], arrays[f"{split}_labels"]) for split in ("train", "test")]


def _cifar10(data_dir: str | os.PathLike[str] | None, verify: bool) -> list[Split]:
    splits = []
    for split in ("train", "test"):
        path = data_file(f"cifar10_{split}.npz", data_dir, verify=verify)
        arrays = _arrays(path, {"delta": 4, "labels": 1})
        splits.append((_undo_differences(arrays["delta"]), arrays["labels"]))
    return splits


def _undo_differences(delta: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels (N, 3, H, W) from differences modulo 256 along rows, columns and to the green channel."""
    pixels = np.cumsum(delta, axis=3, dtype=np.uint8)
    np.cumsum(pixels, axis=2, dtype=np.uint8, out=pixels)
    pixels[:, 0] += pixels[:, 1]
    pixels[:, 2] += pixels[:, 1]
    return pixels


def _arrays(path: Path, axes: Mapping[str, int]) -> dict[str, NDArray[np.uint8]]:
    """Return the named uint8 arrays of an npz file, each with the given number of axes."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in axes}
    except (KeyError, ValueError, OSError) as error:
        found = f"{path} cannot be read: {error}"
        raise DataFileFormatError("data_dir", found, "replace it by the original file") from error
    for key, count in axes.items():
        if arrays[key].dtype != np.uint8 or arrays[key].ndim != count:
            found = f"{key} in {path} is {arrays[key].dtype} with shape {arrays[key].shape}"
            raise DataFileFormatError("data_dir", found, f"store uint8 with {count} axes")
    return arrays


def _normalised(images: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        found = f"{len(mean)} and {len(std)} entries for {channels} channels"
        raise ArgumentError("mean, std", found, "pass one entry a channel")
    shape = (1, channels, 1, 1)
    pixels = torch.from_numpy(images).to(torch.float32).div_(255)
    return pixels.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
