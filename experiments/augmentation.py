"""Training images shifted and mirrored at random, the same ones whenever a pass is repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cbs_opt.network.data import Data
from experiments.datasets import Dataset
from experiments.networks import Network
from formulations.errors import ArgumentError

AUGMENTED = ("resnet20",)
"""What the names of networks begin with that were trained on shifted and mirrored images."""
EPOCHS = 1_000_003
"""Seeds of one loader differ by less than this; those of two loaders by at least as much."""


class AugmentedImages:
    """Batches of images in random order, each shifted by up to `padding` pixels and mirrored or not.

    What ResNets are trained on for CIFAR-10 (He et al., 2016, section 4.2). A network that knows its
    training images by heart has almost no loss on them as they are, and a gradient and a Fisher matrix
    unlike those of new images; these are nearer.

    Parameters
    ----------
    x : (N, C, H, W) Tensor
        Normalised images.
    y : (N,) Tensor
        Labels.
    fill : sequence of float
        Value of the pixels around the image, one a channel: black after normalisation.
    padding : int, default 4
    seed : int, default 0
    batch_size : int, default 256

    Notes
    -----
    Pass number e (`set_epoch`, 0 at first) is decided by `seed` and e alone, however many batches of
    it are read. Nothing but the batch at hand is copied.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        fill: Sequence[float],
        padding: int = 4,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if x.ndim != 4 or len(fill) != x.shape[1]:
            found = f"images of shape {tuple(x.shape)} with {len(fill)} fill values"
            raise ArgumentError("x, fill", found, "pass (N, C, H, W) and one value a channel")
        self._x, self._y = x, y
        self._fill = torch.tensor(list(fill), dtype=x.dtype).view(1, -1, 1, 1)
        self._padding = padding
        self._seed = seed
        self._batch_size = batch_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration pass number `epoch`."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(EPOCHS * self._seed + self._epoch)
        order = torch.randperm(len(self._x), generator=generator)
        for index in torch.split(order, self._batch_size):
            yield self._moved(self._x[index], generator), self._y[index]

    def _moved(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, channels, height, width = images.shape
        span = 2 * self._padding + 1
        shift = torch.randint(0, span, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.arange(width).expand(count, width)
        columns = torch.where(mirrored, columns.flip(1), columns) + shift[0]
        rows = torch.arange(height).expand(count, height) + shift[1]
        edge = self._padding
        around = self._fill.repeat(count, 1, height + 2 * edge, width + 2 * edge)
        around[:, :, edge : edge + height, edge : edge + width] = images
        picture = torch.arange(count).view(-1, 1, 1, 1)
        channel = torch.arange(channels).view(1, -1, 1, 1)
        return around[picture, channel, rows[:, None, :, None], columns[:, None, None, :]]


def is_augmented(name: str) -> bool:
    """Whether the network of this name was trained on shifted and mirrored images."""
    return name.startswith(AUGMENTED)


def as_trained(network: Network, data: Dataset, *, seed: int, batch_size: int = 256) -> Data:
    """Return the training images as the network was fed them; in batches where they are augmented."""
    if not is_augmented(network.name):
        return data.train_x, data.train_y
    black = [-mean / std for mean, std in zip(network.mean, network.std, strict=True)]
    return AugmentedImages(data.train_x, data.train_y, fill=black, seed=seed, batch_size=batch_size)
