"""A request as a TOML file that people read and that runs again, and fields set on the command line."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from cbs_opt.curvature.kinds import FISHERS, Fisher
from cbs_opt.errors import RecipeFileError
from cbs_opt.recipe.records import Absolute, Certify, FineTuning, Recipe, Request, Stages, Update, Weights
from cbs_opt.recipe.select import SELECTS, Exact, Select
from cbs_opt.system.checks import one_of
from cbs_opt.system.documents import known_names, read_document
from formulations.errors import ArgumentError
from formulations.files import write_atomically

FORMAT = 1
"""Version of the files."""
HEAD = "# cbs-opt prune --recipe THIS-FILE does the same again on the same network and data.\n"
TOP = ("format", "sparsity", "seed", "recipe", "stages", "certify")
REQUEST_FIELDS = ("stages", "certify", "sparsity", "seed")
"""First parts of dotted names that are not those of a recipe."""


def request_to_plain(request: Request) -> dict[str, Any]:
    """Return the request as numbers, strings, lists and mappings; what is None is left out."""
    sparsity = request.sparsity if request.pattern is None else str(request.pattern)
    document: dict[str, Any] = {"format": FORMAT, "sparsity": sparsity, "seed": request.seed}
    for name in ("stages", "certify"):
        record = getattr(request, name)
        if record is not None:
            fields_of = _fields(record, leave=("on_stage", "block_dir"))
            nested = {
                key: _fields(value) for key, value in fields_of.items() if isinstance(value, FineTuning)
            }
            document[name] = fields_of | nested
    document["recipe"] = [_recipe_to_plain(recipe) for recipe in request.recipes]
    return document


def request_from_plain(document: Mapping[str, Any], *, sparsity: float | str | None = None) -> Request:
    """Return the request that `request_to_plain` wrote, at another sparsity if one is given.

    Raises `RecipeFileError` if the document is of another version, or lacks the sparsity; `ArgumentError`
    if a field does not exist, a value is out of its range, or values contradict each other.
    """
    version = document.get("format")
    if version != FORMAT:
        found = "no format" if version is None else f"format {version!r}"
        raise RecipeFileError("format", found, f"this version reads and writes format = {FORMAT}")
    known_names("", document, TOP)
    sparsity = document.get("sparsity") if sparsity is None else sparsity
    if sparsity is None:
        raise RecipeFileError("sparsity", "missing", "add a line such as sparsity = 0.9")
    recipes = document.get("recipe", [{}])
    recipes = [recipes] if isinstance(recipes, Mapping) else recipes
    if not isinstance(recipes, list) or not all(isinstance(entry, Mapping) for entry in recipes):
        raise RecipeFileError("recipe", f"{recipes!r}", "write [recipe], or [[recipe]] for each of several")
    return Request(
        sparsity=sparsity,  # type: ignore[arg-type]
        recipes=tuple(_numbered(number, recipes) for number in range(len(recipes))),
        stages=_optional("stages", Stages, _staged(document.get("stages"))),
        certify=_optional("certify", Certify, document.get("certify")),
        seed=document.get("seed", 0),
    )


def save_request(request: Request, path: str | Path) -> None:
    """Write the request as a TOML file, atomically."""
    write_atomically(Path(path), (HEAD + to_toml(request_to_plain(request))).encode())


def load_request(path: str | Path, *, sparsity: float | str | None = None) -> Request:
    """Read a request from a TOML file, at another sparsity if one is given.

    Raises `RecipeFileError` if the file cannot be read, is no TOML, is of another version, or has a field
    that does not exist or a value that is out of range: named with its line where there is one.
    """
    parse = partial(request_from_plain, sparsity=sparsity)
    try:
        request: Request = read_document(Path(path), "recipe", parse, inside="recipe")
    except ArgumentError as error:
        raise RecipeFileError(error.argument, error.found, error.remedy) from error
    return request


def load_recipe(path: str | Path) -> list[Recipe]:
    """Read the recipes of a TOML file, such as the ``recipe.toml`` of a saved report.

    The list goes into `prune` as ``recipe``; `load_request` also reads sparsity, stages and seed.
    """
    return list(load_request(path).recipes)


def save_recipe(recipe: Recipe | Iterable[Recipe], path: str | Path, *, sparsity: float | str) -> None:
    """Write recipes as a TOML file for `load_recipe` and the command line."""
    recipes = (recipe,) if isinstance(recipe, Recipe) else tuple(recipe)
    save_request(Request(sparsity=sparsity, recipes=recipes), path)  # type: ignore[arg-type]


def with_fields(request: Request, assignments: Iterable[str]) -> Request:
    """Return the request with fields set, each ``NAME=VALUE`` with a dotted name and a TOML value.

    A name is that of a field of a recipe (of all of them, where there are several), such as ``damping`` or
    ``curvature.samples``, or of the request, such as ``stages.count``. A value that is no TOML is a string.
    Raises `ArgumentError` if an assignment has no ``=``, names no field, or gives a value out of its range.
    """
    document = request_to_plain(request)
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name:
            remedy = "write field=value, such as curvature.samples=8000"
            raise ArgumentError("set", f"{assignment!r}", remedy)
        path = name.strip().split(".")
        roots = [document] if path[0] in REQUEST_FIELDS else document["recipe"]
        for root in roots:
            _assign(root, path, _value(text.strip()))
    changed = request_from_plain(document)
    # What has no place in a document.
    if request.stages is not None and changed.stages is not None:
        changed = replace(changed, stages=replace(changed.stages, on_stage=request.stages.on_stage))
    if request.certify is not None and changed.certify is not None:
        changed = replace(changed, certify=replace(changed.certify, block_dir=request.certify.block_dir))
    return changed


def to_toml(document: Mapping[str, Any], prefix: str = "") -> str:
    """Return a document of numbers, strings, lists and mappings as TOML."""
    simple, tables = [], []
    for name, value in document.items():
        dotted = f"{prefix}{_key(name)}"
        if isinstance(value, Mapping):
            tables.append(f"\n[{dotted}]\n{to_toml(value, f'{dotted}.')}")
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            tables += [f"\n[[{dotted}]]\n{to_toml(entry, f'{dotted}.')}" for entry in value]
        else:
            simple.append(f"{_key(name)} = {_scalar(value)}\n")
    return "".join(simple + tables)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _string(name)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_scalar(entry) for entry in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(name)} = {_scalar(entry)}' for name, entry in value.items())}}}"
    return _string(value) if isinstance(value, str) else repr(value)


def _fields(record: Any, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of a record that are not None, in order."""
    values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    kinds = ((tuple, list), (Mapping, dict))
    return {
        name: next((make(value) for kind, make in kinds if isinstance(value, kind)), value)
        for name, value in values.items()
        if value is not None and name not in leave
    }


