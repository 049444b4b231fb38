"""Blocks with a channel term for tests, and their dense Hessians."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelHessian
from cbs_opt.hessian.channels import Channel, ChannelTerm
from cbs_opt.hessian.rows import RowsHessian
from tests.cbs_opt.fisher import data_of

SIZES = (6, 6, 6, 9, 9)
"""Weights of the channels: two layers."""
N = sum(SIZES)


def channel_block(
    m: int = 8,
    *,
    dtype: torch.dtype = torch.float64,
    gradient: bool = True,
    damping: float = 0.01,
    seed: int = 0,
) -> FisherBlock:
    """A block of five channels whose layers have moments of low rank, one with a dead input."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    moments = {}
    for size in set(SIZES):
        inputs = normal(size - 2, size)
        inputs[:, 1] = 0.0
        moments[size] = inputs.T @ inputs
    channels, start = [], 0
    for size in SIZES:
        scale = float(torch.rand((), generator=generator)) + 0.1
        channels.append(Channel(start=start, stop=start + size, moment=moments[size], scale=scale))
        start += size
    term = ChannelTerm(channels=tuple(channels))
    return FisherBlock(
        name="test",
        weights=normal(N).to(dtype),
        hessian=ChannelHessian(RowsHessian((normal(m, N) / m**0.5).to(dtype)), term),
        gradient=0.1 * normal(N).to(dtype) if gradient else None,
        damping=damping,
    )


def term_of(block: FisherBlock) -> ChannelTerm:
    """The term of a block over channels."""
    assert isinstance(block.hessian, ChannelHessian)
    return block.hessian.channels


def changed(
    block: FisherBlock, rows: Tensor | None = None, term: ChannelTerm | None = None, **fields: Any
) -> FisherBlock:
    """The block with other rows or another term."""
    base = RowsHessian(data_of(block) if rows is None else rows)
    return replace(block, hessian=ChannelHessian(base, term or term_of(block)), **fields)


def dense(block: FisherBlock, damping: float | None = None) -> Tensor:
    """``R^T R + C + damping I``, put together entry by entry."""
    rows = data_of(block).double()
    hessian = rows.T @ rows
    for channel in term_of(block).channels:
        part = slice(channel.start, channel.stop)
        hessian[part, part] += channel.scale * channel.moment
    shift = block.damping if damping is None else damping
    return hessian + shift * torch.eye(block.n, dtype=torch.float64)


def some(share: float, seed: int = 1) -> Tensor:
    """A random pruned set with a whole channel in it."""
    pruned = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < share
    pruned[SIZES[0] : SIZES[0] + SIZES[1]] = True
    return pruned
