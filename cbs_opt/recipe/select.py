"""How the pruned set is chosen: one record a method, with the options that the method takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from cbs_opt.system.checks import check_fields, finite_number, names, one_of, plain_value, whole_number
from formulations.errors import ArgumentError
from formulations.problem import PROGRAMS

COMMON = ("program", "time_limit", "repeats", "method", "options")
"""Fields that are not options of the method itself."""
WHOLE = {"repeats": 1, "drops": 1, "dense_limit": 0, "max_swaps": 0, "restarts": 0, "steps": 0}
"""Fields that are whole numbers, with the least that they may be."""
FINITE = ("time_limit", "spread", "tolerance")
"""Fields that are finite numbers >= 0."""


@dataclass(frozen=True, kw_only=True)
class Select:
    """What every record of this module has.

    Raises `ArgumentError` if a field is out of its range; the message names it as ``select.<field>``.

    Parameters
    ----------
    program : {"joint", "selection"}, default "joint"
        The program whose objective is minimised. "joint" accounts for the update of the kept weights,
        "selection" does not.
    time_limit : float, optional
        Seconds for each run of the method.
    """

    method: ClassVar[str] = ""

    program: str = "joint"
    time_limit: float | None = None

    def __post_init__(self) -> None:
        one_of("select.program", self.program, PROGRAMS)
        for entry in fields(self):
            if entry.name in WHOLE:
                check_fields(self, "select.", whole_number, entry.name, least=WHOLE[entry.name])
            if entry.name in FINITE:
                check_fields(self, "select.", finite_number, entry.name)

    @property
    def tries(self) -> int:
        """Number of runs with different seeds."""
        return int(getattr(self, "repeats", 1))

    @property
    def method_options(self) -> dict[str, Any]:
        """The options to hand to the method: those that are not None."""
        pairs = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return {name: value for name, value in pairs if name not in COMMON and value is not None}


class Magnitude(Select):
    """Remove the weights of smallest ``|w|``."""

    method: ClassVar[str] = "magnitude"


@dataclass(frozen=True, kw_only=True)
class RandomizedMagnitude(Select):
    """Remove small weights, drawn at random within buckets of similar magnitude.

    Parameters
    ----------
    spread : float, optional
        Width of a bucket, .1 by default.
    repeats : int, default 1
        Runs with different seeds, of which the lowest training loss wins.
    """

    method: ClassVar[str] = "randomized_magnitude"

    spread: float | None = None
    repeats: int = 1


class OBD(Select):
    """Remove the weights of smallest ``1/2 H_ii w_i^2`` (LeCun, Denker, Solla, 1989)."""

    method: ClassVar[str] = "obd"


class OBS(Select):
    """Remove the weights of smallest ``w_i^2 / (2 [H^-1]_ii)`` (Hassibi, Stork, 1992)."""

    method: ClassVar[str] = "obs"


class LossPreservation(Select):
    """Remove the weights of smallest ``|g_i w_i|`` (SNIP: Lee, Ajanthan, Torr, 2019)."""

    method: ClassVar[str] = "loss_preservation"


class GradientNorm(Select):
    """Remove the weights of smallest ``|w_i (H g)_i|`` (GraSP: Wang, Zhang, Grosse, 2020)."""

    method: ClassVar[str] = "gradient_norm"


@dataclass(frozen=True, kw_only=True)
class SwapSearch(Select):
    """Exchange pruned and kept weights while the objective falls.

    Parameters
    ----------
    start : str or sequence of str, optional
        Sets to start from; of several the one that ends lowest in each block is kept. A saliency,
        "randomized_magnitude" and, under the joint program, "relaxation", "greedy_obs" or
        "iterative_hard_threshold".
    spread : float, optional
        Of "randomized_magnitude" starts.
    max_swaps : int, optional
        Swaps in each block from each start; by default as many as it takes to a 1-swap optimum.
    restarts : int, optional
        Further descents from randomly changed sets; joint program only.
    drops : int, optional
        Of a "greedy_obs" start in large blocks; joint program only.
    tolerance : float, optional
        Relative improvement that counts in large blocks. With layer inputs it is what a round of exchanges
        has to bring so that another one follows, .001 by default; otherwise what a swap has to bring.
    dense_limit : int, optional
        Largest block whose Hessian is formed, 1 024 by default; joint program only.
    repeats : int, default 1
        Runs with different seeds, of which the lowest training loss wins.
    """

    method: ClassVar[str] = "swap_search"

    start: str | tuple[str, ...] | None = None
    spread: float | None = None
    max_swaps: int | None = None
    restarts: int | None = None
    drops: int | None = None
    tolerance: float | None = None
    dense_limit: int | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.start, str):
            check_fields(self, "select.", names, "start")
            if self.start == ():
                raise ArgumentError("select.start", "empty", "name at least one set, or leave it out")
        starts = (self.start,) if isinstance(self.start, str) else self.start
        for name, start in (("spread", "randomized_magnitude"), ("drops", "greedy_obs")):
            value = getattr(self, name)
            if value is not None and starts is not None and start not in starts:
                raise ArgumentError(f"select.{name}", f"{value} without a start by {start}", "leave it out")
        for name in ("restarts", "drops", "dense_limit") if self.program == "selection" else ():
            if getattr(self, name) is not None:
                found = f"{getattr(self, name)} for the selection program"
                raise ArgumentError(f"select.{name}", found, 'leave it out, or use program="joint"')


@dataclass(frozen=True, kw_only=True)
class GreedyOBS(Select):
    """Drop what costs least, move the rest to the minimum of the model, score again.

    Parameters
    ----------
    drops : int, optional
        How often in large blocks, 12 by default; in small ones weights go one by one.
    dense_limit : int, optional
        Largest block that counts as small, 1 024 by default.
    """

    method: ClassVar[str] = "greedy_obs"

    drops: int | None = None
    dense_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class HardThreshold(Select):
    """Take gradient steps on the weights, each keeping the largest (iterative hard thresholding).

    Parameters
    ----------
    steps : int, optional
        At most that many.
    """

    method: ClassVar[str] = "iterative_hard_threshold"

    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Exact(Select):
    """Solve block by block with an exact method, a bound's rounding, a solver or a plug-in.

    Parameters
    ----------
    method : str, default "branch_and_bound"
        A name that `solve` takes: "branch_and_bound", "enumeration", "outer_approximation",
        "lower_bound", ``"<solver>:<model>"``, or a method of another package.
    options : mapping, optional
        Options of that method: numbers, strings, and lists and mappings of them. None is none given;
        unknown ones are refused before anything runs.
    repeats : int, default 1
        Runs with different seeds, for methods that draw at random.
    """

    method: str = "branch_and_bound"  # type: ignore[misc]
    options: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.method, str):
            raise ArgumentError("select.method", f"{self.method!r}", "pass the name of a method")
        if not isinstance(self.options, Mapping) or not all(isinstance(name, str) for name in self.options):
            raise ArgumentError("select.options", f"{self.options!r}", "pass a mapping of names to values")
        if self.method in SELECTS:
            record = SELECTS[self.method].__name__
            remedy = f"use {record}, which has the options as fields"
            raise ArgumentError("select.method", f"{self.method!r}", remedy)
        given = {name: value for name, value in self.options.items() if value is not None}
        options = {name: plain_value(f"select.options.{name}", value) for name, value in given.items()}
        object.__setattr__(self, "options", options)

    @property
    def method_options(self) -> dict[str, Any]:
        """The options to hand to the method."""
        return dict(self.options)


SELECTS: dict[str, type[Select]] = {
    record.method: record
    for record in (
        *(Magnitude, RandomizedMagnitude, OBD, OBS, LossPreservation, GradientNorm),
        *(SwapSearch, GreedyOBS, HardThreshold),
    )
}
"""The records by the name of their method; every other name is one for `Exact`."""


def select_by_name(name: str, **options: Any) -> Select:
    """Return the record of the method called `name`, with its other fields."""
    if name in SELECTS:
        return SELECTS[name](**options)
    return Exact(method=name, **options)
