"""Methods and solvers that other packages add by entry points; one that is broken is named and left out.

A package declares in its ``pyproject.toml``::

    [project.entry-points."cbs_opt.methods"]
    my_search = "my_package:solve"           # a function, or a cbs_opt.select.methods.Method

    [project.entry-points."cbs_opt.solvers"]
    my_solver = "my_package:SOLVER"          # a formulations.solvers.base.Solver

and takes part in `solve`, `compare`, studies and reports under that name. A function is given blocks that
keep any so many weights; a `Method` says with `supports` which other kinds of `formulations.support` it
takes, and what it returns then states the support of the block, as `formulations.solution.stated_support`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import wraps
from importlib import metadata
from typing import Any, TypeVar

from formulations.problem import BlockProblem
from formulations.solution import BlockSolution

logger = logging.getLogger(__name__)

METHODS = "cbs_opt.methods"
SOLVERS = "cbs_opt.solvers"

Adapted = TypeVar("Adapted")


class PluginError(RuntimeError):
    """A method of another package broke the contract: its answer is no solution of the problem."""


def load_plugins(
    group: str, adapt: Callable[[str, Any], Adapted], taken: Collection[str]
) -> dict[str, Adapted]:
    """Return what installed packages add to a group, by name.

    Parameters
    ----------
    group : str
        Of entry points: `METHODS` or `SOLVERS`.
    adapt : callable
        ``adapt(name, loaded)`` checks what an entry point gave and returns what will be used; its
        exceptions count against the plug-in.
    taken : collection of str
        Names that cannot be added.

    Returns
    -------
    dict
        In the order of the names. A plug-in that cannot be imported, is of the wrong kind or has the
        name of another is left out, and a warning is logged with its name, its package and the reason.
    """
    found: dict[str, Adapted] = {}
    for point in sorted(metadata.entry_points(group=group), key=lambda point: point.name):
        try:
            if point.name in taken or point.name in found:
                raise ValueError("the name is taken")
            found[point.name] = adapt(point.name, point.load())
        except (Exception, SystemExit) as error:
            # Whatever a foreign module does while it is imported, ours go on.
            origin = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%r (%s) of %s is left out: %s", point.name, group, origin, reason)
    return found


def checked_solver(name: str, solver: Callable[..., Any]) -> Callable[..., BlockSolution]:
    """`solver`, with every answer recomputed by `formulations.verify` before anybody compares it.

    Raises, when called
    -------------------
    PluginError
        If the answer is not a `BlockSolution` of the program, or a claim of it is wrong.
    """

    @wraps(solver)
    def checked(problem: BlockProblem, program: str, **arguments: Any) -> BlockSolution:
        from formulations.verification import verify

        answer = solver(problem, program, **arguments)
        if not isinstance(answer, BlockSolution):
            raise PluginError(f"{name} returned a {type(answer).__name__}, not a BlockSolution")
        if answer.program != program:
            raise PluginError(f"{name} was given program {program!r} and solved {answer.program!r}")
        found = verify(problem, answer)
        if found.wrong:
            raise PluginError(f"{name}: {'; '.join(found.notes)}")
        return answer

    return checked
