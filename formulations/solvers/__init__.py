"""Solver bridges: the models of `formulations.models` on HiGHS, OR-tools, SciPy, Pyomo, SCIP and Gurobi.

One `Solver` a bridge, `SOLVER` in its module; `solve_with` picks one by name and `available_solvers`
lists them. No solver is imported before it is used. `formulations.solvers.isolation.solve_isolated`
runs a bridge in its own process, where a crash or a hang does no harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from formulations.errors import UnsupportedProblemError
from formulations.plugins import SOLVERS, load_plugins
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution
from formulations.solvers.base import Solver, SolverInfo

BRIDGES = ("highs", "mathopt", "cp_sat", "scipy_milp", "scip", "gurobi")
PYOMO_BRIDGES = ("pyomo:highs", "pyomo:scip", "pyomo:gurobi")


def solver_names() -> tuple[str, ...]:
    """Return names of all bridges, installed or not, those of other packages last."""
    return (*BRIDGES, *PYOMO_BRIDGES, *_plugged_in())


@cache
def _plugged_in() -> Mapping[str, Solver]:
    """Return bridges that other packages add, imported once."""
    return load_plugins(SOLVERS, _adapted, BRIDGES + PYOMO_BRIDGES)


def _adapted(name: str, target: object) -> Solver:
    if not isinstance(target, Solver):
        raise TypeError(f"it is a {type(target).__name__}, not a Solver")
    if ":" in name or target.name != name:
        raise ValueError(f"its solver is called {target.name!r}: use one name, without a colon")
    return target


def bridge(name: str) -> Solver:
    """Return the bridge called `name`; `UnsupportedProblemError` if there is none."""
    if name not in solver_names():
        raise UnsupportedProblemError("solver", f"{name!r}", f"use one of: {', '.join(solver_names())}")
    if name in _plugged_in():
        solver = _plugged_in()[name]
    elif name.startswith("pyomo:"):
        solver = import_module("formulations.solvers.pyomo_bridge").SOLVERS[name.removeprefix("pyomo:")]
    else:
        solver = import_module(f"formulations.solvers.{name}").SOLVER
    assert isinstance(solver, Solver)
    return solver


def available_solvers() -> list[SolverInfo]:
    """Return every bridge with its version, capabilities and limits, or why it cannot run."""
    return [bridge(name).info() for name in solver_names()]


def models_for(name: str, program: str) -> list[str]:
    """Return the models of `program` that the solver called `name` can take."""
    return bridge(name).models_of(program)


def check_native_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `UnknownOptionError` for an option that the solver called `name` does not take.

    A solver that is not installed cannot be asked, and lets everything pass.
    """
    solver = bridge(name)
    if options and solver.info().available:
        solver.check_options(options)


def solve_with(name: str, problem: BlockProblem, program: str, **arguments: Any) -> BlockSolution:
    """Solve `program` with the bridge called `name`; other arguments and errors as of `Solver.solve`."""
    return bridge(name).solve(problem, program, **arguments)


__all__ = ["SolverInfo", "available_solvers", "bridge", "models_for", "solve_with", "solver_names"]
