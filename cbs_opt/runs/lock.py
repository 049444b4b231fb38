"""One process at a time in a folder: a lock that ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from cbs_opt.errors import RunInUseError

LOCK_FILE = "run.lock"


class RunLock:
    """Exclusive use of a folder; use as a context manager.

    Parameters
    ----------
    directory : path
        Exists.

    Raises
    ------
    RunInUseError
        If another process, or another call in this one, has the folder.
    OSError
        If the folder cannot be written.

    Notes
    -----
    A POSIX record lock, which belongs to the process alone: unlike the locks of `flock` it is not held
    on by worker processes that were forked and outlive a parent that was killed. Within one process such
    locks do not exclude each other, hence the list.
    """

    _held: ClassVar[set[tuple[int, Path]]] = set()

    def __init__(self, directory: Path) -> None:
        path = directory.resolve() / LOCK_FILE
        # A forked child has the list, but not the locks.
        self._key = (os.getpid(), path)
        if self._key in self._held:
            raise _in_use(directory)
        # To close any descriptor of the file would end the lock, so it is opened after the check.
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._handle)
            if isinstance(error, BlockingIOError | PermissionError):
                raise _in_use(directory) from None
            raise
        self._held.add(self._key)

    def release(self) -> None:
        """Let others have the folder."""
        if self._key in self._held:
            self._held.discard(self._key)
            os.close(self._handle)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _in_use(directory: Path) -> RunInUseError:
    return RunInUseError(
        "run_dir", f"{directory}: another run is using it", "wait for it, or choose another directory"
    )
