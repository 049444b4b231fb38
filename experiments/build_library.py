"""Build the blocks that ship with `formulations`: real ones, cut from the digits network, with records.

The rows of a block are replaced by the R factor of their QR factorisation, which has the same
``R^T R`` to rounding and at most n rows, so the files stay small. Every block is solved by branch and
bound for both programs at each sparsity; optimum, bound and how they were found go into the index.

    python -m experiments.build_library formulations/library --time-limit 60
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from cbs_opt.curvature.fisher import fisher_blocks
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.demo import digits_network
from cbs_opt.hessian.block import FisherBlock
from formulations import BlockProblem, Limits, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.files import write_atomically
from formulations.instances import write_instance

logger = logging.getLogger(__name__)

SIZES = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SPARSITIES = (0.5, 0.8, 0.9)
HIDDEN = (64, 64)
LAYER = "2.weight"
SAMPLES = 1000
DAMPING = 1e-5
REL_GAP = 1e-6


def layer_block(n: int, seed: int = 0) -> FisherBlock:
    """Return the block of `n` consecutive weights of the hidden layer that has the median Fisher trace."""
    model, train, _ = digits_network(seed=seed, hidden=HIDDEN)
    blocks = fisher_blocks(
        model,
        train,
        loss_fn=torch.nn.functional.cross_entropy,
        target=LAYER,
        partition=n,
        curvature=EmpiricalFisher(samples=SAMPLES),
        damping=DAMPING,
        seed=seed,
        progress=False,
    )
    whole = sorted((block for block in blocks if block.n == n), key=_trace)
    return whole[len(whole) // 2]


def digits_problem(n: int, seed: int = 0) -> BlockProblem:
    """`layer_block` with its rows reduced to a triangle; `n_prune` 0."""
    problem = layer_block(n, seed).to_problem(0)
    assert problem.rows is not None
    return BlockProblem(
        weights=problem.weights,
        rows=np.asarray(np.linalg.qr(problem.rows, mode="r"), dtype=np.float64),
        damping=problem.damping,
        n_prune=0,
        name=f"digits_{n}",
    )


def _trace(block: FisherBlock) -> float:
    return float(block.hessian.diagonal().sum())


def record(problem: BlockProblem, program: str, time_limit: float) -> dict[str, Any]:
    """Solve one program and return what the index says about it, verified."""
    solution = branch_and_bound(problem, program, limits=Limits(time_limit=time_limit, rel_gap=REL_GAP))
    if verify(problem, solution).wrong:
        raise RuntimeError(f"{problem.name} {program}: the solution does not verify")
    logger.info("%s %s gap %.2e in %.1f s", problem.name, program, solution.gap, solution.stats.seconds)
    return {
        "objective": solution.objective,
        "bound": solution.bound,
        "proved": solution.proved,
        "rel_gap": solution.rel_gap,
        "method": solution.method,
    }


def build_library(folder: Path, sizes: Sequence[int], time_limit: float, seed: int = 0) -> dict[str, Any]:
    """Write one file a size and the index with one entry a size and sparsity; return the index."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    for n in sizes:
        problem = digits_problem(n, seed)
        origin = {
            "network": f"digits perceptron 64-{'-'.join(map(str, HIDDEN))}-10, layer {LAYER}",
            "samples": SAMPLES,
            "curvature": "empirical_fisher",
            "reduction": "R factor of the rows",
            "seed": seed,
        }
        write_instance(folder / f"{problem.name}.npz", problem, origin)
        for sparsity in SPARSITIES:
            posed = replace(problem, n_prune=round(sparsity * n))
            index[f"{problem.name}_s{round(100 * sparsity)}"] = {
                "file": f"{problem.name}.npz",
                "n_prune": posed.n_prune,
                **{program: record(posed, program, time_limit) for program in ("selection", "joint")},
            }
        write_atomically(folder / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    return index


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write the files and index.json.")],
    time_limit: Annotated[float, typer.Option(help="Seconds a program.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the network and its data.")] = 0,
) -> None:
    """Build the shipped blocks and solve them."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build_library(folder, SIZES, time_limit, seed)


if __name__ == "__main__":
    typer.run(main)
