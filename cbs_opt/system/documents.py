"""TOML documents that people write: what is wrong with one is named, with the line where there is one."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from formulations.errors import ArgumentError


def read_document(
    path: Path, argument: str, parse: Callable[[dict[str, Any]], Any], *, inside: str = ""
) -> Any:
    """Return what `parse` makes of a TOML file.

    Raises `ArgumentError` if the file cannot be read, is not TOML, or `parse` refuses it: with the line of
    the entry. `argument`: what messages call the file. `parse`: raises `ArgumentError` about an entry of the
    document, such as ``methods[1].options``. `inside`: table in which an entry may stand although its name
    does not begin with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error
        raise ArgumentError(argument, f"{path} cannot be read ({why})", "name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(argument, f"{path} is not TOML: {error}", "mend the file") from error
    try:
        return parse(document)
    except ArgumentError as error:
        line = line_of(text, error.argument) or line_of(text, f"{inside}.{error.argument}")
        where = path if line is None else f"line {line} of {path}"
        raise type(error)(error.argument, f"{error.found} ({where})", error.remedy) from error


def known_names(where: str, table: Any, names: Iterable[str]) -> Mapping[str, Any]:
    """Return `table` if it is a mapping with none but these names, else raise `ArgumentError`."""
    if not isinstance(table, Mapping):
        raise ArgumentError(where, f"{table!r}", f"write a table [{where}] with its fields")
    names = list(names)
    for name in table:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            dotted = f"{where}.{name}" if where else name
            raise ArgumentError(dotted, "unknown", f"{hint}known: {', '.join(names)}")
    return table


def line_of(text: str, entry: str) -> int | None:
    """Return the line of an entry such as ``methods[1].options``, else of the table that lacks it, if any."""
    parts = re.findall(r"([\w-]+)(?:\[(\d+)\])?", entry)
    wanted = [(name, int(index or 0)) for name, index in parts]
    tables: Counter[str] = Counter()
    table: list[tuple[str, int]] = []
    found = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[+)\s*([\w.-]+)\s*\]", line):
            tables[header[2]] += header[1] == "[["
            names = header[2].split(".")
            counts = [tables[".".join(names[: depth + 1])] for depth in range(len(names))]
            here = table = [(name, max(0, count - 1)) for name, count in zip(names, counts, strict=True)]
        elif setting := re.match(r'\s*"?([\w.-]+)"?\s*=', line):
            here = table + [(name, 0) for name in setting[1].split(".")]
        else:
            continue
        if here == wanted:
            return number
        if here == wanted[: len(here)]:
            found = number
    return found
