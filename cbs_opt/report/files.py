"""Reports as plain JSON values and back."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from formulations.errors import InstanceFormatError
from formulations.files import read_sealed

if TYPE_CHECKING:
    from cbs_opt.report.record import PruneReport

FORMAT = "cbs-opt report"
VERSION = 1
FILES = ("masks", "certificates")
"""Fields of a report that have files of their own."""


class ReportFormatError(InstanceFormatError):
    """A file or mapping is not a report of ours, or is damaged."""


def encode(report: PruneReport) -> dict[str, Any]:
    """Plain values of every field but `FILES`; numbers that are not finite become strings."""
    names = [field.name for field in dataclasses.fields(report) if field.name not in FILES]
    fields = {name: plain(getattr(report, name)) for name in names}
    return {"format": FORMAT, "version": VERSION, **fields}


def decode(cls: type[PruneReport], data: Mapping[str, Any], files: Mapping[str, Any]) -> PruneReport:
    """Inverse of `encode`, with the fields of `FILES` given apart; raises `ReportFormatError`."""
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ReportFormatError("data", f'no "format": "{FORMAT}"', "pass what PruneReport.to_dict gave")
    if data.get("version") != VERSION:
        found = f"version {data.get('version')!r} of the report format"
        raise ReportFormatError("data", found, f"this release reads version {VERSION}")
    body = {name: value for name, value in data.items() if name not in ("format", "version")}
    try:
        report: PruneReport = dataclasses.replace(_build(cls, body), **files)
    except (TypeError, ValueError, AttributeError) as error:
        raise ReportFormatError("data", f"damaged report ({error})", "write the report again") from error
    return report


def read_json(path: Path) -> Any:
    """The JSON object in a file, with or without a checksum; raises `ReportFormatError` if damaged."""
    try:
        return read_sealed(path.read_bytes(), required=False)
    except FileNotFoundError as error:
        raise ReportFormatError(
            "directory", f"no {path.name} in {path.parent}", "pass a saved run"
        ) from error
    except (OSError, ValueError) as error:
        found = f"{path} is damaged ({error})"
        raise ReportFormatError("directory", found, "write the report again") from error


def plain(value: Any) -> Any:
    """`value` in types that JSON has; a function becomes its name, anything unknown its text."""
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item())
    return getattr(value, "__qualname__", None) or str(value)


def _build(cls: Any, body: Any) -> Any:
    """A dataclass from a mapping of its fields, each brought to its annotated type."""
    hints = get_type_hints(cls)
    unknown = set(body) - set(hints)
    if unknown:
        raise ValueError(f"unknown field {min(unknown)} of {cls.__name__}")
    return cls(**{name: _convert(hints[name], value) for name, value in body.items()})


def _convert(hint: Any, value: Any) -> Any:
    options = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if types.NoneType not in options:
            raise ValueError("null where a value is needed")
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return _build(option, value)
        if getattr(option, "__origin__", None) is tuple:
            return tuple(_convert(option.__args__[0], entry) for entry in value)
    if float in options:
        return float(value)
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{value!r} where an integer is needed")
    return value
