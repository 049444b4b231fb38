"""The trained networks of the pruning literature that the experiments measure on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.data_files import DataFileFormatError, data_file
from formulations.errors import ArgumentError

BLOCK_CONVOLUTIONS = ("layer*.*.conv?.weight",)


class MLPNet(nn.Module):
    """784-40-20-10 with ReLU and no biases; takes (N, 1, 28, 28) or (N, 784), returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(hidden)))
        return logits


class PaddedShortcut(nn.Module):
    """Option A of He et al. (2016): every second pixel, zero channels added on both sides."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.padding = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


def projection(channels_in: int, channels_out: int) -> nn.Module:
    """Option B: a 1x1 convolution of stride 2 with batch norm."""
    convolution = nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out))


Shortcut = Callable[[int, int], nn.Module]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut, which shrinks where channels grow."""

    def __init__(self, channels_in: int, channels_out: int, shortcut: Shortcut) -> None:
        super().__init__()
        grows = channels_in != channels_out
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=2 if grows else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample = shortcut(channels_in, channels_out) if grows else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.downsample(x))


class ResNet20(nn.Module):
    """ResNet20 for 32x32 images (He et al., 2016): a stem, three stages of three blocks, a classifier.

    Parameters
    ----------
    shortcut : callable
        ``shortcut(channels_in, channels_out)`` builds the shortcut of the blocks that shrink:
        `projection` or `PaddedShortcut`.
    classifier : str
        Name of the last layer in the state dict, as the checkpoint has it.
    """

    def __init__(self, shortcut: Shortcut = projection, classifier: str = "fc") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, shortcut)
        self.layer2 = _stage(16, 32, shortcut)
        self.layer3 = _stage(32, 64, shortcut)
        self.classifier = classifier
        self.add_module(classifier, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.get_submodule(self.classifier)(x.mean(dim=(2, 3)))
        return logits


def _stage(channels_in: int, channels_out: int, shortcut: Shortcut) -> nn.Sequential:
    sizes = (channels_in, channels_out, channels_out)
    return nn.Sequential(*(ResidualBlock(size, channels_out, shortcut) for size in sizes))


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """What is known of a network before its file is read; fields as in `Network`."""

    build: Callable[[], nn.Module]
    dataset: str
    target: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dense_accuracy: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A trained network and what is needed to use it.

    Attributes
    ----------
    name : str
    model : nn.Module
        In eval mode, float32, on the CPU.
    dataset : str
        Name for `experiments.datasets.load_dataset`.
    target : tuple of str
        Globs of the weights that the literature prunes: all of MLPNet, the 18 block convolutions
        (267 264 weights) of ResNet20.
    mean, std : tuple of float
        Normalisation of the input, one entry a channel, after pixels are scaled to [0, 1]. The
        checkpoint `resnet20_cifar10` needs .5 and .5; with the usual CIFAR-10 values it falls to
        53.52 %.
    dense_accuracy : float
        Test accuracy in per cent before pruning, measured on the whole test set.
    """

    name: str
    model: nn.Module
    dataset: str
    target: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dense_accuracy: float


NETWORKS: dict[str, NetworkSpec] = {
    "mlpnet_mnist": NetworkSpec(
        build=MLPNet,
        dataset="mnist",
        target=("fc?.weight",),
        mean=(0.1307,),
        std=(0.3081,),
        dense_accuracy=93.97,
    ),
    "resnet20_cifar10": NetworkSpec(
        build=ResNet20,
        dataset="cifar10",
        target=BLOCK_CONVOLUTIONS,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        dense_accuracy=91.43,
    ),
    "resnet20a_cifar10": NetworkSpec(
        build=lambda: ResNet20(PaddedShortcut, classifier="linear"),
        dataset="cifar10",
        target=BLOCK_CONVOLUTIONS,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        dense_accuracy=91.73,
    ),
}


def load_network(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, verify: bool = True
) -> Network:
    """Build a network and load its published weights.

    Parameters
    ----------
    name : {"mlpnet_mnist", "resnet20_cifar10", "resnet20a_cifar10"}
    data_dir : path, optional
        Directory that holds ``<name>.safetensors``; by default the one that the environment variable
        `CBS_OPT_DATA` names.
    verify : bool, default True
        Check the file's SHA-256 (once a process).

    Raises
    ------
    ArgumentError
        If the name is unknown, or the file is missing, different from the published one, or not a
        state dict of this network.
    """
    if name not in NETWORKS:
        raise ArgumentError("name", f"{name!r}", f"choose one of {', '.join(NETWORKS)}")
    spec = NETWORKS[name]
    path = data_file(f"{name}.safetensors", data_dir, verify=verify)
    model = spec.build()
    try:
        tensors = load_file(path)
        model.load_state_dict({**_batch_counters(model), **tensors}, strict=True)
    except (SafetensorError, RuntimeError) as error:
        found = f"{path} is not a state dict of {name}: {error}"
        raise DataFileFormatError("data_dir", found, "replace it by the original file") from error
    return Network(
        name=name,
        model=model.eval(),
        dataset=spec.dataset,
        target=spec.target,
        mean=spec.mean,
        std=spec.std,
        dense_accuracy=spec.dense_accuracy,
    )


def _batch_counters(model: nn.Module) -> dict[str, Tensor]:
    """`num_batches_tracked` at zero: the files leave it out, and eval mode never reads it."""
    suffix = "num_batches_tracked"
    return {
        name: torch.zeros_like(value) for name, value in model.state_dict().items() if name.endswith(suffix)
    }
