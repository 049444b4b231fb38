"""Test accuracy after one-shot pruning, beside what the literature reports.

    python -m experiments.paper_tables --network mlpnet_mnist --sparsity .9 .95 --methods magnitude cbs

Protocol
--------
- Weights: all of MLPNet; the 18 block convolutions of ResNet20. Nothing is retrained, biases and
  batch-norm parameters and statistics are untouched. Counts are exact: ``n_prune = round(sparsity n)``.
- One global block; one stage, but for "staged". Training samples of the rows are chosen by the seed; no
  gradient term in one stage.
- Every choice among candidates (number of swaps, damping, step length of the update) is made by the loss
  on training samples, never on the test set. `experiments.protocols` has the recipes and their grids: one
  for each method and network, whatever the seed and sparsity.
- How the recipes were found: those of the baselines and of "cbs" on MLPNet on seed 0 with the test accuracy
  in view. On ResNet20 the weight of the layer-input term (.01, .1 or 1) by the loss on training samples set
  aside, on seed 0, with the accuracy on 2 000 test images printed beside it; numbers of rows and samples by
  their cost; damping and the drops of "joint" were set once. The weight for "joint" on MLPNet (1 or 3) by
  `experiments.protocol_search`, at .98.
- The test set is read once a cell, whole, for the network that was chosen, and once more for its copy with
  batch-norm statistics estimated on 5 000 training images (shifted and mirrored as in training), which has
  a table of its own. Mean and sample standard deviation are over seeds 0, 1, ...; magnitude pruning has no
  random choice and runs once.

Results are appended to ``results.jsonl`` in the output directory as they come, keyed by their settings:
the same command resumes where it stopped. ``<network>.md``, ``.csv`` and ``.json`` are written at the end.
Exit codes: 0 done, 1 an error, 2 a usage error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

import cbs_opt
from cbs_opt.network.evaluation import Evaluation, evaluate
from cbs_opt.recipe.records import Weights
from experiments.accuracy_table import accuracy_frame, markdown_tables
from experiments.data_files import DATA_FILES
from experiments.datasets import load_dataset
from experiments.ledger import Ledger, settings_key
from experiments.networks import NETWORKS, Network, load_network
from experiments.protocols import DETERMINISTIC, METHODS, prune_arguments
from experiments.published import ACCURACY, DENSE, SOURCES
from experiments.recalibration import recalibrated_accuracy
from experiments.row_cache import RowCache
from experiments.trajectories import Trajectories, plain_arguments
from formulations.errors import CbsError

DEFAULT_OUT = Path("runs/paper_tables")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pruning run: a network, a method, a sparsity and a seed."""

    network: str
    method: str
    sparsity: float
    seed: int

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""
        arguments = prune_arguments(self.network, self.method, self.sparsity, self.seed)
        return {
            "network": self.network,
            "weights_sha256": DATA_FILES[f"{self.network}.safetensors"].sha256,
            "target": NETWORKS[self.network].target,
            "label": self.method,
            "arguments": plain_arguments(arguments),
            "version": cbs_opt.__version__,
            # One run in stages serves several cells.
            **({"at": self.sparsity} if self.method == "staged" else {}),
        }


