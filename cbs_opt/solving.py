"""`solve` and `compare`: every registered method on one block, judged by one evaluator."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from cbs_opt.blocks import FisherBlock
from cbs_opt.methods import Method, available_methods, find_method
from formulations.errors import CbsError
from formulations.incumbents import IncumbentPool
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution, Limits, SolveStats, Termination
from formulations.solvers import available_solvers, models_for

COLUMNS = ("method", "status", "objective", "bound", "gap", "excess", "seconds", "nodes", "note")


def solve(
    problem: BlockProblem,
    method: str = "swap_search",
    *,
    program: str,
    incumbent: BlockSolution | None = None,
    time_limit: float | None = None,
    rel_gap: float = 1e-6,
    node_limit: int | None = None,
    iteration_limit: int | None = None,
    threads: int = 1,
    seed: int = 0,
    **options: Any,
) -> BlockSolution:
    """Solve one program on one block.

    Parameters
    ----------
    problem : BlockProblem
    method : str, default "swap_search"
        A name of `available_methods`, or a solver as ``"<solver>"``, ``"<solver>:<model>"`` or
        ``"pyomo:<model>:<solver>"``.
    program : {"selection", "joint"}
        Which program; the two have different optima and their objectives do not compare.
    incumbent : BlockSolution, optional
        Warm start; the result is never worse.
    time_limit : float, optional
        Wall-clock seconds.
    rel_gap : float, default 1e-6
        Relative gap at which an exact method calls the result optimal.
    node_limit, iteration_limit : int, optional
    threads, seed : int, default 1 and 0
    **options
        Of the method; unknown ones are refused with the list of known ones.

    Returns
    -------
    BlockSolution
        A limit reached is a result with an honest status, not an exception.

    Raises
    ------
    UnknownMethodError, UnknownOptionError, UnsupportedProblemError, SolverUnavailableError
    NotPositiveDefiniteError
        If the joint program is asked for and ``H`` is singular.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.random.default_rng(0).normal(size=(20, 12))
    >>> block = BlockProblem(weights=np.ones(12), n_prune=6, rows=rows, damping=0.1)
    >>> solve(block, "branch_and_bound", program="joint").proved
    True
    """
    chosen = find_method(method, program)
    chosen.check_options(options, program)
    limits = Limits(
        time_limit=time_limit,
        rel_gap=rel_gap,
        node_limit=node_limit,
        iteration_limit=iteration_limit,
        threads=threads,
        seed=seed,
    )
    if program == "joint":
        problem.require_definite()
    if program in chosen.select_programs:
        return _select(chosen, problem, program, limits, incumbent, options)
    solution: BlockSolution = chosen.engine(program)(
        problem, program, limits=limits, incumbent=incumbent, **options
    )
    return solution


def compare(
    problem: BlockProblem,
    *,
    program: str,
    methods: Sequence[str] | None = None,
    time_limit: float = 60.0,
    rel_gap: float = 1e-4,
    threads: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Run many methods on one block and judge them by the same evaluator.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    methods : sequence of str, optional
        By default every registered method, and every solver with every model it can take.
    time_limit : float, default 60
        Seconds for each method.
    rel_gap : float, default 1e-4
    threads, seed : int

    Returns
    -------
    pandas.DataFrame
        One row a method: status, objective, bound, gap, excess over the best objective (relative),
        seconds, nodes, note. A method that cannot run has its reason in the note.
    """
    limits: dict[str, Any] = {
        "time_limit": time_limit,
        "rel_gap": rel_gap,
        "threads": threads,
        "seed": seed,
    }
    names = list(methods) if methods is not None else default_methods(program)
    rows: list[Mapping[str, Any]] = []
    for name in names:
        began = time.perf_counter()
        try:
            solution = solve(problem, name, program=program, **limits)
        except CbsError as error:
            rows.append({"method": name, "status": "unavailable", "note": str(error)})
            continue
        rows.append(_row(name, solution, time.perf_counter() - began))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    best = table["objective"].min()
    table["excess"] = (table["objective"] - best) / max(abs(best), 1e-12)
    return table


def default_methods(program: str) -> list[str]:
    """Every method for `program`: our own, then each installed solver with each of its models."""
    names = [method.name for method in available_methods() if program in method.programs]
    for info in available_solvers():
        for model in models_for(info.name, program):
            if info.name.startswith("pyomo:"):
                names.append(f"pyomo:{model}:{info.name.removeprefix('pyomo:')}")
            else:
                names.append(f"{info.name}:{model}")
    return names


def _row(name: str, solution: BlockSolution, seconds: float) -> Mapping[str, Any]:
    limit = "" if solution.limit is None else f" ({solution.limit.value} limit)"
    return {
        "method": name,
        "status": f"{solution.termination.value}{limit}",
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap if solution.bound is not None else None,
        "seconds": seconds,
        "nodes": solution.stats.nodes,
        "note": solution.stats.message,
    }


def _select(
    method: Method,
    problem: BlockProblem,
    program: str,
    limits: Limits,
    incumbent: BlockSolution | None,
    options: Mapping[str, Any],
) -> BlockSolution:
    """A method of `cbs_opt.selection` on one block, evaluated under the program."""
    began = time.perf_counter()
    pool = IncumbentPool(problem, program, incumbent)
    if method.kind == "search" and pool.keep is not None:
        options = {**options, "warm": [torch.from_numpy(~pool.keep)]}
    choice = method.engine(program)([_as_block(problem)], [problem.n_prune], limits=limits, **options)[0]
    pool.offer(~choice.pruned.numpy())
    stats = SolveStats(
        seconds=time.perf_counter() - began, iterations=choice.iterations, message=choice.status
    )
    return pool.solution(method=method.name, termination=Termination.FEASIBLE, stats=stats)


def _as_block(problem: BlockProblem) -> FisherBlock:
    tensors = {
        name: None if array is None else torch.tensor(array)
        for name in ("weights", "rows", "hessian", "gradient")
        for array in [getattr(problem, name)]
    }
    assert tensors["weights"] is not None
    return FisherBlock(
        name=problem.name,
        start=0,
        stop=problem.n,
        weights=tensors["weights"],
        rows=tensors["rows"],
        hessian=tensors["hessian"],
        gradient=tensors["gradient"],
        damping=problem.damping,
    )
