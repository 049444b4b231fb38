"""How long every method takes to return when it is asked for one second.

    python -m experiments.benchmarks.limits --methods branch_and_bound lower_bound --cases joint-2048

Processor seconds of one solve in a fresh process, after one of a small block: imports and compilation are
left out, and what other processes do on the machine changes next to nothing. A method that cannot run shows
why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cbs_opt.select.methods import find_method
from cbs_opt.solving import default_methods, solve, status_words
from formulations.errors import CbsError, UnsupportedProblemError
from formulations.problem import BlockProblem

CALL = "import sys; from experiments.benchmarks.limits import report; report(*sys.argv[1:])"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A block of Gaussian rows, by the shape that decides what a method must do.

    `models` says whether solvers with models run on it too, whose models have a term a pair of weights;
    `dense` whether the block is given by its Hessian.
    """

    name: str
    program: str
    n: int
    n_keep: int
    rows: int = 500
    models: bool = True
    dense: bool = False

    def block(self) -> BlockProblem:
        """Return the block, damping .1."""
        generator = np.random.default_rng(0)
        rows = generator.normal(size=(self.rows, self.n)) / np.sqrt(self.rows)
        weights, gradient = generator.normal(size=self.n), 0.01 * generator.normal(size=self.n)
        data = {"hessian": rows.T @ rows} if self.dense else {"rows": rows}
        count = self.n - self.n_keep
        return BlockProblem(weights=weights, n_prune=count, gradient=gradient, damping=0.1, **data)


CASES = {
    case.name: case
    for case in (
        Case(name="selection-256", program="selection", n=256, n_keep=128),
        Case(name="joint-256", program="joint", n=256, n_keep=128),
        Case(name="selection-2048", program="selection", n=2_048, n_keep=1_024),
        Case(name="joint-2048", program="joint", n=2_048, n_keep=1_024),
        Case(name="dense-selection-2048", program="selection", n=2_048, n_keep=1_024, rows=4_096, dense=True),
        Case(name="dense-joint-2048", program="joint", n=2_048, n_keep=1_024, rows=4_096, dense=True),
        Case(name="few-2000", program="joint", n=2_000, n_keep=10, models=False),
        Case(name="few-3000", program="joint", n=3_000, n_keep=10, models=False),
    )
}
SMALL = {
    program: Case(name="small", program=program, n=12, n_keep=6, rows=20)
    for program in ("selection", "joint")
}


def report(name: str, method: str, time_limit: str) -> None:
    """Write what one solve took and found to standard output, as JSON.

    Our methods go by the processor's clock here; solvers have clocks of their own.
    """
    clock = time.perf_counter
    time.perf_counter = time.monotonic = time.process_time
    case = CASES[name]
    small, block = SMALL[case.program].block(), case.block()
    try:
        solve(small, method, program=case.program, time_limit=5.0)
        start, began = clock(), time.process_time()
        solution = solve(block, method, program=case.program, time_limit=float(time_limit))
    except CbsError as error:
        sys.stdout.write("\n" + json.dumps({"note": str(error)}))
        return
    line = {
        "spent": time.process_time() - began,
        "clock": clock() - start,
        "status": status_words(solution),
        "objective": solution.objective,
        "bound": solution.bound,
        "note": solution.stats.message,
    }
    sys.stdout.write("\n" + json.dumps(line))


def methods_for(case: Case) -> list[str]:
    """Return the methods that run on a case."""
    names = default_methods(case.program)
    return [name for name in names if case.models or find_method(name, case.program).kind != "solver"]


def table(cases: Sequence[Case], methods: Sequence[str] | None, time_limit: float) -> None:
    """Print one row a case and method as it is measured."""
    write = sys.stdout.write
    write("| case | method | processor (s) | clock (s) | status | objective | bound | note |\n")
    write("|---|---|---:|---:|---|---:|---:|---|\n")
    for case in cases:
        for method in methods or methods_for(case):
            try:
                find_method(method, case.program)
            except UnsupportedProblemError:
                continue
            call = [sys.executable, "-c", CALL, case.name, method, str(time_limit)]
            done = subprocess.run(call, capture_output=True, text=True, env=os.environ.copy(), check=True)
            row = json.loads(done.stdout.rpartition("\n")[2])
            cells = [case.name, method, *(_cell(row.get(name)) for name in ("spent", "clock"))]
            cells += [str(row.get("status", "")), _cell(row.get("objective")), _cell(row.get("bound"))]
            write(f"| {' | '.join([*cells, row['note']])} |\n")
            sys.stdout.flush()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def main(arguments: list[str] | None = None) -> None:
    """Measure the cases and methods asked for, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", help="names of methods; by default all that fit")
    parser.add_argument("--time-limit", type=float, default=1.0, help="seconds asked for")
    options = parser.parse_args(arguments)
    table([CASES[name] for name in options.cases], options.methods, options.time_limit)


if __name__ == "__main__":
    main()
