"""A study as its TOML file states it; `cbs_opt.study.expansion` turns it into single runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, cast

from cbs_opt.system.checks import finite_number, one_of, whole_number
from cbs_opt.system.documents import known_names, read_document
from formulations.errors import ArgumentError
from formulations.problem import PROGRAMS
from formulations.solution import MOST_THREADS

VARY = ("all", "one")
SOURCES = ("library", "files", "factory")


@dataclass(frozen=True, kw_only=True)
class RunLimits:
    """What ends a run: by the method itself, and by force.

    Past `time_limit` (wall-clock seconds, given to the method) the process has `grace` seconds until it is
    killed, and it is killed where its resident memory, libraries included, grows beyond `memory_gib`.
    `rel_gap`: at which an exact method may stop. `threads`: of the method and of the numerical libraries
    beneath it. `warm_up`: longest untimed solve of a small block before the first timed run of a method in
    a process, in seconds, since what is imported and compiled there is not measured; 0 for none.
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
        for name in ("time_limit", "rel_gap", "grace", "memory_gib", "warm_up"):
            finite_number(f"limits.{name}", getattr(self, name))
        for name in ("node_limit", "iteration_limit"):
            if getattr(self, name) is not None:
                whole_number(f"limits.{name}", getattr(self, name), least=0)
        if whole_number("limits.threads", self.threads) > MOST_THREADS:
            raise ArgumentError("limits.threads", f"{self.threads}", f"pass at most {MOST_THREADS}")

    @property
    def longest(self) -> float:
        """Seconds after which a run is over, one way or another."""
        return self.time_limit + self.grace