def _recipe_to_plain(recipe: Recipe) -> dict[str, Any]:
    document = _fields(recipe)
    for name, value in document.items():
        if isinstance(value, Absolute):
            document[name] = {"absolute": value.value}
        elif name == "curvature":
            kind = {"kind": value.kind, **_fields(value)} if isinstance(value, Fisher) else {"kind": "given"}
            document[name] = kind
        elif isinstance(value, Select):
            document[name] = {"method": value.method, **_fields(value)}
        elif isinstance(value, Weights | Update):
            document[name] = _fields(value)
    if recipe.update is None:
        document["update"] = False
    return document


def _numbered(number: int, recipes: list[Mapping[str, Any]]) -> Recipe:
    """Read one of several recipes; errors say which one."""
    try:
        known_names("recipe", recipes[number], [entry.name for entry in fields(Recipe)])
        return Recipe(**{name: READERS.get(name, _same)(value) for name, value in recipes[number].items()})
    except ArgumentError as error:
        if len(recipes) == 1:
            raise
        name = f"recipe[{number}].{error.argument.removeprefix('recipe.')}"
        raise type(error)(name, error.found, error.remedy) from error


def _same(value: Any) -> Any:
    return value


def _curvature(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("kind") == "given":
        remedy = "name a kind of curvature: rows that were computed before are not in the file"
        raise RecipeFileError("curvature.kind", "'given'", remedy)
    if isinstance(value, str):
        return value
    return _chosen("curvature", "kind", "empirical_fisher", FISHERS, value)


def _damping(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return Absolute(known_names("damping", value, ("absolute",)).get("absolute", math.nan))


def _select(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if value == {"program": "joint"}:
        return None
    if isinstance(value, Mapping) and value.get("method", "swap_search") not in SELECTS:
        return _record("select", Exact, value)
    return _chosen("select", "method", "swap_search", SELECTS, value)


def _chosen(argument: str, field: str, default: str, kinds: Mapping[str, type[Any]], value: Any) -> Any:
    """Return the record of the kind that a field of its table names."""
    table = {field: default, **value} if isinstance(value, Mapping) else value
    kind = table.pop(field) if isinstance(value, Mapping) else default
    one_of(f"{argument}.{field}", kind, kinds)
    return _record(argument, kinds[kind], table)


def _record(argument: str, kind: type[Any], value: Any) -> Any:
    """Return a record from its table; the first field that has no default and is missing is named."""
    table = known_names(argument, value, [entry.name for entry in fields(kind)])
    for entry in fields(kind):
        if entry.name not in table and entry.default is MISSING and entry.default_factory is MISSING:
            raise ArgumentError(f"{argument}.{entry.name}", "missing", "give it: it has no default")
    return kind(**table)


def _optional(argument: str, kind: type[Any], value: Any) -> Any:
    """Return a record from its table; a number or flag stands for itself."""
    return _record(argument, kind, value) if isinstance(value, Mapping) else value


def _staged(table: Any) -> Any:
    """Return a table of stages with its inner record made."""
    if not isinstance(table, Mapping) or "fine_tuning" not in table:
        return table
    return {**table, "fine_tuning": _record("stages.fine_tuning", FineTuning, table["fine_tuning"])}


READERS: dict[str, Callable[[Any], Any]] = {
    "curvature": _curvature,
    "damping": _damping,
    "selection_damping": _damping,
    "weights": partial(_record, "weights", Weights),
    "select": _select,
    "update": lambda value: None if value is False else _record("update", Update, value),
}
"""What makes the fields of a recipe of the values in a document; the others are taken as they are."""


def _assign(root: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        inner = root.get(name)
        if not isinstance(inner, dict):
            inner = root[name] = {}
        root = inner
    if path[-1:] == ["method"]:
        # Another method has other options.
        for name in [name for name in root if name not in ("program", "time_limit")]:
            del root[name]
    if path[-1:] == ["kind"] and value in FISHERS:
        for name in set(root) - {entry.name for entry in fields(FISHERS[value])}:
            del root[name]
    if value is None and path != ["update"]:
        root.pop(path[-1], None)
    else:
        root[path[-1]] = False if value is None else value


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    with suppress(tomllib.TOMLDecodeError):
        return tomllib.loads(f"value = {text}")["value"]
    with suppress(ValueError):
        return float(text)
    return text
