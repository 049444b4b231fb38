"""Whole networks pruned to proven optimality: fix weights by the bound, search the rest exhaustively.

    python -m experiments.benchmarks.closed_networks --damping 1e-2 --sparsity .98

A network is one block of the joint program. Its relaxation gives a bound, a joint swap search an
incumbent; both together fix most weights; branch and bound takes what is left, and its bound is carried
back to the block with a proved allowance for rounding. Prints one JSON line a sparsity.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbs_opt
from experiments.benchmarks.certified_cases import NetworkBlocks, Source
from experiments.networks import NETWORKS
from formulations import BlockProblem, Limits
from formulations.branch_and_bound import branch_and_bound
from formulations.errors import CbsError
from formulations.relaxations import reduce_block

LARGEST_LEFT = 600
"""Most free weights that are handed to branch and bound."""


def close(problem: BlockProblem, time_limit: float, seed: int) -> dict[str, Any]:
    """Bound, search, fix and, if at most 600 weights are left free, branch; what came of it.

    Parameters
    ----------
    problem : BlockProblem
    time_limit : float
        Seconds for each of the four.
    seed : int
    """
    began = time.perf_counter()
    limits = Limits(time_limit=time_limit, seed=seed)
    relaxed = cbs_opt.lower_bound(problem, "joint", limits=limits)
    found = cbs_opt.solve(
        problem, "swap_search", program="joint", incumbent=relaxed, time_limit=time_limit, seed=seed
    )
    warm = replace(found, certificate=relaxed.certificate)
    solution = cbs_opt.lower_bound(problem, "joint", limits=limits, incumbent=warm, fix=True)
    root_gap = solution.gap
    certificate = solution.certificate
    n_free = problem.n - (0 if certificate is None else certificate.n_fixed)
    if certificate is not None and 0 < n_free <= LARGEST_LEFT:
        reduced = reduce_block(problem, solution)
        branched = reduced.lift(branch_and_bound(reduced.problem, "joint", limits=limits))
        solution = min(branched, solution, key=lambda candidate: candidate.gap)
    checked = cbs_opt.verify(problem, solution)
    return {
        "n": problem.n,
        "n_prune": problem.n_prune,
        "n_free": n_free,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap_before_branching": root_gap,
        "gap": solution.gap,
        "proved_optimal": solution.proved,
        "verified": not checked.wrong,
        "notes": list(checked.notes),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.closed_networks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", choices=sorted(NETWORKS), default="mlpnet_mnist")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.98])
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--samples-per-row", type=int, default=16)
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="data directory (default: $CBS_OPT_DATA)")
    given = parser.parse_args()
    source = Source(rows=given.rows, samples_per_row=given.samples_per_row, seed=given.seed, data=given.data)
    blocks = NetworkBlocks(given.network, "global", source)
    for sparsity in given.sparsity:
        try:
            problem = next(iter(blocks.measurements(given.damping, sparsity))).build()
        except CbsError as error:
            raise SystemExit(f"error: {error}") from error
        result = {"network": given.network, "damping": given.damping, "sparsity": sparsity}
        result |= close(problem, given.time_limit, given.seed)
        print(json.dumps(result), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
