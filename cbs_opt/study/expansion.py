"""From a study to its blocks and runs, each with a fingerprint of everything that decides its result."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

from cbs_opt.select.methods import find_method
from cbs_opt.study.config import InstanceGroup, MethodGroup, RunLimits, Study
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.instances import library, load_library, read_instance
from formulations.problem import BlockProblem
from formulations.solvers import check_native_options, models_for

FILTERS = ("instance", "program", "method", "seed", "n", "n_prune", "damping")
OPTION = "option."


@dataclass(frozen=True, kw_only=True)
class InstanceRecipe:
    """How to get one block; small enough to be sent to a worker process.

    `name` is what rows and pictures call it; `locator` the name of a shipped block, the path of a file, or
    the ``"module:function"`` that takes `arguments`. `damping` and `sparsity` replace the block's own.
    """

    name: str
    source: Literal["library", "files", "factory"]
    locator: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    damping: float | None = None
    sparsity: float | None = None

    def load(self) -> BlockProblem:
        """Return the block; an `ArgumentError` if a factory or a file gives none."""
        if self.source == "factory":
            problem = self._made()
        else:
            problem = (load_library if self.source == "library" else read_instance)(self.locator)[0]
        changes: dict[str, Any] = {"name": self.name}
        if self.damping is not None:
            changes["damping"] = self.damping
        if self.sparsity is not None:
            changes["n_prune"] = round(self.sparsity * problem.n)
        return replace(problem, **changes)

    def _made(self) -> BlockProblem:
        module, _, name = self.locator.partition(":")
        try:
            factory = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ArgumentError("factory", f"{self.locator}: {error}", "check the name") from error
        if not _says_it_makes_blocks(factory):
            # A study file is data: it may not call whatever function it names, such as os.system.
            found = f"{self.locator} is not declared to return a BlockProblem"
            raise ArgumentError("factory", found, "annotate it: `def factory(...) -> BlockProblem`")
        problem = factory(**self.arguments)
        if not isinstance(problem, BlockProblem):
            found = f"{self.locator} returned a {type(problem).__name__}"
            raise ArgumentError("factory", found, "return a BlockProblem")
        return problem


def _says_it_makes_blocks(factory: object) -> bool:
    try:
        return callable(factory) and get_type_hints(factory).get("return") is BlockProblem
    except (NameError, TypeError, AttributeError):
        return False


def recipes(study: Study) -> list[InstanceRecipe]:
    """Return every block of a study, in the order of its file; refuse two blocks of one name."""
    by_name: dict[str, InstanceRecipe] = {}
    for number, group in enumerate(study.instances):
        for recipe in _of_group(f"instances[{number}]", group, study.folder):
            if by_name.setdefault(recipe.name, recipe) != recipe:
                remedy = "rename a file, or leave one out"
                raise ArgumentError("instances", f"two blocks are called {recipe.name!r}", remedy)
    return list(by_name.values())


def _of_group(where: str, group: InstanceGroup, folder: Path) -> Iterator[InstanceRecipe]:
    for base in _bases(where, group, folder):
        for damping, sparsity in itertools.product(group.damping or (None,), group.sparsity or (None,)):
            changes = {"damping": damping, "sparsity": sparsity}
            words = [f"{name}={value:g}" for name, value in changes.items() if value is not None]
            yield replace(base, name=" ".join([base.name, *words]), damping=damping, sparsity=sparsity)


def _bases(where: str, group: InstanceGroup, folder: Path) -> Iterator[InstanceRecipe]:
    for pattern in group.library:
        matching = [name for name in library() if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            remedy = "`cbs-opt library` lists the shipped blocks"
            raise ArgumentError(f"{where}.library", f"{pattern!r} matches none", remedy)
        for name in matching:
            yield InstanceRecipe(name=name, source="library", locator=name)
    for pattern in group.files:
        paths = sorted(glob.glob(str(folder / pattern)))
        if not paths:
            raise ArgumentError(f"{where}.files", f"{pattern!r} matches no file", f"looked from {folder}")
        for path in paths:
            yield InstanceRecipe(name=Path(path).stem, source="files", locator=path)
    if group.factory:
        for arguments in combinations(group.arguments):
            words = [f"{name}={value}" for name, value in arguments.items()]
            name = " ".join([group.factory.partition(":")[2], *words])
            yield InstanceRecipe(name=name, source="factory", locator=group.factory, arguments=arguments)


def combinations(grid: Mapping[str, Sequence[Any]], vary: str = "all") -> Iterator[dict[str, Any]]:
    """Return choices of one value for each name: all, or those that differ from the first in one name."""
    if vary == "all":
        yield from (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
        return
    base = {name: values[0] for name, values in grid.items()}
    yield base
    yield from ({**base, name: value} for name, values in grid.items() for value in values[1:])


@dataclass(frozen=True, kw_only=True)
class Run:
    """One solve: a block, a program, a method with its options, a seed and limits.

    `block` is the fingerprint of the block's data, `kind` that of the method as in
    `cbs_opt.select.methods.Method`.
    """

    recipe: InstanceRecipe
    block: str
    n: int
    n_prune: int
    damping: float
    program: str
    method: str
    kind: str = "search"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    limits: RunLimits = field(default_factory=RunLimits)

    @property
    def identity(self) -> dict[str, Any]:
        """Names of the run; two runs of a study never agree in them."""
        names = {"instance": self.recipe.name, "program": self.program, "method": self.method}
        return {**names, "options": dict(self.options), "seed": self.seed}

    @property
    def what(self) -> tuple[str, str]:
        """Method and program, which decide what is imported and compiled."""
        return self.method, self.program

    @property
    def inputs(self) -> dict[str, Any]:
        """Inputs that may change under the same name: the data of the block, and the limits."""
        # How long an untimed solve may take decides nothing about the timed one.
        limits = {name: value for name, value in asdict(self.limits).items() if name != "warm_up"}
        return {"block": self.block, **limits}

    @cached_property
    def key(self) -> str:
        """Canonical JSON of `identity`."""
        return json.dumps(self.identity, sort_keys=True)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `identity` and `inputs`, 64 hex digits."""
        text = json.dumps([self.identity, self.inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return the columns of a row that are known before the run."""
        described = {name: getattr(self, name) for name in ("kind", "n", "n_prune", "damping")}
        return {"run": self.fingerprint, **self.identity, **described, **self.inputs}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every run of a study, and the combinations that do not exist."""

    runs: tuple[Run, ...]
    left_out: tuple[str, ...]


def expand(study: Study) -> Plan:
    """Return all runs of a study, block by block; every block is read once for its fingerprint.

    An unknown method or option, nothing to run, or a run with two limits is an `ArgumentError`.
    """
    posed, left_out = _posed(study)
    runs: dict[str, Run] = {}
    for recipe in recipes(study):
        problem = recipe.load()
        block: dict[str, Any] = {"block": problem.fingerprint()}
        block |= {name: getattr(problem, name) for name in ("n", "n_prune", "damping")}
        for how in posed:
            run = Run(recipe=recipe, **block, **how)
            if runs.setdefault(run.key, run).fingerprint != run.fingerprint:
                found = f"{run.method} is there twice, with other limits"
                raise ArgumentError("methods", found, "merge them")
    if not runs:
        why = "; ".join(left_out)
        raise ArgumentError("methods", f"nothing to run ({why})", "choose other solvers or formulations")
    return Plan(runs=tuple(runs.values()), left_out=tuple(left_out))


def _posed(study: Study) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what every run has without its block, and the combinations that do not exist."""
    posed: list[dict[str, Any]] = []
    left_out: list[str] = []
    for number, group in enumerate(study.methods):
        for program in group.programs:
            for name in _names(f"methods[{number}]", group, program, left_out):
                try:
                    method = find_method(name, program)
                    for options in combinations(group.options, group.vary):
                        method.check_options(options, program)
                        if method.backend:
                            check_native_options(method.backend, options)
                        how = {"program": program, "method": method.name, "kind": method.kind}
                        given = {"options": options, "limits": group.limits}
                        posed += [{**how, **given, "seed": seed} for seed in group.seeds]
                except UnsupportedProblemError as error:
                    left_out.append(f"{name}: {error.found}, {error.remedy}")
                except ArgumentError as error:
                    raise ArgumentError(f"methods[{number}]", error.found, error.remedy) from error
    return posed, left_out


def _names(where: str, group: MethodGroup, program: str, left_out: list[str]) -> list[str]:
    names = list(group.methods)
    for solver in group.solvers:
        try:
            models = models_for(solver, program)
        except UnsupportedProblemError as error:
            raise ArgumentError(f"{where}.solvers", error.found, error.remedy) from error
        wanted = [model for model in models if _matches(model, group.formulations)]
        if not wanted:
            left_out.append(f"{solver}: it takes none of these formulations of the {program} program")
        kind, *backend = solver.split(":")
        names += [":".join((kind, model, *backend)) for model in wanted]
    return names


def select(runs: Sequence[Run], filters: Sequence[str]) -> list[Run]:
    """Return the runs that every filter lets through.

    A filter is ``NAME=GLOB`` with a name of `FILTERS` or ``option.<name>``; several globs by commas,
    one of which must match. Anything else is an `ArgumentError`.
    """
    chosen = list(runs)
    for text in filters:
        name, separator, patterns = text.partition("=")
        name = name.strip()
        if not separator or not (name in FILTERS or name.startswith(OPTION)):
            remedy = f"write NAME=GLOB with {', '.join(FILTERS)} or {OPTION}NAME"
            raise ArgumentError("filter", f"{text!r}", remedy)
        globs = [pattern.strip() for pattern in patterns.split(",")]
        chosen = [run for run in chosen if _matches(_value(run, name), globs)]
    return chosen


def _matches(text: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(text, glob) for glob in globs)


def _value(run: Run, name: str) -> str:
    if name.startswith(OPTION):
        value = run.options.get(name.removeprefix(OPTION), "")
        return str(value).lower() if isinstance(value, bool) else str(value)
    return f"{value:g}" if isinstance(value := run.describe()[name], float) else str(value)
