"""A selector on one `BlockProblem`, its set evaluated by `formulations`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelHessian
from cbs_opt.hessian.channels import ChannelTerm
from cbs_opt.hessian.dense import DenseHessian
from cbs_opt.hessian.operators import Hessian
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.select.choice import SearchInterruptedError, Selector
from formulations.incumbents import IncumbentPool
from formulations.problem import BlockProblem, FloatArray
from formulations.solution import BlockSolution, Limits, SolveStats


def select_one(
    select: Selector,
    problem: BlockProblem,
    program: str,
    *,
    method: str,
    limits: Limits,
    incumbent: BlockSolution | None,
    **options: Any,
) -> BlockSolution:
    """Run a selector on one block; never worse than `incumbent`. After Ctrl-C its limit is INTERRUPTED."""
    began = time.perf_counter()
    pool = IncumbentPool(problem, program, incumbent)
    warm = None if pool.keep is None else [torch.from_numpy(pool.keep)]
    try:
        choice = select([_as_block(problem)], [problem.n_prune], limits=limits, warm=warm, **options)[0]
    except SearchInterruptedError as stop:
        choice = stop.choice
    pool.offer(choice.keep.numpy())
    seconds = time.perf_counter() - began
    stats = SolveStats(seconds=seconds, iterations=choice.iterations, message=choice.status)
    return pool.solution(method=method, limit=choice.limit, stats=stats)


def rounded_one(
    score: Callable[[FisherBlock], Tensor],
    problem: BlockProblem,
    program: str,
    *,
    method: str,
    incumbent: BlockSolution | None,
) -> BlockSolution:
    """Keep the set of the block's support with the largest saliencies; never worse than `incumbent`."""
    began = time.perf_counter()
    pool = IncumbentPool(problem, program, incumbent)
    scores = score(_as_block(problem)).double().cpu().numpy()
    pool.offer(problem.sets.best(scores))
    return pool.solution(method=method, stats=SolveStats(seconds=time.perf_counter() - began))


def _as_block(problem: BlockProblem) -> FisherBlock:
    data = problem.rows if problem.rows is not None else problem.hessian
    assert data is not None
    matrix = _view(data)
    hessian: Hessian = DenseHessian(matrix) if problem.rows is None else RowsHessian(matrix)
    if problem.channels is not None:
        assert isinstance(hessian, RowsHessian)
        hessian = ChannelHessian(hessian, ChannelTerm.of_arrays(problem.channels))
    return FisherBlock(
        name=problem.name,
        weights=_view(problem.weights),
        hessian=hessian,
        damping=problem.damping,
        gradient=None if problem.gradient is None else _view(problem.gradient),
    )


def _view(array: FloatArray) -> Tensor:
    """Return a tensor on the memory of the array, which the searches only read."""
    with warnings.catch_warnings():
        # torch has no read-only tensors, and says so.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)
