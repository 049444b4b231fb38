"""Time exact methods on the marks' blocks: one row a block and method, one thread, no compilation.

OMP_NUM_THREADS=1 python -m experiments.benchmarks.exact_solvers --gap 1e-4 --time-limit 60
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from experiments.benchmarks.digits_blocks import digits_block, synthetic_block
from formulations import BlockProblem, BlockSolution, Limits, verify
from formulations.branch_and_bound import branch_and_bound

SHARES = (0.5, 0.8, 0.9)
"""Shares of the weights to prune."""

ExactMethod = Callable[..., BlockSolution]
METHODS: dict[str, ExactMethod] = {"branch_and_bound": branch_and_bound}


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


def mark_cases() -> Iterator[Case]:
    """The blocks of the marks, easiest first within each program."""
    for share in SHARES:
        yield Case(program="joint", problem=digits_block(512, 1e-5, round(512 * share)), mark=1.0)
        yield Case(program="joint", problem=digits_block(192, 1e-6, round(192 * share)), mark=60.0)
        yield Case(program="joint", problem=digits_block(256, 1e-6, round(256 * share)), mark=60.0)
        yield Case(program="joint", problem=synthetic_block(128, 0.1, round(128 * share)), mark=30.0)
    for share in SHARES:
        yield Case(program="selection", problem=digits_block(512, 1e-5, round(512 * share)), mark=5.0)
        yield Case(program="selection", problem=digits_block(256, 1e-6, round(256 * share)), mark=60.0)
        yield Case(program="selection", problem=synthetic_block(128, 0.1, round(128 * share)), mark=2.0)


def compile_kernels(methods: Mapping[str, ExactMethod]) -> None:
    """Solve small blocks, so that no later time holds a compilation."""
    for program in ("joint", "selection"):
        for method in methods.values():
            method(synthetic_block(40, 0.1, 20), program, limits=Limits(time_limit=60.0))


def timed(case: Case, name: str, method: ExactMethod, limits: Limits) -> Row:
    """Solve one case and check the solution independently of the method."""
    wall, cpu = time.perf_counter(), time.process_time()
    solution = method(case.problem, case.program, limits=limits)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    check = verify(case.problem, solution)
    return Row(case=case, method=name, solution=solution, wall=wall, cpu=cpu, verified=check.ok)


def run(cases: Iterable[Case], methods: Mapping[str, ExactMethod], limits: Limits) -> Iterator[Row]:
    """Every method on every case."""
    compile_kernels(methods)
    for case in cases:
        for name, method in methods.items():
            yield timed(case, name, method, limits)


def formatted(row: Row) -> str:
    """One line of the table."""
    solution = row.solution
    return (
        f"{row.case.program:10} {row.case.problem.name:34} {row.method:18} "
        f"{solution.termination.value:9} {solution.objective:12.6e} {solution.gap:8.1e} "
        f"{solution.stats.nodes:8d} {row.wall:8.2f} {row.cpu:8.2f} {row.case.mark:6.0f} "
        f"{'met' if row.met else 'MISSED'}"
    )


HEADER = (
    f"{'program':10} {'block':34} {'method':18} {'status':9} {'objective':>12} {'gap':>8} "
    f"{'nodes':>8} {'wall s':>8} {'cpu s':>8} {'mark':>6}"
)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a mark of our own method is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gap", type=float, default=1e-4, help="relative gap to prove")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds a solve")
    parser.add_argument("--program", choices=("joint", "selection"), help="only this program")
    options = parser.parse_args(arguments)
    cases = (case for case in mark_cases() if options.program in (None, case.program))
    limits = Limits(time_limit=options.time_limit, rel_gap=options.gap)
    sys.stdout.write(HEADER + "\n")
    missed = 0
    for row in run(cases, METHODS, limits):
        sys.stdout.write(formatted(row) + "\n")
        sys.stdout.flush()
        missed += row.method == "branch_and_bound" and not row.met
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
