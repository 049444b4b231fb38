"""Certified gaps of the joint program on large blocks: bound, incumbent, time and memory, one command a mark.

    python -m experiments.benchmarks.certified_gaps --case mlpnet --out runs/gaps

| case | blocks |
| --- | --- |
| mlpnet | all 32 360 weights of MLPNet, damping 1e-3 and 1e-2, sparsity .5, .9, .98 |
| digits | a 128-128 layer, 16 384 weights, damping 1e-5, sparsity .5, .8, .9 |
| resnet20_layers | each of 18 layers of ResNet20, damping 1e-3 and 1e-4, sparsity .9, gaps summed |
| resnet20_global | all 267 264 weights of those layers as one block, damping 1e-3 |
| synthetic | 500 Gaussian rows, 62 500 to 10^6 weights: memory, and the cost of a step against n |
| grid | gap against damping and rank, for the picture in the README |

The bound comes from `cbs_opt.lower_bound`, the incumbent from `swap_search` on the joint program, started
from the relaxation's own rounding; weights whose fate both settle are then fixed and the rest relaxed
again. Every result is checked by `cbs_opt.verify` and appended to ``OUT/<case>.jsonl`` at once: the same
command again takes up where it stopped. ``OUT/<case>.csv``, ``OUT/figures`` and
``OUT/results/certified_gaps.md`` (all cases found there) are written anew each time.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

import cbs_opt
from experiments.benchmarks.certified_cases import CASES, Measurement, Source, gaussian_block
from experiments.benchmarks.certified_figures import write_figures
from experiments.benchmarks.certified_page import gaps_page, machine_facts
from experiments.benchmarks.swap_search import PeakMemory
from experiments.ledger import Ledger, settings_key
from formulations import BlockProblem, BlockSolution, Limits
from formulations.errors import CbsError

INCUMBENTS = ("swap_search", "rounding")
STEPS = (5, 40)
"""Most ADMM steps of two runs, whose difference in processor time gives the cost of one."""


def measure(
    problem: BlockProblem,
    *,
    incumbent: str = "swap_search",
    restarts: int = 0,
    fix: bool = True,
    time_limit: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Bound the joint program, search, tighten the bound, and say how far apart the two are.

    Parameters
    ----------
    problem : BlockProblem
    incumbent : {"swap_search", "rounding"}
        What gives the set: a joint swap search from the relaxation's rounding, or the rounding alone.
    restarts : int, default 0
        Further descents of the search from random sets.
    fix : bool, default True
        Fix weights by the incumbent and relax the rest again.
    time_limit : float, optional
        Seconds for each of the three.
    seed : int

    Returns
    -------
    dict
        Plain values; see `experiments.benchmarks.certified_page`.
    """
    limits = Limits(time_limit=time_limit, seed=seed)
    with PeakMemory() as memory:
        began = time.perf_counter()
        relaxed = cbs_opt.lower_bound(problem, "joint", limits=limits)
        bound_seconds = time.perf_counter() - began
        found = relaxed
        if incumbent == "swap_search":
            found = cbs_opt.solve(
                problem,
                incumbent,
                program="joint",
                incumbent=relaxed,
                time_limit=time_limit,
                seed=seed,
                restarts=restarts,
            )
        search_seconds = time.perf_counter() - began - bound_seconds
        final = relaxed
        if fix:
            warm = replace(found, certificate=relaxed.certificate)
            final = cbs_opt.lower_bound(problem, "joint", limits=limits, incumbent=warm, fix=True)
        seconds = time.perf_counter() - began
    return {
        **_outcome(problem, relaxed, found, final),
        "incumbent": incumbent,
        "bound_seconds": bound_seconds,
        "search_seconds": search_seconds,
        "seconds": seconds,
        "peak_bytes": memory.before + memory.beyond,
        "peak_bytes_beyond_rows": memory.beyond,
    }


def _outcome(
    problem: BlockProblem, relaxed: BlockSolution, found: BlockSolution, final: BlockSolution
) -> dict[str, Any]:
    """Values and certificate, checked."""
    proof = max(relaxed, final, key=lambda solution: -math.inf if solution.bound is None else solution.bound)
    best = min(found, final, key=lambda solution: solution.objective or math.inf)
    solution = replace(best, bound=proof.bound, certificate=proof.certificate)
    check = cbs_opt.verify(problem, solution)
    evidence = proof.certificate
    return {
        "n": problem.n,
        "m": None if problem.rows is None else problem.rows.shape[0],
        "n_prune": problem.n_prune,
        "objective": solution.objective,
        "rounded_objective": relaxed.objective,
        "bound": solution.bound,
        "first_bound": relaxed.bound,
        "gap": None if solution.bound is None else solution.gap,
        "verified": check.ok and bool(check.bound_checked),
        "certificate": None if evidence is None else evidence.kind,
        "rho": None if evidence is None else evidence.rho,
        "effective_rank": None if evidence is None else evidence.effective_rank,
        "n_fixed": None if final.certificate is None else final.certificate.n_fixed,
        "status": found.stats.message or found.termination.value,
    }


