"""Selection or joint: both programs at equal settings, on MLPNet and on the embedded digits network.

    python -m experiments.benchmarks.program_choice --network mlpnet_mnist --seeds 0 1 2

One JSON line a run: the training loss and the test accuracy of `prune` by `SwapSearch(program=...)` with
the same rows, damping and update. Two settings: those `prune` takes by default, and rows averaged over 16
samples with damping and step length chosen by training loss.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import cbs_opt
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.demo import digits_network
from cbs_opt.recipe.records import Recipe, Update, Weights
from cbs_opt.recipe.select import SwapSearch
from experiments.datasets import load_dataset
from experiments.networks import NETWORKS, load_network
from formulations.errors import CbsError
from formulations.problem import PROGRAMS

DIGITS = "digits"
MLPNET = "mlpnet_mnist"
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
DEFAULT = Recipe(weights=Weights(blocks="global"))
DAMPINGS = (0.3, 1.0, 3.0, 10.0)
LENGTHS = (0.25, 0.5, 0.75, 1.0)


def chosen(curvature: EmpiricalFisher) -> list[Recipe]:
    """Recipes on averaged rows, of which the training loss chooses."""
    base = replace(DEFAULT, curvature=curvature)
    return Recipe.grid(base, damping=DAMPINGS, update=[Update(scale=length) for length in LENGTHS])


SETTINGS: Mapping[str, Mapping[str, Sequence[Recipe]]] = {
    MLPNET: {"default": [DEFAULT], "chosen": chosen(EmpiricalFisher(samples=16_000, per_row=16))},
    DIGITS: {"default": [DEFAULT], "chosen": chosen(EmpiricalFisher(samples=1_344, per_row=2))},
}

Pair = tuple[Tensor, Tensor]


def loaded(network: str, data_dir: Path | None) -> tuple[nn.Module, Any, Pair, Pair]:
    """Return a trained network, what of it may be pruned, and its training and test data."""
    if network == DIGITS:
        perceptron, train, test = digits_network()
        return perceptron, None, train, test
    spec = NETWORKS[network]
    data = load_dataset(spec.dataset, data_dir, mean=spec.mean, std=spec.std)
    found = load_network(network, data_dir)
    return found.model, found.target, (data.train_x, data.train_y), (data.test_x, data.test_y)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.program_choice", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--network", choices=(MLPNET, DIGITS), default=MLPNET)
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--settings", nargs="+", choices=("default", "chosen"), default=["default", "chosen"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", type=Path, help="data directory (default: $CBS_OPT_DATA)")
    given = parser.parse_args()
    try:
        model, target, train, test = loaded(given.network, given.data)
    except CbsError as error:
        raise SystemExit(f"error: {error}") from error
    for name in given.settings:
        for sparsity in given.sparsity:
            for seed in given.seeds:
                for program in PROGRAMS:
                    began = time.perf_counter()
                    report = cbs_opt.prune(
                        copy.deepcopy(model),
                        train,
                        sparsity=sparsity,
                        recipe=[
                            replace(
                                recipe,
                                select=SwapSearch(program=program),
                                weights=replace(recipe.weights, target=target),
                            )
                            for recipe in SETTINGS[given.network][name]
                        ],
                        evaluate=test,
                        seed=seed,
                        progress=False,
                    )
                    assert report.after is not None
                    row = {
                        "network": given.network,
                        "settings": name,
                        "sparsity": sparsity,
                        "seed": seed,
                        "program": program,
                        "train_loss": None if report.train_after is None else report.train_after.loss,
                        "test_accuracy": report.after.accuracy,
                        "predicted": report.predicted_loss_increase,
                        "damping": report.damping,
                        "update_scale": report.update_scale,
                        "status": report.blocks[0].status,
                        "seconds": round(time.perf_counter() - began, 1),
                    }
                    print(json.dumps(row), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
