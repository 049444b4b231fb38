"""The loop of stochastic gradient descent that comparators share, with a loss and a step of their own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.datasets import Dataset
from experiments.networks import Network
from experiments.rivals_training import Cost, Training, batches

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of images and labels, a scalar to differentiate."""
Before = Callable[[int, torch.optim.SGD], None]
"""What is done before a batch, given how many images were differentiated and the optimizer."""


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
