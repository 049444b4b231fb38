"""Run a bridge in its own process, so that a crash or a hang of the solver costs only that process.

In-process solvers can end the interpreter (a segmentation fault, the memory killer) or ignore their
time limit. Here both become an honest status: the parent keeps the warm start and a clock of its own.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

from formulations.preparation import prepare_for
from formulations.problem import BlockProblem, check_program
from formulations.solution import BlockSolution, Limit, Limits
from formulations.solvers.conclusion import Outcome, conclude, known_set

GRACE = 20.0
"""Seconds past the time limit (starting a process and importing solvers included) before a kill."""


def solve_isolated(
    name: str,
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits | None = None,
    incumbent: BlockSolution | None = None,
    model: str | None = None,
    **options: Any,
) -> BlockSolution:
    """Solve with the bridge called `name` in a new process.

    Parameters are those of `Solver.solve`. Starting the process costs a few
    seconds, which do not count against ``limits.time_limit``.

    Returns
    -------
    BlockSolution
        The bridge's answer; the warm start with `Termination.ERROR` if the process died, and with
        `Limit.TIME` if it had to be killed `GRACE` seconds past the time limit.

    Raises
    ------
    CbsError
        Whatever the bridge raises.
    """
    prepare_for(problem, "greedy_obs", check_program(program))
    began = time.perf_counter()
    limits = limits or Limits()
    method = ":".join((name, model) if model else (name,))
    known = known_set(problem, check_program(program), method, limits, incumbent)
    arguments = {"limits": limits, "incumbent": known, "model": model, **options}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(sender, name, problem, program, arguments), daemon=True, name=f"solver-{name}"
    )
    process.start()
    # With the parent's end closed, the death of the child ends the wait below.
    sender.close()
    try:
        patience = None if limits.time_limit is None else limits.time_limit + GRACE
        if not receiver.poll(patience):
            return conclude(
                problem, known, limits, began, Outcome(limit=Limit.TIME, stats=_said("killed: time limit"))
            )
        answer = receiver.recv()
    except (EOFError, OSError):
        process.join()
        failure = f"the solver's process died with exit code {process.exitcode}"
        return conclude(problem, known, limits, began, Outcome(failure=failure))
    except KeyboardInterrupt:
        return conclude(
            problem, known, limits, began, Outcome(limit=Limit.INTERRUPTED, stats=_said("interrupted"))
        )
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(answer, BaseException):
        raise answer
    assert isinstance(answer, BlockSolution)
    return answer


def _said(message: str) -> dict[str, str]:
    return {"message": message}


def _child(
    sender: Connection, name: str, problem: BlockProblem, program: str, arguments: dict[str, Any]
) -> None:
    """Solve and send the answer, or the exception, to the parent."""
    from formulations.solvers import solve_with

    answer: BlockSolution | Exception
    try:
        answer = solve_with(name, problem, program, **arguments)
    except Exception as error:
        answer = error
    sender.send(answer)
    sender.close()
