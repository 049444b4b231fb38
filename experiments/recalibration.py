"""Test accuracy once batch-norm statistics are estimated anew: a column of its own in the tables."""

from __future__ import annotations

import copy

from torch import nn

import cbs_opt
from cbs_opt.batches import evaluate
from cbs_opt.errors import NoBatchNormError
from experiments.datasets import Dataset

SAMPLES = 5_000
"""Training images that the statistics are estimated on: the first ones, whatever the seed."""


def recalibrated_accuracy(model: nn.Module, data: Dataset) -> float | None:
    """Per cent of the test set that a copy of `model` gets right with statistics of the training data.

    Parameters
    ----------
    model : nn.Module
        Pruned; not changed.
    data : Dataset

    Returns
    -------
    float or None
        None for a network without batch normalisation.
    """
    again = copy.deepcopy(model)
    train = (data.train_x[:SAMPLES], data.train_y[:SAMPLES])
    try:
        cbs_opt.recalibrate_batchnorm(again, train)
    except NoBatchNormError:
        return None
    found = evaluate(again, (data.test_x, data.test_y), nn.functional.cross_entropy)
    return 100.0 * (found.accuracy or 0.0)
