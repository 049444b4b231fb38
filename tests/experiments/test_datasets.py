"""Data sets: the arithmetic of the formats, normalisation, and every way a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data_files import (
    DATA_FILES,
    DataDirectoryError,
    DataFile,
    DataFileChecksumError,
    DataFileFormatError,
    DataFileMissingError,
    data_file,
)
from experiments.datasets import load_dataset
from formulations.errors import ArgumentError
from tests.experiments.tiny_data import needs_data, write_cifar10, write_mnist


def test_mnist_is_scaled_and_normalised(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path)
    data = load_dataset("mnist", tmp_path, mean=[0.25], std=[0.5], verify=False)
    assert data.train_x.shape == (12, 1, 28, 28)
    assert data.train_x.dtype == torch.float32
    assert data.train_y.dtype == torch.int64
    expected = (arrays["test_images"][:, None] / 255 - 0.25) / 0.5
    np.testing.assert_allclose(data.test_x.numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(data.train_y.numpy(), arrays["train_labels"])


def test_cifar10_pixels_come_back_from_their_differences(tmp_path: Path) -> None:
    pixels = write_cifar10(tmp_path)
    data = load_dataset("cifar10", tmp_path, mean=[0, 0, 0], std=[1 / 255] * 3, verify=False)
    for split, loaded in (("train", data.train_x), ("test", data.test_x)):
        np.testing.assert_array_equal(loaded.round().to(torch.uint8).numpy(), pixels[split])


def test_channels_are_normalised_apart(tmp_path: Path) -> None:
    pixels = write_cifar10(tmp_path)["train"]
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    data = load_dataset("cifar10", tmp_path, mean=mean, std=std, verify=False)
    for channel in range(3):
        expected = (pixels[:, channel] / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(data.train_x[:, channel].numpy(), expected, atol=1e-6)


def test_normalisation_must_fit_the_channels(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with pytest.raises(ArgumentError, match="1 channels"):
        load_dataset("mnist", tmp_path, mean=[0, 0, 0], std=[1, 1, 1], verify=False)


def test_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="mnist, cifar10"):
        load_dataset("imagenet", tmp_path, mean=[0], std=[1])


def test_missing_file_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(DataFileMissingError, match=DATA_FILES["mnist.npz"].sha256):
        load_dataset("mnist", tmp_path, mean=[0], std=[1])


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError, match="not a directory"):
        load_dataset("mnist", tmp_path / "absent", mean=[0], std=[1])


def test_other_contents_fail_the_checksum(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with pytest.raises(DataFileChecksumError, match="SHA-256"):
        load_dataset("mnist", tmp_path, mean=[0], std=[1])


def test_a_replaced_file_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mnist.npz"
    path.write_bytes(b"right")
    digest = "5be2bb1c00e9e4b0c6a3fd7a04be0e1f0c1c8d3dd0a1f4f5a2e83c3b5f0a0000"
    monkeypatch.setitem(
        DATA_FILES, "mnist.npz", DataFile(name="mnist.npz", sha256=digest, contents="", source="")
    )
    with pytest.raises(DataFileChecksumError) as first:
        data_file("mnist.npz", tmp_path)
    path.write_bytes(b"replaced")
    with pytest.raises(DataFileChecksumError) as second:
        data_file("mnist.npz", tmp_path)
    assert first.value.found != second.value.found


def test_an_array_is_missing(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", train_images=np.zeros((1, 28, 28), np.uint8))
    with pytest.raises(DataFileFormatError, match="train_labels"):
        load_dataset("mnist", tmp_path, mean=[0], std=[1], verify=False)


def test_an_array_is_of_the_wrong_kind(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path)
    np.savez(tmp_path / "mnist.npz", **{**arrays, "test_labels": np.zeros(5)})
    with pytest.raises(DataFileFormatError, match="float64"):
        load_dataset("mnist", tmp_path, mean=[0], std=[1], verify=False)


def test_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / "mnist.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(DataFileFormatError, match="cannot be read"):
        load_dataset("mnist", tmp_path, mean=[0], std=[1], verify=False)


@needs_data
@pytest.mark.slow
def test_real_sets_have_the_published_sizes_and_means() -> None:
    mnist = load_dataset("mnist", mean=[0.1307], std=[0.3081])
    assert mnist.train_x.shape == (60000, 1, 28, 28)
    assert abs(float(mnist.train_x.mean())) < 1e-3
    assert torch.bincount(mnist.test_y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    cifar = load_dataset("cifar10", mean=[0, 0, 0], std=[1, 1, 1])
    assert torch.bincount(cifar.train_y).tolist() == [5000] * 10
    torch.testing.assert_close(
        cifar.train_x.mean((0, 2, 3)), torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-3, rtol=0
    )
