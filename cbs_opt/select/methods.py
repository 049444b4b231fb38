"""The registry of methods: name, programs, kind, options; what `prune` and `solve` choose from.

An engine is named by its module and imported when it is used: to list the methods loads no solver.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from formulations.errors import UnknownMethodError, UnknownOptionError, UnsupportedProblemError
from formulations.plugins import METHODS, checked_solver, load_plugins
from formulations.problem import PROGRAMS, check_program
from formulations.support import COUNT, KINDS, TAKEN, Support

if TYPE_CHECKING:
    from torch import Tensor

    from cbs_opt.hessian.block import FisherBlock
    from cbs_opt.select.choice import Selector

SCORES = "cbs_opt.select.scores"
SALIENCY = "cbs_opt.select.saliency"
SELECTION = "cbs_opt.select.selection_program.selectors"
JOINT = "cbs_opt.select.joint_program.selectors"
JOINT_SALIENCY = "cbs_opt.select.joint_program.channel_program:joint_saliency"
DENSE_SEARCHES = {
    "swap_search": "formulations.incumbents:swap_search",
    "greedy_obs": "formulations.incumbents:greedy",
}
"""What the searches on the blocks of a network are on one dense block."""
COMMON = ("limits", "incumbent", "warm", "ledger", "tuning", "heuristic")
"""Arguments of engines that are no options of the method."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to choose the kept set, for the programs that it serves with one engine.

    A method with an engine for each program has an entry for each. `kind` is "saliency", "search", "exact",
    "bound" or "solver", `summary` one line for tables. `function` is the engine, or ``"module:name"`` of it:
    where `blockwise`, ``solver(problem, program, *, limits, incumbent, **options)`` on one `BlockProblem`,
    dense, so that workers can share the blocks; else a `cbs_opt.select.choice.Selector` on the Fisher blocks
    of a network. `programs` are those whose objective the method looks at: saliencies look at neither, and
    are accepted for both; the set is then evaluated under the program.

    `scoring` is the saliency by which a global budget is spent across blocks, or ``"module:name"`` of it.
    `randomized` says whether another seed gives another set, `needs_curvature` is False for methods that look
    at the weights alone. With `free_options` the engine checks its options itself; they cannot be listed
    here. `backend` is the name of the solver that a model is handed to, empty for methods that are none.

    `supports` are the kinds of `formulations.support` that it takes on one `BlockProblem`. Where `dense` is
    given, it is the engine on one dense block for those that are no count; a saliency rounds its scores.
    """

    name: str
    kind: str
    summary: str
    function: Callable[..., Any] | str
    programs: tuple[str, ...] = PROGRAMS
    blockwise: bool = True
    scoring: Callable[[FisherBlock], Tensor] | str = f"{SALIENCY}:magnitude"
    randomized: bool = False
    needs_curvature: bool = True
    free_options: bool = False
    backend: str = ""
    supports: tuple[str, ...] = (COUNT,)
    dense: str = ""

    @property
    def engine(self) -> Callable[..., Any]:
        """The callable that does the work, imported if it is not yet."""
        return _imported(self.function)

    def for_support(self, support: Support | None) -> Method:
        """Return the method as it is on a block with `support`; None is a count.

        Raises `UnsupportedProblemError`, naming the methods that take it, if this one does not.
        """
        if support is not None and support.kind not in self.supports:
            able = dict.fromkeys(each.name for each in available_methods() if support.kind in each.supports)
            found = f"{support} ({support.kind}), which {self.name} does not take"
            raise UnsupportedProblemError("support", found, f"use one of: {', '.join(able)}")
        if support is None or not self.dense:
            return self
        return replace(self, function=self.dense, blockwise=True)

    def selector(self, program: str) -> Selector:
        """Return what chooses the sets of all blocks under `program`, one after another where `blockwise`."""
        if not self.blockwise:
            return self.engine
        from cbs_opt.select.blockwise import by_solver

        return by_solver(self.engine, self.name, program)

    def score(self, block: FisherBlock) -> Tensor:
        """Return the scores (n,) by which a global budget is spent across blocks."""
        scores: Tensor = _imported(self.scoring)(block)
        return scores

    @property
    def options(self) -> Mapping[str, Any]:
        """Options by name with their defaults."""
        return {
            parameter.name: parameter.default
            for parameter in inspect.signature(self.engine).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in COMMON
        }

    def check_options(self, options: Mapping[str, Any], program: str) -> None:
        """Raise `UnknownOptionError` for an option that the method does not take."""
        for name in () if self.free_options else options:
            if name not in self.options:
                found = f"{name!r} for {self.name} on program {program!r}"
                listed = ", ".join(self.options) or "none"
                raise UnknownOptionError("method_options", found, f"it takes: {listed}")


def _imported(function: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    imported: Callable[..., Any] = getattr(import_module(module), name)
    return imported


def _saliency(name: str, summary: str) -> Method:
    return Method(
        name=name,
        kind="saliency",
        summary=summary,
        function=f"{SCORES}:by_{name}",
        blockwise=False,
        scoring=f"{SALIENCY}:{name}",
        needs_curvature=name != "magnitude",
        supports=KINDS,
    )


def _search(name: str, program: str, summary: str, function: str) -> Method:
    return Method(
        name=name,
        kind="search",
        summary=summary,
        function=function,
        programs=(program,),
        blockwise=False,
        scoring=f"{SALIENCY}:magnitude" if program == "selection" else JOINT_SALIENCY,
        randomized=name == "swap_search",
        supports=TAKEN.get(name, (COUNT,)),
        dense=DENSE_SEARCHES.get(name, ""),
    )


def _dense(name: str, kind: str, summary: str, engine: str) -> Method:
    module, _, function = engine.partition(":")
    engine = f"formulations.{module}:{function or name}"
    return Method(name=name, kind=kind, summary=summary, function=engine, supports=TAKEN[name])


def _searching(name: str, summary: str) -> Method:
    engine = f"cbs_opt.select.exact:{name}"
    return Method(name=name, kind="exact", summary=summary, function=engine, supports=TAKEN[name])


SWAPS = "best-improvement swaps to a proved 1-swap optimum"
GREEDY = "what costs least goes, the rest moves, again; one by one in small blocks"
THRESHOLDING = "gradient steps on the weights, each keeping the largest"
BUILT_IN = (
    _saliency("magnitude", "smallest |w|"),
    replace(
        _saliency("magnitude", "small |w|, drawn at random within buckets of similar magnitude"),
        name="randomized_magnitude",
        function=f"{SCORES}:by_randomized_magnitude",
        randomized=True,
        supports=(COUNT,),
    ),
    _saliency("obd", "Optimal Brain Damage: 1/2 H_ii w_i^2"),
    _saliency("obs", "Optimal Brain Surgeon: w_i^2 / (2 [H^-1]_ii)"),
    _saliency("loss_preservation", "|g_i w_i|"),
    _saliency("gradient_norm", "|w_i (H g)_i|"),
    _search("swap_search", "selection", SWAPS, f"{SELECTION}:by_swap_search"),
    _search("swap_search", "joint", SWAPS, f"{JOINT}:by_joint_swap_search"),
    replace(_dense("greedy_obs", "search", GREEDY, "incumbents:greedy"), programs=("selection",)),
    _search("greedy_obs", "joint", GREEDY, f"{JOINT}:by_joint_greedy_obs"),
    _search("iterative_hard_threshold", "joint", THRESHOLDING, f"{JOINT}:by_iterative_hard_threshold"),
    _dense(
        "enumeration", "exact", "every set: the oracle, n up to about 24", "enumeration:enumerate_optimum"
    ),
    _searching("branch_and_bound", "our branch and bound, with certified bounds"),
    _searching("outer_approximation", "cuts on a HiGHS integer program"),
    _dense("lower_bound", "bound", "certified relaxation bound and its rounding", "relaxations"),
)
"""Our methods."""


def _on_solver(name: str) -> Method | None:
    """Return ``<solver>``, ``<solver>:<model>`` or ``pyomo:<model>:<solver>`` as a method, else None."""
    from formulations.models import MODELS
    from formulations.solvers import solve_with, solver_names

    names = solver_names()
    head, _, rest = name.partition(":")
    if name in names:
        solver, model = name, ""
    elif head == "pyomo":
        model, _, solver = rest.partition(":")
        solver = f"pyomo:{solver}"
    else:
        solver, model = head, rest
    if solver not in names:
        return None
    return Method(
        name=name,
        kind="solver",
        summary=f"{model or 'its default model'} on {solver}",
        function=partial(solve_with, solver, model=model or None),
        programs=(MODELS[model].program,) if model in MODELS else PROGRAMS,
        free_options=True,
        backend=solver,
        supports=KINDS,
    )


def available_methods() -> tuple[Method, ...]:
    """Return every registered method: ours, then those of installed packages (`formulations.plugins`).

    A method with an engine for each program is there once for each.
    """
    return (*BUILT_IN, *_plugged_in())


@cache
def _plugged_in() -> tuple[Method, ...]:
    return tuple(load_plugins(METHODS, _adapted, {method.name for method in BUILT_IN}).values())


def _adapted(name: str, target: object) -> Method:
    """Return a `Method`, or a function ``(problem, program, *, limits, incumbent, **options)`` as one."""
    if not isinstance(target, Method):
        if not callable(target):
            raise TypeError(f"it is a {type(target).__name__}, not a Method or a function")
        kinds = [parameter.kind for parameter in inspect.signature(target).parameters.values()]
        target = Method(
            name=name,
            kind="search",
            summary=(inspect.getdoc(target) or "").partition("\n")[0] or "of another package",
            function=target,
            free_options=inspect.Parameter.VAR_KEYWORD in kinds,
            randomized=True,
        )
    function = checked_solver(name, target.engine) if target.blockwise else target.engine
    return replace(target, name=name, function=function)


def find_method(name: str, program: str) -> Method:
    """Return the method of that name for `program`.

    Raises `UnknownMethodError` with the known names; `UnsupportedProblemError` if the method exists, but not
    for `program`.
    """
    check_program(program)
    if not isinstance(name, str):
        raise UnknownMethodError("method", f"{name!r}", "pass the name of a method")
    methods = available_methods()
    entries = [method for method in methods if method.name == name]
    if not entries and (method := _on_solver(name)):
        entries = [method]
    if not entries:
        from formulations.solvers import solver_names

        names, solvers = ", ".join(dict.fromkeys(m.name for m in methods)), ", ".join(solver_names())
        remedy = f"choose among {names}, or <solver>:<model> with a solver of {solvers}"
        raise UnknownMethodError("method", f"{name!r}", remedy)
    for entry in entries:
        if program in entry.programs:
            return entry
    programs = [each for entry in entries for each in entry.programs]
    remedy = f"it takes program {' or '.join(map(repr, programs))}"
    raise UnsupportedProblemError("program", f"{program!r} for {name}", remedy)
