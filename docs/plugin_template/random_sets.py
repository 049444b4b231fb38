"""A method for cbs-opt in one file: the best of many random sets.

`pip install` the folder of this file, and `random_sets` takes part in `solve`, `compare`, studies and
reports.
"""

import time

import numpy as np

from cbs_opt.select.methods import Method
from formulations.incumbents import IncumbentPool
from formulations.solution import SolveStats


def solve(problem, program, *, limits, incumbent=None, draws: int = 1000):
    """Draw `draws` sets of `problem.n_prune` weights; options are the keyword arguments."""
    began = time.perf_counter()
    generator = np.random.default_rng(limits.seed)
    pool = IncumbentPool(problem, program, incumbent)  # evaluates every offer, keeps the best
    pool.offer_magnitude_if_empty()
    draw = 0
    while draw < draws and (limits.time_limit is None or time.perf_counter() - began < limits.time_limit):
        draw += 1
        keep = np.ones(problem.n, dtype=bool)
        keep[generator.choice(problem.n, problem.n_prune, replace=False)] = False
        pool.offer(keep)
    stats = SolveStats(seconds=time.perf_counter() - began, iterations=draw)
    return pool.solution(method="random_sets", stats=stats)


METHOD = Method(
    name="random_sets",
    kind="search",
    summary="the best of many random sets",
    function=solve,
    randomized=True,
)
