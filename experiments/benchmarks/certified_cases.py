"""Blocks whose gaps are certified: trained networks, a digits layer, and synthetic ones of chosen rank.

A case is a block before its pruned count and damping are chosen, so that one set of gradient rows serves
many measurements. Rows of networks have no gradient term, as at a trained minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cbs_opt
from cbs_opt.hessian.block import FisherBlock
from experiments.benchmarks.digits_blocks import HIDDEN, digits_block
from experiments.datasets import load_dataset
from experiments.networks import NETWORKS, load_network
from formulations import BlockProblem
from formulations.problem import FloatArray

SPARSITIES = (0.5, 0.8, 0.9)
GRID_N = 512
GRID_RHO = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
GRID_RANKS = (8, 32, 128, 512, 2048)
"""Gaussian rows of the grid's blocks: few rows make a low rank."""
GRID_SPARSITY = 0.8
GRID_DIGITS = (512, 2048, 8192, HIDDEN * HIDDEN)
GRID_DAMPING = (1e-3, 1e-4, 1e-5, 1e-6)
SYNTHETIC_N, SYNTHETIC_ROWS, SYNTHETIC_RHO = 1_000_000, 500, 0.1
SYNTHETIC_SIZES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the largest block at which the cost of a step is measured."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the blocks come from.

    Attributes
    ----------
    rows : int
        Gradient rows of a network.
    samples_per_row : int, optional
        Samples averaged in each; by default 16 for MLPNet and 1 for ResNet20.
    seed : int
        Of the samples and of every random block.
    scale : float
        Shrinks the sizes of blocks that have no fixed one, to try a case.
    data : Path, optional
    """

    rows: int = 1000
    samples_per_row: int | None = None
    seed: int = 0
    scale: float = 1.0
    data: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One block, program "joint", to be certified.

    Attributes
    ----------
    block : str
        Name in tables.
    sparsity, damping : float
    build : callable
        Makes the problem; it may be large.
    mark_gap, mark_seconds : float or None
        What is to be reached: relative gap, and time for bound and incumbent together.
    settings : dict
        What else the result depends on; with the fields above it is the key under which the result
        is kept.
    step_cost : bool
        Whether the cost of one step of the relaxation is measured too.
    """

    block: str
    sparsity: float
    damping: float
    build: Callable[[], BlockProblem]
    mark_gap: float | None = None
    mark_seconds: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    step_cost: bool = False


def mlpnet(source: Source) -> Iterator[Measurement]:
    """MLPNet as one block of 32 360 weights."""
    marks = {1e-3: {0.5: 2e-4, 0.9: 2e-4, 0.98: 2e-3}, 1e-2: {0.5: 4e-4, 0.9: 4e-4, 0.98: 4e-4}}
    blocks = NetworkBlocks("mlpnet_mnist", "global", source, default_samples_per_row=16)
    for damping, gaps in marks.items():
        for sparsity, gap in gaps.items():
            yield from blocks.measurements(damping, sparsity, mark_gap=gap, mark_seconds=120.0)


def resnet20_layers(source: Source) -> Iterator[Measurement]:
    """ResNet20, each of the 18 block convolutions a block."""
    blocks = NetworkBlocks("resnet20_cifar10", "layer", source)
    for damping in (1e-3, 1e-4):
        yield from blocks.measurements(damping, 0.9)


def resnet20_global(source: Source) -> Iterator[Measurement]:
    """ResNet20 as one block of 267 264 weights."""
    blocks = NetworkBlocks("resnet20_cifar10", "global", source)
    yield from blocks.measurements(1e-3, 0.9, mark_seconds=600.0)


def digits(source: Source) -> Iterator[Measurement]:
    """Yield the 128-128 layer of a digits network as one block of 16 384 weights."""
    n = HIDDEN * HIDDEN
    for sparsity in SPARSITIES:
        yield _digits(n, 1e-5, sparsity, source, mark_gap=3e-4, mark_seconds=60.0)


def grid(source: Source) -> Iterator[Measurement]:
    """Synthetic blocks over damping and rank, then digits blocks over damping and size."""
    for rank in GRID_RANKS:
        for rho in GRID_RHO:
            yield Measurement(
                block=f"synthetic rank {rank}",
                sparsity=GRID_SPARSITY,
                damping=rho,
                build=lambda rank=rank, rho=rho: gaussian_block(  # type: ignore[misc]
                    GRID_N, rank, rho, GRID_SPARSITY, seed=source.seed
                ),
                settings={"n": GRID_N, "rows": rank, "seed": source.seed},
            )
    for n in GRID_DIGITS:
        for damping in GRID_DAMPING:
            yield _digits(n, damping, GRID_SPARSITY, source)


