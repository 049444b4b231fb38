"""Joint search on whole networks: the objective above the certified bound against time.

    python -m experiments.benchmarks.joint_search --network mlpnet_mnist --damping 1e-3 1e-4

One JSON line for every damping, sparsity and start. The block is the whole network without the gradient
term, as `prune` takes it by default; its rows are `--rows` averages over `--samples-per-row` training
samples. The bound is `cbs_opt.lower_bound` without a time limit. For every method:

- `above_bound_start`, `above_bound`: how far the start and the end are above the bound, in percent,
- `seconds_to`: seconds, start included, until within 5, 1 and .1 percent,
- `trace`: seconds and percent above the bound after every move,
- `load`: the machine's load average, so that times on a busy machine are known as such.

"plain_hard_threshold" is the rival: hard thresholding with gradient steps alone and one exact solve at the
end, as the literature describes it (Blumensath & Davies 2010; CHITA, Benbaki et al., ICML 2023, without
its refinements). It is our implementation, run in the same process on the same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cbs_opt
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.products import adjoint_image, image
from cbs_opt.select.joint_program.program import JointProgram
from cbs_opt.select.joint_program.search import joint_search
from cbs_opt.select.joint_program.starts import greedy_obs_set, hard_threshold_set, relaxed_set
from cbs_opt.select.saliency import magnitude, obs, without_lowest
from experiments.benchmarks.swap_search import DAMPING, PeakMemory, whole_network
from formulations.errors import CbsError

STARTS: Mapping[str, Callable[[JointProgram, int], Tensor]] = {
    "relaxation": relaxed_set,
    "iterative_hard_threshold": hard_threshold_set,
    "greedy_obs": greedy_obs_set,
    "magnitude": lambda program, count: without_lowest(magnitude(program.block), count),
    "obs": lambda program, count: without_lowest(obs(program.block), count),
}
RIVAL = "plain_hard_threshold"
LEVELS = (5.0, 1.0, 0.1)
"""Percent above the bound at which the clock is read."""
PLAIN_STEPS = 100


def plain_hard_threshold(program: JointProgram, count: int) -> Tensor:
    """Hard thresholding by gradient steps of the exact length on the support, halved until it descends."""
    point = torch.where(without_lowest(magnitude(program.block), count), program.block.weights.double(), 0.0)
    residual = image(program.rows, point) - program.pull
    value = _value(program, point, residual)
    for _ in range(PLAIN_STEPS):
        slope = adjoint_image(program.rows, residual) + program.damping * (point - program.anchor)
        inside = torch.where(point != 0.0, slope, 0.0)
        curvature = image(program.rows, inside).square().sum() + program.damping * inside.square().sum()
        length, descended = float(inside.square().sum() / curvature), False
        while length > 0.0 and not descended:
            moved = point - length * slope
            trial = torch.where(without_lowest(moved.abs(), count), moved, 0.0)
            trial_residual = image(program.rows, trial) - program.pull
            trial_value = _value(program, trial, trial_residual)
            descended = trial_value < value
            if descended:
                point, residual, value = trial, trial_residual, trial_value
            elif torch.equal(trial, point):
                length = 0.0
            length *= 0.5
        if not descended:
            break
    return without_lowest(point.abs(), count)


def _value(program: JointProgram, point: Tensor, residual: Tensor) -> float:
    distance = (point - program.anchor).square().sum()
    return 0.5 * float(residual.square().sum() + program.damping * distance)


def measure(
    program: JointProgram, count: int, bound: float, name: str, time_limit: float, restarts: int
) -> dict[str, Any]:
    """Run one method and follow its objective."""
    began = time.monotonic()
    with PeakMemory() as memory:
        start = plain_hard_threshold(program, count) if name == RIVAL else STARTS[name](program, count)
        prepared = time.monotonic() - began
        if name == RIVAL:
            first = last = program.at(start).value
            trace, ended = [(time.monotonic() - began, last)], {}
        else:
            found = joint_search(program, start, deadline=began + time_limit, restarts=restarts)
            first, last = found.initial_value, found.value
            trace = [(prepared, first)]
            trace += [(prepared + p.seconds, p.objective) for p in found.trace if p.objective is not None]
            ended = {"swaps": found.swaps, "locally_optimal": found.locally_optimal}
    above = [(seconds, 100.0 * (value / bound - 1.0)) for seconds, value in trace]
    return {
        "method": name,
        "seconds_start": round(prepared, 2),
        "seconds": round(time.monotonic() - began, 2),
        "above_bound_start": round(100.0 * (first / bound - 1.0), 4),
        "above_bound": round(100.0 * (last / bound - 1.0), 4),
        "seconds_to": {
            f"{level:g}": next((round(s, 2) for s, gap in above if gap <= level), None) for level in LEVELS
        },
        "objective": last,
        **ended,
        "peak_gib_beyond_rows": round(memory.beyond / 2**30, 2),
        "trace": [(round(seconds, 2), round(gap, 4)) for seconds, gap in above],
    }


def certified(block: FisherBlock, count: int) -> tuple[float, float]:
    """Return the certified bound on the joint program, and the seconds that it took."""
    began = time.monotonic()
    bound = cbs_opt.lower_bound(block.to_problem(count), program="joint").bound
    assert bound is not None
    return bound, time.monotonic() - began


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.joint_search", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--network", choices=sorted(DAMPING), default="mlpnet_mnist")
    parser.add_argument("--damping", type=float, nargs="+", default=[1e-3, 1e-4])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    methods = [*STARTS, RIVAL]
    parser.add_argument("--methods", nargs="+", choices=methods, default=["relaxation", methods[1], RIVAL])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--samples-per-row", type=int, default=16)
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds for each method")
    parser.add_argument("--restarts", type=int, default=0, help="as in cbs_opt's swap_search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="data directory (default: $CBS_OPT_DATA)")
    given = parser.parse_args()
    try:
        block = whole_network(given.network, given.rows, given.seed, given.data, given.samples_per_row)
    except CbsError as error:
        raise SystemExit(f"error: {error}") from error
    for damping in given.damping:
        damped = replace(block, gradient=None, damping=damping)
        program = JointProgram(damped)
        for sparsity in given.sparsity:
            count = round(sparsity * block.n)
            bound, seconds = certified(damped, count)
            case = {
                "network": given.network,
                "damping": damping,
                "sparsity": sparsity,
                "n": block.n,
                "n_prune": count,
                "threads": torch.get_num_threads(),
                "bound": bound,
                "bound_seconds": round(seconds, 2),
            }
            for name in given.methods:
                row = measure(program, count, bound, name, given.time_limit, given.restarts)
                load = round(os.getloadavg()[0], 2)
                print(json.dumps({**case, "load": load, **row}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
