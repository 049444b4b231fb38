"""Stochastic gradient descent on a pruned network, as people do it instead of pruning with more care.

Plain torch: all parameters are trained, biases and batch norm among them, with momentum, weight decay and a
rate that falls like a cosine; images are shifted and mirrored where the network was trained on such ones.
Pruned weights are the smallest of the whole network and are held at zero by `cbs_opt.masked`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cbs_opt
from cbs_opt.budget.counts import allocate
from cbs_opt.budget.schedule import sparsity_schedule
from cbs_opt.network.partition import Partition
from cbs_opt.select.saliency import without_lowest
from cbs_opt.system.checks import check_fields, finite_number, whole_number
from experiments.augmentation import AugmentedImages, as_trained
from experiments.datasets import Dataset
from experiments.networks import Network

UPDATES = 50
"""Of the mask, at most, in gradual pruning."""
GRADUAL = 2.0 / 3.0
"""Share of the samples over which gradual pruning goes on; then the mask is fixed."""
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Learning rates that a search may come to."""
FIRST = GRID[3:7]
"""Those of `GRID` that every search tries."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of images and labels, a scalar to differentiate."""
Before = Callable[[int, torch.optim.SGD], None]
"""What is done before a batch, given how many images were differentiated and the optimizer."""
Sparsities = Sequence[tuple[int, float]]
"""From how many samples on the network has which sparsity, in this order."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained.

    Raises `ArgumentError` if a field is out of its range.

    Parameters
    ----------
    rate : float
        Learning rate of the first step; it falls to nothing like half a cosine.
    samples : int
        Images to differentiate in all; the last batch is cut to it.
    seed : int, default 0
        Decides order, shifts and mirroring of the images.
    batch_size : int, default 128
    momentum : float, default 0.9
    weight_decay : float, default 1e-4
        As He et al. (2016) have them.
    """

    rate: float
    samples: int
    seed: int = 0
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_fields(self, "training.", finite_number, "rate", "momentum", "weight_decay")
        check_fields(self, "training.", whole_number, "samples", "batch_size")
        check_fields(self, "training.", whole_number, "seed", least=0)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What training took: images differentiated (fewer where the loss ran away), and processor seconds."""

    samples: int
    seconds: float


def one_shot(sparsity: float) -> Sparsities:
    """Return the whole sparsity from the start; of a network that has it already, it is what stays."""
    return ((0, sparsity),)


def gradual(sparsity: float, samples: int) -> Sparsities:
    """Return sparsities that rise like a cubic over the first two thirds of the samples.

    Source: Zhu and Gupta, "To prune, or not to prune" (2017).
    """
    rising = sparsity_schedule(sparsity, stages=UPDATES, schedule="polynomial")
    return [(int(GRADUAL * samples * number / UPDATES), share) for number, share in enumerate(rising)]


def magnitude_masks(model: nn.Module, partition: Partition, sparsity: float) -> dict[str, Tensor]:
    """Return masks (True = kept) without the smallest weights of a partition into one block.

    They leave out ``round(sparsity * n)`` of its n weights, exactly.
    """
    (count,) = allocate(partition, sparsity)
    return partition.keep_by_parameter(without_lowest(partition.flatten(model).abs(), count))


def train(network: Network, data: Dataset, training: Training, sparsities: Sparsities) -> Cost:
    """Train a network in place, and prune it on the way by the magnitude of its weights.

    Parameters
    ----------
    network : Network
        Its model is left in evaluation mode.
    data : Dataset
        The training images are read, the others are not.
    training : Training
    sparsities : sequence of (int, float)
        Samples and the sparsity from there on. Weights that are pruned stay so, since nothing is smaller.

    Returns
    -------
    Cost
    """
    model = network.model
    partition = Partition.from_model(model, target=network.target, blocks="global")
    due = list(sparsities)

    def masks_at(used: int) -> dict[str, Tensor]:
        """Return the masks that are due, none where training ran away."""
        reached = [share for samples, share in due if samples <= used]
        del due[: len(reached)]
        sound = all(bool(torch.isfinite(weights).all()) for weights in model.parameters())
        return magnitude_masks(model, partition, reached[-1]) if reached and sound else {}

    def prune(used: int, optimizer: torch.optim.SGD) -> None:
        if masks := masks_at(used):
            cbs_opt.masked(optimizer, masks, model)

    cost = descend(network, data, training, before=prune)
    if masks := masks_at(training.samples):
        cbs_opt.apply_masks(model, masks)
    return cost


def descend(
    network: Network,
    data: Dataset,
    training: Training,
    *,
    loss: Loss | None = None,
    before: Before | None = None,
) -> Cost:
    """Train a network in place, all parameters, with momentum and a rate that falls like half a cosine.

    Parameters
    ----------
    network : Network
        Its model is left in evaluation mode.
    data : Dataset
        The training images are read, the others are not.
    training : Training
    loss : callable, optional
        By default the cross-entropy of the network.
    before : callable, optional
        Called before every batch.

    Returns
    -------
    Cost
        With fewer images than asked for where the loss was not finite, which ends training.
    """
    began = time.process_time()
    model = network.model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    objective = loss or cross_entropy
    optimizer = torch.optim.SGD(
        model.named_parameters(),
        lr=training.rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    used = 0
    for images, labels in batches(network, data, training):
        if before is not None:
            before(used, optimizer)
        x, y = images[: training.samples - used], labels[: training.samples - used]
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        for group in optimizer.param_groups:
            group["lr"] = training.rate * 0.5 * (1.0 + math.cos(math.pi * used / training.samples))
        optimizer.zero_grad()
        value = objective(x, y)
        value.backward()  # type: ignore[no-untyped-call]
        used += len(x)
        optimizer.step()
        if used == training.samples or not bool(torch.isfinite(value)):
            break
    model.eval()
    return Cost(samples=used, seconds=time.process_time() - began)


def batches(network: Network, data: Dataset, training: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of the training images without end, each pass in an order of its own."""
    images = as_trained(network, data, seed=training.seed, batch_size=training.batch_size)
    generator = torch.Generator().manual_seed(training.seed)
    for epoch in itertools.count():
        if isinstance(images, AugmentedImages):
            images.set_epoch(epoch)
            yield from images
        else:
            order = torch.randperm(len(data.train_x), generator=generator)
            for index in torch.split(order, training.batch_size):
                yield data.train_x[index], data.train_y[index]


def best_rate(accuracy: Callable[[float], float]) -> float:
    """Return the learning rate of the highest accuracy; of equals the lowest.

    The four in the middle of `GRID` are tried, and then the next ones outside for as long as the best is at
    an end.
    """
    tried = {rate: accuracy(rate) for rate in FIRST}
    while True:
        best = max(sorted(tried), key=tried.__getitem__)
        place = GRID.index(best)
        beside = [GRID[at] for at in (place - 1, place + 1) if 0 <= at < len(GRID) and GRID[at] not in tried]
        if not beside:
            return best
        tried[beside[0]] = accuracy(beside[0])
