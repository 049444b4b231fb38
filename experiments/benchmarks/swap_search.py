"""Swap search and update on whole networks: time and memory to a proved 1-swap optimum.

    python -m experiments.benchmarks.swap_search --network resnet20_cifar10 --sparsity .9

Prints one JSON line: seconds of the search and of the update, swaps, the objective before and after, and
the peak memory beyond the gradient rows. The block is the whole network, the rows are `--rows` single
training samples, the damping is that of the CBS paper for the network, and the gradient is left out as there
and as `prune` does by default (`--gradient-term` puts it in).
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import cbs_opt
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.saliency import magnitude, without_lowest
from cbs_opt.select.selection_program.program import SelectionProgram
from cbs_opt.select.selection_program.swap_search import swap_search
from cbs_opt.update.cbs import cbs_update
from experiments.datasets import load_dataset
from experiments.networks import NETWORKS, load_network
from formulations.errors import CbsError

DAMPING = {"mlpnet_mnist": 1e-3, "resnet20_cifar10": 1e-5, "resnet20a_cifar10": 1e-5}
SAMPLING_SECONDS = 0.05


STATM = Path("/proc/self/statm")
PAGE = 4096


class PeakMemory:
    """Peak resident memory of this process beyond what it was on entry, in bytes (Linux; else 0)."""

    def __enter__(self) -> PeakMemory:
        self.before = _resident()
        self.beyond = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(SAMPLING_SECONDS):
            self.beyond = max(self.beyond, _resident() - self.before)


def _resident() -> int:
    return int(STATM.read_text().split()[1]) * PAGE if STATM.exists() else 0


def whole_network(
    network: str, rows: int, seed: int, data_dir: Path | None, samples_per_row: int = 1
) -> FisherBlock:
    """Return the weights and gradient rows of a network as one block."""
    spec = NETWORKS[network]
    data = load_dataset(spec.dataset, data_dir, mean=spec.mean, std=spec.std)
    loaded = load_network(network, data_dir)
    return cbs_opt.fisher_blocks(
        loaded.model,
        (data.train_x, data.train_y),
        loss_fn=torch.nn.functional.cross_entropy,
        partition="global",
        target=loaded.target,
        curvature=cbs_opt.EmpiricalFisher(samples=rows * samples_per_row, per_row=samples_per_row),
        damping=DAMPING[network],
        seed=seed,
    )[0]


def measure(block: FisherBlock, sparsity: float) -> dict[str, Any]:
    """Search from the magnitude set and update; what it took."""
    n_prune = round(sparsity * block.n)
    start = without_lowest(magnitude(block), n_prune)
    program = SelectionProgram(block)
    swap_search(program, start, max_swaps=1)  # compiles the kernels
    with PeakMemory() as memory:
        found = swap_search(program, start)
        began = time.perf_counter()
        cbs_update(block, found.keep)
        update_seconds = time.perf_counter() - began
    return {
        "n": block.n,
        "n_prune": int((~found.keep).sum()),
        "swaps": found.swaps,
        "locally_optimal": found.locally_optimal,
        "objective_before": found.initial_value,
        "objective_after": found.value,
        "search_seconds": round(found.seconds, 2),
        "update_seconds": round(update_seconds, 2),
        "peak_gib_beyond_rows": round(memory.beyond / 2**30, 2),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.swap_search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--network", choices=sorted(DAMPING), default="resnet20_cifar10")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gradient-term", action="store_true", help="keep the gradient in the model")
    parser.add_argument("--data", type=Path, help="data directory (default: $CBS_OPT_DATA)")
    given = parser.parse_args()
    try:
        block = whole_network(given.network, given.rows, given.seed, given.data)
    except CbsError as error:
        raise SystemExit(f"error: {error}") from error
    if not given.gradient_term:
        block = replace(block, gradient=None)
    for sparsity in given.sparsity:
        result = {
            "network": given.network,
            "sparsity": sparsity,
            "gradient_term": given.gradient_term,
            **measure(block, sparsity),
        }
        print(json.dumps(result), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
