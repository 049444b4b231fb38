"""Build the blocks that ship with `formulations`: real ones, with records.

- cut from the digits network. The rows of a block are replaced by the R factor of their QR factorisation,
  which has the same ``R^T R`` to rounding and at most n rows, so the files stay small;
- rows of two layers of a language model over the second moments of their first 64 inputs: full rank.

Every block is solved by branch and bound for both programs, for so many of all its weights at each sparsity
and for patterns; optimum, bound and how they were found go into the index.

    python -m experiments.build_library formulations/library --time-limit 60 --data DATA
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
from formulations.instances import read_instance, write_instance
from formulations.support import Count, Groups, NofM, Support

logger = logging.getLogger(__name__)

SIZES = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SPARSITIES = (0.5, 0.8, 0.9)
HIDDEN = (64, 64)
LAYER = "2.weight"
SAMPLES = 1000
DAMPING = 1e-5
REL_GAP = 1e-6
PATTERN_SIZES = (16, 32, 64, 128)
"""Blocks of the digits network that are posed with patterns too."""
GRAM_FILES = {"gate": "smollm2_l10_gate.npz", "o": "smollm2_l10_o.npz"}
"""Second moments and rows of two layers, in the folder gram_rows of the data."""
GRAM_INPUTS = 64
GRAM_DAMPING = 0.01
"""Share of the mean diagonal."""


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


def patterns(n: int) -> dict[str, Support]:
    """Return the patterns that a block of `n` weights is posed with, by the end of their names."""
    return {"2of4": NofM(2, 4), "1of4": NofM(1, 4), "groups4": Groups(np.arange(n) // 4, n // 8)}


def gram_problem(path: Path, name: str, row: int = 0) -> BlockProblem:
    """Return a row of a layer over its first `GRAM_INPUTS` inputs; `n_prune` 0.

    The file has arrays ``M`` (n, n), second moments of the inputs, and ``W`` (rows, n), weights.
    """
    with np.load(path) as data:
        moments = np.asarray(data["M"], dtype=np.float64)[:GRAM_INPUTS, :GRAM_INPUTS]
        weights = np.asarray(data["W"], dtype=np.float64)[row, :GRAM_INPUTS]
    moments = 0.5 * (moments + moments.T)
    damping = GRAM_DAMPING * float(np.diagonal(moments).mean())
    return BlockProblem(weights=weights, hessian=moments, damping=damping, n_prune=0, name=name)


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


def entry(problem: BlockProblem, file: str, time_limit: float) -> dict[str, Any]:
    """Return what the index says of a block and its support."""
    support = {} if problem.support is None else {"support": problem.support.as_json()}
    return {
        "file": file,
        "n_prune": problem.n_prune,
        **support,
        **{program: record(problem, program, time_limit) for program in ("selection", "joint")},
    }


def add_patterns(folder: Path, sizes: Sequence[int], time_limit: float, data: Path | None) -> dict[str, Any]:
    """Add the blocks with patterns to the index, and with `data` those of the language model; return it.

    The files of the digits network are those that lie in the folder.
    """
    index: dict[str, Any] = json.loads((folder / "index.json").read_text())
    for n in sizes:
        file = f"digits_{n}.npz"
        problem, _ = read_instance(folder / file)
        for end, support in patterns(n).items():
            posed = replace(problem, n_prune=None, support=support)
            index[f"digits_{n}_{end}"] = entry(posed, file, time_limit)
    for layer, source in GRAM_FILES.items() if data is not None else ():
        assert data is not None
        name = f"gram_{layer}_{GRAM_INPUTS}"
        problem = gram_problem(data / "gram_rows" / source, name)
        origin = {
            "network": f"SmolLM2-135M-Instruct, layer 10, {layer}_proj, row 0, first {GRAM_INPUTS} inputs",
            "samples": "16 384 tokens of WikiText-2",
            "curvature": "second moments of the inputs",
            "licence": "Apache-2.0",
        }
        write_instance(folder / f"{name}.npz", problem, origin)
        posed = {"s50": Count(GRAM_INPUTS // 2), "2of4": NofM(2, 4), "4of8": NofM(4, 8)}
        for end, support in posed.items():
            block = replace(problem, n_prune=None, support=support)
            index[f"{name}_{end}"] = entry(block, f"{name}.npz", time_limit)
    write_atomically(folder / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    return index


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
            index[f"{problem.name}_s{round(100 * sparsity)}"] = entry(
                posed, f"{problem.name}.npz", time_limit
            )
        write_atomically(folder / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    return index


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write the files and index.json.")],
    time_limit: Annotated[float, typer.Option(help="Seconds a program.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the network and its data.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Data folder with gram_rows; without it none of these.")
    ] = None,
    patterns_only: Annotated[bool, typer.Option(help="Add patterns to the blocks that lie there.")] = False,
) -> None:
    """Build the shipped blocks and solve them."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not patterns_only:
        build_library(folder, SIZES, time_limit, seed)
    add_patterns(folder, PATTERN_SIZES, time_limit, data)


if __name__ == "__main__":
    typer.run(main)
