"""The files the experiments read: where they come from, and proof that they are the right ones."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from formulations.errors import ArgumentError

DATA_VARIABLE = "CBS_OPT_DATA"
"""Environment variable that names the data directory when no argument does."""


class DataDirectoryError(ArgumentError):
    """No data directory was given, or it does not exist."""


class DataFileMissingError(ArgumentError):
    """The data directory lacks a file that the experiment needs."""


class DataFileChecksumError(ArgumentError):
    """A file is not, byte for byte, the one the published figures were measured on."""


class DataFileFormatError(ArgumentError):
    """A file does not hold the arrays or tensors it should."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file of the data directory.

    Attributes
    ----------
    name : str
    sha256 : str
        64 hex digits.
    contents : str
        What it holds.
    source : str
        Where its contents come from.
    """

    name: str
    sha256: str
    contents: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} ({self.contents}; source: {self.source}; SHA-256 {self.sha256})"


_CIFAR_CONTENTS = (
    "uint8 arrays `labels` (N,) and `delta` (N, 3, 32, 32): red and blue minus green, then each value "
    "minus its left, then minus its upper neighbour, all modulo 256"
)
_CIFAR_SOURCE = "CIFAR-10 in the original order, Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html"
_WIKITEXT = "WikiText-2 raw (wikitext-2-raw-v1), Merity et al., Pointer Sentinel Mixture Models, 2016"
_WOODFISHER = "https://github.com/IST-DASLab/WoodFisher, checkpoints/"
_STATE_DICT = "float32 state dict without num_batches_tracked"

DATA_FILES: dict[str, DataFile] = {
    file.name: file
    for file in (
        DataFile(
            name="mnist.npz",
            sha256="c8ca71ad62d22263ab46d0b5a815db8a64618c94fa6e7bc9f48a2c68964b1f12",
            contents="uint8 arrays `train_images` (60000, 28, 28), `train_labels` (60000,), "
            "`test_images` (10000, 28, 28), `test_labels` (10000,)",
            source="MNIST in the original order, LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist",
        ),
        DataFile(
            name="cifar10_train.npz",
            sha256="62e1c0ba39cecd28e9a1324bca419b41fcc195841b594e2bd0e9a25559eb8515",
            contents=_CIFAR_CONTENTS,
            source=_CIFAR_SOURCE,
        ),
        DataFile(
            name="cifar10_test.npz",
            sha256="7dbcfebde56a8bc73c15ba2d4e40b26cef396ce1943931dd5e41021db6c1b733",
            contents=_CIFAR_CONTENTS,
            source=_CIFAR_SOURCE,
        ),
        DataFile(
            name="mlpnet_mnist.safetensors",
            sha256="d053ad757d967d24c9ed6c60e1eb86c2d5ef5f281c0d717b9912261ca15dd605",
            contents=_STATE_DICT,
            source=_WOODFISHER + "mnist_25_epoch_93.97.ckpt",
        ),
        DataFile(
            name="resnet20_cifar10.safetensors",
            sha256="d3cec38ab93e99ba776307933488ac73cf41ec8ee1f88b5b31c99155422cec7f",
            contents=_STATE_DICT,
            source=_WOODFISHER + "resnet20_cifar10.pth.tar",
        ),
        DataFile(
            name="resnet20a_cifar10.safetensors",
            sha256="067e58d1f213d012fea54d151d17091064bd0debafb040f28a5c14e66845cf9a",
            contents=_STATE_DICT,
            source="https://github.com/akamaster/pytorch_resnet_cifar10, "
            "pretrained_models/resnet20-12fca82f.th",
        ),
        DataFile(
            name="wikitext2_raw_valid.txt.gz",
            sha256="ca53bb3fbc5d94eb22e60bb7d02f963ca9e01eef5eb50cd5c92a2745cd3e3281",
            contents="UTF-8 text, gzip",
            source=_WIKITEXT,
        ),
        DataFile(
            name="wikitext2_raw_test.txt.gz",
            sha256="aeb24039f80f70564e93f5f33f4479ba608581d060818ea7f3efe008b7043f6d",
            contents="UTF-8 text, gzip",
            source=_WIKITEXT,
        ),
    )
}


def data_directory(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the data directory: `data_dir`, else the environment variable `CBS_OPT_DATA`.

    Raises
    ------
    DataDirectoryError
        If neither is given, or the path is not a directory.
    """
    chosen = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE)
    if not chosen:
        raise DataDirectoryError("data_dir", "neither an argument nor CBS_OPT_DATA is set", _remedy())
    directory = Path(chosen)
    if not directory.is_dir():
        raise DataDirectoryError("data_dir", f"{directory} is not a directory", _remedy())
    return directory


def data_file(name: str, data_dir: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Path:
    """Path of one known file, checked against its SHA-256 once a process unless `verify` is false.

    Raises
    ------
    DataDirectoryError, DataFileMissingError, DataFileChecksumError
    """
    directory = data_directory(data_dir)
    expected = DATA_FILES[name]
    path = directory / name
    if not path.is_file():
        raise DataFileMissingError("data_dir", f"{directory} has no {name}", f"put there {expected}")
    if verify:
        stat = path.stat()
        digest = _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)
        if digest != expected.sha256:
            remedy = f"replace it by {expected}, or pass verify=False to use it all the same"
            raise DataFileChecksumError("data_dir", f"{path} has SHA-256 {digest}", remedy)
    return path


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Digest of a file; size and time of change are there to notice that it was replaced."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remedy() -> str:
    files = "".join(f"\n  {file}" for file in DATA_FILES.values())
    return f"pass a directory (--data, or {DATA_VARIABLE}) that holds what the experiment uses of:{files}"
