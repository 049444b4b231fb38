"""Whole networks pruned by the default recipe with a certificate, the layer-input term in the model.

    python -m experiments.benchmarks.certified_default --network mlpnet_mnist --sparsity .9 .5 .98

A cell is ``prune(model, training images, sparsity=s, certify=True)`` on the weights that the literature
prunes, ``--blocks global`` or a block a layer. Its blocks are written to disk for the time of the cell, and
every certificate is checked against its block when the memory has been measured: one product with H and a
Cholesky factorisation a channel. Processor seconds are those of the whole process, with one thread. Each cell
is appended to ``OUT/results.jsonl`` as it is done: the same command goes on where it was stopped. Prints a
Markdown table.

Exit codes: 0 all verified, 1 an error or a certificate that does not verify, 2 a usage error.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cbs_opt
from cbs_opt.certify.files import block_path
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import Certify, Weights
from cbs_opt.report.parts import BlockSummary
from cbs_opt.system.progress import Advance, Progress, ignored
from cbs_opt.system.threads import thread_limit
from experiments.benchmarks.swap_search import PeakMemory
from experiments.command_line import add_no_verify, add_run_options, experiment_parser
from experiments.data_files import DATA_FILES
from experiments.datasets import load_dataset
from experiments.ledger import Ledger, commit, settings_key
from experiments.networks import NETWORKS, load_network
from formulations import BlockProblem, BlockSolution
from formulations.errors import CbsError
from formulations.instances import read_instance

DEFAULT_OUT = Path("runs/certified_default")
HEAD = ("network", "block", "sparsity", "weights", "objective", "bound", "gap, %")
COSTS = ("processor s", "of which certificate", "peak GiB", "verified")


class CertificateClock(Progress):
    """Processor seconds of the certificates of a run, in `seconds`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, unit: str, done: int = 0) -> Iterator[Advance]:
        """Time the phase if it is that of the certificates."""
        began = time.process_time()
        yield ignored
        if name == "certificates":
            self.seconds += time.process_time() - began


def settings(network: str, sparsity: float, blocks: str, seed: int) -> dict[str, Any]:
    """Return everything that decides a cell, as plain values."""
    return {
        "network": network,
        "weights_sha256": DATA_FILES[f"{network}.safetensors"].sha256,
        "target": NETWORKS[network].target,
        "sparsity": sparsity,
        "blocks": blocks,
        "seed": seed,
        "version": cbs_opt.__version__,
    }


def measure(cell: Mapping[str, Any], data_dir: Path | None, verify: bool) -> dict[str, Any]:
    """Prune a fresh copy of the network, certify it, and check every certificate against its block."""
    network = load_network(cell["network"], data_dir, verify=verify)
    data = load_dataset(network.dataset, data_dir, mean=network.mean, std=network.std, verify=verify)
    weights = Weights(target=network.target, blocks=cell["blocks"])
    with tempfile.TemporaryDirectory() as folder:
        clock, began = CertificateClock(), time.process_time()
        with PeakMemory() as memory:
            report = cbs_opt.prune(
                network.model,
                (data.train_x, data.train_y),
                sparsity=cell["sparsity"],
                recipe=Named(weights=weights),
                certify=Certify(block_dir=folder),
                seed=cell["seed"],
                progress=clock,
            )
        seconds = time.process_time() - began
        certified = [
            _block(read_instance(block_path(folder, number))[0], report.blocks[number], solution)
            for number, solution in enumerate(report.certificates)
        ]
    assert report.certified is not None
    return {
        **cell,
        "n": report.n,
        "program": report.program,
        "objective": report.certified.objective,
        "bound": report.certified.bound,
        "gap": report.certified.gap,
        "blocks_certified": certified,
        "verified": all(block["verified"] for block in certified),
        "processor_seconds": seconds,
        "certificate_processor_seconds": clock.seconds,
        "peak_memory_bytes": memory.before + memory.beyond,
        "choices": list(report.choices),
        "commit": commit(),
    }


def _block(problem: BlockProblem, summary: BlockSummary, solution: BlockSolution) -> dict[str, Any]:
    checked = cbs_opt.verify(problem, solution)
    return {
        "name": summary.name,
        "n": summary.n,
        "objective": summary.objective,
        "bound": summary.bound,
        "gap": summary.gap,
        "status": summary.certificate_status,
        "verified": checked.ok and bool(checked.bound_checked),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: a line a cell, and below it a line a block where there are several."""
    head = (*HEAD, *COSTS)
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for cell in results:
        blocks = cell["blocks_certified"]
        costs = [
            f"{cell['processor_seconds']:.0f}",
            f"{cell['certificate_processor_seconds']:.0f}",
            f"{cell['peak_memory_bytes'] / 2**30:.1f}",
            "yes" if cell["verified"] else "NO",
        ]
        name = "all" if len(blocks) == 1 else f"sum of {len(blocks)}"
        lines.append(_line(cell, cell, name, costs))
        if len(blocks) > 1:
            lines += [
                _line(cell, block, block["name"], ["", "", "", "yes" if block["verified"] else "NO"])
                for block in blocks
            ]
    return "\n".join(lines) + "\n"


def _line(cell: Mapping[str, Any], what: Mapping[str, Any], name: str, costs: list[str]) -> str:
    bound = "none" if what["bound"] is None else f"{what['bound']:.4g}"
    gap = "" if what["gap"] is None else f"{100.0 * what['gap']:.1f}"
    values = [f"{what['n']:,}", f"{what['objective']:.4g}", bound, gap]
    return "| " + " | ".join([cell["network"], name, f"{cell['sparsity']:g}", *values, *costs]) + " |"


def main(arguments: list[str] | None = None) -> int:
    """Measure what the ledger does not have and print the table."""
    root = experiment_parser("benchmarks.certified_default", __doc__)
    root.add_argument("--network", required=True, choices=list(NETWORKS))
    root.add_argument("--sparsity", nargs="+", type=float, default=[0.9])
    root.add_argument("--blocks", choices=("global", "layer"), default="global")
    add_run_options(root, seeds=1, out=DEFAULT_OUT)
    add_no_verify(root)
    given = root.parse_args(arguments)
    ledger, results = Ledger(given.out / "results.jsonl"), []
    try:
        with thread_limit(1):
            for seed in range(given.seeds):
                for sparsity in given.sparsity:
                    cell = settings(given.network, sparsity, given.blocks, seed)
                    key = settings_key(cell)
                    if key not in ledger:
                        ledger.add(key, measure(cell, given.data, not given.no_verify))
                    results.append(ledger[key])
    except CbsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(table(results))
    return 0 if all(cell["verified"] for cell in results) else 1


if __name__ == "__main__":
    sys.exit(main())
