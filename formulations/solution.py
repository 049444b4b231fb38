"""`BlockSolution` and the words that say how a solve ended; `Limits`, what stops one."""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from formulations.errors import ArgumentError
from formulations.problem import BlockProblem, BoolArray, FloatArray, IntArray


class Termination(enum.Enum):
    """Why a solve ended, as far as the answer is concerned."""

    OPTIMAL = "optimal"
    """The bound meets the objective to the relative gap asked for."""
    FEASIBLE = "feasible"
    """A set of the right size, not proved optimal."""
    NO_SOLUTION = "no_solution"
    """A limit came before any set was found."""
    INFEASIBLE = "infeasible"
    """No set satisfies the constraints."""
    ERROR = "error"
    """The backend failed; `SolveStats.message` says how."""


class Limit(enum.Enum):
    """The limit that ended a solve early."""

    TIME = "time"
    NODE = "node"
    ITERATION = "iteration"
    GAP = "gap"
    """The method had done all it can, and rounding or tolerances leave a larger gap than was asked for."""
    INTERRUPTED = "interrupted"


class Stopped(Protocol):
    """Asks whether the time is over, or will be in the seconds that a next step takes."""

    def __call__(self, ahead: float = 0.0) -> bool:
        """Whether to stop."""
        ...


def never(ahead: float = 0.0) -> bool:
    """No limit: the default of what asks whether to stop."""
    return False


