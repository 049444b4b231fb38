"""Networks: shapes, strict loading, eval mode, prunable weights, and the real checkpoints if present."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cbs_opt.network.partition import Partition
from experiments.data_files import DataDirectoryError, DataFileChecksumError, DataFileFormatError
from experiments.datasets import load_dataset
from experiments.networks import NETWORKS, PaddedShortcut, load_network
from formulations.errors import ArgumentError
from tests.experiments.tiny_data import needs_data, write_network

N_WEIGHTS = {"mlpnet_mnist": 32_360, "resnet20_cifar10": 267_264, "resnet20a_cifar10": 267_264}
N_PARAMETERS = {"mlpnet_mnist": 32_360, "resnet20_cifar10": 272_474, "resnet20a_cifar10": 269_722}
SHAPE = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def saved(directory: Path, name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name].build()
    write_network(directory, name, model)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_network_loads_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    network = load_network(name, tmp_path, verify=False)
    x = torch.randn(3, *SHAPE[network.dataset])
    with torch.no_grad():
        torch.testing.assert_close(network.model(x), model(x))
    assert network.model(x).shape == (3, 10)
    assert not any(module.training for module in network.model.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_prunable_weights_are_those_of_the_literature(name: str, tmp_path: Path) -> None:
    saved(tmp_path, name)
    network = load_network(name, tmp_path, verify=False)
    partition = Partition.from_model(network.model, target=network.target, blocks="layer")
    assert partition.n == N_WEIGHTS[name]
    assert len(partition.blocks) == (3 if name == "mlpnet_mnist" else 18)
    assert sum(p.numel() for p in network.model.parameters()) == N_PARAMETERS[name]


@pytest.mark.parametrize("name", ["resnet20_cifar10", "resnet20a_cifar10"])
def test_one_image_does_not_influence_another(name: str) -> None:
    model = NETWORKS[name].build().eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_padded_shortcut_keeps_every_second_pixel_between_zero_channels() -> None:
    x = torch.randn(2, 4, 6, 6)
    y: Tensor = PaddedShortcut(4, 8)(x)
    assert y.shape == (2, 8, 3, 3)
    torch.testing.assert_close(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="mlpnet_mnist"):
        load_network("lenet", tmp_path)


def test_missing_directory_says_what_to_put_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CBS_OPT_DATA", raising=False)
    with pytest.raises(DataDirectoryError, match=r"(?s)CBS_OPT_DATA.*mnist\.npz.*SHA-256"):
        load_network("mlpnet_mnist")


def test_environment_variable_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "mlpnet_mnist")
    monkeypatch.setenv("CBS_OPT_DATA", str(tmp_path))
    assert load_network("mlpnet_mnist", verify=False).name == "mlpnet_mnist"


def test_other_weights_fail_the_checksum(tmp_path: Path) -> None:
    saved(tmp_path, "mlpnet_mnist")
    with pytest.raises(DataFileChecksumError, match="verify=False"):
        load_network("mlpnet_mnist", tmp_path)


def test_a_state_dict_of_another_network_is_refused(tmp_path: Path) -> None:
    write_network(tmp_path, "mlpnet_mnist", NETWORKS["resnet20_cifar10"].build())
    with pytest.raises(DataFileFormatError, match="not a state dict"):
        load_network("mlpnet_mnist", tmp_path, verify=False)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlpnet_mnist.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DataFileFormatError, match="not a state dict"):
        load_network("mlpnet_mnist", tmp_path, verify=False)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_dense_accuracy_is_the_published_one(name: str) -> None:
    network = load_network(name)
    data = load_dataset(network.dataset, mean=network.mean, std=network.std)
    with torch.no_grad():
        batches = zip(data.test_x.split(500), data.test_y.split(500), strict=True)
        correct = sum(int((network.model(x).argmax(1) == y).sum()) for x, y in batches)
    assert correct / 100 == pytest.approx(network.dense_accuracy, abs=0.02)
