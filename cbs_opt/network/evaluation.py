"""Loss and accuracy of a network on data, in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cbs_opt.errors import EmptyDataError
from cbs_opt.network.data import Data, LossFunction, device_of, forward, peeked, read
from cbs_opt.network.objective import PEEKED, Objective, check_labels, class_count, logits_of
from cbs_opt.network.state import evaluation_mode, kept, require_usable
from cbs_opt.system.checks import whole_number

BATCH_SIZE = 512
"""Samples that run through a network at once."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss of a network on data and its accuracy (share of samples; None unless it classifies).

    `samples` are those that count: not those whose labels are all ignored.
    """

    loss: float
    accuracy: float | None
    samples: int


def evaluate(
    model: nn.Module,
    data: Data,
    loss_fn: LossFunction | Objective | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    max_samples: int | None = None,
    argument: str = "data",
) -> Evaluation:
    """Return loss and accuracy of a network, in evaluation mode and without gradients.

    The accuracy is None unless outputs are (B, C) and labels integers (B,).

    Each module is given its mode and its buffers back. The data are read in order, up to `max_samples`;
    batches are moved to the device of the network, and larger ones cut to `batch_size`. The loss does not
    depend on how the data are cut: samples weigh as `loss_fn` weighs them within a batch, see `Objective`.
    Only a loss that looks at whole batches is averaged over those. `argument` is what messages call the data.
    Raises `DataLoaderError`, `BatchFormatError`, `EmptyDataError`, `LabelRangeError` if the data cannot be
    read or does not fit the network, and what `Objective.settle` raises.
    """
    whole_number("batch_size", batch_size)
    limit = None if max_samples is None else whole_number("max_samples", max_samples)
    require_usable(model)
    objective = Objective.of(loss_fn)
    total, mass, correct, samples = 0.0, 0.0, 0, 0
    classifies = True
    where = device_of(model)

    def run(inputs: object) -> object:
        return forward(model, inputs)

    with kept(model), evaluation_mode(model), torch.no_grad():
        first, batches = peeked(read(data, max_samples=limit, argument=argument), PEEKED)
        objective.settle(model, run, first.take(slice(batch_size)).to(where), argument)
        for part in objective.pieces(batches, size=batch_size, max_samples=limit, device=where):
            batch = objective.prepared(part)
            output = objective.output(run, batch)
            weights = objective.weights(batch, run)
            counts = None if weights is None else weights > 0.0
            classes = class_count(output, batch.labels)
            if classes is None:
                classifies = False
            else:
                check_labels(batch.labels, classes, argument, ignored=objective.ignored)
                logits = logits_of(output)
                assert logits is not None
                right = logits.argmax(1) == batch.labels
                correct += int((right if counts is None else right & counts).sum())
            counted = batch.size if counts is None else int(counts.sum())
            samples += counted
            if not counted:
                continue
            weight = 1.0 if objective.in_batches else batch.size if weights is None else float(weights.sum())
            total += float(objective.loss(output, batch)) * weight
            mass += weight
    if not samples:
        raise EmptyDataError(argument, "labels that are all ignored", "pass samples with labels")
    accuracy = correct / samples if classifies else None
    return Evaluation(loss=total / mass, accuracy=accuracy, samples=samples)
