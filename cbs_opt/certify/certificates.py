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
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cbs_opt.certify.files import block_path
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.system.progress import SILENT, Progress
from formulations.errors import InstanceFormatError
from formulations.instances import read_solution, write_instance, write_solution
from formulations.loss import objective, solved_weights
from formulations.problem import BlockProblem, BoolArray
from formulations.relaxations import lower_bound
from formulations.solution import BlockSolution, Limit, Limits, SolveStats, Termination, stated_support
from formulations.support import Support
from formulations.verification import verify

PathLike = str | os.PathLike[str]
log = logging.getLogger(__name__)

NOT_REACHED = "not reached: time limit"
BETTER_SET = 1e-4
"""Relative excess over the relaxation's own rounded set from which on it is worth a word."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CertifiedBlock:
    """A chosen set, the bound on its program, and the evidence.

    `solution` is the chosen set with its value, the proved bound and the certificate, OPTIMAL if they meet;
    `fingerprint` is that of the block, as `BlockProblem.fingerprint` gives it.
    """

    solution: BlockSolution
    fingerprint: str

    @property
    def status(self) -> str:
        """How the bound ended; says so if the relaxation found a better set than the chosen one."""
        return self.solution.stats.message


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

    `keep` (n,) is the chosen set, True = kept, and `method` what chose it. `proved` is a bound on the same
    program that an exact method proved; the larger bound counts, and the certificate is then evidence for the
    weaker one alone. What is proved within the time limit, in seconds, is a valid bound.
    Raises `KeyboardInterrupt` if the relaxation was interrupted; `NotPositiveDefiniteError` if `program` is
    "joint" and ``H`` is singular.
    """
    began = time.perf_counter()
    chosen = _evaluated(problem, keep, program, method)
    assert chosen.objective is not None
    relaxed = lower_bound(problem, program, limits=Limits(time_limit=time_limit), incumbent=chosen, fix=True)
    if relaxed.limit is Limit.INTERRUPTED:
        raise KeyboardInterrupt
    bounds = [bound for bound in (relaxed.bound, proved) if bound is not None]
    bound = min(max(bounds), chosen.objective) if bounds else None
    gap = relative_gap(chosen.objective, bound)
    optimal = gap is not None and gap <= Limits().rel_gap
    solution = replace(
        chosen,
        bound=bound,
        termination=Termination.OPTIMAL if optimal else Termination.FEASIBLE,
        limit=relaxed.limit,
        rel_gap=Limits().rel_gap if optimal else None,
        certificate=relaxed.certificate,
    )
    stats = SolveStats(
        seconds=time.perf_counter() - began,
        iterations=relaxed.stats.iterations,
        message=_status(solution, relaxed.objective),
    )
    return CertifiedBlock(solution=replace(solution, stats=stats), fingerprint=problem.fingerprint())


class Chosen(NamedTuple):
    """The kept set of a block, (n,), True = kept.

    `proved` is a bound that an exact method proved while choosing, `support` what the set was chosen from
    where that was no count.
    """

    keep: Tensor
    proved: float | None = None
    support: Support | None = None


def certify_blocks(
    blocks: Sequence[FisherBlock],
    chosen: Sequence[Chosen | tuple[Tensor, float | None]],
    program: str,
    *,
    method: str = "",
    time_limit: float | None = None,
    block_dir: PathLike | None = None,
    path_of: Callable[[int], Path | None] = lambda number: None,
    progress: Progress = SILENT,
) -> list[CertifiedBlock]:
    """Bound every block of a pruned network, one after another.

    The blocks have the damping and the gradient of the program; `chosen` are the kept set (n,) of each, True
    = kept, and a bound that an exact method proved while choosing, by `method`; with a support, as `Chosen`,
    the bound is over its sets. The time limit, in seconds, is for all blocks: each gets an even share of what
    is left; blocks without a share have no bound. `block_dir` is made if missing, and gets the data of every
    block, see `cbs_opt.certify.files`. `path_of` leads from the number of a block to the file of its
    certified solution, which is read if it is there and of this very block, and else written. Raises
    `KeyboardInterrupt` if interrupted; nothing but files in `block_dir` has changed. Memory beyond the rows:
    one block in float64 and what its relaxation takes, and three vectors a block for its certificate. A term
    over channels is not formed where the block is large: the checker takes the problem `by_channels`.
    """
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    if block_dir is not None:
        Path(block_dir).mkdir(parents=True, exist_ok=True)

    def certified(number: int) -> CertifiedBlock:
        kept, proved, support = Chosen(*chosen[number])
        keep: BoolArray = kept.cpu().numpy()
        kept_to = int((~keep).sum()) if support is None else support
        problem = blocks[number].to_problem(kept_to, by_channels=True)
        if block_dir is not None:
            write_instance(block_path(block_dir, number), problem)
        left = deadline - time.monotonic()
        path = path_of(number)
        result = None if path is None else _stored(path, problem, keep, program)
        if result is None and left <= 0.0:
            solution = _evaluated(problem, keep, program, method, NOT_REACHED)
            result = CertifiedBlock(solution=solution, fingerprint=problem.fingerprint())
        elif result is None:
            share = None if time_limit is None else left / (len(blocks) - number)
            result = certify_block(problem, keep, program, method=method, proved=proved, time_limit=share)
            if path is not None:
                write_solution(path, problem, result.solution)
        return result

    # One block is no share of anything, but may take long: it is shown as a count.
    total = len(blocks) if len(blocks) > 1 else None
    return progress.collect("certificates", map(certified, range(len(blocks))), total, unit="block")


def relative_gap(objective: float | None, bound: float | None) -> float | None:
    """Return ``(objective - bound) / max(|objective|, 1e-12)``; None without both."""
    if objective is None or bound is None:
        return None
    return (objective - bound) / max(abs(objective), 1e-12)


def _evaluated(
    problem: BlockProblem, keep: BoolArray, program: str, method: str, message: str = ""
) -> BlockSolution:
    weights, value = solved_weights(problem, keep, program), objective(problem, keep, program)
    stats = SolveStats(message=message)
    return BlockSolution(
        keep=keep,
        weights=weights,
        objective=value,
        program=program,
        method=method,
        support=stated_support(problem),
        stats=stats,
    )


def _stored(path: Path, problem: BlockProblem, keep: BoolArray, program: str) -> CertifiedBlock | None:
    """Read a file, if it is the certified solution of this set in this block and claims nothing wrong."""
    try:
        solution = read_solution(path, problem) if path.exists() else None
    except InstanceFormatError as error:
        log.warning("%s; it is certified again", error.found)
        return None
    if solution is None or solution.keep is None or not np.array_equal(solution.keep, keep):
        return None
    checked = verify(problem, solution)
    if checked.wrong or solution.program != program:
        log.warning("%s: %s; it is certified again", path, "; ".join(checked.notes) or "another program")
        return None
    return CertifiedBlock(solution=solution, fingerprint=problem.fingerprint())


def _status(solution: BlockSolution, best: float | None) -> str:
    words = solution.termination.value
    if solution.limit is not None:
        words += f", {solution.limit.value} limit"
    excess = relative_gap(solution.objective, best)
    if excess is not None and excess > BETTER_SET:
        words += f"; a set {excess:.2%} lower was found"
    return words
