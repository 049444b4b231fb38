"""Lines that say whether they are whole: a CRC-32 in eight hex digits, a space, the text."""

from __future__ import annotations

import zlib


def checked_line(body: bytes) -> bytes:
    """The line of a text without newlines, its newline included."""
    return b"%08x %s\n" % (zlib.crc32(body), body)


def checked_body(line: bytes) -> bytes | None:
    """The text of a line without its newline; None if it is not as it was written."""
    checksum, _, body = line.partition(b" ")
    return body if checksum == b"%08x" % zlib.crc32(body) else None
