"""How far from optimal the chosen sets can be: a certified bound for every block of a pruned network.

Each block becomes a float64 `BlockProblem` on the CPU, whatever the network's dtype and device, one at a
time. `formulations.relaxations.lower_bound` proves a bound on the program that the run solved, fixes the
weights whose fate the bound and the chosen set settle, and tightens the bound on the others. The chosen set
is set against it:

- "selection": the selection value of the set, kept weights unmoved;
- "joint": its CBS-U value, kept weights moved to the exact minimum, with the same damping and gradient.

The sum over blocks bounds the block-diagonal quadratic model of the loss. It is no statement about the loss
itself, where that model is off, nor about accuracy.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from tqdm import tqdm

from cbs_opt.hessian.block import FisherBlock
from formulations.errors import InstanceFormatError
from formulations.instances import read_solution, write_instance, write_solution
from formulations.loss import objective, solved_weights
from formulations.problem import BlockProblem, BoolArray
from formulations.relaxations import lower_bound
from formulations.solution import BlockSolution, Limit, Limits, SolveStats, Termination

if TYPE_CHECKING:
    from cbs_opt.report.record import BlockSummary, PruneReport

PathLike = str | os.PathLike[str]
log = logging.getLogger(__name__)

MEANING = "bound for the block-diagonal quadratic model of the loss, not for the loss or the accuracy"
"""What the sum of the blocks' bounds is; printed wherever the sum is."""
NOT_REACHED = "not reached: time limit"
BETTER_SET = 1e-4
"""Relative excess over the relaxation's own rounded set from which on it is worth a word."""


@dataclass(frozen=True, kw_only=True)
class CertifiedSum:
    """The blocks together.

    Attributes
    ----------
    program : str
        The program whose values are added.
    objective : float
        Sum of the values of the chosen sets.
    bound : float or None
        Sum of the blocks' bounds, rounded down; None if a block has none.
    blocks, bounded : int
        Number of blocks, and of those with a bound.
    meaning : str
        What the bound is.
    """

    program: str
    objective: float
    bound: float | None
    blocks: int
    bounded: int
    meaning: str = MEANING

    @property
    def gap(self) -> float | None:
        """``(objective - bound) / max(|objective|, 1e-12)``; None without a bound."""
        return relative_gap(self.objective, self.bound)


@dataclass(frozen=True, kw_only=True, eq=False)
class CertifiedBlock:
    """A chosen set, the bound on its program, and the evidence.

    Attributes
    ----------
    solution : BlockSolution
        The chosen set with its value, the proved bound and the certificate; OPTIMAL if they meet.
    fingerprint : str
        Of the block, as `BlockProblem.fingerprint` gives it.
    status : str
        How the bound ended; says so if the relaxation found a better set than the chosen one.
    """

    solution: BlockSolution
    fingerprint: str
    status: str


def certify_block(
    problem: BlockProblem,
    keep: BoolArray,
    program: str,
    *,
    method: str = "",
    proved: float | None = None,
    time_limit: float | None = None,
) -> CertifiedBlock:
    """Bound the optimum of `program` and set the given kept set against it.

    Parameters
    ----------
    problem : BlockProblem
    keep : (n,) bool array
        The chosen set, True = kept.
    program : {"selection", "joint"}
    method : str, default ""
        What chose the set.
    proved : float, optional
        A bound on the same program that an exact method proved; the larger bound counts, and the
        certificate is then evidence for the weaker one alone.
    time_limit : float, optional
        Seconds; what is proved by then is a valid bound.

    Raises
    ------
    KeyboardInterrupt
        If the relaxation was interrupted.
    NotPositiveDefiniteError
        If `program` is "joint" and ``H`` is singular.
    """
    began = time.perf_counter()
    chosen = _evaluated(problem, keep, program, method)
    assert chosen.objective is not None
    limits = Limits(time_limit=time_limit)
    found = lower_bound(problem, program, limits=limits, incumbent=chosen, fix=True)
    if found.limit is Limit.INTERRUPTED:
        raise KeyboardInterrupt
    known = [bound for bound in (found.bound, proved) if bound is not None]
    bound = min(max(known), chosen.objective) if known else None
    gap = relative_gap(chosen.objective, bound)
    optimal = gap is not None and gap <= Limits().rel_gap
    solution = replace(
        chosen,
        bound=bound,
        termination=Termination.OPTIMAL if optimal else Termination.FEASIBLE,
        limit=found.limit,
        rel_gap=Limits().rel_gap if optimal else None,
        certificate=found.certificate,
        stats=SolveStats(seconds=time.perf_counter() - began, iterations=found.stats.iterations),
    )
    status = _status(solution, found.objective)
    return CertifiedBlock(
        solution=replace(solution, stats=replace(solution.stats, message=status)),
        fingerprint=problem.fingerprint(),
        status=status,
    )


