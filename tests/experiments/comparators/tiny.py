"""A small network with a convolution, batch norm and two linear layers, and images that it can learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.comparators.subjects import Subject, split
from experiments.datasets import Dataset
from experiments.networks import Network


class Tiny(nn.Module):
    """Six filters over 1 x 6 x 6, a hidden layer of eight, three classes; 30 + 96 * 8 + 24 weights or so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(96, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(x))).flatten(1)
        logits: Tensor = self.fc2(torch.relu(self.fc1(hidden)))
        return logits


def images(count: int = 180, *, noise: float = 0.5, seed: int = 1) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    means = torch.randn(3, 1, 6, 6, generator=generator)
    x = means[y] + noise * torch.randn(count, 1, 6, 6, generator=generator)
    return Dataset(train_x=x, train_y=y, test_x=x[:60], test_y=y[:60])


def tiny_network(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Tiny().eval()
    return Network(
        name="tiny",
        model=model,
        dataset="none",
        target=("conv.weight", "fc?.weight"),
        mean=(0.0,),
        std=(1.0,),
        dense_accuracy=0.0,
    )


def tiny_subject(seed: int = 0) -> Subject:
    data, held_out = split(images())
    return Subject(network=tiny_network(seed), data=data, held_out=held_out)
