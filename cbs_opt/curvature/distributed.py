"""Gradient rows over the processes of a `torch.distributed` group, reduced where blocks are solved.

Every process has the network and reads the same data; each differentiates its share of the samples and
holds those rows alone. A block then goes to one process, as its Hessian or as its columns of all rows,
whichever is smaller. All functions and methods here are collective: every process of the group calls
them, in the same order.
"""

from __future__ import annotations

import functools
import heapq
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cbs_opt.curvature.fisher import GradientRows, gradient_rows
from cbs_opt.errors import EmptyDataError, PeerError
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.dense import DenseHessian
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.network.data import Data, LossFunction, device_of, positive_integer
from cbs_opt.network.partition import BlockSpan, Partition
from formulations.errors import ArgumentError, ShapeError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowShard:
    """This process's share of the rows of a Fisher model, and what all processes know of it.

    Attributes
    ----------
    rows : (m_own, n) Tensor
        Scaled as rows of the whole: the sum of ``rows^T rows`` over the processes is the model. The
        rows of all processes one after the other, by rank, are those of one process.
    gradient : (n,) Tensor
        Mean gradient over the samples of all processes.
    counts : tuple of int
        Rows of each rank; they sum to m.
    samples : int
        Samples of all processes together.
    seconds : float
        Wall-clock time of this process.
    curvature : str
    group : ProcessGroup or None
        None is the default group.
    """

    rows: Tensor
    gradient: Tensor
    counts: tuple[int, ...]
    samples: int
    seconds: float
    curvature: str
    group: dist.ProcessGroup | None = None

    @property
    def m(self) -> int:
        """Rows of all processes."""
        return sum(self.counts)

    def hessian_product(self, x: Tensor, damping: float = 0.0) -> Tensor:
        """``H x`` in every process, for `x` of shape (n,) or (n, p); one all-reduce of that size."""
        product = self.rows.T @ (self.rows @ x.to(self.rows))
        dist.all_reduce(product, group=self.group)
        return product.add_(x.to(product), alpha=damping)

    def hessian(self, start: int, stop: int, owner: int) -> Tensor | None:
        """``rows^T rows`` of the columns ``start:stop`` in process `owner`, float64; None in the others."""
        own = self.rows[:, start:stop].double()
        gram = own.T @ own
        dist.reduce(gram, _global(owner, self.group), group=self.group)
        return gram if dist.get_rank(self.group) == owner else None

    def columns(self, start: int, stop: int, owner: int) -> Tensor | None:
        """All m rows of the columns ``start:stop`` in process `owner`; None in the others."""
        own = self.rows.new_zeros(max(self.counts), stop - start)
        own[: self.rows.shape[0]] = self.rows[:, start:stop]
        mine = dist.get_rank(self.group) == owner
        pieces = [torch.empty_like(own) for _ in self.counts] if mine else None
        dist.gather(own, pieces, _global(owner, self.group), group=self.group)
        if pieces is None:
            return None
        return torch.cat([piece[:count] for piece, count in zip(pieces, self.counts, strict=True)])

    def blocks(self, partition: Partition, weights: Tensor, damping: float) -> dict[int, FisherBlock]:
        """The blocks of which this process is the `owners`, by their number in the partition.

        Parameters
        ----------
        partition : Partition
        weights : (n,) Tensor
            ``partition.flatten(model)``.
        damping : float
            Added to the diagonal.

        Raises
        ------
        ShapeError
            If weights or partition have another size than the rows.
        """
        n = self.rows.shape[1]
        if partition.n != n or tuple(weights.shape) != (n,):
            found = f"{tuple(weights.shape)} for a partition of {partition.n} and rows of {n} weights"
            raise ShapeError("weights", found, "pass the partition and weights that the rows were made with")
        own: dict[int, FisherBlock] = {}
        for number, owner in enumerate(owners(partition.blocks, len(self.counts))):
            span = partition.blocks[number]
            by_rows = self.m < span.stop - span.start
            reduced = (self.columns if by_rows else self.hessian)(span.start, span.stop, owner)
            if reduced is not None:
                own[number] = FisherBlock(
                    name=span.name,
                    weights=weights[span.start : span.stop],
                    hessian=RowsHessian(reduced) if by_rows else DenseHessian(reduced),
                    gradient=self.gradient[span.start : span.stop],
                    damping=damping,
                )
        return own

    def joined(self, partition: Partition, own: Mapping[int, Tensor]) -> Tensor:
        """One (n,) vector in every process from what each has found on its own blocks.

        Parameters
        ----------
        partition : Partition
        own : mapping of int to (n_block,) Tensor
            By block number: pruned sets (bool) or new weights, of one dtype everywhere.

        Raises
        ------
        ArgumentError
            If the processes together have not one vector for each block.
        """
        device = self.rows.device
        covered = torch.zeros(len(partition.blocks), dtype=torch.int64, device=device)
        covered[list(own)] = 1
        whole = torch.zeros(partition.n, dtype=torch.float64, device=device)
        for number, values in own.items():
            span = partition.blocks[number]
            whole[span.start : span.stop] = values.to(whole)
        boolean = torch.tensor(
            [any(values.dtype == torch.bool for values in own.values())], device=device
        ).int()
        for tensor in (covered, whole, boolean):
            dist.all_reduce(tensor, group=self.group)
        if bool((covered != 1).any()):
            missing = partition.blocks[int((covered != 1).nonzero()[0])].name
            remedy = "pass the vectors of the blocks that `blocks` gave this process"
            raise ArgumentError("own", f"{missing} has not one vector over all processes", remedy)
        return whole != 0.0 if bool(boolean) else whole


