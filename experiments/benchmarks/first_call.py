"""What the first exact solve after an installation takes, in and outside its own clock.

    python -m experiments.benchmarks.first_call --largest 128 --time-limit 5

Every call runs in a process of its own. The kernels' folder is empty at the first call of each program, as
after an installation; with ``--every`` it is empty at every call, which takes a minute a block.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from formulations.instances import library, load_library
from formulations.problem import PROGRAMS

CALL = """
import json, sys, time
from formulations import Limits
from formulations.branch_and_bound import branch_and_bound
from formulations.instances import load_library
name, program, time_limit = json.loads(sys.argv[1])
problem = load_library(name)[0]
calls = []
for _ in range(2):
    began = time.perf_counter()
    solution = branch_and_bound(problem, program, limits=Limits(time_limit=time_limit))
    calls.append((time.perf_counter() - began, solution.stats.seconds, solution.proved))
print(json.dumps(calls))
"""


@dataclass(frozen=True, kw_only=True)
class FirstCall:
    """The first of two solves of a block in a fresh process.

    Attributes
    ----------
    block, program : str
    wait : float
        Seconds before the clock of the first solve started: compilation, or loading.
    first, second : float
        Seconds of either solve by its own clock.
    proved : bool
        Whether the first proved its set optimal.
    messages : str
        What the process wrote to standard error.
    """

    block: str
    program: str
    wait: float
    first: float
    second: float
    proved: bool
    messages: str


def first_call(block: str, program: str, time_limit: float, kernels: Path) -> FirstCall:
    """Solve a shipped block twice in a fresh process that keeps its kernels in the folder `kernels`."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps([block, program, time_limit])],
        env=os.environ | {"NUMBA_CACHE_DIR": str(kernels)},
        capture_output=True,
        text=True,
        check=True,
    )
    (whole, first, proved), (_, second, _) = json.loads(done.stdout)
    return FirstCall(
        block=block,
        program=program,
        wait=whole - first,
        first=first,
        second=second,
        proved=proved,
        messages=done.stderr.strip(),
    )


def blocks_up_to(largest: int) -> list[str]:
    """Names of the shipped blocks of at most `largest` weights."""
    return [name for name in library() if load_library(name)[0].n <= largest]


def measure(blocks: Iterable[str], time_limit: float, *, every: bool = False) -> Iterable[FirstCall]:
    """Yield the first calls on `blocks`, program by program."""
    for program in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            for number, block in enumerate(blocks):
                kernels = Path(folder) / (str(number) if every else "kernels")
                yield first_call(block, program, time_limit, kernels)


def main(arguments: list[str] | None = None) -> None:
    """Measure the first and the second call, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--largest", type=int, default=128, help="weights of a block, at most")
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds of a solve")
    parser.add_argument("--every", action="store_true", help="compile anew for every call")
    options = parser.parse_args(arguments)
    write = sys.stdout.write
    write("| block | program | wait (s) | first (s) | second (s) | proved |\n|---|---|---:|---:|---:|---|\n")
    for call in measure(blocks_up_to(options.largest), options.time_limit, every=options.every):
        proved = "yes" if call.proved else "no"
        row = f"{call.wait:.1f} | {call.first:.2f} | {call.second:.2f} | {proved}"
        write(f"| {call.block} | {call.program} | {row} |\n")


if __name__ == "__main__":
    main()
