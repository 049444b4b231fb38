"""One process of a two-process group: computes its shard and writes what the test compares."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cbs_opt import Partition, gradient_rows, solve_blocks
from cbs_opt.curvature.distributed import RowShard, owners, sharded_rows
from cbs_opt.errors import EmptyDataError, NonFiniteGradientError, PeerError
from tests.cbs_opt.small_network import data, network

CASES: dict[str, dict[str, Any]] = {
    "empirical": {"samples": 37},
    "averaged": {"samples": 50, "samples_per_row": 8},
    "exact": {"samples": 11, "curvature": "exact_fisher"},
    "monte_carlo": {"samples": 31, "curvature": "monte_carlo_fisher", "seed": 3},
    "sketched": {"samples": 30, "samples_per_row": 3, "curvature": "sketched_fisher", "seed": 3},
    "short_data": {"samples": 500},
    "one_row": {"samples": 5, "samples_per_row": 5},
    "loader": {"samples": 37},
}
DAMPING = 1e-3


def inputs(case: str) -> Any:
    """The data of a case in float64."""
    x, y = data(dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), batch_size=7) if case == "loader" else (x, y)


def compare(case: str, rank: int) -> dict[str, Tensor]:
    """The largest differences from one process, relative to the largest entry."""
    model = network(dtype=torch.float64)
    partition = Partition.from_model(model, blocks="row")
    options = {**CASES[case], "progress": False}
    given = inputs(case)
    alone = gradient_rows(model, given, cross_entropy, partition, **options)
    shard = sharded_rows(model, given, cross_entropy, partition, **options)
    first = sum(shard.counts[:rank])
    own = alone.rows[first : first + shard.counts[rank]]
    found = {
        "rows": far(shard.rows, own),
        "gradient": far(shard.gradient, alone.gradient),
        "total": torch.tensor(float(shard.m != alone.rows.shape[0] or shard.samples != alone.samples)),
        "held": torch.tensor(float(shard.rows.shape[0])),
    }
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(partition.n, 2, dtype=torch.float64, generator=generator)
    expected = alone.rows.T @ (alone.rows @ direction) + DAMPING * direction
    found["product"] = far(shard.hessian_product(direction, DAMPING), expected)
    found["blocks"] = blocks_differ(shard, partition, partition.flatten(model), alone.rows, rank)
    return {name: value.double().reshape(()) for name, value in found.items()}


def blocks_differ(shard: RowShard, partition: Partition, weights: Tensor, rows: Tensor, rank: int) -> Tensor:
    """How far the reduced blocks are from those of all rows; infinite if a block is with the wrong owner."""
    own = shard.blocks(partition, weights, DAMPING)
    chosen = owners(partition.blocks, 2)
    if set(own) != {number for number, owner in enumerate(chosen) if owner == rank}:
        return torch.tensor(torch.inf)
    worst = torch.tensor(0.0, dtype=torch.float64)
    for number, block in own.items():
        span = partition.blocks[number]
        columns = rows[:, span.start : span.stop].double()
        worst = torch.maximum(worst, far(block.hessian.dense(), columns.T @ columns))
    return worst


def far(one: Tensor, other: Tensor) -> Tensor:
    if one.shape != other.shape:
        return torch.tensor(torch.inf)
    scale = other.abs().max().clamp_min(1e-30) if other.numel() else torch.tensor(1.0)
    return ((one - other).abs().max() / scale) if other.numel() else torch.tensor(0.0)


def solved(rank: int) -> dict[str, Tensor]:
    """The pruned set of all blocks, each solved where it was reduced, and of one process."""
    model = network(dtype=torch.float64)
    partition = Partition.from_model(model, blocks="row")
    shard = sharded_rows(
        model, data(dtype=torch.float64), cross_entropy, partition, samples=40, progress=False
    )
    own = shard.blocks(partition, partition.flatten(model), DAMPING)
    problems = [block.to_problem(block.n // 2) for block in own.values()]
    solutions = solve_blocks(problems, "branch_and_bound", program="joint", seed=0)
    pruned = {number: torch.tensor(~s.keep) for number, s in zip(own, solutions, strict=True)}
    return {"pruned": shard.joined(partition, pruned)}


def failures(rank: int) -> dict[str, Tensor]:
    """1 where this process raised what it should: its own error, or that of its peer."""
    model = network()
    partition = Partition.from_model(model)
    x, y = data()
    x[-1] = torch.nan
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    expected = NonFiniteGradientError if rank == 1 else PeerError
    seen = {}
    try:
        sharded_rows(model, loader, cross_entropy, partition, samples=60, progress=False)
        seen["peer"] = torch.tensor(0.0)
    except expected:
        seen["peer"] = torch.tensor(1.0)
    try:
        sharded_rows(model, [], cross_entropy, partition, samples=60, progress=False)
        seen["empty"] = torch.tensor(0.0)
    except EmptyDataError:
        seen["empty"] = torch.tensor(1.0)
    return seen


def main(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        results = {f"{case}.{name}": value for case in CASES for name, value in compare(case, rank).items()}
        results |= {f"solved.{name}": value for name, value in solved(rank).items()}
        results |= {f"failures.{name}": value for name, value in failures(rank).items()}
        save_file(results, folder / f"rank{rank}.safetensors")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