def sharded_rows(
    model: nn.Module,
    data: Data,
    loss_fn: LossFunction,
    partition: Partition,
    *,
    samples: int = 1000,
    samples_per_row: int = 1,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> RowShard:
    """Gradient rows of a network, each process of a group computing and holding its share.

    Parameters
    ----------
    model, data, loss_fn, partition, samples, samples_per_row
        See `cbs_opt.gradient_rows`; the same in every process. A loader is read up to the end of the
        share of the process.
    group : ProcessGroup, optional
        By default that of ``torch.distributed.init_process_group``: gloo on processors, NCCL on GPUs
        with one process and a copy of the network a GPU.
    **options
        Of `cbs_opt.gradient_rows`.

    Returns
    -------
    RowShard
        The rows of all processes together are those of one process, to rounding.

    Raises
    ------
    ArgumentError
        If `torch.distributed` is not initialised.
    PeerError
        In every process but those that failed, which raise what they met.
    CbsError
        As `cbs_opt.gradient_rows`.
    """
    if not dist.is_available() or not dist.is_initialized():
        remedy = "call torch.distributed.init_process_group first"
        raise ArgumentError("group", "torch.distributed is not initialised", remedy)
    began = time.perf_counter()
    positive_integer("samples", samples)
    positive_integer("samples_per_row", samples_per_row)
    own: GradientRows | None = None
    error: Exception | None = None
    try:
        share = _share(samples // samples_per_row, group)
        if share:
            own = gradient_rows(
                model,
                data,
                loss_fn,
                partition,
                samples=samples,
                samples_per_row=samples_per_row,
                share=range(share.start * samples_per_row, share.stop * samples_per_row),
                **options,
            )
    except EmptyDataError as met:
        log.warning("rank %d has no rows: %s", dist.get_rank(group), met)
    except Exception as met:
        error = met
    _agree(error, device_of(model), group)
    if own is None:
        own = _no_rows(model, partition, options)
    counts, rows_used = _counts(own, group)
    if rows_used == 0:
        raise EmptyDataError(
            "data", "no sample", "pass at least one sample; a generator can be read only once"
        )
    total = int(counts[:, 1].sum())
    gradient = own.gradient * (own.samples / total)
    dist.all_reduce(gradient, group=group)
    exact = own.curvature == "exact_fisher"
    scale = own.samples / total if exact else own.rows.shape[0] / rows_used
    return RowShard(
        rows=own.rows.mul_(math.sqrt(scale)),
        gradient=gradient,
        counts=tuple(counts[:, 0].tolist()),
        samples=total,
        seconds=time.perf_counter() - began,
        curvature=own.curvature,
        group=group,
    )


def owners(blocks: Sequence[BlockSpan], ranks: int) -> list[int]:
    """The rank that solves each block: the largest block first, to the rank with the fewest weights."""
    loads = [(0, rank) for rank in range(ranks)]
    chosen = [0] * len(blocks)
    sizes = [block.stop - block.start for block in blocks]
    for number in sorted(range(len(blocks)), key=lambda number: -sizes[number]):
        load, rank = heapq.heappop(loads)
        chosen[number] = rank
        heapq.heappush(loads, (load + sizes[number], rank))
    return chosen


def _share(rows: int, group: dist.ProcessGroup | None) -> range:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return range(rows * rank // size, rows * (rank + 1) // size)


def _agree(error: Exception | None, device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Raise in every process if one of them failed, so that none waits for it in vain."""
    failed = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    failed[dist.get_rank(group)] = error is not None
    dist.all_reduce(failed, group=group)
    if error is not None:
        raise error
    if bool(failed.any()):
        ranks = ", ".join(str(rank) for rank in failed.nonzero().flatten().tolist())
        raise PeerError("group", f"rank {ranks} failed", "look at what it raised")


def _no_rows(model: nn.Module, partition: Partition, options: Mapping[str, Any]) -> GradientRows:
    keep = options.get("keep")
    dtypes = (parameter.dtype for parameter in partition.tensors(model).values())
    dtype = options.get("rows_dtype") or functools.reduce(torch.promote_types, dtypes, torch.float32)
    like = torch.zeros(partition.n, dtype=dtype, device=device_of(model))
    return GradientRows(
        rows=like.new_zeros(0, partition.n if keep is None else int(keep.sum())),
        gradient=like,
        samples=0,
        seconds=0.0,
        curvature=str(options.get("curvature", "empirical_fisher")),
    )


def _counts(own: GradientRows, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Rows and samples of every rank, (ranks, 2), and the rows of all."""
    table = torch.zeros(dist.get_world_size(group), 2, dtype=torch.int64, device=own.rows.device)
    table[dist.get_rank(group)] = torch.tensor([own.rows.shape[0], own.samples])
    dist.all_reduce(table, group=group)
    return table, int(table[:, 0].sum())


def _global(rank: int, group: dist.ProcessGroup | None) -> int:
    """The rank in the default group, which is what collectives take as root."""
    return rank if group is None else dist.get_global_rank(group, rank)
