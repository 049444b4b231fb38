"""Estimated against measured peak memory of `prune`, with gradient rows in memory and on disk.

    python -m experiments.benchmarks.row_streaming --case digits --case wide

Every case runs in a process of its own: libraries are loaded and kernels compiled by a small run first, then
the peak of resident memory is reset when the size is known and read when the run ends. "increase" is what the
run added to the process as it was then; the estimate adds up the three largest arrays.

small      an MLP of 210 thousand weights: 168 MB of rows on a budget of 8 MB, OBS and CBS-U
digits     an MLP on scikit-learn's digits, one block, default options, rows in memory
wide       an MLP of a million weights: 800 MB of rows on a budget of 40 MB, OBS and CBS-U
wide_joint the same with greedy OBS on the joint program
large      the same network with 2 GB of rows on a budget of 100 MB
huge       an MLP of 12.5 million weights: 20 GB of rows on a budget of 1 GB, OBD and CBS-U
resnet20   ResNet20 by layers, joint swap search with the layer-input term; needs CBS_OPT_DATA
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import typer
from torch import Tensor, nn

import cbs_opt
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.demo import digits_data
from cbs_opt.recipe.records import Recipe, Weights, absolute
from cbs_opt.recipe.select import OBD, OBS, GreedyOBS
from cbs_opt.system.memory import peak, reset_peak, resident
from cbs_opt.system.resources import Resources
from experiments.datasets import load_dataset
from experiments.networks import load_network

Pair = tuple[Tensor, Tensor]
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, its data, and how it is pruned."""

    make: Callable[[], tuple[nn.Module, Pair]]
    recipe: Recipe
    resources: Resources = field(default_factory=Resources)


def mlp(*widths: int, seed: int = 0) -> nn.Module:
    """Return an untrained MLP: what its rows take does not depend on training."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def noise(samples: int, inputs: int, classes: int, seed: int = 1) -> Pair:
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, inputs, generator=generator),
        torch.randint(0, classes, (samples,), generator=generator),
    )


def _resnet20() -> tuple[nn.Module, Pair]:
    network = load_network("resnet20_cifar10")
    data = load_dataset(network.dataset, mean=network.mean, std=network.std)
    return network.model, (data.train_x[:2000].clone(), data.train_y[:2000].clone())


WIDE = Recipe(
    curvature=EmpiricalFisher(samples=200),
    select=OBS(program="selection"),
    damping=absolute(1e-3),
    weights=Weights(blocks=45_000),
    layer_inputs=0.0,
)
SPARSITY = 0.9


def _wide() -> tuple[nn.Module, Pair]:
    return mlp(1000, 950, 50), noise(600, 1000, 50)


CASES = {
    "digits": Case(make=lambda: (mlp(64, 128, 64, 10), digits_data()[0]), recipe=Recipe()),
    "small": Case(
        make=lambda: (mlp(400, 500, 20), noise(300, 400, 20)),
        recipe=replace(WIDE, weights=Weights(blocks=10_000)),
        resources=Resources(row_memory=8_000_000, chunk_memory=1 << 24),
    ),
    "wide": Case(make=_wide, recipe=WIDE, resources=Resources(row_memory=40_000_000)),
    "wide_joint": Case(
        make=_wide, recipe=replace(WIDE, select=GreedyOBS()), resources=Resources(row_memory=40_000_000)
    ),
    "large": Case(
        make=_wide,
        recipe=replace(WIDE, curvature=EmpiricalFisher(samples=500)),
        resources=Resources(row_memory=100_000_000),
    ),
    "huge": Case(
        make=lambda: (mlp(3000, 4100, 50), noise(600, 3000, 50)),
        recipe=replace(
            WIDE,
            curvature=EmpiricalFisher(samples=400),
            select=OBD(program="selection"),
            weights=Weights(blocks=500_000),
        ),
        resources=Resources(row_memory=1_000_000_000),
    ),
    "resnet20": Case(
        make=_resnet20,
        recipe=Recipe(
            curvature=EmpiricalFisher(samples=400), weights=Weights(blocks="layer"), layer_inputs=1.0
        ),
        resources=Resources(row_memory=100_000_000),
    ),
}


def measure(name: str, row_dir: str | None) -> dict[str, Any]:
    """Run a case in this process and compare its peak with the estimate."""
    case = CASES[name]
    _warm_up(case)
    model, data = case.make()
    resources = replace(case.resources, row_dir=row_dir)
    stated = cbs_opt.plan(model, data, sparsity=SPARSITY, recipe=case.recipe, resources=resources)
    reset_peak()
    before = resident()
    began = time.perf_counter()
    report = cbs_opt.prune(
        model, data, sparsity=SPARSITY, recipe=case.recipe, resources=resources, progress=False
    )
    seconds = time.perf_counter() - began
    most = peak()
    if most is None:
        raise SystemExit("this system does not tell the peak of resident memory")
    return {
        "case": name,
        "n": stated.n,
        "blocks": stated.blocks,
        "rows": stated.rows,
        "row_mib": stated.row_bytes / MIB,
        "budget_mib": (case.resources.row_memory or 0) / MIB,
        "on_disk": stated.row_dir is not None,
        "estimated_increase_mib": (stated.peak_bytes - stated.resident_bytes) / MIB,
        "increase_mib": (most - before) / MIB,
        "estimated_peak_mib": stated.peak_bytes / MIB,
        "peak_mib": most / MIB,
        "arrays_mib": {name: round(size / MIB, 1) for name, size in stated.arrays.items()},
        "sparsity": report.sparsity,
        "seconds": seconds,
    }


def _warm_up(case: Case) -> None:
    """Load what the case loads, in small."""
    small = replace(case.recipe, curvature=EmpiricalFisher(samples=20), weights=Weights(blocks="layer"))
    cbs_opt.prune(mlp(30, 80, 10), noise(400, 30, 10), sparsity=SPARSITY, recipe=small, progress=False)


def _in_process_of_its_own(name: str, row_dir: str | None) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (name, row_dir))


def main() -> None:
    """Print one line a case, as a table row or as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=list(CASES), help="all by default; repeatable")
    parser.add_argument("--row-dir", help="folder for rows on disk")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if not arguments.json:
        typer.echo(
            "| case | n x m | rows MiB | budget MiB | estimated +MiB | measured +MiB | ratio | peak MiB | s |"
        )
        typer.echo("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.case or CASES:
        found = _in_process_of_its_own(name, arguments.row_dir)
        if arguments.json:
            typer.echo(json.dumps(found))
            continue
        estimated, increase = found["estimated_increase_mib"], found["increase_mib"]
        seconds = found["seconds"]
        budget = f"{found['budget_mib']:.0f}" if found["on_disk"] else "in memory"
        typer.echo(
            f"| {name} | {found['n']} x {found['rows']} | {found['row_mib']:.0f} | {budget} "
            f"| {estimated:.0f} | {increase:.0f} | {estimated / increase:.2f} "
            f"| {found['peak_mib']:.0f} | {seconds:.0f} |",
        )


if __name__ == "__main__":
    main()
