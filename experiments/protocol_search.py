"""Recipes of the accuracy tables compared on training data alone: which one the tables should use.

    python -m experiments.protocol_search --network resnet20_cifar10 --method joint --sparsity .6 .9

The last `HELD_OUT` training samples are set aside. Rows, second moments and the choices within a recipe
see only the others; recipes are compared by the loss on those set aside, shifted and mirrored at random
for images in colour. The test set is not read. Prints one line a recipe and sparsity, best first, and
writes them to ``<network>_<method>.csv`` in the output directory. Exit codes: 0 done, 1 an error, 2 a
usage error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from torch import Tensor

import cbs_opt
from cbs_opt.curvature.kinds import EmpiricalFisher, SketchedFisher
from cbs_opt.recipe.records import Recipe, Weights
from experiments.augmentation import AugmentedImages
from experiments.datasets import Dataset, load_dataset
from experiments.networks import NETWORKS, load_network
from experiments.protocols import METHODS, prune_arguments
from experiments.row_cache import RowCache
from formulations.errors import CbsError

HELD_OUT = 2_000
DEFAULT_OUT = Path("runs/protocol_search")
Change = Callable[[Recipe], Recipe]


def fields(**values: Any) -> Change:
    """Set fields of a recipe."""
    return lambda recipe: replace(recipe, **values)


def rows_of(kind: type[EmpiricalFisher] | type[SketchedFisher]) -> Change:
    """Take as many rows of another kind."""

    def change(recipe: Recipe) -> Recipe:
        given: Any = recipe.curvature
        return replace(recipe, curvature=kind(samples=given.samples, per_row=given.per_row))

    return change


def samples_a_row(count: int) -> Change:
    """Take more or fewer samples in each row."""
    return lambda recipe: replace(recipe, curvature=replace(cast("Any", recipe.curvature), per_row=count))


RECIPES: Mapping[str, Change] = {
    "as in the tables": fields(),
    "empirical Fisher": rows_of(EmpiricalFisher),
    "sketched Fisher": rows_of(SketchedFisher),
    "no layer inputs": fields(layer_inputs=0.0),
    "layer inputs .1": fields(layer_inputs=0.1),
    "layer inputs .3": fields(layer_inputs=0.3),
    "layer inputs 1": fields(layer_inputs=1.0),
    "layer inputs 3": fields(layer_inputs=3.0),
    "damping .1": fields(damping=0.1),
    "damping 1": fields(damping=1.0),
    "with the gradient": fields(gradient=True),
    "8 samples a row": samples_a_row(8),
    "16 samples a row": samples_a_row(16),
    "64 samples a row": samples_a_row(64),
}
"""What a recipe changes in those of the tables."""


def split(data: Dataset) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the training samples to prune with, and those set aside."""
    first = len(data.train_y) - HELD_OUT
    return (data.train_x[:first], data.train_y[:first]), (data.train_x[first:], data.train_y[first:])


def measure(
    network: str,
    method: str,
    sparsities: Sequence[float],
    recipes: Sequence[str],
    seeds: int,
    data_dir: Path | None,
) -> pd.DataFrame:
    """Loss and accuracy on the samples set aside: one row a recipe, sparsity and seed."""
    spec = NETWORKS[network]
    data = load_dataset(spec.dataset, data_dir, mean=spec.mean, std=spec.std)
    training, held_out = split(data)
    cache = RowCache(training, progress=False)
    found = []
    for seed in range(seeds):
        for recipe in recipes:
            for sparsity in sparsities:
                pruned = load_network(network, data_dir)
                given = prune_arguments(network, method, sparsity, seed)["recipe"]
                tried = list(dict.fromkeys(RECIPES[recipe](entry) for entry in given))
                rows = cache.get(pruned, tried[0], seed)
                weights = Weights(target=pruned.target, blocks="global")
                report = cbs_opt.prune(
                    pruned.model,
                    training,
                    sparsity=sparsity,
                    recipe=[replace(entry, curvature=rows, weights=weights) for entry in tried],
                    evaluate=_as_evaluated(held_out, spec.dataset, spec.mean, spec.std),
                    seed=seed,
                    progress=False,
                )
                assert report.after is not None
                found.append(
                    {
                        "recipe": recipe,
                        "sparsity": sparsity,
                        "seed": seed,
                        "loss": report.after.loss,
                        "accuracy": 100.0 * (report.after.accuracy or 0.0),
                        "update_scale": report.update_scale,
                        "seconds": sum(report.seconds.values()),
                    }
                )
                sys.stderr.write(f"{found[-1]}\n")
    return pd.DataFrame(found)


def _as_evaluated(
    held_out: tuple[Tensor, Tensor], dataset: str, mean: Sequence[float], std: Sequence[float]
) -> Any:
    """Colour images shifted and mirrored, always the same way; others as they are."""
    if dataset != "cifar10":
        return held_out
    black = [-m / s for m, s in zip(mean, std, strict=True)]
    return AugmentedImages(*held_out, fill=black, seed=0)


def shared_parser(module: str, description: str | None, recipes: Sequence[str]) -> argparse.ArgumentParser:
    """Return a command line with the options of both searches."""
    root = argparse.ArgumentParser(prog=f"python -m experiments.{module}", description=description)
    root.formatter_class = argparse.RawDescriptionHelpFormatter
    root.add_argument("--network", required=True, choices=list(NETWORKS))
    root.add_argument("--recipes", nargs="+", choices=list(recipes), default=list(recipes))
    root.add_argument("--data", type=Path, help="data directory (default: $CBS_OPT_DATA)")
    root.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default {DEFAULT_OUT}")
    return root


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = shared_parser("protocol_search", __doc__, list(RECIPES))
    root.add_argument("--method", required=True, choices=[name for name in METHODS if name != "magnitude"])
    root.add_argument("--sparsity", nargs="+", type=float, default=[0.6, 0.9])
    root.add_argument("--seeds", type=int, default=1)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        frame = measure(given.network, given.method, given.sparsity, given.recipes, given.seeds, given.data)
    except CbsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    table = frame.groupby(["sparsity", "recipe"], sort=False).mean(numeric_only=True).drop(columns="seed")
    table = table.sort_values(["sparsity", "loss"])
    given.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(given.out / f"{given.network}_{given.method}.csv")
    sys.stdout.write(table.to_string(float_format="{:.4f}".format) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
