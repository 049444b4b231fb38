"""Containers on disk: a zip of ``.npy`` arrays with a JSON header, written atomically, read warily.

The file is an ordinary ``.npz`` (``numpy.load`` opens it); the header is the member ``header.npy``, the
UTF-8 bytes of a JSON object. Nothing is ever unpickled. Sizes are checked against the header before
an array is read, so a damaged or hostile file cannot make the reader allocate more than it announces.
The header carries a SHA-256 of itself and of all arrays: what is read is what was written, or refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from formulations.errors import InstanceFormatError

HEADER = "header.npy"
CHECKSUM = "checksum"
PARTIAL = ".cbs-opt-partial"
"""How names of files end that are being written."""
LARGEST_HEADER = 2**20
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_HEADER = re.compile(rb"\{'descr': '([^']{1,8})', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n")
NPY_HEADER_ROOM = 4096
DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "int64": np.dtype("<i8"),
    "bool": np.dtype(np.bool_),
}
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, KeyError)
"""What the zip reader raises on damaged files."""


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of either."""
    with replaced_file(path) as stream:
        stream.write(content)


@contextmanager
def replaced_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Give a stream whose content becomes that of `path` if the body ends without an exception.

    A temporary file in the same folder, whose name begins with a dot and ends with `PARTIAL`, is written,
    flushed to disk and renamed over `path`. Only a kill leaves it behind.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> str:
    """Return SHA-256 of a JSON object, whatever the order of its keys, and of named arrays."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(text.encode())
    for name, array in sorted((arrays or {}).items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def sealed_json(document: Mapping[str, Any]) -> bytes:
    """Return a JSON object with a checksum of its own, as `read_sealed` takes it."""
    sealed = {**document, CHECKSUM: checksum(document)}
    return f"{json.dumps(sealed, indent=1, allow_nan=False)}\n".encode()


def read_sealed(content: bytes) -> dict[str, Any]:
    """Return the JSON object of `sealed_json`, without its checksum.

    Raises
    ------
    ValueError
        If `content` is no JSON object or not as it was written, with the reason.
    """
    document = json_object(content)
    found = document.pop(CHECKSUM, None)
    if found != checksum(document):
        raise ValueError("no checksum" if found is None else "content does not match its checksum")
    return document


def json_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object in `content`; raise ValueError with the reason for anything else."""
    try:
        document = json.loads(content.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"a JSON {type(document).__name__}, not an object")
    return document