@dataclass(frozen=True, kw_only=True)
class InstanceGroup:
    """Blocks from one source, each with every damping and sparsity that are listed.

    `library` has names or globs of shipped blocks; `files` paths or globs, those in a study file taken from
    its folder; `factory` is a ``"module:function"`` that returns a `BlockProblem`, called with all
    combinations of `arguments`. `damping` and `sparsity` replace the block's own; empty to keep it.
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

    `methods` are names as `cbs_opt.solve` takes them; or every one of `solvers` with every one of
    `formulations` (names or globs) that it can take. `vary` of `options`: "all" combinations, or "one"
    option at a time away from the first value of each.
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
    """A study: what `cbs_opt.study.runner.run_study` works through."""

    name: str
    instances: tuple[InstanceGroup, ...]
    methods: tuple[MethodGroup, ...]
    description: str = ""
    folder: Path = Path()
    """Where relative paths of block files start."""


def read_study(path: str | os.PathLike[str]) -> Study:
    """Read a study file.

    Raises `ArgumentError` if it is absent, not TOML, or does not state a study; the message names the entry
    and its line.
    """
    source = Path(path)
    parse = partial(parse_study, folder=source.resolve().parent, default_name=source.stem)
    return cast(Study, read_document(source, "study", parse))


def parse_study(document: Mapping[str, Any], *, folder: Path = Path(), default_name: str = "study") -> Study:
    """Return the study that the tables of its file, as `tomllib` reads it, state.

    Relative paths of block files start at `folder`. An entry that is missing, unknown or impossible is
    an `ArgumentError`.
    """
    readers: dict[str, Reader] = {"name": _text, "description": _text, "seeds": _seeds}
    fields = _fields("", document, readers, "limits", "instances", "methods")
    limits = _limits("limits", document.get("limits", {}), RunLimits())
    shared = {"seeds": fields.pop("seeds", (0,)), "limits": limits}
    return Study(
        **{"name": default_name, **fields},
        folder=folder,
        instances=tuple(_instance_group(where, table) for where, table in _tables("instances", document)),
        methods=tuple(_method_group(where, table, shared) for where, table in _tables("methods", document)),
    )


def _instance_group(where: str, table: Any) -> InstanceGroup:
    readers: dict[str, Reader] = {"library": _texts, "files": _texts, "factory": _text, "arguments": _grid}
    fields = _fields(where, table, {**readers, "damping": _numbers, "sparsity": _shares})
    sources = [source for source in SOURCES if source in fields]
    if len(sources) != 1:
        found = " and ".join(sources) or "no source"
        raise ArgumentError(where, found, f"give exactly one of {', '.join(SOURCES)}")
    if "arguments" in fields and sources != ["factory"]:
        raise ArgumentError(f"{where}.arguments", f"given with {sources[0]}", "they are a factory's")
    if "factory" in fields and fields["factory"].count(":") != 1:
        raise ArgumentError(f"{where}.factory", f"{fields['factory']!r}", 'write "module:function"')
    return InstanceGroup(**fields)


def _method_group(where: str, table: Any, shared: Mapping[str, Any]) -> MethodGroup:
    readers: dict[str, Reader] = dict.fromkeys(("methods", "solvers", "formulations"), _texts)
    readers = {"program": _programs, **readers, "options": _grid, "vary": _vary, "seeds": _seeds}
    fields = _fields(where, table, readers, "limits")
    if ("methods" in fields) == ("solvers" in fields):
        found = "both" if "methods" in fields else "neither"
        raise ArgumentError(where, f"{found} of methods and solvers", "give one of them")
    if "formulations" in fields and "solvers" not in fields:
        raise ArgumentError(f"{where}.formulations", "without solvers", "name the solvers too")
    if "program" not in fields:
        raise ArgumentError(f"{where}.program", "none", f"choose among {', '.join(PROGRAMS)}")
    limits = _limits(f"{where}.limits", table.get("limits", {}), shared["limits"])
    return MethodGroup(**{**shared, "programs": fields.pop("program"), **fields, "limits": limits})


def _limits(where: str, table: Any, above: RunLimits) -> RunLimits:
    """Return the limits of a table; what it leaves out is as in `above`."""
    values = asdict(above)
    _fields(where, table, {}, *values)
    try:
        return RunLimits(**{**values, **table})
    except ArgumentError as error:
        raise ArgumentError(error.argument.replace("limits", where, 1), error.found, error.remedy) from error


Reader = Callable[[str, Any], Any]


def _fields(where: str, table: Any, readers: Mapping[str, Reader], *others: str) -> dict[str, Any]:
    """Return what the readers make of a table; refuse entries with no reader that are not `others` either."""
    known_names(where, table, (*readers, *others))
    prefix = where and f"{where}."
    return {name: read(f"{prefix}{name}", table[name]) for name, read in readers.items() if name in table}


def _tables(name: str, document: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    tables = document.get(name)
    if not isinstance(tables, list) or not tables:
        raise ArgumentError(name, "none", f"write at least one [[{name}]]")
    return [(f"{name}[{number}]", table) for number, table in enumerate(tables)]


def _of_type(where: str, value: Any, types: type | UnionType, remedy: str) -> Any:
    if not isinstance(value, types):
        raise ArgumentError(where, f"{value!r}", remedy)
    return value


def _several(read: Reader, least: int = 0) -> Reader:
    """Return a reader of a list, or of one value as a list of one."""

    def read_each(where: str, value: Any) -> tuple[Any, ...]:
        values = value if isinstance(value, list) else [value]
        if len(values) < least:
            raise ArgumentError(where, "an empty list", "write at least one value")
        return tuple(read(where, entry) for entry in values)

    return read_each


_text = partial(_of_type, types=str, remedy="write a string")
_scalar = partial(_of_type, types=str | int | float, remedy="write numbers, strings or booleans")
_texts = _several(_text)
_numbers = _several(finite_number)
_shares = _several(partial(finite_number, most=1.0))
_seeds = _several(partial(whole_number, least=0), least=1)
_programs = _several(partial(one_of, choices=PROGRAMS), least=1)
_vary = partial(one_of, choices=VARY)
_scalars = _several(_scalar, least=1)


def _grid(where: str, table: Any) -> dict[str, tuple[Any, ...]]:
    """Return values by name; a single value counts as a list of one."""
    return _fields(where, table, dict.fromkeys(table, _scalars) if isinstance(table, Mapping) else {})
