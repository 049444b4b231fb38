"""What a solver bridge is: capabilities, options and results in words of ours.

A bridge only translates a `Task` for its solver and reports a `RawResult`. `Solver.solve` does the rest
for all of them; what may be claimed from the report is decided in `formulations.solvers.conclusion`.
"""

from __future__ import annotations

import difflib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any, TypeVar

import numpy as np

from formulations.errors import SolverUnavailableError, UnknownOptionError, UnsupportedProblemError
from formulations.milp import DUAL_TOLERANCE
from formulations.models import MODELS, ModelSize, ModelSpec, model_spec
from formulations.models.building import BuildingStopped, asking
from formulations.models.standard_form import StandardForm
from formulations.preparation import prepare_for
from formulations.problem import BlockProblem, BoolArray, FloatArray, check_program
from formulations.solution import BlockSolution, Limit, Limits
from formulations.solvers.conclusion import CONSTANT_ERROR, Outcome, conclude, known_set, only_set

Item = TypeVar("Item")

FIXED = "the bridge, because the stated bound rests on it"
"""Why a native option is reserved that no field of `Limits` sets."""
FIXED_INTERRUPT = "the bridge, which takes Ctrl-C itself"


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

    def asking(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, such as rows to translate; give the solve up once the deadline has passed."""
        return asking(items, lambda: self.deadline is not None and time.perf_counter() >= self.deadline)

    @property
    def solver_gap(self) -> float:
        """Relative gap to ask for: half of ours, the rest is room for the solver's tolerances."""
        return 0.5 * self.limits.rel_gap

    @property
    def feasibility_tolerance(self) -> float:
        """Tolerance on quadratic rows: the bound of a quadratic model stalls about that far below.

        Below 1e-8 SCIP's linear solver cannot keep to what is derived from it, and prints that every time.
        """
        return min(max(1e-2 * self.limits.rel_gap, 1e-8), 1e-6)

    @property
    def shortfall(self) -> float:
        """Distance below the optimum at which the tolerances may keep the bound of a finished solve."""
        return 10.0 * self.feasibility_tolerance if self.form.is_quadratic else 0.0

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


LEFT_ALONE = RawResult(
    limit=Limit.INTERRUPTED,
    message="it did not stop when it was interrupted: its thread goes on until it does",
)
"""What a bridge reports of a solver that `formulations.watched` has left to itself."""


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
    default_models : mapping of str to str
        By program, the model to take where none is named; the first that it takes otherwise.
    check_values : callable
        Raises for a value of an option that `run` could not use.
    """

    name: str
    capabilities: frozenset[str]
    probe: Callable[[], Probe]
    run: Callable[[Task], RawResult]
    option_names: Callable[[], Iterable[str]]
    reserved: Mapping[str, str]
    ignores: tuple[str, ...] = ()
    models: frozenset[str] | None = None
    default_models: Mapping[str, str] = field(default_factory=dict)
    check_values: Callable[[Mapping[str, Any]], object] = lambda _: None

    def accepts(self, spec: ModelSpec) -> bool:
        """Return whether the solver can take that formulation."""
        return spec.needs <= self.capabilities and (self.models is None or spec.name in self.models)

    def models_of(self, program: str) -> list[str]:
        """Return the names of the formulations of `program` that the solver can take."""
        return [spec.name for spec in MODELS.values() if spec.program == program and self.accepts(spec)]

    def info(self) -> SolverInfo:
        """Return what `available_solvers` lists."""
        probe = self.probe()
        return SolverInfo(
            name=self.name,
            version=probe.version,
            available=probe.available,
            reason=probe.reason,
            capabilities=self.capabilities,
            limits=probe.limits,
        )

    def solve(
        self,
        problem: BlockProblem,
        program: str = "selection",
        *,
        limits: Limits | None = None,
        incumbent: BlockSolution | None = None,
        model: str | None = None,
        **options: Any,
    ) -> BlockSolution:
        """Solve one formulation of a program; every check comes before the model is built.

        Parameters
        ----------
        problem : BlockProblem
        program : str
            "selection" or "joint".
        limits : Limits, optional
        incumbent : BlockSolution, optional
            Warm start, given to solvers that take one; never lost.
        model : str, optional
            A formulation of `formulations.models`; by default that of `default_models`.
        **options
            Native options of the solver by name.

        Raises
        ------
        UnsupportedProblemError
            If the model is not of this program, or the solver cannot take it (alternatives are named).
        SolverUnavailableError
            If the solver is absent, or the model exceeds what its licence allows.
        UnknownOptionError
            If a native option is unknown, or one that `limits` sets.
        ArgumentError
            If the value of an option cannot be used, or `incumbent` is no set of this block.
        NotPositiveDefiniteError
            If the program is joint and ``H`` is singular.
        """
        from formulations.models.translation import standard_form

        prepare_for(problem, "greedy_obs", check_program(program))
        began = time.perf_counter()
        limits = limits or Limits()
        self._check_program(program)
        spec = model_spec(model or self.default_models.get(program) or self.models_of(program)[0], program)
        self._check_model(spec)
        self._check_availability(spec, problem)
        self.check_options(options)
        kind, _, backend = self.name.partition(":")
        method = ":".join((kind, spec.name, backend) if backend else (kind, spec.name))
        known = known_set(problem, program, method, limits, incumbent)
        if problem.n_prune in (0, problem.n):
            return only_set(problem, known, limits, began)
        if limits.time_limit == 0.0:
            return conclude(problem, known, limits, began, Outcome(limit=Limit.TIME))
        deadline = None if limits.time_limit is None else began + limits.time_limit
        assert known.keep is not None
        try:
            stopped = partial(limits.out_of_time, began)
            built = spec.build(problem, incumbent=known, stopped=stopped)
            form = standard_form(built, stopped)
            if stopped():
                raise BuildingStopped
            task = Task(
                model=built, form=form, limits=limits, deadline=deadline, options=options, start=known.keep
            )
            with _interrupt_handler_kept():
                raw = self.run(task)
        except BuildingStopped as stop:
            why = f": {stop}" if str(stop) else ""
            said = f"the time limit passed while {spec.name} was built, and {self.name} was not started{why}"
            return conclude(problem, known, limits, began, Outcome(limit=Limit.TIME, stats={"message": said}))
        except KeyboardInterrupt:
            # Before the backend runs, or one that has no answer to Ctrl-C: the known set is still one.
            return conclude(problem, known, limits, began, Outcome(limit=Limit.INTERRUPTED))
        ignored = {
            name: getattr(limits, name)
            for name in self.ignores
            if getattr(limits, name) != getattr(Limits(), name)
        }
        return conclude(
            problem,
            known,
            limits,
            began,
            Outcome(
                candidates=[] if raw.point is None else [form.keep(raw.point)],
                bound=_lowered(raw, form),
                slack=(raw.bound_error + raw.shortfall) * form.objective_scale,
                finished=raw.finished,
                limit=raw.limit,
                failure=raw.failure,
                stats={
                    "nodes": raw.nodes,
                    "iterations": raw.iterations,
                    "message": raw.message,
                    "extra": {**raw.extra, **({"ignored_limits": ignored} if ignored else {})},
                },
            ),
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise `UnknownOptionError` for a native option that is unknown or set through `Limits`."""
        if not options:
            return
        names = sorted(set(self.option_names()) - set(self.reserved))
        for name in options:
            if name in self.reserved:
                found = f"{name!r} of {self.name} is not free: set by {self.reserved[name]}"
                raise UnknownOptionError("options", found, "leave it out")
            if name not in names:
                close = difflib.get_close_matches(name, names, n=5)
                hint = f"did you mean {', '.join(close)}? " if close else ""
                remedy = f"{hint}known: {', '.join(names) or 'none'}"
                raise UnknownOptionError("options", f"{name!r} is unknown to {self.name}", remedy)
        self.check_values(options)

    def _check_program(self, program: str) -> None:
        if not self.models_of(program):
            found = f"{program!r}: {self.name} can take no model of it"
            remedy = "use branch_and_bound, outer_approximation or mathopt"
            raise UnsupportedProblemError("program", found, remedy)

    def _check_model(self, spec: ModelSpec) -> None:
        """Name the models that fit unless this one does."""
        if self.accepts(spec):
            return
        missing = sorted(spec.needs - self.capabilities)
        lacks = f"lacks {', '.join(missing)}" if missing else "takes only other models"
        found = f"{spec.name!r} needs more than {self.name}: it {lacks}"
        remedy = f"use one of: {', '.join(self.models_of(spec.program))}"
        raise UnsupportedProblemError("model", found, remedy)

    def _check_availability(self, spec: ModelSpec, problem: BlockProblem) -> None:
        """Refuse a solver that is absent, and one whose licence is too small."""
        probe = self.probe()
        if not probe.available:
            raise SolverUnavailableError("solver", f"{self.name}: {probe.reason}", "or use highs or mathopt")
        if probe.limits is None:
            return
        size = spec.size(problem)
        for word in ("variables", "linear_rows", "quadratic_rows", "quadratic_variables"):
            have, allowed = getattr(size, word), getattr(probe.limits, word)
            if have > allowed:
                what = f"{spec.name} has up to {have} {word.replace('_', ' ')}, the licence allows {allowed}"
                remedy = "use a full licence or another solver"
                raise SolverUnavailableError("solver", f"{self.name}: {what}", remedy)


@contextmanager
def _interrupt_handler_kept() -> Iterator[None]:
    """Put Python's Ctrl-C handler back: OR-tools leaves the default one, which kills the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def _lowered(raw: RawResult, form: StandardForm) -> float | None:
    """Return the solver's bound in units of the problem, lowered by every error it may carry."""
    if raw.bound is None or not np.isfinite(raw.bound):
        return None
    rounding = CONSTANT_ERROR * max(abs(form.constant), abs(raw.bound), 1.0)
    return (raw.bound - raw.bound_error - rounding) * form.objective_scale


def probe_package(distribution: str, extra: str = "") -> Probe:
    """Return whether `distribution` is installed, without importing it."""
    try:
        return Probe(version=metadata.version(distribution))
    except metadata.PackageNotFoundError:
        remedy = f"pip install 'cbs-opt[{extra}]'" if extra else f"pip install {distribution}"
        return Probe(available=False, reason=f"{distribution} is not installed ({remedy})")


def dual_error(form: StandardForm, tolerance: float = DUAL_TOLERANCE) -> float:
    """Return the largest error of a linear bound with dual infeasibilities up to `tolerance`.

    The Lagrangian bound ``y.b + sum_j min_x (c_j - y.a_j) x_j`` over the variables' ranges loses at
    most ``tolerance * width_j`` for each reduced cost of the wrong sign.
    """
    return tolerance * form.total_width