def certify_report(
    report: PruneReport,
    blocks: Sequence[FisherBlock],
    keeps: Sequence[Tensor],
    *,
    proved: Sequence[float | None] | None = None,
    time_limit: float | None = None,
    block_dir: PathLike | None = None,
    progress: bool = True,
    path_of: Callable[[int], Path | None] = lambda number: None,
) -> PruneReport:
    """The report of a run with a certified bound in every block summary, and their sum.

    Parameters
    ----------
    report : PruneReport
        Of the run that chose the sets.
    blocks : sequence of FisherBlock
        As in ``report.blocks``, with the damping and the gradient of the program.
    keeps : sequence of (n,) bool tensors
        The chosen sets, True = kept.
    proved : sequence of float or None, optional
        Bounds that an exact method proved while choosing.
    time_limit : float, optional
        Seconds for all blocks. Each gets an even share of what is left; blocks without a share have
        no bound.
    block_dir : path, optional
        Made if missing; gets the data of every block, see `cbs_opt.certify.files`.
    progress : bool, default True
    path_of : callable, optional
        From the number of a block to the file of its certified solution, which is read if it is there and
        of this very block, and else written.

    Raises
    ------
    KeyboardInterrupt
        If interrupted; nothing but files in `block_dir` has changed.

    Notes
    -----
    Memory beyond the rows: one block in float64 and what its relaxation takes, and three vectors a
    block for its certificate.
    """
    from cbs_opt.certify.files import block_path

    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    if block_dir is not None:
        Path(block_dir).mkdir(parents=True, exist_ok=True)
    summaries: list[BlockSummary] = []
    solutions: list[BlockSolution] = []
    silent = None if progress and len(blocks) > 1 else True
    for number, block in enumerate(tqdm(blocks, desc="certificates", unit="block", disable=silent)):
        keep: BoolArray = keeps[number].cpu().numpy()
        problem = block.to_problem(int((~keep).sum()))
        if block_dir is not None:
            write_instance(block_path(block_dir, number), problem)
        left = deadline - time.monotonic()
        path = path_of(number)
        known = None if path is None else _known(path, problem, keep)
        if known is not None:
            certified = known
        elif left <= 0.0:
            certified = _not_reached(problem, keep, report.program, report.method)
        else:
            certified = certify_block(
                problem,
                keep,
                report.program,
                method=report.method,
                proved=None if proved is None else proved[number],
                time_limit=None if time_limit is None else left / (len(blocks) - number),
            )
            if path is not None:
                write_solution(path, problem, certified.solution)
        summaries.append(summarised(report.blocks[number], certified))
        solutions.append(certified.solution)
    return replace(
        report,
        blocks=tuple(summaries),
        certified=added_up(report.program, summaries),
        certificates=tuple(solutions),
    )


def summarised(summary: BlockSummary, certified: CertifiedBlock) -> BlockSummary:
    """The summary of a block with what was certified."""
    solution, evidence = certified.solution, certified.solution.certificate
    return replace(
        summary,
        objective=solution.objective,
        bound=solution.bound,
        gap=relative_gap(solution.objective, solution.bound),
        certificate=None if evidence is None else evidence.kind,
        certificate_status=certified.status,
        certificate_seconds=solution.stats.seconds,
        rho=None if evidence is None else evidence.rho,
        effective_rank=None if evidence is None else evidence.effective_rank,
        n_fixed=None if evidence is None else evidence.n_fixed,
        fingerprint=certified.fingerprint,
    )


def added_up(program: str, summaries: Sequence[BlockSummary]) -> CertifiedSum:
    """The sum over blocks; its bound is rounded down, so that it holds in the last digit."""
    bounds = [summary.bound for summary in summaries if summary.bound is not None]
    complete = len(bounds) == len(summaries)
    return CertifiedSum(
        program=program,
        objective=math.fsum(summary.objective or 0.0 for summary in summaries),
        bound=math.nextafter(math.fsum(bounds), -math.inf) if complete else None,
        blocks=len(summaries),
        bounded=len(bounds),
    )


def relative_gap(objective: float | None, bound: float | None) -> float | None:
    """``(objective - bound) / max(|objective|, 1e-12)``; None without both."""
    if objective is None or bound is None:
        return None
    return (objective - bound) / max(abs(objective), 1e-12)


def _evaluated(problem: BlockProblem, keep: BoolArray, program: str, method: str) -> BlockSolution:
    return BlockSolution(
        keep=keep,
        weights=solved_weights(problem, keep, program),
        objective=objective(problem, keep, program),
        program=program,
        method=method,
    )


def _known(path: Path, problem: BlockProblem, keep: BoolArray) -> CertifiedBlock | None:
    """What is in a file, if it is the certified solution of this set in this block."""
    if not path.exists():
        return None
    try:
        solution = read_solution(path, problem)
    except InstanceFormatError as error:
        log.warning("%s; it is certified again", error.found)
        return None
    if solution.keep is None or not np.array_equal(solution.keep, keep):
        return None
    return CertifiedBlock(solution=solution, fingerprint=problem.fingerprint(), status=solution.stats.message)


def _not_reached(problem: BlockProblem, keep: BoolArray, program: str, method: str) -> CertifiedBlock:
    return CertifiedBlock(
        solution=_evaluated(problem, keep, program, method),
        fingerprint=problem.fingerprint(),
        status=NOT_REACHED,
    )


def _status(solution: BlockSolution, best: float | None) -> str:
    words = solution.termination.value
    if solution.limit is not None:
        words += f", {solution.limit.value} limit"
    excess = relative_gap(solution.objective, best)
    if excess is not None and excess > BETTER_SET:
        words += f"; a set {excess:.2%} lower was found"
    return words
