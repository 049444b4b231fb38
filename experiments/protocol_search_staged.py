"""Recipes of runs in stages compared on training data alone: which one the tables should use.

    python -m experiments.protocol_search_staged --network mlpnet_mnist --until .9

The last `HELD_OUT` training samples are set aside. Rows, gradients and the choices within a run see only
the others; recipes are compared by loss and accuracy on those set aside, at every sparsity that the runs
pass up to `--until`. The test set is not read. Prints one line a recipe and sparsity and writes them to
``<network>_staged.csv`` in the output directory. Exit codes: 0 done, 1 an error, 2 a usage error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.datasets import Dataset, load_dataset
from experiments.networks import NETWORKS, load_network
from experiments.protocol_search import shared_parser
from experiments.trajectories import STAGES, Trajectories, family
from formulations.errors import ArgumentError, CbsError

HELD_OUT = 5_000
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "as in the tables": {},
    "empirical Fisher": {"curvature": "empirical_fisher"},
    "no layer inputs": {"layer_inputs": None},
    "layer inputs": {"layer_inputs": 1.0},
    "gradient while pruning": {"gradient_term": True},
    "no gradient while pruning": {"gradient_term": False},
    "one update a stage": {"updates_per_stage": 1},
    "two updates a stage": {"updates_per_stage": 2},
    "five updates a stage": {"updates_per_stage": 5},
    "few samples a gradient": {"gradient_samples": 4_096},
    "magnitude": {"method": "magnitude"},
}
"""What a recipe changes in that of the tables."""


def set_aside(data: Dataset) -> Dataset:
    """The training samples cut in two: those to prune with, and those set aside in place of test data."""
    first = len(data.train_y) - HELD_OUT
    return Dataset(
        train_x=data.train_x[:first],
        train_y=data.train_y[:first],
        test_x=data.train_x[first:],
        test_y=data.train_y[first:],
    )


def measure(
    network: str, recipes: Sequence[str], until: float, seed: int, data_dir: Path | None
) -> pd.DataFrame:
    """One row a recipe and sparsity, what is known of the network there."""
    spec = NETWORKS[network]
    data = set_aside(load_dataset(spec.dataset, data_dir, mean=spec.mean, std=spec.std))
    passed = [share for share in STAGES[family(network)]["schedule"] if share <= until]
    if not passed:
        raise ArgumentError("until", f"{until:g}, before the first stage", "give a larger sparsity")
    shortened = {"schedule": tuple(passed), "stages": len(passed), "sparsity": passed[-1], "final_updates": 0}
    found = []
    for recipe in recipes:
        runs = Trajectories(data, changes={**shortened, **RECIPES[recipe]})
        trained = load_network(network, data_dir)
        for share in passed:
            cell = runs.measure(trained, share, seed)
            names = ("accuracy", "test_loss", "train_loss", "gradient_samples", "seconds")
            found.append({"recipe": recipe, "sparsity": share, **{name: cell[name] for name in names}})
        sys.stderr.write(f"{found[-1]}\n")
    return pd.DataFrame(found).rename(columns={"test_loss": "held_out_loss"})


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = shared_parser("protocol_search_staged", __doc__, list(RECIPES))
    root.add_argument("--until", type=float, default=0.8, help="last sparsity (default .8)")
    root.add_argument("--seed", type=int, default=0)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        frame = measure(given.network, given.recipes, given.until, given.seed, given.data)
    except CbsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(given.out / f"{given.network}_staged.csv", index=False)
    table = frame.sort_values(["sparsity", "held_out_loss"]).to_string(
        index=False, float_format="{:.4f}".format
    )
    sys.stdout.write(table + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
