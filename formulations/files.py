"""Containers on disk: a zip of ``.npy`` arrays with a JSON header, written atomically, read warily.

The file is an ordinary ``.npz`` (``numpy.load`` opens it); the header is the member ``header.npy``, the
UTF-8 bytes of a JSON object. Nothing is ever unpickled. Sizes are checked against the header before
an array is read, so a damaged or hostile file cannot make the reader allocate more than it announces.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from formulations.errors import InstanceFormatError

HEADER = "header.npy"
LARGEST_HEADER = 2**20
NPY_HEADER_ROOM = 4096
DTYPES = {"float64": np.dtype("<f8"), "bool": np.dtype(np.bool_)}


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of either.

    A temporary file in the same folder is written, flushed to disk and renamed over `path`.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_container(
    path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write `header` and `arrays` (float64 or bool) as one compressed file, atomically."""
    described = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()
    }
    text = json.dumps({**header, "arrays": described}, allow_nan=False).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, array in {"header": np.frombuffer(text, dtype=np.uint8), **arrays}.items():
            # A fixed date makes equal content equal bytes.
            info = zipfile.ZipInfo(f"{member}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as stream:
                npy_format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def read_container(
    path: str | os.PathLike[str], kind: str, version: int, largest_bytes: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and arrays of a file of that kind.

    Raises
    ------
    InstanceFormatError
        If the file is absent, damaged, of another kind, newer than `version`, or would take more
        than `largest_bytes` of memory.
    """
    name = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            header = _read_header(name, archive, kind, version)
            return header, _read_arrays(name, archive, header["arrays"], largest_bytes)
    except FileNotFoundError:
        raise InstanceFormatError("path", f"{name}: no such file", "check the name") from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(name, f"{type(error).__name__}: {error}") from error


def _damaged(name: str, why: str) -> InstanceFormatError:
    return InstanceFormatError("path", f"{name}: damaged or not ours ({why})", "write the file again")


def _read_header(name: str, archive: zipfile.ZipFile, kind: str, version: int) -> dict[str, Any]:
    members = archive.namelist()
    if HEADER not in members or len(set(members)) != len(members):
        raise _damaged(name, "no header")
    if archive.getinfo(HEADER).file_size > LARGEST_HEADER:
        raise _damaged(name, "header too long")
    try:
        header = json.loads(_read_array(name, archive, HEADER, np.dtype(np.uint8)).tobytes().decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _damaged(name, f"header is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != kind:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise InstanceFormatError("path", f"{name}: a {found!r}, not a {kind!r}", "pass the right file")
    if not isinstance(header.get("version"), int) or header["version"] > version:
        found = f"{name}: version {header.get('version')!r}, this release reads up to {version}"
        raise InstanceFormatError("path", found, "upgrade the package")
    if not isinstance(header.get("arrays"), dict):
        raise _damaged(name, "the header lists no arrays")
    return header


def _read_arrays(
    name: str, archive: zipfile.ZipFile, described: dict[str, Any], largest_bytes: int
) -> dict[str, np.ndarray]:
    if {f"{array}.npy" for array in described} | {HEADER} != set(archive.namelist()):
        raise _damaged(name, "its members are not those that the header lists")
    total = 0
    arrays: dict[str, np.ndarray] = {}
    for array, description in described.items():
        shape, dtype = _shape_and_dtype(name, description)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        total += size
        if total > largest_bytes:
            found = f"{name}: holds more than {largest_bytes} bytes"
            raise InstanceFormatError("path", found, "raise max_bytes if you trust it")
        if archive.getinfo(f"{array}.npy").file_size > size + NPY_HEADER_ROOM:
            raise _damaged(name, f"array {array!r} is larger than announced")
        arrays[array] = _read_array(name, archive, f"{array}.npy", dtype)
        if arrays[array].shape != shape:
            raise _damaged(name, f"array {array!r} has shape {arrays[array].shape}, announced {shape}")
    return arrays


def _shape_and_dtype(name: str, description: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    if not isinstance(description, dict) or description.get("dtype") not in DTYPES:
        raise _damaged(name, "an array of unknown type")
    shape = description.get("shape")
    if not isinstance(shape, list) or not all(isinstance(s, int) and s >= 0 for s in shape):
        raise _damaged(name, "an array of unknown shape")
    return tuple(shape), DTYPES[description["dtype"]]


def _read_array(name: str, archive: zipfile.ZipFile, member: str, dtype: np.dtype[Any]) -> np.ndarray:
    with archive.open(member) as stream:
        try:
            array = npy_format.read_array(stream, allow_pickle=False)
        except ValueError as error:
            raise _damaged(name, f"{member}: {error}") from error
        # Reading to the end makes zipfile compare the checksum.
        if stream.read(1):
            raise _damaged(name, f"{member} has more data than its shape")
    if array.dtype != dtype:
        raise _damaged(name, f"{member} holds {array.dtype}, not {dtype}")
    return np.asarray(array)