def write_container(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    *,
    compress: bool = True,
) -> None:
    """Write `header` and `arrays`, of the types of `DTYPES`, as one file, atomically.

    `compress` False is for what does not shrink, such as gradients, and saves the time.
    """
    for name, array in arrays.items():
        if str(array.dtype) not in DTYPES:
            raise TypeError(f"{name} has {array.dtype}, which could not be read again")
    packing = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    described = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()
    }
    whole = {**header, "arrays": described}
    text = json.dumps({**whole, CHECKSUM: checksum(whole, arrays)}, allow_nan=False).encode()
    try:
        with replaced_file(path) as file, zipfile.ZipFile(file, "w", packing) as archive:
            for member, array in {"header": np.frombuffer(text, dtype=np.uint8), **arrays}.items():
                # A fixed date makes equal content equal bytes.
                info = zipfile.ZipInfo(f"{member}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                info.compress_type = packing
                with archive.open(info, "w", force_zip64=True) as stream:
                    npy_format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    except ValueError as error:
        # An archive that is left in the middle complains of that, in the place of what interrupted it.
        if error.__context__ is None:
            raise
        raise error.__context__ from None


def read_container(
    path: str | os.PathLike[str], kind: str, version: int, largest_bytes: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and arrays of a file of that kind.

    Parameters
    ----------
    path : path
    kind : str
        What the header calls the format.
    version : int
        The newest version that can be read.
    largest_bytes : int

    Raises
    ------
    InstanceFormatError
        If the file is absent, damaged, without a checksum, of another kind, newer than `version`, or
        would take more than `largest_bytes` of memory.
    """
    name = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            header = _read_header(name, archive, kind, version)
            arrays = _read_arrays(name, archive, header["arrays"], largest_bytes)
            expected = header.pop(CHECKSUM, None)
            if expected != checksum(header, arrays):
                raise _damaged(name, "no checksum" if expected is None else "it does not match its checksum")
            return header, arrays
    except FileNotFoundError:
        raise InstanceFormatError("path", f"{name}: no such file", "check the name") from None
    except InstanceFormatError:
        raise
    except DAMAGE as error:
        raise _damaged(name, f"{type(error).__name__}: {error}") from error


def _damaged(name: str, why: str) -> InstanceFormatError:
    return InstanceFormatError("path", f"{name}: damaged or not ours ({why})", "write the file again")


def _read_header(name: str, archive: zipfile.ZipFile, kind: str, version: int) -> dict[str, Any]:
    members = archive.namelist()
    if HEADER not in members or len(set(members)) != len(members):
        raise _damaged(name, "no header")
    if any(i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for i in archive.infolist()):
        raise _damaged(name, "packed in a way that is not ours")
    if archive.getinfo(HEADER).file_size > LARGEST_HEADER:
        raise _damaged(name, "header too long")
    content = _read_array(name, archive, HEADER, np.dtype(np.uint8)).tobytes()
    try:
        header = json_object(content)
    except ValueError as error:
        raise _damaged(name, f"header is not JSON: {error}") from error
    if header.get("format") != kind:
        found = f"{name}: a {header.get('format')!r}, not a {kind!r}"
        raise InstanceFormatError("path", found, "pass the right file")
    if type(header.get("version")) is not int or header["version"] > version:
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
        size = math.prod(shape) * dtype.itemsize
        total += size
        if total > largest_bytes:
            found = f"{name}: holds more than {largest_bytes} bytes"
            raise InstanceFormatError("path", found, "raise max_bytes if you trust it")
        if archive.getinfo(f"{array}.npy").file_size > size + NPY_HEADER_ROOM:
            raise _damaged(name, f"array {array!r} is larger than announced")
        arrays[array] = _read_array(name, archive, f"{array}.npy", dtype, shape)
    return arrays


def _shape_and_dtype(name: str, description: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    kind = description.get("dtype") if isinstance(description, dict) else None
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _damaged(name, "an array of unknown type")
    shape = description.get("shape")
    if not isinstance(shape, list) or not all(type(s) is int and s >= 0 for s in shape):
        raise _damaged(name, "an array of unknown shape")
    return tuple(shape), DTYPES[kind]


def _read_array(
    name: str,
    archive: zipfile.ZipFile,
    member: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Return one array; without a `shape` it is flat and as long as it says.

    The numpy header is matched, not evaluated, and nothing is allocated for what it says.
    """
    with archive.open(member) as stream:
        start = stream.read(len(NPY_MAGIC) + 2)
        text = stream.read(int.from_bytes(start[-2:], "little"))
        match = NPY_HEADER.fullmatch(text)
        if len(start) != len(NPY_MAGIC) + 2 or not start.startswith(NPY_MAGIC) or match is None:
            raise _damaged(name, f"{member} is no array of ours")
        if match[1].decode() != dtype.str:
            raise _damaged(name, f"{member} holds {match[1].decode()}, not {dtype.str}")
        said = tuple(int(size) for size in match[2].decode().split(",") if size.strip())
        if shape is None and len(said) == 1:
            shape = said
        if shape is None or said != shape:
            raise _damaged(name, f"{member} has shape {said}, announced {shape}")
        size = math.prod(shape) * dtype.itemsize
        # Reading past the end makes zipfile compare the checksum.
        content = stream.read(size + 1)
    if len(content) != size:
        raise _damaged(name, f"{member} has not the data of its shape")
    if dtype == np.bool_ and content.strip(b"\0\1"):
        raise _damaged(name, f"{member} holds truth values other than 0 and 1")
    return np.frombuffer(bytearray(content), dtype=dtype).reshape(shape)
