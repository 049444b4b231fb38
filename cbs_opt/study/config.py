"""A study as its TOML file states it: instances, methods, parameter grids, seeds and limits.

The file says *what* to run; `cbs_opt.study.expansion` turns it into single runs.
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbs_opt.study.errors import StudyConfigError
from formulations.problem import PROGRAMS

VARY = ("all", "one")
SOURCES = ("library", "files", "factory")
SCALARS = (str, int, float, bool)


@dataclass(frozen=True, kw_only=True)
class RunLimits:
    """What ends a run: by the method itself, and by force.

    Parameters
    ----------
    time_limit : float, default 60
        Wall-clock seconds, given to the method.
    rel_gap : float, default 1e-4
        Relative gap at which an exact method may stop.
    node_limit, iteration_limit : int, optional
    threads : int, default 1
        Threads of the method and of the numerical libraries beneath it.
    grace : float, default 10
        Seconds past `time_limit` after which the process is killed.
    memory_gib : float, default 4
        Largest resident memory of the process, its libraries included, in GiB.
    warm_up : float, default 300
        Longest untimed solve of a small block before the first timed run of a method in a process,
        in seconds: what is imported and compiled there is not measured. 0 for none.
    """

    time_limit: float = 60.0
    rel_gap: float = 1e-4
    node_limit: int | None = None
    iteration_limit: int | None = None
    threads: int = 1
    grace: float = 10.0
    memory_gib: float = 4.0
    warm_up: float = 300.0

    def __post_init__(self) -> None:
        for name, lowest in (
            ("time_limit", 0.0),
            ("rel_gap", 0.0),
            ("node_limit", 0),
            ("iteration_limit", 0),
            ("threads", 1),
            ("grace", 0.0),
            ("memory_gib", 0.0),
            ("warm_up", 0.0),
        ):
            value = getattr(self, name)
            if value is None and name in ("node_limit", "iteration_limit"):
                continue
            whole = name in ("node_limit", "iteration_limit", "threads")
            kinds = int if whole else (int, float)
            good = isinstance(value, kinds) and not isinstance(value, bool)
            if not good or not math.isfinite(value) or value < lowest:
                remedy = f"give a {'whole' if whole else 'finite'} number >= {lowest:g}"
                raise StudyConfigError(f"limits.{name}", f"{value!r}", remedy)

    @property
    def longest(self) -> float:
        """Seconds after which a run is over, one way or another."""
        return self.time_limit + self.grace


@dataclass(frozen=True, kw_only=True)
class InstanceGroup:
    """Blocks from one source, each with every damping and sparsity that are listed.

    Attributes
    ----------
    library : tuple of str
        Names or globs of shipped blocks.
    files : tuple of str
        Paths or globs of block files; those in a study file are taken from its folder.
    factory : str
        ``"module:function"`` that returns a `BlockProblem`, called with one choice of `arguments`.
    arguments : mapping of str to tuple
        Keyword arguments of the factory, each with its values: all combinations.
    damping, sparsity : tuple of float
        Replace the block's own; empty to keep it.
    """

    library: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    factory: str = ""
    arguments: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    damping: tuple[float, ...] = ()
    sparsity: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MethodGroup:
    """Methods with one grid of options.

    Attributes
    ----------
    programs : tuple of str
    methods : tuple of str
        Names as `cbs_opt.solve` takes them.
    solvers, formulations : tuple of str
        Every solver with every formulation (names or globs) that it can take.
    options : mapping of str to tuple
        Options of the methods, each with its values.
    vary : {"all", "one"}
        All combinations, or one option at a time away from the first value of each.
    seeds : tuple of int
    limits : RunLimits
    """

    programs: tuple[str, ...]
    methods: tuple[str, ...] = ()
    solvers: tuple[str, ...] = ()
    formulations: tuple[str, ...] = ("*",)
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    vary: str = "all"
    seeds: tuple[int, ...] = (0,)
    limits: RunLimits = field(default_factory=RunLimits)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study: what `cbs_opt.study.run_study` works through."""

    name: str
    instances: tuple[InstanceGroup, ...]
    methods: tuple[MethodGroup, ...]
    description: str = ""
    folder: Path = Path()
    """Where relative paths of block files start."""


def read_study(path: str | os.PathLike[str]) -> Study:
    """Read a study file.

    Raises
    ------
    StudyConfigError
        If it is absent, not TOML, or does not state a study; the message names the entry.
    """
    source = Path(path)
    try:
        document = tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyConfigError("study", f"{source}: no such file", "check the name") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StudyConfigError("study", f"{source} is not TOML: {error}", "mend the file") from error
    return parse_study(document, folder=source.resolve().parent, default_name=source.stem)


def parse_study(document: Mapping[str, Any], *, folder: Path = Path(), default_name: str = "study") -> Study:
    """A study from the tables of its file.

    Parameters
    ----------
    document : mapping
        As `tomllib` reads it.
    folder : path
        Where relative paths of block files start.
    default_name : str
        Used where the file gives no name.

    Raises
    ------
    StudyConfigError
        If an entry is missing, unknown or impossible.
    """
    _known("study", document, ("name", "description", "seeds", "limits", "instances", "methods"))
    limits = _limits("limits", document.get("limits", {}), RunLimits())
    seeds = _seeds("seeds", document.get("seeds", [0]))
    return Study(
        name=_text("name", document.get("name", default_name)),
        description=_text("description", document.get("description", "")),
        folder=folder,
        instances=tuple(
            _instance_group(f"instances[{i}]", table)
            for i, table in enumerate(_tables("instances", document.get("instances")))
        ),
        methods=tuple(
            _method_group(f"methods[{i}]", table, seeds, limits)
            for i, table in enumerate(_tables("methods", document.get("methods")))
        ),
    )


