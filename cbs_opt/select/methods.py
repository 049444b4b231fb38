"""The registry of methods: name, programs, kind, options; what `prune` and `solve` choose from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.choice import Selector
from cbs_opt.select.joint_program.program import joint_saliency
from cbs_opt.select.joint_program.selectors import (
    by_iterative_hard_threshold,
    by_joint_greedy_obs,
    by_joint_swap_search,
)
from cbs_opt.select.saliency import SALIENCIES, magnitude
from cbs_opt.select.selectors import by_randomized_magnitude, by_saliency, by_swap_search
from formulations import incumbents
from formulations.branch_and_bound import branch_and_bound
from formulations.enumeration import enumerate_optimum
from formulations.errors import UnknownMethodError, UnknownOptionError, UnsupportedProblemError
from formulations.models import MODELS
from formulations.outer_approximation import outer_approximation
from formulations.plugins import METHODS, checked_solver, load_plugins
from formulations.problem import PROGRAMS, check_program
from formulations.relaxations import lower_bound
from formulations.solution import BlockSolution
from formulations.solvers import solve_with, solver_names

Solver = Callable[..., BlockSolution]
"""``solver(problem, program, *, limits, incumbent, **options)``."""
COMMON = ("limits", "incumbent", "warm", "ledger")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to choose the pruned set.

    Attributes
    ----------
    name : str
    kind : str
        "saliency", "search", "exact", "bound" or "solver".
    summary : str
        One line for tables.
    programs : tuple of str
        Programs whose objective the method looks at. Saliencies look at neither, and are accepted
        for both: the set is then evaluated under the program.
    select : callable or None
        Matrix-free and batched, on the Fisher blocks of a network; see `cbs_opt.select.selectors`.
    select_programs : tuple of str
        Programs that `select` takes.
    select_joint : callable or None
        Like `select`, for the joint program, where that takes another function.
    solver : callable or None
        On one `BlockProblem`, dense; see `formulations`.
    score : callable
        The saliency by which a global budget is spent across blocks.
    score_joint : callable or None
        That saliency for the joint program, where it is another.
    randomized : bool
        Whether another seed gives another set.
    needs_curvature : bool
        False for methods that look at the weights alone.
    free_options : bool
        The solver checks its options itself; they cannot be listed here.
    backend : str
        Name of the solver that a model is handed to, empty for methods that are none.
    """

    name: str
    kind: str
    summary: str
    programs: tuple[str, ...] = PROGRAMS
    select: Selector | None = None
    select_programs: tuple[str, ...] = PROGRAMS
    select_joint: Selector | None = None
    solver: Solver | None = None
    score: Callable[[FisherBlock], Tensor] = magnitude
    score_joint: Callable[[FisherBlock], Tensor] | None = None
    randomized: bool = False
    needs_curvature: bool = True
    free_options: bool = False
    backend: str = ""

    def engine(self, program: str) -> Callable[..., Any]:
        """The callable that serves `program`: `selector` where there is one, else `solver`."""
        function = self.selector(program) or self.solver
        assert function is not None
        return function

    def selector(self, program: str) -> Selector | None:
        """What chooses the sets of all blocks at once under `program`, if anything does."""
        if program == "joint" and self.select_joint is not None:
            return self.select_joint
        return self.select if program in self.select_programs else None

    def scoring(self, program: str) -> Method:
        """The method with the saliency of `program` as its `score`."""
        if program == "selection" or self.score_joint is None:
            return self
        return replace(self, score=self.score_joint)

    def options(self, program: str) -> Mapping[str, Any]:
        """Options by name with their defaults."""
        return {
            parameter.name: parameter.default
            for parameter in inspect.signature(self.engine(program)).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in COMMON
        }

    def check_options(self, options: Mapping[str, Any], program: str) -> None:
        """Raise `UnknownOptionError` for an option that the method does not take."""
        known = self.options(program)
        for name in options:
            if name not in known and not self.free_options:
                choices = ", ".join(known) or "none"
                found = f"{name!r} for {self.name} on program {program!r}"
                raise UnknownOptionError("method_options", found, f"it takes: {choices}")


def _saliency(name: str, summary: str, *, needs_curvature: bool = True) -> Method:
    return Method(
        name=name,
        kind="saliency",
        summary=summary,
        select=by_saliency(name),
        score=SALIENCIES[name],
        needs_curvature=needs_curvature,
    )