def synthetic(source: Source) -> Iterator[Measurement]:
    """Gaussian rows, up to 10^6 weights: memory, and the cost of a step against n."""
    for share in SYNTHETIC_SIZES:
        n = round(SYNTHETIC_N * share * source.scale)
        m = max(2, round(SYNTHETIC_ROWS * math.sqrt(source.scale)))
        yield Measurement(
            block=f"synthetic {n:,} x {m}",
            sparsity=0.9,
            damping=SYNTHETIC_RHO,
            build=lambda n=n, m=m: gaussian_block(n, m, SYNTHETIC_RHO, 0.9, seed=source.seed),  # type: ignore[misc]
            settings={"n": n, "rows": m, "seed": source.seed},
            step_cost=True,
        )


CASES: dict[str, Callable[[Source], Iterator[Measurement]]] = {
    "mlpnet": mlpnet,
    "digits": digits,
    "resnet20_layers": resnet20_layers,
    "resnet20_global": resnet20_global,
    "synthetic": synthetic,
    "grid": grid,
}


class NetworkBlocks:
    """Blocks of a trained network; the gradient rows are taken when the first is built.

    Parameters
    ----------
    network : str
        Name in `experiments.networks`.
    partition : {"global", "layer"}
    source : Source
    default_samples_per_row : int, default 1
    """

    def __init__(
        self, network: str, partition: str, source: Source, *, default_samples_per_row: int = 1
    ) -> None:
        self.network = network
        self.partition = partition
        self.source = source
        self.samples_per_row = source.samples_per_row or default_samples_per_row
        self.target = NETWORKS[network].target
        self._blocks: list[FisherBlock] | None = None

    def measurements(self, damping: float, sparsity: float, **marks: float) -> Iterator[Measurement]:
        """One a block."""
        for number, name in enumerate(self._names()):
            yield Measurement(
                block=name,
                sparsity=sparsity,
                damping=damping,
                build=lambda number=number: self._problem(number, damping, sparsity),  # type: ignore[misc]
                settings={
                    "network": self.network,
                    "rows": self.source.rows,
                    "samples_per_row": self.samples_per_row,
                    "seed": self.source.seed,
                },
                **marks,
            )

    def _names(self) -> list[str]:
        if self.partition == "global":
            return [self.network]
        parts = cbs_opt.Partition.from_model(
            NETWORKS[self.network].build(), target=self.target, blocks=self.partition
        )
        return [block.name for block in parts.blocks]

    def _problem(self, number: int, damping: float, sparsity: float) -> BlockProblem:
        block = replace(self._rows()[number], damping=damping, gradient=None)
        return block.to_problem(round(sparsity * block.n))

    def _rows(self) -> list[FisherBlock]:
        if self._blocks is None:
            spec = NETWORKS[self.network]
            data = load_dataset(spec.dataset, self.source.data, mean=spec.mean, std=spec.std)
            self._blocks = cbs_opt.fisher_blocks(
                load_network(self.network, self.source.data).model,
                (data.train_x, data.train_y),
                loss_fn=torch.nn.functional.cross_entropy,
                partition=self.partition,
                target=self.target,
                curvature=cbs_opt.EmpiricalFisher(
                    samples=self.source.rows * self.samples_per_row, per_row=self.samples_per_row
                ),
                seed=self.source.seed,
            )
        return self._blocks


def gaussian_block(n: int, m: int, rho: float, sparsity: float, *, seed: int) -> BlockProblem:
    """Independent Gaussian rows: rank ``min(m, n)``, effective rank near ``m n / (m + n)``.

    Parameters
    ----------
    n, m : int
        Weights and rows.
    rho : float
        Damping over the mean Fisher diagonal.
    sparsity : float
    seed : int

    Returns
    -------
    BlockProblem
        Its rows are not copied: 8 m n bytes in all.
    """
    generator = np.random.default_rng(seed)
    rows: FloatArray = np.empty((m, n))
    for row in rows:
        generator.standard_normal(out=row)
    rows /= math.sqrt(m)
    trace = sum(float(row @ row) for row in rows)
    rows.flags.writeable = False
    return BlockProblem(
        weights=0.1 * generator.standard_normal(n),
        rows=rows,
        damping=rho * trace / n,
        n_prune=round(sparsity * n),
        name=f"gaussian n={n} m={m} rho={rho:g}",
    )


def _digits(n: int, damping: float, sparsity: float, source: Source, **marks: float) -> Measurement:
    return Measurement(
        block=f"digits {n}",
        sparsity=sparsity,
        damping=damping,
        build=lambda: digits_block(n, damping, round(sparsity * n), samples=source.rows, seed=source.seed),
        settings={"n": n, "rows": source.rows, "seed": source.seed},
        **marks,
    )
