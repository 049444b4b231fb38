"""A method that takes as long as it is told, for timing executors; workers import it from here."""

from __future__ import annotations

import time

import numpy as np

from formulations import BlockProblem, BlockSolution, Limits
from formulations.incumbents import IncumbentPool


def paced(
    problem: BlockProblem, program: str, *, limits: Limits, incumbent: BlockSolution | None, seconds: float
) -> BlockSolution:
    """Products with the Hessian for that many seconds of this thread's processor time."""
    until = time.thread_time() + seconds
    vector = problem.weights
    while time.thread_time() < until:
        vector = problem.hessian_product(vector)
        vector = vector / np.abs(vector).max()
    pool = IncumbentPool(problem, program, incumbent)
    pool.offer_magnitude_if_empty()
    return pool.solution(method="paced")
