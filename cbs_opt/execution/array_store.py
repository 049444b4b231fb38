"""Large arrays shipped to workers once: files named by their content, and a cache in every worker."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from formulations.problem import BlockProblem, FloatArray

SHARED_FROM = 1 << 20
"""Bytes from which an array travels as a reference: 1 MiB."""
IDLE_BYTES = 1 << 30
"""Files that no block in flight needs are kept for later blocks up to this size together: 1 GiB."""
CACHE_BYTES = 1 << 31
"""What a worker keeps of arrays it has used, the latest first: 2 GiB."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArrayReference:
    """An array by its SHA-256, and the file that may hold it."""

    digest: str
    path: str


@dataclass(frozen=True)
class PackedProblem:
    """A `BlockProblem` on its way to a worker: large arrays are references."""

    state: Mapping[str, Any]

    @property
    def references(self) -> tuple[ArrayReference, ...]:
        """The references among the fields."""
        return tuple(value for value in self.state.values() if isinstance(value, ArrayReference))

    def unpack(self, cache: ArrayCache, attached: Mapping[str, FloatArray]) -> BlockProblem | None:
        """The problem, or None if an array is neither in `attached` nor in the cache nor in its file.

        Nothing is checked again: the data were checked when the problem was made, and an array that is
        read from a file must have the content of its reference.
        """
        found: dict[str, Any] = {}
        for name, value in self.state.items():
            if isinstance(value, ArrayReference):
                found[name] = cache.get(value, attached.get(value.digest))
                if found[name] is None:
                    return None
            else:
                found[name] = value
        problem = object.__new__(BlockProblem)
        problem.__setstate__(found)
        return problem


class ArrayStore:
    """The sender's side: which arrays are in flight, and their files.

    Parameters
    ----------
    folder : path, optional
        Where the files go, in a folder of their own that `close` removes; by default the system's
        place for temporary files. On several machines, a folder that all of them see; a worker that
        does not find a file asks for the array, which is then sent to it with the block.

    Notes
    -----
    An array costs one pass for its digest when it is first seen, and nothing while the same object
    comes again. A full disk is no failure: arrays are then sent with the blocks.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="cbs-opt-", dir=folder, ignore_cleanup_errors=True)
        self._digests: dict[int, tuple[weakref.ref[FloatArray], str]] = {}
        self._uses: dict[str, int] = {}
        self._arrays: dict[str, FloatArray] = {}
        self._idle: OrderedDict[str, int] = OrderedDict()

    def pack(self, problem: BlockProblem) -> PackedProblem:
        """Replace the large arrays of `problem` by references, until `release`."""
        state = {entry.name: getattr(problem, entry.name) for entry in fields(problem)}
        for name, value in state.items():
            if isinstance(value, np.ndarray) and value.nbytes >= SHARED_FROM:
                state[name] = self._reference(value)
        return PackedProblem(state)

    def release(self, packed: PackedProblem) -> None:
        """The block of `packed` is done; files that nothing needs may go, the oldest first."""
        for reference in packed.references:
            digest = reference.digest
            self._uses[digest] -= 1
            if self._uses[digest] == 0:
                del self._uses[digest]
                self._idle[digest] = self._arrays.pop(digest).nbytes
        while sum(self._idle.values()) > IDLE_BYTES:
            self._path(self._idle.popitem(last=False)[0]).unlink(missing_ok=True)

    def arrays(self, packed: PackedProblem) -> dict[str, FloatArray]:
        """The arrays that `packed` refers to, by digest, to send along with it."""
        return {reference.digest: self._arrays[reference.digest] for reference in packed.references}

    def close(self) -> None:
        """Remove all files."""
        self._home.cleanup()

    def _reference(self, array: FloatArray) -> ArrayReference:
        digest = self._digest(array)
        path = self._path(digest)
        self._arrays.setdefault(digest, array)
        self._uses[digest] = self._uses.get(digest, 0) + 1
        if self._uses[digest] == 1 and self._idle.pop(digest, None) is None:
            self._write(path, array)
        return ArrayReference(digest, str(path))

    def _digest(self, array: FloatArray) -> str:
        known = self._digests.get(id(array))
        if known is not None and known[0]() is array:
            return known[1]
        digest = content_digest(array)
        key = id(array)
        # The id of an array that is gone may be given to another one.
        self._digests[key] = (weakref.ref(array, lambda _: self._digests.pop(key, None)), digest)
        return digest

    def _write(self, path: Path, array: FloatArray) -> None:
        try:
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            log.warning("%s cannot be written (%s): the array is sent with its blocks", path, error)
            path.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return Path(self._home.name) / f"{digest}.npy"


class ArrayCache:
    """The worker's side: arrays by digest, each read or received and checked once."""

    def __init__(self) -> None:
        self._arrays: OrderedDict[str, FloatArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, reference: ArrayReference, received: FloatArray | None = None) -> FloatArray | None:
        """The array: as received, from the cache or from its file; None if it is nowhere here."""
        with self._lock:
            array = received if received is not None else self._arrays.get(reference.digest)
            if array is None:
                array = _mapped(reference)
            if array is not None:
                self._keep(reference.digest, array)
        return array

    def _keep(self, digest: str, array: FloatArray) -> None:
        self._arrays[digest] = array
        self._arrays.move_to_end(digest)
        while len(self._arrays) > 1 and sum(a.nbytes for a in self._arrays.values()) > CACHE_BYTES:
            self._arrays.popitem(last=False)


def content_digest(array: FloatArray) -> str:
    """SHA-256 of shape and content."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _mapped(reference: ArrayReference) -> FloatArray | None:
    """The file as a memory map, which processes of one machine share; None if absent or different."""
    try:
        array: FloatArray = np.load(reference.path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if content_digest(array) == reference.digest else None