def seconds_per_step(problem: BlockProblem) -> float | None:
    """Processor time of one ADMM step: what more steps take longer, so that what is done once cancels.

    On a shared machine the wall time of two runs differs by more than their steps, and the first run
    pays for fresh memory: it does not count. None where the relaxation converges before there is a
    difference.
    """
    spent: list[float] = []
    taken: list[int] = []
    for steps in (STEPS[0], *STEPS):
        began = time.process_time()
        found = cbs_opt.lower_bound(problem, "joint", limits=Limits(iteration_limit=steps))
        spent.append(time.process_time() - began)
        taken.append(found.stats.iterations)
    return None if taken[2] <= taken[1] else (spent[2] - spent[1]) / (taken[2] - taken[1])


def compile_kernels(how: Mapping[str, Any]) -> None:
    """Measure small blocks on both paths, so that no later time holds a compilation."""
    for n in (40, 2500):
        measure(gaussian_block(n, 8, 0.1, 0.5, seed=0), **{**how, "time_limit": 60.0})


def run(measurements: Sequence[Measurement], ledger: Ledger, how: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measure what the ledger does not have; all results, in order. `how`: options of `measure`."""
    results = []
    todo = [settings_key({**_described(measurement), **how}) for measurement in measurements]
    if any(key not in ledger for key in todo):
        compile_kernels(how)
    for measurement, key in tqdm(list(zip(measurements, todo, strict=True)), desc="blocks", disable=None):
        if key not in ledger:
            problem = measurement.build()
            result = measure(problem, **how)
            if measurement.step_cost:
                result["seconds_per_step"] = seconds_per_step(problem)
            del problem
            gc.collect()
            ledger.add(key, {**_described(measurement), **result, "machine": machine_facts()})
        results.append(ledger[key])
    return results


def _described(measurement: Measurement) -> dict[str, Any]:
    return {
        "block": measurement.block,
        "sparsity": measurement.sparsity,
        "damping": measurement.damping,
        "mark_gap": measurement.mark_gap,
        "mark_seconds": measurement.mark_seconds,
        **measurement.settings,
    }


def write_tables(out: Path, case: str, results: list[dict[str, Any]], arguments: list[str]) -> None:
    """Write the case as CSV, its figures, and the page of all cases with results in `out`."""
    flat = [{key: value for key, value in row.items() if key != "machine"} for row in results]
    pd.DataFrame(flat).to_csv(out / f"{case}.csv", index=False)
    (out / "figures").mkdir(exist_ok=True)
    write_figures(case, results, out / "figures")
    commands = Ledger(out / "commands.jsonl")
    commands.add(case, {"arguments": arguments, "keys": [row["key"] for row in results]})
    cases = {}
    for name in CASES:
        if name in commands:
            known = Ledger(out / f"{name}.jsonl")
            record = commands[name]
            cases[name] = (record["arguments"], [known[key] for key in record["keys"] if key in known])
    (out / "results").mkdir(exist_ok=True)
    (out / "results" / "certified_gaps.md").write_text(gaps_page(cases), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Measure a case; the exit status is 1 if a mark is missed or a result does not verify."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    source = Source(
        rows=options.rows,
        samples_per_row=options.samples_per_row,
        seed=options.seed,
        scale=options.scale,
        data=options.data,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        measurements = [
            entry
            for entry in CASES[options.case](source)
            if (not options.sparsity or entry.sparsity in options.sparsity)
            and (not options.damping or entry.damping in options.damping)
        ]
        how = {
            "incumbent": options.incumbent,
            "fix": options.fix,
            "time_limit": options.time_limit,
            "seed": options.seed,
        }
        if options.restarts:
            how["restarts"] = options.restarts
        results = run(measurements, Ledger(options.out / f"{options.case}.jsonl"), how)
    except CbsError as error:
        raise SystemExit(f"error: {error}") from error
    write_tables(options.out, options.case, results, given)
    for row in results:
        sys.stdout.write(line(row) + "\n")
    return 0 if results and all(row["verified"] and met(row) for row in results) else 1


def met(row: dict[str, Any]) -> bool:
    """Whether the marks of a row, if it has any, are reached."""
    in_gap = row["mark_gap"] is None or (row["gap"] is not None and row["gap"] <= row["mark_gap"])
    return in_gap and (row["mark_seconds"] is None or row["seconds"] <= row["mark_seconds"])


def line(row: dict[str, Any]) -> str:
    """One result in a line."""
    gap = "no bound" if row["gap"] is None else f"gap {100.0 * row['gap']:.4f} %"
    return (
        f"{row['block']:32} damping {row['damping']:<7g} sparsity {row['sparsity']:.2f}  {gap:18} "
        f"{row['seconds']:8.1f} s  {row['peak_bytes'] / 2**30:6.2f} GiB  "
        f"{'verified' if row['verified'] else 'NOT VERIFIED'}{'' if met(row) else '  MISSED'}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.certified_gaps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", choices=list(CASES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory for results; resumes from it")
    parser.add_argument("--sparsity", type=float, nargs="+", help="only these of the case")
    parser.add_argument("--damping", type=float, nargs="+", help="only these of the case")
    parser.add_argument("--incumbent", choices=INCUMBENTS, default=INCUMBENTS[0])
    parser.add_argument("--restarts", type=int, default=0, help="further descents of the search")
    parser.add_argument("--no-fix", dest="fix", action="store_false", help="leave the first bound as it is")
    parser.add_argument("--time-limit", type=float, help="seconds for each bound and each search")
    parser.add_argument("--rows", type=int, default=1000, help="gradient rows of networks and digits")
    parser.add_argument("--samples-per-row", type=int, help="16 for MLPNet, 1 for ResNet20 by default")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the synthetic case to try it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="data directory (default: $CBS_OPT_DATA)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
