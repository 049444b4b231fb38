"""What a comparator starts from: a trained network, its data, and training images held out.

LeNet-5 has no published checkpoint here; it is trained once and kept beside the results.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.partition import Partition
from experiments.datasets import Dataset, load_dataset
from experiments.ledger import settings_key
from experiments.networks import NETWORKS, Network, NetworkSpec, load_network
from experiments.rivals_training import Training, train
from formulations.files import write_atomically

HELD_OUT = 5_000
"""Training images, the last ones, that weights are not trained on."""
LENET_EPOCHS = 2
"""Over all training images that are not held out."""


class LeNet5(nn.Module):
    """Two 5x5 convolutions (20, 50 filters) with max pooling, 800-500-10; 430 500 weights and 580 biases.

    The version of LeNet-5 that papers on pruning mean: that of Caffe, with ReLU after the hidden layer alone.
    Takes (N, 1, 28, 28), returns logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


LENET5 = NetworkSpec(
    build=LeNet5,
    dataset="mnist",
    target=("conv?.weight", "fc?.weight"),
    mean=(0.1307,),
    std=(0.3081,),
    dense_accuracy=float("nan"),
)
SPECS = {"lenet5": LENET5, **NETWORKS}


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A trained network with its data.

    Attributes
    ----------
    network : Network
        Its `dense_accuracy` is the one measured on the test set at hand.
    data : Dataset
        Its training images are those that are not held out.
    held_out : (x, y)
        Images and labels that weights are not trained on. A checkpoint that others published was trained on
        them all the same.
    """

    network: Network
    data: Dataset
    held_out: tuple[Tensor, Tensor]


def on_dense(
    given: argparse.Namespace, measure: Callable[[Subject, Mapping[str, Any]], dict[str, Any]]
) -> Callable[[], Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """Return what loads the dense network of a command line, and returns what measures a cell of it."""

    def bench() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        dense = load_subject(given.network, given.out, given.data, verify=not given.no_verify)
        return partial(measure, dense)

    return bench


def load_subject(
    name: str, kept_in: Path, data_dir: Path | None = None, *, verify: bool = True, seed: int = 0
) -> Subject:
    """Load a published network, or LeNet-5, which is trained where `kept_in` has none yet.

    Parameters
    ----------
    name : {"lenet5", "mlpnet_mnist", "resnet20_cifar10", "resnet20a_cifar10"}
    kept_in : Path
        Folder of networks that were trained here; their names tell the settings.
    data_dir : Path, optional
        See `experiments.data_files.data_directory`.
    verify : bool, default True
        Check the files' SHA-256.
    seed : int, default 0
        Of the initial weights and of training; checkpoints have none.

    Raises
    ------
    ArgumentError
        As `load_network` and `load_dataset`.
    """
    spec = SPECS[name]
    whole = load_dataset(spec.dataset, data_dir, mean=spec.mean, std=spec.std, verify=verify)
    data, held_out = split(whole)
    if name in NETWORKS:
        network = load_network(name, data_dir, verify=verify)
    else:
        network = fresh(name, seed)
        training = Training(rate=0.03, samples=LENET_EPOCHS * len(data.train_x), seed=seed)
        path = kept_in / f"{name}_{settings_key(asdict(training))}.safetensors"
        if path.is_file():
            network.model.load_state_dict(load_file(path))
        else:
            train(network, data, training, ())
            kept_in.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(_contiguous(network.model)))
    network = replace(network, dense_accuracy=accuracy(network, data))
    return Subject(network=network, data=data, held_out=held_out)


def fresh(name: str, seed: int) -> Network:
    """Return an untrained network, in evaluation mode; its initial weights follow from `seed`."""
    spec = SPECS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = spec.build().eval()
    fields = ("dataset", "target", "mean", "std", "dense_accuracy")
    return Network(name=name, model=model, **{field: getattr(spec, field) for field in fields})


def split(data: Dataset) -> tuple[Dataset, tuple[Tensor, Tensor]]:
    """Return the data without the last training images, a sixth of them at most, and those."""
    count = min(HELD_OUT, len(data.train_x) // 6)
    x, y = data.train_x, data.train_y
    return replace(data, train_x=x[:-count], train_y=y[:-count]), (x[-count:], y[-count:])


def accuracy(network: Network, data: Dataset) -> float:
    """Return the accuracy on the whole test set, in per cent."""
    return accuracy_on(network, data.test_x, data.test_y)


def accuracy_on(network: Network, x: Tensor, y: Tensor) -> float:
    """Return the accuracy on some images, in per cent."""
    found = evaluate(network.model, (x, y), nn.functional.cross_entropy)
    return 100.0 * (found.accuracy or 0.0)


def weight_counts(network: Network) -> tuple[int, int]:
    """Return the number of weights that may be pruned, and of those that are not zero."""
    weights = Partition.from_model(network.model, target=network.target).tensors(network.model).values()
    kept = sum(int(tensor.count_nonzero()) for tensor in weights)
    return sum(tensor.numel() for tensor in weights), kept


def copied(subject: Subject) -> Subject:
    """Return the subject with a copy of its network; the data are shared."""
    network = replace(subject.network, model=copy.deepcopy(subject.network.model))
    return replace(subject, network=network)


def _contiguous(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}