def _instance_group(where: str, table: Mapping[str, Any]) -> InstanceGroup:
    _known(where, table, (*SOURCES, "arguments", "damping", "sparsity"))
    named = [source for source in SOURCES if source in table]
    if len(named) != 1:
        found = " and ".join(named) or "no source"
        raise StudyConfigError(where, found, f"give exactly one of {', '.join(SOURCES)}")
    if "arguments" in table and named != ["factory"]:
        raise StudyConfigError(f"{where}.arguments", f"given with {named[0]}", "they are a factory's")
    factory = _text(f"{where}.factory", table.get("factory", ""))
    if factory and factory.count(":") != 1:
        raise StudyConfigError(f"{where}.factory", f"{factory!r}", 'write "module:function"')
    sparsity = _numbers(f"{where}.sparsity", table.get("sparsity", []))
    if any(not 0.0 <= share <= 1.0 for share in sparsity):
        raise StudyConfigError(f"{where}.sparsity", f"{list(sparsity)}", "shares lie in [0, 1]")
    return InstanceGroup(
        library=_texts(f"{where}.library", table.get("library", [])),
        files=_texts(f"{where}.files", table.get("files", [])),
        factory=factory,
        arguments=_grid(f"{where}.arguments", table.get("arguments", {})),
        damping=_numbers(f"{where}.damping", table.get("damping", [])),
        sparsity=sparsity,
    )


def _method_group(
    where: str, table: Mapping[str, Any], seeds: tuple[int, ...], limits: RunLimits
) -> MethodGroup:
    own = ("program", "methods", "solvers", "formulations", "options", "vary", "seeds", "limits")
    _known(where, table, own)
    if ("methods" in table) == ("solvers" in table):
        found = "both" if "methods" in table else "neither"
        raise StudyConfigError(where, f"{found} of methods and solvers", "give one of them")
    if "formulations" in table and "solvers" not in table:
        raise StudyConfigError(f"{where}.formulations", "without solvers", "name the solvers too")
    programs = _texts(f"{where}.program", table.get("program", []))
    if not programs or any(program not in PROGRAMS for program in programs):
        raise StudyConfigError(f"{where}.program", f"{list(programs)}", f"choose from {', '.join(PROGRAMS)}")
    vary = _text(f"{where}.vary", table.get("vary", "all"))
    if vary not in VARY:
        raise StudyConfigError(f"{where}.vary", f"{vary!r}", f"choose one of {', '.join(VARY)}")
    return MethodGroup(
        programs=programs,
        methods=_texts(f"{where}.methods", table.get("methods", [])),
        solvers=_texts(f"{where}.solvers", table.get("solvers", [])),
        formulations=_texts(f"{where}.formulations", table.get("formulations", ["*"])),
        options=_grid(f"{where}.options", table.get("options", {})),
        vary=vary,
        seeds=_seeds(f"{where}.seeds", table["seeds"]) if "seeds" in table else seeds,
        limits=_limits(f"{where}.limits", table.get("limits", {}), limits),
    )


def _limits(where: str, table: Any, above: RunLimits) -> RunLimits:
    """The limits of a table; what it leaves out is as in `above`."""
    names = list(RunLimits.__dataclass_fields__)
    _known(where, table, names)
    return RunLimits(**{name: table.get(name, getattr(above, name)) for name in names})


def _known(where: str, table: Any, names: Any) -> None:
    if not isinstance(table, Mapping):
        raise StudyConfigError(where, f"{table!r}", "write a table")
    for name in table:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise StudyConfigError(f"{where}.{name}", "unknown", f"{hint}known: {', '.join(names)}")


def _tables(where: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise StudyConfigError(where, "none", f"write at least one [[{where}]]")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise StudyConfigError(where, f"{value!r}", "write a string")
    return value


def _texts(where: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(_text(where, entry) for entry in values)


def _numbers(where: str, value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    for entry in values:
        if isinstance(entry, bool) or not isinstance(entry, int | float) or not 0.0 <= entry < math.inf:
            raise StudyConfigError(where, f"{entry!r}", "write finite numbers >= 0")
    return tuple(float(entry) for entry in values)


def _seeds(where: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in values):
        raise StudyConfigError(where, f"{value!r}", "write whole numbers >= 0")
    return tuple(values)


def _grid(where: str, table: Any) -> dict[str, tuple[Any, ...]]:
    """Values by name; a single value counts as a list of one."""
    if not isinstance(table, Mapping):
        raise StudyConfigError(where, f"{table!r}", "write a table")
    grid = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in table.items()}
    for name, values in grid.items():
        if not values or not all(isinstance(value, SCALARS) for value in values):
            raise StudyConfigError(f"{where}.{name}", f"{list(values)}", "write numbers, strings or booleans")
    return grid
