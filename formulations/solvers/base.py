"""What a solver bridge is: capabilities, options and results in words of ours.

A bridge only translates a `Task` for its solver and reports a `RawResult`. What may be claimed from
that report is decided in `formulations.solvers.conclusion`.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

from formulations.errors import SolverUnavailableError, UnknownOptionError, UnsupportedProblemError
from formulations.models import MODELS, ModelSize, ModelSpec
from formulations.models.standard_form import StandardForm
from formulations.problem import BlockProblem, BoolArray, FloatArray
from formulations.solution import Limit, Limits

DUAL_TOLERANCE = 1e-9
"""Dual feasibility tolerance asked of every linear-programming solver."""
FIXED = "the bridge, because the stated bound rests on it"
"""Why a native option is reserved that no field of `Limits` sets."""


@dataclass(frozen=True, kw_only=True)
class SolverInfo:
    """One solver as `available_solvers` lists it.

    Attributes
    ----------
    name : str
    version : str or None
    available : bool
    reason : str
        Why it is not available, or what its licence restricts; "" otherwise.
    capabilities : frozenset of str
        What it can take, in the words of `formulations.models`.
    limits : ModelSize or None
        Largest model that the licence allows; None when unrestricted.
    """

    name: str
    version: str | None
    available: bool
    reason: str
    capabilities: frozenset[str]
    limits: ModelSize | None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What looking for a solver found, before any model exists."""

    version: str | None = None
    available: bool = True
    reason: str = ""
    limits: ModelSize | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What a bridge is given: the model in both shapes, what may stop it, and a warm start."""

    model: Any
    form: StandardForm
    limits: Limits
    deadline: float | None
    options: Mapping[str, Any]
    start: BoolArray

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline (at least 1 ms), None without one."""
        return None if self.deadline is None else max(self.deadline - time.perf_counter(), 1e-3)

    @property
    def solver_gap(self) -> float:
        """Relative gap to ask for: half of ours, the rest is room for the solver's tolerances."""
        return 0.5 * self.limits.rel_gap

    @property
    def feasibility_tolerance(self) -> float:
        """Tolerance on quadratic rows: the bound of a quadratic model stalls about that far below."""
        return min(max(1e-2 * self.limits.rel_gap, 1e-9), 1e-6)

    @property
    def start_values(self) -> FloatArray:
        """Values of the decision binaries at the warm start, (n,)."""
        ones = self.start if self.form.one_means_kept else ~self.start
        return np.asarray(ones, dtype=np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class RawResult:
    """What a solver reported, in the model's units.

    Attributes
    ----------
    finished : bool
        The solver claims optimality to the gap it was given.
    point : (n_columns,) float64 array or None
    bound : float or None
        Lower bound stated by the solver; None unless it proved one.
    bound_error : float
        How far the solver's tolerances may have lifted `bound`.
    shortfall : float
        How far below the optimum the tolerances may keep the bound of a finished solve, besides.
    limit : Limit or None
    failure : str
        Non-empty when the backend failed: the message for the user.
    """

    finished: bool = False
    point: FloatArray | None = None
    bound: float | None = None
    bound_error: float = 0.0
    shortfall: float = 0.0
    limit: Limit | None = None
    failure: str = ""
    nodes: int = 0
    iterations: int = 0
    message: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver bridge.

    Attributes
    ----------
    name : str
    capabilities : frozenset of str
    probe : callable
        Looks for the solver without building anything.
    run : callable
        Solves one task.
    option_names : callable
        Native options that may be passed by name.
    reserved : mapping of str to str
        Native options that are not free, with what sets each.
    ignores : tuple of str
        Fields of `Limits` that the solver has no switch for; reported in `SolveStats.extra`.
    models : frozenset of str or None
        The only models it takes, None for all that its capabilities cover.
    """

    name: str
    capabilities: frozenset[str]
    probe: Callable[[], Probe]
    run: Callable[[Task], RawResult]
    option_names: Callable[[], Iterable[str]]
    reserved: Mapping[str, str]
    ignores: tuple[str, ...] = ()
    models: frozenset[str] | None = None

    def accepts(self, spec: ModelSpec) -> bool:
        """Whether the solver can take that formulation."""
        return spec.needs <= self.capabilities and (self.models is None or spec.name in self.models)

    def info(self) -> SolverInfo:
        """Return what `available_solvers` lists."""
        found = self.probe()
        return SolverInfo(
            name=self.name,
            version=found.version,
            available=found.available,
            reason=found.reason,
            capabilities=self.capabilities,
            limits=found.limits,
        )


def probe_package(distribution: str, extra: str = "") -> Probe:
    """Return whether `distribution` is installed, without importing it."""
    try:
        return Probe(version=metadata.version(distribution))
    except metadata.PackageNotFoundError:
        remedy = f"pip install 'cbs-opt[{extra}]'" if extra else f"pip install {distribution}"
        return Probe(available=False, reason=f"{distribution} is not installed ({remedy})")


def dual_error(form: StandardForm, tolerance: float = DUAL_TOLERANCE) -> float:
    """Largest error of a linear-programming bound with dual infeasibilities up to `tolerance`.

    The Lagrangian bound ``y.b + sum_j min_x (c_j - y.a_j) x_j`` over the variables' ranges loses at
    most ``tolerance * width_j`` for each reduced cost of the wrong sign.
    """
    return tolerance * form.total_width


def check_poses(solver: Solver, program: str) -> None:
    """Raise `UnsupportedProblemError` if `solver` takes no model of `program` at all."""
    if any(spec.program == program and solver.accepts(spec) for spec in MODELS.values()):
        return
    found = f"{program!r}: {solver.name} can take no model of it"
    raise UnsupportedProblemError("program", found, "use branch_and_bound, outer_approximation or mathopt")


def check_capabilities(solver: Solver, spec: ModelSpec) -> None:
    """Raise `UnsupportedProblemError`, naming the models that fit, unless `solver` takes `spec`."""
    if solver.accepts(spec):
        return
    fitting = [s.name for s in MODELS.values() if s.program == spec.program and solver.accepts(s)]
    missing = sorted(spec.needs - solver.capabilities)
    lacks = f"lacks {', '.join(missing)}" if missing else "takes only other models"
    remedy = f"use one of: {', '.join(fitting)}"
    raise UnsupportedProblemError("model", f"{spec.name!r} needs more than {solver.name}: it {lacks}", remedy)


def check_availability(solver: Solver, spec: ModelSpec, problem: BlockProblem) -> None:
    """Raise `SolverUnavailableError` if the solver is absent or its licence is too small."""
    found = solver.probe()
    if not found.available:
        raise SolverUnavailableError("solver", f"{solver.name}: {found.reason}", "or use highs or mathopt")
    if found.limits is None:
        return
    size = spec.size(problem)
    for word in ("variables", "linear_rows", "quadratic_rows", "quadratic_variables"):
        have, allowed = getattr(size, word), getattr(found.limits, word)
        if have > allowed:
            what = f"{spec.name} has up to {have} {word.replace('_', ' ')}, the licence allows {allowed}"
            raise SolverUnavailableError(
                "solver", f"{solver.name}: {what}", "use a full licence or another solver"
            )


def check_options(solver: Solver, options: Mapping[str, Any]) -> None:
    """Raise `UnknownOptionError` for a native option that is unknown or set through `Limits`."""
    if not options:
        return
    known = sorted(set(solver.option_names()) - set(solver.reserved))
    for name in options:
        if name in solver.reserved:
            found = f"{name!r} of {solver.name} is not free: set by {solver.reserved[name]}"
            raise UnknownOptionError("options", found, "leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=5)
            shown = f"did you mean {', '.join(close)}? " if close else ""
            remedy = f"{shown}known: {', '.join(known) or 'none'}"
            raise UnknownOptionError("options", f"{name!r} is unknown to {solver.name}", remedy)
