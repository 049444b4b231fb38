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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.recipe.select import Magnitude
from experiments.datasets import Dataset, load_dataset
from experiments.networks import NETWORKS, load_network
from experiments.protocol_search import shared_parser
from experiments.trajectories import STAGES, Change, Staged, Trajectories, family
from formulations.errors import ArgumentError, CbsError

HELD_OUT = 5_000


def in_recipe(**values: Any) -> Change:
    """Set fields of the recipe."""
    return lambda staged: replace(staged, recipe=replace(staged.recipe, **values))


def in_stages(**values: Any) -> Change:
    """Set fields of the stages."""
    return lambda staged: replace(staged, stages=replace(staged.stages, **values))


def empirical(staged: Staged) -> Staged:
    """Take as many empirical rows."""
    given: Any = staged.recipe.curvature
    return in_recipe(curvature=EmpiricalFisher(samples=given.samples, per_row=given.per_row))(staged)


RECIPES: Mapping[str, Change] = {
    "as in the tables": in_recipe(),
    "empirical Fisher": empirical,
    "no layer inputs": in_recipe(layer_inputs=0.0),
    "layer inputs": in_recipe(layer_inputs=1.0),
    "gradient while pruning": in_recipe(gradient=True),
    "no gradient while pruning": in_recipe(gradient=False),
    "one update a stage": in_stages(updates=1),
    "two updates a stage": in_stages(updates=2),
    "five updates a stage": in_stages(updates=5),
    "few samples a gradient": in_stages(gradient_samples=4_096),
    "magnitude": in_recipe(select=Magnitude()),
}
"""What a recipe changes in that of the tables."""


def set_aside(data: Dataset) -> Dataset:
    """Cut the training samples in two: those to prune with, and those in place of test data."""
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
    passed = [share for share in STAGES[family(network)].schedule if share <= until]
    if not passed:
        raise ArgumentError("until", f"{until:g}, before the first stage", "give a larger sparsity")
    shortened = in_stages(count=len(passed), schedule=tuple(passed), final_updates=0)
    found = []
    for recipe in recipes:
        change = RECIPES[recipe]
        runs = Trajectories(data, change=lambda staged, change=change: change(shortened(staged)))
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
