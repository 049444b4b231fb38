"""Loss and accuracy of a network on data, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from cbs_opt.network.data import (
    Data,
    LossFunction,
    check_labels,
    check_loss,
    class_count,
    device_of,
    forward,
    iterate,
)
from cbs_opt.system.checks import whole_number


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean loss of a network and its accuracy (share of samples; None unless it classifies)."""

    loss: float
    accuracy: float | None
    samples: int


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode and give each its own mode back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module,
    data: Data,
    loss_fn: LossFunction,
    *,
    batch_size: int = 512,
    max_samples: int | None = None,
    argument: str = "data",
) -> Evaluation:
    """Return mean loss and accuracy of a network, in evaluation mode and without gradients.

    The accuracy is None unless outputs are (B, C) and labels integers (B,).

    Each module is given its mode back. The data are read in order, up to `max_samples`; batches are moved to
    the device of the network, and larger ones cut to `batch_size`. ``loss_fn(output, y)`` is the mean loss of
    a batch; batches weigh by their number of samples. `argument` is what messages call the data.
    Raises `DataLoaderError`, `BatchFormatError`, `EmptyDataError`, `LabelRangeError` if the data cannot be
    read or does not fit the network.
    """
    whole_number("batch_size", batch_size)
    limit = None if max_samples is None else whole_number("max_samples", max_samples)
    total, correct, samples = 0.0, 0, 0
    classifies = True
    where = device_of(model)
    with evaluation_mode(model), torch.no_grad():
        for batch in iterate(data, batch_size=batch_size, max_samples=limit, device=where, argument=argument):
            output = forward(model, batch.inputs)
            classes = class_count(output, batch.labels)
            if classes is None:
                classifies = False
            else:
                check_labels(batch.labels, classes, argument)
                correct += int((output.argmax(1) == batch.labels).sum())
            total += float(check_loss(loss_fn(output, batch.labels))) * batch.size
            samples += batch.size
    accuracy = correct / samples if classifies else None
    return Evaluation(loss=total / samples, accuracy=accuracy, samples=samples)
