"""An append-only file of results, one JSON object a line with its checksum, that lets a long run resume."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

OLD_START = b"{"
"""How a line without a checksum begins; no checksum does."""


def commit() -> str:
    """Return the commit of the checkout that this module belongs to, with a + if files differ; else ""."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty=+"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def settings_key(settings: Mapping[str, Any]) -> str:
    """16 hex digits that change whenever a setting does."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class Ledger:
    """Results by the key of their settings.

    Parameters
    ----------
    path : Path
        Created with its directory at the first `add`. A line that is not as it was written, such as
        one cut short by a crash, is logged and counts as absent. Lines of older ledgers have no
        checksum: they count if they are JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results = dict(self._read())

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._results[key]

    def results(self) -> list[dict[str, Any]]:
        """Return all results, in the order in which they were added."""
        return list(self._results.values())

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Append a result and make sure it is on disk."""
        record = {**result, "key": key}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as stream:
            if self._cut_short():
                stream.write(b"\n")
            stream.write(line(record))
            stream.flush()
            os.fsync(stream.fileno())
        self._results[key] = record

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self.path.is_file():
            return
        for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
            checksum, _, body = (b"", b"", line) if line.startswith(OLD_START) else line.partition(b" ")
            try:
                if checksum and checksum != _checksum(body):
                    raise ValueError("not as it was written")
                record = json.loads(body)
                key = record["key"]
            except (ValueError, KeyError, TypeError):
                log.warning("%s, line %d is not a result and is left out", self.path, number)
                continue
            yield key, record

    def _cut_short(self) -> bool:
        """Whether the last line lacks its end."""
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return False
        with self.path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) != b"\n"


def line(record: Mapping[str, Any]) -> bytes:
    """Return a result with its key as a line of a ledger."""
    body = json.dumps(record, sort_keys=True).encode()
    return _checksum(body) + b" " + body + b"\n"


def _checksum(body: bytes) -> bytes:
    """Return the CRC-32 of a line in eight hex digits."""
    return b"%08x" % zlib.crc32(body)
