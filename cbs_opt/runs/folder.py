"""The folder of a run: what was asked for, and pieces of the result, each written at once and kept.

``run.json`` is the fingerprint: everything that decides the result, as plain values. The other files are
pieces, named by what they hold. A piece appears whole or not at all, carries a checksum and the fingerprint
of its run, and is never changed, but for the state of a search, which takes the place of the one before. One
that is damaged is not believed: it is made again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from cbs_opt.errors import RunInUseError, RunMismatchError
from formulations.errors import InstanceFormatError
from formulations.files import (
    PARTIAL,
    checksum,
    json_object,
    read_container,
    write_atomically,
    write_container,
)

PathLike = str | os.PathLike[str]
Arrays = Mapping[str, np.ndarray[Any, Any]]
Piece = tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]
"""Header and arrays."""
RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
KIND = "cbs-opt piece of a run"
VERSION = 1
LARGEST_PIECE = 1 << 42
SAVE_EVERY = 2.0
"""Seconds of work that a kill may cost where small results are written together."""
QUICK_WRITE = 0.04
"""Seconds that a state may take to write; one that takes longer is written less often: 2 % of a search."""
MOST_DIFFERENCES = 8
"""Differences that a message lists."""

log = logging.getLogger(__name__)


class Pieces:
    """Where the pieces of a run are kept: a `RunStore`, or this, which keeps none."""

    writes: ClassVar[bool] = False
    """Whether pieces are kept at all."""

    def recall(self, name: str) -> Piece | None:
        """Return the piece of that name; None if it is missing, or damaged, which is logged."""
        return None

    def keep(self, name: str, header: Mapping[str, Any], arrays: Arrays, *, compress: bool = True) -> None:
        """Put a piece on disk; when this returns it is there."""

    def drop(self, pattern: str) -> None:
        """Remove the pieces whose names match a glob."""


class RunStore(Pieces):
    """The pieces of one run in a directory, open for one process; use as a context manager.

    The directory is made if missing. The fingerprint, everything that decides the result, is written to
    ``run.json`` by the first run; every piece carries its SHA-256, `run`.

    Raises
    ------
    RunMismatchError
        If the directory holds another run, with every difference named, or its fingerprint is damaged.
    RunInUseError
        If another process is at it.
    OSError
        If the directory cannot be written.
    """

    writes = True

    def __init__(self, directory: PathLike, fingerprint: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise RunMismatchError("run_dir", f"{directory} is a file", "pass a directory")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / LOCK_FILE, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            found = f"{directory}: another run is using it"
            raise RunInUseError("run_dir", found, "wait for it, or choose another directory") from None
        try:
            self.run = self._agree(json.loads(json.dumps(fingerprint)))
            # What killed writes left: no other process writes here now.
            for path in self.directory.glob(f".*{PARTIAL}"):
                path.unlink()
        except BaseException:
            self._lock.release()
            raise

    def recall(self, name: str) -> Piece | None:
        path = self._path(name)
        if not path.exists():
            return None
        try:
            header, arrays = read_container(path, KIND, VERSION, LARGEST_PIECE)
        except InstanceFormatError as error:
            log.warning("%s; it is made again", error.found)
            return None
        if header.get("run") != self.run or header.get("piece") != name:
            log.warning("%s is of another run or piece; it is made again", path)
            return None
        return header, arrays

    def keep(self, name: str, header: Mapping[str, Any], arrays: Arrays, *, compress: bool = True) -> None:
        whole = {**header, "format": KIND, "version": VERSION, "run": self.run, "piece": name}
        write_container(self._path(name), whole, arrays, compress=compress)

    def drop(self, pattern: str) -> None:
        for path in self.directory.glob(f"{pattern}.npz"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have the directory."""
        self._lock.release()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.npz"

    def _agree(self, fingerprint: dict[str, Any]) -> str:
        """Write the fingerprint, or compare it with the one that is there; return its checksum."""
        path = self.directory / RUN_FILE
        if not path.exists():
            self._require_empty()
            write_atomically(path, (json.dumps(fingerprint, indent=1, sort_keys=True) + "\n").encode())
            return checksum(fingerprint)
        try:
            stored = json_object(path.read_bytes())
        except (OSError, ValueError) as error:
            found = f"{path} is damaged ({error})"
            raise RunMismatchError("run_dir", found, "use an empty directory") from error
        changed = _differences(stored, fingerprint)
        if changed:
            more = len(changed) - MOST_DIFFERENCES
            listed = "; ".join(changed[:MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            found = f"{self.directory} holds a run with another {listed}"
            remedy = "repeat the first call exactly, or use an empty directory"
            raise RunMismatchError("run_dir", found, remedy)
        return checksum(stored)

    def _require_empty(self) -> None:
        """Refuse a folder of other things: pieces would replace files of the same name."""
        others = sorted(path.name for path in self.directory.iterdir())
        others = [name for name in others if name not in (LOCK_FILE, RUN_FILE) and not name.startswith(".")]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            found = f"{self.directory} holds {others[0]}{more}, but no run"
            raise RunMismatchError("run_dir", found, "use an empty or a new directory")


class Series:
    """Pieces in the order in which they were written, for results that come little by little.

    Their names are `name` and a number.
    """

    def __init__(self, store: Pieces, name: str) -> None:
        self._store = store
        self._name = name
        self._next = 0
        self._saved_at = time.monotonic()

    def recall(self) -> Iterator[Piece]:
        """Yield the pieces up to the first one missing or not wanted; the next is written there."""
        self._next = 0
        while (piece := self._store.recall(f"{self._name}_{self._next:04d}")) is not None:
            yield piece
            self._next += 1

    @property
    def due(self) -> bool:
        """True if the last write is `SAVE_EVERY` seconds old."""
        return time.monotonic() - self._saved_at >= SAVE_EVERY

    def add(self, header: Mapping[str, Any], arrays: Arrays, *, compress: bool = True) -> None:
        """Write the next piece."""
        self._store.keep(f"{self._name}_{self._next:04d}", header, arrays, compress=compress)
        self._next += 1
        self._saved_at = time.monotonic()


class Latest:
    """The piece `name` of a store, which is replaced as the work goes on."""

    def __init__(self, store: Pieces, name: str) -> None:
        self._store = store
        self._name = name
        self._saved_at = time.monotonic()
        self._writing = 0.0

    def recall(self) -> Piece | None:
        """Return what was written last."""
        return self._store.recall(self._name)

    @property
    def due(self) -> bool:
        """True if the last write is `SAVE_EVERY` seconds old, or longer where it took long."""
        wait = SAVE_EVERY * max(1.0, self._writing / QUICK_WRITE)
        return self._store.writes and time.monotonic() - self._saved_at >= wait

    def replace(self, header: Mapping[str, Any], arrays: Arrays) -> None:
        """Write the piece in place of the one before."""
        began = time.monotonic()
        self._store.keep(self._name, header, arrays, compress=False)
        self._saved_at = time.monotonic()
        self._writing = self._saved_at - began


def in_numpy(tensor: Tensor) -> NDArray[Any]:
    """Return floating values as an array of float32, or of float64, which hold those of every parameter."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide.detach().cpu().contiguous().numpy()


def _differences(stored: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> list[str]:
    """List what differs between two fingerprints, item by item: ``options.seed (0 -> 1)``.

    A fingerprint without a format is of an earlier release, and compared as far as it goes.
    """
    before, now = dict(_items(stored)), dict(_items(fingerprint))
    names = before.keys() | now.keys() if "format" in stored else before.keys()
    pairs = ((name, before.get(name), now.get(name)) for name in sorted(names))
    return [f"{name} ({_short(old)} -> {_short(new)})" for name, old, new in pairs if old != new]


def _items(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield name, value
        return
    for key, entry in value.items():
        yield from _items(entry, f"{name}.{key}" if name else str(key))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
