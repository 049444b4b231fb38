"""TOML documents that people write: what is wrong with one is named, with the line where there is one."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from formulations.errors import ArgumentError


def read_document(path: Path, argument: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """Return what `parse` makes of a TOML file.

    Parameters
    ----------
    path : path
    argument : str
        What messages call the file.
    parse : callable
        Raises `ArgumentError` about an entry of the document, such as ``methods[1].options``.

    Raises
    ------
    ArgumentError
        If the file cannot be read, is not TOML, or `parse` refuses it: with the line of the entry.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except FileNotFoundError:
        raise ArgumentError(argument, f"{path}: no such file", "check the name") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ArgumentError(argument, f"{path} is not TOML: {error}", "mend the file") from error
    try:
        return parse(document)
    except ArgumentError as error:
        line = line_of(text, error.argument)
        where = "" if line is None else f" (line {line} of {path})"
        raise ArgumentError(error.argument, f"{error.found}{where}", error.remedy) from error


def known_names(where: str, table: Any, names: Iterable[str]) -> Mapping[str, Any]:
    """Return `table` if it is a mapping with none but these names, else raise `ArgumentError`."""
    if not isinstance(table, Mapping):
        raise ArgumentError(where, f"{table!r}", "write a table")
    names = list(names)
    for name in table:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            dotted = f"{where}.{name}" if where else name
            raise ArgumentError(dotted, "unknown", f"{hint}known: {', '.join(names)}")
    return table


def line_of(text: str, entry: str) -> int | None:
    """Return the number of the line that an entry such as ``methods[1].options`` stands in, if it does."""
    lines = [line.partition("#")[0] for line in text.splitlines()]
    found, start = None, 0
    for name, index in re.findall(r"([\w-]+)(?:\[(\d+)\])?", entry):
        header = rf"\[\[\s*{name}\s*\]\]" if index else rf"(?<![\w-]){name}[\"']?\s*[\].=]"
        places = [i for i, line in enumerate(lines) if i >= start and re.search(header, line)]
        if len(places) <= int(index or 0):
            break
        start = places[int(index or 0)]
        found = start + 1
    return found
