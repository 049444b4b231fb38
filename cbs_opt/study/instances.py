"""Where the blocks of a study come from: shipped ones, files, or a function that makes them."""

from __future__ import annotations

import fnmatch
import glob
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from cbs_opt.study.config import InstanceGroup, Study
from formulations.errors import ArgumentError
from formulations.instances import library, load_library, read_instance
from formulations.problem import BlockProblem


@dataclass(frozen=True, kw_only=True)
class InstanceRecipe:
    """How to get one block; small enough to be sent to a worker process.

    Attributes
    ----------
    name : str
        What rows and pictures call it.
    source : {"library", "files", "factory"}
    locator : str
        Name of a shipped block, path of a file, or ``"module:function"``.
    arguments : mapping
        Of the factory.
    damping, sparsity : float or None
        Replace the block's own.
    """

    name: str
    source: str
    locator: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    damping: float | None = None
    sparsity: float | None = None

    def load(self) -> BlockProblem:
        """Return the block.

        Raises
        ------
        ArgumentError
            If a factory does not exist or does not return a block.
        InstanceFormatError
            If a file is not a block.
        """
        if self.source == "library":
            problem = load_library(self.locator)[0]
        elif self.source == "files":
            problem = read_instance(self.locator)[0]
        else:
            problem = self._made()
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
    """Return every block of a study, in the order of its file.

    Raises
    ------
    ArgumentError
        If a pattern matches nothing, or two different blocks have one name.
    """
    by_name: dict[str, InstanceRecipe] = {}
    for number, group in enumerate(study.instances):
        for recipe in _of_group(f"instances[{number}]", group, study.folder):
            earlier = by_name.setdefault(recipe.name, recipe)
            if earlier != recipe:
                remedy = "rename a file, or leave one out"
                raise ArgumentError("instances", f"two blocks are called {recipe.name!r}", remedy)
    return list(by_name.values())


def _of_group(where: str, group: InstanceGroup, folder: Path) -> Iterator[InstanceRecipe]:
    for base in _bases(where, group, folder):
        for damping, sparsity in itertools.product(group.damping or (None,), group.sparsity or (None,)):
            words = [base.name]
            words += [] if damping is None else [f"damping={damping:g}"]
            words += [] if sparsity is None else [f"sparsity={sparsity:g}"]
            yield replace(base, name=" ".join(words), damping=damping, sparsity=sparsity)


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
        names = list(group.arguments)
        for values in itertools.product(*group.arguments.values()):
            arguments = dict(zip(names, values, strict=True))
            words = [group.factory.partition(":")[2], *(f"{name}={arguments[name]}" for name in names)]
            yield InstanceRecipe(
                name=" ".join(words), source="factory", locator=group.factory, arguments=arguments
            )
