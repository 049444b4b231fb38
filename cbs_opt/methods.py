"""The registry of methods: name, programs, kind, options; what `prune` and `solve` choose from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cbs_opt.blocks import FisherBlock
from cbs_opt.heuristics.saliency import SALIENCIES, magnitude
from cbs_opt.selection import Selector, by_randomized_magnitude, by_saliency, by_swap_search
from formulations.errors import UnknownMethodError, UnknownOptionError, UnsupportedProblemError
from formulations.problem import PROGRAMS, check_program
from formulations.solution import BlockSolution

Solver = Callable[..., BlockSolution]
"""``solver(problem, program, *, limits, incumbent, **options)``."""
COMMON = ("limits", "incumbent")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to choose the pruned set.

    Attributes
    ----------
    name : str
    kind : str
        "saliency", "search" or "exact".
    summary : str
        One line for tables.
    programs : tuple of str
        Programs whose objective the method looks at. Saliencies look at neither, and are accepted
        for both: the set is then evaluated under the program.
    select : callable or None
        Matrix-free and batched, on the Fisher blocks of a network; see `cbs_opt.selection`.
    select_programs : tuple of str
        Programs that `select` takes.
    solver : callable or None
        On one `BlockProblem`, dense; see `formulations`.
    score : callable
        The saliency by which a global budget is spent across blocks.
    randomized : bool
        Whether another seed gives another set.
    needs_curvature : bool
        False for methods that look at the weights alone.
    """

    name: str
    kind: str
    summary: str
    programs: tuple[str, ...] = PROGRAMS
    select: Selector | None = None
    select_programs: tuple[str, ...] = PROGRAMS
    solver: Solver | None = None
    score: Callable[[FisherBlock], Tensor] = magnitude
    randomized: bool = False
    needs_curvature: bool = True

    @property
    def options(self) -> Mapping[str, Any]:
        """Options by name with their defaults, those of `select` and of `solver` together."""
        known: dict[str, Any] = {}
        for function in (self.select, self.solver):
            if function is not None:
                for parameter in inspect.signature(function).parameters.values():
                    if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in COMMON:
                        known[parameter.name] = parameter.default
        return known

    def check_options(self, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
        """Raise `UnknownOptionError` for an option that `function` does not take."""
        known = inspect.signature(function).parameters
        for name in options:
            if name not in known or name in COMMON:
                choices = ", ".join(self.options) or "none"
                raise UnknownOptionError(
                    "method_options", f"{name!r} for {self.name}", f"it takes: {choices}"
                )


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
            randomized=True,
        ),
    )


def available_methods() -> tuple[Method, ...]:
    """Every registered method.

    Returns
    -------
    tuple of Method
    """
    return _built_in()


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
    methods = {method.name: method for method in available_methods()}
    if name not in methods:
        raise UnknownMethodError("method", f"{name!r}", f"choose among {', '.join(methods)}")
    method = methods[name]
    if program not in method.programs:
        remedy = f"it takes program {' or '.join(map(repr, method.programs))}"
        raise UnsupportedProblemError("program", f"{program!r} for {name}", remedy)
    return method
