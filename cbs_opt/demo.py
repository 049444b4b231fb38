"""The embedded example: a small network on scikit-learn's digits, trained in seconds and pruned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.budget.counts import checked_sparsity
from cbs_opt.curvature.kinds import ExactFisher
from cbs_opt.pruning import prune
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import Recipe, Update
from cbs_opt.recipe.select import OBD, OBS, Magnitude, Select, SwapSearch
from cbs_opt.report.record import PruneReport
from cbs_opt.system.checks import RUN_SEEDS, seed_number
from cbs_opt.system.threads import fitting_limit

Pair = tuple[Tensor, Tensor]

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
CURVATURE = ExactFisher(samples=100)
TEST_SHARE = 0.25
BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of pruning that the demonstration compares."""

    recipe: Recipe | Named
    certify: bool = False


def _contender(select: Select, *, update: bool = True, certify: bool = False) -> Contender:
    moves = Update() if update else None
    recipe = Recipe(curvature=CURVATURE, layer_inputs=0.0, select=select, update=moves)
    return Contender(recipe=recipe, certify=certify)


CONTENDERS = (
    _contender(Magnitude(program="selection"), update=False),
    _contender(OBD(program="selection"), update=False),
    _contender(OBS(program="selection")),
    _contender(SwapSearch(program="selection")),
    _contender(SwapSearch(), certify=True),
    Contender(recipe=Named()),
)
"""The last one is what `prune` does by default."""


def digits_data(seed: int = 0) -> tuple[Pair, Pair]:
    """scikit-learn's 1 797 images of digits, split at random into training and test.

    ``X`` is (samples, 64) float32 in [0, 1], ``y`` (samples,) int64.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.as_tensor(images[order] / 16.0, dtype=torch.float32)
    y = torch.as_tensor(labels[order], dtype=torch.int64)
    cut = round(TEST_SHARE * len(labels))
    return (x[cut:], y[cut:]), (x[:cut], y[:cut])


def digits_network(
    seed: int = 0, hidden: Sequence[int] = (32,), epochs: int = 15
) -> tuple[nn.Sequential, Pair, Pair]:
    """Train a perceptron on the digits; about a second on one core.

    `seed`: of the split, the initial weights and the order of the batches. Torch's global generator is not
    touched. `hidden`: widths of the hidden layers. `epochs`: passes over the training data. The network is
    float32, in evaluation mode.
    """
    train, test = digits_data(seed_number("seed", seed, below=RUN_SEEDS))
    generator = torch.Generator().manual_seed(seed)
    model = _perceptron((train[0].shape[1], *hidden, 10), generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    x, y = train
    with fitting_limit(x.nbytes):
        for _ in range(epochs):
            order = torch.randperm(len(y), generator=generator)
            for start in range(0, len(y), BATCH_SIZE):
                index = order[start : start + BATCH_SIZE]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    optimizer.zero_grad()
    return model.eval(), train, test


def compare_on_digits(
    *,
    seed: int = 0,
    sparsities: Sequence[float] = SPARSITIES,
    contenders: Sequence[Contender] = CONTENDERS,
    on_report: Callable[[PruneReport], Any] = lambda report: None,
) -> list[PruneReport]:
    """Prune the same trained digits network by every contender at every sparsity.

    Raises `ArgumentError` if a sparsity lies outside [0, 1); nothing is trained then. `seed`: of the training
    and of every run. `sparsities`: in [0, 1). `contenders`: what to compare. `on_report`: called with each
    report as it is made. The reports come contender by contender, in the given order; evaluated on the test
    images.
    """
    levels = [checked_sparsity("sparsity", sparsity) for sparsity in sparsities]
    model, train, test = digits_network(seed)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    reports = []
    for contender, sparsity in itertools.product(contenders, levels):
        model.load_state_dict(trained)
        how = vars(contender)
        report = prune(model, train, sparsity=sparsity, **how, evaluate=test, seed=seed, progress=False)
        on_report(report)
        reports.append(report)
    return reports


def _perceptron(widths: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers with ReLU between, initialised from `generator` alone (He et al. 2015)."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        # Made without values: the layer's own initialisation would draw from the global generator.
        layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