LARGEST_SEED = 2**63
MOST_THREADS = 1_024
"""No machine has more for one solve, and libraries start as many as they are told."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may stop a solve, and what makes it repeatable.

    Parameters
    ----------
    time_limit : float, optional
        Wall-clock seconds; 0 returns the warm start or the cheapest incumbent at once.
    rel_gap : float, default 1e-6
        Relative gap ``(objective - bound) / max(|objective|, 1e-12)`` at which an exact method
        stops; a result is called optimal only if its gap is that small.
    node_limit : int, optional
        Branch-and-bound nodes.
    iteration_limit : int, optional
        Iterations of a local search or of an outer loop.
    threads : int, default 1
        Threads a solver may use, at most 1024.
    seed : int, default 0
        Seed of every random choice.
    """

    time_limit: float | None = None
    rel_gap: float = 1e-6
    node_limit: int | None = None
    iteration_limit: int | None = None
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self._take("time_limit", 0.0)
        self._take("rel_gap", 0.0, optional=False)
        self._take("node_limit", 0, whole=True)
        self._take("iteration_limit", 0, whole=True)
        self._take("threads", 1, whole=True, optional=False)
        self._take("seed", 0, whole=True, optional=False)
        if self.threads > MOST_THREADS:
            raise ArgumentError("threads", f"{self.threads}", f"pass one of at most {MOST_THREADS}")
        if self.seed >= LARGEST_SEED:
            raise ArgumentError("seed", f"{self.seed}", "pass one that fits in 63 bits")
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, np.generic):
                # What is computed from a limit keeps its type: a kernel would be compiled for it.
                object.__setattr__(self, limit.name, value.item())

    def out_of_time(self, started: float, ahead: float = 0.0) -> bool:
        """Whether the limit, from a reading of `time.perf_counter` on, ends within `ahead` seconds."""
        return self.time_limit is not None and time.perf_counter() - started + ahead >= self.time_limit

    def left(self, started: float, share: float = 1.0) -> Limits:
        """Return these limits for what begins now: with a share of the time that is left since `started`."""
        if self.time_limit is None:
            return self
        seconds = self.time_limit - (time.perf_counter() - started)
        return replace(self, time_limit=max(0.0, share * seconds))

    def _take(self, name: str, lowest: float, *, whole: bool = False, optional: bool = True) -> None:
        """Check a field and make it a plain Python number."""
        value = getattr(self, name)
        if value is None and optional:
            return
        kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if not number or not lowest <= value < math.inf:
            wanted = "whole" if whole else "finite"
            raise ArgumentError(name, f"{value!r}", f"pass a {wanted} number >= {lowest:g}")
        object.__setattr__(self, name, int(value) if whole else float(value))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a certificate is about: one program on one block with one support.

    Attributes
    ----------
    program : {"selection", "joint"}
    n_keep : int
    fingerprint : str
        `BlockProblem.fingerprint`.
    support : str or None
        The support in words, as "2:4"; None for a count, which `n_keep` states.
    """

    program: str
    n_keep: int
    fingerprint: str
    support: str | None = None

    @staticmethod
    def of(problem: BlockProblem, program: str) -> Subject:
        """Return the subject of `program` on `problem`."""
        return Subject(
            program=program,
            n_keep=problem.n_keep,
            fingerprint=problem.fingerprint(),
            support=stated_support(problem),
        )


def stated_support(problem: BlockProblem) -> str | None:
    """Return the support of a block as its solutions and certificates state it; None for a count."""
    return None if problem.support is None else str(problem.support)


@runtime_checkable
class Certificate(Protocol):
    """Evidence for a lower bound that can be checked without the solver that found it."""

    @property
    def kind(self) -> str:
        """The relaxation, e.g. "perspective" or "capped_simplex"."""
        ...

    @property
    def program(self) -> str:
        """The program that it bounds, "selection" or "joint"."""
        ...

    @property
    def subject(self) -> Subject | None:
        """What it was made for; None in files from before certificates said so."""
        ...

    @property
    def rho(self) -> float | None:
        """Relative damping: ``damping`` over the mean diagonal of ``F = H - damping I``."""
        ...

    @property
    def effective_rank(self) -> float | None:
        """``tr(F)^2 / tr(F^2)``; None where it was not computed or ``F`` is zero."""
        ...

    @property
    def n_fixed(self) -> int:
        """Number of weights proved to have the same fate in every set as good as the incumbent."""
        ...

    def lower_bound(self, problem: BlockProblem) -> float:
        """Recompute the bound from `problem` in float64, rounded down by the proven error."""
        ...

    def proves_bound(self, problem: BlockProblem, bound: float) -> bool:
        """Whether `bound` is proved, whatever machine had computed it from this certificate."""
        ...

    def proves_fixing(self, problem: BlockProblem) -> bool:
        """Whether every weight that it lists as fixed is proved fixed."""
        ...


@dataclass(frozen=True, kw_only=True)
class SolveStats:
    """Effort of a solve: seconds, nodes, iterations, and what the backend said."""

    seconds: float = 0.0
    nodes: int = 0
    iterations: int = 0
    message: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TracePoint:
    """State of an anytime solve at one moment: seconds, nodes, incumbent and bound so far."""

    seconds: float
    nodes: int
    objective: float | None
    bound: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSolution:
    """The answer to one program on one block.

    Attributes
    ----------
    keep : (n,) bool array or None
        True where the weight stays. None when there is no solution.
    weights : (n,) float64 array or None
        New weights: 0 where pruned; where kept, unchanged for "selection" and updated for "joint".
    objective : float or None
        Loss increase of the program, as `formulations.loss` evaluates it.
    bound : float or None
        Proved lower bound on the optimum; None unless proved.
    termination : Termination
    limit : Limit or None
        The limit that ended the solve early, if one did.
    program : str
        "selection" or "joint".
    method : str
    support : str or None
        The support that it was found for, in words, as "2:4"; None for a count.
    rel_gap : float or None
        The gap asked for, which `Termination.OPTIMAL` has met.
    certificate : Certificate or None
        Evidence for `bound`, or for a weaker root bound; `verify` says what it checked.
    stats : SolveStats
    trace : tuple of TracePoint
    """

    keep: BoolArray | None
    weights: FloatArray | None
    objective: float | None
    bound: float | None = None
    termination: Termination = Termination.FEASIBLE
    limit: Limit | None = None
    program: str
    method: str
    support: str | None = None
    rel_gap: float | None = None
    certificate: Certificate | None = None
    stats: SolveStats = field(default_factory=SolveStats)
    trace: tuple[TracePoint, ...] = ()

    def __post_init__(self) -> None:
        for name, dtype in (("keep", np.bool_), ("weights", np.float64)):
            value = getattr(self, name)
            if value is not None:
                array = np.array(value, dtype=dtype)
                array.flags.writeable = False
                object.__setattr__(self, name, array)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for value in state.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        self.__dict__.update(state)

    def __repr__(self) -> str:
        """Return counts and values in one line; the arrays are left out."""
        ended = self.termination.value + (f", {self.limit.value} limit" if self.limit else "")
        kept = "no set" if self.keep is None else f"{int(self.keep.sum())} of {self.keep.size} kept"
        values = f"objective={_short(self.objective)}, bound={_short(self.bound)}"
        return f"BlockSolution({self.program} by {self.method}: {ended}, {kept}, {values})"

    @property
    def gap(self) -> float:
        """``(objective - bound) / max(|objective|, 1e-12)``; infinity without a bound."""
        return relative_gap(self.objective, self.bound)

    @property
    def proved(self) -> bool:
        """Whether the set is proved optimal to `rel_gap`."""
        return self.termination is Termination.OPTIMAL

    @property
    def pruned(self) -> IntArray:
        """Indices of the pruned weights, (n_prune,) int64."""
        if self.keep is None:
            raise ArgumentError("solution", f"no set: {self.termination.value}", "check `termination` first")
        return np.flatnonzero(~self.keep)


def relative_gap(objective: float | None, bound: float | None) -> float:
    """Return ``(objective - bound) / max(|objective|, 1e-12)``; infinity where one is missing or NaN."""
    if objective is None or bound is None:
        return math.inf
    gap = (objective - bound) / max(abs(objective), 1e-12)
    return math.inf if math.isnan(gap) else gap


def status_of(objective: float | None, bound: float | None, rel_gap: float) -> Termination:
    """Return OPTIMAL if the gap asked for was met in the problem's own units, else FEASIBLE.

    The one decision for all methods: that a search has come to its end proves nothing.
    """
    proved = relative_gap(objective, bound) <= rel_gap
    return Termination.OPTIMAL if proved else Termination.FEASIBLE


def _short(value: float | None) -> str:
    return "None" if value is None else f"{value:.6g}"
