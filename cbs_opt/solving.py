"""`solve` and `compare`: every registered method on one block, judged by one evaluator."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cbs_opt.select.methods import available_methods, find_method
from cbs_opt.select.one_block import rounded_one, select_one
from cbs_opt.select.preparation import prepare
from cbs_opt.system.threads import thread_limit
from formulations.errors import CbsError, UnsupportedProblemError
from formulations.problem import BlockProblem, check_program
from formulations.solution import BlockSolution, Limit, Limits
from formulations.solvers import available_solvers, models_for

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

COLUMNS = ("method", "status", "objective", "bound", "gap", "excess", "seconds", "nodes", "note")
NUMBERS = ("objective", "bound", "gap", "excess", "seconds", "nodes")
INTERRUPTED = "interrupted"
"""How the status ends in the last row of a comparison that was interrupted."""
LARGEST_DENSE = 4_096
"""Weights up to which `compare` runs methods of `DENSE_KINDS` without being asked to."""
DENSE_KINDS = ("exact", "solver")
"""Kinds of methods that form the Hessian of the block, or a model with as many terms."""


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
        The libraries of this process keep to so many threads meanwhile, whatever the environment says.
    **options
        Of the method; unknown ones are refused with the list of known ones.

    Returns
    -------
    BlockSolution
        A limit reached is a result with an honest status, not an exception.

    Raises
    ------
    UnknownMethodError, UnknownOptionError, UnsupportedProblemError, SolverUnavailableError
        The third also where the method does not take the support of the block; it names those that do.
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
    chosen = find_method(method, program).for_support(problem.support)
    chosen.check_options(options, program)
    prepare(method, program)
    limits = Limits(
        time_limit=time_limit,
        rel_gap=rel_gap,
        node_limit=node_limit,
        iteration_limit=iteration_limit,
        threads=threads,
        seed=seed,
    )
    with thread_limit(limits.threads):
        if program == "joint":
            problem.require_definite()
        if not chosen.blockwise and problem.support is not None:
            return rounded_one(chosen.score, problem, program, method=chosen.name, incumbent=incumbent)
        if not chosen.blockwise:
            return select_one(
                chosen.selector(program),
                problem,
                program,
                method=chosen.name,
                limits=limits,
                incumbent=incumbent,
                **options,
            )
        solution: BlockSolution = chosen.engine(
            problem, program, limits=limits, incumbent=incumbent, **options
        )
        return solution


def compare(
    problem: BlockProblem,
    *,
    program: str,
    methods: Sequence[str] | None = None,
    all_models: bool = False,
    time_limit: float = 60.0,
    rel_gap: float = 1e-4,
    threads: int = 1,
    seed: int = 0,
    on_row: Callable[[str], object] | None = None,
) -> pd.DataFrame:
    """Run many methods on one block and judge them by the same evaluator.

    Parameters
    ----------
    problem : BlockProblem
    program : {"selection", "joint"}
    methods : sequence of str, optional
        By default `default_methods`: every registered method, and every solver with its own choice
        of model; on a block of more than `LARGEST_DENSE` weights those that need its whole Hessian
        are left out, with the reason in the note, unless they are named.
    all_models : bool, default False
        Without `methods`: each solver with each of its models.
    time_limit : float, default 60
        Seconds for each method.
    rel_gap : float, default 1e-4
    threads, seed : int
    on_row : callable, optional
        Called with the name of each method when it has ended.

    Returns
    -------
    pandas.DataFrame
        One row a method: status, objective, bound, gap, excess over the best objective (relative),
        seconds, nodes, note. A method that cannot run, or fails in an unforeseen way, has its reason
        in the note. An interrupt ends the table with the method that it stopped.

    Raises
    ------
    ArgumentError
        If `program` is unknown or a limit is impossible.
    UnknownMethodError
        If a name in `methods` is no method's, before any runs.
    """
    check_program(program)
    limits = Limits(time_limit=time_limit, rel_gap=rel_gap, threads=threads, seed=seed)
    names = list(methods) if methods is not None else default_methods(program, all_models=all_models)
    unasked = methods is None and problem.n > LARGEST_DENSE
    for name in names:
        # A method that is known, but not for this program, gets a row with the reason.
        with suppress(UnsupportedProblemError):
            find_method(name, program)
            prepare(name, program)
    rows: list[Mapping[str, Any]] = []
    for name in names:
        if unasked and find_method(name, program).kind in DENSE_KINDS:
            found = f"it forms the Hessian of all {problem.n} weights, more than {LARGEST_DENSE}"
            note = f"{found}; name it in methods to run it"
            rows.append({"method": name, "status": "unavailable", "note": note})
        else:
            rows.append(_attempt(problem, name, program, limits))
        if on_row is not None:
            on_row(name)
        if rows[-1]["status"].endswith(INTERRUPTED):
            break
    import pandas as pd

    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(NUMBERS, float))
    best = table["objective"].min()
    table["excess"] = (table["objective"] - best) / max(abs(best), 1e-12)
    return table


def default_methods(program: str, *, all_models: bool = False) -> list[str]:
    """Every method for `program`: our own, then each solver that can pose it, installed or not.

    `all_models`: each solver with each of its models, instead of the one it takes by default.
    """
    names = [method.name for method in available_methods() if program in method.programs]
    for info in available_solvers():
        models = models_for(info.name, program)
        if not all_models:
            names.extend([info.name] if models else [])
        elif info.name.startswith("pyomo:"):
            names.extend(f"pyomo:{model}:{info.name.removeprefix('pyomo:')}" for model in models)
        else:
            names.extend(f"{info.name}:{model}" for model in models)
    return names


def _attempt(problem: BlockProblem, name: str, program: str, limits: Limits) -> Mapping[str, Any]:
    """Return the row of one method, whatever becomes of it."""
    began = time.perf_counter()
    try:
        solution = solve(problem, name, program=program, **asdict(limits))
    except CbsError as error:
        return {"method": name, "status": "unavailable", "note": str(error)}
    except KeyboardInterrupt:
        return {"method": name, "status": INTERRUPTED, "seconds": time.perf_counter() - began}
    except Exception as error:
        # A defect of one method or backend is no reason to lose the rows of the others.
        logger.exception("%s failed", name)
        return {"method": name, "status": "error", "note": f"{type(error).__name__}: {error}"}
    return {
        "method": name,
        "status": status_words(solution),
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap if solution.bound is not None else None,
        "seconds": time.perf_counter() - began,
        "nodes": solution.stats.nodes,
        "note": solution.stats.message,
    }


def status_words(solution: BlockSolution) -> str:
    """How a solve ended, in a few words: the termination and what stopped it early."""
    words = solution.termination.value
    if solution.limit is Limit.INTERRUPTED:
        return f"{words}, {INTERRUPTED}"
    return words if solution.limit is None else f"{words}, {solution.limit.value} limit"
