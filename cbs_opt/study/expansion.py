"""From a study to its single runs, each with a fingerprint of everything that decides its result."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from cbs_opt.select.methods import find_method
from cbs_opt.study.config import MethodGroup, RunLimits, Study
from cbs_opt.study.instances import InstanceRecipe, recipes
from formulations.errors import ArgumentError, UnsupportedProblemError
from formulations.solvers import check_native_options, models_for

FILTERS = ("instance", "program", "method", "seed", "n", "n_prune", "damping")
OPTION = "option."


@dataclass(frozen=True, kw_only=True)
class Run:
    """One solve: a block, a program, a method with its options, a seed and limits.

    Attributes
    ----------
    recipe : InstanceRecipe
    block : str
        Fingerprint of the block's data.
    n, n_prune, damping
        Of the block.
    program, method : str
    kind : str
        Of the method, as in `cbs_opt.select.methods.Method`.
    options : mapping
    seed : int
    limits : RunLimits
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
        return {
            "instance": self.recipe.name,
            "program": self.program,
            "method": self.method,
            "options": dict(self.options),
            "seed": self.seed,
        }

    @property
    def inputs(self) -> dict[str, Any]:
        """Inputs that may change under the same name: the data of the block, and the limits."""
        limits = asdict(self.limits)
        # How long an untimed solve may take decides nothing about the timed one.
        del limits["warm_up"]
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
        return {
            "run": self.fingerprint,
            **self.identity,
            "kind": self.kind,
            "n": self.n,
            "n_prune": self.n_prune,
            "damping": self.damping,
            **self.inputs,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every run of a study, and the combinations that do not exist."""

    runs: tuple[Run, ...]
    left_out: tuple[str, ...]


def expand(study: Study) -> Plan:
    """Return all runs of a study, block by block; every block is read once for its fingerprint.

    Raises
    ------
    ArgumentError
        If a method or an option is unknown, nothing is left to run, or a run is asked for twice with
        different limits.
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
                        how: dict[str, Any] = {"program": program, "method": method.name, "kind": method.kind}
                        how |= {"options": options, "limits": group.limits}
                        posed += [{**how, "seed": seed} for seed in group.seeds]
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
        wanted = [
            model
            for model in models
            if any(fnmatch.fnmatchcase(model, pattern) for pattern in group.formulations)
        ]
        if not wanted:
            left_out.append(f"{solver}: it takes none of these formulations of the {program} program")
        kind, _, backend = solver.partition(":")
        names += [":".join((kind, model, backend) if backend else (kind, model)) for model in wanted]
    return names


def combinations(grid: Mapping[str, Sequence[Any]], vary: str) -> Iterator[dict[str, Any]]:
    """Return choices of one value for each name: all, or those that differ from the first in one name."""
    if vary == "all":
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))
        return
    base = {name: values[0] for name, values in grid.items()}
    yield base
    for name, choices in grid.items():
        for value in choices[1:]:
            yield {**base, name: value}


def select(runs: Sequence[Run], filters: Sequence[str]) -> list[Run]:
    """Return the runs that every filter lets through.

    Parameters
    ----------
    runs : sequence of Run
    filters : sequence of str
        ``NAME=GLOB`` with a name of `FILTERS` or ``option.<name>``; several globs by commas, one of
        which must match.

    Raises
    ------
    ArgumentError
        If a filter is not of that form.
    """
    chosen = list(runs)
    for text in filters:
        name, separator, patterns = text.partition("=")
        name = name.strip()
        if not separator or not (name in FILTERS or name.startswith(OPTION)):
            remedy = f"write NAME=GLOB with {', '.join(FILTERS)} or {OPTION}NAME"
            raise ArgumentError("filter", f"{text!r}", remedy)
        globs = [pattern.strip() for pattern in patterns.split(",")]
        chosen = [
            run for run in chosen if any(fnmatch.fnmatchcase(_value(run, name), glob) for glob in globs)
        ]
    return chosen


def _value(run: Run, name: str) -> str:
    if name.startswith(OPTION):
        value = run.options.get(name.removeprefix(OPTION), "")
        return str(value).lower() if isinstance(value, bool) else str(value)
    return f"{value:g}" if isinstance(value := run.describe()[name], float) else str(value)