def _built_in() -> tuple[Method, ...]:
    return (
        _saliency("magnitude", "smallest |w|", needs_curvature=False),
        Method(
            name="randomized_magnitude",
            kind="saliency",
            summary="small |w|, drawn at random within buckets of similar magnitude",
            select=by_randomized_magnitude,
            randomized=True,
            needs_curvature=False,
        ),
        _saliency("obd", "Optimal Brain Damage: 1/2 H_ii w_i^2"),
        _saliency("obs", "Optimal Brain Surgeon: w_i^2 / (2 [H^-1]_ii)"),
        _saliency("loss_preservation", "|g_i w_i|"),
        _saliency("gradient_norm", "|w_i (H g)_i|"),
        Method(
            name="swap_search",
            kind="search",
            summary="best-improvement swaps to a proved 1-swap optimum",
            select=by_swap_search,
            select_programs=("selection",),
            select_joint=by_joint_swap_search,
            score_joint=joint_saliency,
            randomized=True,
        ),
        Method(
            name="greedy_obs",
            kind="search",
            summary="what costs least goes, the rest moves, again; one by one in small blocks",
            select_programs=(),
            select_joint=by_joint_greedy_obs,
            score_joint=joint_saliency,
            solver=incumbents.greedy,
        ),
        Method(
            name="iterative_hard_threshold",
            kind="search",
            summary="gradient steps on the weights, each keeping the largest",
            programs=("joint",),
            select_programs=(),
            select_joint=by_iterative_hard_threshold,
            score_joint=joint_saliency,
        ),
        _dense("enumeration", "exact", "every set: the oracle, n up to about 24", enumerate_optimum),
        _dense("branch_and_bound", "exact", "our branch and bound, with certified bounds", branch_and_bound),
        _dense("outer_approximation", "exact", "cuts on a HiGHS integer program", outer_approximation),
        _dense("lower_bound", "bound", "certified relaxation bound and its rounding", lower_bound),
    )


def _dense(name: str, kind: str, summary: str, solver: Solver) -> Method:
    return Method(name=name, kind=kind, summary=summary, select_programs=(), solver=solver)


def _on_solver(name: str) -> Method | None:
    """``<solver>``, ``<solver>:<model>`` or ``pyomo:<model>:<solver>`` as a method, else None."""
    head, _, rest = name.partition(":")
    if name in solver_names():
        solver, model = name, ""
    elif head == "pyomo":
        model, _, solver = rest.partition(":")
        solver = f"pyomo:{solver}"
    else:
        solver, model = head, rest
    if solver not in solver_names():
        return None
    run = partial(solve_with, solver, model=model or None)
    return Method(
        name=name,
        kind="solver",
        summary=f"{model or 'its default model'} on {solver}",
        programs=(MODELS[model].program,) if model in MODELS else PROGRAMS,
        select_programs=(),
        solver=run,
        free_options=True,
        backend=solver,
    )


def available_methods() -> tuple[Method, ...]:
    """Every registered method: ours, then those of installed packages (`formulations.plugins`).

    Returns
    -------
    tuple of Method
    """
    return (*_built_in(), *_plugged_in())


@cache
def _plugged_in() -> tuple[Method, ...]:
    """Methods that other packages add, imported once."""
    taken = {method.name for method in _built_in()}
    return tuple(load_plugins(METHODS, _adapted, taken).values())


def _adapted(name: str, target: object) -> Method:
    """A `Method`, or a function ``(problem, program, *, limits, incumbent, **options)`` as one."""
    if not isinstance(target, Method):
        if not callable(target):
            raise TypeError(f"it is a {type(target).__name__}, not a Method or a function")
        kinds = [parameter.kind for parameter in inspect.signature(target).parameters.values()]
        summary = (inspect.getdoc(target) or "").partition("\n")[0] or "of another package"
        target = replace(
            _dense(name, "search", summary, target),
            free_options=inspect.Parameter.VAR_KEYWORD in kinds,
            randomized=True,
        )
    if target.select is None and target.select_joint is None and target.solver is None:
        raise ValueError("it has neither select nor solver")
    solver = None if target.solver is None else checked_solver(name, target.solver)
    return replace(target, name=name, solver=solver)


def find_method(name: str, program: str) -> Method:
    """The method of that name, if it takes `program`.

    Raises
    ------
    UnknownMethodError
        With the known names.
    UnsupportedProblemError
        If the method exists, but not for `program`.
    """
    check_program(program)
    if not isinstance(name, str):
        raise UnknownMethodError("method", f"{name!r}", "pass the name of a method")
    methods = {method.name: method for method in available_methods()}
    method = methods.get(name) or _on_solver(name)
    if method is None:
        remedy = f"choose among {', '.join(methods)}, or <solver>:<model> with a solver of {_solvers()}"
        raise UnknownMethodError("method", f"{name!r}", remedy)
    if program not in method.programs:
        remedy = f"it takes program {' or '.join(map(repr, method.programs))}"
        raise UnsupportedProblemError("program", f"{program!r} for {name}", remedy)
    return method


def _solvers() -> str:
    return ", ".join(solver_names())
