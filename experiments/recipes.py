"""Test accuracy and cost of the recipes that users call by name, with no option but the name.

    python -m experiments.recipes --network resnet20_cifar10 --recipes fast balanced --seeds 3

Protocol
--------
- ``prune(model, (x, y), sparsity=s, recipe=name, seed=k)`` on the training images as they are; which weights
  may go is that of the published tables (all of MLPNet, the 18 block convolutions of ResNet20), nothing else
  is set. Everything else is chosen by the product on training samples.
- Beside them ``--recipes magnitude``: the smallest weights go, of the network or within each pattern, the
  others stay, and statistics are estimated anew like ours.
- The test set is read once a cell, whole. Processor seconds are those of `prune`, with one thread.
- Each cell is appended to ``results.jsonl`` as it is done: the same command goes on where it was stopped.

Exit codes: 0 done, 1 an error, 2 a usage error.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import cbs_opt
from cbs_opt.cli.prune import target
from cbs_opt.network.evaluation import evaluate
from cbs_opt.recipe.named import NAMES, Named
from cbs_opt.recipe.records import Recipe, Weights
from cbs_opt.recipe.select import Magnitude
from cbs_opt.system.threads import thread_limit
from experiments.command_line import add_no_verify, add_run_options, experiment_parser
from experiments.data_files import DATA_FILES
from experiments.datasets import Dataset, load_dataset
from experiments.ledger import Ledger, commit, settings_key
from experiments.networks import NETWORKS, load_network
from experiments.published import ACCURACY
from formulations.errors import CbsError

DEFAULT_OUT = Path("runs/recipes")
MAGNITUDE = "magnitude"
CONTENDERS = (MAGNITUDE, *NAMES)


def settings(
    network: str, recipe: str, sparsity: float | str, seed: int, recalibrate: bool
) -> dict[str, Any]:
    """Return everything that decides a cell, as plain values."""
    return {
        "network": network,
        "weights_sha256": DATA_FILES[f"{network}.safetensors"].sha256,
        "target": NETWORKS[network].target,
        "recipe": recipe,
        "sparsity": sparsity,
        "seed": seed,
        "recalibrate": recalibrate,
        "version": cbs_opt.__version__,
    }


def measure(cell: Mapping[str, Any], data: Dataset, data_dir: Path | None, verify: bool) -> dict[str, Any]:
    """Prune a fresh copy of the network and evaluate it on the test set."""
    network = load_network(cell["network"], data_dir, verify=verify)
    weights = Weights(target=network.target, blocks="global")
    began = time.process_time()
    report = cbs_opt.prune(
        network.model,
        (data.train_x, data.train_y),
        sparsity=cell["sparsity"],
        recipe=_recipe(cell["recipe"], cell["recalibrate"], weights),
        seed=cell["seed"],
        progress=False,
    )
    seconds = time.process_time() - began
    after = evaluate(network.model, (data.test_x, data.test_y), torch.nn.functional.cross_entropy)
    return {
        **cell,
        "accuracy": 100.0 * (after.accuracy or 0.0),
        "test_loss": after.loss,
        "n": report.n,
        "n_prune": report.n_prune,
        "samples": report.samples,
        "processor_seconds": seconds,
        "phase_seconds": dict(report.seconds),
        "peak_memory_bytes": report.peak_memory_bytes,
        "choices": list(report.choices),
        "notes": list(report.notes),
        "commit": commit(),
    }


def _recipe(name: str, recalibrate: bool, weights: Weights) -> Named | Recipe:
    if name != MAGNITUDE:
        return Named(name=name, recalibrate=recalibrate, weights=weights)
    return Recipe(select=Magnitude(), update=None, weights=weights, recalibrate=recalibrate)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: a line a network and recipe, accuracy by sparsity, then the cost."""
    # Patterns such as "2:4" come after shares.
    sparsities = sorted({entry["sparsity"] for entry in results}, key=lambda s: (isinstance(s, str), s))
    head = ["network", "recipe", *map(str, sparsities), "samples", "processor seconds"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for (network, recipe), group in itertools.groupby(results, key=lambda e: (e["network"], e["recipe"])):
        entries = list(group)
        by_share = [[e["accuracy"] for e in entries if e["sparsity"] == share] for share in sparsities]
        costs = [
            _range([entry[name] for entry in entries], digits)
            for name, digits in (("samples", 0), ("processor_seconds", 0))
        ]
        lines.append("| " + " | ".join([network, recipe, *map(_mean, by_share), *costs]) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f} (1)"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def _range(values: Sequence[float], digits: int) -> str:
    low, high = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = experiment_parser("recipes", __doc__)
    root.add_argument("--network", required=True, choices=list(NETWORKS))
    root.add_argument("--recipes", nargs="+", choices=CONTENDERS, default=list(NAMES))
    shares = "shares, or patterns such as 2:4; default: those of the published table"
    root.add_argument("--sparsity", nargs="+", type=target, help=shares)
    root.add_argument("--keep-statistics", action="store_true", help="leave batch-norm statistics alone")
    add_run_options(root, seeds=5, out=DEFAULT_OUT)
    add_no_verify(root)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    published = ACCURACY.get(given.network, ACCURACY["resnet20_cifar10"])
    shares = given.sparsity or sorted(published)
    todo = [
        settings(given.network, recipe, share, seed, not given.keep_statistics)
        for seed, recipe, share in itertools.product(range(given.seeds), given.recipes, shares)
    ]
    ledger = Ledger(given.out / "results.jsonl")
    verify = not given.no_verify
    try:
        spec = NETWORKS[given.network]
        data = load_dataset(spec.dataset, given.data, mean=spec.mean, std=spec.std, verify=verify)
        for cell in tqdm(todo, desc="cells", disable=None):
            key = settings_key(cell)
            if key not in ledger:
                with thread_limit(1):
                    ledger.add(key, measure(cell, data, given.data, verify))
    except CbsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    results = [ledger[settings_key(cell)] for cell in todo]
    results.sort(key=lambda entry: (entry["network"], CONTENDERS.index(entry["recipe"])))
    text = table(results)
    (given.out / f"{given.network}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
