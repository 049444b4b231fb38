"""Test accuracy once batch-norm statistics are estimated anew: a column of its own in the tables."""

from __future__ import annotations

import copy

from torch import nn

import cbs_opt
from cbs_opt.errors import NoBatchNormError
from cbs_opt.network.evaluation import evaluate
from experiments.augmentation import as_trained
from experiments.datasets import Dataset
from experiments.networks import Network

SAMPLES = 5_000
"""Training images that the statistics are estimated on, drawn once for all seeds of the pruning."""


def recalibrated_accuracy(network: Network, model: nn.Module, data: Dataset) -> float | None:
    """Per cent of the test set that a copy of `model` gets right with statistics of the training data.

    Parameters
    ----------
    network : Network
        What the model was: images are shifted and mirrored as in its training. Without that the
        statistics are others, and even a network that was not pruned loses two to three points.
    model : nn.Module
        Pruned; not changed.
    data : Dataset

    Returns
    -------
    float or None
        None for a network without batch normalisation.
    """
    again = copy.deepcopy(model)
    try:
        cbs_opt.recalibrate_batchnorm(again, as_trained(network, data, seed=0), samples=SAMPLES)
    except NoBatchNormError:
        return None
    found = evaluate(again, (data.test_x, data.test_y), nn.functional.cross_entropy)
    return 100.0 * (found.accuracy or 0.0)
