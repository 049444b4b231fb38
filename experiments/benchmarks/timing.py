"""A case, and one timed and verified solve of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from formulations import BlockProblem, BlockSolution, Limits, verify

ExactMethod = Callable[..., BlockSolution]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program on a block, and the seconds within which its optimum is to be proved."""

    program: str
    problem: BlockProblem
    mark: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one method did on one case."""

    case: Case
    method: str
    solution: BlockSolution
    wall: float
    cpu: float
    verified: bool

    @property
    def met(self) -> bool:
        """Whether the optimum was proved within the mark, by processor time of the one thread."""
        return self.solution.proved and self.verified and self.cpu <= self.case.mark


def timed(case: Case, name: str, method: ExactMethod, limits: Limits) -> Row:
    """Solve one case and check the solution independently of the method."""
    wall, cpu = time.perf_counter(), time.process_time()
    solution = method(case.problem, case.program, limits=limits)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    check = verify(case.problem, solution)
    return Row(case=case, method=name, solution=solution, wall=wall, cpu=cpu, verified=not check.wrong)


def formatted(row: Row) -> str:
    """One line of the table."""
    solution = row.solution
    return (
        f"{row.case.program:10} {row.case.problem.name:34} {row.method:20} "
        f"{solution.termination.value:9} {solution.objective:12.6e} {solution.gap:8.1e} "
        f"{solution.stats.nodes:8d} {row.wall:8.2f} {row.cpu:8.2f} {row.case.mark:6.0f} "
        f"{'met' if row.met else 'MISSED'}"
    )


HEADER = (
    f"{'program':10} {'block':34} {'method':20} {'status':9} {'objective':>12} {'gap':>8} "
    f"{'nodes':>8} {'wall s':>8} {'cpu s':>8} {'mark':>6}"
)
