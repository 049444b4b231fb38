r"""Time exact methods on the marks' blocks, or against other solvers: one thread, no compilation.

OMP_NUM_THREADS=1 python -m experiments.benchmarks.exact_solvers --gap 1e-4 --time-limit 60
OMP_NUM_THREADS=1 python -m experiments.benchmarks.exact_solvers --rivals --time-limit 20 \
    --shares .5 .8 --markdown docs/results/exact_solvers.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from experiments.benchmarks.digits_blocks import digits_block, synthetic_block
from experiments.benchmarks.race_page import race_page
from experiments.benchmarks.rivals import CONTENDERS, OURS, Absent, race
from experiments.benchmarks.timing import HEADER, Case, ExactMethod, Row, formatted, timed
from formulations import Limits
from formulations.branch_and_bound import branch_and_bound
from formulations.problem import PROGRAMS

SHARES = (0.5, 0.8, 0.9)
"""Shares of the weights to prune."""
SIZES = (32, 64, 128, 256, 512)
"""Weights of the blocks on which other solvers are raced."""

METHODS: dict[str, ExactMethod] = {OURS: branch_and_bound}


def mark_cases() -> Iterator[Case]:
    """Yield the blocks of the marks, easiest first within each program."""
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


def run(cases: Iterable[Case], methods: Mapping[str, ExactMethod], limits: Limits) -> Iterator[Row]:
    """Every method on every case."""
    compile_kernels(methods)
    for case in cases:
        for name, method in methods.items():
            yield timed(case, name, method, limits)


def rival_cases(
    sizes: Sequence[int], shares: Sequence[float], programs: Sequence[str], mark: float
) -> Iterator[Case]:
    """Digits blocks at damping 1e-5, small ones first, so that a rival can be dropped once it fails."""
    for program in programs:
        for n in sizes:
            for share in shares:
                problem = digits_block(n, 1e-5, round(n * share))
                yield Case(program=program, problem=problem, mark=mark)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 if our own method misses a mark or leaves a case open."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gap", type=float, default=1e-4, help="relative gap to prove")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds a solve")
    parser.add_argument("--program", choices=PROGRAMS, help="only this program")
    parser.add_argument("--rivals", action="store_true", help="race other solvers instead of the marks")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="weights, with --rivals")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="pruned, with --rivals")
    parser.add_argument("--markdown", type=Path, help="write the race to this file too")
    options = parser.parse_args(arguments)
    limits = Limits(time_limit=options.time_limit, rel_gap=options.gap)
    programs = [options.program] if options.program else list(PROGRAMS)
    if options.rivals:
        cases = list(rival_cases(sorted(options.sizes), options.shares, programs, options.time_limit))
        return _race(cases, limits, options.markdown, sys.argv[1:] if arguments is None else arguments)
    rows = run((case for case in mark_cases() if case.program in programs), METHODS, limits)
    sys.stdout.write(HEADER + "\n")
    missed = 0
    for row in rows:
        sys.stdout.write(formatted(row) + "\n")
        sys.stdout.flush()
        missed += row.method == OURS and not row.met
    return 1 if missed else 0


def _race(cases: list[Case], limits: Limits, markdown: Path | None, arguments: Sequence[str]) -> int:
    sys.stdout.write(HEADER + "\n")
    outcomes: list[Row | Absent] = []
    for outcome in race(cases, CONTENDERS, limits):
        outcomes.append(outcome)
        sys.stdout.write((outcome.line if isinstance(outcome, Absent) else formatted(outcome)) + "\n")
        sys.stdout.flush()
        if markdown is not None:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(race_page(outcomes, limits, arguments), encoding="utf-8")
    return 1 if any(isinstance(o, Row) and o.method == OURS and not o.met for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