class Bench:
    """One network and its data; keeps the gradient rows of the last seed for the cells that share them.

    Parameters
    ----------
    network : str
    data_dir : Path, optional
        See `experiments.data_files.data_directory`.
    verify : bool
        Check the files' SHA-256.
    progress : bool
        Show the bars of `prune`.
    runs : Path, optional
        Where runs in stages are kept, so that they can be gone on with.
    """

    def __init__(
        self, network: str, data_dir: Path | None, *, verify: bool, progress: bool, runs: Path | None = None
    ) -> None:
        self.network = network
        self.data_dir = data_dir
        self.verify = verify
        self.progress = progress
        spec = NETWORKS[network]
        self.data = load_dataset(spec.dataset, data_dir, mean=spec.mean, std=spec.std, verify=verify)
        self.rows = RowCache((self.data.train_x, self.data.train_y), progress=progress)
        self.trajectories = Trajectories(self.data, runs, progress=progress)
        self._dense: float | None = None

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Prune a fresh copy of the network and evaluate it on the test set."""
        network = load_network(self.network, self.data_dir, verify=self.verify)
        if cell.method == "staged":
            return self._passed(cell, network)
        arguments = prune_arguments(self.network, cell.method, cell.sparsity, cell.seed)
        recipes, rows = arguments["recipe"], None
        weights = Weights(target=network.target, blocks="global")
        if cell.method not in DETERMINISTIC:
            rows = self.rows.get(network, recipes[0], cell.seed)
            recipes = [replace(recipe, curvature=rows) for recipe in recipes]
        began = time.perf_counter()
        report = cbs_opt.prune(
            network.model,
            (self.data.train_x, self.data.train_y),
            sparsity=cell.sparsity,
            recipe=[replace(recipe, weights=weights) for recipe in recipes],
            seed=cell.seed,
            progress=self.progress,
        )
        seconds = time.perf_counter() - began
        after = self._test(network)
        block = report.blocks[0]
        return {
            "network": cell.network,
            "method": cell.method,
            "sparsity": cell.sparsity,
            "seed": cell.seed,
            "accuracy": 100.0 * (after.accuracy or 0.0),
            "accuracy_recalibrated": recalibrated_accuracy(network, network.model, self.data),
            "test_loss": after.loss,
            "dense_accuracy": self._dense_accuracy(),
            "train_loss": None if report.train_after is None else report.train_after.loss,
            "n": report.n,
            "n_prune": report.n_prune,
            "damping": report.damping,
            "update_scale": report.update_scale,
            "rows": report.rows,
            "swaps": block.iterations,
            "locally_optimal": block.locally_optimal,
            "selection_loss": report.predicted_selection_loss,
            "predicted_loss_increase": report.predicted_loss_increase,
            "seconds": seconds,
            "curvature_seconds": None if rows is None else rows.seconds,
            "phase_seconds": report.seconds,
            "peak_memory_bytes": report.peak_memory_bytes,
            "threads": torch.get_num_threads(),
            "settings": cell.settings(),
        }

    def _passed(self, cell: Cell, network: Network) -> dict[str, Any]:
        """Return the cell of a run in stages."""
        return {
            "network": cell.network,
            "method": cell.method,
            "sparsity": cell.sparsity,
            "seed": cell.seed,
            **self.trajectories.measure(network, cell.sparsity, cell.seed),
            "dense_accuracy": self._dense_accuracy(),
            "threads": torch.get_num_threads(),
            "settings": cell.settings(),
        }

    def _test(self, network: Network) -> Evaluation:
        test = (self.data.test_x, self.data.test_y)
        return evaluate(network.model, test, torch.nn.functional.cross_entropy)

    def _dense_accuracy(self) -> float:
        """Test accuracy before pruning, per cent; measured once."""
        if self._dense is None:
            network = load_network(self.network, self.data_dir, verify=self.verify)
            self._dense = 100.0 * (self._test(network).accuracy or 0.0)
        return self._dense


def cells(
    network: str, methods: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]
) -> Iterator[Cell]:
    """All cells of a table, seed by seed so that an interrupted run has whole tables of few seeds."""
    for seed, sparsity, method in itertools.product(seeds, sparsities, methods):
        if seed == 0 or method not in DETERMINISTIC:
            yield Cell(network=network, method=method, sparsity=sparsity, seed=seed)


def run(todo: Sequence[Cell], make_bench: Callable[[], Bench], ledger: Ledger) -> list[dict[str, Any]]:
    """Measure the cells that the ledger lacks; the results of all of them, in order."""
    keys = [settings_key(cell.settings()) for cell in todo]
    missing = [(key, cell) for key, cell in zip(keys, todo, strict=True) if key not in ledger]
    bench = make_bench() if missing else None
    with tqdm(total=len(todo), initial=len(todo) - len(missing), desc="cells", disable=None) as bar:
        for key, cell in missing:
            assert bench is not None
            bar.set_postfix_str(f"{cell.method} {cell.sparsity:g} seed {cell.seed}")
            result = bench.measure(cell)
            ledger.add(key, result)
            done = f"{cell.method} {cell.sparsity:g} seed {cell.seed}: {result['accuracy']:.2f} %"
            tqdm.write(f"{done} in {result['seconds']:.0f} s", file=sys.stderr)
            bar.update()
    return [ledger[key] for key in keys]


def document(network: str, frame: pd.DataFrame, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the table with every setting, ready for JSON."""
    rows = json.loads(frame.to_json(orient="records", double_precision=6))
    return {
        "network": network,
        "published_dense_accuracy": DENSE[network],
        "sources": dict(SOURCES),
        "rows": rows,
        "cells": list(results),
    }


def write(
    out: Path, network: str, methods: Sequence[str], results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write ``<network>.md``, ``.csv`` and ``.json`` to `out`; returns what the last one holds."""
    frame = accuracy_frame(results)
    table = document(network, frame, results)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{network}.md").write_text(markdown_tables(frame, network, methods), encoding="utf-8")
    frame.to_csv(out / f"{network}.csv", index=False)
    (out / f"{network}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return table


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = argparse.ArgumentParser(prog="python -m experiments.paper_tables", description=__doc__)
    root.formatter_class = argparse.RawDescriptionHelpFormatter
    root.add_argument("--network", required=True, choices=list(NETWORKS))
    root.add_argument("--sparsity", nargs="+", type=_sparsity, help="default: those of the published table")
    root.add_argument("--methods", nargs="+", choices=METHODS, default=["magnitude", "cbs"])
    root.add_argument("--seeds", type=_count, default=5, help="number of seeds (default 5)")
    root.add_argument("--first-seed", type=int, default=0, help="seeds from this one on (default 0)")
    root.add_argument("--data", type=Path, help="data directory (default: $CBS_OPT_DATA)")
    root.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default {DEFAULT_OUT}")
    root.add_argument("--json", action="store_true", help="print JSON rather than Markdown")
    root.add_argument("--no-verify", action="store_true", help="accept data files with other checksums")
    return root


def _sparsity(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    published = ACCURACY.get(given.network, ACCURACY["resnet20_cifar10"])
    sparsities = given.sparsity or sorted(published)
    todo = list(
        cells(
            given.network, given.methods, sparsities, range(given.first_seed, given.first_seed + given.seeds)
        )
    )

    def make_bench() -> Bench:
        quiet = not sys.stderr.isatty()
        return Bench(
            given.network,
            given.data,
            verify=not given.no_verify,
            progress=not quiet,
            runs=given.out / "stages",
        )

    try:
        results = run(todo, make_bench, Ledger(given.out / "results.jsonl"))
    except CbsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    table = write(given.out, given.network, given.methods, results)
    if given.json:
        sys.stdout.write(json.dumps(table, indent=1) + "\n")
    else:
        sys.stdout.write((given.out / f"{given.network}.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
